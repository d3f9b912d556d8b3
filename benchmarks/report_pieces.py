"""How figures are written in the tables of docs/benchmarks.md.

In: values out of the benchmarks' documents. Out: cells and lines. Knows nothing of what is a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
"""Documents by the name of their file, without its ending."""

BENCHES = {
    "bench-int4": "INT4",
    "bench-int4-b128": "INT4, blocks of 128",
    "bench-int4-prefill": "INT4 + int8 prefill",
    "bench-int8": "INT8",
}
MISSING = "not measured"


def where(document: Mapping[str, Any]) -> str:
    """When, on what and with what a document was made."""
    machine = document["machine"]
    if isinstance(machine, str):
        return f"{document['date']}, {machine}, onnxruntime {document['onnxruntime']}."
    units = " ".join(machine["units"])
    return (
        f"{document['date']}, {machine['processor']}, {machine['cores']} cores ({units}), "
        f"onnxruntime {machine['onnxruntime']}, {document.get('threads', machine['cores'])} threads."
    )


def layers_of(document: Mapping[str, Any] | None) -> str:
    """How much of the model a comparison was of."""
    return f"{document['geometry']['layers']} layers and head" if document else "9B shape"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def memory(peak: Mapping[str, Any]) -> str:
    """Both kinds of memory at a peak."""
    anonymous, mapped = peak.get("anon_bytes"), peak.get("file_bytes")
    if anonymous is None or mapped is None:
        return "not available"
    return f"{anonymous / 1e9:.2f} GB anonymous, {mapped / 1e9:.2f} GB mapped"


def gigabytes(value: float | None) -> str | None:
    """Bytes in GB; None stays None."""
    return written(None if value is None else value / 1e9, "{:.2f} GB")


def written(value: float | None, form: str) -> str | None:
    """A figure in a form; None stays None."""
    return None if value is None else form.format(value)
