from __future__ import annotations

import errno
import fcntl
import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from autoglm_edge.errors import CheckpointError, ExportError, QuantError
from autoglm_edge.export import pipeline
from autoglm_edge.export.pipeline import ExportOptions, export
from autoglm_edge.export.progress import ProgressEvent
from autoglm_edge.quantize.recipe import PRESETS
from autoglm_edge.runtime.bundle import Bundle

Checkpoints = Callable[..., Path]


@pytest.fixture
def tiny(checkpoint_of: Checkpoints) -> Path:
    return checkpoint_of("tiny")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def stop_at(stage: str, count: int = 1) -> Callable[[ProgressEvent], None]:
    """Progress that presses Ctrl-C at the nth event of a stage."""
    seen = 0

    def progress(event: ProgressEvent) -> None:
        nonlocal seen
        seen += event.stage == stage
        if seen == count:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-blocks", "int4"])
@pytest.mark.parametrize("shape", ["tiny", "odd-mha", "odd-heads6"])
def test_a_bundle_verifies_and_its_graphs_load(
    shape: str, precision: str, checkpoint_of: Checkpoints, tmp_path: Path
) -> None:
    bundle = export(checkpoint_of(shape), tmp_path / "out", precision=precision)

    bundle.verify()
    assert not partial(tmp_path / "out").exists()
    for part in bundle.manifest.parts.values():
        ort.InferenceSession(bundle.file(part.graph), providers=["CPUExecutionProvider"])


def test_two_exports_give_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "a")
    export(tiny, tmp_path / "deeper" / "b")

    assert contents(tmp_path / "a") == contents(tmp_path / "deeper" / "b")


def test_int4_with_float16_activations_is_a_bundle_without_integer_units(tiny: Path, tmp_path: Path) -> None:
    bundle = export(tiny, tmp_path / "out", activations="float16")

    assert not any(part.integer for part in bundle.manifest.parts.values())
    for part in bundle.manifest.parts.values():
        ort.InferenceSession(bundle.file(part.graph), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("precision", "integer"),
    [
        ("fp32", set()),
        ("fp16", set()),
        ("int8", {"decoder", "vision"}),
        ("int8-blocks", set()),
        ("int4", {"vision", "layer"}),
        ("int4-all", {"layer"}),
    ],
)
def test_the_manifest_says_which_graphs_are_for_integer_units(
    precision: str, integer: set[str], tiny: Path, tmp_path: Path
) -> None:
    from onnx import load

    bundle = export(tiny, tmp_path / "out", precision=precision)

    assert {name for name, part in bundle.manifest.parts.items() if part.integer} == integer
    for name, part in bundle.manifest.parts.items():
        nodes = load(bundle.file(part.graph), load_external_data=False).graph.node
        assert ("MatMulIntegerToFloat" in {node.op_type for node in nodes}) == (name in integer)


def test_the_float_weights_are_those_of_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    from onnx import load, numpy_helper

    from autoglm_edge.export.source.tensors import TensorStore

    export(tiny, tmp_path / "out", precision="fp32")

    store = TensorStore.open(tiny)
    model = load(tmp_path / "out" / "decoder.onnx")
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    stored = next(item for item in model.graph.initializer if item.name == name)
    rows, _ = store.shape(name)
    assert np.array_equal(numpy_helper.to_array(stored), store.rows(name, 0, rows).T)


def test_the_manifest_lists_exactly_the_files_of_the_folder(tiny: Path, tmp_path: Path) -> None:
    bundle = export(tiny, tmp_path / "out")

    listed = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    present = contents(bundle.path)
    del present["manifest.json"]
    assert listed == present


def test_the_recipe_in_the_manifest_is_the_one_that_was_applied(tiny: Path, tmp_path: Path) -> None:
    bundle = export(
        tiny, tmp_path / "out", precision="int4-mixed", block_size=32, symmetric=True, activations="float16"
    )

    manifest = bundle.manifest
    assert manifest.recipe["name"] == "int4-mixed"
    assert (manifest.activations, manifest.kv_dtype) == ("float16", "float16")
    formats = [rule["format"] for rule in manifest.recipe["rules"] if rule["format"]]
    assert {form["block_size"] for form in formats if form["bits"] == 4} == {32}
    assert all("/" not in (rule["layers"] or "") for rule in manifest.recipe["rules"])


