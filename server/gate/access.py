"""Who may ask: keys, and the names that the server answers to.

In: keys, a Host header, an address to bind. Out: yes or no. Knows nothing of routes.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection, Iterable
from pathlib import Path

from autoglm_edge.errors import RequestError

LEAST_KEY = 8
"""Characters of a key; a shorter one is guessed."""
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Keys:
    """Keys of which a request must show one; none if it is empty."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Keep hashes only: keys of one length, and not in a traceback.

        Raises:
            RequestError: a key is too short or holds what no header can carry.
        """
        read = list(keys)
        for key in read:
            if len(key) < LEAST_KEY:
                raise RequestError(
                    f"an API key has {len(key)} characters, must have at least {LEAST_KEY}; make one with "
                    '`python -c "import secrets; print(secrets.token_urlsafe(32))"`'
                )
            if not key.isascii() or not key.isprintable() or " " in key:
                raise RequestError("an API key holds white space or characters that are not ASCII")
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in read)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, header: bytes | None) -> int | None:
        """The number of the key in an Authorization header; None if there is none of ours.

        The time does not depend on how much of a key is right, nor on which one it is.
        """
        scheme, _, token = (header or b"").strip().partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        found: int | None = None
        for index, known in enumerate(self._digests):
            if hmac.compare_digest(known, digest):
                found = index
        return found if scheme.lower() == b"bearer" else None


def read_key_file(path: Path) -> list[str]:
    """Keys of a file, one in each line; empty lines and those that begin with # are none.

    Raises:
        RequestError: it cannot be read, or holds no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RequestError(f"the key file {path} cannot be read ({reason})") from error
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise RequestError(f"the key file {path} holds no key; write one in each line")
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to that address or name."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, keys: Keys, *, insecure: bool) -> None:
    """Refuse to serve a network without a key, unless that is meant.

    Raises:
        RequestError: it would.
    """
    if not (is_loopback(host) or keys or insecure):
        raise RequestError(
            f"--host {host} lets everybody on the network ask this server; give a key with --api-key-file, "
            "or say --insecure if that is meant"
        )


def host_name(header: str) -> str:
    """The name in a Host header, without port; lower case."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    name, colon, port = header.rpartition(":")
    return name if colon and port.isdigit() else header


def is_expected_host(header: str | None, names: Collection[str] | None) -> bool:
    """Whether a request is meant for this server.

    A web page may give its own name the address 127.0.0.1 and would then be let through by the browser; the
    Host header tells. An address as Host is no such page: emulated phones, for one, ask for 10.0.2.2.
    HTTP/1.0 clients send none, and browsers are not among them.

    Args:
        header: Host, or None.
        names: that are expected; None for any.
    """
    if names is None or header is None:
        return True
    name = host_name(header)
    return name in names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
