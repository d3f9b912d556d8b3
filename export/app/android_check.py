"""Can a release of onnxruntime for Android run a graph? Asked of a table of its operators.

In: a graph without its weights, and the table `android_operators.json` (scripts/android_operators.py makes
it). Out: what is wrong, sentence by sentence; nothing if all is well. Knows nothing of bundles and apps.

For every node: the operator is there at the graph's opset, knows the node's attributes and takes as many
inputs, and a CPU kernel takes their number types. Types are followed through the graph by the operators' own
schemas. Where a kernel takes float32 only, onnxruntime itself puts casts around a float16 node.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import onnx

from autoglm_edge.errors import ExportError

TABLE_NAME = "android_operators.json"
IR_VERSIONS = range(10, 12)
"""Of the files that were loaded with that release; ours are 11."""
_STANDARD = ("", "ai.onnx")
_TYPES = {value: name.lower() for name, value in onnx.TensorProto.DataType.items() if name != "UNDEFINED"}


@dataclass(frozen=True)
class Operator:
    """An operator as a release knows it.

    Attributes:
        attributes: their names.
        inputs: type, or variable of a type, of each.
        outputs: the same.
        repeats: the last input may be repeated.
        min_inputs: fewest.
        max_inputs: most.
        kernels: the types that each CPU kernel takes, by variable.
    """

    attributes: frozenset[str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    repeats: bool
    min_inputs: int
    max_inputs: int
    kernels: tuple[Mapping[str, frozenset[str]], ...]


@dataclass(frozen=True)
class Table:
    """The operators of a release.

    Attributes:
        onnxruntime: the release.
        opsets: by domain, what the table is for.
        operators: by "domain:name".
    """

    onnxruntime: str
    opsets: Mapping[str, int]
    operators: Mapping[str, Operator]


@cache
def android_table() -> Table:
    """The table that comes with the package.

    Raises:
        ExportError: the package was installed without its data.
    """
    try:
        document = json.loads(
            resources.files(__package__ or "").joinpath(TABLE_NAME).read_text(encoding="utf-8")
        )
        return read_table(document)
    except OSError as error:
        raise ExportError(f"{TABLE_NAME} is not in the package; reinstall autoglm-edge") from error


def read_table(document: Mapping[str, Any]) -> Table:
    """A table from what scripts/android_operators.py writes.

    Raises:
        ExportError: it is not of that form.
    """
    try:
        operators = {
            name: Operator(
                attributes=frozenset(entry["attributes"]),
                inputs=tuple(kind for _, kind, _ in entry["inputs"]),
                outputs=tuple(kind for _, kind, _ in entry["outputs"]),
                repeats=bool(entry["inputs"]) and bool(entry["inputs"][-1][2]),
                min_inputs=int(entry["min_inputs"]),
                max_inputs=int(entry["max_inputs"]),
                kernels=tuple(
                    {variable: frozenset(kinds) for variable, kinds in kernel.items()}
                    for kernel in entry["kernels"]
                ),
            )
            for name, entry in document["operators"].items()
        }
        return Table(str(document["onnxruntime"]), dict(document["opsets"]), operators)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"{TABLE_NAME} has another form ({error!r}); make it anew") from error


def check_graph(model: onnx.ModelProto, table: Table) -> list[str]:
    """What of a graph the release cannot run; each fault once.

    Args:
        model: weights may be left out; graphs in attributes are looked into.
        table: of the release.
    """
    found = list(_opset_faults(model, table))
    types = {value.name: _type_of(value) for value in (*model.graph.input, *model.graph.output)}
    found += _graph_faults(model.graph, table, types)
    return list(dict.fromkeys(found))


def _opset_faults(model: onnx.ModelProto, table: Table) -> Iterator[str]:
    if model.ir_version not in IR_VERSIONS:
        yield f"the file has IR version {model.ir_version}, {IR_VERSIONS[0]} to {IR_VERSIONS[-1]} were tried"
    if model.functions:
        yield f"the graph has {len(model.functions)} functions, which the table says nothing of"
    for item in model.opset_import:
        domain = "" if item.domain in _STANDARD else item.domain
        if table.opsets.get(domain) != item.version:
            known = table.opsets.get(domain, "none")
            yield f"the graph has opset {item.version} of {domain or 'ai.onnx'}, the table is for {known}"


def _graph_faults(graph: onnx.GraphProto, table: Table, types: dict[str, str | None]) -> Iterator[str]:
    types.update((tensor.name, _TYPES.get(tensor.data_type)) for tensor in graph.initializer)
    for node in graph.node:
        label = f"{'' if node.domain in _STANDARD else node.domain}:{node.op_type}"
        operator = table.operators.get(label)
        if operator is None:
            yield f"{label.lstrip(':')} is no operator of onnxruntime {table.onnxruntime} at this opset"
            types.update((name, None) for name in node.output)
            continue
        yield from _node_faults(node, operator, label.lstrip(":"), table.onnxruntime, types)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graph_faults(inner, table, dict(types))


def _node_faults(
    node: onnx.NodeProto, operator: Operator, label: str, release: str, types: dict[str, str | None]
) -> Iterator[str]:
    for attribute in node.attribute:
        if attribute.name not in operator.attributes:
            yield f"{label} of onnxruntime {release} has no attribute {attribute.name!r}"
    if not operator.min_inputs <= len(node.input) <= operator.max_inputs:
        yield (
            f"{label} has {len(node.input)} inputs, onnxruntime {release} takes {operator.min_inputs} to "
            f"{operator.max_inputs}"
        )
    bound: dict[str, str] = {}
    for name, kind in zip(node.input, _repeated(operator, len(node.input)), strict=False):
        found = types.get(name) if name else None
        if found is not None and kind.islower() and kind in _TYPES.values() and kind != found:
            yield f"{label} of onnxruntime {release} takes {kind}, gets {found}"
        if found is not None:
            bound.setdefault(kind, found)
    bound.update(_chosen(node))
    if not any(_takes(kernel, bound) for kernel in operator.kernels) and not any(
        _takes(kernel, _widened(bound)) for kernel in operator.kernels
    ):
        kinds = ", ".join(f"{variable} = {kind}" for variable, kind in sorted(bound.items()))
        yield f"{label} has no CPU kernel for {kinds} in onnxruntime {release}"
    for name, kind in zip(node.output, operator.outputs, strict=False):
        if name:
            types[name] = _output_type(node, kind, bound)


def _repeated(operator: Operator, count: int) -> Sequence[str]:
    """Kinds of `count` inputs."""
    spare = count - len(operator.inputs)
    return (*operator.inputs, *([operator.inputs[-1]] * spare if operator.repeats and spare > 0 else []))


def _chosen(node: onnx.NodeProto) -> dict[str, str]:
    """Types that an attribute chooses: of Cast, by its schema's name of the output."""
    wanted = [item.i for item in node.attribute if item.name == "to"] if node.op_type == "Cast" else []
    return {"T2": _TYPES.get(wanted[0], "")} if wanted else {}


def _output_type(node: onnx.NodeProto, kind: str, bound: Mapping[str, str]) -> str | None:
    if kind in bound:
        return bound[kind]
    if kind in _TYPES.values():
        return kind
    if node.op_type == "QuantizeLinear":  # without a zero point
        return "uint8"
    return None


def _takes(kernel: Mapping[str, frozenset[str]], bound: Mapping[str, str]) -> bool:
    return all(kind in kernel.get(variable, (kind,)) for variable, kind in bound.items())


def _widened(bound: Mapping[str, str]) -> dict[str, str]:
    return {variable: "float" if kind == "float16" else kind for variable, kind in bound.items()}


def _type_of(value: onnx.ValueInfoProto) -> str | None:
    return _TYPES.get(value.type.tensor_type.elem_type)
