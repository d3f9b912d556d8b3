"""Opening, verifying and naming bundles, and what must not open."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from autoglm_edge.errors import BundleError
from autoglm_edge.runtime import bundle as module
from autoglm_edge.runtime.bundle import Bundle

CONTENT = {
    "decoder.onnx": b"graph",
    "decoder.onnx.data": bytes(range(256)) * 40,
    "embedding.onnx": b"graph two",
    "embedding.onnx.data": b"\0" * 4096,
    "vision.onnx": b"graph three",
    "vision.onnx.data": b"",
    "tokenizer.json": b"{}",
    "README.md": b"# card",
}


def document(content: dict[str, bytes] = CONTENT) -> dict:
    """A manifest for these files, as parsed JSON."""
    return {
        "format_version": 1,
        "created_by": "autoglm-edge 0.1.0",
        "tools": {"onnx": "1.23.2"},
        "source": {"model": "pocket", "revision": None, "config_sha256": "0" * 64, "parameters": 10},
        "geometry": {
            "layers": 2,
            "hidden": 64,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "vocab": 100,
            "context_length": 512,
        },
        "image": {
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "min_pixels": 12544,
            "max_pixels": 1000000,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "rescale_factor": 0.00392156862745098,
            "resample": 3,
        },
        "tokens": {"eos": [1, 2], "pad": None, "image": 5, "image_start": 3, "image_end": 4},
        "recipe": {"name": "fp32", "activations": "float32", "accuracy_level": 0, "rules": []},
        "activations": "float32",
        "kv_dtype": "float32",
        "kv_bytes_per_token": 512,
        "parts": {
            part: {"graph": f"{part}.onnx", "data": f"{part}.onnx.data", "weight_bytes": 1}
            for part in ("decoder", "embedding", "vision")
        },
        "generation": {"temperature": 0.0},
        "files": [
            {"path": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in content.items()
        ],
        "figures": {},
    }


def write_manifest(folder: Path, changed: dict) -> None:
    (folder / "manifest.json").write_text(json.dumps(changed), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    for name, data in CONTENT.items():
        (path / name).write_bytes(data)
    write_manifest(path, document())
    return path


def refusal(path: Path | str) -> str:
    """The message with which a path is refused; one sentence."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".")
    return message


# --- what opens


def test_open_reads_the_manifest_and_gives_the_paths_of_files(folder):
    bundle = Bundle.open(folder)

    assert bundle.manifest.geometry.layers == 2
    assert bundle.file("decoder.onnx").read_bytes() == b"graph"
    assert bundle.path.is_absolute()


def test_open_takes_strings_relative_paths_and_links_to_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("link").symlink_to(folder)

    assert Bundle.open("out").path == Bundle.open("link").path == Bundle.open(str(folder)).path


def test_open_ignores_files_that_the_manifest_does_not_list(folder):
    (folder / "notes.txt").write_text("mine")

    Bundle.open(folder).verify()


def test_a_link_that_stays_inside_the_bundle_opens(folder):
    (folder / "tokenizer.json").rename(folder / "store")
    (folder / "tokenizer.json").symlink_to("store")

    Bundle.open(folder).verify()


def test_open_does_not_read_the_files(folder, monkeypatch):
    read = []
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *args, **kw: read.append(path.name) or opened(path, *args, **kw)
    )

    Bundle.open(folder)

    assert read == ["manifest.json"]


def test_file_refuses_a_name_that_is_not_listed(folder):
    (folder / "notes.txt").write_text("mine")

    for name in ("notes.txt", "../out/decoder.onnx", "manifest.json", ""):
        with pytest.raises(BundleError, match="has no file"):
            Bundle.open(folder).file(name)


# --- what is no bundle


def test_a_missing_folder_is_refused_with_the_command_that_makes_one(tmp_path):
    assert "there is no bundle at" in refusal(tmp_path / "nowhere")
    assert "autoglm export" in refusal(tmp_path / "nowhere")


def test_a_file_is_refused(folder):
    assert "is a file, a bundle is a folder" in refusal(folder / "manifest.json")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_path_that_cannot_exist_is_refused(name):
    assert "cannot be opened" in refusal(name)


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")

    assert "cannot be opened" in refusal(tmp_path / "loop")


