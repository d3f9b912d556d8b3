"""The check on emulated ARM: fetched safely, unpacked safely, compared honestly.

The network is a folder or a local server here, and the emulator a script that runs this Python, so that all
but the emulation itself is tried everywhere. The real thing runs with AUTOGLM_ARM64=1: it fetches some 140 MB
once and takes minutes.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoglm_edge.android_sim.arm64 import check, debian, download, qemu, root, unpack, wheels
from autoglm_edge.android_sim.arm64.check import Question, check_arm64, prepare_arm64
from autoglm_edge.android_sim.arm64.report import (
    FLOATS,
    HALVES,
    KLEIDIAI,
    ROUNDED,
    Arm64Report,
    ArmRun,
    compare_logits,
    lead,
    tolerance_of,
)
from autoglm_edge.errors import EdgeError, SimulationError
from autoglm_edge.runtime.bundle import Bundle

CONTENT = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Heard:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.shown: list[tuple[str, int, int]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def show(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        self.shown.append((stage, done_bytes, total_bytes))


def fetch(url: str, target: Path, **changes: Any) -> Heard:
    heard = Heard()
    wanted = {"size_bytes": len(CONTENT), "sha256": DIGEST, "stage": "Fetching"} | changes
    download.download(url, target, tell=heard, **wanted)
    return heard


@pytest.fixture
def server() -> Iterator[dict[str, Any]]:
    """A local web server; the dictionary says how it behaves, and keeps what it was asked."""
    state: dict[str, Any] = {"ranges": True, "break_after": None, "asked": [], "content": CONTENT}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state["asked"].append(self.headers.get("Range"))
            start = 0
            if state["ranges"] and self.headers.get("Range"):
                start = int(self.headers["Range"].split("=")[1].rstrip("-"))
            rest = state["content"][start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            if state["break_after"] is not None:
                rest = rest[: state["break_after"]]
                state["break_after"] = None
            self.wfile.write(rest)

        def log_message(self, *_: Any) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    state["url"] = f"http://127.0.0.1:{web.server_port}/file"
    yield state
    web.shutdown()
    web.server_close()
    thread.join()


# --- fetching


def test_a_file_is_fetched_once_with_progress(server: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    heard = fetch(server["url"], target)
    fetch(server["url"], target)

    assert target.read_bytes() == CONTENT
    assert len(server["asked"]) == 1
    assert heard.shown[-1] == ("Fetching", len(CONTENT), len(CONTENT))
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_broken_connection_is_taken_up_where_it_broke(server: dict[str, Any], tmp_path: Path) -> None:
    server["break_after"] = 300_000
    fetch(server["url"], tmp_path / "file")

    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(server["asked"]) == 2 and server["asked"][1].startswith("bytes=")


def test_an_earlier_attempt_is_gone_on_with(server: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    fetch(server["url"], tmp_path / "file")

    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server["asked"] == ["bytes=1000-"]


def test_a_server_without_ranges_begins_anew(server: dict[str, Any], tmp_path: Path) -> None:
    server["ranges"] = False
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    fetch(server["url"], tmp_path / "file")

    assert (tmp_path / "file").read_bytes() == CONTENT


def test_an_attempt_at_another_version_is_begun_anew(server: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    fetch(server["url"], tmp_path / "file")

    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server["asked"] == ["bytes=1000-", None]


def test_a_file_with_another_digest_is_refused_and_not_kept(server: dict[str, Any], tmp_path: Path) -> None:
    server["content"] = CONTENT[:-1] + b"!"

    with pytest.raises(SimulationError, match="the index says"):
        fetch(server["url"], tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_mirror_that_sends_more_does_not_fill_the_disk(server: dict[str, Any], tmp_path: Path) -> None:
    server["content"] = CONTENT * 40

    with pytest.raises(SimulationError):
        fetch(server["url"], tmp_path / "file")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= len(CONTENT) + download.PIECE_BYTES


def test_no_network_is_one_sentence(tmp_path: Path) -> None:
    for call in (
        lambda: fetch("http://127.0.0.1:9/x", tmp_path / "file"),
        lambda: fetch((tmp_path / "absent").as_uri(), tmp_path / "file"),
        lambda: download.read_small("http://127.0.0.1:9/x", 10),
    ):
        with pytest.raises(SimulationError, match=r"cannot be fetched .*; connect to the network") as caught:
            call()
        assert str(caught.value).count("\n") == 0


def test_an_address_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="no address"):
        fetch("ftp://example.org/x", tmp_path / "file")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")

    with pytest.raises(SimulationError, match="AUTOGLM_EDGE_CACHE"):
        fetch("http://127.0.0.1:9/x", tmp_path / "plain" / "file")


# --- Debian's archive


def archive(folder: Path, packages: dict[str, bytes], **changes: str) -> str:
    """A mirror as a folder; changes replace fields of every entry, or the digest in the release."""
    entries = []
    for name, content in packages.items():
        place = f"pool/main/{name[0]}/{name}/{name}_1.0_arm64.deb"
        file = folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        fields = {
            "Package": name,
            "Version": "1.0",
            "Filename": place,
            "Size": str(len(content)),
            "SHA256": hashlib.sha256(content).hexdigest(),
            "Description": "one\n Package: other",
        } | {key: value for key, value in changes.items() if key != "release"}
        entries.append("".join(f"{key}: {value}\n" for key, value in fields.items() if value))
    index = lzma.compress("\n".join(entries).encode())
    place = "main/binary-arm64/Packages.xz"
    file = folder / "dists" / "bookworm" / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(index)
    digest = changes.get("release", hashlib.sha256(index).hexdigest())
    release = f"Suite: bookworm\nMD5Sum:\n {'0' * 32} 1 {place}\nSHA256:\n {digest} {len(index)} {place}\n"
    (folder / "dists" / "bookworm" / "InRelease").write_text(release)
    return folder.as_uri()


@pytest.fixture
def _unsigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "KEYRING", Path("/nowhere"))


def find(mirror: str, folder: Path, *names: str) -> debian.Found:
    return debian.find_packages(
        names, suite="bookworm", architecture="arm64", folder=folder, tell=Heard(), mirror=mirror
    )


@pytest.mark.usefixtures("_unsigned")
def test_packages_are_found_by_name_with_their_digests(tmp_path: Path) -> None:
    mirror = archive(tmp_path / "mirror", {"one": b"1", "two": b"22", "other": b"333"})
    found = find(mirror, tmp_path / "cache", "two", "one")

    assert [(item.name, item.size_bytes) for item in found.packages] == [("two", 2), ("one", 1)]
    assert found.packages[0].sha256 == hashlib.sha256(b"22").hexdigest()
    assert found.signature.startswith("not checked")


@pytest.mark.usefixtures("_unsigned")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"release": "0" * 64}, "the index says"),
        ({"release": "zz"}, "does not list"),
        ({"Filename": "../../etc/passwd"}, "no path of an archive"),
        ({"Filename": "pool/../../x.deb"}, "no path of an archive"),
        ({"SHA256": "abc"}, "no usable size and SHA-256"),
        ({"Size": "-1"}, "no usable size and SHA-256"),
        ({"Size": "many"}, "try another mirror"),
        ({"SHA256": ""}, "without 'SHA256'"),
    ],
)
def test_an_index_that_is_not_what_it_should_be_is_refused(
    changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    mirror = archive(tmp_path / "mirror", {"one": b"1"}, **changes)

    with pytest.raises(SimulationError, match=message):
        find(mirror, tmp_path / "cache", "one")


@pytest.mark.usefixtures("_unsigned")
def test_a_missing_package_or_archive_is_named(tmp_path: Path) -> None:
    mirror = archive(tmp_path / "mirror", {"one": b"1"})

    with pytest.raises(SimulationError, match="no arm64 package qemu"):
        find(mirror, tmp_path / "cache", "qemu")
    (tmp_path / "mirror/dists/bookworm/InRelease").write_text("<html>log in to the hotel</html>")
    with pytest.raises(SimulationError, match="no index of a Debian archive"):
        find(mirror, tmp_path / "cache", "one")


@pytest.mark.parametrize(
    ("status", "output", "message"),
    [
        ("[GNUPG:] BADSIG 1 Debian\n[GNUPG:] VALIDSIG 2", b"text", "wrong signature"),
        ("[GNUPG:] NODATA 1", b"", "is not signed"),
    ],
)
def test_a_wrong_or_missing_signature_is_refused_where_it_can_be_checked(
    status: str, output: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = archive(tmp_path / "mirror", {"one": b"1"})
    monkeypatch.setattr(debian, "KEYRING", tmp_path / "mirror/dists/bookworm/InRelease")
    monkeypatch.setattr(debian.shutil, "which", lambda _: "/usr/bin/gpgv")
    done = subprocess.CompletedProcess([], 1, output, status.encode())
    monkeypatch.setattr(debian.subprocess, "run", lambda *_, **__: done)

    with pytest.raises(SimulationError, match=message):
        find(mirror, tmp_path / "cache", "one")


def test_only_what_was_signed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = archive(tmp_path / "mirror", {"one": b"1"})
    release = tmp_path / "mirror/dists/bookworm/InRelease"
    signed = release.read_bytes()
    release.write_bytes(b"SHA256:\n " + b"0" * 64 + b" 5 main/binary-arm64/Packages.xz\n\n" + signed)
    monkeypatch.setattr(debian, "KEYRING", release)
    monkeypatch.setattr(debian.shutil, "which", lambda _: "/usr/bin/gpgv")
    done = subprocess.CompletedProcess([], 0, signed, b"[GNUPG:] VALIDSIG 2")
    monkeypatch.setattr(debian.subprocess, "run", lambda *_, **__: done)

    assert find(mirror, tmp_path / "cache", "one").signature == "signed by Debian, checked"


# --- unpacking


def deb(path: Path, *members: tuple[tarfile.TarInfo, bytes], name: str = "data.tar.xz") -> Path:
    """A Debian package with the members."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    parts = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (name, data.getvalue())]
    text = b"!<arch>\n"
    for part, content in parts:
        text += f"{part:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        text += b"\n" * (len(content) % 2)
    path.write_bytes(text)
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = kind, link, 0o755
    return member


