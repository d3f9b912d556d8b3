"""Products of bytes: asked of the CPU, not believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from autoglm_edge.runtime.machine import integers as module
from autoglm_edge.runtime.machine.integers import (
    Integers,
    cpu_flags,
    instruction_set,
    integers,
    product_graph,
)


def test_the_graph_of_the_question_is_a_valid_product() -> None:
    weight = np.random.default_rng(0).integers(-127, 128, (40, 300)).astype(np.int8)
    model = product_graph(weight)
    onnx.checker.check_model(onnx.load_from_string(model))
    values = np.full((2, 40), 130, np.uint8)
    (found,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"a": values})

    assert (found == 2 * weight.astype(np.int64).sum(0)).all()


def test_a_kernel_that_is_off_by_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session(ort.InferenceSession):
        def run(self, names: object, feeds: dict) -> list:
            (found,) = super().run(names, feeds)
            return [found + (len(found) == 40)]

    assert module._exact({})
    monkeypatch.setattr(module.ort, "InferenceSession", Session)
    assert not module._exact({})


def test_the_answer_of_this_cpu_is_asked_once() -> None:
    assert integers() is integers()
    assert isinstance(integers().exact, bool)
    if integers().unit in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"):
        assert integers().exact


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\n", {"fpu", "avx2", "avx512_vnni"}),
        ("Features\t: fp asimd asimddp\n", {"fp", "asimd", "asimddp"}),
        ("flags:\n", set()),
        ("nothing\n\udcff", None),
    ],
)
def test_flags_are_read_as_linux_writes_them(tmp_path: Path, text: str, flags: set[str] | None) -> None:
    path = tmp_path / "cpuinfo"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))

    assert cpu_flags(path) == flags
    assert cpu_flags(tmp_path / "absent") is None


def test_the_instruction_set_names_what_packing_depends_on_and_no_more() -> None:
    known = instruction_set(frozenset({"fpu", "avx2", "avx512_vnni"}))

    assert known.endswith("+avx2+avx512_vnni")
    assert known == instruction_set(frozenset({"avx512_vnni", "avx2", "rdtscp"}))
    assert known != instruction_set(frozenset({"avx2"}))
    assert instruction_set(None)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Integers(True, True, "amx_int8"), "exact (amx_int8)"),
        (Integers(True, True, ""), "no unit"),
        (Integers(True, True, None), "are exact"),
        (Integers(False, True, ""), "cut off"),
    ],
)
def test_the_reason_says_what_was_found(found: Integers, words: str) -> None:
    assert words in found.reason
