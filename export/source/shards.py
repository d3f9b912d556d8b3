"""Which files of a folder hold the weights, and whether an index agrees with them.

In: a folder. Out: its safetensors files in order, or what the folder holds instead, as an error. Knows the
names that transformers gives to files, and nothing of what is in them beside tensor names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from autoglm_edge.errors import CheckpointError
from autoglm_edge.export.files import read_json

from .header import Entry, MappedFile

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_log = logging.getLogger(__name__)


def find(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder, and the index where there is one.

    Raises:
        CheckpointError: no weights, a shard that is missing, or an index that is damaged.
    """
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.exists():
        if index.exists():
            _log.warning("%s holds %s and %s; reading the former", folder, SINGLE_NAME, INDEX_NAME)
        return [single], None
    if index.exists():
        return _read_index(index)
    raise CheckpointError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    """What to say of a folder without an entry point to safetensors weights."""
    names = sorted(path.name for path in folder.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in shards):
        return f"{folder} holds shards ({shards[0]}, ...) but not {INDEX_NAME}; download that file too"
    if "adapter_model.safetensors" in names or "adapter_config.json" in names:
        return f"{folder} holds an adapter (LoRA), not a model; merge it into its base model first"
    if shards:
        return (
            f"{folder} holds {shards[0]} but neither {SINGLE_NAME} nor {INDEX_NAME}; rename it if it is the "
            "whole model"
        )
    if gguf := [name for name in names if name.lower().endswith(".gguf")]:
        return (
            f"{folder} holds {gguf[0]}, a GGUF file, which is already converted and quantized; give the "
            "original safetensors checkpoint"
        )
    if old := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"{folder} holds pickled weights ({old[0]}) and no safetensors, and pickles are not read because "
            "they can run code; download the safetensors files, or save the model again with save_pretrained"
        )
    if "manifest.json" in names and any(name.endswith(".onnx") for name in names):
        return (
            f"{folder} is an exported bundle, not a checkpoint; run it, or give the checkpoint it was made "
            "from"
        )
    return f"{folder} holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME} is there"


def _read_index(path: Path) -> tuple[list[Path], dict[str, str]]:
    document = read_json(path)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{path} has no "weight_map" with tensor names; download it again')
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file or "\\" in file:
            raise CheckpointError(
                f"{path} puts the tensor {name!r} into {file!r}, which is not a file name in its folder"
            )
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (path.parent / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent} lacks {len(missing)} of the {len(files)} weight files that {path.name} names, "
            f"first {missing[0]}; download the missing files"
        )
    return [path.parent / file for file in files], weight_map


def compare_with_index(
    index: Path, weight_map: Mapping[str, str], entries: Mapping[str, Entry], files: Sequence[MappedFile]
) -> None:
    """Refuse an index that puts a tensor into another file than the one that has it.

    Raises:
        CheckpointError: naming the first such tensor.
    """
    for name, file in weight_map.items():
        entry = entries.get(name)
        if entry is None or files[entry.file].path.name != file:
            where = "no file has it" if entry is None else f"it lies in {files[entry.file].path.name}"
            raise CheckpointError(
                f"{index} puts the tensor {name!r} into {file}, but {where}; index and shards are of "
                "different downloads"
            )
    for name, entry in entries.items():
        if name not in weight_map:
            raise CheckpointError(
                f"{files[entry.file].path} holds the tensor {name!r}, which {index.name} does not list; "
                "index and shards are of different downloads"
            )
