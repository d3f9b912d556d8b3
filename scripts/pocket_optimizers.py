"""Optimizers of the pocket model, and how their rates go over the steps.

In: a model in training and peak rates. Out: optimizers; a share of the peak for a step. This module knows
nothing of losses.
"""

from __future__ import annotations

import math

import torch
from pocket_model import PocketForward


def make_optimizers(
    trained: PocketForward, vision_rate: float, text_rate: float, rest_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, head, convolutions, norms and biases.

    Parameters without gradient requirement are left out. The learning rates given are the peak rates.
    """
    vision, text, rest = [], [], []
    for name, parameter in trained.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim == 2 and not any(
            part in name for part in ("embed", "lm_head", "cell_head", "place_head", "state_head")
        )
        (rest if not is_matrix else vision if ".visual." in name else text).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=rest_rate, betas=(0.9, 0.98), weight_decay=0.0)
    ]
    for parameters, rate in ((vision, vision_rate), (text, text_rate)):
        if parameters:
            optimizers.append(torch.optim.Muon(parameters, lr=rate, weight_decay=0.05))
    return optimizers


def rate_factor(step: int, steps: int, warm_up: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine to 2 %."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
