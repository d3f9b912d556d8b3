"""What is prepared of a bundle on this machine, as documents and words.

In: a bundle. Out: the state of each part. Shared by `autoglm prepare` and `autoglm info`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .quantities import format_bytes

if TYPE_CHECKING:
    from autoglm_edge.runtime.bundle import Bundle


def prepared_parts(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """State of each part that can be prepared, by name."""
    from autoglm_edge.runtime.machine.prepared import prepared_state
    from autoglm_edge.runtime.plan import PREPARED_PARTS

    parts = {}
    for part in PREPARED_PARTS:
        state = prepared_state(bundle, part)
        parts[part] = {
            "ready": state.ready,
            "reason": state.reason,
            "bytes": state.bytes,
            "folder": str(state.graph.parent),
        }
    return parts


def describe(state: dict[str, Any]) -> str:
    """A state as `prepared_parts` gives it, in words."""
    if state["ready"]:
        return f"prepared, {format_bytes(state['bytes'])} in {state['folder']}"
    return str(state["reason"])
