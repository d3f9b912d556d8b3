"""`autoglm export`: what reaches the exporter and the search for a recipe, and what is told of them."""

import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_fixtures import invoke, write_bundle

from autoglm_edge import cli
from autoglm_edge.commands.export import default_output
from autoglm_edge.commands.export import export as export_command
from autoglm_edge.commands.progress import ProgressLine
from autoglm_edge.errors import ExportError
from autoglm_edge.quantize.formats import BlockFormat


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


@dataclass
class _Report:
    def to_table(self):
        return "table"

    def to_json(self):
        return '{"total_bytes": 5}'


@pytest.fixture
def pipeline(monkeypatch, bundle):
    from autoglm_edge.export import pipeline as real
    from autoglm_edge.export.progress import ProgressEvent
    from autoglm_edge.runtime.bundle import Bundle

    calls = []
    signatures = {name: inspect.signature(getattr(real, name)) for name in ("export", "estimate")}

    def export(model, output, *, progress, **options):
        signatures["export"].bind(model, output, progress=progress, **options)
        calls.append(SimpleNamespace(model=model, output=output, **options))
        progress(ProgressEvent("checkpoint", "pocket", 0, 0))
        progress(ProgressEvent("resume", "continuing", 0, 0))
        for done in range(0, 1001, 10):
            progress(ProgressEvent("weights", "a.weight", done, 1000))
        progress(ProgressEvent("hash", "decoder.onnx.data", 10, 10))
        return Bundle.open(bundle)

    def estimate(model, output, **options):
        signatures["estimate"].bind(model, output, **options)
        calls.append(SimpleNamespace(model=model, output=output, **options))
        return _Report()

    monkeypatch.setattr(real, "export", export)
    monkeypatch.setattr(real, "estimate", estimate)
    return calls


def test_without_a_model_the_pocket_model_is_exported_and_the_output_says_so(pipeline):
    result = invoke("export")

    assert result.exit_code == 0
    assert "taking pocket" in result.stderr
    assert pipeline[0].model is None
    assert pipeline[0].output == Path("pocket-int4")
    assert pipeline[0].precision == "int4"


def test_export_options_reach_the_pipeline(pipeline, tmp_path):
    result = invoke(
        "export", "zai-org/AutoGLM-Phone-9B", "--int8", "-o", tmp_path / "x", "--block-size", 32,
        "--symmetric",
        "--max-image-tokens", 600, "--activations", "float16", "--accuracy-level", 0, "--revision", "abc",
        "--resume", "--force", "--refine", "gptq", "--calibration", "prompts.jsonl",
        "--prefill", "int8", "--kv", "int8",
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    assert vars(pipeline[0]) == {
        "model": "zai-org/AutoGLM-Phone-9B", "output": tmp_path / "x", "precision": "int8", "recipe": None,
        "block_size": 32, "symmetric": True, "max_image_tokens": 600, "activations": "float16",
        "accuracy_level": 0, "revision": "abc", "resume": True, "force": True, "refine": "gptq",
        "calibration": Path("prompts.jsonl"), "prefill": "int8", "kv": "int8",
    }  # fmt: skip


@pytest.fixture
def auto(monkeypatch):
    """The search for a recipe, replaced by one that notes what it was asked."""
    from autoglm_edge.autorecipe import search as real
    from autoglm_edge.export.progress import ProgressEvent
    from autoglm_edge.quantize.recipe import PRESETS

    calls = []
    signature = inspect.signature(real.auto_recipe)

    def auto_recipe(model, reference, budget_bytes, *, progress, **rest):
        signature.bind(model, reference, budget_bytes, progress=progress, **rest)
        progress(ProgressEvent("measure", "layer 1 at 4 bits", 0, 0))
        calls.append(SimpleNamespace(model=model, reference=reference, budget_bytes=budget_bytes, **rest))
        return PRESETS["int4-mixed"]

    monkeypatch.setattr(real, "auto_recipe", auto_recipe)
    return calls


def test_a_recipe_made_by_measurement_is_what_is_exported(pipeline, auto, tmp_path):
    result = invoke(
        "export", "--recipe", "auto", "--budget-gb", 0.0065, "--reference", tmp_path / "ref.safetensors",
        "--block-size", 32, "--refine", "search", "--accuracy-level", 0, "--max-image-tokens", 600,
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    (asked,) = auto
    assert (asked.model, asked.reference) == (None, tmp_path / "ref.safetensors")
    assert asked.budget_bytes == 6_500_000
    assert asked.workspace == Path("pocket-auto.auto")
    assert asked.options.max_image_tokens == 600
    high, low = asked.options.levels
    assert {(rule.format.block_size, rule.refine) for rule in low.rules} == {(32, "search")}
    blocks = [rule for rule in high.rules if isinstance(rule.format, BlockFormat)]
    assert {(rule.format.block_size, rule.refine) for rule in blocks} == {(128, "none")}
    assert high.accuracy_level == low.accuracy_level == 0
    (exported,) = pipeline
    assert exported.recipe.name == "int4-mixed"
    assert not {"block_size", "refine", "accuracy_level"} & set(vars(exported))
    assert exported.output == Path("pocket-auto")
    assert "layer 1 at 4 bits" in result.stderr
    assert "Chose int4-mixed; levels and measurements are in pocket-auto.auto" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "auto"], "--recipe auto needs --budget-gb"),
        (["--recipe", "auto", "--budget-gb", "5"], "--recipe auto needs --reference"),
        (["--recipe", "auto", "--reference", "r"], "--recipe auto needs --budget-gb"),
        (["--budget-gb", "5"], "--budget-gb means something with --recipe auto only"),
        (["--int4", "--reference", "r"], "--reference means something with --recipe auto only"),
        (["--recipe", "int8", "--workspace", "w"], "--workspace means something with --recipe auto only"),
        (["--recipe", "auto", "--budget-gb", "0", "--reference", "r"], "0.0 is not in the range"),
        (["--recipe", "auto", "--budget-gb", "nan", "--reference", "r"], "must be a finite number"),
        (["--recipe", "auto", "--budget-gb", "inf", "--reference", "r"], "must be a finite number"),
        (["--recipe", "auto", "--budget-gb", "5", "--reference", "r", "--estimate"], "cannot be estimated"),
        (
            ["--recipe", "auto", "--budget-gb", "5", "--reference", "r", "--prefill", "int8"],
            "keeps a budget that --prefill int8 is no part of",
        ),
        (
            ["--recipe", "auto", "--budget-gb", "5", "--reference", "r", "--kv", "int8"],
            "keeps a budget that --kv int8 is no part of",
        ),
        (
            ["--recipe", "auto", "--budget-gb", "5", "--reference", "r", "--calibration", "c"],
            "with --refine gptq only",
        ),
        (["--refine", "best"], "'best' is not one of 'none', 'search', 'gptq'"),
    ],
)
def test_what_an_automatic_recipe_needs_and_what_means_nothing_without_it(pipeline, auto, arguments, message):
    result = invoke("export", *arguments)

    assert result.exit_code == 2
    assert message in result.stderr
    assert pipeline == auto == []


