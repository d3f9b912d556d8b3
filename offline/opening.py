"""How the engine of a batch is opened, as a value: it can be sent to another process and carried out there.

In: a bundle and options. Out: an engine. Knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.machine.prepared import Tell
from autoglm_edge.runtime.prompt.template import ImageLayout
from autoglm_edge.runtime.reuse.options import ReuseOptions
from autoglm_edge.runtime.session import SessionOptions
from autoglm_edge.server.work.answering import ServedEngine


@dataclass(frozen=True)
class Opening:
    """A bundle and the options of `ServedEngine`.

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

    def open(self, tell: Tell | None = None) -> ServedEngine:
        """Load the engine.

        Args:
            tell: told when weights are prepared first, which takes long.

        Raises:
            BundleError: the folder is no complete bundle.
            DeviceError: the device is not there.
            RequestError: an option is outside what the bundle allows.
        """
        return ServedEngine(
            Bundle.open(self.bundle),
            options=self.session,
            context=self.context,
            image_layout=self.image_layout,
            max_image_tokens=self.max_image_tokens,
            reuse=self.reuse,
            concurrency=self.concurrency,
            tell=tell,
        )
