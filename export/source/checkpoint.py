"""A model folder in the form that transformers saves: settings, weights, tokenizer.

In: a folder, a hub id, or "pocket". Out: `Checkpoint`, checked: its settings are supported, every tensor is
there with the right shape and in a float format, and the files that a runtime needs besides the weights are
at hand. Knows nothing of graphs and bundles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoglm_edge.embedded import POCKET_NAME, pocket_path
from autoglm_edge.errors import CheckpointError
from autoglm_edge.export.files import CONFIG_NAME, GENERATION_NAME, read_bytes, read_json

from . import hub
from .companions import chat_template, check_tokenizer, side_files
from .config import ModelConfig, TextConfig, VisionConfig
from .family import ALREADY_QUANTIZED, check_family
from .processor import processor_settings
from .shapes import EMBEDDING, HEAD, expected_tensors
from .tensors import FLOATS, TensorStore

__all__ = ["Checkpoint", "ModelConfig", "TextConfig", "VisionConfig", "check_family", "expected_tensors"]

QUANTIZED_SUFFIXES = (
    ".qweight",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".absmax",
    ".quant_state",
)

_COMPARED_ROWS = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened and checked checkpoint.

    Attributes:
        path: the folder.
        config: what its JSON files say.
        tensors: its weights.
        revision: commit of a hub download, else None.
    """

    path: Path
    config: ModelConfig
    tensors: TensorStore
    revision: str | None

    @classmethod
    def open(cls, path_or_name: str | Path, revision: str | None = None) -> Checkpoint:
        """Open a folder, a hub id ("org/name", downloaded when it is not a folder) or "pocket".

        Args:
            path_or_name: what to open; an existing path always wins over the other two meanings.
            revision: branch, tag or commit of a hub id.

        Raises:
            CheckpointError: nothing there, another model, an unsupported setting, or incomplete or damaged
                files; said before any tensor value is read.
            DependencyError: a hub id, and huggingface_hub is not installed.
        """
        try:
            return cls._open(*_locate(path_or_name, revision))
        except OSError as error:  # a folder or link that may not be followed; files are converted by name
            raise CheckpointError(
                f"{error.filename or path_or_name} cannot be read ({error.strerror})"
            ) from error

    @classmethod
    def _open(cls, folder: Path, name: str, commit: str | None) -> Checkpoint:
        config_bytes = read_bytes(folder / CONFIG_NAME)
        document = read_json(folder / CONFIG_NAME)
        check_family(document, folder / CONFIG_NAME)
        processor, processor_name = processor_settings(folder)
        generation = folder / GENERATION_NAME
        config = ModelConfig.from_documents(
            document,
            processor,
            read_json(generation) if generation.exists() else {},
            processor_name=processor_name,
            source=name,
            config_sha256=hashlib.sha256(config_bytes).hexdigest(),
        )
        tensors = TensorStore.open(folder)
        config = _with_real_head(config, tensors)
        checkpoint = cls(folder, config, tensors, commit)
        checkpoint.check(expected_tensors(config))
        check_tokenizer(folder, config)
        chat_template(folder)
        return checkpoint

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the weights with what a model of this geometry consists of.

        Args:
            expected: tensor name -> shape.

        Raises:
            CheckpointError: a tensor is missing, has another shape or is no float; names the first, counts
                the rest.
        """
        packed = [name for name in self.tensors.names if name.endswith(QUANTIZED_SUFFIXES)]
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            if packed:
                raise CheckpointError(f"{self.path} holds {packed[0]!r}: it is {ALREADY_QUANTIZED}")
            raise CheckpointError(
                f"{self.path} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r}; it is "
                f"incomplete or does not belong to its {CONFIG_NAME}"
            )
        odd = [name for name, shape in expected.items() if self.tensors.shape(name) != shape]
        if odd:
            raise CheckpointError(
                f"{self.path} holds {odd[0]!r} with the shape {self.tensors.shape(odd[0])}, {CONFIG_NAME} "
                f"asks for {expected[odd[0]]} ({len(odd)} tensors differ in all); the files belong to "
                "different models"
            )
        foreign = [name for name in expected if self.tensors.dtype(name) not in FLOATS.values()]
        if foreign:
            raise CheckpointError(
                f"{self.path} holds {foreign[0]!r} as {self.tensors.dtype(foreign[0])}: it is "
                f"{ALREADY_QUANTIZED}"
            )
        extra = [name for name in self.tensors.names if name not in expected]
        if extra:
            _log.warning("%s holds %d tensors that are not used, first %r", self.path, len(extra), extra[0])

    def side_files(self) -> dict[str, bytes]:
        """Files that a bundle takes over, by the names they have there; see `companions.side_files`."""
        return side_files(self.path)


def _locate(path_or_name: str | Path, revision: str | None) -> tuple[Path, str, str | None]:
    """Folder, name and commit of what was asked for."""
    try:
        path = Path(path_or_name).expanduser()
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a zero byte, of an unknown user
        raise CheckpointError(f"{str(path_or_name)!r} cannot be a path ({error})") from error
    if not str(path_or_name):
        raise CheckpointError(
            "the model is an empty string; give a folder, a hub id such as zai-org/AutoGLM-Phone-9B, or "
            "pocket"
        )
    if exists:
        if not is_folder:
            raise CheckpointError(
                f"{path} is a file; give the folder that holds {CONFIG_NAME} and the weights"
            )
        _check_folder(path)
        if revision is not None:
            raise CheckpointError(
                f"{path} is a folder, which has no revision {revision!r}; leave the revision out"
            )
        name, commit = _name_of(path)
        return path, name, commit
    name = str(path_or_name)
    if name == POCKET_NAME:
        if revision is not None:
            raise CheckpointError(f"the embedded model has no revision {revision!r}; leave the revision out")
        return pocket_path(), POCKET_NAME, None
    if hub.is_hub_id(name):
        folder, commit = hub.download(name, revision, inspect=check_family)
        return folder, name, commit
    if address := re.match(r"https?://[^/]+/([\w.-]+/[\w.-]+)", name):
        raise CheckpointError(f"{name!r} is a web address; give the hub id, such as {address[1]}")
    raise CheckpointError(
        f"{name!r} does not exist; give a folder, a hub id such as zai-org/AutoGLM-Phone-9B, or pocket"
    )


def _check_folder(folder: Path) -> None:
    if (folder / CONFIG_NAME).is_file():
        return
    names = {path.name for path in folder.iterdir()}
    if not names:
        raise CheckpointError(f"{folder} is empty; give the folder that holds {CONFIG_NAME} and the weights")
    snapshots = sorted(folder.glob("snapshots/*/config.json"))
    if snapshots:
        raise CheckpointError(
            f"{folder} is a cache folder of the hub; give the snapshot in it, {snapshots[-1].parent}"
        )
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{folder} holds an adapter (LoRA), not a model; merge it into its base model first"
        )
    gguf = sorted(name for name in names if name.lower().endswith(".gguf"))
    if gguf:
        raise CheckpointError(
            f"{folder} holds {gguf[0]}, a GGUF file, which is already converted and quantized; give the "
            "original safetensors checkpoint"
        )
    if "manifest.json" in names:
        raise CheckpointError(
            f"{folder} is an exported bundle, not a checkpoint; run it, or give the checkpoint it was made "
            "from"
        )
    raise CheckpointError(f"{folder} has no {CONFIG_NAME}; give the folder that holds it and the weights")


def _name_of(folder: Path) -> tuple[str, str | None]:
    """Name and commit: of a snapshot in the hub's cache, those of the hub; else the folder's name."""
    real = folder.resolve()
    match = re.fullmatch(r"models--([^/]+?)--([^/]+)", real.parent.parent.name)
    if match and real.parent.name == "snapshots":
        return f"{match[1]}/{match[2]}", real.name
    return real.name, None


def _with_real_head(config: ModelConfig, tensors: TensorStore) -> ModelConfig:
    """Untie a head that the config ties although the weights hold another one, as transformers does."""
    if not config.text.tied_head or HEAD not in tensors or EMBEDDING not in tensors:
        return config
    rows = tensors.shape(HEAD)[0] if tensors.shape(HEAD) else 0
    same = tensors.shape(HEAD) == tensors.shape(EMBEDDING) and {
        tensors.dtype(HEAD),
        tensors.dtype(EMBEDDING),
    } <= set(FLOATS.values())
    for start in range(0, rows if same else 0, _COMPARED_ROWS):
        stop = min(rows, start + _COMPARED_ROWS)
        if not np.array_equal(tensors.rows(HEAD, start, stop), tensors.rows(EMBEDDING, start, stop)):
            same = False
            break
    tensors.release(HEAD)
    tensors.release(EMBEDDING)
    if same:
        return config
    _log.warning(
        "%s is there and differs from the embedding, so the head is not tied as the config says", HEAD
    )
    return dataclasses.replace(config, text=dataclasses.replace(config.text, tied_head=False))
