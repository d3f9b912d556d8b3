"""What is kept between answers, and where: for a conversation, and for a server.

In: the command line. Out: `ReuseOptions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from autoglm_edge.commands.quantities import read_bytes
from autoglm_edge.errors import RequestError

from .choice import gathered

if TYPE_CHECKING:
    from autoglm_edge.runtime.reuse.options import ReuseOptions


@dataclass(frozen=True)
class PrefixChoice:
    """What `autoglm run` keeps.

    Attributes:
        prefix_cache: folder for what prompts begin with; None keeps it in memory alone.
        no_lookup: whether answers are not drafted.
        no_reuse: whether nothing is kept.
    """

    prefix_cache: Path | None
    no_lookup: bool
    no_reuse: bool

    def reuse(self) -> ReuseOptions:
        """What the engine may keep.

        Raises:
            click.UsageError: options contradict each other.
        """
        return _reuse(
            self.prefix_cache, "--prefix-cache", {}, drafts=not self.no_lookup, kept=not self.no_reuse
        )


prefix_options = gathered(
    PrefixChoice,
    "caches",
    click.option(
        "--prefix-cache",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Keep in DIR what prompts begin with, so that the next start need not compute it.",
    ),
    click.option("--no-lookup", is_flag=True, help="Do not draft the answer from what came before."),
    click.option("--no-reuse", is_flag=True, help="Compute every prompt and picture of a conversation anew."),
)


@dataclass(frozen=True)
class CacheChoice:
    """What `autoglm serve` keeps; None leaves a size to `ReuseOptions`.

    Attributes:
        cache_dir: folder for what prompts begin with; None keeps it in memory alone.
        cache_bytes: memory for what prompts begin with.
        cache_dir_bytes: of the folder.
        image_cache_bytes: memory for pictures that were encoded.
        no_lookup: whether answers are not drafted.
        no_reuse: whether nothing is kept.
    """

    cache_dir: Path | None
    cache_bytes: int | None
    cache_dir_bytes: int | None
    image_cache_bytes: int | None
    no_lookup: bool
    no_reuse: bool

    def reuse(self) -> ReuseOptions:
        """What the engine may keep.

        Raises:
            click.UsageError: options contradict each other.
        """
        sizes = {
            "prefix_cache_bytes": self.cache_bytes,
            "prefix_disk_bytes": self.cache_dir_bytes,
            "image_cache_bytes": self.image_cache_bytes,
        }
        given = {name: value for name, value in sizes.items() if value is not None}
        return _reuse(self.cache_dir, "--cache-dir", given, drafts=not self.no_lookup, kept=not self.no_reuse)


cache_options = gathered(
    CacheChoice,
    "caches",
    click.option(
        "--cache-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Keep there what prompts begin with, so that a restart finds it.",
    ),
    click.option(
        "--cache-bytes",
        callback=read_bytes,
        metavar="SIZE",
        help="Memory for what prompts begin with. [default: 512MB]",
    ),
    click.option(
        "--cache-dir-bytes", callback=read_bytes, metavar="SIZE", help="Bytes of --cache-dir. [default: 4GB]"
    ),
    click.option(
        "--image-cache-bytes",
        callback=read_bytes,
        metavar="SIZE",
        help="Memory for pictures that were encoded. [default: 128MB]",
    ),
    click.option("--no-lookup", is_flag=True, help="Do not draft answers from what came before."),
    click.option("--no-reuse", is_flag=True, help="Compute every prompt and picture anew."),
)


def _reuse(
    folder: Path | None, flag: str, sizes: Mapping[str, Any], *, drafts: bool, kept: bool
) -> ReuseOptions:
    """What the engine may keep.

    Args:
        folder: for what prompts begin with; None keeps it in memory alone.
        flag: that names the folder.
        sizes: fields of ReuseOptions in bytes, as far as they were given.
        drafts: whether answers are drafted.
        kept: whether anything is kept.

    Raises:
        click.UsageError: options contradict each other.
    """
    from autoglm_edge.runtime.reuse.options import ReuseOptions

    lookup: Literal["auto", False] = "auto" if drafts else False
    if not kept and (folder is not None or sizes):
        given = flag if folder is not None else "the options of the caches"
        raise click.UsageError(f"--no-reuse keeps nothing; leave it out, or {given}")
    if folder is None and "prefix_disk_bytes" in sizes:
        raise click.UsageError(f"{flag}-bytes is for a folder; name one with {flag}")
    try:
        if not kept:
            return replace(ReuseOptions.off(), lookup=lookup)
        return ReuseOptions(prefix_cache_dir=folder, lookup=lookup, **sizes)
    except RequestError as error:
        raise click.UsageError(str(error)) from error
