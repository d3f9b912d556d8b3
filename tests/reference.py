"""Calls of the transformers model that parity tests compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from autoglm_edge.runtime.prompt.build import Prompt


def model_inputs(model: Any, prompt: Prompt) -> dict[str, torch.Tensor]:
    """What transformers' processor would give for this prompt."""
    ids = torch.tensor(prompt.ids[None].copy())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        inputs["pixel_values"] = torch.tensor(np.concatenate([image.pixel_values for image in prompt.images]))
        inputs["image_grid_thw"] = torch.tensor([image.grid for image in prompt.images])
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    return inputs


def reference_logits(model: Any, prompt: Prompt) -> np.ndarray:
    """Logits (T, V) of every position."""
    with torch.no_grad():
        return np.asarray(model(**model_inputs(model, prompt)).logits[0].float())


def reference_greedy(model: Any, prompt: Prompt, tokens: int, known_ids: int) -> list[int]:
    """Greedy ids of `generate`, the end token included if it came.

    The engine never picks an id that the tokenizer does not know; a random model would, so it is told not to.
    """
    padding = list(range(known_ids, model.config.text_config.vocab_size)) or None
    with torch.no_grad():
        out = model.generate(
            **model_inputs(model, prompt),
            max_new_tokens=tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            suppress_tokens=padding,
        )
    return [int(token) for token in out[0, len(prompt.ids) :]]