def test_a_package_is_unpacked_without_its_documentation(tmp_path: Path) -> None:
    package = deb(
        tmp_path / "a.deb",
        (entry("./", tarfile.DIRTYPE), b""),
        (entry("./usr/bin/tool"), b"#!"),
        (entry("./usr/share/doc/tool/copyright"), b"long"),
        (entry("./usr/lib/site.py", tarfile.SYMTYPE, "/etc/site.py"), b""),
        (entry("./etc/site.py"), b"1"),
        (entry("./dev/null", tarfile.CHRTYPE), b""),
    )
    unpack.unpack_deb(package, tmp_path / "root")

    files = {str(path.relative_to(tmp_path / "root")) for path in (tmp_path / "root").rglob("*.*")}
    assert files == {"usr/lib/site.py", "etc/site.py"}
    assert os.readlink(tmp_path / "root/usr/lib/site.py") == "../../etc/site.py"
    assert (tmp_path / "root/usr/lib/site.py").read_bytes() == b"1"
    assert (tmp_path / "root/usr/bin/tool").stat().st_mode & stat.S_IXUSR
    assert not (tmp_path / "root/dev/null").exists()


@pytest.mark.parametrize(
    "member",
    [
        entry("../outside"),
        entry("usr/../../outside"),
        entry("link", tarfile.SYMTYPE, "../../outside"),
        entry("link", tarfile.LNKTYPE, "../outside"),
    ],
)
def test_a_package_cannot_write_outside_its_folder(member: tarfile.TarInfo, tmp_path: Path) -> None:
    package = deb(tmp_path / "a.deb", (member, b""))

    with pytest.raises(SimulationError, match="cannot be unpacked"):
        unpack.unpack_deb(package, tmp_path / "in" / "root")
    assert not (tmp_path / "outside").exists() and not (tmp_path / "in/outside").exists()


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    whole = deb(tmp_path / "a.deb", (entry("usr/x"), b"1")).read_bytes()
    for content in (b"", b"PK\x03\x04", whole[:100], whole[:-40], whole.replace(b"data.tar", b"dato.tar")):
        (tmp_path / "b.deb").write_bytes(content)
        with pytest.raises(SimulationError):
            unpack.unpack_deb(tmp_path / "b.deb", tmp_path / "root")


