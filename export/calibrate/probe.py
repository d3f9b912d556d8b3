"""A float graph with open ends: weights come in with every run, inputs of its matrices go out.

In: the plan of a float graph, such as one layer by itself. Out: a `Probe`, which runs it on the CPU with the
weights of any layer of that shape. Knows nothing of the model and of what is done with the outputs.

Rules of the rewriting: every initializer of the weight plan becomes a graph input of its name. A matrix
that was to be stored transposed, for MatMul, comes as the checkpoint has it, (rows, columns), and its MatMul
becomes a FusedMatMul that reads it transposed, so no copy of it is made. The left side of that product
becomes a graph output, unless it is one already or is a graph input. Constants stay, and all else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from autoglm_edge.errors import ExportError
from autoglm_edge.export.graphs.plan import PartPlan
from autoglm_edge.export.weights.rows import Rows
from autoglm_edge.runtime.machine.topology import usable_cores
from autoglm_edge.runtime.session import shrinking_run

Floats = NDArray[np.float32]


class Probe:
    """A graph, ready to run with weights of one's choice.

    Attributes:
        inputs_of: name of a matrix of the plan -> graph output that holds what it is multiplied with; the
            same one for matrices that have the same input.
    """

    def __init__(self, plan: PartPlan) -> None:
        """Open the ends of a plan's graph and load it. The plan cannot be used for anything else afterwards.

        Raises:
            ExportError: onnxruntime does not take the graph.
        """
        self.inputs_of = _open_ends(plan)
        self._weights = plan.weights
        self._name = plan.name
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = usable_cores()
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        settings.use_deterministic_compute = True
        self._shrink = shrinking_run()
        graph = ir.to_proto(plan.model).SerializeToString()
        try:
            self._session = ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise ExportError(
                f"the graph {plan.name} for the calibration cannot be loaded by onnxruntime "
                f"{ort.__version__} ({error}); report this with the version"
            ) from error

    def read_weights(self, store: Rows, own: str = "", stem: str = "") -> dict[str, Floats]:
        """Read all weights from a checkpoint, as float32.

        Args:
            store: the checkpoint.
            own: how weights begin in this graph, such as "layer.".
            stem: how they begin in the checkpoint in its place, such as "model.language_model.layers.3.".
        """
        found = {}
        for weight in self._weights:
            source = stem + weight.source.removeprefix(own)
            stored = store.shape(source)
            count = stored[weight.permute[0] if weight.permute else 0]
            values = store.rows(source, 0, count, permute=weight.permute)
            shape = (weight.rows, weight.columns) if weight.action == "transpose" else weight.pieces[0].shape
            found[weight.name] = values.reshape(shape)
            store.release(source)
        return found

    def run(
        self, weights: Mapping[str, Floats], feeds: Mapping[str, NDArray[Any]], fetches: Sequence[str]
    ) -> list[Floats]:
        """Run once.

        Args:
            weights: from `read_weights`.
            feeds: the other inputs of the graph.
            fetches: outputs to return, of the graph itself or of `inputs_of`.

        Raises:
            ExportError: onnxruntime fails, most likely for want of memory.
        """
        try:
            found: list[Floats] = self._session.run(list(fetches), {**weights, **feeds}, self._shrink)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise ExportError(
                f"the calibration fails in the graph {self._name} ({error}); take a set with smaller pictures"
            ) from error
        return found


def _open_ends(plan: PartPlan) -> dict[str, str]:
    """Rewrite the graph in place; returns the output that holds the input of each matrix."""
    graph = plan.model.graph
    given = {value.name for value in graph.inputs}
    declared = {value.name for value in graph.outputs}
    found: dict[str, str] = {}
    for weight in plan.weights:
        value = graph.initializers.pop(weight.name)
        graph.inputs.append(value)
        if weight.action != "transpose":
            continue
        value.shape = ir.Shape((weight.rows, weight.columns))
        for node in value.consumers():
            node.domain, node.op_type, node.version = "com.microsoft", "FusedMatMul", 1
            node.attributes["transB"] = ir.AttrInt64("transB", 1)
            left = node.inputs[0]
            if left is None or left.name is None or left.name in given:
                continue
            if left.name not in declared:
                left.type = ir.TensorType(ir.DataType.FLOAT)
                graph.outputs.append(left)
                declared.add(left.name)
            found[weight.name] = left.name
    return found
