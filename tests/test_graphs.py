"""The three graphs by themselves: their contract, and what they must not do."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest


def session(graph: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options)


@pytest.mark.parametrize(
    "precision", ["fp32", "fp16", "int8", "int8-blocks", "int4", "int4-mixed", "int4-all"]
)
@pytest.mark.parametrize("part", ["decoder", "embedding", "vision"])
def test_every_graph_passes_the_checker_of_onnx(
    precision: str, part: str, checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    onnx.checker.check_model(bundle_of(checkpoint_of("tiny"), precision) / f"{part}.onnx")


def test_a_decoder_layer_is_sixteen_nodes(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    graph = onnx.load(
        bundle_of(checkpoint_of("tiny"), "int4") / "decoder.onnx", load_external_data=False
    ).graph

    nodes = [node for node in graph.node if "/layers.0/" in node.name]

    assert len(nodes) == 16
    assert Counter(node.op_type for node in nodes)["MatMulNBits"] == 6


def test_graphs_carry_no_weights_and_the_initializers_have_the_checkpoint_names(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    graph = onnx.load(
        bundle_of(checkpoint_of("tiny"), "fp32") / "decoder.onnx", load_external_data=False
    ).graph

    external = {item.name for item in graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL}

    assert "model.language_model.layers.1.self_attn.q_proj.weight" in external
    assert "model.language_model.layers.0.post_self_attn_layernorm.weight" in external
    assert sum(len(item.raw_data) for item in graph.initializer) < 4096


def decoder_feeds(
    decoder: ort.InferenceSession, rng: np.random.Generator, lengths: list[int]
) -> dict[str, np.ndarray]:
    """Random hidden states, right-padded to the longest row, with an empty cache."""
    shapes = {item.name: item.shape for item in decoder.get_inputs()}
    batch, tokens = len(lengths), max(lengths)
    feeds = {
        "inputs_embeds": rng.standard_normal((batch, tokens, shapes["inputs_embeds"][2])).astype(np.float32),
        "attention_mask": (np.arange(tokens) < np.array(lengths)[:, None]).astype(np.int64),
        "position_ids": np.broadcast_to(np.arange(tokens), (3, batch, tokens)).copy(),
    }
    for name, shape in shapes.items():
        if name.startswith("past_key_values"):
            feeds[name] = np.zeros((batch, shape[1], 0, shape[3]), np.float32)
    return feeds


def test_the_decoder_scores_the_last_position_unless_asked_for_more(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    decoder = session(bundle_of(checkpoint_of("tiny"), "fp32") / "decoder.onnx")
    feeds = decoder_feeds(decoder, np.random.default_rng(0), [9])

    every = decoder.run(["logits"], {**feeds, "num_logits_to_keep": np.array(0)})[0]
    last = decoder.run(["logits"], feeds)[0]
    three = decoder.run(["logits"], {**feeds, "num_logits_to_keep": np.array(3)})[0]
    more = decoder.run(["logits"], {**feeds, "num_logits_to_keep": np.array(99)})[0]

    assert (every.shape[1], last.shape[1], three.shape[1], more.shape[1]) == (9, 1, 3, 9)
    np.testing.assert_allclose(last, every[:, -1:], atol=1e-5)
    np.testing.assert_allclose(three, every[:, -3:], atol=1e-5)


def test_rows_of_a_right_padded_batch_equal_single_runs(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    decoder = session(bundle_of(checkpoint_of("tiny"), "fp32") / "decoder.onnx")
    lengths = [9, 4, 7]
    feeds = decoder_feeds(decoder, np.random.default_rng(0), lengths)
    every = {"num_logits_to_keep": np.array(0)}

    together = decoder.run(["logits"], {**feeds, **every})[0]

    for row, length in enumerate(lengths):
        single = decoder_feeds(decoder, np.random.default_rng(0), [length])
        single["inputs_embeds"] = feeds["inputs_embeds"][row : row + 1, :length]
        np.testing.assert_allclose(
            together[row, :length], decoder.run(["logits"], {**single, **every})[0][0], atol=1e-5
        )


PEAK_OF_VISION = """
import resource, sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 3
vision = ort.InferenceSession(sys.argv[1], options)
rows, columns = int(sys.argv[2]), int(sys.argv[3])
pixels = np.zeros((rows * columns, vision.get_inputs()[0].shape[1]), np.float32)
vision.run(None, {"pixel_values": pixels[:16], "image_grid_thw": np.array([[1, 4, 4]])})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
vision.run(None, {"pixel_values": pixels, "image_grid_thw": np.array([[1, rows, columns]])})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_vision_memory_grows_with_the_patches_and_not_with_their_square(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    graph = bundle_of(checkpoint_of("tiny"), "fp32") / "vision.onnx"

    def peak(rows: int, columns: int) -> int:
        command = [sys.executable, "-c", PEAK_OF_VISION, str(graph), str(rows), str(columns)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # 16,384 patches: the scores of one head alone would be 1 GiB if they were ever all in memory.
    assert peak(128, 128) < 300 * 2**20
