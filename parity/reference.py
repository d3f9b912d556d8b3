"""The reference file: what the original model answers to a fixed set of prompts.

In: a path. Out: a `Reference`, whose fingerprint is checked at once and whose cases (`case.Case`) are read
and checked one at a time; and the way back, `write_reference`. It is a safetensors file, so reading needs no
torch and runs no code; docs/parity.md lists every tensor. A file may come from a stranger: every length, id
and offset is checked before it is used. Knows nothing of engines and of how the answers came about.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import BundleError, DependencyError, EdgeError, ParityError
from autoglm_edge.runtime.record import read_record

from .case import Box, Case, Fingerprint
from .rows import Rows

FORMAT = "autoglm-edge reference"
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Reference:
    """An opened reference file. Make one with `Reference.open`.

    Attributes:
        path: the file.
        fingerprint: what it was recorded from.
        entries: the case documents, in order.
    """

    path: Path
    fingerprint: Fingerprint
    entries: tuple[dict[str, Any], ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Reference:
        """Read the fingerprint and the list of cases.

        Raises:
            ParityError: no such file, not a reference, of another version, cut short or damaged.
            DependencyError: safetensors is not installed.
        """
        file = Path(path)
        if not file.is_file():
            raise ParityError(f"there is no reference at {file}; make one with `autoglm record`")
        with _opened(file) as tensors:
            metadata = tensors.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ParityError(
                f"{file} is a safetensors file, but no reference; make one with `autoglm record`"
            )
        if metadata.get("format_version") != str(FORMAT_VERSION):
            raise ParityError(
                f"{file} has format version {metadata.get('format_version')!r}, this release reads "
                f"{FORMAT_VERSION}; record it again"
            )
        try:
            document = json.loads(metadata.get("document", ""))
            fingerprint = _fingerprint(document["fingerprint"])
            entries = tuple(_entry(entry) for entry in document["cases"])
        except (ValueError, KeyError, TypeError, RecursionError, BundleError) as error:
            raise _damaged(file, f"its document does not have the form of one ({error})") from error
        names = [entry["name"] for entry in entries]
        if not names or len(set(names)) != len(names):
            raise _damaged(file, "it has no cases, or two of one name")
        return cls(file, fingerprint, entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def names(self) -> list[str]:
        """Names of the cases, in order."""
        return [entry["name"] for entry in self.entries]

    def cases(self) -> Iterator[Case]:
        """The cases, one in memory at a time.

        Raises:
            ParityError: a tensor is missing, has a wrong type or shape, or values out of range.
        """
        with _opened(self.path) as tensors:
            names = frozenset(tensors.keys())
            for index, entry in enumerate(self.entries):
                yield _CaseReader(self, tensors, names, index).read(entry)

    @cached_property
    def sha256(self) -> str:
        """Digest of the whole file, so that figures can say what they were measured against."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def write_reference(path: Path, fingerprint: Fingerprint, cases: Sequence[Case]) -> None:
    """Write a reference; the file appears when it is complete.

    Raises:
        ParityError: it cannot be written.
        DependencyError: safetensors is not installed.
    """
    numpy_io = _safetensors("safetensors.numpy")
    tensors: dict[str, NDArray[Any]] = {}
    entries = []
    for index, case in enumerate(cases):
        for name, array in _tensors_of(case).items():
            tensors[f"{index:04d}/{name}"] = np.ascontiguousarray(array)
        entries.append(
            {
                "name": case.name,
                "messages": list(case.messages),
                "max_tokens": case.max_tokens,
                "box": case.box,
                "grids": case.grids,
                "patches_sha256": case.patches_sha256,
            }
        )
    document = {"fingerprint": dataclasses.asdict(fingerprint), "cases": entries}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "document": json.dumps(document, ensure_ascii=False),
    }
    partial = path.with_name(path.name + ".partial")
    try:
        numpy_io.save_file(tensors, partial, metadata)
        os.replace(partial, path)
    except (OSError, _safetensors("safetensors").SafetensorError) as error:
        raise ParityError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _tensors_of(case: Case) -> dict[str, NDArray[Any]]:
    rows = case.rows
    tensors: dict[str, NDArray[Any]] = {
        "ids": case.ids.astype(np.int32),
        "positions": case.positions.astype(np.int32),
        "answer": case.answer.astype(np.int32),
        "greedy": case.greedy.astype(np.int32),
        "places": case.places.astype(np.int32),
        "top_ids": rows.top_ids.astype(np.int32),
        "top_logits": rows.top_logits,
        "lse": rows.lse,
        "tail": rows.tail,
        "next_logits": rows.next_logits,
        "best": rows.best.astype(np.int32),
    }
    if rows.logits is not None:
        tensors["logits"] = rows.logits
    for number, (png, (indices, values)) in enumerate(zip(case.images, case.features, strict=True)):
        tensors[f"image.{number}"] = np.frombuffer(png, np.uint8)
        tensors[f"feature_rows.{number}"] = indices.astype(np.int32)
        # Half precision is ample for a cosine; a model with values beyond its range keeps float32.
        fits = values.size == 0 or float(np.abs(values).max()) < 6e4
        tensors[f"features.{number}"] = values.astype(np.float16) if fits else values
    return tensors