def test_a_recipe_goes_before_a_precision(tiny: Path, tmp_path: Path) -> None:
    bundle = export(tiny, tmp_path / "out", precision="fp32", recipe=PRESETS["int8"])

    assert bundle.manifest.recipe["name"] == "int8"


def test_an_image_budget_reaches_manifest_processor_and_card(tiny: Path, tmp_path: Path) -> None:
    bundle = export(tiny, tmp_path / "out", max_image_tokens=32)

    image = bundle.manifest.image
    assert image.max_tokens == 32
    processor = json.loads((bundle.path / "preprocessor_config.json").read_text())
    assert processor["size"]["longest_edge"] == image.max_pixels == 32 * image.pixels_per_token
    assert processor["size"]["shortest_edge"] == image.min_pixels
    assert "At most 32 tokens per image" in (bundle.path / "README.md").read_text()


def test_without_an_image_budget_the_processor_file_is_the_checkpoints_own(
    tiny: Path, tmp_path: Path
) -> None:
    bundle = export(tiny, tmp_path / "out")

    name = "preprocessor_config.json"
    assert (bundle.path / name).read_bytes() == (tiny / name).read_bytes()


@pytest.mark.parametrize("tokens", [0, -1, 7, 4094, 10**9])
def test_an_image_budget_that_the_model_cannot_take_is_refused(
    tokens: int, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=f"max_image_tokens is {tokens}, "):
        export(tiny, tmp_path / "out", max_image_tokens=tokens)

    assert list(tmp_path.glob("out*")) == []


def test_an_unknown_precision_is_refused_before_the_checkpoint_is_opened(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="int5"):
        export(tmp_path / "nothing", tmp_path / "out", precision="int5")


def test_a_missing_checkpoint_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        export(tmp_path / "nothing", tmp_path / "out")

    assert list(tmp_path.glob("out*")) == []


