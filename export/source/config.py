"""What a checkpoint's JSON files say about the model, as frozen dataclasses.

In: config.json, generation_config.json and the image processor's settings, parsed. Out: `ModelConfig`. Reads
the files as transformers 4 and as transformers 5 write them. Keys that are absent mean what transformers
takes them for (`configuration_glm4v.py`); keys that contradict each other, and settings that the graphs do
not cover, are errors. Knows nothing of weights, and not which model families exist: see `checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoglm_edge.errors import CheckpointError
from autoglm_edge.export.files import CONFIG_NAME, GENERATION_NAME
from autoglm_edge.export.settings import MAX_NUMBER, Settings
from autoglm_edge.runtime.manifest import ImageSpec, TokenSpec

from .processor import image_spec

SAMPLING_LIMITS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (0.0, MAX_NUMBER),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-30, 10.0),
}
"""Sampling defaults that are taken over, with the least and most that the runtime can use."""
MAX_LAYERS = 1000
"""Bound against absurd files."""


@dataclass(frozen=True)
class TextConfig:
    """The decoder.

    Attributes:
        hidden: C.
        layers: L.
        heads: H, query heads.
        kv_heads: K.
        head_dim: D, always hidden / heads.
        intermediate: width of the MLP; gate and up lie in one tensor of twice that.
        vocab: V, rows of the embedding.
        context_length: largest position trained for.
        norm_eps: of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rotary_dim: first dimensions of a head that are rotated.
        mrope_section: pairs that follow time, height and width; the sum is rotary_dim / 2.
        attention_bias: q, k and v have biases (always, in this family).
        tied_head: the head is the embedding; there is no tensor lm_head.weight to read.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rotary_dim: int
    mrope_section: tuple[int, int, int]
    attention_bias: bool
    tied_head: bool

    def __post_init__(self) -> None:
        if self.layers > MAX_LAYERS:
            raise CheckpointError(
                f"{CONFIG_NAME} gives num_hidden_layers {self.layers}, more than {MAX_LAYERS}"
            )
        if self.heads * self.head_dim != self.hidden:
            raise CheckpointError(
                f"{CONFIG_NAME} gives hidden_size {self.hidden}, num_attention_heads {self.heads} and a head "
                f"size of {self.head_dim}; the head size must be hidden_size / num_attention_heads"
            )
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"{CONFIG_NAME} gives num_attention_heads {self.heads} and num_key_value_heads "
                f"{self.kv_heads}; the second must divide the first"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise CheckpointError(
                f"{CONFIG_NAME} rotates {self.rotary_dim} of {self.head_dim} dimensions of a head, must be "
                "an even number from 2 to all of them; partial_rotary_factor is wrong"
            )
        if 2 * sum(self.mrope_section) != self.rotary_dim:
            raise CheckpointError(
                f"{CONFIG_NAME} gives the mrope_section {list(self.mrope_section)}, must add up to "
                f"{self.rotary_dim // 2} (half of the {self.rotary_dim} rotated dimensions)"
            )


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower.

    Attributes:
        hidden: width of the tower.
        depth: blocks.
        heads: heads of a block.
        head_dim: hidden / heads, all of it rotated.
        patch_size: side of a patch in pixels.
        temporal_patch_size: frames per patch.
        merge_size: patches along a side that become one token.
        out_hidden: width of the image features, C; also the width of the MLP in a block.
        merger_intermediate: width of the merger's MLP.
        image_size: pixels along a side that the learned positions stand for.
        norm_eps: of every RMSNorm.
        attention_bias: the fused qkv projection has a bias.
        rope_theta: base of the rotary frequencies.
        in_channels: 3.
    """

    hidden: int
    depth: int
    heads: int
    head_dim: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    out_hidden: int
    merger_intermediate: int
    image_size: int
    norm_eps: float
    attention_bias: bool
    rope_theta: float
    in_channels: int

    def __post_init__(self) -> None:
        where = f"{CONFIG_NAME}, vision_config,"
        if self.depth > MAX_LAYERS:
            raise CheckpointError(f"{where} gives depth {self.depth}, more than {MAX_LAYERS}")
        if self.heads * self.head_dim != self.hidden or self.head_dim % 4:
            raise CheckpointError(
                f"{where} gives hidden_size {self.hidden} and num_heads {self.heads}; the head size must be "
                "their quotient and a multiple of 4"
            )
        if self.in_channels != 3:
            raise CheckpointError(f"{where} gives in_channels {self.in_channels}; only RGB, 3, is supported")
        if self.image_size < self.patch_size:
            raise CheckpointError(
                f"{where} gives image_size {self.image_size} and patch_size {self.patch_size}; not one patch "
                "fits"
            )

    @property
    def position_side(self) -> int:
        """Learned positions along a side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ModelConfig:
    """All that an export needs to know besides the weights.

    Attributes:
        text: the decoder.
        vision: the vision tower.
        image: the image processor.
        tokens: special ids.
        generation: sampling defaults of the checkpoint, as far as it gives any; a checkpoint that does not
            ask for sampling has temperature 0.
        source: hub id or folder name of the checkpoint.
        config_sha256: digest of config.json, byte for byte.
    """

    text: TextConfig
    vision: VisionConfig
    image: ImageSpec
    tokens: TokenSpec
    generation: Mapping[str, float] = field(hash=False)
    source: str
    config_sha256: str

    def __post_init__(self) -> None:
        if self.vision.out_hidden != self.text.hidden:
            raise CheckpointError(
                f"{CONFIG_NAME} gives out_hidden_size {self.vision.out_hidden} in vision_config but "
                f"hidden_size {self.text.hidden} in text_config; they must be equal"
            )
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            model, processor = getattr(self.vision, name), getattr(self.image, name)
            if model != processor:
                raise CheckpointError(
                    f"the image processor's settings give {name} {processor}, {CONFIG_NAME} gives {model}; "
                    "the files belong to different models"
                )
        ids = {
            "image_token_id": self.tokens.image,
            "image_start_token_id": self.tokens.image_start,
            "image_end_token_id": self.tokens.image_end,
        }
        if len(set(ids.values())) != len(ids):
            raise CheckpointError(f"{CONFIG_NAME} gives {ids}; the three ids must differ")
        ids |= {"eos_token_id": max(self.tokens.eos), "pad_token_id": self.tokens.pad or 0}
        for name, value in ids.items():
            if value >= self.text.vocab:
                raise CheckpointError(f"{name} is {value}, but the vocabulary has {self.text.vocab} entries")

    @classmethod
    def from_documents(
        cls,
        config: Mapping[str, Any],
        processor: Mapping[str, Any],
        generation: Mapping[str, Any],
        *,
        processor_name: str,
        source: str,
        config_sha256: str,
    ) -> ModelConfig:
        """Build from parsed files.

        Args:
            config: config.json.
            processor: settings of the image processor.
            generation: generation_config.json, empty if there is none.
            processor_name: file that `processor` comes from, for messages.
            source: hub id or folder name.
            config_sha256: digest of config.json.

        Raises:
            CheckpointError: a value missing, of a wrong type, contradicted elsewhere, or unsupported.
        """
        text = config.get("text_config")
        vision = config.get("vision_config")
        if text is not None and not isinstance(text, dict):
            raise CheckpointError(f"{CONFIG_NAME} gives text_config as {text!r}, must be an object")
        if not isinstance(vision, dict):
            raise CheckpointError(
                f"{CONFIG_NAME} has no vision_config; a model without its vision tower is not supported"
            )
        texts = Settings(
            ((f"{CONFIG_NAME}, text_config,", text or {}), (f"{CONFIG_NAME}, top level,", config))
        )
        return cls(
            text=_text(texts, config),
            vision=_vision(Settings(((f"{CONFIG_NAME}, vision_config,", vision),))),
            image=image_spec(Settings(((f"{processor_name}", processor),))),
            tokens=_tokens(config, text or {}, generation),
            generation=_sampling(Settings(((GENERATION_NAME, generation),))),
            source=source,
            config_sha256=config_sha256,
        )


