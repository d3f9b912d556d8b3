import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_cli_docs.py"


@pytest.fixture
def script():
    return runpy.run_path(str(SCRIPT))


def test_the_page_of_commands_is_what_the_commands_say(script):
    assert script["main"](["--check"]) == 0, "run python scripts/make_cli_docs.py"


def test_a_page_that_differs_is_noticed(script, tmp_path, monkeypatch, capsys):
    stale = tmp_path / "cli.md"
    monkeypatch.setitem(script["main"].__globals__, "PAGE", stale)

    assert script["main"](["--check"]) == 1
    stale.write_text(script["page"]() + "x")
    assert script["main"](["--check"]) == 1
    assert "make_cli_docs.py" in capsys.readouterr().err
    assert script["main"]([]) == 0
    assert script["main"](["--check"]) == 0


def test_the_page_does_not_depend_on_the_terminal(script, monkeypatch):
    before = script["page"]()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")

    assert script["page"]() == before


def test_every_command_begins_with_a_verb_and_ends_with_examples(script):
    for name, command in script["commands"]():
        first = command.help.split()[0]
        verbs = {"Export", "Turn", "Answer", "Show", "Pack", "Measure", "Record", "Compare", "Run", "Serve"}
        assert first in verbs, f"{name} begins with {first}"
        examples = command.epilog.split("Examples:\n")[1].splitlines()
        assert len(examples) in (2, 3)
        assert all(line.strip().startswith(name.split()[0]) for line in examples)
