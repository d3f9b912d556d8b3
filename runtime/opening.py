"""How an engine is opened, as a value: it can be kept, sent to another process and carried out there.

In: a bundle and options. Out: an engine. Knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from .engine import Engine
from .machine.prepared import Tell
from .prompt.template import ImageLayout
from .reuse.options import ReuseOptions
from .session import SessionOptions

Kind = TypeVar("Kind", bound=Engine)


@dataclass(frozen=True)
class Opening:
    """A bundle and the options of `Engine`.

    Attributes:
        bundle: its folder.
        session: device, threads, weights.
        context: tokens that prompt and answer may have together; None is the engine's own default.
        image_layout: what stands between picture and text.
        max_image_tokens: of a picture; None leaves it to the bundle.
        reuse: what is kept between answers.
        concurrency: answers that are given at a time.
    """

    bundle: Path
    session: SessionOptions = field(default_factory=SessionOptions)
    context: int | None = None
    image_layout: ImageLayout = "plain"
    max_image_tokens: int | None = None
    reuse: ReuseOptions = field(default_factory=ReuseOptions)
    concurrency: int = 1

    def open(self, kind: type[Kind], tell: Tell | None = None) -> Kind:
        """Load the engine.

        Args:
            kind: Engine, or a class that stands on it.
            tell: told when weights are prepared first, which takes long.

        Raises:
            BundleError: the folder is no complete bundle.
            DeviceError: the device is not there.
            RequestError: an option is outside what the bundle allows.
        """
        return kind.load(
            self.bundle,
            device=self.session.device,
            threads=self.session.threads,
            context=self.context,
            image_layout=self.image_layout,
            max_image_tokens=self.max_image_tokens,
            weights=self.session.weights,
            prefill=self.session.prefill,
            prepare=self.session.prepare,
            reuse=self.reuse,
            concurrency=self.concurrency,
            tell=tell,
        )
