"""The folder that an Android app takes: a bundle, what session set-up needs to know, and a sample.

In: a bundle. Out: a folder beside it, checked against one release of onnxruntime-android. Runs nothing, and
has run nothing on a device (docs/android.md says what was tried where).

    OUT/
        model/                 the bundle itself, hard links where the file system allows
        app.json               graphs, inputs and outputs, session entries, geometry, special tokens
        kotlin/AutoGlmSession.kt   opens the sessions and runs them
        README.md              what to do with it

What an app cannot see before it crashes is checked here: that every operator, attribute and number type of
every graph is there in that release, that weights lie page-aligned in plain files beside their graph, and
that no file is larger than it must be for a path to open it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import onnx

from autoglm_edge.errors import ExportError
from autoglm_edge.export.graphs.plan import ALIGNMENT
from autoglm_edge.export.progress import Progress, ProgressEvent, silent
from autoglm_edge.export.staging import MARGIN_BYTES, nearest_folder, sync_folder, write_file
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.manifest import MANIFEST_NAME

from .android_check import android_table, check_graph

APP_NAME = "app.json"
APP_VERSION = 1
MODEL_FOLDER = "model"
SAMPLE_NAME = "AutoGlmSession.kt"
README_NAME = "README.md"
APP_PARTS = ("embedding", "vision", "decoder")
"""What the sample opens."""
PACKAGE = "com.microsoft.onnxruntime:onnxruntime-android"
MAPPED = {"session.disable_prepacking": "1"}
"""Keeps weights mapped where all products are of bytes; as `runtime.session.MAPPED`."""
_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.INT8: "int8",
}
_CACHED = re.compile(r"(past_key_values|present)\.([0-9]+)\.(key|value)")


@dataclass(frozen=True)
class AndroidApp:
    """A folder that was laid out.

    Attributes:
        path: the folder.
        onnxruntime: release of onnxruntime-android that it was checked against.
        model_bytes: of the bundle in it.
        linked: its files are hard links to the bundle's, and take no room of their own.
        operators: kinds of operators in its graphs.
    """

    path: Path
    onnxruntime: str
    model_bytes: int
    linked: bool
    operators: int


def lay_out_android(
    bundle: Bundle, output: str | Path, *, force: bool = False, progress: Progress | None = None
) -> AndroidApp:
    """Check a bundle for Android, and lay out what an app takes.

    Args:
        bundle: opened.
        output: folder to make; it must not exist, or be empty, or be such a folder and `force` be given.
        force: replace such a folder.
        progress: told of bytes that are copied.

    Returns:
        What was laid out.

    Raises:
        ExportError: a graph cannot run on that release, the output is taken, or the disk refuses.
    """
    place = Path(os.path.realpath(Path(output).expanduser()))
    check_app_output(place, bundle.path, force=force)
    table = android_table()
    graphs = read_graphs(bundle)
    for name, model in graphs.items():
        if faults := check_graph(model, table):
            more = f" ({len(faults) - 1} more)" if len(faults) > 1 else ""
            raise ExportError(f"{name} cannot run on {PACKAGE}:{table.onnxruntime}: {faults[0]}{more}")
        check_weights(model, bundle, name)
    document = describe_app(bundle, graphs, table.onnxruntime)
    growing = place.with_name(f"{place.name}.partial-{os.getpid()}")
    try:
        growing.mkdir(parents=True)
        try:
            linked = _place_files(bundle, growing / MODEL_FOLDER, progress or silent)
            (growing / "kotlin").mkdir()
            write_file(growing / "kotlin" / SAMPLE_NAME, _sample())
            write_file(growing / APP_NAME, _json(document))
            write_file(growing / README_NAME, _readme(document).encode())
            sync_folder(growing)
            if place.exists():
                shutil.rmtree(place)
            growing.rename(place)
        finally:
            shutil.rmtree(growing, ignore_errors=True)
    except OSError as error:
        raise ExportError(
            f"{error.filename or place} cannot be written ({error.strerror or error}); choose another output "
            "folder"
        ) from error
    kinds = {(node.domain, node.op_type) for model in graphs.values() for node in model.graph.node}
    return AndroidApp(place, table.onnxruntime, bundle.manifest.total_bytes, linked, len(kinds))


def read_graphs(bundle: Bundle) -> dict[str, onnx.ModelProto]:
    """The graphs of a bundle's parts by file name, without weights.

    Raises:
        ExportError: one cannot be read.
    """
    found = {}
    for part in bundle.manifest.parts.values():
        try:
            found[part.graph] = onnx.load(bundle.file(part.graph), load_external_data=False)
        except Exception as error:  # protobuf's errors have no base class in the packages we depend on
            raise ExportError(f"{bundle.file(part.graph)} is no graph ({error}); export it again") from error
    return found


def check_weights(model: onnx.ModelProto, bundle: Bundle, name: str) -> None:
    """Check that weights lie in listed files beside the graph, page-aligned and whole.

    Raises:
        ExportError: one does not.
    """
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        try:
            file = place["location"]
            offset, length = int(place.get("offset", "0")), int(place["length"])
        except (KeyError, ValueError) as error:
            raise ExportError(f"{name} does not say where {tensor.name} lies ({error})") from error
        size = bundle.file(file).stat().st_size
        if offset < 0 or length < 0 or offset + length > size:
            raise ExportError(
                f"{name} places {tensor.name} beyond the {size} bytes of {file}; export it again"
            )
        if offset % ALIGNMENT:
            raise ExportError(
                f"{name} places {tensor.name} at {offset}, which is no multiple of {ALIGNMENT}, so it cannot "
                "be mapped; export it again"
            )


def describe_app(bundle: Bundle, graphs: Mapping[str, onnx.ModelProto], release: str) -> dict[str, Any]:
    """app.json: what an app must know, in the words of docs/bundle.md.

    Args:
        bundle: opened.
        graphs: of its parts, by file name.
        release: of onnxruntime-android.
    """
    manifest = bundle.manifest
    geometry, image, tokens = manifest.geometry, manifest.image, manifest.tokens
    parts = {}
    for name in APP_PARTS:
        part = manifest.parts[name]
        graph = graphs[part.graph].graph
        constants = frozenset(tensor.name for tensor in graph.initializer)
        parts[name] = {
            "graph": f"{MODEL_FOLDER}/{part.graph}",
            "weight_bytes": part.weight_bytes,
            "optimized": False,
            "session_entries": MAPPED if part.integer else {},
            "inputs": list(_signature(graph.input, constants, geometry.layers)),
            "outputs": list(_signature(graph.output, constants, geometry.layers)),
        }
    return {
        "app_version": APP_VERSION,
        "created_by": manifest.created_by,
        "bundle": {
            "fingerprint": bundle.fingerprint,
            "bytes": manifest.total_bytes,
            "model": manifest.source.model,
        },
        "onnxruntime_android": {"package": PACKAGE, "version": release},
        "activations": manifest.activations,
        "geometry": {
            "layers": geometry.layers,
            "hidden": geometry.hidden,
            "vocab": geometry.vocab,
            "context_length": geometry.context_length,
        },
        "kv": {
            "dtype": manifest.kv_dtype,
            "heads": geometry.kv_heads,
            "head_dim": geometry.head_dim,
            "bytes_per_token": manifest.kv_bytes_per_token,
        },
        "image": {
            "patch_size": image.patch_size,
            "temporal_patch_size": image.temporal_patch_size,
            "merge_size": image.merge_size,
            "min_pixels": image.min_pixels,
            "max_pixels": image.max_pixels,
            "mean": list(image.mean),
            "std": list(image.std),
            "rescale_factor": image.rescale_factor,
            "resample": image.resample,
        },
        "tokens": {
            "eos": list(tokens.eos),
            "image": tokens.image,
            "image_start": tokens.image_start,
            "image_end": tokens.image_end,
        },
        "parts": parts,
    }


def _signature(
    values: Iterable[onnx.ValueInfoProto], constants: frozenset[str], layers: int
) -> Iterator[dict[str, Any]]:
    """Names, number types and shapes; of the cache the first layer, with {layer} for its number.

    An input with a value of its own may be left out. onnxruntime's Java API cannot even name it.
    """
    for value in values:
        tensor = value.type.tensor_type
        entry: dict[str, Any] = {
            "name": value.name,
            "dtype": _DTYPES.get(int(tensor.elem_type), "other"),
            "shape": [
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim
            ],
        }
        if value.name in constants:
            entry["optional"] = True
        if match := _CACHED.fullmatch(value.name):
            if match[2] != "0":
                continue
            entry |= {"name": f"{match[1]}.{{layer}}.{match[3]}", "layers": layers}
        yield entry


def check_app_output(output: Path, bundle: Path, *, force: bool) -> None:
    """Check that an app folder may be put somewhere; an export asks before it begins.

    Args:
        output: where it would go.
        bundle: of which; it need not exist yet.
        force: whether an app folder may be replaced.

    Raises:
        ExportError: something is there that must not be replaced, or not without `force`.
    """
    place, bundle = Path(os.path.realpath(output)), Path(os.path.realpath(bundle))
    if not place.name or place == bundle or bundle in place.parents:
        raise ExportError(f"the output {place} lies in the bundle {bundle}; choose one outside of it")
    if not place.exists():
        return
    if not place.is_dir() or (any(place.iterdir()) and not (place / APP_NAME).is_file()):
        raise ExportError(
            f"{place} exists and is no app folder, so it is not replaced; choose another output"
        )
    if any(place.iterdir()) and not force:
        raise ExportError(f"{place} exists; choose another output folder, or replace it with --force")


def _place_files(bundle: Bundle, folder: Path, tell: Progress) -> bool:
    """The bundle's files in a folder; True if all are links."""
    folder.mkdir()
    names = [MANIFEST_NAME, *(entry.path for entry in bundle.manifest.files)]
    total = sum((bundle.path / name).stat().st_size for name in names)
    done, linked = 0, True
    for name in names:
        source, target = bundle.path / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(os.path.realpath(source), target)
        except OSError:  # another file system, or one without hard links
            if linked and shutil.disk_usage(nearest_folder(folder)).free < total - done + MARGIN_BYTES:
                raise ExportError(
                    f"{folder} needs {(total - done) / 1e9:.1f} GB, since files of {bundle.path} cannot be "
                    "linked there; free some space, or choose a folder on the same disk"
                ) from None
            linked = False
            shutil.copyfile(source, target)
        done += source.stat().st_size
        tell(ProgressEvent("copy", name, done, total))
    return linked


