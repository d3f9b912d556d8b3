"""This project's runtime, as a process that `compare.py` measures. The model of a job is a bundle.

The graphs are called directly (`GraphSequence`): no template, no sampling. The runtime chooses which graph
reads prompts and where weights are; the report says what it chose.
"""

from __future__ import annotations

import dataclasses
from importlib import metadata
from typing import Any

import onnxruntime
from peer_job import Job, main

from autoglm_edge.measure.graphs import GraphSequence
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.session import SessionOptions


class Ours(GraphSequence):
    """One cache of one bundle."""

    def __init__(self, job: Job) -> None:
        """Load decoder and embedding."""
        bundle = Bundle.open(job.model)
        model = Model(bundle, SessionOptions("cpu", job.threads, prefill=job.prompts))
        super().__init__(model, job.longest)
        self.facts: dict[str, Any] = {
            "version": f"autoglm-edge {metadata.version('autoglm-edge')}, "
            f"onnxruntime {onnxruntime.__version__}",
            "plan": dataclasses.asdict(model.plan),
        }


if __name__ == "__main__":
    raise SystemExit(main(Ours))
