"""The maker of random checkpoints: what the other tests stand on must itself be right."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_weights import POOL_VALUES, group, values_of
from make_checkpoint import (
    ADDED_TOKENS,
    SHAPES,
    ConfigForm,
    Shape,
    make_checkpoint,
    tensor_shapes,
    tokenizer_json,
)
from safetensors import safe_open
from tokenizers import Tokenizer

from autoglm_edge.export.source.tensors import TensorStore

SMALL = [name for name in SHAPES if name != "autoglm-9b"]


def read(folder: Path) -> dict[str, np.ndarray]:
    store = TensorStore.open(folder)
    return {name: store.rows(name, 0, store.shape(name)[0]) for name in store.names}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("form", ["4x", "5x", "mirrored"])
def test_transformers_loads_every_small_shape_with_every_key_matched(
    name: str, form: ConfigForm, tmp_path: Path
) -> None:
    from transformers import Glm4vForConditionalGeneration

    make_checkpoint(tmp_path, name, config_form=form, shards=2)
    model, info = Glm4vForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    shape = SHAPES[name]
    rope = model.config.text_config.rope_parameters
    assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (shape.rope_theta, shape.rotary_factor)
    assert tuple(rope["mrope_section"]) == shape.mrope_section
    assert rope["rope_type"] == "default"
    assert model.config.tie_word_embeddings is shape.tied_head
    assert model.model.visual.config.attention_bias is shape.vision_attention_bias


def test_the_small_shapes_cover_unlike_geometries() -> None:
    shapes = [SHAPES[name] for name in SMALL]
    assert {(s.heads, s.kv_heads) for s in shapes} >= {(4, 2), (6, 2), (8, 1), (4, 4)}
    assert {s.head_dim for s in shapes} >= {16, 24, 32, 48, 64}
    assert {s.rotary_factor for s in shapes} == {0.5, 1.0}
    assert {s.vision_depth for s in shapes} >= {1, 2, 3}
    assert {s.image_size for s in shapes} >= {84, 336}
    assert any(s.hidden % 64 for s in shapes)
    assert {s.tied_head for s in shapes} == {s.vision_attention_bias for s in shapes} == {True, False}


def test_the_9b_shape_has_the_parameters_and_tensors_of_the_real_one() -> None:
    shapes = tensor_shapes(SHAPES["autoglm-9b"])
    assert len(shapes) == 704
    assert sum(int(np.prod(dims)) for dims in shapes.values()) == 10_292_777_472


def test_the_9b_shape_places_the_added_tokens_at_their_real_ids() -> None:
    shape = SHAPES["autoglm-9b"]
    assert shape.token("<|endoftext|>") == 151329
    assert shape.token("[gMASK]") == 151331
    assert shape.token("<sop>") == 151333
    assert shape.token("<|user|>") == 151336
    assert shape.token("<|observation|>") == 151338
    assert shape.token("<|begin_of_image|>") == 151339
    assert shape.token("<|image|>") == 151343
    assert shape.token("</answer>") == 151348


@pytest.mark.parametrize("name", ["tiny", "odd-axes", "autoglm-9b"])
def test_the_tokenizer_knows_exactly_its_ids_and_spells_any_text(name: str) -> None:
    shape = SHAPES[name]
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(shape)))
    assert tokenizer.get_vocab_size() == shape.used_vocab
    assert sorted(tokenizer.get_vocab().values()) == list(range(shape.used_vocab))
    text = '[gMASK]<sop><|user|>\n打开 é🙂\x00<think>do(action="Tap", element=[1,2])</answer>'
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    assert encoding.ids[:4] == [shape.token(t) for t in ("[gMASK]", "<sop>", "<|user|>")] + encoding.ids[3:4]
    assert "<think>" in tokenizer.decode(encoding.ids, skip_special_tokens=True)
    assert "<|user|>" not in tokenizer.decode(encoding.ids, skip_special_tokens=True)


def test_transformers_reads_tokenizer_and_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_checkpoint(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "be brief\n"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "go"}]},
            {"role": "assistant", "content": "<think>a</think>"},
            {"role": "user", "content": "on"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "[gMASK]<sop><|system|>\nbe brief\n<|user|>\n<|begin_of_image|><|image|><|end_of_image|>go"
        "<|assistant|>\n<think>a</think><|user|>\non<|assistant|>\n"
    )
    assert tokenizer.convert_tokens_to_ids("<|image|>") == SHAPES["tiny"].token("<|image|>")


def test_transformers_reads_the_image_processor_settings(tmp_path: Path) -> None:
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    make_checkpoint(tmp_path, "odd-heads6")
    processor = Glm4vImageProcessorPil.from_pretrained(tmp_path)
    assert processor.size["longest_edge"] == SHAPES["odd-heads6"].max_pixels
    assert processor.patch_size == 14


def test_shards_and_seed_and_dtype_change_only_what_they_should(tmp_path: Path) -> None:
    base = read(make_checkpoint(tmp_path / "a", dtype="float32"))
    sharded = read(make_checkpoint(tmp_path / "b", dtype="float32", shards=4))
    seeded = read(make_checkpoint(tmp_path / "c", dtype="float32", seed=1))
    half = read(make_checkpoint(tmp_path / "d", dtype="bfloat16"))
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 4
    for name, values in base.items():
        np.testing.assert_array_equal(values, sharded[name])
        assert not np.array_equal(values, seeded[name])
        np.testing.assert_array_equal(values.astype(ml_dtypes.bfloat16).astype(np.float32), half[name])


def test_every_tensor_is_different_from_every_other(tmp_path: Path) -> None:
    heads = {values.reshape(-1)[:16].tobytes() for values in read(make_checkpoint(tmp_path)).values()}
    assert len(heads) == len(tensor_shapes(SHAPES["tiny"]))


def test_the_weights_keep_activations_near_one(tmp_path: Path) -> None:
    tensors = read(make_checkpoint(tmp_path, "odd-head64", dtype="float32"))
    down = tensors["model.language_model.layers.1.mlp.down_proj.weight"]
    assert down.std() == pytest.approx(down.shape[1] ** -0.5, rel=0.03)
    norm = tensors["model.language_model.norm.weight"]
    assert norm.mean() == pytest.approx(1, abs=0.05)
    assert 0.05 < norm.std() < 0.2
    assert np.abs(tensors["model.language_model.layers.0.self_attn.q_proj.bias"]).max() < 0.3


def test_a_large_tensor_is_made_of_pieces_that_do_not_repeat_in_step() -> None:
    dims = (3000, 4096)
    pieces = list(values_of("w", dims, seed=0, kind=np.dtype(np.float32), tied=False))
    values = np.concatenate(pieces)
    assert values.size == 3000 * 4096 > POOL_VALUES
    assert max(piece.size for piece in pieces) <= POOL_VALUES
    assert values.std() == pytest.approx(1 / 64, rel=0.01)
    rows = values.reshape(dims)
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "tiny", dtype="float16")
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(tensor_shapes(SHAPES["tiny"]))
        assert file.get_tensor("lm_head.weight").dtype == np.float16


def test_a_tiny_checkpoint_takes_a_fraction_of_a_second(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "warm")
    best = 1e9
    for attempt in range(3):
        start = time.process_time()
        make_checkpoint(tmp_path / str(attempt))
        best = min(best, time.process_time() - start)
    assert best < 0.2


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 9])
def test_tensors_are_cut_into_as_many_files_as_asked(shards: int) -> None:
    sizes = {f"t{index}": 10 for index in range(30)}
    groups = group(sizes, shards=shards, shard_bytes=None)
    assert len(groups) == shards
    assert [name for group in groups for name in group] == list(sizes)


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_one_huge_tensor_does_not_cost_a_file(shards: int) -> None:
    groups = group({"a": 1, "huge": 10**9, "b": 1, "c": 1, "d": 1}, shards=shards, shard_bytes=None)
    assert len(groups) == shards
    assert all(groups)


@pytest.mark.parametrize("shards", [0, -1, 6])
def test_a_number_of_files_that_cannot_be_is_refused(shards: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 5"):
        group(dict.fromkeys("abcde", 1), shards=shards, shard_bytes=None)


def test_a_file_holds_no_more_bytes_than_asked_unless_one_tensor_does() -> None:
    groups = group({"a": 5, "b": 50, "c": 4, "d": 4, "e": 4}, shards=1, shard_bytes=8)
    assert groups == [["a"], ["b"], ["c", "d"], ["e"]]


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 5},
        {"kv_heads": 3},
        {"mrope_section": (1, 1, 1)},
        {"vision_heads": 3},
        {"used_vocab": 255 + len(ADDED_TOKENS)},
        {"used_vocab": 513},
    ],
)
def test_a_shape_that_no_model_can_have_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        replace(Shape(), **change)  # type: ignore[arg-type]


def test_the_command_line_writes_what_was_asked_for(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "scripts" / "make_checkpoint.py"
    options = ["--layers", "1", "--tied", "--dtype", "float16", "--config-form", "5x", "--shards", "3"]
    done = subprocess.run(
        [sys.executable, str(script), *options, "-o", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "GB in" in done.stderr
    assert done.stdout == ""
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 1
    assert config["tie_word_embeddings"] is True
    store = TensorStore.open(tmp_path / "out")
    assert len(store.files) == 3
    assert store.dtype("model.language_model.norm.weight") == "float16"
    assert "lm_head.weight" not in store
