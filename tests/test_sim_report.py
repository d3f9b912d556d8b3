"""The report of a simulation: keys, lines, picture and page; nothing that a stranger wrote gets in."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from simulated_traces import MB, budget, enforced, result, sample, trace, whole_run

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.child_result import ParityResult
from autoglm_edge.android_sim.device import find_device, read_device
from autoglm_edge.android_sim.forecast import foretell
from autoglm_edge.android_sim.need import Question
from autoglm_edge.android_sim.planned import Planned
from autoglm_edge.android_sim.projection import project
from autoglm_edge.android_sim.report.canvas import PngCanvas, SvgCanvas
from autoglm_edge.android_sim.report.matrix import Matrix
from autoglm_edge.android_sim.report.page import html_page
from autoglm_edge.android_sim.report.timeline import WIDTH, draw, draw_png, draw_svg, thinned, ticks
from autoglm_edge.android_sim.report.words import size
from autoglm_edge.android_sim.simulation import Simulation, Subject
from autoglm_edge.android_sim.trace import Trace
from autoglm_edge.android_sim.verdict import classify
from autoglm_edge.embedded import pocket_path
from autoglm_edge.errors import SimulationError
from autoglm_edge.measure.figures import columns
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.runtime.bundle import Bundle

ISSUE_KEYS = {
    *("device", "state", "verdict", "phase", "enforcement", "limit_bytes", "peak_anon_swap_bytes"),
    *("headroom_bytes", "refault_bytes_per_token", "host_tokens_per_s", "projected_tokens_per_s", "parity"),
}


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Path]) -> Bundle:
    return Bundle.open(bundle_of(pocket_path(), "int4"))


@pytest.fixture(scope="module")
def simulation(bundle: Bundle) -> Simulation:
    return made(bundle, whole_run(800), budget(800))


def made(bundle: Bundle, run: Trace, allowed: Budget, **changes: object) -> Simulation:
    """A report on a run that never was."""
    device = find_device("sd8g3-16")
    forecast = foretell(bundle, allowed, question=Question(1500, 100, 40))
    values = {
        "subject": Subject.of(bundle),
        "device": device,
        "budget": allowed,
        "trace": run,
        "verdict": classify(run, allowed),
        "forecast": forecast,
        "errors": forecast.errors(run),
        "projection": project(device, weights_bytes=500 * MB),
        "machine": this_machine(),
        "prepared": True,
        "date": "2026-11-22",
    }
    return Simulation(**{**values, **changes})  # type: ignore[arg-type]


def test_the_document_has_the_keys_that_were_promised(simulation: Simulation) -> None:
    document = json.loads(simulation.to_json())
    assert document.keys() >= ISSUE_KEYS
    assert document["verdict"] == "fits"
    low, high = document["projected_tokens_per_s"]
    assert 0 < low < high
    assert document["host_tokens_per_s"] == pytest.approx(39 / 4.0)
    assert "samples" not in document
    assert len(json.loads(simulation.to_json(samples=True))["samples"]["at_s"]) == len(
        simulation.trace.samples
    )


def test_a_killed_run_reports_no_speed_and_no_error_of_the_forecast(bundle: Bundle) -> None:
    killed = made(bundle, whole_run(200, killed_at=6.1), budget(200), projection=None)
    document = json.loads(killed.to_json())
    assert (document["verdict"], document["phase"], document["lives"]) == ("killed_oom", "prefill", False)
    assert document["host_tokens_per_s"] is None
    assert document["projected_tokens_per_s"] is None
    assert document["forecast_errors"] == []
    table = killed.to_table()
    assert "KILLED: OUT OF MEMORY" in table and "it would have needed" in table
    assert "headroom" not in table


def test_numbers_that_do_not_exist_are_null_and_no_json_is_broken(bundle: Bundle) -> None:
    broken = dataclasses.replace(
        result(), parity=ParityResult(1, 1, math.nan, math.inf, 1.0, 1, 0, 0, None), decode_s=0.0
    )
    item = made(bundle, dataclasses.replace(whole_run(800), result=broken), budget(800))
    document = json.loads(item.to_json())
    assert document["parity"]["kl_mean"] is None
    assert document["host_tokens_per_s"] is None


def test_the_lines_name_verdict_memory_speed_and_the_forecasts_error(simulation: Simulation) -> None:
    table = simulation.to_table()
    for words in ("FITS", "sd8g3-16", "headroom", "tokens/s inside the limits", "beside this run", "Play"):
        assert words in table
    head = next(line for line in table.splitlines() if line.startswith("phase"))
    assert head.split() == [
        "phase",
        "seconds",
        "anonymous",
        "forecast",
        "error",
        "mapped",
        "without",
        "limit",
    ]


def test_parity_and_play_and_the_limiter_are_told_in_words(bundle: Bundle) -> None:
    parity = ParityResult(2, 50, 0.01, 0.2, 0.98, 1, 4, 1, 0.999, ("a: other pixels",))
    run = dataclasses.replace(whole_run(800), result=dataclasses.replace(result(), parity=parity))
    table = made(bundle, run, budget(800)).to_table()
    assert "same likeliest token 98.00 % of 50, 1 of 2 answers the same, 1 of 4 taps lost" in table
    large = trace([sample(0, 3000), sample(1, 3000)], [], enforced=enforced(9000), result=result())
    words = made(bundle, large, budget(9000, mem_total_bytes=8 << 30)).to_table()
    assert "ABOVE the 2.25 GB of the 8 GB band" in words
    assert "below the 6.44 GB at which Android 17's set" in words


def test_a_planned_report_shows_items_by_phase_and_their_sums(bundle: Bundle) -> None:
    device = find_device("phone-6")
    allowed = Budget.of(device)
    planned = Planned(Subject.of(bundle), device, allowed, foretell(bundle, allowed), None)
    table = planned.to_table()
    assert "expected   FITS" in table
    sums = [line for line in table.splitlines() if line.startswith("sum")]
    assert len(sums) == 2
    document = json.loads(planned.to_json())
    assert document["measured"] is False
    assert document["verdict"] == "fits"
    assert document["forecast_longest_context"]["alive"] == bundle.manifest.geometry.context_length


def test_the_matrix_has_a_row_per_device_and_a_column_per_bundle(
    bundle: Bundle, simulation: Simulation
) -> None:
    killed = made(bundle, whole_run(200, killed_at=6.1), budget(200), device=find_device("phone-4"))
    other = dataclasses.replace(
        simulation, subject=dataclasses.replace(simulation.subject, name="big", recipe="int8")
    )
    matrix = Matrix.of([simulation, killed, other])
    head, first, second = matrix.rows()
    assert head == ("device", "state", "limit", "int4", "big (int8)")
    assert first[3].startswith("fits, ")
    assert second[3:] == ("killed: out of memory", "not run")
    assert not matrix.lives
    assert matrix.to_markdown().count("\n") == 3
    assert {item["bundle"] for item in matrix.to_dict()} == {"int4", "big (int8)"}


class Checker(HTMLParser):
    """Collects the tags of a page and what they would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "onload", "onclick")]


