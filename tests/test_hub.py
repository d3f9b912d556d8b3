"""Downloads, with a hub that exists in this file only."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import errors
from make_checkpoint import make_checkpoint

from autoglm_edge.errors import CheckpointError, DependencyError
from autoglm_edge.export.source import hub
from autoglm_edge.export.source.checkpoint import Checkpoint

NAME = "zai-org/AutoGLM-Phone-9B"
COMMIT = "f" * 40


class Sibling(NamedTuple):
    rfilename: str
    size: int | None


class Info(NamedTuple):
    sha: str
    siblings: list[Sibling] | None


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@dataclass
class FakeHub:
    """One repository, a cache, and what goes wrong."""

    remote: Path
    cache: Path
    problem: Exception | None = None
    problem_while_fetching: Exception | None = None
    siblings: list[Sibling] | None = None
    calls: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def snapshot(self) -> Path:
        return self.cache / "models--zai-org--AutoGLM-Phone-9B" / "snapshots" / COMMIT

    def model_info(self, name: str, *, revision: str | None, files_metadata: bool) -> Info:
        self.calls.append(("info", (name, revision, files_metadata)))
        if self.problem is not None:
            raise self.problem
        listed = [Sibling(file.name, file.stat().st_size) for file in sorted(self.remote.iterdir())]
        return Info(COMMIT, listed if self.siblings is None else self.siblings)

    def hf_hub_download(self, name: str, file: str, *, revision: str) -> str:
        self.calls.append(("file", (name, file, revision)))
        self.snapshot.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(self.remote / file, self.snapshot / file))

    def try_to_load_from_cache(self, name: str, file: str, *, revision: str) -> str | None:
        path = self.snapshot / file
        return str(path) if path.exists() else None

    def snapshot_download(self, name: str, *, local_files_only: bool = False, **options: Any) -> str:
        self.calls.append(("cached" if local_files_only else "snapshot", options))
        if local_files_only:
            if not (self.snapshot / "model.safetensors").exists():
                raise errors.LocalEntryNotFoundError("not in the cache")
            return str(self.snapshot)
        if self.problem_while_fetching is not None:
            raise self.problem_while_fetching
        shutil.copytree(self.remote, self.snapshot, dirs_exist_ok=True)
        return str(self.snapshot)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.chdir(tmp_path)
    it = FakeHub(make_checkpoint(tmp_path / "remote"), tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: it)
    for name in ("hf_hub_download", "try_to_load_from_cache", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(it, name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(it.cache))
    return it


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    """An error as the hub's functions raise it, without a server."""
    response_type = errors.Response  # type: ignore[attr-defined]
    from types import ModuleType

    client: ModuleType = __import__(response_type.__module__.split(".")[0])
    request = client.Request("GET", "https://huggingface.co/api/models/x")
    return kind(f"{status} Client Error\n\nRequest ID: 1", response=client.Response(status, request=request))


def refusal(name: str = NAME, revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        hub.download(name, revision)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_download_gives_the_snapshot_and_its_commit(fake: FakeHub) -> None:
    folder, commit = hub.download(NAME, "v2")
    assert (folder, commit) == (fake.snapshot, COMMIT)
    assert fake.calls[0] == ("info", (NAME, "v2", True))
    name, options = fake.calls[-1]
    assert name == "snapshot"
    assert options["revision"] == "v2"
    assert options["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja", "*.txt"]
    assert options["ignore_patterns"] == ["*/*"]


def test_a_hub_id_opens_as_a_checkpoint_with_name_and_revision(fake: FakeHub) -> None:
    checkpoint = Checkpoint.open(NAME)
    assert checkpoint.config.source == NAME
    assert checkpoint.revision == COMMIT
    assert checkpoint.path == fake.snapshot


def test_an_existing_folder_is_never_taken_for_a_hub_id(fake: FakeHub, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / NAME)
    assert Checkpoint.open(NAME).config.source == "AutoGLM-Phone-9B"
    assert fake.calls == []


def test_another_model_is_refused_before_its_weights_are_fetched(fake: FakeHub) -> None:
    config = json.loads((fake.remote / "config.json").read_text())
    (fake.remote / "config.json").write_text(json.dumps({**config, "model_type": "glm4v_moe"}))
    with pytest.raises(CheckpointError, match=r"AutoGLM-Phone-9B/config\.json describes .*GLM-4\.5V"):
        Checkpoint.open(NAME)
    assert [name for name, _ in fake.calls] == ["info", "file"]


def test_too_little_disk_space_is_told_before_the_weights_are_fetched(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.siblings = [
        Sibling("config.json", 10),
        Sibling("model-00001-of-00001.safetensors", 20_600_000_000),
        Sibling("README.md", 5),
        Sibling("original/consolidated.safetensors", 99_000_000_000),
    ]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 21_000_000_000))
    message = refusal()
    assert "20.6 GB more" in message
    assert "21.0 GB free" in message
    assert "HF_HOME" in message
    assert "snapshot" not in [name for name, _ in fake.calls]


