"""What a plan chooses, and that the graphs of a bundle compute the same wherever their weights are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from autoglm_edge.errors import BundleError, DeviceError, RequestError
from autoglm_edge.runtime import model as model_module
from autoglm_edge.runtime import plan as plan_module
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.machine.integers import Integers
from autoglm_edge.runtime.manifest import Part
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.plan import PREFILL_FROM_TOKENS, Machine, ModelPlan, plan_model
from autoglm_edge.runtime.prompt.image import patchify
from autoglm_edge.runtime.session import SessionOptions

GOOD = Integers(exact=True, widened=True, unit="avx512_vnni")
CUT_OFF = Integers(exact=False, widened=True, unit="")


@pytest.fixture(scope="module")
def bundle(checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]) -> Bundle:
    """Blocks of 4 bits, and a prefill graph of integers beside them."""
    return Bundle.open(bundle_of(checkpoint_of("tiny"), "int4", prefill="int8"))


@pytest.fixture(scope="module")
def integer_bundle(checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]) -> Bundle:
    return Bundle.open(bundle_of(checkpoint_of("tiny"), "int8"))


def machine(
    *,
    available: int | None = 24_000_000_000,
    integers: Integers = GOOD,
    is_prepared: bool = False,
    room: str = "",
    compiled: bool = True,
) -> Machine:
    return Machine(available, integers, lambda part: is_prepared, lambda part: room, compiled)


def large(bundle: Bundle, *, integer: bool = False, prefill: bool = True) -> Bundle:
    """The bundle as its manifest would be at 9B."""
    sizes = {"decoder": 5_300_000_000, "prefill": 8_200_000_000}
    parts = {
        name: Part(
            part.graph,
            part.data,
            sizes.get(name, part.weight_bytes),
            integer=integer if name == "decoder" else part.integer,
        )
        for name, part in bundle.manifest.parts.items()
        if prefill or name != "prefill"
    }
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, parts=parts))


def ids_and_positions(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(5, 5 + count), np.arange(count)[None].repeat(3, 0)


def test_a_small_decoder_is_packed_at_each_load(bundle: Bundle) -> None:
    plan = plan_model(bundle, SessionOptions(threads=3), machine())

    assert (plan.weights, plan.prepare) == ("packed", False)
    assert (plan.threads, plan.threads_reason) == (3, "asked for")


@pytest.mark.parametrize(
    ("integer", "given", "options", "weights", "prepare"),
    [
        (False, machine(), SessionOptions(), "prepared", True),
        (False, machine(is_prepared=True), SessionOptions(), "prepared", False),
        (False, machine(is_prepared=True), SessionOptions(prepare=False), "prepared", False),
        (False, machine(), SessionOptions(prepare=False), "packed", False),
        (False, machine(room="full"), SessionOptions(), "packed", False),
        (False, machine(is_prepared=True), SessionOptions(weights="packed"), "packed", False),
        (False, machine(), SessionOptions(weights="prepared", prepare=False), "prepared", True),
        (True, machine(), SessionOptions(), "prepared", True),
        (True, machine(room="full"), SessionOptions(), "packed", False),
        (True, machine(room="full", available=8_000_000_000), SessionOptions(), "mapped", False),
        (True, machine(room="full", available=None), SessionOptions(), "mapped", False),
        (True, machine(is_prepared=True), SessionOptions(weights="mapped"), "mapped", False),
    ],
)
def test_where_the_weights_of_a_large_decoder_go(
    bundle: Bundle, integer: bool, given: Machine, options: SessionOptions, weights: str, prepare: bool
) -> None:
    plan = plan_model(large(bundle, integer=integer), options, given)

    assert (plan.weights, plan.prepare) == (weights, prepare)
    assert plan.weights_reason


def test_blocks_are_not_run_from_their_file(bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="weights 'mapped' need a decoder in 8-bit integers"):
        plan_model(bundle, SessionOptions(weights="mapped"), machine())


@pytest.mark.parametrize(
    ("given", "asked", "prefill"),
    [
        (machine(), "auto", "integer"),
        (machine(available=None), "auto", "integer"),
        (machine(available=10_000_000_000), "auto", "layers"),
        (machine(available=10_000_000_000), "integer", "integer"),
        (machine(integers=CUT_OFF), "auto", "decoder"),
        (machine(integers=Integers(True, True, "")), "auto", "decoder"),
        (machine(integers=Integers(True, True, "")), "integer", "integer"),
        (machine(integers=Integers(True, True, None)), "auto", "integer"),
        (machine(), "decoder", "decoder"),
        (machine(), "layers", "layers"),
    ],
)
def test_which_graph_reads_prompts(bundle: Bundle, given: Machine, asked: str, prefill: str) -> None:
    plan = plan_model(large(bundle), SessionOptions(prefill=asked), given)

    assert plan.prefill == prefill
    assert plan.prefill_reason


@pytest.mark.parametrize(("compiled", "shortest", "by"), [(True, 128, "compiled"), (False, 320, "numpy")])
def test_shorter_prompts_go_layer_by_layer_where_the_expansion_is_compiled(
    bundle: Bundle, compiled: bool, shortest: int, by: str
) -> None:
    plan = plan_model(large(bundle, prefill=False), SessionOptions(), machine(compiled=compiled))

    assert plan.by_decoder(shortest - 1) and not plan.by_decoder(shortest)
    assert by in plan.prefill_reason


def test_prefill_by_integers_is_refused_where_there_is_none(bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="without"):
        plan_model(large(bundle, prefill=False), SessionOptions(prefill="integer"), machine())
    with pytest.raises(DeviceError, match="cut off at 16 bits"):
        plan_model(bundle, SessionOptions(prefill="integer"), machine(integers=CUT_OFF))

    assert plan_model(large(bundle, prefill=False), SessionOptions(), machine()).prefill == "layers"


def test_reading_layer_by_layer_is_refused_where_it_cannot_be(bundle: Bundle, integer_bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="'layers' needs a bundle with 4-bit matrices"):
        plan_model(integer_bundle, SessionOptions(prefill="layers"), machine())
    with pytest.raises(DeviceError, match="cut off at 16 bits"):
        plan_model(bundle, SessionOptions(prefill="layers"), machine(integers=CUT_OFF))

    assert plan_model(integer_bundle, SessionOptions(), machine()).prefill == "decoder"


def test_a_cpu_that_cuts_off_products_runs_no_integer_decoder_but_widens_the_vision_tower(
    bundle: Bundle, integer_bundle: Bundle
) -> None:
    with pytest.raises(DeviceError, match=r"cut off at 16 bits, .*int8-blocks"):
        plan_model(integer_bundle, SessionOptions(), machine(integers=CUT_OFF))

    assert bundle.manifest.parts["vision"].integer
    assert plan_model(bundle, SessionOptions(), machine(integers=CUT_OFF)).widened
    assert not plan_model(bundle, SessionOptions(), machine()).widened


@pytest.mark.parametrize(
    "options", [{"weights": "disk"}, {"prefill": 1}, {"prepare": "no"}, {"weights": None}]
)
def test_options_that_mean_nothing_are_refused(options: dict) -> None:
    with pytest.raises(RequestError, match="must be"):
        SessionOptions(**options)


def test_widened_vision_gives_the_very_features(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, pictures: list
) -> None:
    image = patchify(pictures[0], bundle.manifest.image)
    plain = Model(bundle, SessionOptions(threads=1))
    monkeypatch.setattr(plan_module, "integers", lambda: CUT_OFF)
    widened = Model(bundle, SessionOptions(threads=1))

    assert not plain.plan.widened
    assert widened.plan.widened
    # Both add the same integers; only where onnxruntime fuses the scales can a last bit differ.
    np.testing.assert_allclose(widened.encode_image(image), plain.encode_image(image), rtol=1e-4, atol=1e-4)


def test_integer_weights_give_the_same_logits_mapped_and_packed(integer_bundle: Bundle) -> None:
    ids, positions = ids_and_positions(40)
    logits = {}
    for weights in ("packed", "mapped"):
        model = Model(integer_bundle, SessionOptions(threads=1, weights=weights))
        logits[weights] = model.forward(model.embed(ids), positions, model.new_cache(40), keep=0)
        assert model.plan.weights == weights

    # The integer sums are equal; a kernel for repacked weights may apply the scales in another order.
    np.testing.assert_allclose(logits["mapped"], logits["packed"], rtol=1e-5, atol=1e-5)


def run(model: Model, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Prefill `count` tokens, score one more: rows of the cache and logits."""
    ids, positions = ids_and_positions(count + 1)
    cache = model.new_cache(count + 1)
    model.prefill(model.embed(ids[:-1]), positions[:, :-1], cache)
    assert cache.length == count
    rows = cache.read(0, count)
    return rows, model.forward(model.embed(ids[-1:]), positions[:, -1:], cache)