def test_events_come_in_stages_and_bytes_only_grow(tiny: Path, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []

    export(tiny, tmp_path / "out", progress=events.append)

    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages == ["checkpoint", "weights", "graphs", "hash", "publish", "done"]
    for stage in ("weights", "hash"):
        done = [event.done_bytes for event in events if event.stage == stage]
        assert done == sorted(done)
        assert done[-1] == events[[event.stage for event in events].index(stage)].total_bytes


# --- the output folder


def test_an_empty_folder_is_a_fine_output(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    export(tiny, tmp_path / "out").verify()


def test_missing_parents_are_made(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "a" / "b" / "out").verify()


def test_a_link_is_followed_to_where_it_points(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")

    export(tiny, tmp_path / "out").verify()

    assert (tmp_path / "disk" / "real" / "manifest.json").is_file()
    assert (tmp_path / "out").is_symlink()


def test_an_existing_bundle_needs_force(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "out", precision="int8")
    before = contents(tmp_path / "out")

    with pytest.raises(ExportError, match=r"out exists; .* --force$"):
        export(tiny, tmp_path / "out", precision="int4")

    assert contents(tmp_path / "out") == before
    assert not partial(tmp_path / "out").exists()


def test_force_replaces_a_bundle(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "out", precision="int8")

    bundle = export(tiny, tmp_path / "out", precision="int4", force=True)

    bundle.verify()
    assert bundle.manifest.recipe["name"] == "int4"
    assert not partial(tmp_path / "out").exists()


def test_the_old_bundle_stays_until_the_new_one_is_complete(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "out", precision="int8")
    before = contents(tmp_path / "out")

    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "out", force=True, progress=stop_at("publish"))

    assert contents(tmp_path / "out") == before


def test_force_does_not_replace_what_is_no_bundle(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("irreplaceable")

    with pytest.raises(ExportError, match=r"is not a bundle \(it has 'thesis.tex'\)"):
        export(tiny, tmp_path / "out", force=True)

    assert (tmp_path / "out" / "thesis.tex").read_text() == "irreplaceable"


def test_force_does_not_replace_a_bundle_with_other_files_in_it(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")

    with pytest.raises(ExportError, match=r"holds more than a bundle \(it has 'notes.txt'\)"):
        export(tiny, tmp_path / "out", force=True)

    assert (tmp_path / "out" / "notes.txt").is_file()


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_no_output(force: bool, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")

    with pytest.raises(ExportError, match="out is a file"):
        export(tiny, tmp_path / "out", force=force)

    assert (tmp_path / "out").read_text() == "a file"


def test_the_root_of_the_disk_is_no_output(tiny: Path) -> None:
    with pytest.raises(ExportError, match="cannot be an output folder"):
        export(tiny, "/")


@pytest.mark.parametrize("inside", [".", "out", "deep/out"])
def test_an_output_in_the_checkpoint_folder_is_refused(inside: str, tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    before = contents(copy)

    with pytest.raises(ExportError, match=r"lies in the checkpoint folder|exists and is not a bundle"):
        export(copy, copy / inside, force=True)

    assert contents(copy) == before


def test_a_parent_that_is_a_file_is_a_clear_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ExportError, match="file"):
        export(tiny, tmp_path / "file" / "out")


# --- disk space


def test_too_little_space_is_said_with_both_numbers_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 123_456})())

    with pytest.raises(ExportError, match=r"needs [\d,]{7,} more bytes, but the disk has 123,456 free"):
        export(tiny, tmp_path / "out")

    assert list(tmp_path.glob("out*")) == []


def test_a_disk_that_fills_up_leaves_an_export_that_goes_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tiny, tmp_path / "whole")
    pwrite, calls = os.pwrite, 0

    def full(handle: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        ExportError, match=r"disk of .*out is full: .* [\d,]+ bytes in all, and [\d,]+ are free"
    ):
        export(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    events: list[ProgressEvent] = []

    export(tiny, tmp_path / "out", progress=events.append, resume=True)

    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert "resume" in {event.stage for event in events}


# --- an interrupted export, as a user meets it; crashes are in test_resume.py


@pytest.mark.parametrize("stage", ["weights", "graphs", "hash", "publish"])
def test_the_same_command_continues_after_ctrl_c(stage: str, tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "out", progress=stop_at(stage, 2 if stage != "publish" else 1))
    assert not (tmp_path / "out").exists()
    events: list[ProgressEvent] = []

    export(tiny, tmp_path / "out", progress=events.append)

    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not partial(tmp_path / "out").exists()
    assert next(event.detail for event in events if event.stage == "resume").startswith("continuing ")


@pytest.mark.parametrize("part", [0.0, 0.4, 0.8, 0.97])
def test_an_export_with_a_part_for_prompts_goes_on_from_anywhere(
    part: float, tiny: Path, tmp_path: Path
) -> None:
    events: list[ProgressEvent] = []
    export(tiny, tmp_path / "whole", prefill="int8", progress=events.append)
    count = sum(event.stage == "weights" for event in events)
    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "out", prefill="int8", progress=stop_at("weights", 1 + int(part * count)))

    with pytest.raises(ExportError, match="another kind"):
        export(tiny, tmp_path / "out")
    export(tiny, tmp_path / "out", prefill="int8", resume=True)

    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {"prefill.onnx", "prefill.onnx.data"} <= set(contents(tmp_path / "out"))


def test_an_export_without_a_part_for_prompts_replaces_one_that_has_it(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "out", prefill="int8")

    bundle = export(tiny, tmp_path / "out", force=True)

    assert set(bundle.manifest.parts) == {"decoder", "embedding", "vision", "layer"}
    assert not list(bundle.path.glob("prefill*"))


def test_continuing_skips_the_weights_that_are_done(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "out", progress=stop_at("graphs"))
    events: list[ProgressEvent] = []

    export(tiny, tmp_path / "out", progress=events.append)

    assert [event for event in events if event.stage == "weights"] == []


def test_another_export_in_the_same_place_is_refused_and_names_force(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "out", precision="int8", progress=stop_at("graphs"))

    with pytest.raises(ExportError, match=r"another kind \(tiny as int8; .*--force"):
        export(tiny, tmp_path / "out", precision="int4")

    export(tiny, tmp_path / "out", precision="int8").verify()


def test_weights_that_changed_in_the_meantime_are_another_export(
    checkpoint_of: Checkpoints, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint_of("tiny"), copy)
    with pytest.raises(KeyboardInterrupt):
        export(copy, tmp_path / "out", progress=stop_at("graphs"))
    os.utime(copy / "model.safetensors", ns=(1, 1))

    with pytest.raises(ExportError, match="other weights"):
        export(copy, tmp_path / "out")


def test_force_discards_an_interrupted_export(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "out", precision="int8", progress=stop_at("graphs"))
    events: list[ProgressEvent] = []

    bundle = export(tiny, tmp_path / "out", precision="int4", force=True, progress=events.append)

    bundle.verify()
    assert bundle.manifest.recipe["name"] == "int4"
    assert "resume" not in {event.stage for event in events}


def test_resume_insists_on_something_to_continue(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="holds no interrupted export; run without --resume"):
        export(tiny, tmp_path / "out", resume=True)

    assert list(tmp_path.glob("out*")) == []


def test_an_existing_bundle_beside_an_interrupted_export_says_how_to_go_on(
    tiny: Path, tmp_path: Path
) -> None:
    export(tiny, tmp_path / "out", precision="int8")
    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "out", force=True, progress=stop_at("graphs"))

    with pytest.raises(ExportError, match="--resume --force, which continues the interrupted export"):
        export(tiny, tmp_path / "out")

    assert partial(tmp_path / "out").exists()


