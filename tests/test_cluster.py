"""The same work on several processes: replicas behind one address, and a file of requests over Ray."""

from __future__ import annotations

import asyncio
import http.server
import importlib.util
import ipaddress
import json
import os
import re
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from server_fixtures import CHAT, events_of, text_of, wait_until

from autoglm_edge.cluster.batch import Feeder, piece_length
from autoglm_edge.cluster.cores import split_cpus
from autoglm_edge.cluster.exchange import ReplicaLostError, exchange
from autoglm_edge.cluster.exposition import joined
from autoglm_edge.cluster.router import BLOCK_BYTES, Router, marks_of
from autoglm_edge.cluster.serve import places_of
from autoglm_edge.commands.run import run
from autoglm_edge.commands.serve import serve
from autoglm_edge.embedded import pocket_path
from autoglm_edge.errors import EdgeError, RequestError

NEEDS_RAY = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("ray", "pyarrow", "pandas")),
    reason="ray[data] is not installed: pip install 'autoglm-edge[ray]'",
)


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(pocket_path(), "int8")


def endless(text: str, tokens: int, **fields: Any) -> dict[str, Any]:
    """A request whose answer has exactly so many tokens."""
    eos = json.loads((pocket_path() / "config.json").read_text())["eos_token_id"]
    bias = {str(token): -100 for token in eos}
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "logit_bias": bias,
    } | fields


# --- which CPUs


def machine(root: Path, cores: dict[int, str], nodes: dict[int, str]) -> Path:
    for cpu, siblings in cores.items():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "core_cpus_list").write_text(f"{siblings}\n")
    for node, cpus in nodes.items():
        folder = root / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
    return root


def test_each_socket_gets_a_replica_and_threads_of_a_core_stay_together(tmp_path: Path) -> None:
    # Two sockets of two cores with two threads each, numbered as Linux does: second threads come last.
    siblings = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    root = machine(tmp_path, siblings, {0: "0,2,4,6", 1: "1,3,5,7"})

    assert split_cpus(2, root, list(range(8))) == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert split_cpus(4, root, list(range(8))) == [(0, 4), (2, 6), (1, 5), (3, 7)]
    with pytest.raises(RequestError, match="5 replicas need a core each, and there are 4"):
        split_cpus(5, root, list(range(8)))


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(1, 8))
def test_cpus_are_disjoint_complete_and_evenly_split(cpus: set[int], count: int) -> None:
    if count > len(cpus):
        return
    parts = split_cpus(count, Path("/nowhere"), sorted(cpus))

    assert sorted(cpu for part in parts for cpu in part) == sorted(cpus)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_gpus_are_given_out_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")

    places = places_of(2, cuda=True)

    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in places] == ["3", "GPU-abc"]
    with pytest.raises(RequestError, match="names 2"):
        places_of(3, cuda=True)


# --- which replica


def body(*parts: str) -> bytes:
    return b"".join(part.encode().ljust(BLOCK_BYTES, b".") for part in parts)


def test_a_conversation_stays_where_its_beginning_is() -> None:
    router = Router()
    idle = {0: 0, 1: 0}

    first = router.choose(marks_of("a", body("system", "one")), idle)
    other = router.choose(marks_of("b", body("else")), idle)

    assert {first, other} == {0, 1}
    assert router.choose(marks_of("a", body("system", "one", "two")), idle) == first
    assert router.choose(marks_of("b", body("else", "more")), idle) == other
    assert router.choose(marks_of("c", body("system", "one")), idle) == first, "whoever sends it"
    assert router.choose(marks_of("b", b"short"), idle) == other, "a client's own"


def test_what_is_busy_is_not_waited_for() -> None:
    router = Router(together=2)
    marks = marks_of("a", body("system"))
    first = router.choose(marks, {0: 0, 1: 0})
    second = 1 - first

    assert router.choose(marks, {first: 1, second: 0}) == first, "it has a slot left"
    assert router.choose(marks, {first: 2, second: 0}) == second
    assert router.choose(marks, {first: 2, second: 3}) == first, "where it went last has more to do"
    assert router.choose(marks_of("b", body("system")), {first: 5, second: 5}) == first


def test_a_replica_that_was_started_again_is_as_good_as_any() -> None:
    router = Router()
    marks = marks_of("a", body("x"))
    first = router.choose(marks, {0: 0, 1: 0})
    router.forget(first)

    assert router.choose(marks, {0: 0, 1: 0}) == 1 - first
    assert router.choose(marks, {first: 0}) == first, "the only one that is there"