def test_the_prefill_graph_reads_long_pieces_and_the_decoder_short_ones(bundle: Bundle) -> None:
    model = Model(bundle, SessionOptions(threads=1, prefill="integer"))
    decoder = Model(bundle, SessionOptions(threads=1, prefill="decoder"))

    short = run(model, PREFILL_FROM_TOKENS - 1)
    assert "_prefill" not in vars(model)  # not loaded yet
    assert all((a == b).all() for a, b in zip(short, run(decoder, PREFILL_FROM_TOKENS - 1), strict=True))

    rows, logits = run(model, PREFILL_FROM_TOKENS)
    exact_rows, exact_logits = run(decoder, PREFILL_FROM_TOKENS)
    assert "_prefill" in vars(model)
    assert not (rows == exact_rows).all()
    # 8-bit weights here, 4-bit ones there, made of the same matrices: near, and far from unrelated.
    for found, exact in ((rows, exact_rows), (logits, exact_logits)):
        assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.9
    assert "_prefill" not in vars(decoder)


def test_the_prefill_graph_in_pieces_fills_the_cache_as_in_one(bundle: Bundle) -> None:
    model = Model(bundle, SessionOptions(threads=1, prefill="integer"))
    ids, positions = ids_and_positions(80)
    whole, pieces = model.new_cache(80), model.new_cache(80)
    model.prefill(model.embed(ids), positions, whole)
    for part in (slice(0, 40), slice(40, 80)):
        model.prefill(model.embed(ids[part]), positions[:, part], pieces)

    # Rows of a product do not depend on each other; attention adds in other blocks.
    np.testing.assert_allclose(pieces.read(0, 80), whole.read(0, 80), rtol=0, atol=1e-2)