def test_resume_with_force_continues_and_replaces(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "out", precision="int8")
    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "out", force=True, progress=stop_at("graphs"))
    events: list[ProgressEvent] = []

    bundle = export(tiny, tmp_path / "out", force=True, resume=True, progress=events.append)

    assert bundle.manifest.recipe["name"] == "int4"
    assert "weights" not in {event.stage for event in events}


def test_a_data_file_that_was_cut_in_the_meantime_is_not_trusted(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "out", progress=stop_at("graphs"))
    os.truncate(partial(tmp_path / "out") / "bundle" / "decoder.onnx.data", 100)

    with pytest.raises(ExportError, match=r"decoder\.onnx\.data is missing or was changed"):
        export(tiny, tmp_path / "out")


def test_a_journal_of_something_else_is_a_clear_error(tiny: Path, tmp_path: Path) -> None:
    partial(tmp_path / "out").mkdir()
    (partial(tmp_path / "out") / "journal").write_text("dear diary\n")

    with pytest.raises(ExportError, match="no export journal of this release"):
        export(tiny, tmp_path / "out")

    export(tiny, tmp_path / "out", force=True).verify()


def test_files_that_are_not_ours_survive_in_the_partial_folder(tiny: Path, tmp_path: Path) -> None:
    partial(tmp_path / "out").mkdir()
    (partial(tmp_path / "out") / "notes.txt").write_text("mine")

    export(tiny, tmp_path / "out", force=True).verify()

    assert (partial(tmp_path / "out") / "notes.txt").read_text() == "mine"


def test_an_unfinished_bundle_does_not_open(tiny: Path, tmp_path: Path) -> None:
    from autoglm_edge.errors import BundleError

    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "out", progress=stop_at("hash"))

    for path in (tmp_path / "out", partial(tmp_path / "out"), partial(tmp_path / "out") / "bundle"):
        with pytest.raises(BundleError):
            Bundle.open(path)


# --- the lock