@given(
    st.lists(
        st.tuples(st.binary(max_size=3000), st.lists(st.integers(0, 3), min_size=3, max_size=3)), max_size=30
    )
)
def test_the_chosen_one_is_always_there_and_never_needlessly_busy(
    steps: list[tuple[bytes, list[int]]],
) -> None:
    router = Router(together=2)
    for content, counts in steps:
        loads = dict(enumerate(counts))
        chosen = router.choose(marks_of("c", content), loads)
        assert loads[chosen] < 2 or loads[chosen] == min(counts)


def test_metrics_of_all_replicas_are_one_text() -> None:
    text = '# HELP n About n.\n# TYPE n counter\nn {}\n# HELP m M.\n# TYPE m gauge\nm{{a="1"}} 2\n'

    told = joined({"0": text.format(1), "1": text.format(5)})

    assert told.splitlines() == [
        "# HELP n About n.",
        "# TYPE n counter",
        'n{replica="0"} 1',
        'n{replica="1"} 5',
        "# HELP m M.",
        "# TYPE m gauge",
        'm{replica="0",a="1"} 2',
        'm{replica="1",a="1"} 2',
    ]


# --- one request to a replica


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "-"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        if self.path == "/torn":
            self.rfile.read(length)
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        elif self.path == "/nonsense":
            self.wfile.write(b"what?\r\n\r\n")
        else:
            data = self.rfile.read(length)
            self.send_response(201)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for piece in (b"got ", str(len(data)).encode()):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True


