"""Keys, hosts, fetched pictures, slow connections, settings: the parts of the server that say no."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from PIL import Image
from server_fixtures import CHAT, ScriptedEngine, png, running

from autoglm_edge.errors import DeviceError, RequestError
from autoglm_edge.server.asking.fetch import ImageFetcher, is_public
from autoglm_edge.server.gate import protocol
from autoglm_edge.server.gate.access import (
    Keys,
    check_exposure,
    host_name,
    is_expected_host,
    is_loopback,
    read_key_file,
)
from autoglm_edge.server.gpu_memory import read_gpu_memory
from autoglm_edge.server.limits import Limits
from autoglm_edge.server.metrics import Metrics
from autoglm_edge.server.problem import ApiError
from autoglm_edge.server.run import bind
from autoglm_edge.server.settings import Settings, model_names
from autoglm_edge.server.work.side_threads import SideThreads

# --- keys and hosts


def test_a_key_is_found_whichever_it_is() -> None:
    keys = Keys(["first-key", "second-key"])

    assert keys.find(b"Bearer first-key") == 0
    assert keys.find(b"bearer second-key") == 1
    for header in (None, b"", b"Bearer", b"Bearer ", b"Basic first-key", b"Bearer first-ke", b"Bearer \xff"):
        assert keys.find(header) is None
    assert not Keys()
    assert Keys().find(b"Bearer x") is None
    assert "first-key" not in repr(vars(keys))


@pytest.mark.parametrize("key", ["", "short", "white space", "schlüssel-lang", "new\nline-key"])
def test_a_key_that_is_weak_or_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(RequestError, match="API key"):
        Keys([key])


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n first-key \nsecond-key\n")
    assert read_key_file(file) == ["first-key", "second-key"]
    file.write_text("# none\n")
    with pytest.raises(RequestError, match="holds no key"):
        read_key_file(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="cannot be read"):
        read_key_file(file)
    with pytest.raises(RequestError, match="cannot be read"):
        read_key_file(tmp_path / "nothing")


def test_a_network_is_served_with_a_key_or_if_it_is_meant() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"):
        assert is_loopback(host)
        check_exposure(host, Keys(), insecure=False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "myhost", ""):
        assert not is_loopback(host)
        with pytest.raises(RequestError, match="--insecure"):
            check_exposure(host, Keys(), insecure=False)
        check_exposure(host, Keys(), insecure=True)
        check_exposure(host, Keys(["long-enough"]), insecure=False)


def test_the_name_in_a_host_header_is_read_without_its_port() -> None:
    assert host_name("Localhost:8000") == "localhost"
    assert host_name("[::1]:8000") == "::1"
    assert host_name("127.0.0.1") == "127.0.0.1"
    assert not is_expected_host("localhost.evil.example", frozenset({"localhost"}))
    assert is_expected_host(None, frozenset({"localhost"}))
    assert is_expected_host("whatever", None)


def test_an_address_as_host_is_no_page_that_passes_for_this_machine() -> None:
    """An emulated phone asks its host by 10.0.2.2; a page cannot give itself an address as its name."""
    for header in ("10.0.2.2:8000", "192.168.1.7", "[fe80::1]:80"):
        assert is_expected_host(header, frozenset({"localhost"}))
    for header in ("10.0.2.2.evil.example", "0x7f000001", "2130706433", "127.1", ""):
        assert not is_expected_host(header, frozenset({"localhost"}))


# --- settings


@pytest.mark.parametrize(
    "changes",
    [
        {"names": ()},
        {"names": ("",)},
        {"names": ("a\nb",)},
        {"origins": ("app.example",)},
        {"origins": ("*",)},
        {"ping_s": 0},
        {"grace_s": -1},
    ],
)
def test_settings_refuse_what_makes_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Settings(**({"names": ("pocket",)} | changes))


@pytest.mark.parametrize(
    "changes", [{"queue": 0}, {"images": True}, {"body_bytes": 1.5}, {"body_seconds": 0}]
)
def test_limits_refuse_what_makes_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Limits(**changes)


def test_a_model_goes_by_its_folder_and_by_the_agents_name(tmp_path: Path) -> None:
    assert model_names(tmp_path / "phone-int4", ()) == ("phone-int4", "autoglm-phone-9b")
    assert model_names(tmp_path / "autoglm-phone-9b", ()) == ("autoglm-phone-9b",)
    assert model_names(tmp_path, ("a", "b", "a")) == ("a", "b")


def test_small_pieces_are_sent_at_once() -> None:
    """A stream of tokens would else wait 40 ms for each acknowledgement."""
    with running(ScriptedEngine) as live:
        live.http.get("/health")
        connection = next(iter(live.server.server_state.connections))
        sock = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_address_in_use_is_said() -> None:
    with bind("127.0.0.1", 0) as listener, pytest.raises(DeviceError, match="choose another --port"):
        bind("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(DeviceError):
        bind("203.0.113.7", 8000)
    with pytest.raises(DeviceError):
        bind("no such host", 8000)


# --- pictures from URLs


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "198.18.0.1", "::", "::1", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1", "none",
    ],
)  # fmt: skip
def test_an_address_of_a_private_network_is_none_of_the_internet(address: str) -> None:
    assert not is_public(address)


def test_addresses_of_the_internet_are_public() -> None:
    assert all(map(is_public, ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1"]))


class Host(http.server.BaseHTTPRequestHandler):
    """A host of pictures, and of traps."""

    picture = png(Image.new("RGB", (64, 64), "blue"))
    asked: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.headers["host"], self.path))
        name = self.path.partition("?")[0]
        if name.startswith("/to/"):
            self.send_response(302)
            self.send_header("location", self.path[4:])
            self.end_headers()
        elif name == "/missing":
            self.send_error(404)
        elif name == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif name == "/large":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 10_000)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.picture)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def host() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        server.daemon_threads = True
        Host.asked.clear()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def fetcher(port: int, **options: Any) -> ImageFetcher:
    """One that is allowed a name of that port, which the test's name server sends to this machine."""
    names = {
        "img.example": ["127.0.0.1"],
        "two.example": ["127.0.0.1", "10.0.0.1"],
        "in.example": ["10.0.0.1"],
    }

    def resolve(name: str, port: int) -> list[str]:
        if name not in names:
            raise socket.gaierror("unknown")
        return names[name]

    allowed = [f"{name}:{port}" for name in (*names, "gone.example")]
    given: dict[str, Any] = {
        "resolve": resolve,
        "is_public": lambda address: address == "127.0.0.1",
    } | options
    return ImageFetcher(allowed, 5_000, **given)


