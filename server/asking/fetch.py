"""Pictures from URLs, for servers told to fetch them: from named hosts, never from private networks.

In: a URL of a stranger. Out: bytes, within bounds of size and time. Knows nothing of pictures.

A name is resolved once; every address that it has must be public, and the connection goes to one of them, so
that a second answer of the name server changes nothing. A redirect is judged like the first URL. Proxies of
the environment are not used: they would resolve the name again.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from autoglm_edge.errors import RequestError
from autoglm_edge.server.problem import ApiError

from .fields import shown

MAX_URL = 2048
MAX_REDIRECTS = 3
TIMEOUT_SECONDS = 15.0
_PIECE = 65536
_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?(:\d{1,5})?")
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))

Resolve = Callable[[str, int], list[str]]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open Internet, also if it is wrapped in IPv6."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if any(ip in network for network in _NAT64):
            return False
    return ip.is_global and not ip.is_multicast


def resolve(host: str, port: int) -> list[str]:
    """Addresses of a name.

    Raises:
        OSError: it has none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


@dataclass(frozen=True)
class _Target:
    """A URL that may be asked for."""

    scheme: str
    host: str
    port: int
    path: str


class ImageFetcher:
    """Gets the bytes behind URLs of allowed hosts."""

    def __init__(
        self,
        hosts: Iterable[str],
        max_bytes: int,
        *,
        timeout_s: float = TIMEOUT_SECONDS,
        resolve: Resolve = resolve,
        is_public: Callable[[str], bool] = is_public,
    ) -> None:
        """Say from where.

        Args:
            hosts: names, or `name:port` for a port other than 80 and 443; exact, without wildcards.
            max_bytes: of one picture.
            timeout_s: for all of it, redirects included.
            resolve: gives the addresses of a name.
            is_public: judges an address.

        Raises:
            RequestError: a host is no name.
        """
        self._hosts = frozenset(host.strip().lower() for host in hosts)
        for host in self._hosts:
            if not _NAME.fullmatch(host):
                raise RequestError(
                    f"--allow-image-urls {shown(host)} is no host; write a name such as img.example.org"
                )
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._resolve = resolve
        self._is_public = is_public

    def __call__(self, url: str) -> bytes:
        """The bytes behind a URL.

        Raises:
            ApiError: the URL may not be asked for, or gives nothing that can be used.
        """
        deadline = time.monotonic() + self._timeout_s
        for _ in range(MAX_REDIRECTS + 1):
            target = self._judge(url)
            moved, data = self._get(target, deadline)
            if moved is None:
                return data
            url = urllib.parse.urljoin(url, moved)
        raise _refused(f"the picture's URL leads through more than {MAX_REDIRECTS} redirects")

    def _judge(self, url: str) -> _Target:
        if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
            raise _refused(f"the picture's URL {shown(url)} is too long or holds characters that no URL has")
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise _refused(f"the picture's URL {shown(url)} is no URL") from error
        scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
        if scheme not in _PORTS:
            raise _refused(f"the picture's URL has the scheme {shown(scheme)}, must be http or https")
        if parts.username is not None or parts.password is not None:
            raise _refused("the picture's URL holds a user name; that is not passed on")
        port = _PORTS[scheme] if port is None else port
        allowed = f"{host}:{port}" in self._hosts or (host in self._hosts and port == _PORTS[scheme])
        if not host or not allowed:
            raise _refused(f"pictures are not fetched from {shown(host)}; it is not among the allowed hosts")
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        return _Target(scheme, host, port, path)

    def _address(self, target: _Target) -> str:
        try:
            addresses = self._resolve(target.host, target.port)
        except OSError as error:
            raise _refused(f"the host {shown(target.host)} is not known") from error
        if not addresses or not all(map(self._is_public, addresses)):
            raise _refused(f"the host {shown(target.host)} is not on the public Internet")
        return addresses[0]

    def _get(self, target: _Target, deadline: float) -> tuple[str | None, bytes]:
        """Where it moved to, or what is there."""
        connection = _Pinned(target, self._address(target), deadline)
        # A host that sends a byte now and then would never run into the timeout of a single read.
        timer = threading.Timer(_left(deadline), connection.cut)
        timer.daemon = True
        timer.start()
        try:
            connection.request(
                "GET", target.path, headers={"accept": "image/*", "user-agent": "autoglm-edge"}
            )
            with connection.getresponse() as response:
                if response.status in (301, 302, 303, 307, 308):
                    return response.headers.get("location", ""), b""
                if response.status != 200:
                    raise _refused(f"the picture's host answered with status {response.status}")
                return None, self._read(response, deadline)
        except ApiError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _refused(f"the picture could not be fetched ({type(error).__name__})") from error
        finally:
            timer.cancel()
            connection.close()

    def _read(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        data = bytearray()
        while True:
            piece = response.read1(_PIECE)
            _left(deadline)
            if not piece:
                return bytes(data)
            data += piece
            if len(data) > self._max_bytes:
                raise _refused(f"the picture behind the URL has more than {self._max_bytes} bytes")


class _Pinned(http.client.HTTPConnection):
    """A connection to one address under another name, with one deadline for everything."""

    def __init__(self, target: _Target, address: str, deadline: float) -> None:
        super().__init__(target.host, target.port)
        self._target = target
        self._pinned_address = address
        self._deadline = deadline
        self._open: socket.socket | None = None

    def connect(self) -> None:
        """Connect to the address that was judged; TLS still asks for the name."""
        where = (self._pinned_address, self._target.port)
        sock: socket.socket = socket.create_connection(where, timeout=_left(self._deadline))
        if self._target.scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=self._target.host)
        self._open = self.sock = sock

    def cut(self) -> None:
        """End it from another thread: reads that wait return."""
        opened = self._open
        if opened is not None:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise _refused("the picture behind the URL took too long")
    return left


def _refused(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_image_url", param="messages")