def test_a_wheel_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    for name in ("../evil.py", "/evil.py"):
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive_file:
            archive_file.writestr(name, "x")
        with pytest.raises(SimulationError, match="leave its folder"):
            unpack.unpack_wheel(tmp_path / "a.whl", tmp_path / "in")
    (tmp_path / "a.whl").write_bytes(b"no zip")
    with pytest.raises(SimulationError, match="cannot be unpacked"):
        unpack.unpack_wheel(tmp_path / "a.whl", tmp_path / "in")
    assert not (tmp_path / "evil.py").exists()


# --- wheels and root


def test_wheels_are_those_of_the_versions_installed_here() -> None:
    found = wheels.versions()

    assert set(found) == set(wheels.PACKAGES)
    assert wheels.versions("1.27.0") == found | {"onnxruntime": "1.27.0"}


def test_a_wheel_that_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        (tmp_path / "numpy-2.4.6-cp311-cp311-manylinux_2_28_aarch64.whl").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    (tmp_path / "numpy-2.4.6-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    first = wheels.fetch_wheels({"numpy": "2.4.6"}, tmp_path, Heard())
    second = wheels.fetch_wheels({"numpy": "2.4.6"}, tmp_path, Heard())

    assert first == second and first[0].name.endswith("aarch64.whl")
    assert len(asked) == 1 and asked[0][-1] == "numpy==2.4.6"


def test_pip_without_a_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n\n")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: done)

    with pytest.raises(SimulationError, match="No matching distribution") as caught:
        wheels.fetch_wheels({"numpy": "9"}, tmp_path, Heard())
    assert "\n" not in str(caught.value) and "connect to the network" in str(caught.value)


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    place = tmp_path / "python"

    def fail(folder: Path) -> dict[str, str]:
        (folder / "half").write_text("x")
        raise SimulationError("no network")

    def make(folder: Path) -> dict[str, str]:
        (folder / "whole").write_text("x")
        return {"a": "b"}

    with pytest.raises(SimulationError, match="no network"):
        root._made(place, fail)
    assert not list(tmp_path.iterdir())
    (tmp_path / "python.part-999999999").mkdir()
    assert root._made(place, make) == place
    assert root._made(place, fail) == place
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_an_emulator_that_others_can_write_is_not_run(tmp_path: Path) -> None:
    place = tmp_path / "qemu"
    root._made(place, lambda _: {})
    place.chmod(0o777)

    with pytest.raises(SimulationError, match="another user"):
        root._made(place, lambda _: {})


def test_a_system_that_cannot_emulate_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root.platform, "machine", lambda: "riscv64")

    with pytest.raises(SimulationError, match="needs Linux on x86-64 or ARM"):
        root.ensure_root(Heard())


