"""The reference file: what goes in comes out, and what cannot be right is refused in a sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity_fixtures import prompt_file
from safetensors import safe_open
from safetensors.numpy import save_file

from autoglm_edge.errors import EdgeError, ImageError, ParityError, PromptError, RequestError
from autoglm_edge.parity.case import FEATURE_ROWS, Case, Fingerprint, sample_rows
from autoglm_edge.parity.prompts import make_prompts, read_prompts
from autoglm_edge.parity.record import record
from autoglm_edge.parity.reference import Reference, write_reference
from autoglm_edge.parity.rows import reduce_logits
from autoglm_edge.runtime.manifest import ImageSpec

VOCAB = 40
SPEC = ImageSpec(14, 2, 2, 12544, 100_000, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 1 / 255, 3)
FINGERPRINT = Fingerprint(
    model="a/model",
    revision=None,
    config_sha256="0" * 64,
    weights_sha256="4" * 64,
    tokenizer_sha256="1" * 64,
    template_sha256="2" * 64,
    image=SPEC,
    image_layout="plain",
    vocab=VOCAB,
    device="cpu",
    dtype="float32",
    baseline=None,
    prompt_set="mine",
    seed=1,
    versions={"torch": "2", "pillow": "12"},
)


def make_case(name: str = "image-zh-0", *, full: bool = False) -> Case:
    """A case of made-up numbers: 12 prompt tokens with an image of 2 x 2 tokens, 3 tokens of answer."""
    rng = np.random.default_rng(len(name))
    ids, answer = rng.integers(0, VOCAB, 12), rng.integers(0, VOCAB, 3)
    places = np.arange(5, 14)
    following = np.concatenate([ids, answer])[places + 1]
    rows = reduce_logits(
        rng.normal(size=(9, VOCAB)).astype(np.float32), following, top_k=VOCAB if full else 6, keep_all=full
    )
    features = (np.arange(4), rng.normal(size=(4, 8)).astype(np.float32))
    parts = [{"type": "image", "image": 0}, {"type": "text", "text": "问"}]
    return Case(
        name,
        ({"role": "system", "content": "s"}, {"role": "user", "content": parts}),
        (b"\x89PNG",),
        (1, 2, 30, 40),
        8,
        ids,
        np.tile(np.arange(12), (3, 1)),
        ((1, 4, 4),),
        ("3" * 64,),
        answer,
        answer[:2],
        places,
        rows,
        (features,),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    output = tmp_path / "ref.safetensors"
    write_reference(output, FINGERPRINT, [make_case(), make_case("text-en-0", full=True)])
    return output


Change = Callable[[dict[str, np.ndarray], dict[str, str], dict[str, Any]], Any]


def rewrite(path: Path, change: Change) -> Path:
    """Read a file with safetensors alone, let `change` alter tensors, metadata and document; write it."""
    with safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    document = json.loads(metadata["document"])
    change(tensors, metadata, document)
    if "document" in metadata:
        metadata["document"] = json.dumps(document)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path, metadata)
    return path


# --- round trip


def test_what_is_written_is_read(path: Path) -> None:
    reference = Reference.open(path)
    first, second = reference.cases()

    assert reference.fingerprint == FINGERPRINT
    assert reference.names == ["image-zh-0", "text-en-0"]
    wanted = make_case()
    for name in ("ids", "positions", "answer", "greedy", "places"):
        assert np.array_equal(getattr(first, name), getattr(wanted, name)), name
    for name in ("top_ids", "top_logits", "lse", "tail", "next_logits", "best"):
        assert np.array_equal(getattr(first.rows, name), getattr(wanted.rows, name)), name
    assert first.rows.logits is None
    assert np.array_equal(second.rows.logits, make_case("text-en-0", full=True).rows.logits)
    assert (first.messages, first.images, first.box, first.max_tokens) == (
        wanted.messages,
        wanted.images,
        wanted.box,
        wanted.max_tokens,
    )
    assert (first.grids, first.patches_sha256, first.group) == (wanted.grids, wanted.patches_sha256, "image")
    assert first.in_answer.tolist() == [False] * 6 + [True] * 3


def test_vision_features_are_kept_in_half_precision_unless_they_overflow_it(tmp_path: Path) -> None:
    case = make_case()
    values = case.features[0][1]
    large = dataclasses.replace(case, name="large-0", features=((np.arange(4), values * 1e6),))
    write_reference(tmp_path / "ref", FINGERPRINT, [case, large])

    small, wide = Reference.open(tmp_path / "ref").cases()

    assert small.features[0][1] == pytest.approx(values, rel=1e-3, abs=1e-4)
    assert small.features[0][1].dtype == np.float32
    assert np.array_equal(wide.features[0][1], values * 1e6)


def test_vision_tokens_are_sampled_evenly_with_both_ends() -> None:
    assert sample_rows(7).tolist() == list(range(7))
    rows = sample_rows(3354)
    assert (len(rows), rows[0], rows[-1]) == (FEATURE_ROWS, 0, 3353)
    assert len(set(rows.tolist())) == FEATURE_ROWS


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="cannot be written"):
        write_reference(tmp_path / "none" / "ref", FINGERPRINT, [make_case()])

    assert list(tmp_path.iterdir()) == []


def test_a_reference_is_read_without_torch(path: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom autoglm_edge.parity.reference import Reference\n"
        f"print(len(list(Reference.open({str(path)!r}).cases())), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )

    assert done.stdout.split() == ["2", "False"]


# --- foreign and hostile files


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no reference")
    (tmp_path / "empty").touch()
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "weights")

    for name in ("text", "empty"):
        with pytest.raises(ParityError, match="no safetensors file"):
            Reference.open(tmp_path / name)
    with pytest.raises(ParityError, match="but no reference"):
        Reference.open(tmp_path / "weights")
    with pytest.raises(ParityError, match="autoglm record"):
        Reference.open(tmp_path / "none")
    with pytest.raises(ParityError, match="no reference at"):
        Reference.open(tmp_path)


def test_a_file_that_was_cut_short_is_refused(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)

    with pytest.raises(ParityError, match="cut short"):
        Reference.open(path)


def test_another_version_is_refused(path: Path) -> None:
    rewrite(path, lambda tensors, metadata, document: metadata.update(format_version="2"))

    with pytest.raises(ParityError, match="format version '2'"):
        Reference.open(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("fingerprint"),
        lambda document: document["fingerprint"].pop("model"),
        lambda document: document["fingerprint"].update(extra=1),
        lambda document: document["fingerprint"].update(vocab="40"),
        lambda document: document["fingerprint"].update(vocab=0),
        lambda document: document["fingerprint"].update(versions={"torch": 2}),
        lambda document: document["fingerprint"].update(image_layout="odd"),
        lambda document: document["fingerprint"]["image"].update(merge_size=0),
        lambda document: document["fingerprint"]["image"].update(mean=[1, 2]),
        lambda document: document.update(cases=[]),
        lambda document: document.update(cases=[document["cases"][0]] * 2),
        lambda document: document.update(cases=7),
        lambda document: document["cases"][0].update(name=3),
        lambda document: document["cases"][0].update(max_tokens=-1),
        lambda document: document["cases"][0].update(max_tokens=True),
        lambda document: document["cases"][0].update(box=[1, 2, 3]),
        lambda document: document["cases"][0].update(grids=[[1, 4]]),
        lambda document: document["cases"][0].update(patches_sha256=[]),
        lambda document: document["cases"][0].update(messages=[{"role": "user"}]),
        lambda document: document["cases"][0].update(messages=[{"role": "user", "content": 4}]),
        lambda document: document["cases"][0].update(
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]
        ),
        lambda document: document["cases"][0].pop("box"),
    ],
)
def test_a_document_of_another_form_is_refused(path: Path, change: Callable[[Any], Any]) -> None:
    rewrite(path, lambda tensors, metadata, document: change(document))

    with pytest.raises(ParityError, match="is damaged"):
        Reference.open(path)


def test_a_document_that_is_no_json_is_refused(path: Path) -> None:
    with safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
    for text in ("", "{", "[]", "null", "[" * 100_000):
        save_file({"a": np.zeros(1)}, path, {**metadata, "document": text})
        with pytest.raises(ParityError, match="is damaged"):
            Reference.open(path)


CHANGES: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "missing": lambda tensors: tensors.pop("0000/lse"),
    "float ids": lambda tensors: tensors.update({"0000/ids": tensors["0000/ids"].astype(np.float32)}),
    "empty ids": lambda tensors: tensors.update({"0000/ids": np.zeros(0, np.int32)}),
    "unknown id": lambda tensors: tensors["0000/ids"].__setitem__(0, VOCAB),
    "negative id": lambda tensors: tensors["0000/answer"].__setitem__(0, -1),
    "place outside": lambda tensors: tensors["0000/places"].__setitem__(-1, 14),
    "places unsorted": lambda tensors: tensors["0000/places"].__setitem__(0, 7),
    "short rows": lambda tensors: tensors.update({"0000/lse": tensors["0000/lse"][1:]}),
    "nan": lambda tensors: tensors["0000/top_logits"].__setitem__((0, 0), np.nan),
    "infinite": lambda tensors: tensors["0000/lse"].__setitem__(0, np.inf),
    "wrong sum": lambda tensors: tensors["0000/lse"].__setitem__(0, tensors["0000/lse"][0] + 1),
    "token twice": lambda tensors: tensors["0000/top_ids"].__setitem__(0, 3),
    "no columns": lambda tensors: tensors.update(
        {name: np.zeros((9, 0), tensors[name].dtype) for name in ("0000/top_ids", "0000/top_logits")}
    ),
    "feature outside": lambda tensors: tensors["0000/feature_rows.0"].__setitem__(0, 4),
    "features missing": lambda tensors: tensors.pop("0000/features.0"),
    "positions": lambda tensors: tensors.update({"0000/positions": np.zeros((2, 12), np.int32)}),
    "full logits": lambda tensors: tensors.update({"0001/logits": np.zeros((9, 7), np.float32)}),
}


@pytest.mark.parametrize("fault", CHANGES)
def test_tensors_that_cannot_be_right_are_refused_by_name(path: Path, fault: str) -> None:
    rewrite(path, lambda tensors, metadata, document: CHANGES[fault](tensors))

    with pytest.raises(ParityError, match=r"case '(image-zh-0|text-en-0)': "):
        list(Reference.open(path).cases())


def test_messages_that_name_other_pictures_are_refused(path: Path) -> None:
    def change(tensors: Any, metadata: Any, document: Any) -> None:
        document["cases"][0]["messages"][1]["content"][0]["image"] = 5

    with pytest.raises(ParityError, match="do not agree"):
        list(Reference.open(rewrite(path, change)).cases())


def test_a_damaged_picture_is_an_image_error(path: Path) -> None:
    case = next(Reference.open(path).cases())

    with pytest.raises(ImageError):
        case.pictures()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_flipped_byte_gives_anything_but_a_parity_error(path: Path, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    other = path.with_name("flipped")
    other.write_bytes(content)

    try:
        list(Reference.open(other).cases())
    except EdgeError as error:
        assert isinstance(error, ParityError)


# --- prompts


def test_the_sets_are_the_same_whenever_they_are_made() -> None:
    one, other = make_prompts("small"), make_prompts("small")

    assert [question.name for question in one] == [question.name for question in other]
    assert len(one) == 12
    for a, b in zip(one, other, strict=True):
        for first, second in zip(a.messages, b.messages, strict=True):
            assert first == second
    assert make_prompts("small", 1)[1].messages != one[1].messages


def test_the_full_set_covers_what_the_small_one_does_and_more() -> None:
    small, full = make_prompts("small"), make_prompts("full")

    groups = {question.name.partition("-")[0] for question in small}
    assert groups == {"text", "image", "images", "long", "tap", "agent"}
    assert {question.name.partition("-")[0] for question in full} == groups
    assert len(full) == len({question.name for question in full}) == 96
    sizes = {
        part["image"].size
        for question in full
        for message in question.messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    }
    assert (1080, 2400) in sizes
    boxes = [question.box for question in full if question.box is not None]
    assert len(boxes) == 36
    assert all(0 <= box[0] < box[2] <= 999 and 0 <= box[1] < box[3] <= 999 for box in boxes)


def test_prompts_of_ones_own_are_read_with_their_pictures(tmp_path: Path) -> None:
    questions = read_prompts(prompt_file(tmp_path))

    assert [question.name for question in questions] == ["text-zh-0", "image-en-0", "images-en-0", "tap-en-0"]
    assert questions[1].messages[0]["content"][0]["image"].size == (120, 230)
    assert questions[3].box is not None
    assert questions[0].max_tokens == 8


def test_a_picture_may_be_a_path_relative_to_the_file(tmp_path: Path) -> None:
    make_prompts("small")[1].messages[0]["content"][0]["image"].save(tmp_path / "picture.png")
    content = [{"type": "image", "image": "picture.png"}]
    line = json.dumps({"name": "a", "messages": [{"role": "user", "content": content}]})
    (tmp_path / "mine.jsonl").write_text(line + "\n\n")

    assert read_prompts(tmp_path / "mine.jsonl")[0].messages[0]["content"][0]["image"].mode == "RGB"


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        ('{"name": "a"}', "must be an object"),
        ('{"name": "a", "messages": [], "odd": 1}', "must be an object"),
        ('{"name": "", "messages": []}', "the name ''"),
        ('{"name": "a", "messages": [], "max_tokens": 0}', "max_tokens 0"),
        ('{"name": "a", "messages": [], "box": [1, 2, 3]}', "four integers"),
        ('{"name": "a", "messages": [], "box": [1, 2, 3, 5000]}', "four integers"),
        ('{"name": "a", "messages": ["b"]}', "no list of objects"),
        ("", "at least one"),
    ],
)
def test_lines_that_are_no_prompts_are_refused_by_number(tmp_path: Path, line: str, match: str) -> None:
    (tmp_path / "mine.jsonl").write_text(line)

    with pytest.raises(PromptError, match=match):
        read_prompts(tmp_path / "mine.jsonl")


def test_two_prompts_of_one_name_are_refused(tmp_path: Path) -> None:
    line = '{"name": "a", "messages": [{"role": "user", "content": "b"}]}\n'
    (tmp_path / "mine.jsonl").write_text(line * 2)

    with pytest.raises(PromptError, match="no name twice"):
        read_prompts(tmp_path / "mine.jsonl")


def test_a_set_that_does_not_exist_is_refused() -> None:
    with pytest.raises(PromptError, match="neither small nor full"):
        make_prompts("medium")


# --- recording


def test_recording_says_before_it_loads_the_model_that_a_prompt_is_too_long(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    line = {"name": "long-0", "messages": [{"role": "user", "content": "字" * 9000}]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))

    with pytest.raises(RequestError, match="prompt 'long-0' does not fit this model"):
        record(checkpoint_of("tiny"), tmp_path / "ref", prompts=str(tmp_path / "mine.jsonl"))


def test_recording_does_not_replace_a_file_unasked(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "ref").write_text("mine")

    with pytest.raises(ParityError, match="--force"):
        record(checkpoint_of("tiny"), tmp_path / "ref")
    with pytest.raises(ParityError, match="make it first"):
        record(checkpoint_of("tiny"), tmp_path / "none" / "ref")
    with pytest.raises(RequestError, match="top_k"):
        record(checkpoint_of("tiny"), tmp_path / "new", top_k=0)
    assert (tmp_path / "ref").read_text() == "mine"


def test_a_reference_of_another_checkpoint_cannot_be_scored_again(
    checkpoint_of: Callable[..., Path], path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ParityError, match="another config_sha256"):
        record(checkpoint_of("tiny"), tmp_path / "new", like=path)