def test_what_is_in_the_cache_needs_no_space(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.download(NAME)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    assert hub.download(NAME) == (fake.snapshot, COMMIT)


def test_unknown_sizes_do_not_stop_a_download(fake: FakeHub) -> None:
    fake.siblings = [Sibling("config.json", None), Sibling("model.safetensors", None)]
    assert hub.download(NAME)[1] == COMMIT


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (["README.md", "model-Q4_K_M.gguf"], "no safetensors files (it holds model-Q4_K_M.gguf)"),
        (["config.json", "pytorch_model.bin"], "no safetensors files (it holds pytorch_model.bin)"),
        (["config.json", "sub/model.safetensors"], "no safetensors files"),
        (["model.safetensors"], "has no config.json"),
        ([], "no safetensors files"),
    ],
)
def test_a_repository_without_a_checkpoint_is_refused_before_anything_is_fetched(
    files: list[str], match: str, fake: FakeHub
) -> None:
    fake.siblings = [Sibling(name, 1) for name in files]
    assert match in refusal()
    assert [name for name, _ in fake.calls] == ["info"]


@pytest.mark.parametrize(
    ("kind", "status", "matches"),
    [
        (errors.GatedRepoError, 403, ["is gated", "ask for access", "hf auth login"]),
        (errors.RepositoryNotFoundError, 404, ["neither a folder", "check the spelling", "hf auth login"]),
        (errors.RevisionNotFoundError, 404, ["no revision 'v9'"]),
        (errors.HfHubHTTPError, 503, ["503 Client Error", "HF_ENDPOINT", f"hf download {NAME}"]),
    ],
)
def test_a_hub_that_refuses_says_what_to_do(
    kind: type[errors.HfHubHTTPError], status: int, matches: list[str], fake: FakeHub
) -> None:
    fake.problem = http_error(kind, status)
    message = refusal(revision="v9")
    assert all(match in message for match in matches), message


def network_errors() -> list[Exception]:
    client_error = errors.HfHubHTTPError.__bases__[0]
    return [
        client_error("Name or service not known"),
        ConnectionError("refused"),
        TimeoutError(),
        errors.OfflineModeIsEnabled("offline mode"),
        errors.LocalEntryNotFoundError("no network"),
    ]


@pytest.mark.parametrize("problem", network_errors(), ids=lambda error: type(error).__name__)
def test_without_network_the_way_out_is_told(problem: Exception, fake: FakeHub) -> None:
    fake.problem = problem
    message = refusal()
    assert f"hf download {NAME} --local-dir" in message
    assert "HF_ENDPOINT" in message


@pytest.mark.parametrize("problem", network_errors(), ids=lambda error: type(error).__name__)
def test_without_network_a_cached_snapshot_is_used(
    problem: Exception, fake: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.download(NAME)
    fake.problem = problem
    assert hub.download(NAME) == (fake.snapshot, COMMIT)
    assert "using the copy in the cache" in caplog.text


def test_a_connection_that_breaks_while_fetching_is_told(fake: FakeHub) -> None:
    fake.problem_while_fetching = ConnectionError("reset by peer")
    assert "reset by peer" in refusal()


def test_an_incomplete_snapshot_in_the_cache_is_found_when_it_opens(fake: FakeHub) -> None:
    hub.download(NAME)
    (fake.snapshot / "tokenizer.json").unlink()
    fake.problem = ConnectionError("no route")
    with pytest.raises(CheckpointError, match=r"lacks tokenizer\.json"):
        Checkpoint.open(NAME)


def test_a_disk_that_fills_up_while_fetching_is_told(fake: FakeHub) -> None:
    fake.problem_while_fetching = OSError(errno.ENOSPC, "No space left on device")
    message = refusal()
    assert "is full" in message
    assert "goes on where it stopped" in message


def test_a_broken_config_on_the_hub_is_told(fake: FakeHub) -> None:
    (fake.remote / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Checkpoint.open(NAME)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DependencyError, match=r"autoglm-edge\[export\]"):
        hub.download(NAME)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("zai-org/AutoGLM-Phone-9B", True),
        ("a/b", True),
        ("org/name.v1_2", True),
        ("AutoGLM-Phone-9B", False),
        ("out/", False),
        ("/abs/path", False),
        ("./model", False),
        ("../model", False),
        ("a/b/c", False),
        ("a/b..c", False),
        ("a/b--c", False),
        ("a b/c", False),
        ("https://huggingface.co/zai-org/x", False),
        ("C:\\model", False),
        ("org/" + "x" * 120, False),
        ("", False),
    ],
)
def test_only_org_and_name_make_a_hub_id(name: str, wanted: bool) -> None:
    assert hub.is_hub_id(name) is wanted