class _CaseReader:
    """Reads the tensors of one case and refuses what cannot be right."""

    def __init__(self, reference: Reference, tensors: Any, names: frozenset[str], index: int) -> None:
        self._reference = reference
        self._tensors = tensors
        self._names = names
        self._index = index

    def read(self, entry: Mapping[str, Any]) -> Case:
        vocab, merge = self._reference.fingerprint.vocab, self._reference.fingerprint.image.merge_size
        ids = self._ints("ids", (None,), vocab)
        length = len(ids)
        self._demand(length > 0, "ids are empty")
        answer = self._ints("answer", (None,), vocab)
        places = self._ints("places", (None,), length + len(answer) - 1)
        count = len(places)
        self._demand(count == 0 or bool((np.diff(places) > 0).all()), "places do not ascend")
        top_ids = self._ints("top_ids", (count, None), vocab)
        top_k = top_ids.shape[1]
        self._demand(top_k > 0, "top_ids have no columns")
        distinct = np.diff(np.sort(top_ids, axis=1), axis=1) > 0
        self._demand(bool(distinct.all()), "top_ids hold a token twice in a row")
        rows = Rows(
            top_ids,
            self._floats("top_logits", (count, top_k), np.float32),
            self._floats("lse", (count,), np.float64),
            self._floats("tail", (count,), np.float64, minus_inf=True),
            self._floats("next_logits", (count,), np.float32),
            self._ints("best", (count,), vocab),
            self._floats("logits", (count, vocab), np.float32) if self._has("logits") else None,
        )
        total = np.logaddexp(rows.tail, np.logaddexp.reduce(rows.top_logits.astype(np.float64), axis=1))
        self._demand(bool(np.allclose(total, rows.lse, atol=1e-4)), "lse is not the sum of its parts")
        grids = tuple(tuple(grid) for grid in entry["grids"])
        images, features = [], []
        for number, (_, height, width) in enumerate(grids):
            tokens = height * width // merge**2
            indices = self._ints(f"feature_rows.{number}", (None,), tokens)
            images.append(self._array(f"image.{number}", (None,), ("U8",)).tobytes())
            values = self._floats(f"features.{number}", (len(indices), None), np.float32)
            features.append((indices, values))
        pictures = [
            part["image"]
            for message in entry["messages"]
            if isinstance(message["content"], list)
            for part in message["content"]
            if part["type"] == "image"
        ]
        self._demand(pictures == list(range(len(grids))), "messages and images do not agree")
        box = entry["box"]
        return Case(
            entry["name"],
            tuple(entry["messages"]),
            tuple(images),
            None if box is None else cast(Box, tuple(box)),
            entry["max_tokens"],
            ids,
            self._ints("positions", (3, length), 1 << 31),
            cast("tuple[tuple[int, int, int], ...]", grids),
            tuple(entry["patches_sha256"]),
            answer,
            self._ints("greedy", (None,), vocab),
            places,
            rows,
            tuple(features),
        )

    def _has(self, name: str) -> bool:
        return f"{self._index:04d}/{name}" in self._names

    def _array(self, name: str, shape: tuple[int | None, ...], kinds: tuple[str, ...]) -> NDArray[Any]:
        key = f"{self._index:04d}/{name}"
        self._demand(key in self._names, f"the tensor {key} is missing")
        header = self._tensors.get_slice(key)
        found = tuple(header.get_shape())
        fits = len(found) == len(shape) and all(b in (None, a) for a, b in zip(found, shape, strict=True))
        self._demand(
            fits and header.get_dtype() in kinds,
            f"{name} is {header.get_dtype()} {list(found)}, must be {' or '.join(kinds)} {list(shape)}",
        )
        array: NDArray[Any] = self._tensors.get_tensor(key)
        return array

    def _ints(self, name: str, shape: tuple[int | None, ...], limit: int) -> NDArray[np.int64]:
        array = self._array(name, shape, ("I32",)).astype(np.int64)
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        self._demand(
            array.size == 0 or (low >= 0 and high < limit),
            f"{name} range from {low} to {high}, must be 0 to {limit - 1}",
        )
        return array

    def _floats(
        self, name: str, shape: tuple[int | None, ...], dtype: Any, *, minus_inf: bool = False
    ) -> NDArray[Any]:
        kinds = ("F64",) if dtype is np.float64 else ("F32", "F16")
        array = self._array(name, shape, kinds).astype(dtype)
        fine = np.isfinite(array) | (np.isneginf(array) if minus_inf else False)
        self._demand(bool(fine.all()), f"{name} hold values that are not finite")
        return array

    def _demand(self, holds: bool, what: str) -> None:
        if not holds:
            name = self._reference.entries[self._index]["name"]
            raise _damaged(self._reference.path, f"case {name!r}: {what}")


