"""Blocks of options: each is one value, made of what its options say, and says what does not go together."""

import inspect
import pkgutil
from dataclasses import dataclass, fields
from importlib import import_module

import click
import pytest
from cli_fixtures import invoke, write_bundle
from click.testing import CliRunner

from autoglm_edge.commands import options
from autoglm_edge.commands.command import spelled, written_parameters
from autoglm_edge.commands.options.choice import gathered
from autoglm_edge.commands.quantities import read_bytes, read_integers

BLOCKS = [
    (name, block)
    for module in (
        import_module(f"{options.__name__}.{item.name}") for item in pkgutil.iter_modules(options.__path__)
    )
    for name, block in inspect.getmembers(module, inspect.isfunction)
    if name.endswith("_options")
]


@dataclass(frozen=True)
class Tea:
    kind: str
    sugar: int | None
    cold: bool


def kitchen():
    """A command with a block between two options of its own."""

    @click.command()
    @click.option("--first")
    @gathered(
        Tea,
        "tea",
        click.option("--kind", default="green"),
        click.option("-s", "--sugar", type=int),
        click.option("--cold", is_flag=True),
    )
    @click.option("--last")
    @click.argument("guest", required=False)
    def command(first, tea, last, guest):
        """Pour."""
        written = [spelled(parameter) for parameter in written_parameters(click.get_current_context())]
        click.echo(f"{first} {tea} {last} {guest} {written}")

    return command


def test_a_block_arrives_as_one_value_between_other_options():
    result = CliRunner().invoke(kitchen(), ["--last", "z", "-s", "2", "--cold"])

    assert (
        result.output == "None Tea(kind='green', sugar=2, cold=True) z None ['--sugar', '--cold', '--last']\n"
    )


def test_a_block_stands_in_its_place_on_the_help_page():
    text = CliRunner().invoke(kitchen(), ["--help"]).output

    assert [line.split()[0] for line in text.splitlines() if line.startswith("  -")] == [
        *("--first", "--kind", "-s,", "--cold", "--last", "--help")
    ]
    assert "Pour." in text


def test_what_was_written_is_spelled_as_users_spell_it():
    result = CliRunner().invoke(kitchen(), ["me", "--kind", "green", "--first", ""])

    assert result.output.endswith("me ['--first', '--kind', 'GUEST']\n")


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_a_block_has_an_option_for_every_field_and_no_other(name, block):
    found = []

    @click.command()
    @block
    def command(**values):
        found.append(values)

    assert CliRunner().invoke(command, []).exit_code == 0
    ((argument, value),) = found[0].items()
    assert argument.isidentifier()
    assert [option.name for option in command.params] == [field.name for field in fields(value)]


def test_blocks_are_found():
    assert {"engine_options", "network_options", "sampling_options", "audio_options"} <= {
        n for n, _ in BLOCKS
    }


@pytest.mark.parametrize(
    "arguments",
    [
        *(["hi"], [""], ["--image", "a.png"], ["--audio", "a.wav"], ["--speech-model", "base"], ["--chat"]),
        *(
            ["--system", "s"],
            ["--draw", "a.png"],
            ["--max-tokens", "1"],
            ["--temperature", "0"],
            ["--top-p", "1"],
        ),
        *(["--top-k", "0"], ["--min-p", "0"], ["--repetition-penalty", "1"], ["--frequency-penalty", "0"]),
        *(
            ["--presence-penalty", "0"],
            ["--seed", "0"],
            ["--stop", "x"],
            ["--json-schema", "a"],
            ["--json-object"],
        ),
    ],
)
def test_a_batch_takes_nothing_of_a_single_answer(tmp_path, arguments):
    result = invoke("run", tmp_path, *arguments, "--batch", "in.jsonl", "-o", "out.jsonl")

    assert result.exit_code == 2
    shown = arguments[0] if arguments[0].startswith("-") else "TEXT"
    assert f"Error: {shown} is for a single answer; in a batch each request says it itself" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--output", "a"], ["--ordered"], ["--images-from", "."], ["--served-model-name", "a"]),
        *(["--max-concurrency", "2"], ["--ray"], ["--workers", "1"]),
    ],
)
def test_a_single_answer_takes_nothing_of_a_batch(tmp_path, arguments):
    result = invoke("run", write_bundle(tmp_path / "b"), "hi", *arguments)

    assert result.exit_code == 2
    assert f"{arguments[0]} is for a file of requests; give one with --batch" in result.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("run", ["hi", "--no-reuse", "--prefix-cache", "d"], "leave it out, or --prefix-cache"),
        ("serve", ["--no-reuse", "--cache-dir", "d"], "leave it out, or --cache-dir"),
        ("serve", ["--no-reuse", "--cache-bytes", "1"], "leave it out, or the options of the caches"),
        (
            "serve",
            ["--cache-dir-bytes", "1GB"],
            "--cache-dir-bytes is for a folder; name one with --cache-dir",
        ),
        ("serve", ["--cache-bytes", "1 apple"], "'1 apple' is no number of bytes such as 500MB"),
        ("bench", ["--prefill", "1;2"], "'1;2' is not a list of integers such as 128,512"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(tmp_path, command, arguments, message):
    if command == "serve":
        pytest.importorskip("fastapi")
    result = invoke(command, write_bundle(tmp_path / "b"), *arguments)

    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("text", "count"), [("500", 500), ("2GB", 2 * 10**9), ("3 k", 3000), ("1mb", 10**6), (None, None)]
)
def test_bytes_are_read_in_decimal_units(text, count):
    assert read_bytes(None, None, text) == count


def test_integers_are_read_between_commas():
    assert read_integers(None, None, "128, 512") == (128, 512)
    assert read_integers(None, None, " ") == ()
    assert read_integers(None, None, None) is None
