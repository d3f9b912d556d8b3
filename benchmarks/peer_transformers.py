"""transformers on torch, bfloat16, eager, on the CPU. The model of a job is a checkpoint folder.

The whole Glm4vForConditionalGeneration is loaded; only its text side runs. torch takes its own bfloat16
kernels.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from peer_job import Job, main
from transformers import DynamicCache, Glm4vForConditionalGeneration
from transformers.utils import logging


class Transformers:
    """One cache of one model."""

    def __init__(self, job: Job) -> None:
        """Load the checkpoint, mapped."""
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        torch.set_num_threads(job.threads)
        loaded = Glm4vForConditionalGeneration.from_pretrained(job.model, dtype=torch.bfloat16)
        self._model = loaded.eval()
        self._cache = DynamicCache(config=loaded.config.text_config)
        self.facts: dict[str, Any] = {
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "bf16_on_matrix_units": torch.backends.cpu.get_cpu_capability(),
        }

        # The argument has another name from transformers 5.24 on.
        names = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"

    def reset(self) -> None:
        """An empty cache."""
        self._cache = DynamicCache(config=self._model.config.text_config)

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> None:
        """Append tokens, score the last."""
        start = self._cache.get_seq_length()
        positions = torch.arange(start, start + len(ids)).expand(3, 1, -1)
        done = self._model(
            input_ids=torch.tensor([list(ids)]),
            position_ids=positions,
            **{self._cache_name: self._cache},
            use_cache=True,
            logits_to_keep=1,
        )
        if not torch.isfinite(done.logits.flatten()[0]):
            raise RuntimeError("the scores are not finite")


if __name__ == "__main__":
    raise SystemExit(main(Transformers))