def _sample() -> bytes:
    try:
        return resources.files(__package__ or "").joinpath(SAMPLE_NAME).read_bytes()
    except OSError as error:
        raise ExportError(f"{SAMPLE_NAME} is not in the package; reinstall autoglm-edge") from error


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _readme(document: Mapping[str, Any]) -> str:
    release = document["onnxruntime_android"]
    return f"""# {document["bundle"]["model"]} for Android

Made by {document["created_by"]} from the bundle {document["bundle"]["fingerprint"][:16]}, {
        document["bundle"]["bytes"] / 1e9:.2f} GB.

1. `implementation("{release["package"]}:{
        release["version"]
    }")`: the full package. Every operator of these graphs
   was looked up in that release.
2. Bring `{MODEL_FOLDER}/` and `{APP_NAME}` into one folder of the app's own storage (`context.filesDir`, or
   `getExternalFilesDir`), for a trial with `adb push`. Not into the APK: files in it have no path.
3. `kotlin/{SAMPLE_NAME}` opens the sessions by path and runs them; its input are token ids and patches.
4. Compare with this machine before you trust it: `autoglm run {MODEL_FOLDER} --json` with the same question.

docs/android.md of autoglm-edge has the rest: memory, tokenizer, pictures, life cycle, and what was never run
on a device.
"""
