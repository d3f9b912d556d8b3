"""OpenVINO, reading the decoder graph of a bundle of this project. The model of a job is a bundle.

Compiled for latency with as many threads as the others. Its CPU plug-in may quantize activations on the way
(dynamic quantization, its default for compressed weights); inputs are hidden states, so the embedding is not
part of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from peer_job import Job, main


class OpenVino:
    """One request; the cache goes out, is copied, and comes in again: some milliseconds at these lengths."""

    def __init__(self, job: Job) -> None:
        """Read and compile the decoder."""
        folder = Path(job.model)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        core = openvino.Core()
        options = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
        model = core.read_model(str(folder / manifest["parts"]["decoder"]["graph"]))
        self._request = core.compile_model(model, "CPU", options).create_infer_request()
        self._geometry = job.geometry
        self._layers = range(job.geometry["layers"])
        self._hidden = np.random.default_rng(0).standard_normal((512, job.geometry["hidden"]), np.float32)
        self._used = 0
        self.facts: dict[str, Any] = {"version": f"openvino {metadata.version('openvino')}"}

    def reset(self) -> None:
        """An empty cache."""
        shape = (1, self._geometry["kv_heads"], 0, self._geometry["head_dim"])
        for layer in self._layers:
            for kind in ("key", "value"):
                empty = openvino.Tensor(np.zeros(shape, np.float32))
                self._request.set_tensor(f"past_key_values.{layer}.{kind}", empty)
        self._used = 0

    def feed(self, ids: Sequence[int]) -> None:
        """Append so many tokens in one piece, score the last."""
        count, total = len(ids), self._used + len(ids)
        rows = np.resize(self._hidden, (1, count, self._geometry["hidden"]))
        positions = np.broadcast_to(np.arange(self._used, total, dtype=np.int64), (3, 1, count))
        feeds = {
            "inputs_embeds": rows,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.ascontiguousarray(positions),
        }
        for name, array in feeds.items():
            self._request.set_tensor(name, openvino.Tensor(array))
        self._request.infer()
        if not np.isfinite(self._request.get_tensor("logits").data.reshape(-1)[0]):
            raise RuntimeError("the scores are not finite")
        for layer in self._layers:
            for kind in ("key", "value"):
                now = self._request.get_tensor(f"present.{layer}.{kind}").data
                self._request.set_tensor(f"past_key_values.{layer}.{kind}", openvino.Tensor(np.array(now)))
        self._used = total


if __name__ == "__main__":
    raise SystemExit(main(OpenVino))