def test_a_second_export_to_the_same_place_is_refused(tiny: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def progress(event: ProgressEvent) -> None:
        if event.stage == "hash" and not seen:
            with pytest.raises(ExportError, match="another process is exporting to") as caught:
                export(tiny, tmp_path / "out")
            seen.append(str(caught.value))

    export(tiny, tmp_path / "out", progress=progress).verify()

    assert len(seen) == 1


def test_the_lock_of_a_dead_process_is_taken_over(tiny: Path, tmp_path: Path) -> None:
    partial(tmp_path / "out").mkdir()
    (partial(tmp_path / "out") / "lock").write_text("")

    export(tiny, tmp_path / "out").verify()


def test_the_lock_is_free_after_an_error(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "out", progress=stop_at("graphs"))

    with (partial(tmp_path / "out") / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- small things


def test_options_reject_a_budget_of_no_tokens() -> None:
    with pytest.raises(ExportError, match="must be at least 1"):
        ExportOptions(PRESETS["int4"], max_image_tokens=0)


def test_export_and_estimate_show_the_same_arguments() -> None:
    shown = {name: inspect.signature(getattr(pipeline, name)) for name in ("export", "estimate")}

    names = list(shown["export"].parameters)
    assert shown["export"].parameters == shown["estimate"].parameters
    assert names[:3] == ["model", "output", "precision"]
    assert {shown["export"].parameters[name].kind for name in names[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert [item.return_annotation for item in shown.values()] == ["Bundle", "Estimate"]
    assert all(f"        {name}: " in (export.__doc__ or "") for name in names)


def test_an_argument_that_there_is_not_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="colour"):
        export(None, tmp_path / "out", colour=1)  # type: ignore[call-arg]


def test_the_package_can_be_called_and_names_its_functions() -> None:
    import autoglm_edge
    import autoglm_edge.export as package

    assert package.export is pipeline.export
    assert package.estimate is pipeline.estimate
    assert callable(autoglm_edge.export)


def test_genai_config_names_files_that_are_there(tiny: Path, tmp_path: Path) -> None:
    bundle = export(tiny, tmp_path / "out")

    document = json.loads((bundle.path / "genai_config.json").read_text())
    model = document["model"]
    assert model["type"] == "qwen2_5_vl"
    names = [model[part]["filename"] for part in ("decoder", "embedding", "vision")]
    assert all((bundle.path / name).is_file() for name in [*names, model["vision"]["config_filename"]])
    assert document["search"]["max_length"] == model["context_length"] == 4096
    session = ort.InferenceSession(bundle.path / "decoder.onnx", providers=["CPUExecutionProvider"])
    inputs = {item.name for item in session.get_inputs()}
    layers = range(model["decoder"]["num_hidden_layers"])
    wanted = {
        value % layer if "%d" in value else value
        for value in model["decoder"]["inputs"].values()
        for layer in layers
    }
    assert wanted == inputs


def test_the_card_says_plainly_that_nothing_was_measured(tiny: Path, tmp_path: Path) -> None:
    bundle = export(tiny, tmp_path / "out")

    card = (bundle.path / "README.md").read_text()
    assert "has not been measured yet" in card
    for entry in bundle.manifest.files:
        assert entry.path == "README.md" or f"| `{entry.path}` | {entry.size_bytes:,} |" in card


@pytest.mark.parametrize(("precision", "rounded"), [("fp32", False), ("int4", True)])
def test_the_card_warns_of_rounding_only_where_there_is_some(
    precision: str, rounded: bool, tiny: Path, tmp_path: Path
) -> None:
    bundle = export(tiny, tmp_path / "out", precision=precision)

    assert ("Weights are rounded" in (bundle.path / "README.md").read_text()) is rounded


def test_the_licence_of_the_checkpoint_is_carried_over(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint_of("tiny"), copy)
    (copy / "README.md").write_text("---\ntags:\n- agent\nlicense: mit\n---\n# Model\n")

    bundle = export(copy, tmp_path / "out")

    assert "\nlicense: mit\n" in (bundle.path / "README.md").read_text()


# outputs and options that can never work


@pytest.mark.parametrize("output", ["", " ", "a\0b"])
def test_an_output_that_no_folder_can_have_is_refused(output: str, tiny: Path) -> None:
    with pytest.raises(ExportError, match="name a folder"):
        export(tiny, output)


def test_an_output_whose_parent_cannot_be_made_is_refused_at_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(path: Path, *args: object, **options: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(path))  # as /proc does

    monkeypatch.setattr(Path, "mkdir", absent)

    with pytest.raises(ExportError, match="cannot be made, where the bundle would grow"):
        export(tiny, tmp_path / "out")


def test_a_link_in_a_circle_is_refused_before_any_work(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")

    with pytest.raises(ExportError, match="leads nowhere"):
        export(tiny, tmp_path / "loop")
    assert [path.name for path in tmp_path.glob("loop*")] == ["loop"]


def test_the_embedded_model_has_no_revision_either_when_it_is_meant_by_leaving_it_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the embedded model has no revision 'main'"):
        export(None, tmp_path / "out", revision="main")


def test_a_recipe_with_a_rule_that_matches_nothing_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "slip.toml"
    path.write_text('base = "int4"\n[[rule]]\npattern = "model.layers.*"\nbits = 8\n', encoding="utf-8")

    with pytest.raises(QuantError, match=r"slip: the rule for model\.layers\.\* matches no tensor"):
        export(tiny, tmp_path / "out", recipe=path)
    assert list(tmp_path.glob("out*")) == []
