"""Opening a checkpoint: all ways of writing a model give the same config, and a wrong one is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from make_checkpoint import (
    CHAT_TEMPLATE,
    EOS_TOKENS,
    SHAPES,
    ConfigForm,
    config_json,
    make_checkpoint,
    preprocessor_json,
    tensor_shapes,
)
from safetensors.numpy import load_file, save_file

from autoglm_edge.errors import CheckpointError
from autoglm_edge.export.source.checkpoint import Checkpoint, ModelConfig, expected_tensors
from autoglm_edge.export.source.processor import CLIP_MEAN, CLIP_STD

TINY = SHAPES["tiny"]
SMALL = [name for name in SHAPES if name != "autoglm-9b"]
EOS = tuple(TINY.token(name) for name in EOS_TOKENS)
FORMS: tuple[ConfigForm, ...] = ("4x", "5x", "mirrored")
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def edit(path: Path, change: Change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def refusal(path: str | Path, revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path, revision)
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


def config_of(
    config: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> ModelConfig:
    return ModelConfig.from_documents(
        config_json(TINY) if config is None else config,
        preprocessor_json(TINY) if processor is None else processor,
        generation or {},
        processor_name="preprocessor_config.json",
        source="test",
        config_sha256="0" * 64,
    )


def changed(form: Any, change: Change) -> dict[str, Any]:
    document = copy.deepcopy(config_json(TINY, form=form))
    change(document)
    return document


# the same model, written in different ways


@pytest.mark.parametrize("name", SMALL)
def test_every_shape_opens_with_its_own_geometry(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    config = Checkpoint.open(make_checkpoint(tmp_path, name)).config
    text, vision = config.text, config.vision
    assert (text.hidden, text.layers, text.heads, text.kv_heads) == (
        shape.hidden,
        shape.layers,
        shape.heads,
        shape.kv_heads,
    )
    assert (text.head_dim, text.rotary_dim) == (shape.head_dim, 2 * sum(shape.mrope_section))
    assert (text.intermediate, text.vocab, text.context_length) == (shape.intermediate, shape.vocab, 4096)
    assert (text.rope_theta, text.norm_eps, text.mrope_section) == (
        shape.rope_theta,
        shape.norm_eps,
        shape.mrope_section,
    )
    assert (text.tied_head, text.attention_bias) == (shape.tied_head, True)
    assert (vision.hidden, vision.depth, vision.heads) == (
        shape.vision_hidden,
        shape.vision_depth,
        shape.vision_heads,
    )
    assert (vision.image_size, vision.merger_intermediate) == (shape.image_size, shape.merger_intermediate)
    assert (vision.attention_bias, vision.out_hidden, vision.rope_theta) == (
        shape.vision_attention_bias,
        shape.hidden,
        10000.0,
    )
    assert (config.image.min_pixels, config.image.max_pixels) == (shape.min_pixels, shape.max_pixels)
    assert (config.image.mean, config.image.std) == (CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize("name", SMALL)
def test_the_three_forms_of_config_json_say_the_same(name: str, tmp_path: Path) -> None:
    forms = [
        Checkpoint.open(make_checkpoint(tmp_path / form, name, config_form=form)).config for form in FORMS
    ]
    neutral = [replace(config, source="", config_sha256="") for config in forms]
    assert neutral[0] == neutral[1] == neutral[2]


@pytest.mark.parametrize("name", list(SHAPES))
def test_the_expected_tensors_are_those_of_the_maker(name: str) -> None:
    shape = SHAPES[name]
    config = ModelConfig.from_documents(
        config_json(shape),
        preprocessor_json(shape),
        {},
        processor_name="p",
        source="",
        config_sha256="",
    )
    assert expected_tensors(config) == tensor_shapes(shape)


@pytest.mark.parametrize("name", ["tiny", "odd-heads6", "odd-mha"])
def test_the_expected_tensors_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    folder = make_checkpoint(tmp_path, name)
    with torch.device("meta"):
        model = Glm4vForConditionalGeneration(Glm4vConfig.from_pretrained(folder))
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if SHAPES[name].tied_head:
        wanted.pop("lm_head.weight")
    assert expected_tensors(Checkpoint.open(folder).config) == wanted


def test_what_transformers_saves_opens_with_the_same_config(folder: Path, tmp_path: Path) -> None:
    from transformers import Glm4vForConditionalGeneration
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    saved = tmp_path / "saved"
    Glm4vForConditionalGeneration.from_pretrained(folder, dtype="auto").save_pretrained(saved)
    Glm4vImageProcessorPil.from_pretrained(folder).save_pretrained(saved)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, saved)
    before, after = Checkpoint.open(folder), Checkpoint.open(saved)
    assert replace(after.config, source="", config_sha256="") == replace(
        before.config, source="", config_sha256=""
    )
    for name in before.tensors.names:
        count = before.tensors.shape(name)[0]
        np.testing.assert_array_equal(before.tensors.rows(name, 0, count), after.tensors.rows(name, 0, count))


def test_absent_settings_mean_what_transformers_takes_them_for() -> None:
    config = config_of(
        {
            "model_type": "glm4v",
            "text_config": {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "vision_config": {},
        },
        {},
        {"eos_token_id": 151329},
    )
    text, vision, image = config.text, config.vision, config.image
    assert (text.hidden, text.layers, text.heads, text.kv_heads, text.head_dim) == (4096, 40, 32, 2, 128)
    assert (text.intermediate, text.vocab, text.context_length) == (13696, 151552, 32768)
    assert (text.rotary_dim, text.mrope_section, text.rope_theta) == (64, (8, 12, 12), 10000.0)
    assert (vision.hidden, vision.depth, vision.heads, vision.image_size) == (1536, 24, 12, 336)
    assert (image.min_pixels, image.max_pixels, image.resample) == (12544, 11760000, 3)
    assert (config.tokens.image, config.tokens.image_start, config.tokens.image_end) == (
        151343,
        151339,
        151340,
    )


def test_defaults_equal_those_of_the_installed_transformers() -> None:
    from transformers import Glm4vConfig

    theirs = Glm4vConfig()
    ours = config_of(
        {"text_config": {"partial_rotary_factor": 0.5}, "vision_config": {}}, {}, {"eos_token_id": 0}
    )
    for mine, key in (
        ("hidden", "hidden_size"),
        ("layers", "num_hidden_layers"),
        ("heads", "num_attention_heads"),
        ("kv_heads", "num_key_value_heads"),
        ("intermediate", "intermediate_size"),
        ("vocab", "vocab_size"),
        ("context_length", "max_position_embeddings"),
        ("norm_eps", "rms_norm_eps"),
    ):
        assert getattr(ours.text, mine) == getattr(theirs.text_config, key)
    for mine, key in (
        ("hidden", "hidden_size"),
        ("depth", "depth"),
        ("heads", "num_heads"),
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("out_hidden", "out_hidden_size"),
        ("merger_intermediate", "intermediate_size"),
        ("image_size", "image_size"),
        ("norm_eps", "rms_norm_eps"),
        ("attention_bias", "attention_bias"),
        ("in_channels", "in_channels"),
    ):
        assert getattr(ours.vision, mine) == getattr(theirs.vision_config, key)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["text_config"].update(head_dim=16),
        lambda c: c["text_config"].update(head_dim=None),
        lambda c: c["vision_config"].update(image_size=[112, 112], patch_size=[14, 14]),
        lambda c: c["vision_config"].update(temporal_patch_size=[2]),
        lambda c: c["text_config"].update(rope_scaling={"rope_type": "default", "mrope_section": [1, 1, 2]}),
        lambda c: c["text_config"].update(rope_scaling={"mrope_section": [1, 1, 2]}),
        lambda c: c["text_config"].pop("attention_bias"),
        lambda c: c["text_config"].update(tie_word_embeddings=None),
        lambda c: c["vision_config"].update(rope_parameters={"rope_type": "default", "rope_theta": 10000}),
        lambda c: c.update(c.pop("text_config")),
        lambda c: c.update(eos_token_id=EOS[0]),
        lambda c: c.update(rope_theta=10000, rope_parameters=None),
        lambda c: c.pop("architectures"),
        lambda c: c.update(unknown_key={"anything": 1}),
    ],
)
def test_other_ways_of_writing_the_same_are_understood(change: Change) -> None:
    assert config_of(changed("4x", change)) == config_of()


def test_a_null_count_of_kv_heads_means_one_per_head() -> None:
    document = changed("4x", lambda c: c["text_config"].update(num_key_value_heads=None))
    assert config_of(document).text.kv_heads == TINY.heads


@pytest.mark.parametrize(
    ("top", "text", "tied"),
    [
        (None, None, False),
        (True, None, True),
        (None, True, True),
        (False, True, True),
        (True, True, True),
        (False, False, False),
        (None, False, False),
    ],
)
def test_a_tied_head_may_be_told_at_either_level(top: Any, text: Any, tied: bool) -> None:
    def change(document: dict[str, Any]) -> None:
        document["tie_word_embeddings"] = top
        document["text_config"]["tie_word_embeddings"] = text

    assert config_of(changed("4x", change)).text.tied_head is tied


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("mirrored", lambda c: c.update(hidden_size=65), "hidden_size 64 top level hidden_size 65"),
        ("mirrored", lambda c: c.update(rope_theta=5.0), "rope_theta 10000.0 5.0"),
        (
            "mirrored",
            lambda c: c.update(rope_scaling={"type": "default", "mrope_section": [2, 1, 1]}),
            "mrope_section [1, 1, 2] [2, 1, 1]",
        ),
        ("5x", lambda c: c["text_config"].update(partial_rotary_factor=1.0), "partial_rotary_factor 0.5 1.0"),
        ("4x", lambda c: c["text_config"]["rope_scaling"].update(rope_type="yarn"), "rope_type 'yarn'"),
        ("5x", lambda c: c["text_config"]["rope_parameters"].update(type="yarn"), "'default' 'yarn'"),
        (
            "4x",
            lambda c: c.update(tie_word_embeddings=True),
            "tie_word_embeddings true at the top level but false in text_config",
        ),
    ],
)
def test_contradictions_are_refused(form: str, change: Change, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_of(changed(form, change))
    for word in words.split("|"):
        assert all(part in str(caught.value) for part in word.split(" ")), str(caught.value)


@pytest.mark.parametrize(
    ("form", "change", "match"),
    [
        ("4x", lambda c: c["text_config"].update(hidden_act="gelu"), "hidden_act 'gelu'; only 'silu'"),
        ("4x", lambda c: c["vision_config"].update(hidden_act="gelu"), "vision_config, gives hidden_act"),
        ("4x", lambda c: c["text_config"].update(attention_bias=False), "attention_bias false"),
        ("4x", lambda c: c["text_config"].update(attention_bias=1), "attention_bias 1, must be"),
        ("4x", lambda c: c["text_config"].update(head_dim=32), "head size of 32"),
        ("4x", lambda c: c["text_config"].update(num_attention_heads=5), "head size"),
        ("4x", lambda c: c["text_config"].update(num_attention_heads=128), "must be hidden_size"),
        ("4x", lambda c: c["text_config"].update(num_key_value_heads=3), "must divide"),
        ("4x", lambda c: c["text_config"].update(num_hidden_layers=0), "num_hidden_layers 0"),
        ("4x", lambda c: c["text_config"].update(num_hidden_layers=10**9), "more than 1000"),
        ("4x", lambda c: c["text_config"].update(num_hidden_layers=2.0), "must be an integer"),
        ("4x", lambda c: c["text_config"].update(hidden_size="64"), "hidden_size '64', must be an integer"),
        ("4x", lambda c: c["text_config"].update(vocab_size=True), "vocab_size True"),
        ("4x", lambda c: c["text_config"].update(rms_norm_eps=0), "rms_norm_eps 0, must be a number above 0"),
        ("4x", lambda c: c["text_config"].update(rms_norm_eps=float("nan")), "rms_norm_eps nan"),
        ("4x", lambda c: c["text_config"].update(rope_theta=10**400), "rope_theta 1000"),
        ("4x", lambda c: c["text_config"].update(rope_scaling="default"), "rope_scaling 'default', must"),
        ("4x", lambda c: c["text_config"]["rope_scaling"].update(type="yarn"), "'yarn'; only"),
        ("5x", lambda c: c["text_config"]["rope_parameters"].update(rope_type="linear"), "only 'default'"),
        ("4x", lambda c: c["text_config"].update(partial_rotary_factor=0.3), "from 2 to all of them|add up"),
        ("4x", lambda c: c["text_config"].update(partial_rotary_factor=2), "from 2 to all of them"),
        ("4x", lambda c: c["text_config"].update(partial_rotary_factor=1.0), r"must add up to 8"),
        ("5x", lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[1, 3]), "three numbers"),
        ("5x", lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[-1, 3, 2]), "three"),
        ("5x", lambda c: c["text_config"]["rope_parameters"].update(mrope_section="124"), "three numbers"),
        (
            "5x",
            lambda c: c["text_config"].update(rope_parameters={"full_attention": {"rope_theta": 5}}),
            "full_attention",
        ),
        ("4x", lambda c: c.update(text_config=[]), "text_config"),
        ("4x", lambda c: c.pop("vision_config"), "no vision_config"),
        ("4x", lambda c: c.update(vision_config=None), "no vision_config"),
        ("4x", lambda c: c["vision_config"].update(image_size=[112, 98]), "unequal sides"),
        ("4x", lambda c: c["vision_config"].update(image_size=[]), r"image_size \[\]"),
        ("4x", lambda c: c["vision_config"].update(image_size=13), "not one patch fits"),
        ("4x", lambda c: c["vision_config"].update(in_channels=4), "only RGB"),
        ("4x", lambda c: c["vision_config"].update(num_heads=3), "multiple of 4"),
        ("4x", lambda c: c["vision_config"].update(num_heads=16), "multiple of 4"),
        ("4x", lambda c: c["vision_config"].update(depth=5000), "more than 1000"),
        ("4x", lambda c: c["vision_config"].update(out_hidden_size=96), "they must be equal"),
        ("4x", lambda c: c["vision_config"].update(patch_size=16), "patch_size 14, config.json gives 16"),
        ("4x", lambda c: c["vision_config"].update(spatial_merge_size=4), "merge_size 2, config"),
        (
            "4x",
            lambda c: c["vision_config"].update(rope_parameters={"rope_type": "yarn"}),
            "'yarn'; only 'axial'",
        ),
        ("4x", lambda c: c.update(image_token_id=10**6), "image_token_id is 1000000"),
        ("4x", lambda c: c.update(image_token_id=-1), "image_token_id -1"),
        ("4x", lambda c: c.update(image_start_token_id=c["image_end_token_id"]), "the three ids must differ"),
        ("4x", lambda c: c["text_config"].update(eos_token_id="</s>"), "eos_token_id '</s>'"),
        ("4x", lambda c: c["text_config"].update(eos_token_id=[1, None]), "must be a token id or a list"),
        ("4x", lambda c: c["text_config"].update(eos_token_id=512), "eos_token_id is 512"),
        ("4x", lambda c: c["text_config"].update(eos_token_id=[]), "generation would not end"),
        ("4x", lambda c: c["text_config"].pop("eos_token_id"), "generation would not end"),
        ("4x", lambda c: c["text_config"].update(pad_token_id=[1]), r"pad_token_id \[1\]"),
        ("4x", lambda c: c.update(tie_word_embeddings="yes"), "tie_word_embeddings 'yes'"),
    ],
)
def test_settings_that_no_graph_is_built_for_are_refused(form: str, change: Change, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        config_of(changed(form, change))


# tokens and sampling


def test_eos_ids_of_the_generation_config_win() -> None:
    document = changed("4x", lambda c: c.update(eos_token_id=3))
    assert config_of(document, generation={"eos_token_id": [7, 5, 7]}).tokens.eos == (7, 5)
    assert config_of(document, generation={"eos_token_id": 7}).tokens.eos == (7,)


def test_without_a_generation_config_eos_ids_of_both_levels_count() -> None:
    document = changed("4x", lambda c: c.update(eos_token_id=3))
    assert config_of(document).tokens.eos == (*EOS, 3)


def test_the_pad_id_may_be_absent() -> None:
    assert config_of(changed("4x", lambda c: c["text_config"].update(pad_token_id=None))).tokens.pad is None
    assert config_of(generation={"pad_token_id": 4}).tokens.pad == 4


@pytest.mark.parametrize(
    ("generation", "wanted"),
    [
        ({}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.8, "top_p": 0.6}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": True, "temperature": 0.8, "top_p": 0.6, "top_k": 2},
            {"temperature": 0.8, "top_p": 0.6, "top_k": 2.0},
        ),
        ({"repetition_penalty": 1.1, "max_new_tokens": 8}, {"temperature": 0.0, "repetition_penalty": 1.1}),
    ],
)
def test_sampling_defaults_act_only_if_the_checkpoint_samples(
    generation: dict[str, Any], wanted: dict[str, float]
) -> None:
    assert config_of(generation=generation).generation == wanted


@pytest.mark.parametrize("value", ["0.8", -1, True, float("inf"), float("nan"), [1]])
def test_a_sampling_default_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="temperature"):
        config_of(generation={"do_sample": True, "temperature": value})


# image processor


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"do_rescale": False}, "rescale_factor", 1.0),
        ({"do_normalize": False}, "mean", (0.0, 0.0, 0.0)),
        ({"do_normalize": False}, "std", (1.0, 1.0, 1.0)),
        ({"image_mean": 0.5}, "mean", (0.5, 0.5, 0.5)),
        ({"resample": 2}, "resample", 2),
        ({"size": None, "min_pixels": 3136, "max_pixels": 50176}, "max_pixels", 50176),
        ({"size": None, "min_pixels": 3136, "max_pixels": 50176}, "min_pixels", 3136),
        ({"max_pixels": 1}, "max_pixels", 200704),
        ({"size": {}}, "max_pixels", 11760000),
        ({"image_processor_type": "Glm4vImageProcessorFast"}, "patch_size", 14),
    ],
)
def test_processor_settings_are_taken_over(change: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(config_of(processor={**preprocessor_json(TINY), **change}).image, field) == value


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"do_resize": False}, "do_resize false"),
        ({"do_rescale": "no"}, "do_rescale 'no'"),
        ({"image_processor_type": "Glm46VImageProcessor"}, "only Glm4vImageProcessor"),
        ({"image_processor_type": 4}, "only Glm4vImageProcessor"),
        ({"size": 448}, "must be an object"),
        ({"size": {"height": 448, "width": 448}}, "must have the keys shortest_edge and longest_edge"),
        ({"size": {"shortest_edge": 1, "longest_edge": "9"}}, "longest_edge '9'"),
        ({"size": {"shortest_edge": 9999, "longest_edge": 999}}, "must be a range"),
        ({"size": {"shortest_edge": 1, "longest_edge": 1000}}, "1568 pixels"),
        ({"image_mean": [0.5, 0.5]}, "a number per RGB channel"),
        ({"image_mean": [0.5, 0.5, "x"]}, "a number per RGB channel"),
        ({"image_std": [0.5, 0, 0.5]}, "must not hold 0"),
        ({"image_std": [0.5, float("inf"), 0.5]}, "a number per RGB channel"),
        ({"rescale_factor": 0}, "rescale_factor 0"),
        ({"resample": 9}, "PIL filter number"),
        ({"resample": "bicubic"}, "resample 'bicubic'"),
        ({"patch_size": 16}, "patch_size 16, config.json gives 14"),
        ({"temporal_patch_size": 1}, "temporal_patch_size 1"),
    ],
)
def test_processor_settings_that_do_not_fit_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        config_of(processor={**preprocessor_json(TINY), **change})


def test_processor_settings_nested_in_the_processor_file_win(folder: Path) -> None:
    settings = {**preprocessor_json(TINY), "size": {"shortest_edge": 12544, "longest_edge": 112896}}
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": settings, "processor_class": "P"})
    )
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config.image.max_pixels == 112896
    assert json.loads(checkpoint.side_files()["preprocessor_config.json"]) == settings
    (folder / "preprocessor_config.json").unlink()
    assert Checkpoint.open(folder).config.image.max_pixels == 112896


def test_a_processor_file_without_image_settings_is_passed_over(folder: Path) -> None:
    (folder / "processor_config.json").write_text('{"processor_class": "Glm4vProcessor"}')
    assert Checkpoint.open(folder).config.image.max_pixels == TINY.max_pixels


# families


@pytest.mark.parametrize(
    ("model_type", "what"),
    [
        ("chatglm", "older GLM"),
        ("glm4", "text-only GLM-4"),
        ("glm", "text-only GLM-4"),
        ("glm4v_moe", "GLM-4.5V"),
        ("glm46v", "GLM-4.6V"),
        ("glm4v_text", "without its vision tower"),
        ("qwen2_5_vl", "a model of type 'qwen2_5_vl'"),
        (17, "a model of type 17"),
        (["glm4v"], "a model of type"),
    ],
)
def test_look_alikes_are_named_and_refused(model_type: Any, what: str, folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(model_type=model_type))
    message = refusal(folder)
    assert what in message
    assert "AutoGLM-Phone-9B-Multilingual" in message
    assert "GLM-4.1V-9B-Thinking" in message


def test_a_config_without_a_model_type_is_refused(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.pop("model_type"))
    assert "no model_type" in refusal(folder)


def test_another_architecture_of_the_family_is_refused(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(architectures=["Glm4vModel"]))
    assert "Glm4vForConditionalGeneration" in refusal(folder)


@pytest.mark.parametrize("level", ["top", "text_config"])
def test_a_quantized_checkpoint_is_refused_by_its_method(level: str, folder: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        target = document if level == "top" else document["text_config"]
        target["quantization_config"] = {"quant_method": "gptq", "bits": 4}

    edit(folder / "config.json", change)
    message = refusal(folder)
    assert "gptq" in message
    assert "already quantized" in message


# weights


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensors_are_counted_and_the_first_named(folder: Path) -> None:
    def drop(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if "layers.1.mlp" in name]:
            del tensors[name]

    rewrite(folder, drop)
    message = refusal(folder)
    assert "lacks 2 of 56 tensors" in message
    assert "'model.language_model.layers.1.mlp.gate_up_proj.weight'" in message


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    name = "model.visual.merger.proj.weight"
    rewrite(folder, lambda t: t.update({name: np.zeros((64, 32), ml_dtypes.bfloat16)}))
    message = refusal(folder)
    assert "(64, 32)" in message
    assert "(64, 64)" in message
    assert name in message


def test_a_model_with_other_layers_than_its_config_says_is_refused(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c["text_config"].update(num_hidden_layers=3))
    assert "lacks 13 of 69 tensors" in refusal(folder)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn, np.float64])
def test_weights_that_are_no_floats_to_read_are_refused(kind: Any, folder: Path) -> None:
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    shape = (TINY.hidden, TINY.intermediate)
    rewrite(folder, lambda t: t.update({name: np.zeros(shape, kind)}))
    assert "already quantized" in refusal(folder)


def test_packed_weights_are_recognised_as_quantized(folder: Path) -> None:
    name = "model.language_model.layers.0.mlp.down_proj"

    def pack(tensors: dict[str, np.ndarray]) -> None:
        del tensors[f"{name}.weight"]
        tensors[f"{name}.qweight"] = np.zeros((8, 64), np.int32)

    rewrite(folder, pack)
    message = refusal(folder)
    assert "already quantized" in message
    assert "qweight" in message


def test_extra_tensors_are_ignored_but_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(folder, lambda t: t.update({"model.visual.rotary_pos_emb.inv_freq": np.zeros(4, np.float32)}))
    Checkpoint.open(folder)
    assert "1 tensors that are not used" in caplog.text
    assert "inv_freq" in caplog.text


def test_mixed_float_formats_are_fine(folder: Path) -> None:
    def widen(tensors: dict[str, np.ndarray]) -> None:
        tensors.update({k: v.astype(np.float32) for k, v in tensors.items() if k.endswith("norm.weight")})

    rewrite(folder, widen)
    assert Checkpoint.open(folder).tensors.dtype("model.language_model.norm.weight") == "float32"


def test_a_tied_head_needs_no_tensor_and_an_equal_one_is_ignored(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, replace(TINY, tied_head=True))
    assert Checkpoint.open(folder).config.text.tied_head
    rewrite(
        folder, lambda t: t.update({"lm_head.weight": t["model.language_model.embed_tokens.weight"].copy()})
    )
    assert Checkpoint.open(folder).config.text.tied_head


def test_a_head_that_differs_is_used_although_the_config_ties_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_checkpoint(tmp_path, replace(TINY, tied_head=True))
    head = np.ones((TINY.vocab, TINY.hidden), ml_dtypes.bfloat16)
    rewrite(folder, lambda t: t.update({"lm_head.weight": head}))
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.config.text.tied_head
    assert "lm_head.weight" in expected_tensors(checkpoint.config)
    assert "not tied" in caplog.text


def test_an_untied_model_without_a_head_is_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    assert "'lm_head.weight'" in refusal(folder)


# files beside the weights


def test_side_files_are_what_the_folder_holds(folder: Path) -> None:
    files = Checkpoint.open(folder).side_files()
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    for name, data in files.items():
        assert data == (folder / name).read_bytes()


def test_optional_files_may_be_absent(folder: Path) -> None:
    for name in ("generation_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    checkpoint = Checkpoint.open(folder)
    assert not {"generation_config.json", "special_tokens_map.json"} & set(checkpoint.side_files())
    assert checkpoint.config.tokens.eos == EOS


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("chat_template.json", CHAT_TEMPLATE),
        ("tokenizer_config.json", CHAT_TEMPLATE),
        (
            "tokenizer_config.json",
            [{"name": "rag", "template": "no"}, {"name": "default", "template": CHAT_TEMPLATE}],
        ),
    ],
)
def test_the_chat_template_is_found_wherever_it_is(file: str, value: Any, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    edit(folder / file, lambda c: c.update(chat_template=value))
    assert Checkpoint.open(folder).side_files()["chat_template.jinja"].decode() == CHAT_TEMPLATE


def test_the_template_file_wins_over_the_tokenizer_config(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template="other"))
    assert Checkpoint.open(folder).side_files()["chat_template.jinja"].decode() == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("preprocessor_config.json", None, "lacks preprocessor_config.json"),
        ("tokenizer.json", None, "lacks tokenizer.json"),
        ("chat_template.jinja", None, "no chat template"),
        ("chat_template.jinja", b"\xff\xfe", "not UTF-8"),
        ("chat_template.jinja", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("tokenizer.json", b"{}", "no vocabulary"),
        ("tokenizer.json", b'{"model": {"vocab": []}}', "no vocabulary"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "b"}}}', "no number"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 512}}}', "token id 512"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 1}}}', "tokenizer.json does not know"),
        ("config.json", b"", "not valid JSON"),
        ("config.json", b"[" * 100_000, "not valid JSON"),
        ("config.json", b"\xff\x00", "not valid JSON"),
        ("config.json", b"3", "JSON int"),
        ("config.json", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("generation_config.json", b"[]", "JSON list"),
        ("preprocessor_config.json", b'{"size":', "not valid JSON"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("model.safetensors", None, "holds no weights"),
    ],
)
def test_a_missing_or_broken_file_is_named(
    name: str, content: bytes | None, match: str, folder: Path
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert match in refusal(folder)


# places


def test_the_source_is_the_folder_and_its_config_is_hashed(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.path == folder
    assert checkpoint.config.source == "model"
    assert checkpoint.revision is None
    assert (
        checkpoint.config.config_sha256 == hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    )


def test_a_snapshot_in_the_cache_of_the_hub_keeps_its_name(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--zai-org--AutoGLM-Phone-9B"
    checkpoint = Checkpoint.open(make_checkpoint(cache / "snapshots" / commit))
    assert checkpoint.config.source == "zai-org/AutoGLM-Phone-9B"
    assert checkpoint.revision == commit
    assert f"snapshots/{commit}" in refusal(cache)


@pytest.mark.parametrize("shape", ["tiny"])
def test_files_behind_links_are_read(shape: str, folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    assert Checkpoint.open(linked).config.text.hidden == TINY.hidden


def test_the_embedded_model_opens_by_its_name() -> None:
    checkpoint = Checkpoint.open("pocket")
    assert checkpoint.config.source == "pocket"
    assert checkpoint.revision is None


def test_the_embedded_model_has_no_revision() -> None:
    assert "no revision 'v2'" in refusal("pocket", "v2")


def test_a_folder_named_pocket_wins_over_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "pocket")
    assert Checkpoint.open("pocket").config.text.hidden == TINY.hidden


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: p / "gone", "does not exist"),
        (lambda p: (p / "model.gguf").write_bytes(b"GGUF") and p / "model.gguf", "is a file"),
        (lambda p: p, "is empty"),
        (lambda p: (p / "a-Q4.gguf").write_bytes(b"GGUF") and p, "a GGUF file"),
        (lambda p: (p / "adapter_config.json").write_bytes(b"{}") and p, "adapter (LoRA)"),
        (lambda p: (p / "manifest.json").write_bytes(b"{}") and p, "exported bundle"),
        (lambda p: (p / "notes.txt").write_bytes(b"hi") and p, "has no config.json"),
        (lambda p: p / ("x" * 5000), "cannot be a path"),
        (lambda p: f"{p}\0", "cannot be a path|does not exist"),
        (lambda p: "~no-such-user/model", "cannot be a path"),
        (lambda p: "", "does not exist|empty string"),
    ],
)
def test_a_place_without_a_checkpoint_says_what_is_wrong(
    make: Callable[[Path], Any], match: str, tmp_path: Path
) -> None:
    message = refusal(make(tmp_path))
    assert any(part in message for part in match.split("|")), message


def test_a_folder_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    (folder / "config.json").unlink()
    monkeypatch.setattr(Path, "iterdir", denied)
    assert f"{folder} cannot be read (Permission denied)" in refusal(folder)


def test_a_folder_has_no_revision(folder: Path) -> None:
    assert "no revision 'main'" in refusal(folder, "main")