@pytest.mark.usefixtures("_unsigned")
def test_a_root_is_made_from_a_mirror_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root.platform, "machine", lambda: "aarch64")
    emulator = deb(
        tmp_path / "q.deb", (entry("usr/bin/qemu-aarch64"), b"Q"), (entry("usr/bin/qemu-arm"), b"R")
    )
    python = deb(tmp_path / "p.deb", (entry("usr/bin/python3.11"), b"P"))
    packages = {name: python.read_bytes() for name in root.PYTHON_PACKAGES}
    packages[root.EMULATOR_PACKAGE] = emulator.read_bytes()
    monkeypatch.setenv(root.MIRROR_VARIABLE, archive(tmp_path / "mirror", packages))
    monkeypatch.setattr(root, "EMULATOR_SUITE", "bookworm")

    def pip(wanted: dict[str, str], folder: Path, tell: Heard) -> list[Path]:
        with zipfile.ZipFile(folder / "numpy-1-py3-none-any.whl", "w") as file:
            file.writestr("numpy.py", "")
        return [folder / "numpy-1-py3-none-any.whl"]

    monkeypatch.setattr(root, "fetch_wheels", pip)
    heard = Heard()
    first = root.ensure_root(heard)
    monkeypatch.setenv(root.MIRROR_VARIABLE, "http://127.0.0.1:9")
    second = root.ensure_root(heard)

    assert first == second
    assert (first.emulator.read_bytes(), first.python.read_bytes()) == (b"Q", b"P")
    assert not first.emulator.with_name("qemu-arm").exists()
    assert (first.site / "numpy.py").exists()
    assert heard.shown[-1][1] == heard.shown[-1][2]
    assert root.remove_root() > 0 and not root.arm64_folder().exists() and root.remove_root() == 0


def test_two_that_fetch_wait_for_one_another(tmp_path: Path) -> None:
    heard = Heard()
    order: list[str] = []

    def second() -> None:
        with root._locked(tmp_path, heard):
            order.append("second")

    with root._locked(tmp_path, Heard()):
        thread = threading.Thread(target=second)
        thread.start()
        while not heard.said:
            threading.Event().wait(0.01)
        order.append("first")
    thread.join()

    assert order == ["first", "second"] and "waiting" in heard.said[0]