def test_a_picture_is_fetched_from_an_allowed_host_under_its_name(host: int) -> None:
    get = fetcher(host)

    assert get(f"http://img.example:{host}/a.png?x=1") == Host.picture
    assert get(f"HTTP://IMG.example:{host}") == Host.picture
    assert get(f"http://img.example:{host}/to//a.png") == Host.picture
    assert Host.asked[0] == (f"img.example:{host}", "/a.png?x=1")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1:{port}/a.png", "not among"),
        ("http://other.example:{port}/a.png", "not among"),
        ("http://img.example/a.png", "not among"),
        ("http://img.example:1/a.png", "not among"),
        ("http://img.example:99999/a.png", "no URL"),
        ("http://x@img.example:{port}/a.png", "user name"),
        ("http://x:y@img.example:{port}/a.png", "user name"),
        ("http://img.example:{port}\\@evil/a.png", "characters"),
        ("http://img.example:{port}/a b", "characters"),
        ("http://img.example:{port}/\r\nx: y", "characters"),
        ("http://img.example:{port}/" + "a" * 3000, "too long"),
        ("http://[::1/a.png", "no URL"),
        ("http:///a.png", "not among"),
        ("http://in.example:{port}/a.png", "public Internet"),
        ("http://two.example:{port}/a.png", "public Internet"),
        ("http://gone.example:{port}/a.png", "not known"),
        ("http://img.example:{port}/missing", "status 404"),
        ("http://img.example:{port}/large", "5000 bytes"),
        ("http://img.example:{port}/to/http://127.0.0.1:{port}/a.png", "not among"),
        ("http://img.example:{port}/to/http://in.example:{port}/a.png", "public Internet"),
        ("http://img.example:{port}/to/file:///etc/passwd", "scheme"),
        ("http://img.example:{port}/to//to//to//to//to//a.png", "redirects"),
        ("https://img.example:{port}/a.png", "could not be fetched"),
    ],
)
def test_what_may_not_be_fetched_is_not(host: int, url: str, why: str) -> None:
    with pytest.raises(ApiError, match=why) as caught:
        fetcher(host)(url.format(port=host))

    assert caught.value.status == 400
    assert not [path for _, path in Host.asked if path.startswith(("/a.png", "/x"))]