def test_an_export_ends_with_what_to_do_next(pipeline):
    result = invoke("export", "-o", "my phone")

    assert result.stderr.splitlines()[-1] == (
        "Done in 0 s; ask it with: autoglm run 'my phone' --image SCREENSHOT TASK"
    )


@pytest.mark.parametrize("output", ["", "  "])
def test_an_empty_output_is_wrong_usage(pipeline, output):
    result = invoke("export", "-o", output)

    assert result.exit_code == 2
    assert "the output is empty" in result.stderr


def test_progress_of_a_quick_stage_is_one_line(pipeline, monkeypatch):
    monkeypatch.setattr(ProgressLine.__init__, "__defaults__", (lambda: 0.0,))

    result = invoke("export")

    assert result.stderr.splitlines()[1:-1] == [
        "continuing",
        "Weights: 100 % of 1.0 kB, 0 s",
        "Checking: 100 % of 10 B, 0 s",
    ]


def test_an_export_ends_with_one_document(pipeline, bundle):
    result = invoke("export", "--json")

    document = json.loads(result.stdout.splitlines()[-1])
    assert document["bundle"] == "pocket-int4"
    assert document["recipe"] == "int4"
    assert document["weight_bytes"] == {"decoder": 1300, "embedding": 1300, "vision": 1300}


def test_an_estimate_prints_a_table_and_a_document_and_exports_nothing(pipeline):
    result = invoke("export", "--estimate", "--json")

    assert result.stdout == 'table\n{"total_bytes": 5}\n'
    assert len(pipeline) == 1


def test_an_export_error_is_one_sentence(monkeypatch):
    from autoglm_edge.export import pipeline as real

    def fail(*arguments, **options):
        raise ExportError("the disk is full;\nfree some")

    monkeypatch.setattr(real, "export", fail)

    result = invoke("export")

    assert result.exit_code == 1
    assert result.stderr.endswith("Error: the disk is full; free some\n")


def test_an_interrupted_export_says_how_to_go_on(monkeypatch):
    from autoglm_edge.export import pipeline as real

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(real, "export", interrupt)

    result = invoke("export", "zai-org/AutoGLM-Phone-9B")

    assert result.exit_code == 130
    assert "run the same command again" in result.stderr


def test_a_missing_extra_is_an_error_that_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("autoglm_edge.export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("autoglm_edge.export", raising=False)
    for name in ("onnx_ir", "safetensors", "ml_dtypes", "onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)

    result = invoke("export")

    assert result.exit_code == 1
    assert 'pip install "autoglm-edge[export]"' in result.stderr


def test_autoglm_export_is_the_same_command_under_another_name(pipeline):
    command = cli.export_command()

    assert invoke("--fp16", command=command).exit_code == 0
    assert pipeline[0].precision == "fp16"
    assert [option.name for option in command.params if option.name != "version"] == [
        option.name for option in export_command.params
    ]
    assert invoke("--version", command=command).output.startswith("autoglm-edge ")


@pytest.mark.parametrize(
    ("model", "recipe", "folder"),
    [
        (None, "int4", "pocket-int4"),
        ("zai-org/AutoGLM-Phone-9B", "int8", "AutoGLM-Phone-9B-int8"),
        ("org/name/", "mine/head only.toml", "name-head-only"),
        ("..", "int4", None),
    ],
)
def test_the_default_output_is_named_after_model_and_recipe(model, recipe, folder):
    expected = folder or f"{Path('..').resolve().name or 'model'}-int4"

    assert default_output(model, recipe) == expected