@pytest.fixture
def unix_server(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "s"
    with socketserver.ThreadingUnixStreamServer(str(path), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield path
        server.shutdown()
        thread.join()


async def asked(path: Path, target: bytes, data: bytes = b"") -> tuple[int, bytes]:
    async with exchange(path, "POST", target, [(b"x-a", b"b")], data) as request:
        head = await request.head()
        return head.status, b"".join([piece async for piece in request.pieces()])


def test_a_response_comes_piece_by_piece_and_a_torn_one_is_noticed(unix_server: Path, tmp_path: Path) -> None:
    assert asyncio.run(asked(unix_server, b"/", b"x" * 3_000_000)) == (201, b"got 3000000")
    for path, target in ((unix_server, b"/torn"), (unix_server, b"/nonsense"), (tmp_path / "none", b"/")):
        with pytest.raises(ReplicaLostError):
            asyncio.run(asked(path, target))


# --- replicas behind one address


@contextmanager
def served(bundle: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A front with two replicas: its process, its address, and what it says."""
    code = "from autoglm_edge.commands.serve import serve; serve.main(prog_name='autoglm serve')"
    command = [sys.executable, "-c", code, str(bundle), "--port", "0", "--replicas", "2", *arguments]
    folder = tempfile.TemporaryDirectory(prefix="front-")  # of sockets: their paths must be short
    environment = {**os.environ, "TMPDIR": folder.name}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    said: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()))
    reader.start()
    try:
        wait_until(lambda: said or process.poll() is not None, 120)
        found = re.search(r"at (http://\S+), loading", said[0])
        assert found, said
        wait_until(lambda: ready_of(found[1]) == 2 or process.poll() is not None, 180)
        yield process, found[1], said
    finally:
        process.kill()
        process.wait()
        reader.join(60)
        assert process.stdout is not None
        process.stdout.close()
        process.stderr.close()
        folder.cleanup()


def ready_of(url: str) -> int:
    try:
        return int(httpx.get(f"{url}/health", trust_env=False).json()["replicas"]["ready"])
    except httpx.TransportError:
        return 0


def children_of(pid: int) -> dict[int, str]:
    """Processes that one has started, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def metric(url: str, name: str, replica: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(f'autoglm_{name}{{replica="{replica}"')
    )


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two replicas need two cores")
def test_requests_go_on_while_a_replica_is_killed_and_it_comes_back(bundle: Path) -> None:
    with served(bundle, "--context", "512", "--max-concurrency", "2") as (process, url, said):
        client = httpx.Client(base_url=url, trust_env=False, timeout=60)
        with client:
            # As by one server: answers, streams, refusals, names.
            whole = client.post(CHAT, json=endless("Hi", 8), headers={"x-request-id": "mine"})
            assert whole.status_code == 200 and whole.json()["usage"]["completion_tokens"] == 8
            assert whole.headers.get_list("x-request-id") == ["mine"]
            stream = client.post(CHAT, json=endless("Hi", 8, stream=True))
            assert events_of(stream)[-1] == "[DONE]"
            assert text_of(events_of(stream)) == whole.json()["choices"][0]["message"]["content"]
            assert client.post(CHAT, json={"messages": 1}).json()["error"]["code"] == "invalid_type"
            assert client.get("/nothing").json()["error"]["code"] == "not_found"
            assert client.get("/nothing", headers={"host": "evil.example"}).status_code == 421
            assert client.post(CHAT, content=b"x" * 10).status_code == 415
            assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 512

            # One client's requests stay at one replica, several at once are spread.
            before = [metric(url, "answers_total", str(index)) for index in (0, 1)]
            for _ in range(4):
                client.post(CHAT, json=endless("Hi", 2))
            after = [metric(url, "answers_total", str(index)) for index in (0, 1)]
            assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0, 4]

            def both_worked() -> bool:
                """Many at once; on a busy machine they may come one after the other all the same."""
                with ThreadPoolExecutor(6) as pool:
                    asked = [pool.submit(client.post, CHAT, json=endless("Hi", 200)) for _ in range(6)]
                assert [request.result().status_code for request in asked] == [200] * 6
                return all(metric(url, "answers_total", str(i)) > after[i] for i in (0, 1))

            wait_until(both_worked, 60)

            # Each replica has cores of its own.
            replicas = {
                pid: line for pid, line in children_of(process.pid).items() if "--replica-socket" in line
            }
            assert len(replicas) == 2
            cores = [os.sched_getaffinity(pid) for pid in replicas]
            assert not cores[0] & cores[1]

            # A client that hangs up ends the work behind the front, too.
            with client.stream("POST", CHAT, json=endless("Hi", 400, stream=True)) as response:
                next(response.iter_raw())
            wait_until(lambda: sum(metric(url, "running_requests", str(index)) for index in (0, 1)) == 0, 30)

            # One dies.
            victim = next(pid for pid, line in replicas.items() if "0.sock" in line)
            os.kill(victim, signal.SIGKILL)
            statuses = [client.post(CHAT, json=endless(f"text {item}", 4)).status_code for item in range(12)]
            assert statuses == [200] * 12
            wait_until(lambda: ready_of(url) == 2, 120)
            assert any("Replica 0 ended with status -9" in line for line in said)
            now = {pid for pid, line in children_of(process.pid).items() if "--replica-socket" in line}
            assert len(now) == 2 and victim not in now
            assert client.post(CHAT, json=endless("Hi", 4)).status_code == 200

        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        for pid in now:
            assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two replicas need two cores")
def test_the_front_asks_for_the_key_and_its_replicas_end_with_it(bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-long-key\n")
    with served(bundle, "--context", "512", "--api-key-file", str(keys)) as (process, url, _):
        for key, status in ((None, 401), ("another-key", 401), ("a-long-key", 200)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            for path in ("/v1/models", "/metrics"):
                assert httpx.get(f"{url}{path}", headers=headers, trust_env=False).status_code == status
        replicas = [pid for pid, line in children_of(process.pid).items() if "--replica-socket" in line]
        assert len(replicas) == 2
        process.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in replicas), 60)


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two replicas need two cores")
def test_a_replica_that_cannot_be_started_ends_the_front_with_a_sentence(bundle: Path) -> None:
    code = "from autoglm_edge.commands.serve import serve; serve.main(prog_name='autoglm serve')"
    command = [
        sys.executable,
        "-c",
        code,
        str(bundle),
        "--port",
        "0",
        "--replicas",
        "2",
        "--context",
        "999999",
    ]

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 1
    assert "context is 999999" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: replica 0 ended with status 1")


def test_more_replicas_than_cores_are_refused(bundle: Path) -> None:
    if len(os.sched_getaffinity(0)) >= 64:
        pytest.skip("this machine has a core for each of 64 replicas")
    result = CliRunner(env={"AUTOGLM_API_KEY": ""}).invoke(serve, [str(bundle), "--replicas", "64"])

    assert result.exit_code == 2
    assert "64 replicas need a core each" in result.stderr


# --- a file over Ray


@pytest.mark.slow
@NEEDS_RAY
def test_a_file_over_ray_is_complete_though_a_worker_is_killed(bundle: Path, tmp_path: Path) -> None:
    asked_for, out, alone = tmp_path / "in.jsonl", tmp_path / "ray.jsonl", tmp_path / "alone.jsonl"
    lines = [{"id": f"r{item}"} | endless(f"text {item}", 40) for item in range(48)]
    asked_for.write_text("".join(json.dumps(line) + "\n" for line in lines) + "nonsense\n")
    code = "from autoglm_edge.commands.run import run; run.main(prog_name='autoglm run')"
    command = [sys.executable, "-c", code, str(bundle), "--batch", str(asked_for), "--max-concurrency", "1"]
    command += ["--threads", "1", "--context", "512", "--ordered", "-o"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    process = subprocess.Popen(
        [*command, str(out), "--ray", "--workers", "2"], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        wait_until(
            lambda: process.poll() is not None or (out.exists() and out.read_bytes().count(b"\n") >= 2), 120
        )
        workers = [pid for pid, line in answering().items() if belongs_to(pid, process.pid)]
        assert len(workers) == 2, "both workers are at it"
        assert {address for address in listening(process.pid)} == {"127.0.0.1"}
        assert out.read_bytes().count(b"\n") < 40
        os.kill(workers[0], signal.SIGKILL)
        _, said = process.communicate(timeout=180)
    finally:
        process.kill()
        process.wait()
    done = subprocess.run(
        [*command, str(alone)], capture_output=True, text=True, check=False, env=environment
    )

    assert process.returncode == 0, said
    assert done.returncode == 0, done.stderr
    over_ray, one_by_one = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (out, alone)
    )
    assert [line["custom_id"] for line in over_ray] == [*(f"r{item}" for item in range(48)), None]
    assert [said_in(line) for line in over_ray] == [said_in(line) for line in one_by_one]
    assert workers[0] not in answering()


@pytest.mark.slow
@NEEDS_RAY
def test_an_engine_that_no_worker_can_load_is_one_sentence(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(endless("Hi", 2)) + "\n")
    code = "from autoglm_edge.commands.run import run; run.main(prog_name='autoglm run')"
    command = [sys.executable, "-c", code, str(bundle), "--batch", str(tmp_path / "in.jsonl")]
    command += ["-o", str(tmp_path / "out"), "--ray", "--context", "999999"]

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: the cluster gave up (context is 999999")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out").read_bytes() == b""


def test_a_cluster_without_its_package_says_which_extra_brings_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_BACKEND_LOG_LEVEL", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # and so put back at the end
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "")
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "in.jsonl").write_text(json.dumps(endless("Hi", 2)) + "\n")
    arguments = [bundle, "--batch", tmp_path / "in.jsonl", "-o", tmp_path / "out", "--ray"]

    result = CliRunner().invoke(run, [*map(str, arguments)])

    assert result.exit_code == 1
    assert 'pip install "autoglm-edge[ray]"' in result.stderr


def test_pieces_are_small_enough_to_keep_all_workers_busy() -> None:
    assert piece_length(1, 8) == 1
    assert piece_length(320, 2) == 10
    assert piece_length(100_000, 2) == 64
    assert -(-10_000_000 // piece_length(10_000_000, 2)) <= 20_000


def test_a_line_whose_worker_dies_again_and_again_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    numbers, offsets = array("Q", [1, 2]).tobytes(), array("Q", [0, 16]).tobytes()
    feeder = Feeder(str(path), 100, numbers, offsets)

    for _ in range(4):
        assert feeder.line(1) == (2, b'{"prompt": "b"}\n')
    with pytest.raises(EdgeError, match="line 2, or one near to it, died 4 times"):
        feeder.line(1)
    assert feeder.line(0)[0] == 1


def listening(ancestor: int) -> Iterator[str]:
    """Addresses on which a process and those that it started wait for connections."""
    inodes = set()
    for folder in Path("/proc").glob("[0-9]*"):
        if belongs_to(int(folder.name), ancestor):
            try:
                links = [os.readlink(item) for item in (folder / "fd").iterdir()]
            except OSError:
                continue
            inodes |= {link[8:-1] for link in links if link.startswith("socket:")}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A: LISTEN
                words = bytes.fromhex(fields[1].partition(":")[0])
                address = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                found = ipaddress.ip_address(address)
                yield str(getattr(found, "ipv4_mapped", None) or found)


def said_in(line: dict[str, Any]) -> Any:
    """What an output line says, without names and times."""
    if line["response"] is None:
        return line["error"]
    body = line["response"]["body"]
    return body["choices"], body["usage"]["completion_tokens"]


def answering() -> dict[int, str]:
    """Ray's workers that answer lines, with their titles."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if line.startswith("ray::") and "AnsweringActor" in line:
            found[int(folder.name)] = line
    return found


def belongs_to(pid: int, ancestor: int) -> bool:
    while pid > 1 and pid != ancestor:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return pid == ancestor