def test_the_page_is_offline_without_scripts_and_holds_the_timeline(simulation: Simulation) -> None:
    page = html_page([simulation])
    checker = Checker()
    checker.feed(page)
    assert "svg" in checker.tags and "table" in checker.tags
    assert not checker.tags & {"script", "link", "iframe", "img", "object", "embed"}
    assert checker.links == []
    assert "What lives where" not in page
    assert "What lives where" in html_page([simulation, simulation])


def test_nothing_that_a_bundle_a_model_or_a_profile_says_becomes_markup(bundle: Bundle) -> None:
    evil = '<script>alert("x")</script>'
    device = read_device(
        f'id = "x"\nname = \'{evil}\'\nkind = "phone"\n[figures]\nmem_visible = '
        f"{{ value = 800, basis = 'estimate', source = '{evil}' }}\nmem_service = 700\n",
        "x.toml",
    )
    run = dataclasses.replace(
        whole_run(800), result=dataclasses.replace(result(), text=evil), message=evil, phases=()
    )
    item = made(
        bundle,
        run,
        budget(800),
        device=device,
        subject=dataclasses.replace(Subject.of(bundle), name=evil, model=evil),
        notes=(evil,),
    )
    page = html_page([item, item])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("run", "allowed"),
    [
        (whole_run(800), budget(800)),
        (whole_run(500, thrash=True), budget(500)),
        (whole_run(200, killed_at=6.1), budget(200)),
        (whole_run(6000), budget(6000)),
        (trace([], []), budget(600)),
        (trace([sample(0, 0)], [("start", 0.0, None)]), budget(600)),
        (trace([sample(0, 10), sample(1e-9, 10)], []), budget(600)),
    ],
)
def test_a_timeline_of_any_run_is_a_picture_of_its_size(tmp_path: Path, run: Trace, allowed: Budget) -> None:
    path = tmp_path / "timeline.png"
    draw_png(run, allowed, classify(run, allowed), "a title", path)
    with Image.open(path) as picture:
        assert picture.size == (2 * WIDTH, 1200)
        assert len(picture.convert("P", palette=Image.Palette.ADAPTIVE).getcolors() or []) > 3
    assert draw_svg(run, allowed, classify(run, allowed), "a title").startswith("<svg")