def test_an_empty_folder_is_refused(tmp_path):
    assert "is empty" in refusal(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"")

    assert "has no manifest.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    "weights", ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00004.safetensors"]
)
def test_a_checkpoint_is_refused_with_the_command_that_exports_it(tmp_path, weights):
    for name in ("config.json", "tokenizer.json", weights):
        (tmp_path / name).write_text("{}")

    assert f"is a checkpoint, not a bundle; run `autoglm export {tmp_path}" in refusal(tmp_path)


@pytest.mark.parametrize("inside", [".", "bundle"])
def test_an_unfinished_export_is_refused_and_told_how_to_go_on(tmp_path, inside):
    unfinished = tmp_path / "phone.partial"
    (unfinished / "bundle").mkdir(parents=True)
    (unfinished / "bundle" / "decoder.onnx").write_bytes(b"graph")

    message = refusal(unfinished / inside)

    assert "an export that did not finish" in message
    assert "export to phone with --resume" in message


# --- a manifest that is not one


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is not JSON"),
        ("not json", "is not JSON"),
        ('{"format_version": 1', "is not JSON"),
        ("[]", "must be an object"),
        ("null", "must be an object"),
        ("17", "must be an object"),
        ("{}", "lacks the key"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"format_version": ' + "9" * 10_000 + "}", "is not JSON"),
    ],
)
def test_garbage_in_the_manifest_is_refused(folder, text, said):
    (folder / "manifest.json").write_text(text)

    assert said in refusal(folder)


def test_a_manifest_that_is_not_text_is_refused(folder):
    (folder / "manifest.json").write_bytes(b"\xff\xfe\x00{")

    assert "is not UTF-8" in refusal(folder)


def test_a_huge_manifest_is_refused_unread(folder, monkeypatch):
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: nothing is written
    monkeypatch.setattr(Path, "read_bytes", None)

    assert "1099511627776 bytes, more than the 16777216" in refusal(folder)


@pytest.mark.parametrize("version, advice", [(0, "export the checkpoint again"), (2, "update autoglm-edge")])
def test_another_format_version_is_named_even_if_the_rest_has_changed(folder, version, advice):
    write_manifest(folder, {"format_version": version, "new_key": [], "files": {}})

    message = refusal(folder)

    assert f"has format version {version}, this release reads version 1" in message
    assert advice in message


@pytest.mark.parametrize("version", [True, "1", 1.0, None])
def test_a_format_version_of_another_type_is_refused(folder, version):
    write_manifest(folder, document() | {"format_version": version})

    assert "format_version" in refusal(folder)


def test_a_manifest_that_lists_itself_is_refused(folder):
    write_manifest(folder, document(CONTENT | {"manifest.json": b"{}"}))

    assert "lists itself" in refusal(folder)


# --- files that are not as listed


@pytest.mark.parametrize("name", CONTENT)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()

    assert f"{name!r} is not in {folder}" in refusal(folder)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_named_with_both_sizes(folder, change):
    path = folder / "decoder.onnx.data"
    os.truncate(path, path.stat().st_size + change)

    assert f"has {10240 + change} bytes, but manifest.json says 10240" in refusal(folder)


def _with_path(name: str) -> dict:
    changed = document()
    changed["files"][-1]["path"] = name
    return changed


@pytest.mark.parametrize(
    "name",
    ["../secret", "a/../../secret", "/etc/hostname", "..\\secret", "C:\\secret", "..", "sub/../../x", ""],
)
def test_a_path_that_leads_out_of_the_folder_is_refused(folder, name):
    (folder.parent / "secret").write_bytes(b"# card")
    write_manifest(folder, _with_path(name))

    assert "outside the bundle" in refusal(folder)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300])
def test_a_name_that_no_file_can_have_is_refused(folder, name):
    write_manifest(folder, _with_path(name))

    message = refusal(folder)

    assert f"{name!r} is not in {folder}" in message
    assert message.isprintable()


def test_a_link_out_of_the_folder_is_refused(folder):
    secret = folder.parent / "secret"
    secret.write_bytes(CONTENT["tokenizer.json"])
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(secret)

    assert f"'tokenizer.json' in {folder} leads out of the bundle, to {secret}" in refusal(folder)