def _text(settings: Settings, config: Mapping[str, Any]) -> TextConfig:
    settings.must_be("hidden_act", "silu")
    if not settings.flag("attention_bias", True):
        raise CheckpointError(
            f"{settings.where} gives attention_bias false; this family has biases on q, k and v, and "
            "a model without them is not supported"
        )
    hidden = settings.integer("hidden_size", 4096)
    heads = settings.integer("num_attention_heads", 32)
    has_kv = any("num_key_value_heads" in values for _, values in settings.places)
    head_dim = settings.integer("head_dim", max(1, hidden // heads))
    rope = settings.below("rope_parameters", "rope_scaling")
    for where, values in rope.places[: -len(settings.places)]:
        if nested := next((key for key, value in values.items() if isinstance(value, dict)), None):
            raise CheckpointError(
                f"{where} gives {nested} settings of its own; one rope for all layers is supported"
            )
    older = rope.find("type", "default")
    # Older files also call the default rope of a model with pictures mrope, beside its present name.
    rope_type = rope.find("rope_type", older, aliases=() if older == "mrope" else ("type",))
    if rope_type != "default":
        raise CheckpointError(f"{rope.where} gives rope_type {rope_type!r}; only 'default' is supported")
    factor = rope.number("partial_rotary_factor", 1.0)
    section = rope.find("mrope_section", [8, 12, 12])
    if (
        not isinstance(section, list)
        or len(section) != 3
        or any(type(n) is not int or n < 0 for n in section)
    ):
        raise CheckpointError(f"{rope.where} gives mrope_section {section!r}, must be three numbers of pairs")
    return TextConfig(
        hidden=hidden,
        layers=settings.integer("num_hidden_layers", 40),
        heads=heads,
        kv_heads=settings.integer("num_key_value_heads", heads if has_kv else 2),
        head_dim=head_dim,
        intermediate=settings.integer("intermediate_size", 13696),
        vocab=settings.integer("vocab_size", 151552),
        context_length=settings.integer("max_position_embeddings", 32768),
        norm_eps=settings.number("rms_norm_eps", 1e-5),
        rope_theta=rope.number("rope_theta", 10000.0),
        rotary_dim=int(head_dim * factor),
        mrope_section=(section[0], section[1], section[2]),
        attention_bias=True,
        tied_head=_tied(config),
    )


def _tied(config: Mapping[str, Any]) -> bool:
    """Whether head and embedding are one; transformers 4 may say so in text_config alone."""
    text = config.get("text_config") or {}
    outer, inner = config.get("tie_word_embeddings"), text.get("tie_word_embeddings")
    for where, value in (("", outer), (" in text_config", inner)):
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(
                f"{CONFIG_NAME} gives tie_word_embeddings {value!r}{where}, must be true or false"
            )
    if outer and inner is False:
        raise CheckpointError(
            f"{CONFIG_NAME} gives tie_word_embeddings true at the top level but false in text_config; make "
            "the two agree"
        )
    return bool(outer or inner)


def _vision(settings: Settings) -> VisionConfig:
    settings.must_be("hidden_act", "silu")
    hidden = settings.integer("hidden_size", 1536)
    heads = settings.integer("num_heads", 12)
    rope = settings.below("rope_parameters")
    rope_type = rope.find("rope_type", "axial", aliases=("type",))
    if rope_type not in ("axial", "default"):  # "default" was written before the kind had a name
        raise CheckpointError(f"{rope.where} gives rope_type {rope_type!r}; only 'axial' is supported")
    return VisionConfig(
        hidden=hidden,
        depth=settings.integer("depth", 24),
        heads=heads,
        head_dim=settings.integer("head_dim", max(1, hidden // heads)),
        patch_size=settings.integer_or_equal_list("patch_size", 14),
        temporal_patch_size=settings.integer_or_equal_list("temporal_patch_size", 2),
        merge_size=settings.integer("spatial_merge_size", 2),
        out_hidden=settings.integer("out_hidden_size", 4096),
        merger_intermediate=settings.integer("intermediate_size", 13696),
        image_size=settings.integer_or_equal_list("image_size", 336),
        norm_eps=settings.number("rms_norm_eps", 1e-5),
        attention_bias=settings.flag("attention_bias", False),
        rope_theta=rope.number("rope_theta", 10000.0),
        in_channels=settings.integer("in_channels", 3),
    )


def _tokens(config: Mapping[str, Any], text: Mapping[str, Any], generation: Mapping[str, Any]) -> TokenSpec:
    """Special ids; config.json is asked for eos ids only if generation_config.json gives none."""
    top = Settings(((CONFIG_NAME, config),))
    eos = _ids(GENERATION_NAME, generation.get("eos_token_id"))
    if not eos:
        eos = _ids(CONFIG_NAME, text.get("eos_token_id")) + _ids(CONFIG_NAME, config.get("eos_token_id"))
    if not eos:
        raise CheckpointError(
            f"neither {GENERATION_NAME} nor {CONFIG_NAME} gives eos_token_id, so generation would not end; "
            "add it"
        )
    pads = (generation.get("pad_token_id"), text.get("pad_token_id"), config.get("pad_token_id"))
    pad = next((value for value in pads if value is not None), None)
    if pad is not None and (type(pad) is not int or pad < 0):
        raise CheckpointError(f"the checkpoint gives pad_token_id {pad!r}, must be a token id")
    return TokenSpec(
        eos=tuple(dict.fromkeys(eos)),
        pad=pad,
        image=top.integer("image_token_id", 151343, least=0),
        image_start=top.integer("image_start_token_id", 151339, least=0),
        image_end=top.integer("image_end_token_id", 151340, least=0),
    )


def _ids(where: str, value: object) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(item) is not int or item < 0 for item in items):
        raise CheckpointError(
            f"{where} gives eos_token_id {value!r}, must be a token id or a list of token ids"
        )
    return tuple(items)


def _sampling(settings: Settings) -> dict[str, float]:
    """Sampling defaults; top_k 0 and repetition_penalty 1 mean off, as in the file."""
    found: dict[str, float] = {}
    sample = settings.flag("do_sample", False)
    for key, (least, most) in SAMPLING_LIMITS.items():
        value = settings.find(key)
        if value is None or (not sample and key != "repetition_penalty"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            above = "above 0" if key == "repetition_penalty" else "of at least 0"
            limit = f" and at most {most:g}" if most < MAX_NUMBER else ""
            raise CheckpointError(f"{settings.where} gives {key} {value!r}, must be a number {above}{limit}")
        if key == "top_k" and value != int(value):
            raise CheckpointError(f"{settings.where} gives top_k {value!r}, must be a whole number")
        found[key] = float(value)
    return {"temperature": 1.0 if sample else 0.0, **found}