# --- running


@pytest.fixture(scope="module")
def bundle(checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(checkpoint_of("tiny"), "int4")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> root.Root:
    """A root whose emulator is this Python; `site` may hold a sitecustomize.py that makes it go wrong."""
    site = tmp_path / "site"
    site.mkdir()
    emulator = tmp_path / "emulator"
    emulator.write_text(
        f'#!/bin/sh\n[ "$1 $3" = "-cpu -L" ] || exit 9\nshift 5\nexec "{sys.executable}" "$@"\n'
    )
    emulator.chmod(0o700)
    made = root.Root(emulator, tmp_path / "system", site, wheels.versions(), "none")
    monkeypatch.setattr(check, "ensure_root", lambda *_: made)
    return made


def test_a_machine_that_computes_the_same_passes(fake: root.Root, bundle: Path) -> None:
    heard = Heard()
    report = check_arm64(bundle, tell=heard, question=Question("打开设置" * 20, max_tokens=4))

    assert report.passed
    assert [(run.cpu, run.prefill, run.kleidiai) for run in report.runs] == [
        ("cortex-a72", "decoder", False),
        ("cortex-a72", "layers", False),
        ("cortex-a76", "decoder", True),
        ("cortex-a76", "layers", True),
        ("cortex-a76", "decoder", False),
        ("cortex-a710", "decoder", True),
        ("cortex-a710", "layers", True),
        ("cortex-a710", "decoder", False),
    ]
    assert all(run.logits.rms == 0 and run.tokens == run.tokens_here for run in report.runs)
    assert report.runs[0].logits.positions == len(report.runs[0].tokens) + 1
    assert json.loads(report.to_json())["passed"] is True
    assert "passes" in report.to_table() and "rounded to bytes" in report.to_table()
    assert sum("Asking on an emulated" in text for text in heard.said) == 3
    assert not list(root.arm64_folder().iterdir())


def test_a_machine_that_computes_something_else_fails(fake: root.Root, bundle: Path) -> None:
    (fake.site / "sitecustomize.py").write_text(
        "import numpy\n"
        "plain = numpy.save\n"
        "def save(path, rows):\n"
        "    noise = numpy.random.default_rng(0).normal(size=rows.shape) * rows.std() * 0.2\n"
        "    plain(path, (rows + noise).astype(numpy.float32))\n"
        "numpy.save = save\n"
    )
    report = check_arm64(bundle, ["cortex-a76"], Heard(), question=Question(max_tokens=3))

    assert not report.passed
    assert all("logits rms" in run.faults[0] for run in report.runs)
    assert "logits rms 2" in report.to_table()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import os; os._exit(3)", "exit status 3"),
        ("import os; os._exit(0)", "without a word"),
        ("import sys; sys.modules['tokenizers'] = None", "tokenizers"),
    ],
)
def test_a_runtime_that_dies_there_is_told_in_a_sentence(
    code: str, message: str, fake: root.Root, bundle: Path
) -> None:
    (fake.site / "sitecustomize.py").write_text(code + "\n")

    with pytest.raises(SimulationError, match=message):
        check_arm64(bundle, ["cortex-a72"], Heard(), question=Question(max_tokens=1))
    assert not list(root.arm64_folder().iterdir())


def test_an_emulator_that_hangs_is_ended(
    fake: root.Root, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake.site / "sitecustomize.py").write_text("import time; time.sleep(60)\n")
    monkeypatch.setattr(qemu, "TIMEOUT_SECONDS", 0.5)

    with pytest.raises(SimulationError, match="killed by SIGKILL"):
        prepare_arm64(bundle, fake.site / "out", "cortex-a76", Heard())


def test_what_a_killed_check_left_is_gone_at_the_next(tmp_path: Path) -> None:
    (tmp_path / "check-a-999999999" / "jobs").mkdir(parents=True)
    (tmp_path / f"check-b-{os.getppid()}").mkdir()

    with qemu.laid_out(tmp_path) as app:
        there = {path.name for path in tmp_path.iterdir()}

    assert there == {app.parent.name, f"check-b-{os.getppid()}"}


