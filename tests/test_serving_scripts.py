"""The serving benchmark and the soak: what they make of what they measured."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import grammar_cost
import serving
import soak_clients
import soak_server
from agent_step import SESSION
from server_process import Streamed, read_events

from autoglm_edge.embedded import pocket_path, sample_screenshot

USAGE = {"completion_tokens": 4, "prompt_tokens": 50, "prompt_tokens_details": {"cached_tokens": 30}}


def event(text: str | None = None, reason: str | None = None, **more: Any) -> str:
    choices = (
        [] if text is None and reason is None else [{"delta": {"content": text}, "finish_reason": reason}]
    )
    return "data: " + json.dumps({"choices": choices, **more})


def answer(*pieces: float, sent: float = 0.0) -> Streamed:
    return Streamed(200, sent, pieces, "text", "length", USAGE)


# --- streams


def test_a_stream_is_read_piece_by_piece() -> None:
    said = [event(""), event("a"), event("b"), event(None, "stop"), event(usage=USAGE)]
    lines = [": ping", "", *said, "data: [DONE]"]

    found = read_events(lines, 1.0)

    assert (found.text, found.finish_reason, found.usage, found.error) == ("ab", "stop", USAGE, "")
    assert len(found.pieces_s) == 2
    assert found.pieces_s[0] <= found.pieces_s[1]


def test_a_client_that_goes_away_reads_no_further() -> None:
    lines = iter([event("a"), event("b"), event("c")])

    assert read_events(lines, 0.0, most=2).text == "ab"
    assert next(lines) == event("c")


def test_an_error_in_a_stream_is_told() -> None:
    found = read_events([event("a"), 'data: {"error": {"message": "too late"}}'], 0.0)

    assert (found.error, found.finish_reason) == ("too late", None)


# --- the benchmark


def test_quantiles_are_values_that_were_measured() -> None:
    assert serving.quantile([3, 1, 2, 4], 0.5) == 2
    assert serving.quantile([3, 1, 2, 4], 0.95) == 4
    assert serving.quantile([7], 0.05) == 7
    assert math.isnan(serving.quantile([], 0.5))


def test_a_level_counts_waits_gaps_and_stalls_per_answer() -> None:
    level = serving.level_of(2, [answer(1.0, 1.1, 1.2, 1.3), answer(5.0, 5.1, 6.1, sent=3.0)], 4.0)

    assert level.answer_tokens_per_s == 2.0
    assert (level.ttft_p50_s, level.ttft_p95_s) == (1.0, 2.0)
    assert level.gap_p50_s == pytest.approx(0.1)
    assert level.longest_stall_s == pytest.approx(1.0), "not the time between two answers"
    assert (level.prompt_tokens, level.cached_tokens) == (100, 60)


@pytest.mark.parametrize(
    "bad",
    [
        Streamed(503, 0.0, (), "", None, {}, "loading"),
        Streamed(200, 0.0, (1.0,), "a", None, USAGE, "failed"),
        Streamed(200, 0.0, (), "", "length", USAGE),
        Streamed(200, 0.0, (1.0,), "a", "length", {}),
    ],
)
def test_a_failed_request_ends_the_benchmark_instead_of_raising_its_figures(bad: Streamed) -> None:
    with pytest.raises(SystemExit, match="failed with status"):
        serving.level_of(2, [answer(1.0, 1.1), bad], 4.0)


def test_requests_share_a_system_prompt_and_nothing_else() -> None:
    session = json.loads(SESSION.read_text(encoding="utf-8"))
    first, second = (serving.first_turns(session, client, 2) for client in (0, 1))
    requests = [serving.as_request(turn, [7, 9], 16) for turn in (*first, *second)]

    assert len({json.dumps(request["messages"][0]) for request in requests}) == 1
    pictures = [request["messages"][1]["content"][0]["image_url"]["url"] for request in requests]
    assert len(set(pictures)) == 4
    assert all(url.startswith("data:image/png;base64,") for url in pictures)
    assert requests[0]["logit_bias"] == {"7": -100, "9": -100}
    assert requests[0]["max_tokens"] == 16
    json.dumps(requests)


def test_the_table_has_a_row_per_level_and_the_second_steps() -> None:
    level = asdict(serving.level_of(4, [answer(1.0, 1.25)], 2.0))
    document = {"levels": [level], "second_step": [{**level, "warm": False}, {**level, "warm": True}]}

    lines = serving.table(document).splitlines()

    assert lines[2] == "| 4 | 1 | **2.0** | 1.00 | 1.00 | 250 | 250 | 250 |"
    assert "second step, cold: first token after 1.00 s, 30 of 50 tokens cached" in lines
    assert len({line.count("|") for line in lines[:3]}) == 1


# --- the soak


def held_to(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def test_growth_is_that_of_the_line_after_the_warm_up() -> None:
    flat = [(float(t), 200.0 + (-1) ** t) for t in range(100)]
    steep = [(float(t), 100.0 + 5 * t if t < 20 else 200.0 + 0.5 * (t - 20)) for t in range(100)]

    assert abs(soak_server.growth_mb(flat, 20)) < 0.5
    assert soak_server.growth_mb(steep, 20) == pytest.approx(0.5 * 79)
    assert soak_server.growth_mb(steep, 0) > 60, "the warm-up counts if it is told to"
    assert soak_server.growth_mb(steep[:1], 0) == 0


@pytest.mark.parametrize(
    ("text", "held", "said"),
    [
        ('{"a": 1}', {"type": "json_object"}, ""),
        ("[1]", {"type": "json_object"}, "no object"),
        ('{"a": ', {"type": "json_object"}, "no JSON"),
        ("7", held_to({"const": 7}), ""),
        ("8", held_to({"const": 7}), "not 7"),
        ('{"action": "Tap", "element": [1, 999]}', held_to(soak_clients.ACTION), ""),
        ('{"action": "Tap", "element": [1, 1000]}', held_to(soak_clients.ACTION), "no action"),
        ('{"action": "Tap"}', held_to(soak_clients.ACTION), "no action"),
    ],
)
def test_the_soak_notices_an_answer_that_is_not_what_was_asked_for(
    text: str, held: dict[str, Any], said: str
) -> None:
    assert soak_clients.json_fault(text, held).startswith(said)
    assert bool(soak_clients.json_fault(text, held)) == bool(said)


def test_the_verdict_names_faults_growth_and_a_server_that_answered_nothing() -> None:
    good = {"outcomes": {"stream 200": 5}, "faults": [], "growth_mb": 1.0, "max_growth_mb": 16.0}

    assert soak_server.verdict(good) == []
    assert "grew by 17.0 MB" in soak_server.verdict(good | {"growth_mb": 17.0})[0]
    assert (
        "2 faults: x"
        in soak_server.verdict(good | {"outcomes": {"stream 200": 1, "fault": 2}, "faults": ["x", "y"]})[0]
    )
    assert "no request was answered" in soak_server.verdict(good | {"outcomes": {"bad 400": 3}})[0]


def test_the_ledger_takes_refusals_and_reports_faults() -> None:
    ledger = soak_clients.Ledger()

    assert ledger.status("stream", 200)
    assert not ledger.status("bad", 400)
    assert not ledger.status("stream", 500, "oh")

    assert ledger.done == {"stream 200": 1, "bad 400": 1, "fault": 1}
    assert ledger.faults == ["stream: status 500 oh"]


def test_pictures_of_the_soak_are_data_uris() -> None:
    part = soak_clients._picture_part(sample_screenshot(), random.Random(1))

    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).mode == "RGB"


# --- what grammars cost


def test_the_cost_of_a_grammar_is_measured_beside_free_sampling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llguidance")
    output = tmp_path / "cost.json"

    assert grammar_cost.main([str(pocket_path()), "--repeat", "1", "-o", str(output)]) == 0

    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(output.read_text(encoding="utf-8"))
    assert {(cost["schema"], cost["sampling"]) for cost in document["costs"]} == {
        (schema, sampling) for schema in grammar_cost.SCHEMAS for sampling in grammar_cost.SETTINGS
    }
    assert all(cost["held_us"] > 0 < cost["free_us"] for cost in document["costs"])
