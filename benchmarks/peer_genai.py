"""onnxruntime-genai, loading a bundle of this project: its own loop and cache over the same weights.

The model of a job is a bundle, which holds a genai_config.json. Its decoder takes and returns the cache as
new tensors, because that is what this engine can do with the graph's inputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from peer_job import Job, main


class Genai:
    """One generator at a time."""

    def __init__(self, job: Job) -> None:
        """Load the bundle; threads are set in its configuration, for this process only."""
        config = genai.Config(job.model)
        threads = {"session_options": {"intra_op_num_threads": job.threads}}
        config.overlay(json.dumps({"model": {part: threads for part in ("decoder", "embedding")}}))
        self._model = genai.Model(config)
        self._longest = job.longest
        self._generator: Any = None
        self.facts: dict[str, Any] = {"version": f"onnxruntime-genai {metadata.version('onnxruntime-genai')}"}

    def reset(self) -> None:
        """Begin a sequence."""
        params = genai.GeneratorParams(self._model)
        params.set_search_options(max_length=self._longest, do_sample=False)
        self._generator = genai.Generator(self._model, params)

    def feed(self, ids: Sequence[int]) -> None:
        """Append tokens; reads the scores of the last, so that they are there."""
        self._generator.append_tokens(np.array(ids, np.int32))
        scores = self._generator.get_logits()
        if not np.isfinite(scores.reshape(-1)[0]):
            raise RuntimeError("the scores are not finite")


if __name__ == "__main__":
    raise SystemExit(main(Genai))
