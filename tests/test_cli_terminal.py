"""What commands show and read: progress, documents in any encoding, arguments in any locale, bytes."""

import io
import json
import os
import sys

import click
import pytest

from autoglm_edge.commands.progress import ProgressLine
from autoglm_edge.commands.quantities import format_bytes
from autoglm_edge.commands.terminal import as_unicode, print_json, tolerate_encodings


def test_a_note_takes_the_place_of_the_bar_on_a_terminal_and_is_a_line_elsewhere(monkeypatch, capsys):
    now = iter((0.0, 0.1, 1.5, 1.6))
    line = ProgressLine(clock=lambda: next(now))
    for number in range(4):
        line.note(f"layer {number}")
    assert capsys.readouterr().err == "layer 0\nlayer 2\n"

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    line = ProgressLine()
    line.note("layer 1")
    line.note("layer 2")
    line.close()
    assert capsys.readouterr().err == "\r\x1b[Klayer 1\r\x1b[Klayer 2\n"


def test_progress_without_a_terminal_is_a_line_per_tenth(capsys):
    now = iter(range(0, 10_000, 2))
    line = ProgressLine(clock=lambda: float(next(now)))

    for done in range(0, 1001, 10):
        line.show("Weights", done, 1000)

    lines = capsys.readouterr().err.splitlines()
    assert [text.split()[1] for text in lines] == [str(tenth) for tenth in range(10, 101, 10)]
    assert lines[4] == "Weights: 50 % of 1.0 kB, 100 s"


def test_a_bar_is_drawn_on_a_terminal_and_ends_its_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    now = iter([0.0, 2.0, 2.01, 4.0])
    line = ProgressLine(clock=lambda: next(now))

    for done in (0, 500, 501, 1000):
        line.show("Weights", done, 1000)
    line.close()

    drawn = capsys.readouterr().err.split("\r")
    assert len(drawn) == 4, "two states within a tenth of a second are drawn once"
    assert "50 %" in drawn[2]
    assert "0:02 left" in drawn[2]
    assert "100 %" in drawn[3]
    assert drawn[3].endswith("\n")


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", "?? é"), ("utf-8", "微信 é")])
def test_what_stdout_cannot_show_is_a_question_mark_but_documents_stay_whole(monkeypatch, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)

    tolerate_encodings()
    click.echo("微信 é")
    print_json({"text": "微信"})
    stream.flush()

    first, second = stream.buffer.getvalue().decode(encoding).splitlines()
    assert first == shown
    assert json.loads(second) == {"text": "微信"}


def test_an_argument_is_utf8_whatever_the_locale_says():
    assert as_unicode("打开") == "打开"
    assert as_unicode(os.fsencode("打开").decode("ascii", "surrogateescape")) == "打开"
    assert as_unicode("\udcff") == "\udcff"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (512, "512 B"), (3600, "3.6 kB"), (7_150_000, "7.2 MB"), (5.864e9, "5.86 GB")],
)
def test_bytes_are_told_in_decimal_units(count, text):
    assert format_bytes(count) == text
