"""Recipes made by measurement, on a small random model: mixtures, journal, choice, and the file of it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_shapes import Shape
from make_checkpoint import make_checkpoint
from parity_fixtures import prompt_file

from autoglm_edge.autorecipe.bench import Bench
from autoglm_edge.autorecipe.choice import AutoChoice
from autoglm_edge.autorecipe.levels import HIGH, Palette
from autoglm_edge.autorecipe.measurements import Journal, Measurement, mixture_key
from autoglm_edge.autorecipe.search import AutoOptions, auto_recipe, choose_recipe, recipe_name, write_recipe
from autoglm_edge.autorecipe.sensitivity import group_tensors, measure
from autoglm_edge.errors import EdgeError, ParityError, QuantError, RequestError
from autoglm_edge.export.pipeline import export
from autoglm_edge.export.progress import ProgressEvent
from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.parity.record import record
from autoglm_edge.parity.reference import Reference
from autoglm_edge.parity.validate import validate
from autoglm_edge.quantize.formats import BlockFormat
from autoglm_edge.quantize.recipe import PRESETS, Recipe
from autoglm_edge.quantize.recipe_reading import read_recipe, resolve
from autoglm_edge.quantize.rule import Refinement, Rule
from autoglm_edge.runtime.bundle import Bundle

SHAPE = Shape(
    hidden=128,
    layers=2,
    intermediate=320,
    mrope_section=(2, 3, 3),
    vision_hidden=64,
    vision_depth=1,
    merger_intermediate=192,
)
"""Large enough that 4 bits take fewer pages of 4 KiB than 8 in every matrix but the smallest."""

LAYERS = AutoOptions(per="layer")
RUNS_REL = 1e-5
"""`validate` scores places inside the prompt, too, so it cuts a prompt into other runs than `measure`: sums
of floats round otherwise, and now and then an 8-bit activation with them."""

OTHER: Refinement = "search" if PRESETS["int4-all"].rules[0].refine == "none" else "none"
"""A refinement that needs no data, and is not the presets' own."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("auto") / "small", SHAPE, dtype="float32")


