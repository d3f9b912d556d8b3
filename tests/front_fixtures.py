"""What the tests of messages, images, templates, tokenizers and prompts share.

The tokenizer is that of the pocket model. References come from transformers, imported once and late, so that
tests without a reference need none.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from autoglm_edge.runtime.manifest import ImageSpec, TokenSpec
from autoglm_edge.runtime.prompt.tokenizer import Tokenizer

POCKET = Path(__file__).parents[1] / "autoglm_edge" / "pocket"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Written for these tests after the behaviour described for GLM-4.1V: [gMASK]<sop>, a newline after each role,
# system and assistant contents printed as they are, images of a user's list in place.
GLM_TEMPLATE = """[gMASK]<sop>
{%- for turn in messages -%}
{{- '<|' ~ turn.role ~ '|>\n' -}}
{%- if turn.role == 'user' and turn.content is not string -%}
  {%- for part in turn.content -%}
    {%- if part.type == 'image' or 'image' in part -%}<|begin_of_image|><|image|><|end_of_image|>
    {%- elif part.type == 'text' -%}{{- part.text -}}
    {%- endif -%}
  {%- endfor -%}
{%- else -%}
  {{- turn.content -}}
{%- endif -%}
{%- endfor -%}
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def spec(**changes: Any) -> ImageSpec:
    """The image processor of GLM-4.1V, with changes."""
    values: dict[str, Any] = dict(
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        min_pixels=12544,
        max_pixels=9633792,
        mean=MEAN,
        std=STD,
        rescale_factor=1 / 255,
        resample=3,
    )
    return ImageSpec(**(values | changes))


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(POCKET)


@functools.cache
def token_spec() -> TokenSpec:
    config = json.loads((POCKET / "config.json").read_text(encoding="utf-8"))
    return TokenSpec(
        eos=tuple(config["eos_token_id"]),
        pad=config["pad_token_id"],
        image=config["image_token_id"],
        image_start=config["image_start_token_id"],
        image_end=config["image_end_token_id"],
    )


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Blocks of random colour with noise on some, so that filters have edges and flat areas to act on."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, ((height + 7) // 8, (width + 7) // 8, 3), dtype=np.uint8)
    array = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    array[::3] ^= random.integers(0, 64, array[::3].shape, dtype=np.uint8)
    return Image.fromarray(np.ascontiguousarray(array)).convert(mode)


@functools.cache
def reference_tokenizer() -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(str(POCKET))


def reference_image_processor(image: ImageSpec) -> Any:
    pytest.importorskip("transformers")
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    return Glm4vImageProcessorPil(
        size={"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels},
        resample=image.resample,
        patch_size=image.patch_size,
        temporal_patch_size=image.temporal_patch_size,
        merge_size=image.merge_size,
        image_mean=list(image.mean),
        image_std=list(image.std),
        rescale_factor=image.rescale_factor,
    )


def reference_processor(image: ImageSpec, template: str) -> Any:
    """transformers' whole processor, less its video half, which needs torchvision."""
    pytest.importorskip("transformers")
    from transformers.models.glm4v.processing_glm4v import Glm4vProcessor

    class WithoutVideo(Glm4vProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    return WithoutVideo(reference_image_processor(image), reference_tokenizer(), None, chat_template=template)


def reference_positions(
    ids: np.ndarray, grids: list[tuple[int, int, int]], image_token: int, merge_size: int
) -> tuple[np.ndarray, int]:
    """transformers' get_rope_index on a stand-in for the model, which it asks for one number only."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from types import SimpleNamespace

    from transformers.models.glm4v.modeling_glm4v import Glm4vModel

    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge_size)),
        get_vision_position_ids=functools.partial(Glm4vModel.get_vision_position_ids, None),
    )
    tensor = torch.tensor(ids)[None]
    positions, delta = Glm4vModel.get_rope_index(
        model,
        tensor,
        (tensor == image_token).int(),
        image_grid_thw=torch.tensor(grids) if grids else None,
    )
    return positions[:, 0].numpy(), int(delta) + len(ids)
