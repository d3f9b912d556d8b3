"""Measuring: memory by phase, limits of the machine, what a bundle costs. No test asserts a time."""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_edge.errors import DeviceError, RequestError
from autoglm_edge.measure import memory as memory_module
from autoglm_edge.measure import speed as speed_module
from autoglm_edge.measure.bandwidth import Limits, measure_limits, read_bandwidth
from autoglm_edge.measure.figures import Times, repeat, rounded
from autoglm_edge.measure.graphs import GraphSequence
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.measure.memory import Memory, MemorySampler, read_memory, watch
from autoglm_edge.measure.plan import BenchPlan
from autoglm_edge.measure.profile import profile, read_trace
from autoglm_edge.measure.screen import screenshot
from autoglm_edge.measure.speed import bench, layer_weights
from autoglm_edge.measure.tiny_graph import one_node
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.session import SessionOptions

LIMITS = Limits(threads=1, read_bytes_per_s=1e10, fp32_ops_per_s=1e11, int8_ops_per_s=4e11)
HAS_PROC = Path("/proc/self/status").exists()
needs_proc = pytest.mark.skipif(not HAS_PROC, reason="there is no /proc here")


# --- memory


def fresh_pages(size: int) -> np.ndarray:
    """Memory that nobody had before; what the allocator kept from earlier tests would not show as growth."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held = np.frombuffer(pages, np.uint8)
    held[:] = 1
    return held


@needs_proc
def test_memory_that_is_held_in_a_phase_is_its_peak_and_not_that_of_another() -> None:
    size = 64 << 20
    with MemorySampler(interval=0.001) as memory:
        with memory.phase("small"):
            pass
        with memory.phase("large"):
            held = fresh_pages(size)
            memory.sample()
        del held
        with memory.phase("after"):
            pass

    peaks = {name: memory.peaks[name].anon_bytes or 0 for name in ("small", "large", "after")}
    assert peaks["large"] - peaks["small"] >= 0.9 * size
    assert peaks["large"] - peaks["after"] >= 0.9 * size
    assert memory.peak.anon_bytes == max(value.anon_bytes or 0 for value in memory.peaks.values())


@needs_proc
def test_a_short_peak_is_seen_by_the_thread_alone() -> None:
    with MemorySampler(interval=0.001) as memory, memory.phase("work"):
        before = memory.sample().anon_bytes or 0
        held = fresh_pages(32 << 20)
        deadline = time.monotonic() + 10
        while (memory.peaks["work"].anon_bytes or 0) < before + (24 << 20) and time.monotonic() < deadline:
            time.sleep(0.002)
        del held

    assert (memory.peaks["work"].anon_bytes or 0) >= before + (24 << 20)


def test_the_sampler_ends_with_its_block_also_after_an_error() -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), MemorySampler() as memory, memory.phase("fails"):
        raise KeyError

    assert threading.active_count() == before


def test_a_phase_inside_a_phase_gives_back_to_the_outer_one() -> None:
    with MemorySampler() as memory, memory.phase("outer"):
        with memory.phase("inner"):
            pass
        memory.peaks.clear()
        memory.sample()

    assert set(memory.peaks) == ({"outer"} if read_memory().known else set())


@needs_proc
def test_a_process_that_is_gone_is_not_known_and_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()

    assert not read_memory(process.pid).known
    with MemorySampler(process.pid) as memory, memory.phase("gone"):
        pass
    assert memory.peaks == {}
    assert memory.peak == Memory()


def test_without_proc_only_the_largest_resident_size_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(memory_module.Path, "read_text", refuse)
    here, other = read_memory(), read_memory(1)

    assert here.anon_bytes is None
    assert here.swap_bytes is None
    assert here.rss_bytes is None or here.rss_bytes > 1 << 20
    assert not other.known


def test_a_first_load_that_prepares_weights_is_told_apart_from_loading(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = speed_module.plan_model
    monkeypatch.setattr(
        speed_module, "plan_model", lambda *given: dataclasses.replace(plan(*given), prepare=True)
    )
    small = BenchPlan(prefill=(4,), decode_at=(), images=(), together=(), repeat=1)

    document = json.loads(bench(tiny, small, options=SessionOptions("cpu", 1), limits=LIMITS).to_json())

    assert len(document["prepare"]["seconds"]) == 1
    assert len(document["load"]["seconds"]) == 1


def test_peaks_keep_what_only_one_side_knows() -> None:
    both = Memory(rss_bytes=5, anon_bytes=1).peak(Memory(rss_bytes=3, swap_bytes=2))

    assert both == Memory(rss_bytes=5, anon_bytes=1, swap_bytes=2)


@pytest.mark.parametrize("interval", [0, -1, 2, math.nan])
def test_an_interval_out_of_range_is_refused(interval: float) -> None:
    with pytest.raises(RequestError, match="interval"):
        MemorySampler(interval=interval)


@needs_proc
def test_a_watched_command_gives_output_status_and_peak() -> None:
    code = "import time; x = bytearray(48 << 20); time.sleep(0.3); print(len(x)); raise SystemExit(3)"
    done = watch([sys.executable, "-c", code])

    assert done.returncode == 3
    assert done.stdout.strip() == str(48 << 20)
    assert (done.peak.anon_bytes or 0) >= 48 << 20


def test_a_command_that_does_not_exist_is_one_sentence() -> None:
    with pytest.raises(RequestError, match="cannot be started"):
        watch(["/nowhere/at/all"])


# --- figures


def test_median_mean_and_spread_of_repetitions() -> None:
    times = Times((1.0, 2.0, 9.0, 2.0, 1.0))

    assert (times.median_s, times.mean_s) == (2.0, 3.0)
    assert times.spread == pytest.approx(0.5)
    assert Times((2.0,)).spread == 0


@pytest.mark.parametrize("seconds", [(), (math.nan,), (1.0, -1.0), (math.inf,)])
def test_times_that_are_none_are_refused(seconds: tuple[float, ...]) -> None:
    with pytest.raises(RequestError):
        Times(seconds)


def test_what_comes_before_a_repetition_is_run_each_time() -> None:
    log: list[str] = []
    times = repeat(lambda: log.append("work"), 3, before=lambda: log.append("before"))

    assert log == ["before", "work"] * 3
    assert len(times.seconds) == 3


@given(st.recursive(st.floats() | st.integers() | st.text(), st.lists))
def test_a_rounded_document_is_json_whatever_it_holds(document: object) -> None:
    json.loads(json.dumps(rounded({"value": document}), allow_nan=False))


# --- limits


def test_graphs_written_by_hand_compute_the_product() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (3, 40), np.uint8)
    weight, scales = rng.integers(-127, 128, (40, 5), np.int8), rng.uniform(0.1, 1, 5).astype(np.float32)
    constants = {"w": weight, "one": np.float32(1), "s": scales, "z": np.uint8(128)}
    graph = one_node(
        "MatMulIntegerToFloat",
        {"x": ("uint8", ["M", 40])},
        ["x", "w", "one", "s", "z"],
        {name: np.asarray(value) for name, value in constants.items()},
        ("float32", ["M", 5]),
        domain="com.microsoft",
    )

    found = ort.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]

    wanted = ((x.astype(np.int64) - 128) @ weight.astype(np.int64)) * scales
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_graphs_written_by_hand_pass_the_onnx_checker() -> None:
    onnx = pytest.importorskip("onnx")
    weight = np.ones((300, 7), np.float32)
    graph = one_node(
        "MatMul", {"x": ("float32", ["M", 300])}, ["x", "w"], {"w": weight}, ("float32", ["M", 7])
    )
    model = onnx.load_from_string(graph)

    onnx.checker.check_model(model, full_check=True)
    assert [list(tensor.dims) for tensor in model.graph.initializer] == [[300, 7]]


def test_limits_are_positive_and_say_their_threads() -> None:
    limits = measure_limits(1, buffer_bytes=1 << 20, rows=8, side=64, repeats=1)

    assert limits.threads == 1
    assert all(value > 0 for value in limits.to_json().values())


def test_a_buffer_that_does_not_fit_is_an_error_of_ours() -> None:
    with pytest.raises(DeviceError, match="not enough memory"):
        read_bandwidth(1, 1 << 60)


def test_limits_that_are_none_are_refused() -> None:
    with pytest.raises(RequestError):
        dataclasses.replace(LIMITS, int8_ops_per_s=0)


def test_the_machine_names_no_host_and_no_path() -> None:
    import platform

    document = this_machine().to_json()
    text = json.dumps(document)

    assert document["cores"] >= 1
    assert "/home" not in text
    assert "/root" not in text
    if len(platform.node()) > 4:
        assert platform.node() not in text


# --- plan


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefill": (0,)},
        {"prefill": (128, 128)},
        {"prefill": ("128",)},
        {"prefill": [128]},
        {"decode_at": (-1,)},
        {"images": (1 << 40,)},
        {"images": (True,)},
        {"steps": 0},
        {"repeat": 0},
        {"repeat": 1.5},
        {"together": (1,)},
        {"together": (100,)},
        {"prefill": (), "decode_at": (), "images": (), "together": ()},
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        BenchPlan(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny(checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]) -> Bundle:
    return Bundle.open(bundle_of(checkpoint_of("tiny", dtype="float32"), "int4"))


def test_the_part_of_a_plan_that_a_bundle_can_do(tiny: Bundle) -> None:
    manifest = tiny.manifest
    context, most = manifest.geometry.context_length, manifest.image.max_tokens
    plan = BenchPlan(prefill=(8, context, context + 1), decode_at=(0, context), images=(most + 1,))

    fitting = plan.fitting(manifest)

    assert fitting.prefill == (8, context)
    assert fitting.decode_at == (0,)
    assert fitting.images == (most,)
    assert len(plan.misfits(manifest)) == 3
    assert fitting.misfits(manifest) == []
    assert fitting.longest == context


# --- the whole


def test_a_bench_reports_every_size_and_phase(tiny: Bundle) -> None:
    plan = BenchPlan(
        prefill=(5, 600), decode_at=(0, 700), images=(16, 64), together=(2, 3), steps=3, repeat=2
    )
    said: list[str] = []

    report = bench(tiny, plan, options=SessionOptions("cpu", 1), limits=LIMITS, say=said.append)

    document = json.loads(report.to_json())
    assert document["fingerprint"] == tiny.fingerprint
    assert document["recipe"] == "int4"
    assert len(document["load"]["seconds"]) == 2
    assert [row["tokens"] for row in document["prefill"]] == [5, 600]
    assert [row["context"] for row in document["decode"]] == [0, 700]
    assert all(len(row["seconds"]) == 6 for row in document["decode"])
    assert [row["answers"] for row in document["together"]] == [2, 3]
    assert all(len(row["seconds"]) == 6 for row in document["together"])
    assert document["together"][1]["tokens_per_s"] == pytest.approx(
        3 / document["together"][1]["median_s"], 1e-4
    )
    assert [row["budget"] for row in document["images"]] == [16, 64]
    assert all(
        row["tokens"] <= row["budget"] and row["patches"] == 4 * row["tokens"] for row in document["images"]
    )
    first = document["decode"][0]
    read = tiny.manifest.parts["decoder"].weight_bytes / first["median_s"] / LIMITS.read_bytes_per_s
    assert first["of_bandwidth"] == pytest.approx(read, rel=1e-4)
    work = 2 * (layer_weights(tiny) or 0) * 600 / document["prefill"][1]["median_s"]
    assert document["prefill"][1]["of_int8_peak"] == pytest.approx(work / LIMITS.int8_ops_per_s, rel=1e-4)
    assert document["choices"]["threads"] == 1
    if HAS_PROC:
        wanted = {
            "load",
            "first prompt",
            "prefill 5",
            "prefill 600",
            "decode at 0",
            "decode at 700",
            "3 answers",
            "load vision",
            "steady",
        }
        assert wanted < set(document["memory"])
    assert any("600" in text for text in said)
    for word in ("prefill 600", "decode at 700", "3 answers at 1024", "of bandwidth", "anonymous"):
        assert word in report.to_table()


def test_a_plan_that_does_not_fit_the_bundle_is_refused_before_anything_is_loaded(tiny: Bundle) -> None:
    plan = BenchPlan(prefill=(tiny.manifest.geometry.context_length + 1,))

    with pytest.raises(RequestError, match="positions for"):
        bench(tiny, plan, limits=LIMITS)


def test_a_bench_may_leave_kinds_out(tiny: Bundle) -> None:
    plan = BenchPlan(prefill=(), decode_at=(4,), images=(), together=(), steps=2, repeat=1)

    report = bench(tiny, plan, options=SessionOptions("cpu", 1), limits=LIMITS)

    assert report.load_vision is None
    assert (report.prefill, report.images, report.together) == ((), (), ())
    assert json.loads(report.to_json())["load_vision"] is None


def test_the_weights_of_all_layers_are_those_of_the_checkpoint(
    tiny: Bundle, checkpoint_of: Callable[..., Path]
) -> None:
    from make_checkpoint import SHAPES, tensor_shapes

    shapes = tensor_shapes(SHAPES["tiny"])
    wanted = sum(math.prod(shape) for name, shape in shapes.items() if ".layers." in name and len(shape) == 2)

    assert layer_weights(tiny) == wanted


@pytest.mark.parametrize("text", ["[]", "{}", '{"intermediate_size": "many"}', '{"text_config": 3}', "{"])
def test_a_config_that_does_not_tell_gives_no_share(
    tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    monkeypatch.setattr(Bundle, "file", lambda self, name: config)

    assert layer_weights(tiny) is None


def test_a_prompt_in_two_pieces_leaves_the_cache_of_one_in_one_piece(tiny: Bundle) -> None:
    # The last token of a piece goes through the decoder, so all must, to be the same.
    model = Model(tiny, SessionOptions("cpu", 1, prefill="decoder"))
    ids = np.random.default_rng(0).integers(0, 400, 530)
    caches = []
    for prompt in ([ids], [ids[:300], ids[300:]]):
        sequence = GraphSequence(model, 540)
        for part in prompt:
            sequence.feed(part)
        caches.append(sequence.cache.read(0, 530))

    assert sequence.cache.length == 530
    np.testing.assert_allclose(caches[0], caches[1], atol=1e-4)


def test_no_tokens_are_refused(tiny: Bundle) -> None:
    sequence = GraphSequence(Model(tiny, SessionOptions("cpu", 1)), 8)

    with pytest.raises(RequestError, match="one token at least"):
        sequence.feed([])


def test_a_filled_cache_has_its_length_and_no_two_tokens_alike(tiny: Bundle) -> None:
    sequence = GraphSequence(Model(tiny, SessionOptions("cpu", 1)), 1100)
    sequence.fill(1050, np.random.default_rng(0))
    rows = sequence.cache.read(0, 1050)

    assert sequence.cache.length == 1050
    assert np.isfinite(rows).all()
    assert len(np.unique(rows[0, 0, 0, :, 0])) > 1000


def test_screens_of_other_seeds_differ_and_those_of_the_same_do_not() -> None:
    first, again, other = screenshot((90, 200), 1), screenshot((90, 200), 1), screenshot((90, 200), 2)

    assert first.size == (90, 200)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


# --- where the time goes


def trace_of(runs: list[list[tuple[str, int]]]) -> bytes:
    """A trace as onnxruntime writes it: runs of 1 ms apart, each with operators and their microseconds."""
    events: list[dict[str, object]] = [
        {"ph": "X", "cat": "Session", "name": "session_initialization", "ts": 0, "dur": 10, "args": {}}
    ]
    for number, operators in enumerate(runs):
        start = 1000 * (number + 1)
        for place, (name, duration) in enumerate(operators):
            events.append(
                {
                    "ph": "X",
                    "cat": "Node",
                    "name": f"node_{place}_kernel_time",
                    "ts": start + place,
                    "dur": duration,
                    "args": {"op_name": name},
                }
            )
        # A run is noted when it ends, behind its operators.
        events.append({"ph": "X", "cat": "Session", "name": "model_run", "ts": start, "dur": 900, "args": {}})
    return json.dumps(events).encode()


def test_a_trace_counts_the_second_half_of_the_runs() -> None:
    found = read_trace(trace_of([[("Add", 100)], [("Add", 7), ("Mul", 5), ("Add", 1)]]))

    assert found == {"Add": 8e-6, "Mul": 5e-6}


def test_a_session_that_never_ran_adds_nothing() -> None:
    assert read_trace(trace_of([])) == {}


def test_a_profile_tells_operators_of_prompts_steps_and_pictures(tiny: Bundle) -> None:
    prompt, step, picture = profile(
        tiny, prompts=(40,), decode_at=(8,), images=(64,), options=SessionOptions(threads=1)
    )

    assert [prompt.name, step.name, picture.name] == ["prefill 40", "decode at 8", "image of at most 64"]
    for one in (prompt, step, picture):
        assert one.seconds > 0 and one.operators
        assert 0 <= one.outside_s < one.seconds
        assert sum(one.shares.values()) == pytest.approx(1)
    assert "GroupQueryAttention" in prompt.operators and "GroupQueryAttention" in step.operators
    assert "GroupQueryAttention" not in picture.operators


def test_traces_that_have_no_folder_are_refused() -> None:
    with pytest.raises(RequestError, match="traces is 'here', must be the path of a folder"):
        SessionOptions(traces="here")  # type: ignore[arg-type]