@pytest.fixture(scope="session")
def reference(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    output = folder / "ref.safetensors"
    record(checkpoint, output, prompts=str(prompt_file(folder)))
    return output


@pytest.fixture(scope="session")
def palette(checkpoint: Path) -> Palette:
    return Palette(Checkpoint.open(checkpoint), [HIGH, PRESETS["int4-all"]])


@pytest.fixture(scope="session")
def budget(palette: Palette) -> int:
    """Of int4-mixed, so that the two can be compared at equal bytes."""
    return palette.total_bytes(PRESETS["int4-mixed"])


@dataclass(frozen=True)
class Run:
    workspace: Path
    events: list[ProgressEvent]
    choice: AutoChoice


@pytest.fixture(scope="session")
def run(checkpoint: Path, reference: Path, budget: int, tmp_path_factory: pytest.TempPathFactory) -> Run:
    workspace = tmp_path_factory.mktemp("workspace") / "here"
    events: list[ProgressEvent] = []
    choice = choose_recipe(checkpoint, reference, budget, workspace=workspace, progress=events.append)
    return Run(workspace, events, choice)


def measured(events: list[ProgressEvent]) -> list[str]:
    """What was measured, but for the check of the choice and of presets."""
    details = [event.detail for event in events if event.stage == "measure"]
    return [detail for detail in details if re.match(r"\d+ of \d+: .* as ", detail)]


def stop(event: ProgressEvent) -> None:
    if event.stage == "measure":
        raise KeyboardInterrupt


def exported(events: list[ProgressEvent]) -> int:
    return sum(event.stage == "publish" for event in events)


# --- groups


def names_of(layers: int, blocks: int) -> list[str]:
    decoder = [
        f"model.language_model.layers.{number}.{part}_proj.weight"
        for number in range(layers)
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate_up", "mlp.down")
    ]
    vision = [
        f"model.visual.blocks.{number}.{part}.weight"
        for number in range(blocks)
        for part in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    return [
        *decoder,
        "lm_head.weight",
        "model.language_model.embed_tokens.weight",
        *vision,
        "model.visual.downsample.weight",
        "model.visual.merger.proj.weight",
    ]


def test_the_9b_has_147_groups_by_matrix_and_43_by_layer() -> None:
    names = names_of(40, 24)

    fine, coarse = group_tensors(names), group_tensors(names, "layer")

    assert (len(fine), len(coarse)) == (147, 43)
    for groups in (fine, coarse):
        assert sorted(name for group in groups for name in group.tensors) == sorted(names)
    assert [group.name for group in fine[:3]] == ["layers.0.attention", "layers.0.gate_up", "layers.0.down"]
    assert fine[-1].tensors == ("model.visual.downsample.weight", "model.visual.merger.proj.weight")
    assert [group.name for group in coarse[-3:]] == ["head", "embedding", "vision"]


@pytest.mark.parametrize("per", ["matrix", "layer"])
def test_patterns_of_a_group_match_its_tensors_and_no_others(per: Any) -> None:
    names = names_of(12, 11)
    fmt = BlockFormat(4, 64, False)

    for group in group_tensors(names, per):
        layers = None if group.layer is None else str(group.layer)
        rules = [Rule(pattern, fmt, layers) for pattern in group.patterns]
        assert [name for name in names if any(rule.matches(name) for rule in rules)] == list(group.tensors)


def test_a_tensor_of_no_known_kind_is_a_group_of_its_own() -> None:
    (group,) = group_tensors(["model.audio.weight"])

    assert (group.name, group.patterns, group.layer) == ("model.audio.weight", ("model.audio.weight",), None)


def test_an_unknown_grouping_is_refused() -> None:
    with pytest.raises(RequestError, match="matrix, layer"):
        group_tensors([], "head")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="matrix, layer"):
        AutoOptions(per="tensor")  # type: ignore[arg-type]


# --- measurements


def test_added_divergence_is_a_difference_of_means_with_its_error() -> None:
    base = Measurement((2, 3), (0.2, 0.3), 1.0)
    other = Measurement((2, 3), (0.6, 0.4), 1.0)

    added, error = other.added(base)

    assert other.kl == pytest.approx(0.2)
    assert added == pytest.approx(0.1)
    assert error == pytest.approx((((0.4 - 0.2) ** 2 + (0.1 - 0.3) ** 2) * 2) ** 0.5 / 5)
    assert base.added(base) == (0.0, 0.0)


def test_measurements_of_other_positions_cannot_be_subtracted() -> None:
    with pytest.raises(ParityError, match="other positions"):
        Measurement((2,), (0.1,), 1.0).added(Measurement((3,), (0.1,), 1.0))


@pytest.mark.parametrize(
    ("counts", "sums"), [((), ()), ((0,), (0.0,)), ((1, 1), (0.0,)), ((1,), (float("nan"),))]
)
def test_measurements_without_positions_or_numbers_are_refused(counts: Any, sums: Any) -> None:
    with pytest.raises(ParityError):
        Measurement(counts, sums, 0.0)


def test_a_journal_remembers_and_counts_what_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "new" / "measurements.json"
    first = Measurement((2, 1), (0.25, 1e-9), 1.25)
    with Journal(path, {"model": "a"}) as journal:
        assert journal.get("k") is None
        journal.add("k", "layers.0", first)

    with Journal(path, {"model": "a"}) as journal:
        assert journal.get("k") == first
    assert json.loads(path.read_text())["measurements"]["k"]["label"] == "layers.0"


def test_a_journal_of_another_model_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    with Journal(path, {"model": "a", "weights": "1"}):
        pass

    with (
        pytest.raises(ParityError, match=r'\(weights: "1" there, "2" now\)'),
        Journal(path, {"model": "a", "weights": "2"}),
    ):
        pass


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": "other"}',
        '{"format": "autoglm-edge sensitivity", "version": 1, "identity": {}, "measurements": {"k": {}}}',
        '{"format": "autoglm-edge sensitivity", "version": 1, "identity": {}, "measurements": {"k": '
        '{"label": "a", "positions": [1], "kl_sums": [1e999], "seconds": 1}}}',
        '{"format": "autoglm-edge sensitivity", "version": 1, "identity": {}, "measurements": {"k": '
        '{"label": "a", "positions": [-1, 2], "kl_sums": [0, 0], "seconds": 1}}}',
        '{"format": "autoglm-edge sensitivity", "version": 2, "identity": {}, "measurements": {}}',
        "[" * 5000,
    ],
)
def test_a_damaged_journal_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    path.write_text(content)

    with pytest.raises(ParityError, match=r"damaged|another release"), Journal(path, {}):
        pass
    assert path.read_text() == content


