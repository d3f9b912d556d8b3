"""Records out of JSON: what was written comes back, and what fits no annotation is refused by name."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_edge.errors import RequestError
from autoglm_edge.runtime.record import read_record


@dataclass(frozen=True)
class Inner:
    count: int

    def __post_init__(self) -> None:
        if self.count < 0:
            raise RequestError(f"count is {self.count}, must be at least 0")


@dataclass(frozen=True)
class Outer:
    name: str
    share: float
    on: bool
    mode: Literal["fast", "small"]
    inner: Inner
    note: str | None
    pair: tuple[float, float]
    rest: tuple[int, ...]
    named: dict[str, Inner]
    free: Any
    maybe: Inner | None = None
    more: dict[str, int] = field(default_factory=dict)


RIGHT = Outer("a", 0.5, True, "fast", Inner(1), None, (0.0, 1.0), (1, 2), {"x": Inner(2)}, [1, {"y": None}])


def changed(**values: Any) -> Any:
    return {**json.loads(json.dumps(dataclasses.asdict(RIGHT))), **values}


inners = st.builds(Inner, st.integers(0, 9))
outers = st.builds(
    Outer,
    st.text(),
    st.floats(allow_nan=False),
    st.booleans(),
    st.sampled_from(["fast", "small"]),
    inners,
    st.none() | st.text(),
    st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    st.lists(st.integers()).map(tuple),
    st.dictionaries(st.text(), inners),
    st.none() | st.integers() | st.lists(st.text()),
    st.none() | inners,
    st.dictionaries(st.text(), st.integers()),
)


@given(outers)
def test_a_record_comes_back_from_its_own_json(record: Outer) -> None:
    assert read_record(Outer, json.loads(json.dumps(dataclasses.asdict(record))), "it") == record


def test_a_key_with_a_default_may_be_missing() -> None:
    document = changed()
    del document["maybe"], document["more"]

    assert read_record(Outer, document, "it") == RIGHT


def test_a_whole_number_is_taken_for_a_float_and_becomes_one() -> None:
    found = read_record(Outer, changed(share=1), "it").share

    assert (found, type(found)) == (1.0, float)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "it is .*, must be an object"),
        (changed(colour=1), "it has the unknown key 'colour'"),
        ({key: value for key, value in changed().items() if key != "pair"}, "it lacks the key 'pair'"),
        (changed(name=1), "it.name is 1, must be of type str"),
        (changed(name=None), "it.name is None, must be of type str"),
        (changed(share=True), "it.share is True, must be of type float"),
        (changed(share=10**400), "it.share is too large a number"),
        (changed(on=1), "it.on is 1, must be of type bool"),
        (changed(mode="slow"), "it.mode is 'slow', must be fast or small"),
        (changed(mode=["fast"]), "it.mode is .*, must be fast or small"),
        (changed(inner=3), "it.inner is 3, must be an object"),
        (changed(inner={"count": 1.0}), "it.inner.count is 1.0, must be of type int"),
        (changed(inner={"count": True}), "it.inner.count is True, must be of type int"),
        (changed(note=1), "it.note is 1, must be of type str"),
        (changed(pair=[1]), "it.pair is .*, must be a list of 2"),
        (changed(rest=[1, "2"]), r"it.rest\[1\] is '2', must be of type int"),
        (changed(rest="12"), "it.rest is '12', must be a list"),
        (changed(named={"x": {}}), "it.named.x lacks the key 'count'"),
        (changed(named=[]), "it.named is .*, must be an object"),
        (changed(maybe=[]), "it.maybe is .*, must be an object"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(document: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_record(Outer, document, "it")


def test_a_range_is_the_records_own_business() -> None:
    with pytest.raises(RequestError, match="must be at least 0"):
        read_record(Outer, changed(inner={"count": -1}), "it")
