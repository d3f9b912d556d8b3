"""What is asked of a bundle on a simulated device.

In: the command line of `autoglm simulate`. Out: an `Ask`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autoglm_edge.commands.terminal import as_unicode

from .choice import gathered

if TYPE_CHECKING:
    from autoglm_edge.android_sim.simulate import Ask
    from autoglm_edge.runtime.session import Prefill, Weights


@dataclass(frozen=True)
class QuestionChoice:
    """What was said of the question.

    Attributes:
        prompt: text; None takes a short task.
        images: pictures of it; empty takes the screenshot of the package.
        no_image: whether there is none.
        max_tokens: of the answer.
        context: tokens that the engine holds; None leaves it to the engine.
        max_image_tokens: of a picture; None leaves it to the bundle.
        reference: file of `autoglm record` to compare with.
        cases: names of its prompts; empty for all.
    """

    prompt: str | None
    images: tuple[Path, ...]
    no_image: bool
    max_tokens: int
    context: int | None
    max_image_tokens: int | None
    reference: Path | None
    cases: tuple[str, ...]

    @property
    def is_own(self) -> bool:
        """Whether the user said what is asked."""
        return self.prompt is not None or bool(self.images) or self.no_image

    def ask(self, weights: Weights, prompts: Prefill) -> Ask:
        """The question, and how the bundle is opened for it.

        Args:
            weights: as in SessionOptions.
            prompts: what reads them, as `prefill` in SessionOptions.

        Raises:
            SimulationError: a file is missing.
        """
        from autoglm_edge.android_sim.simulate import PROMPT, Ask
        from autoglm_edge.embedded import sample_screenshot

        pictures = self.images or (() if self.no_image else (sample_screenshot(),))
        return Ask(
            prompt=PROMPT if self.prompt is None else as_unicode(self.prompt),
            images=pictures,
            max_tokens=self.max_tokens,
            context=self.context,
            max_image_tokens=self.max_image_tokens,
            weights=weights,
            prefill=prompts,
            reference=self.reference,
            cases=self.cases,
        )


question_options = gathered(
    QuestionChoice,
    "question",
    click.option("--prompt", metavar="TEXT", help="What is asked. [default: a short task]"),
    click.option(
        "-i",
        "--image",
        "images",
        multiple=True,
        type=click.Path(path_type=Path),
        help="Picture of the question; repeatable. [default: the screenshot of the package]",
    ),
    click.option("--no-image", is_flag=True, help="Ask without a picture."),
    click.option(
        "--max-tokens",
        type=click.IntRange(min=1, max=100_000),
        default=32,
        show_default=True,
        help="Tokens of the answer.",
    ),
    click.option("--context", type=click.IntRange(min=1), metavar="N", help="Tokens that the engine holds."),
    click.option(
        "--max-image-tokens", type=click.IntRange(min=1), metavar="N", help="Shrink larger pictures."
    ),
    click.option(
        "--reference",
        type=click.Path(path_type=Path),
        help="File of `autoglm record`: compare the output with it, inside the limits.",
    ),
    click.option(
        "--case", "cases", multiple=True, metavar="NAME", help="Only this prompt of it; repeatable."
    ),
)
