"""The compiled kernels compute what numpy does, and a prompt on them fills the cache as the graphs do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_layers import damaged

from autoglm_edge.errors import BundleError, DeviceError, RequestError
from autoglm_edge.measure.profile import read_trace
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.layerwise import tiles
from autoglm_edge.runtime.layerwise.blocks import Blocks
from autoglm_edge.runtime.layerwise.index import LayerForm
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.native.crew import Crew
from autoglm_edge.runtime.native.layer import rotary_angles
from autoglm_edge.runtime.native.layers import NativeLayers, can_run_natively
from autoglm_edge.runtime.native.space import Space, space_bytes
from autoglm_edge.runtime.native.unit import Unit, best_unit, kernels, unit_reason
from autoglm_edge.runtime.native.weights import Widths
from autoglm_edge.runtime.plan import Machine, plan_model
from autoglm_edge.runtime.session import SessionOptions

UNITS = [
    pytest.param(
        unit,
        id=unit.name.lower(),
        marks=pytest.mark.skipif(best_unit() < unit, reason=f"this machine has no {unit.name.lower()}"),
    )
    for unit in (Unit.VECTORS, Unit.MATRICES)
]
needs_kernels = pytest.mark.skipif(best_unit() == Unit.NONE, reason="no AVX-512 with VNNI and BF16 here")
needs_matrices = pytest.mark.skipif(best_unit() < Unit.MATRICES, reason="no AMX here")


def up(value: int, step: int) -> int:
    return -(-value // step) * step


def to_tiles(values: NDArray[np.int8], depth: int) -> NDArray[np.int8]:
    """Rows in the layout of kernels.h."""
    rows = up(len(values), 32)
    out = np.zeros((rows, depth), np.int8)
    out[: len(values), : values.shape[1]] = values
    turned = out.reshape(rows // 16, 16, depth // 64, 64).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(turned).reshape(-1)


def from_tiles(stored: NDArray[np.int8], rows: int, columns: int) -> NDArray[np.int8]:
    depth = up(columns, 64)
    turned = stored.reshape(-1, depth // 64, 16, 64).transpose(0, 2, 1, 3)
    return turned.reshape(-1, depth)[:rows, :columns]


def random_blocks(
    random: np.random.Generator, rows: int, columns: int, size: int, bits: int, zeros: bool
) -> Blocks:
    count = -(-columns // size)
    return Blocks(
        random.integers(0, 256, (rows, count, size * bits // 8), dtype=np.uint8),
        random.uniform(-1.5, 1.5, (rows, count)).astype(np.float32),
        random.integers(0, 256, (rows, -(-count * bits // 8)), dtype=np.uint8) if zeros else None,
        columns,
        bits,
    )


def expanded(blocks: Blocks) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    weights = np.empty((blocks.columns, blocks.rows), np.int8)
    scales = np.empty(blocks.rows, np.float32)
    tiles.expand_tile(blocks.data, blocks.scales, blocks.zero_points, weights, scales, blocks.bits)
    return weights, scales


def given_to_kernels(blocks: Blocks) -> tuple[Any, ...]:
    return (blocks.data, blocks.scales, blocks.zero_points, blocks.rows, blocks.columns, blocks.bits)


def multiplied(
    unit: Unit,
    left: NDArray[np.int8],
    row_scales: NDArray[np.float32],
    one: Blocks,
    two: Blocks | None = None,
    bias: NDArray[np.float32] | None = None,
    column: int = 0,
    beside: int = 0,
) -> NDArray[np.float32]:
    target = np.full((len(left), one.rows + column + beside), np.nan, np.float32)
    with Crew(2, kernels.room_bytes(len(left), one.data.shape[1])) as crew:
        crew.share(
            kernels.multiply,
            int(unit),
            to_tiles(left, up(one.columns, 64)),
            row_scales,
            len(left),
            bias,
            target,
            target.shape[1],
            column,
            given_to_kernels(one),
            None if two is None else given_to_kernels(two),
            scratch=True,
        )
    return target


def exact(left: NDArray[np.int8], row_scales: NDArray[np.float32], blocks: Blocks) -> NDArray[np.float32]:
    weights, scales = expanded(blocks)
    sums = left.astype(np.int64) @ weights.astype(np.int64)
    return (sums.astype(np.float32) * scales) * row_scales[:, None]


# --- products


@needs_kernels
@given(
    rows=st.integers(1, 70),
    channels=st.integers(1, 300),
    columns=st.integers(1, 400),
    size=st.sampled_from([32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_products_are_the_exact_sums_of_the_expanded_weights(
    rows: int, channels: int, columns: int, size: int, bits: int, zeros: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    blocks = random_blocks(random, channels, columns, size, bits, zeros)
    left = random.integers(-127, 128, (rows, columns), dtype=np.int8)
    row_scales = random.uniform(0.1, 2, rows).astype(np.float32)

    for unit in Unit:
        if Unit.NONE < unit <= best_unit():
            found = multiplied(unit, left, row_scales, blocks)
            np.testing.assert_array_equal(found, exact(left, row_scales, blocks))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("columns", [100, 4096, 9000])
def test_a_depth_of_several_panels_is_one_sum(unit: Unit, columns: int) -> None:
    random = np.random.default_rng(columns)
    blocks = random_blocks(random, 140, columns, 64, 4, True)
    left = random.integers(-127, 128, (45, columns), dtype=np.int8)
    row_scales = np.ones(45, np.float32)

    np.testing.assert_array_equal(multiplied(unit, left, row_scales, blocks), exact(left, row_scales, blocks))


@pytest.mark.parametrize("unit", UNITS)
def test_products_go_into_their_columns_and_nowhere_else(unit: Unit) -> None:
    random = np.random.default_rng(3)
    blocks = random_blocks(random, 130, 64, 32, 4, True)
    left = random.integers(-127, 128, (33, 64), dtype=np.int8)
    bias = random.standard_normal(130).astype(np.float32)
    row_scales = np.ones(33, np.float32)

    found = multiplied(unit, left, row_scales, blocks, bias=bias, column=3, beside=5)

    np.testing.assert_array_equal(found[:, 3:133], exact(left, row_scales, blocks) + bias)
    assert np.isnan(found[:, :3]).all() and np.isnan(found[:, 133:]).all()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("channels", "columns"), [(64, 64), (130, 200), (65, 9000)])
def test_gated_products_are_silu_of_one_times_the_other(unit: Unit, channels: int, columns: int) -> None:
    random = np.random.default_rng(channels)
    gate, up_ = (random_blocks(random, channels, columns, 32, 4, True) for _ in range(2))
    left = random.integers(-127, 128, (40, columns), dtype=np.int8)
    row_scales = np.full(40, 1e-4, np.float32)

    found = multiplied(unit, left, row_scales, gate, up_)

    one, two = (exact(left, row_scales, blocks).astype(np.float64) for blocks in (gate, up_))
    # exp in float32, by a polynomial.
    np.testing.assert_allclose(found, one / (1 + np.exp(-one)) * two, rtol=2e-6, atol=1e-6)


@needs_kernels
def test_a_channel_of_zeros_and_one_that_is_no_number_spoil_no_other() -> None:
    random = np.random.default_rng(5)
    blocks = random_blocks(random, 40, 64, 32, 4, True)
    blocks.scales[3] = 0
    blocks.scales[7, 1] = np.nan
    left = random.integers(-127, 128, (5, 64), dtype=np.int8)

    found = multiplied(Unit.VECTORS, left, np.ones(5, np.float32), blocks)

    assert (found[:, 3] == 0).all() and np.isnan(found[:, 7]).all()
    assert np.isfinite(np.delete(found, 7, axis=1)).all()


# --- rows


@needs_kernels
@pytest.mark.parametrize("width", [16, 100, 4096])
def test_rows_are_normed_and_rounded_to_bytes(width: int) -> None:
    random = np.random.default_rng(width)
    x = random.standard_normal((37, width)).astype(np.float32)
    x[5] = 0
    weight = random.uniform(0.5, 2, width).astype(np.float32)
    stored, scales = np.empty(64 * up(width, 64), np.int8), np.empty(37, np.float32)

    kernels.round_rows(x, weight, 1e-5, width, 0, 37, stored, scales)

    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * weight
    found = from_tiles(stored, 37, width)
    # Half a step, and a little for values between two steps.
    assert np.abs(found * scales[:, None] - normed).max() <= 0.501 * scales.max()
    assert (np.abs(found[np.abs(normed).max(1) > 0]).max(1) == 127).all()
    assert (found[5] == 0).all() and np.isfinite(scales).all()


@needs_kernels
def test_a_branch_is_normed_and_added_and_the_sum_normed_for_what_follows() -> None:
    random = np.random.default_rng(1)
    stream, branch = (random.standard_normal((20, 100)).astype(np.float32) for _ in range(2))
    one, two = (random.uniform(0.5, 2, 100).astype(np.float32) for _ in range(2))
    stored, scales = np.empty(32 * 128, np.int8), np.empty(20, np.float32)
    before = stream.copy()

    kernels.join_rows(stream, branch, one, two, 1e-5, 100, 4, 16, stored, scales)

    def norm(x: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * weight
        return found

    wanted = before + norm(branch, one)
    np.testing.assert_array_equal(stream[:4], before[:4])
    np.testing.assert_allclose(stream[4:], wanted[4:], rtol=0, atol=2e-6)
    found = from_tiles(stored, 20, 100)[4:] * scales[4:, None]
    assert np.abs(found - norm(wanted, two)[4:]).max() <= 0.501 * scales[4:].max()


@needs_kernels
@pytest.mark.parametrize("rotary", [2, 16, 20, 64])
def test_pairs_of_neighbours_turn_and_the_rest_of_a_head_stays(rotary: int) -> None:
    random = np.random.default_rng(rotary)
    x = random.standard_normal((9, 3 * 80 + 7)).astype(np.float32)
    cos, sin = (random.standard_normal((9, rotary // 2)).astype(np.float32) for _ in range(2))
    wanted = x.copy()
    for head in range(3):
        start = 80 * head
        even, odd = x[:, start : start + rotary : 2], x[:, start + 1 : start + rotary : 2]
        wanted[:, start : start + rotary : 2] = even * cos - odd * sin
        wanted[:, start + 1 : start + rotary : 2] = odd * cos + even * sin

    kernels.rotate_rows(x, x.shape[1], 3, 80, rotary, cos, sin, 0, 9)

    np.testing.assert_allclose(x, wanted, rtol=0, atol=2e-6)


def test_each_axis_turns_its_own_pairs() -> None:
    form = LayerForm(1e-5, 10000.0, 8, (1, 2, 1))
    positions = np.array([[0, 1], [10, 20], [100, 200]])

    cos, sin = rotary_angles(positions, form)

    angles = [
        [place * 10000.0 ** (-pair / 4) for pair, place in enumerate((p[0], p[1], p[1], p[2]))]
        for p in positions.T.tolist()
    ]
    np.testing.assert_allclose(cos, np.cos(angles), atol=2e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=2e-6)


# --- attention


def attended(
    unit: Unit,
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    count: int,
    *,
    causal: bool = True,
) -> NDArray[np.float32]:
    """Queries (T, H, D); keys and values (K, capacity, D), of which `count` are there."""
    tokens, heads, size = queries.shape
    packed = np.empty((len(keys), kernels.packed_size(count, size)), np.uint16)
    for head in range(len(keys)):
        kernels.pack_keys(keys[head], values[head], size, count, size, packed[head])
    target = np.full((tokens, heads, size), np.nan, np.float32)
    with Crew(2) as crew:
        crew.share(
            kernels.attend,
            *(int(unit), causal, queries, heads * size, tokens, heads, len(keys), size, count),
            *(size**-0.5, packed, target),
        )
    return target


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("tokens", "past", "heads", "kv_heads", "size", "causal"),
    [
        (1, 0, 2, 1, 32, True),
        (37, 0, 4, 2, 16, True),
        (100, 300, 4, 2, 128, True),
        (32, 96, 2, 2, 80, True),
        (70, 129, 2, 2, 80, False),
        (5, 0, 3, 3, 256, False),
    ],
)
def test_attention_is_that_of_floats(
    unit: Unit, tokens: int, past: int, heads: int, kv_heads: int, size: int, causal: bool
) -> None:
    random = np.random.default_rng(tokens)
    count = tokens + past
    queries = random.standard_normal((tokens, heads, size)).astype(np.float32)
    keys, values = (random.standard_normal((kv_heads, count + 3, size)).astype(np.float32) for _ in range(2))

    found = attended(unit, queries, keys, values, count, causal=causal)

    wanted = np.empty(queries.shape)
    for head in range(heads):
        own = head // (heads // kv_heads)
        scores = queries[:, head].astype(float) @ keys[own, :count].T.astype(float) * size**-0.5
        if causal:
            scores[np.arange(count) > past + np.arange(tokens)[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(1, keepdims=True))
        wanted[:, head] = weights / weights.sum(1, keepdims=True) @ values[own, :count].astype(float)
    # Two bfloat16 hold 16 bits of a float: 2**-17 of values of some 3, a few of which add up.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)


@pytest.mark.parametrize("unit", UNITS)
def test_what_a_token_attends_to_does_not_depend_on_where_a_prompt_is_cut(unit: Unit) -> None:
    random = np.random.default_rng(2)
    queries = random.standard_normal((200, 2, 64)).astype(np.float32)
    keys, values = (random.standard_normal((1, 200, 64)).astype(np.float32) for _ in range(2))

    whole = attended(unit, queries, keys, values, 200)
    first = attended(unit, np.ascontiguousarray(queries[:77]), keys, values, 77)
    second = attended(unit, np.ascontiguousarray(queries[77:]), keys, values, 200)

    np.testing.assert_array_equal(np.concatenate([first, second]), whole)


@pytest.mark.parametrize("unit", UNITS)
def test_large_scores_and_many_keys_overflow_nothing(unit: Unit) -> None:
    random = np.random.default_rng(7)
    queries = 60 * random.standard_normal((33, 1, 32)).astype(np.float32)
    keys, values = (60 * random.standard_normal((1, 1000, 32)).astype(np.float32) for _ in range(2))

    found = attended(unit, queries, keys, values, 1000, causal=False)

    scores = queries[:, 0].astype(float) @ keys[0].T.astype(float) * 32**-0.5
    winner = values[0][scores.argmax(1)]
    clear = np.sort(scores, 1)[:, -1] - np.sort(scores, 1)[:, -2] > 30
    assert clear.any() and np.isfinite(found).all()
    np.testing.assert_allclose(found[clear, 0], winner[clear], rtol=1e-4, atol=1e-3)


# --- hostile input


def a_product(**changed: Any) -> list[Any]:
    given: dict[str, Any] = {
        "unit": 1,
        "left": np.zeros(32 * 64, np.int8),
        "row_scales": np.ones(3, np.float32),
        "rows": 3,
        "bias": None,
        "target": np.empty((3, 40), np.float32),
        "stride": 40,
        "column": 0,
        "one": (np.zeros((40, 2, 16), np.uint8), np.ones((40, 2), np.float32), None, 40, 64, 4),
        "two": None,
        "next": np.zeros(1, np.int64),
        "scratch": np.empty(kernels.room_bytes(3, 2), np.uint8),
    }
    return [*(given | changed).values()]


@needs_kernels
@pytest.mark.parametrize(
    "changed",
    [
        {"left": np.zeros(31 * 64, np.int8)},
        {"left": np.zeros(32 * 64, np.int16)},
        {"row_scales": np.ones(2, np.float32)},
        {"rows": 0},
        {"rows": -3},
        {"target": np.empty((3, 39), np.float32)},
        {"target": np.empty((40, 3), np.float32).T},
        {"stride": 39},
        {"column": 1},
        {"column": -1},
        {"bias": np.ones(39, np.float32)},
        {"one": (np.zeros((40, 2, 8), np.uint8), np.ones((40, 2), np.float32), None, 40, 64, 4)},
        {"one": (np.zeros((39, 2, 16), np.uint8), np.ones((40, 2), np.float32), None, 40, 64, 4)},
        {"one": (np.zeros((40, 2, 16), np.uint8), np.ones((40, 2), np.float32), None, 40, 65, 4)},
        {"one": (np.zeros((40, 2, 16), np.uint8), np.ones((40, 2), np.float32), None, 40, 64, 5)},
        {"one": (np.zeros((40, 2, 16), np.uint8), np.ones((40, 2), np.float32), None, 1 << 62, 64, 4)},
        {"one": (np.zeros(0, np.uint8), np.ones(0, np.float32), None, 40, 64, 4)},
        {
            "one": (
                np.zeros((40, 2, 16), np.uint8),
                np.ones((40, 2), np.float32),
                np.zeros(39, np.uint8),
                *(40, 64, 4),
            )
        },
        {"two": (np.zeros((20, 2, 16), np.uint8), np.ones((20, 2), np.float32), None, 20, 64, 4)},
        {"scratch": np.empty(100, np.uint8)},
        {"next": np.zeros(0, np.int64)},
        {"unit": 0},
        {"unit": 3},
    ],
)
def test_a_product_of_things_that_do_not_fit_is_refused(changed: dict[str, Any]) -> None:
    kernels.multiply(*a_product())

    with pytest.raises(ValueError):
        kernels.multiply(*a_product(**changed))


@needs_kernels
def test_rows_and_keys_that_do_not_fit_are_refused() -> None:
    x, stored, scales = np.ones((4, 64), np.float32), np.empty(32 * 64, np.int8), np.empty(4, np.float32)
    with pytest.raises(ValueError, match="x has 256 values"):
        kernels.round_rows(x, None, 0.0, 64, 1, 4, stored, scales)
    with pytest.raises(ValueError, match="tiles"):
        kernels.round_rows(x, None, 0.0, 64, 0, 4, stored[:-1], scales)
    with pytest.raises(ValueError, match="out of range"):
        kernels.round_rows(x, None, 0.0, 64, -1, 4, stored, scales)
    with pytest.raises(ValueError, match="out of range"):
        kernels.rotate_rows(x, 64, 2, 64, 8, x, x, 0, 4)
    with pytest.raises(ValueError, match="out of range"):
        kernels.pack_keys(x, x, 64, 4, 300, np.empty(10, np.uint16))
    with pytest.raises(ValueError, match="packed has 10"):
        kernels.pack_keys(x, x, 64, 4, 64, np.empty(10, np.uint16))
    with pytest.raises(ValueError, match="out of range"):
        kernels.attend(1, 1, x, 64, 4, 3, 2, 32, 4, 1.0, x, x, np.zeros(1, np.int64))


# --- the layers


@pytest.fixture(scope="module")
def bundle(checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]) -> Bundle:
    return Bundle.open(bundle_of(checkpoint_of("tiny"), "int4"))


def filled(model: Model, reader: NativeLayers | None, count: int, pieces: tuple[int, ...] = ()) -> NDArray:
    """Rows of the cache after `count` tokens whose axes run at different speeds."""
    ids, cache, start = np.arange(5, 5 + count), model.new_cache(count + 7), 0
    for stop in (*pieces, count):
        places = np.arange(start, stop)
        embeds, positions = model.embed(ids[start:stop]), np.stack([places, places // 2, places // 3])
        if reader is None:
            model.prefill(embeds, positions, cache)
        else:
            for _ in reader.prefill(embeds, positions, cache):
                pass
        start = stop
    assert cache.length == count
    return cache.read(0, count)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("precision", ["int4", "int4-mixed", "int3"])
def test_the_cache_is_filled_as_by_the_graph_of_a_layer(
    unit: Unit, precision: str, checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    bundle = Bundle.open(bundle_of(checkpoint_of("tiny"), precision))
    by_graph = Model(bundle, SessionOptions(threads=1, prefill="layers"))

    found = filled(by_graph, NativeLayers(bundle, 2, unit), 96)
    wanted = filled(by_graph, None, 96)

    # The first layer's keys and values come from the same integers. Later ones follow floats that differ by
    # a few bits, so that here and there an activation falls to the byte beside.
    assert np.linalg.norm(found[0] - wanted[0]) < 1e-3 * np.linalg.norm(wanted[0])
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert np.linalg.norm(one - other) < 0.01 * np.linalg.norm(other)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pieces", [(1,), (40,), (33, 64, 65)])
def test_pieces_of_a_prompt_fill_the_cache_bit_for_bit_as_the_whole(
    bundle: Bundle, unit: Unit, pieces: tuple[int, ...]
) -> None:
    model = Model(bundle, SessionOptions(threads=1))
    reader = NativeLayers(bundle, 2, unit)

    np.testing.assert_array_equal(filled(model, reader, 96, pieces), filled(model, reader, 96))


@needs_kernels
def test_a_prompt_that_is_given_up_leaves_the_cache_as_it_was(bundle: Bundle) -> None:
    model, reader = Model(bundle, SessionOptions(threads=1)), NativeLayers(bundle, 2, Unit.VECTORS)
    cache = model.new_cache(64)
    kept = filled(model, reader, 32)
    cache.write(0, kept)

    work = reader.prefill(model.embed(np.arange(5, 37)), np.arange(32, 64)[None].repeat(3, 0), cache)
    next(work)
    next(work)
    work.close()  # type: ignore[attr-defined]

    assert cache.length == 32
    np.testing.assert_array_equal(cache.read(0, 32), kept)


@needs_matrices
def test_the_engine_takes_them_for_prompts_and_says_so(bundle: Bundle) -> None:
    import autoglm_edge as ag

    words = [{"role": "user", "content": "打开 " * 40}]
    with ag.load(bundle.path) as engine:
        *_, last = engine.chat(words, max_tokens=2)
        warm = [delta.token_ids for delta in engine.chat(words, max_tokens=2)]
    with ag.load(bundle.path) as engine:
        cold = [delta.token_ids for delta in engine.chat(words, max_tokens=2)]

    assert last.timings is not None and last.timings.plan is not None
    assert last.timings.plan.prefill == "native"
    assert warm == cold


@needs_kernels
def test_a_trace_tells_what_each_kernel_took(bundle: Bundle, tmp_path: Path) -> None:
    model = Model(bundle, SessionOptions(threads=1))
    reader = NativeLayers(bundle, 2, Unit.VECTORS, traces=tmp_path)
    for _ in range(2):
        filled(model, reader, 64)
    del reader

    (path,) = tmp_path.iterdir()
    found = read_trace(path.read_bytes())  # of the second run

    assert {"multiply", "attend", "round_rows", "join_rows", "rotate_rows", "pack_keys"} == set(found)
    assert all(seconds > 0 for seconds in found.values())


@needs_kernels
def test_a_forecast_of_their_memory_is_what_they_take(bundle: Bundle) -> None:
    shape, layers = bundle.manifest.geometry, NativeLayers(bundle, 1, Unit.VECTORS)
    widths = layers._layer.widths
    space = Space(widths, 50, 300)
    arrays = (space.stream, space.branch, space.row_scales, space.tiles, space.packed)
    wide = max(space.projected.nbytes + space.attended.nbytes, space.inner.nbytes)

    assert space_bytes(shape, widths.inner, 50, 300) == wide + sum(array.nbytes for array in arrays)


# --- the plan, and the form that bundles store


def machine(unit: Unit) -> Machine:
    from autoglm_edge.runtime.machine.integers import Integers

    good = Machine(24_000_000_000, Integers(True, True, "amx_int8"), lambda part: False, lambda part: "")
    return dataclasses.replace(good, unit=unit)


def test_prompts_go_by_the_kernels_where_there_is_amx_and_nowhere_else(bundle: Bundle) -> None:
    plan = plan_model(bundle, SessionOptions(), machine(Unit.MATRICES))
    assert (plan.prefill, plan.takes_breaks, plan.prefill_chunk) == ("native", True, 2048)
    assert "AMX" in plan.prefill_reason
    assert plan.by_decoder(31) and not plan.by_decoder(32)

    for unit in (Unit.NONE, Unit.VECTORS):
        assert plan_model(bundle, SessionOptions(), machine(unit)).prefill == "layers"
        with pytest.raises(DeviceError, match="needs AMX"):
            plan_model(bundle, SessionOptions(prefill="native"), machine(unit))


def test_asking_for_the_kernels_is_refused_where_the_bundle_is_not_for_them(
    bundle: Bundle, tmp_path: Path, checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    integers = Bundle.open(bundle_of(checkpoint_of("tiny"), "int8"))
    old = with_form(bundle, tmp_path / "old", None)

    for other in (integers, old):
        assert not can_run_natively(other)
        with pytest.raises(RequestError, match="4-bit matrices"):
            plan_model(other, SessionOptions(prefill="native"), machine(Unit.MATRICES))
    assert plan_model(old, SessionOptions(), machine(Unit.MATRICES)).prefill == "layers"
    with pytest.raises(BundleError, match="does not say what its layers compute"):
        NativeLayers(old, 1)


def with_form(bundle: Bundle, folder: Path, form: Any) -> Bundle:
    """A copy with another form in its index, or none."""

    def change(document: dict[str, Any]) -> None:
        document.pop("form")
        if form is not None:
            document["form"] = form

    return damaged(bundle, folder, change)


GOOD = {"norm_eps": 1e-5, "rope_theta": 10000.0, "rotary_dim": 64, "mrope_section": [8, 12, 12]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": "1e-5"}, "norm_eps is '1e-5'"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0"),
        ({"rope_theta": math.inf}, "rope_theta inf"),
        ({"rope_theta": math.nan}, "rope_theta nan"),
        ({"rotary_dim": 62}, "rotary_dim 62"),
        ({"mrope_section": [32]}, "mrope_section"),
        ({"mrope_section": [-8, 20, 20]}, "mrope_section"),
        ({"mrope_section": ["8", 12, 12]}, "three integers"),
        ({"extra": 1}, "has the keys"),
    ],
)
def test_a_form_that_cannot_be_is_refused(
    bundle: Bundle, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    wrong = with_form(bundle, tmp_path / "copy", GOOD | change)

    with pytest.raises(BundleError, match=message):
        can_run_natively(wrong)


def test_widths_that_are_not_those_of_the_weights_are_refused(bundle: Bundle) -> None:
    shape = dataclasses.replace(bundle.manifest.geometry, kv_heads=1)
    manifest = dataclasses.replace(bundle.manifest, geometry=shape)

    with pytest.raises(BundleError, match="k_proj is"):
        NativeLayers(dataclasses.replace(bundle, manifest=manifest), 1)


def test_the_reason_names_what_is_missing() -> None:
    assert ("AMX" in unit_reason()) or ("compiler" in unit_reason())


def test_widths_count_the_heads() -> None:
    widths = Widths(64, 4, 2, 16, 128, LayerForm(1e-5, 1e4, 8, (1, 2, 1)))

    assert (widths.attended, widths.projected) == (64, 128)
