"""Calibration sets: which tokens they come to, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_fixtures import ANSWER, assistant, user, write_set, write_usual_set
from PIL import Image

from autoglm_edge.errors import ExportError
from autoglm_edge.export.calibrate import calibration_set as module
from autoglm_edge.export.calibrate.calibration_set import CalibrationSet, built_in_set, read_calibration
from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.runtime.prompt.build import build_prompt
from autoglm_edge.runtime.prompt.messages import read_messages
from autoglm_edge.runtime.prompt.template import ChatTemplate
from autoglm_edge.runtime.prompt.tokenizer import Tokenizer

Checkpoints = Callable[..., Path]


@pytest.fixture
def tiny(checkpoint_of: Checkpoints) -> Checkpoint:
    return Checkpoint.open(checkpoint_of("tiny"))


def read(path: Path, checkpoint: Checkpoint, **options: Any) -> CalibrationSet:
    return read_calibration(path, checkpoint, checkpoint.config, **options)


def test_an_answer_stands_behind_its_prompt_and_positions_go_on(tiny: Checkpoint, tmp_path: Path) -> None:
    picture = Image.new("RGB", (140, 112), "navy")
    question = user("What is it?", picture)

    (sample,) = read(write_set(tmp_path / "set", [question, assistant()]), tiny).samples

    tokenizer = Tokenizer.from_folder(tiny.path)
    prompt = build_prompt(
        read_messages([question]),
        tokenizer=tokenizer,
        template=ChatTemplate.from_folder(tiny.path),
        image=tiny.config.image,
        tokens=tiny.config.tokens,
    )
    answer = tokenizer.encode(ANSWER)
    assert sample.ids.tolist() == [*prompt.ids.tolist(), *answer]
    assert np.array_equal(sample.positions[:, : len(prompt.ids)], prompt.positions)
    last = prompt.next_position + np.arange(len(answer))
    assert np.array_equal(sample.positions[:, len(prompt.ids) :], np.tile(last, (3, 1)))
    assert len(sample.images) == 1


def test_an_assistants_turn_before_the_end_is_history(tiny: Checkpoint, tmp_path: Path) -> None:
    talk = [user("one"), assistant("two"), user("three")]

    (sample,) = read(write_set(tmp_path / "set", talk), tiny).samples

    text = Tokenizer.from_folder(tiny.path).decode(sample.ids)
    assert text.index("one") < text.index("two") < text.index("three")
    assert text.rstrip().endswith("<|assistant|>")


def test_the_last_prompt_is_cut_where_the_tokens_end(
    tiny: Checkpoint, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    path = write_usual_set(tmp_path / "set", pictures)
    every = read(path, tiny)
    first, second, _ = every.samples

    for limit in (1, len(first.ids), len(first.ids) + 1, len(first.ids) + 40, every.tokens, 10**6):
        cut = read(path, tiny, max_tokens=limit)

        assert cut.tokens == min(limit, every.tokens)
        assert np.array_equal(cut.samples[0].ids, first.ids[:limit])
        for sample in cut.samples:
            placeholders = int(np.count_nonzero(sample.ids == tiny.config.tokens.image))
            tokens = [image.tokens for image in sample.images]
            assert sum(tokens[:-1]) < placeholders <= sum(tokens) or placeholders == sum(tokens) == 0
            assert sample.positions.shape == (3, len(sample.ids))
    assert len(second.images) == 2


def test_lines_that_are_not_needed_are_not_read(tiny: Checkpoint, tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [user("hello")])
    with path.open("a") as file:
        file.write("this is no JSON\n")

    assert read(path, tiny, max_tokens=3).tokens == 3
    with pytest.raises(ExportError, match=":2 is not JSON"):
        read(path, tiny)


def test_the_template_is_found_where_the_export_finds_it(tiny: Checkpoint, tmp_path: Path) -> None:
    usual = read(write_set(tmp_path / "set", [user("hello")]), tiny)
    folder = tmp_path / "tiny"
    shutil.copytree(tiny.path, folder)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")

    assert read(tmp_path / "set", Checkpoint.open(folder)).sha256 == usual.sha256


def test_the_digest_is_of_what_is_run(tiny: Checkpoint, tmp_path: Path) -> None:
    picture = Image.new("RGB", (140, 112), "navy")
    other = picture.copy()
    other.putpixel((3, 3), (255, 255, 255))

    def digest(*talks: list[dict[str, Any]], **options: Any) -> str:
        return read(write_set(tmp_path / "set", *talks), tiny, **options).sha256

    usual = digest([user("What?", picture), assistant()])
    changes = [
        digest([user("What!", picture), assistant()]),
        digest([user("What?", other), assistant()]),
        digest([user("What?", picture), assistant("no")]),
        digest([user("What?", picture)]),
        digest([user("What?", picture), assistant()], max_tokens=30),
        digest([user("What?", picture), assistant()], [user("And?")]),
    ]
    line = {"messages": [user("What?", picture), assistant()], "max_tokens": 9, "name": "another"}
    (tmp_path / "same").write_text("\n" + json.dumps(line, indent=None) + "\n")

    assert len({usual, *changes}) == 7
    assert read(tmp_path / "same", tiny).sha256 == usual


def test_the_description_counts_prompts_and_tokens(
    tiny: Checkpoint, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    samples = read(write_usual_set(tmp_path / "set", pictures), tiny)

    description = samples.description
    assert (description.prompts, description.tokens) == (3, sum(len(one.ids) for one in samples.samples))
    assert description.sha256 == samples.sha256


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        ([user("hello"), assistant("and <|user|>")], r"'<\|user\|>' in its text"),
        ([user("a <|image|> here")], r"'<\|image\|>' in its text"),
        ([], "messages is empty"),
        ([{"role": "robot", "content": "x"}], "role"),
        ([user("word " * 6000)], "'text-0' cannot be run: .*4,?096"),
        ([user("word"), assistant("word " * 6000)], "'text-0' cannot be run: .*4,?096"),
        ([user("x"), {"role": "assistant", "content": [{"type": "image", "image": "no.png"}]}], "no.png"),
    ],
)
def test_a_prompt_that_cannot_be_run_is_refused_by_name(
    talk: list[dict[str, Any]], reason: str, tiny: Checkpoint, tmp_path: Path
) -> None:
    path = write_set(tmp_path / "set", talk)

    with pytest.raises(ExportError, match=reason) as failure:
        read(path, tiny)
    assert str(path) in str(failure.value)


def test_an_answer_with_a_picture_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    drawn = {**user("see", Image.new("RGB", (140, 112))), "role": "assistant"}

    with pytest.raises(ExportError, match="its answer holds a picture"):
        read(write_set(tmp_path / "set", [user("draw"), drawn]), tiny)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "has no prompts"), (b"\xff\xfe", "UTF-8"), (b"[]\n", "must be an object")]
)
def test_a_file_of_another_kind_is_refused(
    content: bytes, reason: str, tiny: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "set").write_bytes(content)

    with pytest.raises(ExportError, match=reason):
        read(tmp_path / "set", tiny)


def test_a_file_that_is_not_there_is_refused(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match="is not a file; give a JSON Lines file"):
        read(tmp_path, tiny)

    monkeypatch.setattr(module, "BUILT_IN", "nothing.jsonl")
    with pytest.raises(ExportError, match=r"no calibration set of its own at .*nothing\.jsonl"):
        built_in_set()