def _fingerprint(document: Any) -> Fingerprint:
    fingerprint = read_record(Fingerprint, document, "fingerprint")
    if fingerprint.vocab < 1:
        raise ValueError(f"fingerprint.vocab is {fingerprint.vocab}, must be at least 1")
    return fingerprint


def _entry(document: Any) -> dict[str, Any]:
    """Check the JSON part of a case, and return it."""
    keys = {"name", "messages", "max_tokens", "box", "grids", "patches_sha256"}
    if set(document) != keys:
        raise ValueError(f"a case has the keys {sorted(document)}")
    box, grids = document["box"], document["grids"]
    sizes = [box] if box is not None else []
    numbers = [document["max_tokens"], *(value for item in [*sizes, *grids] for value in item)]
    if any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in numbers):
        raise ValueError("a size that is no natural number")
    if any(len(item) != 4 for item in sizes) or any(len(grid) != 3 for grid in grids):
        raise ValueError("a box without four numbers or a grid without three")
    texts = [document["name"], *document["patches_sha256"]]
    if not all(isinstance(text, str) for text in texts) or len(document["patches_sha256"]) != len(grids):
        raise ValueError("a name or digest that is no text")
    for message in document["messages"]:
        content = message["content"]
        if not isinstance(message["role"], str) or not isinstance(content, str | list):
            raise ValueError("a message that is none")
        for part in content if isinstance(content, list) else ():
            if part["type"] not in ("text", "image") or not isinstance(part[part["type"]], str | int):
                raise ValueError("a message part that is none")
    return dict(document)


def _opened(file: Path) -> Any:
    """The file behind safetensors' reader, as a context manager."""
    library = _safetensors("safetensors")
    try:
        return library.safe_open(file, framework="numpy")
    except (library.SafetensorError, OSError) as error:
        raise ParityError(
            f"{file} is no safetensors file, or was cut short ({error}); record it again"
        ) from error


def _safetensors(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise DependencyError(
            "a reference is read with the package safetensors, which is not installed; "
            "run pip install safetensors"
        ) from error


def _damaged(file: Path, what: str) -> EdgeError:
    return ParityError(f"the reference {file} is damaged: {what}; record it again")
