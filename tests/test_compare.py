"""The comparison with peers, the replayed session and the page of figures: everything but the engines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import agent_plot  # noqa: E402
import agent_step  # noqa: E402
import compare  # noqa: E402
import compare_plot  # noqa: E402
import compare_report  # noqa: E402
import lookup  # noqa: E402
import peer_gguf  # noqa: E402
import peer_job  # noqa: E402
import report  # noqa: E402
import report_pieces  # noqa: E402
import report_tables  # noqa: E402
import report_targets  # noqa: E402
from compare_models import layer_weights, step_weights  # noqa: E402

GEOMETRY = {
    **{"hidden": 512, "layers": 2, "heads": 4, "kv_heads": 2},
    **{"head_dim": 128, "intermediate": 864, "vocab": 1024},
}
NINE_B = {
    **{"hidden": 4096, "layers": 40, "heads": 32, "kv_heads": 2},
    **{"head_dim": 128, "intermediate": 13696, "vocab": 151552},
}


# --- GGUF


@pytest.mark.parametrize("form", peer_gguf.FORMATS)
def test_every_engine_reads_the_same_number_of_weights(form: str) -> None:
    assert peer_gguf.counts(NINE_B, form)["weights"] == step_weights(NINE_B)
    assert peer_gguf.counts(GEOMETRY, form)["weights"] == step_weights(GEOMETRY)


def test_the_weights_of_the_9b_are_those_of_its_checkpoint() -> None:
    from make_checkpoint import SHAPES, tensor_shapes

    shapes = tensor_shapes(SHAPES["autoglm-9b"])
    layers = [shape for name, shape in shapes.items() if ".layers." in name and len(shape) == 2]

    assert layer_weights(NINE_B) == sum(rows * columns for rows, columns in layers)


@pytest.mark.parametrize("form, bits", [("q4_0", 4.5), ("q4_k", 4.5), ("q8_0", 8.5)])
def test_bytes_of_a_file_follow_its_format(form: str, bits: float) -> None:
    head = GEOMETRY["vocab"] * GEOMETRY["hidden"]
    head_bytes = head * (34 / 32 if form == "q8_0" else 210 / 256)

    counts = peer_gguf.counts(GEOMETRY, form)

    assert counts["read_bytes"] == layer_weights(GEOMETRY) * bits / 8 + head_bytes


def dequantize(form: str, blocks: np.ndarray) -> np.ndarray:
    """Blocks (n, bytes) of the plain formats to weights."""
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if form == "q8_0":
        return scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return scale * (codes.astype(np.float32) - 8)


@pytest.mark.parametrize("form", ["q4_0", "q8_0"])
def test_random_blocks_are_finite_small_and_all_different(form: str) -> None:
    columns = 4096
    rows = peer_gguf.random_blocks(form, 64, columns, np.random.default_rng(0))
    weights = dequantize(form, rows.reshape(-1, peer_gguf.BLOCK[form][1]))

    assert np.isfinite(weights).all()
    assert 0.3 < weights.std() * columns**0.5 < 0.7
    assert len({row.tobytes() for row in rows}) == len(rows)


@pytest.mark.parametrize("form", peer_gguf.FORMATS)
def test_a_file_can_be_read_again(form: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    peer_gguf.write(path, GEOMETRY, form)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    assert list(tensors["blk.1.ffn_up.weight"].shape) == [512, 2 * 864]
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == ("Q8_0" if form == "q8_0" else "Q4_0")
    assert tensors["blk.0.attn_q.bias"].data.dtype == np.float32


# --- the job


class Fake:
    """An engine that notes what it is fed."""

    def __init__(self, job: peer_job.Job) -> None:
        self.facts = {"version": "fake 1"}
        self.log: list[int] = []
        self.longest = job.longest
        self.used = 0

    def reset(self) -> None:
        self.used = 0
        self.log.append(0)

    def feed(self, ids: Sequence[int]) -> None:
        assert all(0 <= token < GEOMETRY["vocab"] for token in ids)
        self.used += len(ids)
        assert self.used <= self.longest
        self.log.append(len(ids))


def job(**changes: Any) -> peer_job.Job:
    values: dict[str, Any] = dict(model="m", threads=1, geometry={**GEOMETRY, "vocab": 4096}, prefill=(40, 7))
    return peer_job.Job(**{**values, **changes})


def test_every_prefill_starts_empty_and_steps_follow_their_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GEOMETRY, "vocab", 4096)
    made: list[Fake] = []

    def load(given: peer_job.Job) -> Fake:
        made.append(Fake(given))
        return made[-1]

    found = peer_job.measure(job(repeat=2, decode_at=9, decode_steps=3), load)

    assert made[0].log == [0, peer_job.WARM_TOKENS, 1, 0, 40, 0, 40, 0, 7, 0, 7, 0, 9, 1, 1, 1]
    assert {length: len(times) for length, times in found["prefill_s"].items()} == {"40": 2, "7": 2}
    assert len(found["step_s"]) == 3
    assert found["version"] == "fake 1"


def test_a_step_may_be_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GEOMETRY, "vocab", 4096)
    made: list[Fake] = []

    def load(given: peer_job.Job) -> Fake:
        made.append(Fake(given))
        return made[-1]

    peer_job.measure(job(prefill=(), decode_at=0, decode_steps=2), load)

    assert made[0].log[-3:] == [0, 1, 1]


def test_a_job_survives_its_own_json() -> None:
    import dataclasses

    assert peer_job.Job.from_json(json.dumps(dataclasses.asdict(job()))) == job()


def engine(code: str, tmp_path: Path, python: str = sys.executable) -> compare.Engine:
    worker = tmp_path / "worker.py"
    worker.write_text(code, encoding="utf-8")
    return compare.Engine("x", str(worker), python, lambda: None)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    "code, said",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "ended by SIGILL"),
        ("raise SystemExit(4)", "ended with 4"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("print('no JSON')", "said nothing"),
        ("print(3)", "said nothing"),
        ("import time; time.sleep(60)", "took longer"),
    ],
)
def test_an_engine_that_fails_is_reported_as_such(code: str, said: str, tmp_path: Path) -> None:
    timeout = 0.5 if "sleep" in code else 60

    assert said in compare.run(engine(code, tmp_path), job(), timeout)["error"]


def test_an_interpreter_that_is_not_there_is_reported_as_such(tmp_path: Path) -> None:
    assert "cannot be started" in compare.run(engine("", tmp_path, "/nowhere/python"), job())["error"]


# --- the report


def peer(prefill: float, step: float) -> dict[str, Any]:
    return {
        "load_s": 1.0,
        "prefill_s": {"512": [prefill, prefill]},
        "step_s": [step, step, 9.0],
        "memory": {"anon_bytes": 5},
        "version": "1",
    }


@pytest.fixture
def document() -> dict[str, Any]:
    rounds = [
        {"ours INT4": peer(2.0, 0.1), "llama.cpp Q4_0": peer(4.0, 0.2), "broken": {"error": "a | b\nc"}},
        {"ours INT4": peer(6.0, 0.5), "llama.cpp Q4_0": peer(6.0, 0.5), "broken": {"error": "a | b\nc"}},
        {"ours INT4": {"error": "once"}, "llama.cpp Q4_0": peer(9.0, 0.9), "broken": {"error": "a | b\nc"}},
    ]
    limits = [{"read_bytes_per_s": 1e9, "int8_ops_per_s": 1e12}] * 3
    models = {name: {"weights": 10, "read_bytes": 10**8} for name in rounds[0]}
    machine = {"processor": "CPU", "cores": 2, "units": ["avx2"], "onnxruntime": "1.31.1"}
    return {
        "date": "2026-01-01",
        "machine": machine,
        "threads": 2,
        "geometry": NINE_B,
        "layer_weights": 10**9,
        "prefill": [512],
        "rounds": 3,
        "reference": "llama.cpp Q4_0",
        "limits": {**limits[0], "fp32_ops_per_s": 1e11, "bf16_ops_per_s": None},
        "engines": compare_report.summarize(rounds, limits, models, 10**9, "llama.cpp Q4_0"),
    }


def test_ratios_are_those_of_single_rounds(document: dict[str, Any]) -> None:
    ours = document["engines"]["ours INT4"]

    assert ours["prefill"]["512"]["by_reference"] == pytest.approx((4 / 2 + 6 / 6) / 2)
    assert ours["prefill"]["512"]["of_int8_peak"] == pytest.approx((1.024 / 2 + 1.024 / 6) / 2)
    assert ours["step"]["by_reference"] == pytest.approx((2 + 1) / 2)
    assert ours["step"]["of_bandwidth"] == pytest.approx((1.0 + 0.2) / 2)
    assert document["engines"]["llama.cpp Q4_0"]["prefill"]["512"]["by_reference"] == 1
    assert ours["error"] == "once"
    assert ours["rounds"] == 2


def test_a_failure_stands_in_the_table_with_its_reason(document: dict[str, Any]) -> None:
    table = compare_report.markdown(document).splitlines()
    widths = {line.count("|") for line in table}

    assert len(widths) == 1
    assert any("**failed**: a / b c" in line for line in table)
    assert any("failed in some rounds: once" in line for line in table)


def test_the_plot_is_well_formed_and_names_every_engine(document: dict[str, Any]) -> None:
    document["engines"]["<a&b>"] = {"error": "x"}
    picture = compare_plot.plot([*document["engines"]], compare_plot.panels(document), "<caption>")
    words = [element.text for element in ElementTree.fromstring(picture).iter() if element.text]

    assert {"ours INT4", "<a&b>", "<caption>"} <= set(words)
    assert words.count("failed") == 2 * 2  # two engines, two panels


def test_the_longest_bar_and_the_limit_stay_inside_their_panel(document: dict[str, Any]) -> None:
    picture = ElementTree.fromstring(compare_plot.plot(["ours INT4"], compare_plot.panels(document), ""))
    width = float(picture.attrib["width"])

    for element in picture.iter():
        if element.tag.endswith("rect"):
            assert float(element.attrib.get("x", 0)) + float(element.attrib["width"]) <= width
        if element.tag.endswith("line"):
            assert float(element.attrib["x2"]) <= width


def test_written_files_are_the_document_that_is_printed(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare.write(document, tmp_path / "new" / "compare.json")

    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "new" / "compare.json").read_text(encoding="utf-8"))
    ElementTree.parse(tmp_path / "new" / "compare.svg")


# --- the agent's step


def session() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(agent_step.SESSION.read_text(encoding="utf-8"))
    return document


def test_each_conversation_has_one_picture_in_its_last_turn() -> None:
    found = list(agent_step.conversations(session()))

    assert len(found) == len(session()["steps"]) >= 4
    for number, messages in enumerate(found):
        pictures = [
            (place, part["image"])
            for place, message in enumerate(messages)
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image"
        ]
        assert [place for place, _ in pictures] == [len(messages) - 1]
        assert len(messages) == 2 + 2 * number
    assert len({messages[-1]["content"][0]["image"].tobytes() for messages in found}) == len(found)


def test_recorded_answers_are_actions_of_the_client() -> None:
    from autoglm_edge.runtime.actions import parse_action

    for step in session()["steps"]:
        assert parse_action(f"<think>{step['thinking']}</think><answer>{step['action']}") is not None


def test_shared_tokens_end_where_prompts_part_or_at_a_picture() -> None:
    def shared(before: list[int], ids: list[int]) -> int:
        return agent_step.shared_length(np.array(before), np.array(ids), 9)

    assert shared([], [1, 2]) == 0
    assert shared([1, 2, 3], [1, 2, 4]) == 2
    assert shared([1, 9, 9, 3], [1, 9, 9, 3]) == 1
    assert shared([1, 2], [1, 2, 3]) == 2


def test_a_replay_reuses_what_prompts_share_and_decodes_as_many_tokens_as_asked(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = bundle_of(checkpoint_of("tiny", dtype="float32"), "int4")
    # Long enough that every prompt is read by the same graph; what another graph computed is not reused.
    short = {**session(), "system": ["Operate the phone. " * 60]}
    path = tmp_path / "session.json"
    path.write_text(json.dumps(short), encoding="utf-8")
    options = SimpleNamespace(session=path, steps=3, cold_steps=1, tokens=5, threads=1)

    warm = agent_step.measure(bundle, 32, True, options)  # type: ignore[arg-type]
    cold = agent_step.measure(bundle, 32, False, options)  # type: ignore[arg-type]

    assert [step["number"] for step in warm["steps"]] == [1, 2, 3]
    assert [step["number"] for step in cold["steps"]] == [3]
    assert all(step["answer_tokens"] == 5 for step in warm["steps"] + cold["steps"])
    for step in warm["steps"][1:]:
        assert 0 <= step["shared_tokens"] - step["reused_tokens"] < report_targets.REUSE_BLOCK
        assert step["shared_tokens"] > 0
    assert cold["steps"][0]["reused_tokens"] == 0
    assert cold["steps"][0]["prompt_tokens"] == warm["steps"][2]["prompt_tokens"]
    table = agent_step.table([warm, cold]).splitlines()
    assert len({line.count("|") for line in table}) == 1
    ElementTree.fromstring(agent_plot.plot({"runs": [warm, cold], "answer_tokens": 5, "date": "<today>"}))


def test_a_document_does_not_tell_where_it_was_made(tmp_path: Path) -> None:
    made = {"engines": {"ours": {"plan": f"no room in {tmp_path}/cache"}}, "rounds": 2}

    assert compare.without(made, tmp_path) == {
        "engines": {"ours": {"plan": "no room in WORKSPACE/cache"}},
        "rounds": 2,
    }


# --- drafts


def test_recorded_answers_are_decoded_as_they_are_with_and_without_drafts(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    found = lookup.measure(bundle_of(checkpoint_of("tiny", dtype="float32"), "int4"), 1, 1)

    assert len(found["steps"]) == len(session()["steps"])
    for step in found["steps"]:
        assert step["accepted"] <= step["drafted"]
        assert step["runs"] == step["tokens"] - 1 - step["accepted"]
    assert len({line.count("|") for line in lookup.table([found]).splitlines()}) == 1


def test_a_drafter_that_is_never_wrong_gains_where_the_prompt_has_the_answer_and_nowhere_else() -> None:
    prompt = np.arange(100)

    def free(tokens: int) -> float:
        return 1.0

    def dear(tokens: int) -> float:
        return float(tokens)

    known, new = list(range(20, 40)), list(range(200, 220))
    # Three runs until two tokens stand together that the prompt has so; one of 15 and the next; the rest.
    assert lookup.bound([(prompt, [98, 99, *known])], free) == pytest.approx(21 / 5)
    assert lookup.bound([(prompt, [98, 99, *known])], dear) == 1
    assert lookup.bound([(prompt, new)], free) == 1


# --- the page


def test_the_page_has_every_section_and_keeps_its_text(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"), encoding="utf-8")

    report.write_page(ROOT / "benchmarks" / "results", page, tmp_path / "plots")
    once = page.read_text(encoding="utf-8")
    report.write_page(ROOT / "benchmarks" / "results", page, tmp_path / "plots")

    assert page.read_text(encoding="utf-8") == once
    assert once == (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"), (
        "run python benchmarks/report.py --tables"
    )


def test_without_figures_every_target_says_so_and_none_is_reached() -> None:
    rows = report_targets.targets({}).splitlines()[2:]

    assert len(rows) >= 10
    assert all(report_pieces.MISSING in row and "yes" not in row for row in rows)
    for text in report_tables.sections({}, {}).values():
        assert text


def test_a_target_is_reached_or_not_by_its_figure(document: dict[str, Any]) -> None:
    text = report_targets.targets({"compare": document})

    assert "| ≥ llama.cpp Q4_0 | 1.50 × | yes |" in text
    assert "| ≥ 75 % of weight bytes ÷ read bandwidth | 60% | **no** |" in text
    assert "| ≥ 2 × llama.cpp Q4_0 | 1.50 ×, 34% of the machine's int8 peak | **no** |" in text


@pytest.mark.parametrize("page", ["", "<!-- end a --><!-- begin a -->", "<!-- begin a -->" * 2])
def test_a_page_without_its_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="markers"):
        report_tables.insert(page, {"a": "text"})