def test_the_guest_is_laid_out_with_the_runtime_alone(tmp_path: Path) -> None:
    with qemu.laid_out(tmp_path) as app:
        found = {str(path.relative_to(app)) for path in app.rglob("*.py")}
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"import sys, {qemu.GUEST}; print(*sys.modules)"],
            env={"PYTHONPATH": str(app), "PATH": os.environ["PATH"]},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        own = {name for name in done.stdout.split() if name.startswith("autoglm_edge.")}

    assert "autoglm_edge/runtime/engine.py" in found and "autoglm_edge/cli.py" not in found
    assert {name.split(".")[1] for name in own} == {"errors", "files", "runtime", "android_sim"}
    assert not app.exists()


def test_wrong_questions_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="choose from cortex-a72"):
        check_arm64(bundle, ["cortex-z9"], Heard())
    with pytest.raises(SimulationError, match="no CPU is named"):
        check_arm64(bundle, [], Heard())
    with pytest.raises(SimulationError, match="is no file"):
        Question(images=(tmp_path / "absent.png",))
    with pytest.raises(SimulationError, match="max_tokens is 0"):
        Question(max_tokens=0)
    with pytest.raises(EdgeError):
        check_arm64(tmp_path, ["cortex-a72"], Heard())


def test_prepared_weights_are_made_in_the_folder_and_tried(
    fake: root.Root, bundle: Path, tmp_path: Path
) -> None:
    made = prepare_arm64(bundle, tmp_path / "weights", "cortex-a76", Heard())

    assert len(made.folders) == 2 and made.bytes > 0
    assert all(Path(folder).parent == tmp_path / "weights" / "prepared" for folder in made.folders)
    assert all((Path(folder) / "prepared.json").is_file() for folder in made.folders)


# --- comparing


def test_equal_logits_are_at_distance_nothing_and_a_constant_is_none() -> None:
    rows = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32)

    same, moved = compare_logits(rows, rows), compare_logits(rows, rows + np.float32(3))
    assert (same.rms, same.highest, same.kl_max, same.top1_agreement) == (0, 0, 0, 1)
    assert moved.rms < 1e-6 and moved.kl_max < 1e-9 and moved.highest == pytest.approx(3, rel=1e-5)


def test_distance_is_relative_to_the_spread_of_the_logits() -> None:
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(50, 1000)).astype(np.float32)
    noise = rng.normal(size=rows.shape).astype(np.float32) * np.float32(0.1)

    assert compare_logits(rows, rows + noise).rms == pytest.approx(0.1, rel=0.03)
    assert compare_logits(rows * 7, (rows + noise) * 7).rms == pytest.approx(0.1, rel=0.03)


def test_logits_that_cannot_be_compared_are_refused() -> None:
    rows = np.zeros((2, 3), np.float32)
    broken = rows.copy()
    broken[1, 1] = np.nan

    with pytest.raises(SimulationError, match="not of one sequence"):
        compare_logits(rows, rows[:1])
    with pytest.raises(SimulationError, match="on ARM are not all finite"):
        compare_logits(rows, broken)


def test_the_lead_is_read_where_answers_part() -> None:
    logits = np.zeros((4, 10), np.float32)
    logits[1, 5], logits[1, 6], logits[2, 9] = 3.0, 1.0, 0.5

    assert lead(logits, [4, 5, 7], [4, 5, 7], [9]) is None
    assert lead(logits, [4, 5, 7], [4, 6, 7], [9]) == 2.0
    assert lead(logits, [4, 5, 7], [4, 5], [9]) == -0.5
    assert lead(logits, [4, 5], [4, 5, 7], [9]) == 0.5


def run_of(bundle: Path, **changes: Any) -> ArmRun:
    rows = np.random.default_rng(3).normal(size=(3, 20)).astype(np.float32)
    values: dict[str, Any] = {
        "cpu": "cortex-a76",
        "prefill": "decoder",
        "kleidiai": False,
        "same_prompt": True,
        "tokens": (1, 2),
        "tokens_here": (1, 2),
        "logits": compare_logits(rows, rows + np.float32(0.01) * rows[::-1]),
        "lead": None,
        "features_rms": None,
        "tolerance": ROUNDED,
        "seconds": 1.0,
    }
    return ArmRun(**(values | changes))


