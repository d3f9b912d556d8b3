"""Weights of the pocket model and the batched forward used to train them.

In: resized screens and packed token rows (see `pocket_rows`). Out: logits, and what the lessons of the
decoder look at. The forward runs over the modules of `Glm4vForConditionalGeneration` itself, so
`save_pretrained` stores what was trained; it only assumes that all images of a batch have one size and that
its rows share a prefix. This module knows nothing of what the labels mean.

Shapes: B screens, P patches, N image tokens (P / 4), S prefix, L row length, C text width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from glm_tokens import EOS_TOKENS
from pocket_pool import GRIDS, Grid
from pocket_tokenizer import TOKEN_IDS, VOCABULARY_SIZE
from torch import Tensor, nn
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

PATCH = 14
POINTING_LAYER = 1
READING_LAYER = 3


def make_config() -> Glm4vConfig:
    """Configuration of the pocket model: the real architecture at about 1/2700 of its size."""
    stops = [TOKEN_IDS[token] for token in EOS_TOKENS]
    return Glm4vConfig(
        architectures=["Glm4vForConditionalGeneration"],
        text_config={
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [4, 4, 4],
            },
            "pad_token_id": TOKEN_IDS["<|endoftext|>"],
            "eos_token_id": stops,
            "dtype": "bfloat16",
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "num_heads": 4,
            "out_hidden_size": 192,
            "intermediate_size": 384,
            "image_size": 336,
            "patch_size": PATCH,
            "attention_bias": False,
        },
        image_token_id=TOKEN_IDS["<|image|>"],
        video_token_id=TOKEN_IDS["<|video|>"],
        image_start_token_id=TOKEN_IDS["<|begin_of_image|>"],
        image_end_token_id=TOKEN_IDS["<|end_of_image|>"],
        video_start_token_id=TOKEN_IDS["<|begin_of_video|>"],
        video_end_token_id=TOKEN_IDS["<|end_of_video|>"],
        tie_word_embeddings=False,
        pad_token_id=TOKEN_IDS["<|endoftext|>"],
        eos_token_id=stops,
        dtype="bfloat16",
    )


def make_model(seed: int) -> Glm4vForConditionalGeneration:
    """Fresh fp32 weights: fan-in scaled matrices, key projections equal to a query head of their group."""
    torch.manual_seed(seed)
    config = make_config()
    config.dtype = config.text_config.dtype = None
    model = Glm4vForConditionalGeneration(config).float()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
        nn.init.normal_(model.model.visual.embeddings.position_embedding.weight, std=0.3)
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            heads = attention.q_proj.weight.view(attention.num_heads, attention.head_dim, -1)
            attention.k_proj.weight.copy_(heads[:: attention.num_key_value_groups].flatten(0, 1))
            layer.post_self_attn_layernorm.weight.fill_(0.5)
            layer.post_mlp_layernorm.weight.fill_(0.5)
    return model


class Watched(NamedTuple):
    """What the extra lessons of the decoder look at.

    `pointing` (B, Q, S + L) and `reading` (B, L, S + L) are logarithms of the attention of the first head of
    `POINTING_LAYER`, from the pointers of the batch, and of `READING_LAYER`; `middle` (B, L, C) is the
    residual stream after `POINTING_LAYER`.
    """

    pointing: Tensor
    reading: Tensor
    middle: Tensor


class PocketForward(nn.Module):
    """Batched training forward over the modules of a Glm4v model, plus a head that is thrown away.

    The head predicts from each image token the label class, the four digits of the element centre and the
    switch state; it gives the vision tower a direct lesson before and while the decoder learns to read it.
    """

    def __init__(self, model: Glm4vForConditionalGeneration, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.num_classes = num_classes
        width = model.config.text_config.hidden_size
        self.cell_head = nn.Linear(width, num_classes + 4 * 10 + 3)
        nn.init.normal_(self.cell_head.weight, std=width**-0.5)
        nn.init.zeros_(self.cell_head.bias)
        self.place_head = nn.Linear(width, 4 * 10)
        self.state_head = nn.Linear(width, 3)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]) * 255
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]) * 255
        for name, value in {"mean": mean, "std": std}.items():
            self.register_buffer(f"_{name}", value, persistent=False)
        self._places = {grid.pixels: self._places_of(grid) for grid in GRIDS}

    def _places_of(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Where patches are: weights that take the table to a grid (P, table), cosines and sines (P, D)."""
        model = self.model.model.visual
        height, width = 2 * grid.rows, 2 * grid.columns
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        rows, columns = (
            part.reshape(grid.rows, 2, grid.columns, 2).transpose(1, 2).flatten() for part in (rows, columns)
        )
        side = round(model.embeddings.num_positions**0.5)
        unit = torch.eye(side * side).view(1, side * side, side, side)
        points = torch.stack(((columns + 0.5) / width, (rows + 0.5) / height), -1) * 2 - 1
        sampled = F.grid_sample(unit, points[None, :, None], "bicubic", "border", align_corners=False)
        cos, sin = model.rotary_pos_emb(torch.zeros(1), torch.stack((rows, columns), -1))
        return sampled[0, :, :, 0].T.contiguous(), cos, sin

    def patches(self, pixels: Tensor) -> Tensor:
        """Normalised block-major patches of one frame: (B, H, W, 3) uint8 to (B, P, 588)."""
        image = (pixels.float() - self._mean) / self._std
        rows, columns = image.shape[1] // (2 * PATCH), image.shape[2] // (2 * PATCH)
        batch = image.view(-1, rows, 2, PATCH, columns, 2, PATCH, 3)
        return batch.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(
            len(image), 4 * rows * columns, 3 * PATCH * PATCH
        )

    def see(self, pixels: Tensor) -> Tensor:
        """Image tokens of a batch of screens: (B, H, W, 3) uint8 to (B, N, C)."""
        visual = self.model.model.visual
        table, cos, sin = self._places[tuple(pixels.shape[1:3])]
        weight = visual.patch_embed.proj.weight.sum(2).flatten(1)
        x = F.linear(self.patches(pixels), weight, visual.patch_embed.proj.bias)  # (B, P, vision width)
        x = _rms(x, visual.post_conv_layernorm)
        x = x + table @ visual.embeddings.position_embedding.weight
        for block in visual.blocks:
            x = x + self._vision_attention(_rms(x, block.norm1), block.attn, cos, sin)
            y = _rms(x, block.norm2)
            x = x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(y)) * block.mlp.up_proj(y))
        x = _rms(x, visual.post_layernorm)
        down = visual.downsample.weight.permute(0, 2, 3, 1).flatten(1)
        x = F.linear(x.reshape(len(x), x.shape[1] // 4, -1), down, visual.downsample.bias)  # (B, N, C)
        merger = visual.merger
        x = F.gelu(merger.post_projection_norm(merger.proj(x)))
        return merger.down_proj(F.silu(merger.gate_proj(x)) * merger.up_proj(x))

    def _vision_attention(self, x: Tensor, attention: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
        batch, patches, width = x.shape
        qkv = attention.qkv(x).view(batch, patches, 3, attention.num_heads, attention.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, P, D)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        q, k = (
            part * cos + torch.cat((-part.chunk(2, -1)[1], part.chunk(2, -1)[0]), -1) * sin for part in (q, k)
        )
        scores = (q * attention.scaling) @ k.transpose(-1, -2)
        mixed = torch.softmax(scores, -1) @ v
        return attention.proj(mixed.transpose(1, 2).reshape(batch, patches, width))

    def read(
        self, batch: dict[str, Tensor], image: Tensor, watch: bool = False
    ) -> tuple[Tensor, Watched | None]:
        """Decoder over packed rows behind a prefix that all of them share, and that is computed once.

        Args:
            batch: `prefix` (S,), `ids` (B, L), `positions` (B, 3, L), `segments` (B, L), `image_start` (B,),
                and `pointers` (B, Q, 2) if watched.
            image: (B, N, C) image tokens.
            watch: whether to return what the extra lessons need.

        Returns:
            Final hidden states of the rows (B, L, C), normalised; and what was watched.
        """
        text = self.model.model.language_model
        shared = text.embed_tokens(batch["prefix"])[None]  # (1, S, C)
        x = self.embed(batch["ids"], image, batch["image_start"])
        first = torch.arange(shared.shape[1])[None, None].expand(3, 1, -1)
        turns = _turns(text, shared, first), _turns(text, x, batch["positions"].transpose(0, 1))
        mask = row_mask(batch["segments"], shared.shape[1])
        paid, middle = {}, x
        for index, layer in enumerate(text.layers):
            attention = layer.self_attn
            shared_q, *kept = _project(attention, _rms(shared, layer.input_layernorm), turns[0])
            q, *own = _project(attention, _rms(x, layer.input_layernorm), turns[1])
            k, v = (torch.cat((a.expand(len(x), -1, -1, -1), b), 2) for a, b in zip(kept, own, strict=True))
            if watch and index in (POINTING_LAYER, READING_LAYER):
                looking = q[:, 0]
                seen = mask[:, 0]
                if index == POINTING_LAYER:
                    looking, seen = (_at(part, batch["pointers"][..., 0]) for part in (looking, seen))
                scores = (looking.float() * attention.scaling) @ k[:, 0].float().transpose(1, 2)
                paid[index] = scores.masked_fill(~seen, -1e9).log_softmax(-1)
            if index < len(text.layers) - 1:
                shared = _after(layer, shared, _attend(attention, shared_q, *kept, None))
            x = _after(layer, x, _attend(attention, q, k, v, mask))
            if index == POINTING_LAYER:
                middle = x
        watched = Watched(paid[POINTING_LAYER], paid[READING_LAYER], middle) if watch else None
        return _rms(x, text.norm), watched

    def embed(self, ids: Tensor, image: Tensor, image_start: Tensor) -> Tensor:
        """Embeddings (B, L, C) of ids (B, L), image tokens (B, N, C) written from `image_start` (B,) on."""
        embeds = self.model.model.language_model.embed_tokens(ids)
        places = (image_start[:, None] + torch.arange(image.shape[1]))[..., None].expand_as(image)
        return embeds.scatter(1, places, image.to(embeds.dtype))

    def logits(self, batch: dict[str, Tensor], answers_only: bool = True) -> tuple[Tensor, Tensor]:
        """Logits of a packed batch and its image tokens.

        Returns:
            (answer tokens, V) in row order, or (B, L, V) without `answers_only`; and (B, N, C).
        """
        image = self.see(batch["pixels"])
        hidden, _ = self.read(batch, image)
        if answers_only:
            hidden = hidden[batch["labels"] >= 0]
        return self.model.lm_head(hidden), image


def row_mask(segments: Tensor, prefix: int) -> Tensor:
    """Who sees whom in packed rows behind a prefix: (B, L) segments to (B, 1, L, S + L) bool."""
    count, length = segments.shape
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    head = (segments == 0)[:, None, :]
    shared = torch.ones(count, length, prefix, dtype=torch.bool)
    return torch.cat((shared, (same | head) & causal), -1)[:, None]


def _turns(text: nn.Module, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, L, rotary dims) of positions (3, B, L)."""
    cos, sin = text.rotary_emb(x, positions)
    return cos[:, None], sin[:, None]


def _project(attention: nn.Module, y: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, L, D), keys and values (B, K, L, D), rotated."""
    q = _heads(attention.q_proj(y), attention.num_heads)
    k = _heads(attention.k_proj(y), attention.num_key_value_heads)
    v = _heads(attention.v_proj(y), attention.num_key_value_heads)
    q, k = _rotate(q, *turns), _rotate(k, *turns)
    return q, k, v.to(q.dtype)


def _attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Mixed values, projected: (B, L, C). Without a mask it is causal."""
    k, v = (part.repeat_interleave(attention.num_key_value_groups, 1) for part in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    return attention.o_proj(mixed.transpose(1, 2).flatten(2))


def _after(layer: nn.Module, x: Tensor, mixed: Tensor) -> Tensor:
    """The rest of a layer behind its attention."""
    x = x + _rms(mixed, layer.post_self_attn_layernorm)
    y = _rms(x, layer.post_attention_layernorm)
    gate, up = layer.mlp.gate_up_proj(y).chunk(2, -1)
    return x + _rms(layer.mlp.down_proj(up * F.silu(gate)), layer.post_mlp_layernorm)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """Rows of (B, L, X) at places (B, Q): (B, Q, X); negative places give any row."""
    index = places.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, index)


def _rms(x: Tensor, norm: nn.Module) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * y


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of the first dims of (B, H, L, D); cos and sin are (B, 1, L, rotary dims)."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    half = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
    return torch.cat((turned * cos.to(x.dtype) + half * sin.to(x.dtype), rest), -1)
