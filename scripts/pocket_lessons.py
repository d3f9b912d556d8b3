"""Lessons of the pocket model beside its answers: what is seen is named, placed, looked at and pointed to.

In: image tokens, what was watched while the decoder read, and the labels of a batch. Out: losses. Some use
the heads of `PocketForward` that are thrown away. This module knows nothing of schedules and optimizers.

Shapes: B screens, N image tokens, Q pointers, S prefix, L row length, C text width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from pocket_model import PocketForward, Watched
from pocket_rows import ABSENT
from torch import Tensor


def cell_loss(
    trained: PocketForward, image: Tensor, cells: Tensor, class_weight: float = 1.0, everywhere: bool = False
) -> Tensor:
    """Loss of the thrown-away head: image tokens (B, N, C) against cell labels (B, N, 7).

    `class_weight` is the extra weight of naming the element in cells that show one. Cells that show
    neither its text nor its icon are spared, unless `everywhere`.
    """
    out, target = trained.cell_head(image).float().flatten(0, 1), cells.flatten(0, 1)
    classes, digits, state = out.split((trained.num_classes, 40, 3), -1)
    background = trained.num_classes - 1
    shown = (target[:, 0] != background).float()
    weight = shown / shown.sum().clamp(min=1)
    can_name = torch.ones_like(shown) if everywhere else target[:, 6].float()
    naming = F.cross_entropy(classes, target[:, 0], reduction="none") * can_name
    loss = naming.mean() + class_weight * (naming * shown).sum() / (can_name * shown).sum().clamp(min=1)
    for index, part in enumerate(digits.split(10, -1)):
        loss = loss + 0.5 * (F.cross_entropy(part, target[:, index + 1], reduction="none") * weight).sum()
    return loss + 0.5 * (F.cross_entropy(state, target[:, 5], reduction="none") * weight).sum()


def place_loss(
    trained: PocketForward, watched: Watched, batch: dict[str, Tensor], with_state: bool
) -> Tensor:
    """Ask that the label in a thought knows where it points to, by other heads that are thrown away.

    With `with_state` it must know the state of a switch there, too.
    """
    wanted, asked = find_targets(batch)
    pointers = batch["pointers"][..., :1].clamp(min=0)
    middle = watched.middle.gather(1, pointers.expand(-1, -1, watched.middle.shape[-1]))[asked]
    cell = wanted.int().argmax(-1)[..., None].expand(-1, -1, batch["cells"].shape[-1])
    target = batch["cells"].gather(1, cell)[asked]
    out = trained.place_head(middle).float().split(10, -1)
    loss = torch.zeros(())
    for index, part in enumerate(out):
        loss = loss + F.cross_entropy(part, target[:, index + 1])
    if with_state:
        loss = loss + F.cross_entropy(trained.state_head(middle).float(), target[:, 5])
    return loss


def alignment_loss(trained: PocketForward, image: Tensor, cells: Tensor, label_tokens: Tensor) -> Tensor:
    """Pull each image token towards the input embedding of its label's text.

    Args:
        trained: for its embeddings.
        image: (B, N, C).
        cells: (B, N, 7) cell labels.
        label_tokens: (labels, V), row l averages the tokens of label l.
    """
    names = label_tokens @ trained.model.model.language_model.embed_tokens.weight
    scores = 16 * F.normalize(image.float(), dim=-1) @ F.normalize(names.float(), dim=-1).T
    is_silent = (cells[..., 0] == trained.num_classes - 1) | (cells[..., 6] == 0)
    target = cells[..., 0].masked_fill(is_silent, -1)
    return F.cross_entropy(scores.flatten(0, 1), target.flatten(), ignore_index=-1)


def find_targets(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Where the pointers of a batch should point.

    Returns:
        (B, Q, N) bool, the image cells that show the label of each pointer; (B, Q) bool, whether any do.
    """
    wanted = batch["cells"][:, None, :, 0] == batch["pointers"][..., 1:]
    wanted &= batch["cells"][:, None, :, 6] > 0
    return wanted, wanted.any(-1)


def pointing_loss(watched: Watched, batch: dict[str, Tensor], with_absent: bool) -> Tensor:
    """Ask that attention from the label in a thought goes to the image cells that show it.

    With `with_absent` it goes to the very first token when nothing shows it.
    """
    wanted, asked = find_targets(batch)
    first = len(batch["prefix"]) + batch["image_start"]
    places = first[:, None] + torch.arange(batch["cells"].shape[1])
    paid = watched.pointing
    to_image = paid.gather(2, places[:, None].expand(-1, paid.shape[1], -1))
    reached = to_image.masked_fill(~wanted, -1e9).logsumexp(-1)
    if with_absent:
        is_absent = batch["pointers"][..., 1] == ABSENT
        reached, asked = torch.where(is_absent, paid[..., 0], reached), asked | is_absent
    return -(reached * asked).sum() / asked.sum().clamp(min=1)


def reading_loss(watched: Watched, batch: dict[str, Tensor]) -> Tensor:
    """Ask that the tokens before the digits of a point attend to the label in the thought."""
    sources = batch["sources"]
    keys = sources.clamp(min=0) + len(batch["prefix"])
    paid = watched.reading.gather(2, keys[..., None])[..., 0]
    asked = sources >= 0
    return -(paid * asked).sum() / asked.sum().clamp(min=1)