def test_each_difference_is_a_fault_and_a_tie_is_not(bundle: Path) -> None:
    good = run_of(bundle)
    distance = good.logits.highest

    assert good.faults == ()
    assert run_of(bundle, same_prompt=False).faults == ("another prompt",)
    assert run_of(bundle, tokens=(1, 3), lead=distance * 1.1).faults == ("other tokens",)
    tie = run_of(bundle, tokens=(1, 3), lead=distance * 0.9)
    assert tie.faults == () and tie.is_tie and not good.is_tie
    assert "image features" in run_of(bundle, features_rms=0.3).faults[0]
    assert "image features" in run_of(bundle, features_rms=float("nan")).faults[0]
    assert "logits rms" in run_of(bundle, tolerance=FLOATS).faults[0]


def test_a_report_without_runs_does_not_pass() -> None:
    report = Arm64Report("b", "f", "1", "1", "x86_64", 3, 0, "", (), "none", 0.0, 0.0)

    assert not report.passed


def test_tolerances_follow_the_arithmetic_of_the_bundle(
    checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    def of(
        precision: str, prefill: str = "decoder", *, pictures: bool, kleidiai: bool, **options: Any
    ) -> object:
        manifest = Bundle.open(bundle_of(checkpoint_of("tiny"), precision, **options)).manifest
        return tolerance_of(manifest, prefill=prefill, pictures=pictures, kleidiai=kleidiai)

    assert of("fp32", pictures=True, kleidiai=True) is FLOATS
    assert of("fp16", pictures=True, kleidiai=True) is HALVES
    assert of("int4", pictures=False, kleidiai=False) is ROUNDED
    assert of("int4", pictures=False, kleidiai=True) is KLEIDIAI
    assert of("int8", pictures=False, kleidiai=False) is ROUNDED
    assert of("int8-blocks", pictures=True, kleidiai=True, accuracy_level=0) is FLOATS
    assert of("int4", pictures=True, kleidiai=True, accuracy_level=0) is ROUNDED
    assert of("int4", "layers", pictures=False, kleidiai=True, accuracy_level=0) is ROUNDED


# --- the real thing

REAL = pytest.mark.skipif(
    os.environ.get("AUTOGLM_ARM64") != "1",
    reason="fetches some 140 MB and takes minutes; set AUTOGLM_ARM64=1",
)


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autoglm_edge.export.pipeline import export

    place = tmp_path_factory.mktemp("pocket") / "int4"
    export(None, place)
    return place


@pytest.fixture
def _lasting_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root is kept between runs, where AUTOGLM_ARM64_CACHE says, or else in the user's own cache."""
    place = os.environ.get("AUTOGLM_ARM64_CACHE") or str(Path.home() / ".cache" / "autoglm-edge")
    monkeypatch.setenv("AUTOGLM_EDGE_CACHE", place)


@REAL
@pytest.mark.arm64
@pytest.mark.usefixtures("_lasting_cache")
def test_the_pocket_bundle_answers_the_same_on_emulated_arm(pocket: Path) -> None:
    from autoglm_edge.embedded import sample_screenshot

    report = check_arm64(pocket, tell=Heard(), question=Question(images=(sample_screenshot(),)))

    assert report.passed, report.to_table()
    assert len(report.runs) == 8
    # An emulator that ran this machine's own code would give no difference at all.
    assert all(run.logits.rms > 0 for run in report.runs)


@REAL
@pytest.mark.arm64
@pytest.mark.usefixtures("_lasting_cache")
def test_the_wheel_of_the_android_release_answers_the_same(pocket: Path) -> None:
    from autoglm_edge.export.app.android_check import android_table

    report = check_arm64(
        pocket,
        ["cortex-a76"],
        Heard(),
        onnxruntime=android_table().onnxruntime,
        question=Question(max_tokens=8),
    )

    assert report.passed, report.to_table()
    assert report.onnxruntime == "1.27.0"


@REAL
@pytest.mark.arm64
@pytest.mark.usefixtures("_lasting_cache")
def test_weights_are_prepared_for_each_arm_cpu_apart(pocket: Path, tmp_path: Path) -> None:
    folders = {
        cpu: prepare_arm64(pocket, tmp_path / "weights", cpu, Heard()).folders
        for cpu in ("cortex-a72", "cortex-a710")
    }

    marker = json.loads((Path(folders["cortex-a710"][0]) / "prepared.json").read_text())
    assert marker["instruction_set"].startswith("aarch64+") and "i8mm" in marker["instruction_set"]
    assert not set(folders["cortex-a72"]) & set(folders["cortex-a710"])
