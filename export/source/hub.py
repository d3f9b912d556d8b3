"""Checkpoints from the Hugging Face hub.

In: a hub id such as zai-org/AutoGLM-Phone-9B. Out: the snapshot's folder in the hub's own cache, and its
commit. Only safetensors, JSON, template and text files are fetched. The model is looked at, and the disk
space, before the weights are fetched; without network, a snapshot in the cache is used. Knows nothing of what
the files mean.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from autoglm_edge.errors import CheckpointError, DependencyError
from autoglm_edge.export.files import CONFIG_NAME, read_json

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt")
SPARE_BYTES = 1_000_000_000
"""Room that must be left on the disk after a download."""

_log = logging.getLogger(__name__)


class Inspect(Protocol):
    """Raises if a config.json is of a model that the caller cannot use."""

    def __call__(self, config: Mapping[str, Any], path: Path, /) -> None:
        """Look at the parsed file."""
        ...


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, "org/name"; an existing path is not one."""
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
    if not re.fullmatch(f"{part}/{part}", name) or "--" in name or ".." in name or len(name) > 96:
        return False
    return not Path(name).exists()


def download(name: str, revision: str | None = None, *, inspect: Inspect | None = None) -> tuple[Path, str]:
    """Fetch a checkpoint, or what of it is not in the hub's cache yet. Progress goes to stderr.

    Args:
        name: hub id, "org/name".
        revision: branch, tag or commit; the main branch if None.
        inspect: called with config.json before the weights are fetched.

    Returns:
        Folder of the snapshot, and its commit.

    Raises:
        CheckpointError: no such model or revision, no access, no safetensors in it, no network and nothing in
            the cache, or too little disk space; and whatever `inspect` raises.
        DependencyError: huggingface_hub is not installed.
    """
    hub = _library()
    foreign = _foreign_errors()
    try:
        info = hub.HfApi().model_info(name, revision=revision, files_metadata=True)
        commit = str(info.sha)
        sizes = _wanted(name, info.siblings or [])
        if inspect is not None:
            path = Path(hub.hf_hub_download(name, CONFIG_NAME, revision=commit))
            inspect(read_json(path), Path(name) / CONFIG_NAME)
        _check_space(hub, name, commit, sizes)
        folder = Path(hub.snapshot_download(name, revision=revision, **_SELECTION))
    except foreign as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"the disk with {hub.constants.HF_HUB_CACHE} is full; make room, or set HF_HOME to another "
                "disk, and start again: the download goes on where it stopped"
            ) from error
        cached = _cached(hub, name, revision)
        if cached is None:
            raise CheckpointError(_explain(hub, name, revision, error)) from error
        _log.warning("%s could not be asked for (%s); using the copy in the cache", name, _first_line(error))
        folder = cached
    return folder, folder.name


_SELECTION: dict[str, Any] = {"allow_patterns": list(PATTERNS), "ignore_patterns": ["*/*"]}


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise DependencyError(
            "a download from the hub needs huggingface_hub; install it with `pip install "
            "autoglm-edge[export]`, or give the path of a folder"
        ) from error
    return huggingface_hub


def _foreign_errors() -> tuple[type[Exception], ...]:
    """What the hub's functions raise when something is wrong with network, access or disk."""
    from huggingface_hub import errors

    return (
        OSError,  # HfHubHTTPError, LocalEntryNotFoundError and OfflineModeIsEnabled among them
        errors.HfHubHTTPError.__bases__[0],  # HTTPError of the HTTP client, which changed between releases
        errors.EntryNotFoundError,
        errors.HFValidationError,
        errors.RevisionResolutionError,
        errors.XetDownloadError,
    )


def _wanted(name: str, siblings: list[Any]) -> dict[str, int | None]:
    """Files to fetch with their sizes; refuses a repository that holds no checkpoint."""
    names = [str(item.rfilename) for item in siblings]
    if not any(fnmatch(file, "*.safetensors") and "/" not in file for file in names):
        other = next(
            (file for file in names if file.endswith((".gguf", ".bin", ".onnx", ".pt", ".npz"))), None
        )
        found = f" (it holds {other})" if other else ""
        raise CheckpointError(
            f"{name} on the hub holds no safetensors files{found}; give the repository with the original "
            "weights"
        )
    if CONFIG_NAME not in names:
        raise CheckpointError(
            f"{name} on the hub has no {CONFIG_NAME}; give the repository with the original checkpoint"
        )
    return {
        str(item.rfilename): item.size
        for item in siblings
        if "/" not in item.rfilename and any(fnmatch(item.rfilename, pattern) for pattern in PATTERNS)
    }


def _check_space(hub: ModuleType, name: str, commit: str, sizes: Mapping[str, int | None]) -> None:
    missing = sum(
        size or 0
        for file, size in sizes.items()
        if not isinstance(hub.try_to_load_from_cache(name, file, revision=commit), str)
    )
    cache = Path(hub.constants.HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if missing and missing + SPARE_BYTES > free:
        raise CheckpointError(
            f"{name} needs {missing / 1e9:.1f} GB more in {cache}, the disk has {free / 1e9:.1f} GB free; "
            "make room, or set HF_HOME to another disk"
        )


def _cached(hub: ModuleType, name: str, revision: str | None) -> Path | None:
    try:
        return Path(hub.snapshot_download(name, revision=revision, local_files_only=True, **_SELECTION))
    except _foreign_errors():
        return None


def _explain(hub: ModuleType, name: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors

    endpoint = hub.constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated; ask for access at {endpoint}/{name}, run `hf auth login`, and start again"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is neither a folder {name} here nor a model of that name at {endpoint}; check the "
            "spelling, or run `hf auth login` if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError | errors.RevisionResolutionError):
        return f"{name} has no revision {revision!r} at {endpoint}; give a branch, tag or commit that it has"
    return (
        f"there is no folder {name} here, and it cannot be fetched from {endpoint} ({_first_line(error)}); "
        "check the network, set HF_ENDPOINT to a mirror, or download it on another machine with `hf download "
        f"{name} --local-dir DIR`, copy DIR here and give its path"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