def test_the_timeline_shows_kinds_phases_limit_and_moment() -> None:
    run, allowed = whole_run(200, killed_at=6.1), budget(200)
    words = draw_svg(run, allowed, classify(run, allowed), "what & where")
    for text in (
        "anonymous",
        "mapped from files",
        "prefill",
        "limit 200.0 MB",
        "killed: out of memory, 6.08 s",
    ):
        assert text in words
    assert "what &amp; where" in words
    assert "swapped" not in words.split("anonymous + shared + swapped")[-1]
    thrashing = whole_run(500, thrash=True)
    assert "read again from storage" in draw_svg(
        thrashing, budget(500), classify(thrashing, budget(500)), "t"
    )
    far = draw_svg(whole_run(6000), budget(6000), classify(whole_run(6000), budget(6000)), "t")
    assert "far above: limit 6.00 GB" in far


def test_a_picture_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    run = whole_run(800)
    with pytest.raises(SimulationError, match="cannot be written"):
        draw_png(run, budget(800), classify(run, budget(800)), "t", tmp_path / "none" / "x.png")


def test_thinning_keeps_ends_and_peaks() -> None:
    samples = [sample(step, 100 + (900 if step == 4321 else 0)) for step in range(10_000)]
    few = thinned(samples, 300)
    assert len(few) <= 300
    assert (few[0], few[-1]) == (samples[0], samples[-1])
    assert max(item.anon_bytes for item in few) == 1000 * MB
    assert [item.at_s for item in few] == sorted(item.at_s for item in few)


def test_ticks_are_round_and_within() -> None:
    assert ticks(10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.7, 5) == pytest.approx([0, 0.2, 0.4, 0.6])
    assert ticks(0, 5) == ticks(math.nan, 5) == [0.0]


def test_both_canvases_take_the_same_calls() -> None:
    run, allowed = whole_run(500, thrash=True), budget(500)
    for canvas in (SvgCanvas(WIDTH, 600), PngCanvas(WIDTH, 600)):
        draw(canvas, run, allowed, classify(run, allowed), "中文 title")


def test_sizes_and_columns_are_for_people() -> None:
    assert [size(value) for value in (5, 5e3, 5e6, 5e9, -2e9)] == [
        "5 B",
        "5.0 kB",
        "5.0 MB",
        "5.00 GB",
        "-2.00 GB",
    ]
    assert columns([("a", "bb"), ("ccc", "d")]) == ["a    bb", "ccc   d"]
