"""Folders as published: the keys, extra files and older spellings of the real checkpoints, tiny weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from make_checkpoint import CHAT_TEMPLATE, SHAPES, config_json, make_checkpoint

from autoglm_edge.errors import CheckpointError
from autoglm_edge.export.pipeline import export
from autoglm_edge.export.source.checkpoint import Checkpoint

TINY = SHAPES["tiny"]
ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>", "</answer>")
Folder = Callable[[Path], Path]


def write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")


def config_of_4() -> dict[str, Any]:
    """config.json as transformers 4.5x wrote it for GLM-4.1V, with what hub uploads carry besides."""
    config = config_json(TINY)
    config.pop("image_start_token_id")
    config |= {
        "_name_or_path": "/mnt/checkpoints/step-3000/hf",
        "auto_map": {"AutoModel": "modeling_glm4v.Glm4vModel"},
        "image_start_token_id": TINY.token("<|begin_of_image|>"),
        "vision_start_token_id": TINY.token("<|begin_of_image|>"),
        "vision_end_token_id": TINY.token("<|end_of_image|>"),
        "pad_token_id": TINY.token("<|endoftext|>"),
        "eos_token_id": [TINY.token(name) for name in ENDS],
        "quantization_config": None,
        "use_cache": True,
        "initializer_range": 0.02,
        "output_attentions": False,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "torchscript": False,
        "transformers_version": "4.57.1",
    }
    config["text_config"] |= {
        "_attn_implementation_autoset": True,
        "model_type": "glm4v_text",
        "head_dim": TINY.head_dim,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "image_token_id": None,
        "eos_token_id": config["eos_token_id"],
    }
    config["vision_config"] |= {
        "hidden_dropout_prob": 0.0,
        "num_position_embeddings": 64,
        "torch_dtype": "bfloat16",
    }
    return config


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The first uploads: text settings at the top level, no text_config."""
    text = config.pop("text_config")
    return {**{key: value for key, value in text.items() if key != "model_type"}, **config}


def published(folder: Path) -> Path:
    """A folder with every file that a hub download of the family has."""
    make_checkpoint(folder, shards=4)
    write(folder / "config.json", config_of_4())
    write(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "do_sample": True,
            "eos_token_id": [TINY.token(name) for name in ENDS[:3]],
            "pad_token_id": TINY.token("<|endoftext|>"),
            "temperature": 0.8,
            "top_k": 2,
            "top_p": 0.6,
            "repetition_penalty": 1.0,
            "max_new_tokens": 8192,
            "transformers_version": "4.57.1",
        },
    )
    write(
        folder / "preprocessor_config.json",
        {
            "crop_size": None,
            "data_format": "channels_first",
            "default_to_square": True,
            "device": None,
            "disable_grouping": None,
            "do_center_crop": None,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "Glm4vImageProcessorFast",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "input_data_format": None,
            "max_pixels": None,
            "merge_size": 2,
            "min_pixels": None,
            "patch_expand_factor": 1,
            "patch_size": 14,
            "processor_class": "Glm4vProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "return_tensors": None,
            "size": {"longest_edge": 9633792, "shortest_edge": 12544},
            "temporal_patch_size": 2,
        },
    )
    write(
        folder / "video_preprocessor_config.json",
        {
            "video_processor_type": "Glm4vVideoProcessor",
            "size": {"longest_edge": 100352000, "shortest_edge": 12544},
            "patch_size": 14,
        },
    )
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage:\n- zh\n- en\n---\n\n# A model\n")
    (folder / "LICENSE").write_text("MIT\n")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return published(tmp_path / "GLM-4.1V-9B-Thinking")


