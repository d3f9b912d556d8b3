"""Write down which operators a release of onnxruntime can run on a CPU, for the check of `export --android`.

    python -m venv /tmp/ort && /tmp/ort/bin/pip install onnxruntime==1.27.0
    /tmp/ort/bin/python scripts/android_operators.py > export/app/android_operators.json

Run it with a Python that has the release of onnxruntime-android that apps take: the wheel and the Android
package of a release are built from the same sources and register the same CPU operators. Schemas and kernels
come from the library itself. Only what opset 23 and onnxruntime's own domain, the ones of our graphs, can use
is written: the newest schema that they see, and the kernels that take it. Needs onnxruntime, nothing else.
"""

from __future__ import annotations

import json
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as library

OPSETS = {"": 23, "com.microsoft": 1}
"""By domain; what export/ writes."""
OPEN_END = 2**31 - 1
"""Stands for "and all later" in the library."""


def main() -> None:
    """Print the table as JSON, one operator a line."""
    operators = {}
    for (domain, name), schema in sorted(_schemas().items()):
        kernels = _kernels(domain, name, schema.since_version)
        if kernels:
            operators[f"{domain}:{name}"] = {
                "since": schema.since_version,
                "attributes": sorted(schema.attributes),
                "inputs": [_parameter(item, schema) for item in schema.inputs],
                "outputs": [_parameter(item, schema) for item in schema.outputs],
                "min_inputs": schema.min_input,
                "max_inputs": min(schema.max_input, OPEN_END),
                "kernels": kernels,
            }
    head = {
        "onnxruntime": onnxruntime.__version__,
        "made_by": "scripts/android_operators.py",
        "opsets": OPSETS,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    rows = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in operators.items()]
    print("{\n" + "\n".join(lines) + '\n  "operators": {\n' + ",\n".join(rows) + "\n  }\n}")


def _schemas() -> dict[tuple[str, str], Any]:
    """The newest schema of each operator that our opsets see."""
    found: dict[tuple[str, str], Any] = {}
    for schema in library.get_all_operator_schema():
        key = (schema.domain, schema.name)
        seen = schema.domain in OPSETS and schema.since_version <= OPSETS[schema.domain]
        if seen and (key not in found or found[key].since_version < schema.since_version):
            found[key] = schema
    return {key: schema for key, schema in found.items() if not schema.deprecated}


def _kernels(domain: str, name: str, since: int) -> list[dict[str, list[str]]]:
    """The number types that CPU kernels of a schema take, by the names of its type variables."""
    kernels = []
    for kernel in library.get_all_opkernel_def():
        first, last = kernel.version_range
        if (kernel.provider, kernel.domain, kernel.op_name) != ("CPUExecutionProvider", domain, name):
            continue
        if first <= since <= last:
            kernels.append(
                {
                    key: sorted(_plain(kind) for kind in kinds)
                    for key, kinds in kernel.type_constraints.items()
                }
            )
    return kernels


def _parameter(item: Any, schema: Any) -> list[Any]:
    """Name, type variable or type, and whether it may be repeated; a variable of one type is that type."""
    kind = item.typeStr
    for variable in schema.type_constraints:
        if variable.type_param_str == kind and len(variable.allowed_type_strs) == 1:
            (kind,) = variable.allowed_type_strs
    return [item.name, _plain(kind), "Variadic" in str(item.option)]


def _plain(kind: str) -> str:
    """`tensor(float)` is written float; other types stay as they are."""
    return kind.removeprefix("tensor(").removesuffix(")") if kind.startswith("tensor(") else kind


if __name__ == "__main__":
    main()
