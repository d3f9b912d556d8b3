"""Recipes: which tensor gets which format, recipe files, and the sizes that follow."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_edge.errors import QuantError
from autoglm_edge.quantize import (
    PRESETS,
    BlockFormat,
    ChannelFormat,
    Recipe,
    Rule,
    WeightFormat,
    read_recipe,
    resolve,
)

ROOT = Path(__file__).resolve().parent.parent
INT4, INT8 = BlockFormat(4, 64, False), BlockFormat(8, 128, True)
CHANNELS = ChannelFormat()
INTEGERS = ["int8", "int8-blocks", "int4", "int4-mixed", "int4-all", "int3", "int2"]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SIZES = _script("preset_sizes")
SHAPES: dict[str, tuple[int, int]] = SIZES.shapes()
MATRICES = [name for name, (rows, _) in SHAPES.items() if rows > 1]
FLOAT_MATRICES = {
    "model.visual.patch_embed.proj.weight",
    "model.visual.embeddings.position_embedding.weight",
}


def _by_format(recipe: Recipe) -> dict[WeightFormat | None, set[str]]:
    """Checkpoint tensors of the 9B by the format they get."""
    recipe = recipe.for_layers(decoder=40, vision=24)
    groups: dict[WeightFormat | None, set[str]] = {}
    for name in SHAPES:
        groups.setdefault(recipe.format_for(name), set()).add(name)
    return groups


def _write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


# --- presets


def test_the_shapes_that_sizes_are_computed_from_are_the_whole_9b():
    assert len(SHAPES) == 704
    assert sum(math.prod(shape) for shape in SHAPES.values()) == 10_292_777_472


def test_the_presets_are_those_of_the_documentation():
    assert list(PRESETS) == ["fp32", "fp16", *INTEGERS]
    text = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    table = text.partition("## Presets")[2].partition("## ")[0]
    assert [row.split("`")[1] for row in table.splitlines() if row.startswith("| `")] == list(PRESETS)
    assert all(recipe.name == name for name, recipe in PRESETS.items())


@pytest.mark.parametrize("name", PRESETS)
def test_norms_biases_patch_embedding_and_positions_stay_float_in_every_preset(name):
    floats = _by_format(PRESETS[name])[None]

    assert {tensor for tensor, (rows, _) in SHAPES.items() if rows == 1} | FLOAT_MATRICES <= floats


@pytest.mark.parametrize("name, dtype", [("fp32", "float32"), ("fp16", "float16")])
def test_float_presets_quantize_nothing(name, dtype):
    assert _by_format(PRESETS[name]) == {None: set(SHAPES)}
    assert PRESETS[name].activations == dtype


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_presets_quantize_every_other_matrix_and_use_the_fast_kernel(name):
    assert _by_format(PRESETS[name])[None] == set(SHAPES) - set(MATRICES) | FLOAT_MATRICES
    assert PRESETS[name].accuracy_level == 4


def test_int8_blocks_and_int4_all_have_one_format_each():
    assert set(_by_format(PRESETS["int8-blocks"])) == {None, INT8}
    assert set(_by_format(PRESETS["int4-all"])) == {None, INT4}


def test_int8_is_for_integer_units_but_for_the_embedding_that_is_looked_up():
    groups = _by_format(PRESETS["int8"])

    assert set(groups) == {None, INT8, CHANNELS}
    assert groups[INT8] == {"model.language_model.embed_tokens.weight"}


def test_int4_gives_the_decoder_4_bits_head_and_embedding_8_and_vision_8_for_integer_units():
    groups = _by_format(PRESETS["int4"])

    assert set(groups) == {None, INT4, INT8, CHANNELS}
    assert all(tensor.startswith("model.language_model.layers.") for tensor in groups[INT4])
    assert len(groups[INT4]) == 40 * 6
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} == groups[INT8]
    assert {"model.visual.downsample.weight", "model.visual.merger.proj.weight"} < groups[CHANNELS]
    assert all(tensor.startswith("model.visual.") for tensor in groups[CHANNELS])


def test_int4_mixed_differs_from_int4_in_the_sensitive_layers_only():
    mixed, plain = _by_format(PRESETS["int4-mixed"]), _by_format(PRESETS["int4"])

    outer = [*range(5), *range(35, 40)]
    assert mixed[INT8] - plain[INT8] == {
        f"model.language_model.layers.{layer}.{module}.weight"
        for layer in outer
        for module in ("self_attn.v_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize("name, bits", [("int3", 3), ("int2", 2)])
def test_the_controls_differ_from_int4_in_the_bits_of_the_decoder_only_and_are_as_large(name, bits):
    control, plain = _by_format(PRESETS[name]), _by_format(PRESETS["int4"])

    same = {form: plain[form] for form in (INT8, CHANNELS, None)}
    assert control == {BlockFormat(bits, 64, False): plain[INT4], **same}
    assert SIZES.sizes(PRESETS[name]) == SIZES.sizes(PRESETS["int4"])


def test_int4_fits_the_budget_of_memory_and_disk():
    parts = SIZES.sizes(PRESETS["int4"])

    assert parts["decoder"] + parts["embedding"] <= 6.0e9
    assert sum(parts.values()) <= 6.9e9 - 30e6  # 30 MB for tokenizer, graphs and the small files


def test_the_size_table_of_the_documentation_is_what_the_script_prints(capsys):
    SIZES.main()

    *table, last = capsys.readouterr().out.splitlines()
    assert "\n".join(table) in (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    assert json.loads(last)["weights"] == 10_292_777_472


# --- rules


def test_the_first_rule_that_matches_decides():
    recipe = Recipe("r", "float32", 4, (Rule("lm_*", None), Rule("*", INT4), Rule("*", INT8)))

    assert recipe.format_for("lm_head.weight") is None
    assert recipe.format_for("anything.else") == INT4


def test_a_tensor_that_no_rule_matches_stays_float():
    assert Recipe("r", "float32", 4, (Rule("lm_head.weight", INT4),)).format_for("lm_head.other") is None


def test_patterns_are_case_sensitive():
    assert Recipe("r", "float32", 4, (Rule("LM_head.*", INT4),)).format_for("lm_head.weight") is None


@pytest.mark.parametrize(
    "layers, chosen",
    [
        ("first:2", [0, 1]),
        ("last:1", [9]),
        ("outer:3", [0, 1, 2, 7, 8, 9]),
        ("outer:1/8", [0, 1, 8, 9]),
        ("first:1/3", [0, 1, 2, 3]),
        ("last:1/1", list(range(10))),
        ("outer:7", list(range(10))),
        ("first:99", list(range(10))),
        ("0-2,7", [0, 1, 2, 7]),
    ],
)
def test_a_rule_limited_to_layers_matches_those_only(layers, chosen):
    rules = (Rule("model.language_model.layers.*", INT8, layers),)
    recipe = Recipe("r", "float32", 4, rules).for_layers(decoder=10, vision=2)

    names = [f"model.language_model.layers.{index}.mlp.down_proj.weight" for index in range(10)]

    assert [index for index, name in enumerate(names) if recipe.format_for(name)] == chosen


@pytest.mark.parametrize("layers", ["12", "0-10", "0,9,10"])
def test_layer_numbers_that_a_checkpoint_does_not_have_are_refused(layers):
    rule = Rule("model.language_model.layers.*", INT8, layers)

    with pytest.raises(QuantError, match="only 10 layers, 0-9"):
        rule.for_layers(decoder=10, vision=24)


def test_layers_of_a_pattern_that_matches_both_stacks_are_those_of_the_decoder():
    recipe = Recipe("r", "float32", 4, (Rule("*down_proj.weight", INT8, "last:1"),))
    recipe = recipe.for_layers(decoder=3, vision=9)

    assert recipe.format_for("model.language_model.layers.2.mlp.down_proj.weight") == INT8
    assert recipe.format_for("model.visual.blocks.2.mlp.down_proj.weight") is None


@pytest.mark.parametrize("name", PRESETS)
def test_every_rule_of_a_preset_matches_something(name):
    PRESETS[name].for_layers(decoder=40, vision=24).check_names(SHAPES)


@pytest.mark.parametrize(
    "pattern, form, layers, said",
    [
        ("model.language.layers.*", INT4, None, "matches no tensor"),
        ("LM_HEAD.weight", None, None, "matches no tensor"),
        ("lm_head.weight", INT4, "0-3", "in layers 0-3 matches no tensor"),
        ("*norm*", INT8, None, "always stay float"),
        ("model.visual.patch_embed.*", INT8, None, "always stay float"),
    ],
)
def test_a_rule_that_decides_nothing_is_refused(pattern, form, layers, said):
    recipe = Recipe("r", "float32", 4, (Rule(pattern, form, layers),))

    with pytest.raises(QuantError, match=said):
        recipe.for_layers(decoder=40, vision=24).check_names(SHAPES)


def test_a_rule_that_keeps_what_is_float_anyway_is_fine():
    Recipe("r", "float32", 4, (Rule("*norm*", None),)).check_names(SHAPES)


def test_filled_in_layer_numbers_are_short_and_can_be_read_again():
    recipe = PRESETS["int4-mixed"]

    assert recipe.for_layers(decoder=40, vision=24).rules[0].layers == "0-4,35-39"
    assert recipe.for_layers(decoder=5, vision=2).rules[0].layers == "0,4"
    assert recipe.for_layers(decoder=1, vision=1).rules[0].layers == "0,0"


def test_vision_rules_count_the_blocks_of_the_vision_tower():
    recipe = Recipe("r", "float32", 4, (Rule("model.visual.*", INT8, "last:1"),)).for_layers(
        decoder=40, vision=24
    )

    assert recipe.format_for("model.visual.blocks.23.attn.qkv.weight") == INT8
    assert recipe.format_for("model.visual.blocks.22.attn.qkv.weight") is None
    assert recipe.format_for("model.visual.merger.proj.weight") is None


@given(depth=st.integers(1, 200), above=st.integers(1, 12), below=st.integers(1, 12))
def test_outer_layers_are_as_many_at_either_end_and_at_least_one(depth, above, below):
    above, below = min(above, below), max(above, below)
    rule = Rule("model.language_model.layers.*", INT8, f"outer:{above}/{below}")
    rule = rule.for_layers(decoder=depth, vision=1)

    chosen = [rule.matches(f"model.language_model.layers.{index}.x") for index in range(depth)]

    assert chosen == chosen[::-1] and chosen[0]
    assert sum(chosen) == min(depth, 2 * math.ceil(depth * above / below))


def test_a_relative_rule_is_refused_until_the_depth_is_known():
    with pytest.raises(QuantError, match="for_layers"):
        PRESETS["int4-mixed"].format_for("model.language_model.layers.7.mlp.down_proj.weight")


@pytest.mark.parametrize("layers", ["", "first", "first:0", "first:1/0", "first:0/8", "last:9/8", "middle:2"])
def test_layers_that_mean_nothing_are_refused(layers):
    with pytest.raises(QuantError, match="layers = "):
        Rule("*", INT4, layers)


@pytest.mark.parametrize(
    "layers", ["first:-1", "3-", "-3", "1,", "first:" + "9" * 5000, "1.5", "0-4,first:1"]
)
def test_layers_that_cannot_be_read_are_refused(layers):
    with pytest.raises(QuantError, match="must look like"):
        Rule("*", INT4, layers)


def test_an_empty_pattern_is_refused():
    with pytest.raises(QuantError, match="empty pattern"):
        Rule("", INT4)


# --- changed copies


@pytest.mark.parametrize("name", ["int4", "int4-mixed", "int4-all"])
def test_a_block_size_changes_the_4_bit_rules_only(name):
    changed = _by_format(PRESETS[name].with_(block_size=128, symmetric=True))
    before = _by_format(PRESETS[name])

    assert changed[BlockFormat(4, 128, True)] == before[INT4]
    assert changed.get(INT8) == before.get(INT8)


def test_a_block_size_changes_all_rules_of_int8_blocks():
    assert set(_by_format(PRESETS["int8-blocks"].with_(block_size=32))) == {None, BlockFormat(8, 32, True)}


@pytest.mark.parametrize(
    "change", [{"block_size": 32}, {"symmetric": True}, {"accuracy_level": 0}, {"refine": "gptq"}]
)
def test_what_is_for_blocks_is_refused_by_int8_which_has_none(change):
    with pytest.raises(QuantError, match="int8-blocks"):
        PRESETS["int8"].with_(**change)


def test_scales_per_channel_can_be_searched():
    groups = _refinements(PRESETS["int8"].with_(refine="search"))

    assert groups == {None: {"none"}, INT8: {"search"}, CHANNELS: {"search"}}


def _refinements(recipe: Recipe) -> dict[WeightFormat | None, set[str]]:
    """Refinements by the format they belong to."""
    recipe = recipe.for_layers(decoder=40, vision=24)
    groups: dict[WeightFormat | None, set[str]] = {}
    for name in SHAPES:
        groups.setdefault(recipe.format_for(name), set()).add(recipe.refinement_for(name))
    return groups


@pytest.mark.parametrize("refine", ["none", "search", "gptq"])
@pytest.mark.parametrize("name", ["int4", "int4-mixed", "int4-all", "int3", "int2"])
def test_a_refinement_changes_the_rules_of_fewest_bits_only(name, refine):
    before, after = _refinements(PRESETS[name]), _refinements(PRESETS[name].with_(refine=refine))

    fewest = min((form for form in before if form is not None), key=lambda form: form.bits)
    assert after == before | {fewest: {refine}}
    assert PRESETS[name].with_(refine=refine).with_() == PRESETS[name].with_(refine=refine)


def test_floats_have_no_refinement():
    assert _refinements(PRESETS["int4"].with_(refine="gptq"))[None] == {"none"}
    assert PRESETS["fp16"].refinement_for("lm_head.weight") == "none"


def test_a_refinement_of_floats_is_refused():
    with pytest.raises(QuantError, match='keeps it float, so refine = "gptq" means nothing'):
        Rule("*", None, None, "gptq")


def test_an_unknown_refinement_is_refused():
    with pytest.raises(QuantError, match="refine = 'best', must be one of none, search, gptq"):
        Rule("*", INT4, None, "best")
    with pytest.raises(QuantError, match="must be one of none, search, gptq"):
        PRESETS["int4"].with_(refine="best")


@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 32},
        {"symmetric": True},
        {"symmetric": False},
        {"accuracy_level": 4},
        {"refine": "none"},
    ],
)
def test_a_block_size_for_a_recipe_without_blocks_is_refused(name, change):
    with pytest.raises(QuantError, match="means nothing"):
        PRESETS[name].with_(**change)


@pytest.mark.parametrize("name, other", [("fp32", "float16"), ("fp16", "float32")])
def test_activations_that_contradict_a_float_recipe_are_refused(name, other):
    recipe = PRESETS[name]

    with pytest.raises(QuantError, match=f"take the recipe fp{other.removeprefix('float')}"):
        recipe.with_(activations=other)
    assert recipe.with_(activations=recipe.activations) == recipe


def test_with_changes_activations_and_accuracy_and_keeps_the_rest():
    changed = PRESETS["int4-all"].with_(activations="float16", accuracy_level=0)

    assert (changed.activations, changed.accuracy_level) == ("float16", 0)
    assert changed.rules == PRESETS["int4-all"].rules
    assert PRESETS["int4"].with_() == PRESETS["int4"]


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 48},
        {"activations": "bfloat16"},
        {"accuracy_level": 5},
        {"accuracy_level": True},
        {"prefill": "int4"},
    ],
)
def test_with_refuses_what_cannot_be(change):
    with pytest.raises(QuantError, match="must be"):
        PRESETS["int4"].with_(**change)


@pytest.mark.parametrize("name", ["int4", "int4-mixed", "int3", "int2"])
def test_a_preset_with_float16_activations_has_blocks_where_it_has_channels(name):
    before = _by_format(PRESETS[name])
    after = _by_format(PRESETS[name].with_(activations="float16"))

    assert after == {
        form: tensors | (before[CHANNELS] if form == INT8 else set())
        for form, tensors in before.items()
        if form != CHANNELS
    }


def test_a_file_on_a_preset_with_float16_activations_has_blocks_there_too(tmp_path):
    recipe = read_recipe(_write(tmp_path, 'base = "int4"\nactivations = "float16"'))

    assert recipe.rules == PRESETS["int4"].with_(activations="float16").rules


def test_channels_with_float16_activations_are_refused_and_never_changed_in_a_recipe_of_ones_own(tmp_path):
    mine = replace(PRESETS["int4"], name="mine")
    text = 'activations = "float16"\n[[rule]]\npattern = "*visual*"\nbits = 8\nper = "channel"'

    for attempt in (
        lambda: PRESETS["int8"].with_(activations="float16"),
        lambda: mine.with_(activations="float16"),
        lambda: read_recipe(_write(tmp_path, text)),
        lambda: read_recipe(_write(tmp_path, 'base = "int8"\nactivations = "float16"')),
    ):
        with pytest.raises(QuantError, match=r"needs float32 activations.*int8-blocks"):
            attempt()


# --- prefill


def test_the_part_for_prompts_has_channels_for_blocks_and_the_rest_as_it_was():
    recipe = replace(PRESETS["int4"], rules=(Rule("*.layers.1.*", None), *PRESETS["int4"].rules))
    second = recipe.with_(prefill="int8").for_prefill()

    assert second.format_for("model.language_model.layers.0.mlp.down_proj.weight") == CHANNELS
    assert second.format_for("model.language_model.layers.1.mlp.down_proj.weight") is None
    assert second.format_for("model.visual.downsample.weight") == CHANNELS
    assert second.prefill == "none"


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_a_part_for_prompts_means_nothing_to_floats(name):
    with pytest.raises(QuantError, match="prefill means nothing"):
        PRESETS[name].with_(prefill="int8")
    assert PRESETS[name].with_(prefill="none") == PRESETS[name]


def test_a_part_for_prompts_that_would_be_the_decoder_itself_is_refused():
    recipe = PRESETS["int8"].with_(prefill="int8").for_layers(decoder=40, vision=24)

    with pytest.raises(QuantError, match='prefill = "int8" would change nothing'):
        recipe.check_names(SHAPES)
    PRESETS["int4"].with_(prefill="int8").for_layers(decoder=40, vision=24).check_names(SHAPES)


def test_a_part_for_prompts_needs_float32_activations():
    with pytest.raises(QuantError, match='prefill = "int8" needs float32 activations'):
        PRESETS["int4"].with_(prefill="int8", activations="float16")


def test_a_table_that_is_looked_up_cannot_have_a_scale_per_channel():
    recipe = Recipe("mine", "float32", 4, (Rule("*", CHANNELS),))

    with pytest.raises(QuantError, match=r"embed_tokens.weight with a scale per channel.*give it blocks"):
        recipe.check_names(SHAPES)


# --- JSON


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_survives_json(name):
    for recipe in (PRESETS[name], PRESETS[name].for_layers(decoder=3, vision=2)):
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def _channel_rule(**changes: object) -> dict[str, object]:
    stored = {"bits": 8, "per": "channel", "groups": 1} | changes
    return {"pattern": "*", "format": stored, "layers": None}


def test_a_recipe_without_a_word_on_prefill_has_none_and_blocks_are_written_as_ever():
    document = PRESETS["int4"].with_(prefill="int8").to_json()
    assert document.pop("prefill") == "int8"

    assert Recipe.from_json(document) == PRESETS["int4"]
    assert document["rules"][0]["format"] == {"bits": 4, "block_size": 64, "symmetric": False}
    assert document["rules"][-1]["format"] == {"bits": 8, "per": "channel", "groups": 1}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"colour": 1}, "unknown key 'colour'"),
        ({"name": None}, "name is None"),
        ({"accuracy_level": True}, "accuracy_level is True"),
        ({"activations": "int8"}, "must be float32 or float16"),
        ({"rules": {}}, "rules is {}"),
        ({"prefill": "int4"}, "prefill is 'int4', must be none or int8"),
        ({"prefill": True}, "prefill is True"),
        ({"rules": [_channel_rule(bits=4)]}, "bits is 4 with a scale per channel"),
        ({"rules": [_channel_rule(per="row")]}, "per is 'row', must be channel"),
        ({"rules": [_channel_rule(groups=0)]}, "groups is 0"),
        ({"rules": [_channel_rule(groups=True)]}, "groups is True"),
        ({"rules": [_channel_rule(symmetric=True)]}, "unknown key 'symmetric'"),
        ({"rules": [_channel_rule() | {"refine": "gptq"}]}, "rounds for blocks only"),
        ({"rules": [1]}, "rule 1 is 1"),
        ({"rules": [{"pattern": "*", "format": None}]}, "lacks the key 'layers'"),
        ({"rules": [{"pattern": "*", "format": 4, "layers": None}]}, "format is 4"),
        ({"rules": [{"pattern": "*", "format": {"bits": 4}, "layers": None}]}, "lacks the key 'block_size'"),
        ({"rules": [{"pattern": "*", "format": None, "layers": None, "refine": 1}]}, "refine is 1"),
        ({"rules": [{"pattern": "*", "format": None, "layers": None, "refine": "x"}]}, "must be one of none"),
    ],
)
def test_a_recipe_that_json_spoilt_is_refused(change, said):
    with pytest.raises(QuantError, match=said):
        Recipe.from_json(PRESETS["int4"].to_json() | change)


def test_a_refinement_survives_json_and_its_absence_means_none():
    recipe = PRESETS["int4"].with_(refine="search")
    document = recipe.to_json()

    assert [rule["refine"] for rule in document["rules"]] == [rule.refine for rule in recipe.rules]
    assert Recipe.from_json(document) == recipe
    for rule in document["rules"]:
        del rule["refine"]
    assert {rule.refine for rule in Recipe.from_json(document).rules} == {"none"}


def test_integer_presets_balance_channels_and_changes_keep_it():
    assert [name for name, recipe in PRESETS.items() if recipe.balance] == INTEGERS
    off = replace(PRESETS["int4"], balance=False)
    assert PRESETS["int4"].with_(block_size=32).balance and not off.with_(block_size=32).balance


def test_a_recipe_of_a_bundle_that_does_not_speak_of_balance_has_none():
    document = PRESETS["int4"].to_json()
    assert document.pop("balance") is True

    assert Recipe.from_json(document) == replace(PRESETS["int4"], balance=False)


@pytest.mark.parametrize(
    "text, balance",
    [
        ('base = "int4"', True),
        ('base = "int4"\nbalance = false', False),
        ('base = "int4"\nbalance = true', True),
        ('[[rule]]\npattern = "*"\nbits = 4', True),
        ('balance = false\n[[rule]]\npattern = "*"\nbits = 4', False),
        ('[[rule]]\npattern = "*"\nkeep = true', False),
        ('balance = false\n[[rule]]\npattern = "*"\nkeep = true', False),
    ],
)
def test_a_file_balances_unless_it_says_no_or_quantizes_nothing(text, balance, tmp_path):
    assert read_recipe(_write(tmp_path, text)).balance is balance


@pytest.mark.parametrize("text", ['base = "fp16"', '[[rule]]\npattern = "*"\nkeep = true'])
def test_balance_without_anything_to_quantize_is_refused(text, tmp_path):
    with pytest.raises(QuantError, match="keeps every tensor float, so balance means nothing"):
        read_recipe(_write(tmp_path, f"balance = true\n{text}"))
    with pytest.raises(QuantError, match="so balance means nothing"):
        replace(PRESETS["fp32"], balance=True)


def test_balance_must_be_true_or_false(tmp_path):
    with pytest.raises(QuantError, match="balance is 1, must be of type bool"):
        read_recipe(_write(tmp_path, 'base = "int4"\nbalance = 1'))


def test_a_recipe_that_lacks_a_key_is_refused():
    document = PRESETS["int4"].to_json()
    del document["rules"]

    with pytest.raises(QuantError, match="lacks the key 'rules'"):
        Recipe.from_json(document)


# --- files


def test_a_file_with_a_base_puts_its_rules_before_those_of_the_base(tmp_path):
    path = _write(tmp_path, 'base = "int4"\n[[rule]]\npattern = "model.visual.*"\nkeep = true\n')

    recipe = read_recipe(path)

    assert recipe.name == "mine"
    assert recipe.rules == (Rule("model.visual.*", None), *PRESETS["int4"].rules)
    assert recipe.accuracy_level == 4


def test_a_file_says_everything_itself(tmp_path):
    path = _write(
        tmp_path,
        """
        name = "odd"
        activations = "float16"
        accuracy_level = 0

        [[rule]]
        pattern = "model.visual.*"
        bits = 8
        block_size = 32
        symmetric = false
        layers = "outer:2"

        [[rule]]
        pattern = "lm_head.weight"
        bits = 16

        [[rule]]
        pattern = "model.language_model.layers.*.mlp.*"
        bits = 3
        refine = "search"

        [[rule]]
        pattern = "*"
        bits = 4
        refine = "gptq"
        """,
    )

    assert read_recipe(path) == Recipe(
        "odd",
        "float16",
        0,
        (
            Rule("model.visual.*", BlockFormat(8, 32, False), "outer:2"),
            Rule("lm_head.weight", None),
            Rule("model.language_model.layers.*.mlp.*", BlockFormat(3, 64, False), None, "search"),
            Rule("*", INT4, None, "gptq"),
        ),
        balance=True,
    )


def test_the_examples_of_the_documentation_can_be_read(tmp_path):
    text = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    examples = [block.partition("```")[0] for block in text.split("```toml\n")[1:]]

    assert examples
    for example in examples:
        recipe = read_recipe(_write(tmp_path, example)).for_layers(decoder=40, vision=24)
        assert len({recipe.format_for(name) for name in SHAPES}) > 1


RULE = '[[rule]]\npattern = "*"\n'


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "neither a"),
        ('name = ""\nbase = "int4"', "empty name"),
        ('accuracy_level = 4\nbase = "fp32"', "accuracy_level means nothing"),
        ('accuracy_level = 0\nbase = "int8"', "accuracy_level means nothing.*int8-blocks"),
        (RULE + 'bits = 4\nlayers = "7-3"', "count upwards"),
        ('name = "x"', "neither a"),
        ("a = [", "is not TOML"),
        ("a = " + "[" * 100_000, "is not TOML"),
        ('colour = "red"', "unknown key 'colour'; known keys are name, base"),
        ('base = "int5"', "must be one of fp32, fp16, int8"),
        ("base = 4", "base is 4, must be of type str"),
        (RULE, "rule 1 must have either bits or keep"),
        (RULE + "bits = 4\nkeep = true", "rule 1 must have either bits or keep"),
        (RULE + "keep = false", "rule 1 must have either bits or keep"),
        (RULE + "bit = 4", "rule 1 has the unknown key 'bit'; known keys are pattern, bits"),
        (RULE + "bits = 5", "bits = 5, must be 2, 3, 4, 8, 16 or 32"),
        (RULE + "bits = true", "bits is True, must be of type int"),
        (RULE + 'bits = "4"', "bits is '4', must be of type int"),
        (RULE + "bits = 4.0", "bits is 4.0, must be of type int"),
        (RULE + "bits = 4\nblock_size = 48", "rule 1: block size is 48"),
        (RULE + 'bits = 4\nper = "channel"', "rule 1: bits is 4 with a scale per channel, must be 8"),
        (RULE + 'bits = 8\nper = "row"', "per is 'row', must be block or channel"),
        (RULE + "bits = 8\nper = 1", "per is 1, must be of type str"),
        (RULE + 'bits = 8\nper = "channel"\ngroups = 65', "rule 1: groups is 65, must be 1 to 64"),
        (RULE + 'bits = 8\nper = "channel"\ngroups = "2"', "groups is '2', must be of type int"),
        (
            RULE + 'bits = 8\nper = "channel"\nblock_size = 32',
            "scale per channel, so block_size means nothing",
        ),
        (RULE + "bits = 8\ngroups = 2", "scale per block, so groups means nothing"),
        (RULE + 'bits = 8\nper = "channel"\nrefine = "gptq"', "rule 1: .*rounds for blocks only"),
        (RULE + 'keep = true\nper = "channel"', "per means nothing"),
        ('base = "int4"\nprefill = "int4"', "prefill is 'int4', must be none or int8"),
        ('base = "fp32"\nprefill = "int8"', "prefill means nothing"),
        (RULE + "bits = 4\nsymmetric = 1", "symmetric is 1, must be of type bool"),
        (RULE + 'bits = 4\nlayers = "some"', "rule 1: .*must look like"),
        (RULE + "bits = 16", "activations, which are float32"),
        (RULE + "bits = 32\nblock_size = 64", "block_size means nothing"),
        (RULE + "keep = true\nsymmetric = true", "symmetric means nothing"),
        (RULE + 'keep = true\nrefine = "gptq"', "refine means nothing"),
        (RULE + 'bits = 4\nrefine = "best"', "rule 1: .*refine = 'best', must be one of none, search, gptq"),
        (RULE + "bits = 4\nrefine = true", "refine is True, must be of type str"),
        (RULE + 'bits = 4\n[[rule]]\npattern = ""\nkeep = true', "empty pattern"),
        ("[[rule]]\nbits = 4", "rule 1 lacks the key 'pattern'"),
        ("rule = 4", "rule is 4, must be of type list"),
        ("rule = [4]", "rule 1 is 4"),
        (RULE + "bits = 4\n[x]", "unknown key 'x'"),
        ("accuracy_level = 7\n" + RULE + "bits = 4", "accuracy_level is 7"),
        ('activations = "int8"\n' + RULE + "bits = 4", "must be float32 or float16"),
    ],
)
def test_a_recipe_file_with_a_mistake_is_refused_and_the_mistake_named(tmp_path, text, said):
    with pytest.raises(QuantError, match=said) as caught:
        read_recipe(_write(tmp_path, text))

    assert "mine" in str(caught.value) or "recipe" in str(caught.value) or "pattern" in str(caught.value)


def test_a_recipe_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(QuantError, match="is not TOML"):
        read_recipe(path)


def test_a_recipe_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "gone.toml", tmp_path):
        with pytest.raises(QuantError, match="cannot be read"):
            read_recipe(path)


def test_resolve_takes_presets_paths_and_nothing_else(tmp_path):
    path = _write(tmp_path, 'base = "int8"')

    assert resolve("int4") is PRESETS["int4"]
    assert resolve(path) == resolve(str(path))
    with pytest.raises(QuantError, match="'int5' is unknown, must be one of fp32"):
        resolve("int5")
    with pytest.raises(QuantError, match="cannot be read"):
        resolve("gone.toml")