def test_a_linked_folder_inside_that_leads_out_is_refused(folder):
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "data").write_bytes(b"# card")
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    write_manifest(folder, _with_path("sub/data"))

    assert "leads out of the bundle" in refusal(folder)


def test_a_manifest_that_is_a_link_out_of_the_folder_is_refused(folder):
    (folder / "manifest.json").rename(folder.parent / "manifest.json")
    (folder / "manifest.json").symlink_to("../manifest.json")

    assert "leads out of the bundle" in refusal(folder)


def test_a_folder_next_door_whose_name_begins_alike_is_outside(folder):
    neighbour = folder.parent / "out2"
    neighbour.mkdir()
    (neighbour / "card").write_bytes(b"# card")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("../out2/card")

    assert "leads out of the bundle" in refusal(folder)


def test_dangling_and_circular_links_are_refused(folder):
    for target in ("gone", "README.md"):
        (folder / "README.md").unlink()
        (folder / "README.md").symlink_to(target)
        assert "README.md" in refusal(folder)


def test_a_folder_in_place_of_a_file_is_refused(folder):
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()

    assert "is not a plain file" in refusal(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in the file system")
@pytest.mark.parametrize("name", ["README.md", "manifest.json"])
def test_a_named_pipe_is_refused_and_does_not_hang(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)

    assert "is not a plain file" in refusal(folder)


# --- verify


def test_verify_reports_bytes_read_up_to_the_total(folder, monkeypatch):
    monkeypatch.setattr(module, "HASH_CHUNK_BYTES", 4096)
    seen: list[tuple[int, int]] = []

    Bundle.open(folder).verify(lambda done, total: seen.append((done, total)))

    total = sum(len(data) for data in CONTENT.values())
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > len(CONTENT)


@pytest.mark.parametrize("chunk", [1000, 10240, 1 << 23])
@pytest.mark.parametrize("place", [0, 5000, 10239])
def test_verify_finds_one_flipped_bit(folder, place, chunk, monkeypatch):
    monkeypatch.setattr(module, "HASH_CHUNK_BYTES", chunk)
    path = folder / "decoder.onnx.data"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    bundle = Bundle.open(folder)

    with pytest.raises(BundleError, match=r"decoder\.onnx\.data.* is damaged"):
        bundle.verify()


def test_verify_finds_a_file_that_was_cut_short_after_opening(folder):
    bundle = Bundle.open(folder)
    os.truncate(folder / "decoder.onnx.data", 17)

    with pytest.raises(BundleError, match="has 17 bytes"):
        bundle.verify()


def test_verify_finds_a_file_that_became_a_link_after_opening(folder):
    bundle = Bundle.open(folder)
    (folder.parent / "secret").write_bytes(CONTENT["tokenizer.json"])
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("../secret")

    with pytest.raises(BundleError, match="leads out"):
        bundle.verify()


# --- fingerprint


def test_the_fingerprint_is_of_content_not_of_place_order_or_figures(folder, tmp_path):
    before = Bundle.open(folder).fingerprint
    changed = document()
    changed["files"].reverse()
    changed["figures"] = {"parity": 1.0}
    write_manifest(folder, changed)
    moved = folder.rename(tmp_path / "moved")

    assert Bundle.open(moved).fingerprint == before
    assert len(before) == 64


def test_the_fingerprint_does_not_change_with_the_model_card(folder):
    before = Bundle.open(folder).fingerprint
    (folder / "README.md").write_bytes(b"# another")
    write_manifest(folder, document(CONTENT | {"README.md": b"# another"}))

    assert Bundle.open(folder).fingerprint == before


def test_the_fingerprint_changes_with_any_other_file_and_with_names(folder):
    seen = {Bundle.open(folder).fingerprint}
    (folder / "tokenizer.json").write_bytes(b"[]")
    write_manifest(folder, document(CONTENT | {"tokenizer.json": b"[]"}))
    seen.add(Bundle.open(folder).fingerprint)
    (folder / "tokenizer.json").rename(folder / "tokens.json")
    write_manifest(
        folder, document({k if k != "tokenizer.json" else "tokens.json": v for k, v in CONTENT.items()})
    )
    (folder / "tokens.json").write_bytes(CONTENT["tokenizer.json"])
    seen.add(Bundle.open(folder).fingerprint)

    assert len(seen) == 3
