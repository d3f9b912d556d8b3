"""Who is served, and from where: the address, the keys, web pages, pictures of the network.

In: the command line of `autoglm serve`. Out: `Settings` of the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoglm_edge.errors import RequestError

from .choice import gathered
from .limits import LimitChoice

if TYPE_CHECKING:
    from autoglm_edge.server.settings import Settings

KEY_VARIABLE = "AUTOGLM_API_KEY"


@dataclass(frozen=True)
class NetworkChoice:
    """What was said of clients.

    Attributes:
        host: address to listen on.
        port: of it; 0 takes a free one.
        names: what requests call the model; empty takes the bundle's own.
        api_keys: one of which a client must have, from the command line or the environment.
        api_key_file: holds more of them.
        insecure: whether a network is served without a key.
        origins: web pages that may read answers.
        image_hosts: from which pictures are fetched.
    """

    host: str
    port: int
    names: tuple[str, ...]
    api_keys: tuple[str, ...]
    api_key_file: Path | None
    insecure: bool
    origins: tuple[str, ...]
    image_hosts: tuple[str, ...]

    def settings(self, bundle: Path, limits: LimitChoice) -> Settings:
        """What the options say.

        Args:
            bundle: its folder, which has a name.
            limits: how much is taken.

        Raises:
            click.UsageError: they contradict each other, or would serve a network without a key.
        """
        from autoglm_edge.server.asking.fetch import ImageFetcher
        from autoglm_edge.server.gate.access import (
            LOCAL_NAMES,
            Keys,
            check_exposure,
            is_loopback,
            read_key_file,
        )
        from autoglm_edge.server.settings import Settings, model_names

        try:
            in_file = read_key_file(self.api_key_file) if self.api_key_file is not None else ()
            keys = Keys([*self.api_keys, *in_file])
            check_exposure(self.host, keys, insecure=self.insecure)
            checked = limits.limits()
            given: dict[str, Any] = {"grace_s": limits.grace} if limits.grace is not None else {}
            return Settings(
                names=model_names(bundle, self.names),
                keys=keys,
                limits=checked,
                # A key, or a network that the user opened, makes the name that a page goes by unimportant.
                hosts=LOCAL_NAMES | {self.host.lower()} if is_loopback(self.host) and not keys else None,
                origins=self.origins,
                fetch=ImageFetcher(self.image_hosts, checked.image_bytes) if self.image_hosts else None,
                **given,
            )
        except RequestError as error:
            raise click.UsageError(str(error)) from error


network_options = gathered(
    NetworkChoice,
    "network",
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8000,
        show_default=True,
        help="0 takes a free one.",
    ),
    click.option(
        "--served-model-name",
        "names",
        multiple=True,
        metavar="NAME",
        help="What requests call the model; repeatable. [default: OUT's own name and autoglm-phone-9b]",
    ),
    click.option(
        "--api-key",
        "api_keys",
        multiple=True,
        metavar="KEY",
        envvar=KEY_VARIABLE,
        show_envvar=True,
        help="Ask for this key; repeatable. Other users of the machine see command lines: better a file.",
    ),
    click.option(
        "--api-key-file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Ask for one of the keys in this file, one in each line.",
    ),
    click.option("--insecure", is_flag=True, help="Serve a network without a key."),
    click.option(
        "--allow-origin",
        "origins",
        multiple=True,
        metavar="URL",
        help="Web pages from there may read answers; repeatable. [default: none]",
    ),
    click.option(
        "--allow-image-urls",
        "image_hosts",
        multiple=True,
        metavar="HOST",
        help="Fetch pictures from this host; repeatable. [default: data URIs only]",
    ),
)
