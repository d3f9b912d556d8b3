"""Figures of a report, written into the bundle that they were measured on.

In: a bundle folder and a report about it. Out: the manifest's `figures` and the section "Figures" of the
model card. Nothing else is touched, and the bundle's fingerprint stays the same: it covers neither.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from autoglm_edge.errors import BundleError, ParityError
from autoglm_edge.runtime.bundle import CARD_NAME, Bundle
from autoglm_edge.runtime.manifest import MANIFEST_NAME, FileEntry

from .report import Report

_SECTION = re.compile(r"(^## Figures\n\n)(.*?)(?=\n## |\Z)", re.MULTILINE | re.DOTALL)


def write_figures(bundle: str | Path, report: Report) -> Bundle:
    """Write a report's figures into the manifest and the card.

    Figures of other measurements stay. The two files are replaced one right after the other.

    Raises:
        BundleError: no usable bundle, or it cannot be written.
        ParityError: the report is about other files.
    """
    opened = Bundle.open(bundle)
    if opened.fingerprint != report.bundle.fingerprint:
        raise ParityError(
            f"the report is about the bundle {report.bundle.fingerprint[:12]}, {opened.path} is "
            f"{opened.fingerprint[:12]}; validate it again"
        )
    figures = {**opened.manifest.figures, **report.figures()}
    files = opened.manifest.files
    replaced: list[tuple[Path, bytes]] = []
    if any(entry.path == CARD_NAME for entry in files):
        card = _with_figures(opened.file(CARD_NAME).read_text(encoding="utf-8"), figures).encode()
        entry = FileEntry(CARD_NAME, len(card), hashlib.sha256(card).hexdigest())
        files = tuple(entry if item.path == CARD_NAME else item for item in files)
        replaced.append((opened.path / CARD_NAME, card))
    manifest = dataclasses.replace(opened.manifest, files=files, figures=figures)
    replaced.append((opened.path / MANIFEST_NAME, manifest.to_json().encode()))
    try:
        for path, content in replaced:
            path.with_name(f".{path.name}.new").write_bytes(content)
        for path, _ in replaced:
            os.replace(path.with_name(f".{path.name}.new"), path)
    except OSError as error:
        raise BundleError(f"{opened.path} cannot be written: {error.strerror or error}") from error
    finally:
        for path, _ in replaced:
            path.with_name(f".{path.name}.new").unlink(missing_ok=True)
    return Bundle.open(opened.path)


def _with_figures(card: str, figures: dict[str, Any]) -> str:
    """The card with its section of figures written anew, or with one at its end."""
    lines = ["| figure | value |", "| --- | --- |"]
    lines += [f"| {name.replace('_', ' ')} | {value} |" for name, value in sorted(figures.items())]
    table = "\n".join(lines) + "\n"
    if _SECTION.search(card) is None:
        return f"{card.rstrip()}\n\n## Figures\n\n{table}"
    return _SECTION.sub(lambda match: match[1] + table, card, count=1)