def test_a_folder_with_something_else_is_no_workspace(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")

    with pytest.raises(ParityError, match=r"holds 'letters\.txt'"), Journal(tmp_path / "m.json", {}):
        pass


def test_two_processes_cannot_share_a_workspace(tmp_path: Path) -> None:
    with Journal(tmp_path / "m.json", {}), pytest.raises(ParityError, match="another process"):
        Journal(tmp_path / "m.json", {}).__enter__()
    with Journal(tmp_path / "m.json", {}):
        pass


def test_equal_choices_have_equal_keys() -> None:
    assert mixture_key({"a": "int4", "b": "int8"}) == mixture_key({"b": "int8", "a": "int4"})
    assert mixture_key({"a": "int4"}) != mixture_key({"a": "int8"})


# --- mixtures


def test_sizes_are_those_of_the_exported_bundles(
    palette: Palette, checkpoint: Path, bundle_of: Callable[..., Path]
) -> None:
    for recipe in (HIGH, PRESETS["int4-mixed"]):
        folder = bundle_of(checkpoint, recipe=recipe)
        assert palette.total_bytes(recipe) == sum(path.stat().st_size for path in folder.iterdir())


def test_a_mixture_computes_what_its_export_computes(
    palette: Palette, checkpoint: Path, reference: Path, bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    recorded = Reference.open(reference)
    recipe, levels = next(item for item in palette.presets() if item[0].name == "int4-mixed")

    def level(recipe: Recipe, path: Path) -> Bundle:
        shutil.copytree(bundle_of(checkpoint, recipe=recipe), path)
        return Bundle.open(path)

    with Journal(tmp_path / "ws" / "measurements.json", {}) as journal:
        bench = Bench(tmp_path / "ws", palette, recorded, journal, None, None, lambda event: None)
        bench.export_levels(level)
        mixture = bench.bundle(levels)
        mixture.verify()
        ours = measure(mixture, recorded, check=True)
        high = measure(bench.bundle({}), recorded)
        low = measure(bench.bundle(dict.fromkeys(palette.tensors, 1)), recorded)

    assert set(levels.values()) == {0, 1}
    assert recipe.name == "int4-mixed"
    for found, same in ((ours, PRESETS["int4-mixed"]), (high, HIGH), (low, PRESETS["int4-all"])):
        exported = bundle_of(checkpoint, recipe=same)
        report = validate(exported, reference, prefill="decoder")
        assert report.candidate is not None
        assert found.sums == measure(Bundle.open(exported), recorded).sums
        assert found.kl == pytest.approx(report.candidate.answer.kl.mean, rel=RUNS_REL)
    assert high.kl < ours.kl < low.kl


def test_a_head_in_slices_is_one_matrix_of_a_mixture(
    palette: Palette,
    checkpoint: Path,
    reference: Path,
    bundle_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autoglm_edge.export.graphs.head.SLICE_ROWS", 192)
    recorded, name = Reference.open(reference), "lm_head.weight"
    cut = Palette(Checkpoint.open(checkpoint), [HIGH, PRESETS["int4-all"]])
    (head,) = (group for group in group_tensors(cut.tensors) if group.name == "head")
    with Journal(tmp_path / "ws" / "measurements.json", {}) as journal:
        bench = Bench(tmp_path / "ws", cut, recorded, journal, None, None, lambda event: None)
        bench.export_levels(lambda recipe, path: export(checkpoint, path, recipe=recipe))
        found = [measure(bench.bundle(levels), recorded).sums for levels in ({}, {name: 1})]
    alone = export(checkpoint, tmp_path / "alone", recipe=cut.mixture({name: 1}))

    assert cut.tensors == palette.tensors
    assert len(cut.placed(name, 0).weights) == 3
    assert palette.size_bytes(head, 0) <= cut.size_bytes(head, 0) < palette.size_bytes(head, 0) + 6 * 4096
    assert cut.total_bytes(HIGH) == sum(path.stat().st_size for path in (tmp_path / "ws/level-0").iterdir())
    assert found[0] == measure(Bundle.open(bundle_of(checkpoint, recipe=HIGH)), recorded).sums
    assert found[1] == measure(alone, recorded).sums != found[0]


def test_levels_that_lie_otherwise_than_this_release_writes_are_refused(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", replace(SHAPE, vocab=2048))
    palette = Palette(Checkpoint.open(checkpoint), [HIGH, PRESETS["int4-all"]])
    ws, recorded = tmp_path / "ws", Reference.open(reference)
    with Journal(ws / "measurements.json", {}) as journal:
        with monkeypatch.context() as patch:
            patch.setattr("autoglm_edge.export.graphs.head.SLICE_ROWS", 1024)
            export(checkpoint, ws / "level-0", recipe=HIGH)
        bench = Bench(ws, palette, recorded, journal, None, None, lambda event: None)
        with pytest.raises(ParityError, match=r"level-0 is not an export of int4-at-8; delete it"):
            bench.export_levels(lambda recipe, path: export(checkpoint, path, recipe=recipe))

    decoder = palette.jobs[0].plans[0]  # two slices that fill their pages: the length does not tell
    assert (ws / "level-0" / decoder.data_file).stat().st_size == decoder.data_bytes


def test_levels_that_do_not_go_together_are_refused(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    for levels, what in (
        (["int8"], "two or more"),
        (["int8", "int8"], "two or more"),
        (["fp16", "int8"], "activations, accuracy_level or balance"),
    ):
        with pytest.raises(QuantError, match=what):
            Palette(opened, [resolve(level) for level in levels])
    unbalanced = replace(PRESETS["int4-all"], balance=False)
    with pytest.raises(QuantError, match="balance"):
        Palette(opened, [HIGH, unbalanced])
    low = PRESETS["int4-all"]
    uneven = replace(low, name="uneven", rules=(Rule("*.v_proj.weight", None), *low.rules))
    palette = Palette(opened, [HIGH, uneven])
    with pytest.raises(QuantError, match=r"uneven stores the tensors of layers\.0\.attention"):
        palette.check_groups(group_tensors(palette.tensors))


def test_rules_of_a_choice_give_every_tensor_its_level(palette: Palette) -> None:
    groups = group_tensors(palette.tensors)
    for chosen in ({group.name: number % 2 for number, group in enumerate(groups)}, palette.smallest(groups)):
        recipe = palette.recipe("mine", groups, chosen)

        for group in groups:
            for name in group.tensors:
                wanted = palette.levels[chosen[group.name]].format_for(name)
                assert recipe.format_for(name) == wanted is not None
        assert len(recipe.rules) <= 2 * 8


# --- the choice


def test_the_choice_keeps_its_budget_to_the_byte_and_is_not_worse_than_the_fixed_recipe_of_that_size(
    run: Run, checkpoint: Path, reference: Path, budget: int, bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    choice = run.choice
    bundle = export(checkpoint, tmp_path / "auto", recipe=choice.recipe)
    report = validate(bundle.path, reference, prefill="decoder")
    fixed = validate(bundle_of(checkpoint, "int4-mixed"), reference, prefill="decoder")

    assert report.candidate is not None
    assert fixed.candidate is not None
    size = sum(path.stat().st_size for path in bundle.path.iterdir())
    assert size == choice.total_bytes <= budget
    assert report.candidate.answer.kl.mean == pytest.approx(choice.measured_kl, rel=RUNS_REL)
    assert report.candidate.answer.kl.mean <= fixed.candidate.answer.kl.mean
    allocated, *presets = choice.contenders
    assert allocated.name == "allocated"
    assert [item.name for item in presets] == ["int4", "int4-mixed"]
    assert presets[1].kl == pytest.approx(fixed.candidate.answer.kl.mean, rel=RUNS_REL)
    assert choice.measured_kl == min(item.kl for item in choice.contenders)


def test_the_allocation_alone_beats_the_fixed_recipes_and_adds_up(run: Run) -> None:
    allocated, *fixed = run.choice.contenders

    assert allocated.kl < min(item.kl for item in fixed)
    assert allocated.kl == run.choice.allocated_kl
    assert run.choice.predicted_kl / 3 < allocated.kl < 3 * run.choice.predicted_kl


def test_every_group_is_measured_once_and_nothing_is_exported_twice(run: Run) -> None:
    groups = 2 * 3 + 2 + 1 + 1

    assert exported(run.events) == 2
    assert len(measured(run.events)) == 1 + groups
    assert len(run.choice.sensitivities) == groups
    assert {item.level for item in run.choice.sensitivities} == {"int4-all"}
    journal = json.loads((run.workspace / "measurements.json").read_text())
    assert len(journal["measurements"]) == 1 + groups + len(run.choice.contenders)


def test_other_budgets_cost_only_their_own_check_and_more_bytes_predict_no_more_loss(
    run: Run, checkpoint: Path, reference: Path, palette: Palette, tmp_path: Path
) -> None:
    workspace = shutil.copytree(run.workspace, tmp_path / "ws")
    groups = group_tensors(palette.tensors)
    least = palette.total_bytes(palette.recipe("auto-1.23456MB", groups, palette.smallest(groups)))
    most = palette.total_bytes(HIGH)
    predicted = []
    for share in (0.0, 0.4, 0.8):
        events: list[ProgressEvent] = []
        budget = int(least + share * (most - least)) + 9
        choice = choose_recipe(checkpoint, reference, budget, workspace=workspace, progress=events.append)
        predicted.append(choice.predicted_kl)
        assert choice.total_bytes <= budget
        assert exported(events) == 0
        assert measured(events) == []

    assert predicted[0] >= predicted[1] >= predicted[2]


def test_an_interrupted_run_goes_on_where_it_stopped(
    checkpoint: Path, reference: Path, budget: int, tmp_path: Path
) -> None:
    events: list[ProgressEvent] = []

    def stop_after(count: int) -> Callable[[ProgressEvent], None]:
        def tell(event: ProgressEvent) -> None:
            events.append(event)
            if len(measured(events)) > count or (count == 0 and exported(events)):
                raise KeyboardInterrupt

        return tell

    for count in (0, 3):
        events.clear()
        with pytest.raises(KeyboardInterrupt):
            choose_recipe(
                checkpoint,
                reference,
                budget,
                workspace=tmp_path / "ws",
                progress=stop_after(count),
                options=LAYERS,
            )
    done = json.loads((tmp_path / "ws" / "measurements.json").read_text())["measurements"]
    events.clear()
    recipe = auto_recipe(
        checkpoint, reference, budget, workspace=tmp_path / "ws", progress=events.append, options=LAYERS
    )

    assert len(done) == 3
    assert exported(events) == 0
    assert len(measured(events)) == 1 + 5 - 3
    assert read_recipe(tmp_path / "ws" / f"{recipe.name}.toml") == recipe


def test_fewer_prompts_are_another_measurement(
    run: Run, checkpoint: Path, reference: Path, budget: int
) -> None:
    with pytest.raises(ParityError, match="prompts: 4 there, 2 now"):
        choose_recipe(checkpoint, reference, budget, workspace=run.workspace, options=AutoOptions(prompts=2))


def test_budgets_that_leave_no_choice_are_refused_before_anything_is_measured(
    checkpoint: Path, reference: Path, palette: Palette, tmp_path: Path
) -> None:
    for budget, what in (
        (1, "cannot be kept: the smallest bundle of int4-at-8 and int4-all has "),
        (10**9, "leaves nothing to choose: int4-at-8 has "),
    ):
        with pytest.raises(QuantError, match=re.escape(what)):
            choose_recipe(checkpoint, reference, budget, workspace=tmp_path / "ws")
    about = palette.total_bytes(PRESETS["int4-all"])
    with pytest.raises(QuantError, match="cannot be kept") as error:
        choose_recipe(checkpoint, reference, about - 4096, workspace=tmp_path / "ws")
    named = int(re.findall(r"has ([\d,]+);", str(error.value))[0].replace(",", ""))
    assert abs(named - about) < 4096
    with pytest.raises(KeyboardInterrupt):
        choose_recipe(checkpoint, reference, named, workspace=tmp_path / "other", progress=stop)
    with pytest.raises(RequestError, match="whole number"):
        choose_recipe(checkpoint, reference, 6.5, workspace=tmp_path / "ws")  # type: ignore[arg-type]
    assert not (tmp_path / "ws").exists()


def test_presets_are_measured_with_the_refinement_of_the_levels(checkpoint: Path) -> None:
    own = PRESETS["int4-all"].rules[0].refine
    low = PRESETS["int4-all"].with_(refine=OTHER)
    palette = Palette(Checkpoint.open(checkpoint), [HIGH, low])

    found = {recipe.name: recipe for recipe, _ in palette.presets()}

    assert own != OTHER
    assert list(found) == ["int4-refined", "int4-mixed-refined"]
    rules = [rule for recipe in found.values() for rule in recipe.rules]
    assert {rule.refine for rule in rules if rule.format and rule.format.bits == 4} == {OTHER}


def test_a_reference_of_other_weights_is_refused(reference: Path, budget: int, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "small", SHAPE, dtype="float32", seed=1)

    with pytest.raises(ParityError, match="another weights"):
        choose_recipe(other, reference, budget, workspace=tmp_path / "ws")


def test_a_reference_of_another_pixel_budget_is_refused(
    checkpoint: Path, reference: Path, budget: int, tmp_path: Path
) -> None:
    with pytest.raises(ParityError, match="--max-image-tokens"):
        choose_recipe(
            checkpoint, reference, budget, workspace=tmp_path / "ws", options=AutoOptions(max_image_tokens=20)
        )


def test_prompts_without_a_picture_are_refused(
    checkpoint: Path, reference: Path, budget: int, tmp_path: Path
) -> None:
    with pytest.raises(ParityError, match="no picture in its first prompts"):
        choose_recipe(
            checkpoint, reference, budget, workspace=tmp_path / "ws", options=AutoOptions(prompts=1)
        )


def test_a_workspace_of_another_run_is_refused(
    run: Run, checkpoint: Path, reference: Path, budget: int
) -> None:
    with pytest.raises(ParityError, match="levels: "):
        choose_recipe(
            checkpoint,
            reference,
            budget,
            workspace=run.workspace,
            options=AutoOptions(levels=(HIGH, PRESETS["int4-all"].with_(refine=OTHER))),
        )


@pytest.mark.slow
def test_integers_refined_with_data_are_the_same_in_the_mixture_and_in_the_export(
    checkpoint: Path, reference: Path, palette: Palette, tmp_path: Path
) -> None:
    calibration = prompt_file(tmp_path)
    levels = (HIGH, PRESETS["int4-all"].with_(refine="gptq"))
    options = AutoOptions(per="layer", levels=levels, calibration=calibration)
    budget = palette.total_bytes(HIGH) - 50_000

    choice = choose_recipe(checkpoint, reference, budget, workspace=tmp_path / "ws", options=options)
    bundle = export(checkpoint, tmp_path / "out", recipe=choice.recipe, calibration=calibration)

    refined = {rule.refine for rule in choice.recipe.rules}
    assert refined == {"none", "gptq"}
    assert sum(path.stat().st_size for path in bundle.path.iterdir()) == choice.total_bytes
    assert measure(bundle, Reference.open(reference)).kl == choice.measured_kl


# --- the file


RECIPES = [
    *(recipe for recipe in PRESETS.values() if recipe.rules),
    Recipe(
        'quote " \\ \x7f 中文\n',
        "float16",
        0,
        (
            Rule("model.visual.*", None, "0-3,7"),
            Rule("*", BlockFormat(8, 32, False), "outer:1/8"),
            Rule("*.weight", BlockFormat(4, 128, True), None, "search"),
        ),
    ),
    Recipe("floats", "float32", 4, (Rule("*", None),)),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name.encode("unicode_escape").decode())
def test_a_written_recipe_is_read_back_as_it_was(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"

    write_recipe(path, recipe, ["first", "two\nlines \x00 \x7f", ""])

    assert read_recipe(path) == recipe
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# first\n# two\n# lines\n#\nname = ")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_a_recipe_without_rules_or_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="no rules"):
        write_recipe(tmp_path / "fp32.toml", PRESETS["fp32"])
    with pytest.raises(EdgeError, match="cannot be written"):
        write_recipe(tmp_path / "nowhere" / "int8.toml", PRESETS["int8"])


def test_the_file_of_a_choice_tells_what_was_measured(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "auto.toml"
    write_recipe(path, run.choice.recipe, run.choice.lines())

    text = path.read_text(encoding="utf-8")
    assert read_recipe(path) == run.choice.recipe
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert sum("layers.1.down" in line for line in comment) == 1
    assert any("predicted" in line and "measured" in line for line in comment)


def test_names_tell_the_budget() -> None:
    assert recipe_name(6_500_000_000) == "auto-6.5GB"
    assert recipe_name(10_000_000_000) == "auto-10GB"
    assert recipe_name(4_250_000) == "auto-4.25MB"
    names = [recipe_name(budget) for budget in (1_000, 999_999_999, 6_512_345_678)]
    assert all(Path(name).name == name for name in names)
    assert all(a != b for a, b in itertools.pairwise(names))
    assert replace(PRESETS["int8"], name=names[0]).name == "auto-0.001MB"
