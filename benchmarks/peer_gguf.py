"""Writes a GGUF file of the 9B's geometry with random quantized blocks, in the layout that llama.cpp reads.

In: geometry, a quantization. Out: a file. Architecture "glm4", whose tensors are those of GLM-4.1V's text
model: four norms per layer, biases on q, k and v, gate and up in one matrix, half of each head rotated. Each
tensor gets blocks of its own, with scales that keep activations near 1. Needs the package `gguf` and numpy.

    python peer_gguf.py '{"hidden": 4096, …}' q4_0 out.gguf
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FORMATS = ("q4_0", "q4_k", "q8_0")
"""Of layers and embedding. The head is Q6_K below 8 bits, as llama-quantize makes it."""
BLOCK = {"q4_0": (32, 18), "q4_k": (256, 144), "q6_k": (256, 210), "q8_0": (32, 34)}
"""Weights and bytes of a block."""
ROWS_AT_ONCE = 4096


def quantized(name: str, columns: int) -> str:
    """The format of a matrix: where K formats, of 256 columns a block, do not divide, a plain one."""
    return name if columns % BLOCK[name][0] == 0 else {"q4_k": "q4_0", "q6_k": "q8_0"}[name]


def matrices(geometry: dict[str, int], layers_format: str) -> Iterator[tuple[str, int, int, str]]:
    """Name, rows, columns and format of every matrix, in the order of the file."""
    hidden, head = geometry["hidden"], "q8_0" if layers_format == "q8_0" else "q6_k"
    width, kv_width = (geometry[key] * geometry["head_dim"] for key in ("heads", "kv_heads"))
    yield "token_embd.weight", geometry["vocab"], hidden, quantized(layers_format, hidden)
    yield "output.weight", geometry["vocab"], hidden, quantized(head, hidden)
    for layer in range(geometry["layers"]):
        for name, rows, columns in (
            ("attn_q", width, hidden),
            ("attn_k", kv_width, hidden),
            ("attn_v", kv_width, hidden),
            ("attn_output", hidden, width),
            ("ffn_up", 2 * geometry["intermediate"], hidden),
            ("ffn_down", hidden, geometry["intermediate"]),
        ):
            yield f"blk.{layer}.{name}.weight", rows, columns, quantized(layers_format, columns)


def vectors(geometry: dict[str, int]) -> Iterator[tuple[str, int, float]]:
    """Name, length and value of every norm and bias."""
    hidden = geometry["hidden"]
    yield "output_norm.weight", hidden, 1.0
    for layer in range(geometry["layers"]):
        for name in ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"):
            yield f"blk.{layer}.{name}.weight", hidden, 1.0
        for name, heads in (("attn_q", "heads"), ("attn_k", "kv_heads"), ("attn_v", "kv_heads")):
            yield f"blk.{layer}.{name}.bias", geometry[heads] * geometry["head_dim"], 0.01


def random_blocks(name: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, bytes) of blocks whose weights have a spread of about 0.5 / sqrt(columns)."""
    weights, size = BLOCK[name]
    count = columns // weights
    blocks = np.frombuffer(rng.bytes(rows * count * size), np.uint8).reshape(rows, count, size).copy()
    spread = 0.5 / columns**0.5
    # Where the fp16 scales lie in a block, and the root mean square of a random code.
    places, code = {
        "q4_0": ((0,), 4.6),
        "q8_0": ((0,), 74.0),
        "q4_k": ((0, 2), 290.0),
        "q6_k": ((208,), 18.0 * 74),
    }[name]
    scale = np.float16(max(spread / code, 6e-8))
    for place in places:
        blocks[:, :, place : place + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(rows, count * size)


def counts(geometry: dict[str, int], layers_format: str) -> dict[str, int]:
    """Weights and bytes of the matrices that a step reads: all but the embedding."""
    weights = read_bytes = 0
    for name, rows, columns, form in matrices(geometry, layers_format):
        if name != "token_embd.weight":
            weights += rows * columns
            read_bytes += rows * columns // BLOCK[form][0] * BLOCK[form][1]
    return {"weights": weights, "read_bytes": read_bytes}


def write(path: Path, geometry: dict[str, int], layers_format: str) -> dict[str, int]:
    """Write the file; returns `counts`.

    One tensor is in memory at a time, so the whole 9B needs no more than its largest matrix.
    """
    import gguf

    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(str(path), "glm4")
    writer.add_name("random")
    writer.add_vocab_size(geometry["vocab"])
    writer.add_context_length(32768)
    writer.add_embedding_length(geometry["hidden"])
    writer.add_block_count(geometry["layers"])
    writer.add_feed_forward_length(geometry["intermediate"])
    writer.add_head_count(geometry["heads"])
    writer.add_head_count_kv(geometry["kv_heads"])
    writer.add_key_length(geometry["head_dim"])
    writer.add_value_length(geometry["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(geometry["head_dim"] // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("no_vocab")
    tables = list(matrices(geometry, layers_format))
    for name, rows, columns, form in tables:
        size = BLOCK[form][1] * columns // BLOCK[form][0]
        writer.add_tensor_info(
            name, (rows, size), np.dtype(np.uint8), rows * size, raw_dtype=kinds[form.upper()]
        )
    for name, length, _ in vectors(geometry):
        writer.add_tensor_info(name, (length,), np.dtype(np.float32), 4 * length)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for _, rows, columns, form in tables:
        writer.write_tensor_data(random_blocks(form, rows, columns, rng))
    for _, length, value in vectors(geometry):
        writer.write_tensor_data(np.full(length, value, np.float32))
    writer.close()
    return counts(geometry, layers_format)


if __name__ == "__main__":
    print(json.dumps(write(Path(sys.argv[3]), json.loads(sys.argv[1]), sys.argv[2])))