def edit(path: Path, **changes: Any) -> None:
    write(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def test_a_published_folder_opens_and_nothing_is_lost(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = Checkpoint.open(folder).config

    assert caplog.records == []
    assert (config.text.rotary_dim, config.text.mrope_section, config.text.tied_head) == (8, (1, 1, 2), False)
    assert (config.image.min_pixels, config.image.max_pixels) == (12544, 9633792)
    assert config.generation == {"temperature": 0.8, "top_p": 0.6, "top_k": 2.0, "repetition_penalty": 1.0}
    assert config.tokens.eos == tuple(TINY.token(name) for name in ENDS[:3])


def test_a_published_folder_becomes_a_bundle_with_its_licence(folder: Path, tmp_path: Path) -> None:
    bundle = export(folder, tmp_path / "out", precision="int4")

    bundle.verify()
    names = {path.name for path in bundle.path.iterdir()}
    assert "video_preprocessor_config.json" not in names and ".gitattributes" not in names
    assert "\nlicense: mit\n" in (bundle.path / "README.md").read_text(encoding="utf-8")


def test_text_settings_at_the_top_level_give_the_same_model(folder: Path) -> None:
    nested = Checkpoint.open(folder).config
    write(folder / "config.json", flat(config_of_4()))

    assert Checkpoint.open(folder).config.text == nested.text


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "default", "mrope_section": [1, 1, 2]},
        {"rope_type": "default", "mrope_section": [1, 1, 2]},
        {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
        {
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    ],
)
def test_every_spelling_of_the_rope_is_the_same_rope(rope: dict[str, Any], folder: Path) -> None:
    before = Checkpoint.open(folder).config
    config = config_of_4()
    config["text_config"]["rope_scaling"] = rope
    write(folder / "config.json", config)

    assert Checkpoint.open(folder).config.text == before.text


@pytest.mark.parametrize("kind", [{"type": "mrope"}, {"rope_type": "mrope"}, {"type": "yarn"}])
def test_a_rope_that_transformers_has_not_either_is_refused(kind: dict[str, str], folder: Path) -> None:
    config = config_of_4()
    config["text_config"]["rope_scaling"] = {**kind, "mrope_section": [1, 1, 2]}
    write(folder / "config.json", config)

    with pytest.raises(CheckpointError, match="only 'default' is supported"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("size", [None, {}])
def test_pixel_limits_of_older_processors_count_where_there_is_no_size(size: Any, folder: Path) -> None:
    edit(folder / "preprocessor_config.json", size=size, min_pixels=3136, max_pixels=5_000_000)

    image = Checkpoint.open(folder).config.image

    assert (image.min_pixels, image.max_pixels) == (3136, 5_000_000)


def test_three_or_four_end_tokens_are_taken_over(folder: Path) -> None:
    for count in (1, 3, 4):
        ends = [TINY.token(name) for name in ENDS[:count]]
        edit(folder / "generation_config.json", eos_token_id=ends if count > 1 else ends[0])

        assert Checkpoint.open(folder).config.tokens.eos == tuple(ends)


def test_without_a_generation_config_the_model_is_greedy_and_ends_by_its_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()

    config = Checkpoint.open(folder).config

    assert config.generation == {"temperature": 0.0}
    assert set(config.tokens.eos) == {TINY.token(name) for name in ENDS}


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("tokenizer_config.json", CHAT_TEMPLATE),
        (
            "tokenizer_config.json",
            [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHAT_TEMPLATE}],
        ),
        ("chat_template.json", CHAT_TEMPLATE),
    ],
)
def test_the_template_of_an_older_folder_reaches_the_bundle(
    file: str, value: Any, folder: Path, tmp_path: Path
) -> None:
    (folder / "chat_template.jinja").unlink()
    path = folder / file
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write(path, document | {"chat_template": value})

    bundle = export(folder, tmp_path / "out")

    assert bundle.file("chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE


def test_named_templates_without_a_default_are_listed(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}])

    with pytest.raises(CheckpointError, match=r"rag.* no 'default'"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "change",
    [{"temperature": 3.0}, {"top_p": 1.5}, {"min_p": 2}, {"repetition_penalty": 0}, {"top_k": 1.5}],
    ids=str,
)
def test_sampling_defaults_that_no_answer_could_be_made_with_are_refused(
    change: dict[str, Any], folder: Path
) -> None:
    edit(folder / "generation_config.json", **change)

    with pytest.raises(CheckpointError, match=f"gives {next(iter(change))}"):
        Checkpoint.open(folder)


def test_processor_settings_of_transformers_5_lie_in_the_processor_file(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    (folder / "preprocessor_config.json").unlink()
    video = json.loads((folder / "video_preprocessor_config.json").read_text(encoding="utf-8"))
    write(
        folder / "processor_config.json",
        {"image_processor": settings, "video_processor": video, "processor_class": "Glm4vProcessor"},
    )

    assert Checkpoint.open(folder).config.image.max_pixels == 9633792


def test_the_address_of_a_model_page_is_answered_with_its_hub_id() -> None:
    with pytest.raises(CheckpointError, match="give the hub id, such as zai-org/AutoGLM-Phone-9B"):
        Checkpoint.open("https://huggingface.co/zai-org/AutoGLM-Phone-9B/tree/main")