def test_a_host_that_sends_a_byte_now_and_then_is_given_up(host: int) -> None:
    started = time.monotonic()

    with pytest.raises(ApiError):
        fetcher(host, timeout_s=0.4)(f"http://img.example:{host}/slow")

    assert time.monotonic() - started < 3


def test_the_judge_of_addresses_is_the_strict_one_unless_a_test_says_otherwise(host: int) -> None:
    get = ImageFetcher([f"localhost:{host}"], 5_000)

    with pytest.raises(ApiError, match="public Internet"):
        get(f"http://localhost:{host}/a.png")
    with pytest.raises(RequestError, match="no host"):
        ImageFetcher(["*.example"], 5_000)


def test_a_server_that_may_fetch_puts_the_picture_into_the_prompt(host: int) -> None:
    with running(ScriptedEngine, fetch=fetcher(host)) as live:

        def ask(url: str) -> Any:
            parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}]
            return live.post(CHAT, {"messages": [{"role": "user", "content": parts}]})

        assert ask(f"http://img.example:{host}/a.png").json()["usage"]["prompt_tokens"] == 11
        assert ask(f"http://evil.example:{host}/a.png").json()["error"]["code"] == "invalid_image_url"
        assert ask("/etc/passwd").json()["error"]["code"] == "invalid_image"


# --- connections


def test_a_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol.BoundedProtocol, "head_seconds", 0.2)
    with running(ScriptedEngine) as live:
        for start in (b"", b"GET /health HT"):
            with live.raw(start) as connection:
                assert connection.recv(1000) == b""
        with live.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n") as connection:
            seen = b""
            while b'"ok"}' not in seen:
                seen += connection.recv(1000)
            connection.sendall(b"GET /he")
            assert connection.recv(1000) == b""
        assert live.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "start",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    ],
)
def test_bytes_that_are_no_http_harm_nobody_else(start: bytes) -> None:
    with running(ScriptedEngine) as live:
        with live.raw(start) as connection:
            connection.settimeout(0.5)
            with contextlib.suppress(TimeoutError, ConnectionError):
                connection.recv(1000)
        assert live.chat().status_code == 200


# --- memory of GPUs


def count_gpus(count: Any) -> int:
    count._obj.value = 2
    return 0


def find_gpu(index: int, device: Any) -> int:
    device._obj.value = index + 1
    return 0


def tell_memory(device: ctypes.c_void_p, memory: Any) -> int:
    if device.value == 2:  # one that does not tell
        return 3
    memory._obj.total, memory._obj.used = 16_000, 4_000
    return 0


LIBRARY = SimpleNamespace(
    nvmlInit_v2=lambda: 0,
    nvmlDeviceGetCount_v2=count_gpus,
    nvmlDeviceGetHandleByIndex_v2=find_gpu,
    nvmlDeviceGetMemoryInfo=tell_memory,
)


def test_the_memory_of_gpus_is_told_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    def found(name: str) -> Any:
        return LIBRARY

    assert read_gpu_memory(missing) == []
    assert read_gpu_memory(found) == [(4_000.0, 16_000.0)]

    monkeypatch.setattr("autoglm_edge.server.metrics.read_gpu_memory", lambda: [(4_000.0, 16_000.0)])
    assert 'autoglm_gpu_memory_used_bytes{gpu="0"} 4000' in Metrics().text({})


# --- threads beside the engine's


def beside(work: Any, *, closed: bool = False) -> Any:
    """What side threads make of some work."""
    threads = SideThreads(1, "beside")
    if closed:
        threads.close()
    try:
        return asyncio.run(threads.run(work))
    finally:
        threads.close()


def test_work_beside_is_done_in_a_thread_of_that_name() -> None:
    assert beside(lambda: threading.current_thread().name).startswith("beside")


def test_an_error_beside_is_told_as_clients_are_told_it() -> None:
    def wrong() -> None:
        raise RequestError("n is 0, must be at least 1")

    with pytest.raises(ApiError, match="n is 0") as caught:
        beside(wrong)
    assert caught.value.status == 400


def test_threads_that_are_closed_say_that_the_server_is_stopping() -> None:
    with pytest.raises(ApiError) as caught:
        beside(lambda: 1, closed=True)
    assert caught.value.status == 503


def test_a_fault_beside_is_not_taken_for_a_server_that_stops() -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        beside(broken)
