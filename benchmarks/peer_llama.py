"""llama.cpp through the low-level calls of llama-cpp-python. The model of a job is a GGUF file.

As its documentation has it for speed on a CPU: weights repacked for the instruction set at load (the
default), flash attention, prompts in batches of up to 2,048 tokens and micro-batches of 512, threads equal to
cores.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import llama_cpp
from peer_job import Job, main

BATCH, MICRO_BATCH = 2048, 512


class Llama:
    """One context of one model."""

    def __init__(self, job: Job) -> None:
        """Load the file.

        Raises:
            RuntimeError: llama.cpp refuses it.
        """
        _silence()
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            job.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the model")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = 256 * math.ceil(job.longest / 256)
        params.n_batch, params.n_ubatch, params.n_seq_max = BATCH, MICRO_BATCH, 1
        params.n_threads = params.n_threads_batch = job.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._used = 0
        self.facts: dict[str, Any] = {
            "version": f"llama-cpp-python {metadata.version('llama-cpp-python')}",
            "file_bytes": os.path.getsize(job.model),
            "parameters": int(llama_cpp.llama_model_n_params(self._model)),
            "built_for": llama_cpp.llama_print_system_info().decode(),
        }

    def reset(self) -> None:
        """Forget the sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        self._used = 0

    def feed(self, ids: Sequence[int]) -> None:
        """Append tokens, score the last."""
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            batch = self._batch
            batch.n_tokens = len(part)
            for place, token in enumerate(part):
                batch.token[place] = token
                batch.pos[place] = self._used + place
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = 0
                batch.logits[place] = start + place == len(ids) - 1
            if status := llama_cpp.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode returned {status}")
            self._used += len(part)
        llama_cpp.llama_synchronize(self._context)
        scores = llama_cpp.llama_get_logits_ith(self._context, -1)
        if not math.isfinite(scores[0]):
            raise RuntimeError("the scores are not finite")


@llama_cpp.llama_log_callback
def _drop(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    return


def _silence() -> None:
    if not os.environ.get("PEER_VERBOSE"):
        llama_cpp.llama_log_set(_drop, ctypes.c_void_p(0))


if __name__ == "__main__":
    raise SystemExit(main(Llama))
