"""What the training of the pocket model consists of: cycles, and the settings of all.

In: nothing. Out: frozen records. This module knows nothing of weights, screens and losses.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALL = (0.0, 0.0, 1.0)
ALL = (0.45, 0.25, 0.3)


@dataclass(frozen=True)
class VisionCycle:
    """One cycle of the vision tower alone.

    Attributes:
        steps: its length.
        class_weight: extra weight of naming what is seen.
        everywhere: whether to name it in cells that show none of its text.
        grids: shares of the image sizes, as in `pocket_pool.GRIDS`.
        rate: peak rate of the matrices.
    """

    steps: int
    class_weight: float
    everywhere: bool
    grids: tuple[float, ...] = SMALL
    rate: float = 0.02


@dataclass(frozen=True)
class JointCycle:
    """One cycle of everything: how long, and which lessons.

    Attributes:
        steps: taken, of
        planned: steps that the learning rate is planned for.
        pointing: weight of looking from a label to where it is shown.
        placing: weight of carrying its place on to the digits.
        with_absent: adds things that are not shown and the states of switches to that.
        button_share: of the screens, drawn among those with buttons.
        grids: shares of the image sizes, as in `pocket_pool.GRIDS`.
        longest: tokens of the longest system prompts.
        history_share: of the batches, with earlier turns.
        vision_rate: peak rate of the vision matrices.
        rate: a factor on all rates.
    """

    steps: int
    planned: int
    pointing: float = 0.0
    placing: float = 0.0
    with_absent: bool = False
    button_share: float = 0.0
    grids: tuple[float, ...] = SMALL
    longest: int = 40
    history_share: float = 0.0
    vision_rate: float = 0.01
    rate: float = 1.0


Cycle = VisionCycle | JointCycle


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the code: steps, seeds and rates.

    One step takes `batch` screens over all workers. `screens` are drawn for each image size. `second` is the
    index of the first cycle of the second training, which may begin with the weights of another folder.
    """

    seed: int = 2
    screens: tuple[int, ...] = (12000, 6000, 8000)
    workers: int = 2
    batch: int = 16
    cycles: tuple[Cycle, ...] = (
        VisionCycle(1400, 0.0, True),
        VisionCycle(900, 2.0, True),
        VisionCycle(500, 2.0, False),
        JointCycle(800, 1100),
        JointCycle(300, 600, pointing=0.5),
        JointCycle(600, 600, pointing=0.5, placing=0.3),
        JointCycle(500, 500, pointing=0.5, placing=0.3, with_absent=True),
        JointCycle(500, 500, pointing=0.5, placing=0.3, with_absent=True, button_share=0.6, vision_rate=0.02),
        JointCycle(500, 500, pointing=0.5, placing=0.3, with_absent=True, button_share=0.4, rate=0.5),
        VisionCycle(300, 2.0, False, grids=ALL, rate=0.01),
        VisionCycle(500, 2.0, False, grids=(0.5, 0.3, 0.2)),
        JointCycle(
            1600,
            1800,
            pointing=0.5,
            placing=0.3,
            with_absent=True,
            button_share=0.3,
            grids=ALL,
            longest=2400,
            history_share=0.3,
        ),
        JointCycle(
            900,
            900,
            pointing=0.5,
            placing=0.3,
            with_absent=True,
            button_share=0.3,
            grids=ALL,
            longest=2200,
            history_share=0.25,
            rate=0.5,
        ),
    )
    second: int = 9
    checkpoint_every: int = 200
    report_every: int = 20
    compiled: bool = True