def test_two_caches_share_one_prefill_graph(bundle: Bundle) -> None:
    model = Model(bundle, SessionOptions(threads=1, prefill="integer"))
    ids, positions = ids_and_positions(40)
    one, two = model.new_cache(40), model.new_cache(64)
    for cache in (one, two):
        model.prefill(model.embed(ids), positions, cache)

    assert (one.read(0, 40) == two.read(0, 40)).all()
    del one, cache
    assert len(model._prefill_bindings) == 1


def test_a_plan_says_when_prepared_weights_were_not_taken(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AUTOGLM_EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(model_module, "_SEEN_BYTES", 1)
    memory = iter([1_000_000_000, 2_000_000_000])
    monkeypatch.setattr(model_module, "anonymous_bytes", lambda: next(memory))
    model = Model(bundle, SessionOptions(threads=1, weights="prepared"))

    assert model.plan.weights == "packed"
    assert "1.0 GB of memory grew" in model.plan.weights_reason


def test_a_prefill_graph_that_is_none_is_refused(bundle: Bundle) -> None:
    parts = dict(bundle.manifest.parts)
    parts["prefill"] = dataclasses.replace(parts["prefill"], graph=parts["decoder"].graph)
    manifest = dataclasses.replace(bundle.manifest, parts=parts)
    model = Model(
        dataclasses.replace(bundle, manifest=manifest), SessionOptions(threads=1, prefill="integer")
    )

    with pytest.raises(BundleError, match=r"num_logits_to_keep is unknown|logits is unknown"):
        run(model, PREFILL_FROM_TOKENS)


def test_a_plan_is_a_plain_document(bundle: Bundle) -> None:
    plan = plan_model(bundle, SessionOptions(), machine())

    assert isinstance(plan, ModelPlan)
    assert all(isinstance(value, (str, int, bool)) for value in dataclasses.asdict(plan).values())


def test_threads_of_a_large_decoder_wait_awake_and_give_the_same_scores(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, dict[str, str]] = {}
    real = model_module.open_session

    def opened(graph: Path, options: SessionOptions, **given: Any) -> Any:
        asked[graph.stem] = dict(given.get("entries") or {})
        return real(graph, options, **given)

    monkeypatch.setattr(model_module, "open_session", opened)

    def scores() -> NDArray[np.float32]:
        model = Model(bundle, SessionOptions(threads=2))
        embeds, positions = model.embed(np.arange(5, 25)), np.tile(np.arange(20), (3, 1))
        return model.forward(embeds, positions, model.new_cache(20), keep=0)

    asleep = scores()
    assert "session.intra_op.allow_spinning" not in asked["decoder"]
    monkeypatch.setattr(model_module, "SPIN_FROM_BYTES", 0)
    awake = scores()

    assert asked["decoder"]["session.intra_op.allow_spinning"] == "1"
    assert asked["decoder"]["session.force_spinning_stop"] == "1"
    assert "session.intra_op.allow_spinning" not in asked["embedding"]
    np.testing.assert_array_equal(asleep, awake)
