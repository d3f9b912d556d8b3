"""manifest.json: what is read is what was written, and nothing else is read."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from test_bundle import CONTENT, document

import autoglm_edge.runtime.manifest as module
from autoglm_edge.errors import BundleError, QuantError
from autoglm_edge.quantize.recipe import PRESETS, Recipe
from autoglm_edge.runtime.manifest import Manifest

SCHEMA = json.loads((Path(module.__file__).parent / "manifest.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
Place = tuple[str | int, ...]


def read(value: Any) -> Manifest:
    return Manifest.from_json(json.dumps(value))


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Where every value stands, containers included."""
    if at:
        yield at
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from places(item, (*at, key))


def put(value: Any, place: Place, new: Any) -> Any:
    """A copy with one value replaced."""
    changed = copy.deepcopy(value)
    container = changed
    for key in place[:-1]:
        container = container[key]
    container[place[-1]] = new
    return changed


def take(value: Any, place: Place) -> Any:
    """The value at a place."""
    for key in place:
        value = value[key]
    return value


def name_of(place: Place) -> str:
    return ".".join(map(str, place))


FREE = ("tools", "generation", "recipe", "figures")  # objects whose keys the dataclasses leave open
FIXED = [place for place in places(document()) if place[0] not in FREE and "files" not in place[:-2]]
OBJECTS = [(), *(place for place in FIXED if isinstance(take(document(), place), dict))]


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_reading_and_writing_again_changes_nothing():
    manifest = read(document())

    assert json.loads(manifest.to_json()) == document()
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_what_is_written_is_what_the_schema_describes():
    VALIDATOR.validate(json.loads(read(document()).to_json()))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_recipe_is_what_the_schema_describes(name):
    recipe = PRESETS[name].for_layers(decoder=40, vision=24)

    VALIDATOR.validate(document() | {"recipe": recipe.to_json()})


def _same_shape(kind: Any, schema: dict[str, Any], where: str) -> None:
    """A dataclass field and its schema: same keys, same types, same depth."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(kind)
        hints = typing.get_type_hints(kind)
        assert schema["additionalProperties"] is False, where
        assert list(schema["properties"]) == [item.name for item in fields], where
        optional = {
            item.name
            for item in fields
            if item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        }
        assert set(schema["required"]) == set(hints) - optional, where
        for item in fields:
            _same_shape(hints[item.name], schema["properties"][item.name], f"{where}.{item.name}")
    elif origin is tuple:
        assert schema["type"] == "array", where
        count = None if inner[-1] is ... else len(inner)
        assert schema.get("maxItems") == count, where
        assert count is None or schema.get("minItems") == count, where
        _same_shape(inner[0], schema["items"], f"{where}[]")
    elif origin is dict:
        assert schema["type"] == "object", where
        if inner[1] is not Any:
            free = schema.get("additionalProperties")
            for sub in [free] if free else schema["properties"].values():
                _same_shape(inner[1], sub, f"{where}.*")
    elif origin in (typing.Union, types.UnionType):
        (kind,) = [option for option in inner if option is not type(None)]
        if dataclasses.is_dataclass(kind):  # absent rather than null
            _same_shape(kind, schema, where)
            return
        assert schema["type"] == [{int: "integer", str: "string"}[kind], "null"], where
    elif "const" in schema or "enum" in schema:
        assert all(type(value) is kind for value in schema.get("enum", [schema.get("const")])), where
    else:
        assert schema["type"] == {int: "integer", str: "string", float: "number", bool: "boolean"}[kind], (
            where
        )


def test_the_schema_has_the_keys_and_types_of_the_dataclasses():
    _same_shape(Manifest, SCHEMA, "manifest")


@pytest.mark.parametrize("place", OBJECTS, ids=name_of)
def test_an_extra_key_is_refused_by_name(place):
    changed = put(document(), (*place, "colour"), 1)

    with pytest.raises(BundleError, match="colour"):
        read(changed)
    assert not VALIDATOR.is_valid(changed)


@pytest.mark.parametrize("place", [p for p in FIXED if isinstance(p[-1], str)], ids=name_of)
def test_a_missing_key_is_refused_by_name(place):
    changed = document()
    del take(changed, place[:-1])[place[-1]]

    with pytest.raises(BundleError, match=str(place[-1])):
        read(changed)
    assert not VALIDATOR.is_valid(changed)


def test_figures_may_be_missing_since_they_are_measured_later():
    changed = document()
    del changed["figures"]

    VALIDATOR.validate(changed)
    assert read(changed).figures == {}


@pytest.mark.parametrize("place", FIXED, ids=name_of)
def test_a_value_of_a_wrong_type_is_refused(place):
    right = take(document(), place)
    allowed: tuple[type, ...] = (type(right),)
    if place == ("source", "revision"):
        allowed = (type(None), str)
    elif place == ("tokens", "pad"):
        allowed = (type(None), int)
    for wrong in ("x", True, [], {}, 1.5, None):
        if isinstance(wrong, allowed) and not (isinstance(wrong, bool) and bool not in allowed):
            continue
        changed = put(document(), place, wrong)

        with pytest.raises(BundleError):
            read(changed)
        assert not VALIDATOR.is_valid(changed), wrong


@pytest.mark.parametrize(
    "place, value",
    [
        (("format_version",), 2),
        (("format_version",), 0),
        (("activations",), "bfloat16"),
        (("kv_dtype",), "int8"),
        (("kv_dtype",), "int4"),
        (("geometry", "layers"), 0),
        (("geometry", "vocab"), -1),
        (("files", 0, "size_bytes"), -1),
        (("files", 0, "sha256"), "0" * 63),
        (("files", 0, "sha256"), "G" * 64),
        (("files", 0, "sha256"), "A" * 64),
        (("files", 0, "path"), ""),
        (("image", "mean"), [0.5, 0.5]),
        (("image", "std"), [0.5, 0.0, 0.5]),
        (("image", "patch_size"), 0),
        (("image", "merge_size"), -2),
        (("image", "temporal_patch_size"), 0),
        (("image", "min_pixels"), 0),
        (("image", "max_pixels"), 0),
        (("image", "resample"), 6),
        (("image", "resample"), -1),
        (("tokens", "eos"), []),
        (("tokens", "eos"), [1, -1]),
        (("tokens", "pad"), -1),
        (("tokens", "image"), -1),
        (("tokens", "image_end"), -1),
        (("source", "parameters"), -1),
        (("source", "config_sha256"), "Z" * 64),
        (("parts", "decoder", "weight_bytes"), -1),
        (("kv_bytes_per_token",), 0),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_reader_and_schema(place, value):
    changed = put(document(), place, value)

    with pytest.raises(BundleError):
        read(changed)
    assert not VALIDATOR.is_valid(changed)


@pytest.mark.parametrize(
    "place, value, said",
    [
        (("image", "max_pixels"), 12543, "at least min_pixels"),
        (("image", "patch_size"), 400, "one token"),
        (("tokens", "image"), 3, "must differ"),
        (("generation", "temperature"), 10**400, "too large"),
    ],
    ids=str,
)
def test_values_that_do_not_go_together_are_refused(place, value, said):
    with pytest.raises(BundleError, match=said):
        read(put(document(), place, value))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", ["rescale_factor", "temperature"])
def test_a_number_that_is_not_finite_is_refused(key, number):
    text = json.dumps(document() | {"generation": {"temperature": 0.25}})
    text = re.sub(rf'("{key}": )[^,}}]+', rf"\g<1>{number}", text)
    assert number in text

    with pytest.raises(BundleError, match="finite"):
        Manifest.from_json(text)


def test_a_document_nested_without_end_is_refused():
    with pytest.raises(BundleError, match="not JSON"):
        Manifest.from_json('{"figures": ' + "[" * 100_000)


def test_a_file_listed_twice_is_refused():
    changed = document()
    changed["files"].append(dict(changed["files"][0], size_bytes=1))

    with pytest.raises(BundleError, match="twice"):
        read(changed)


@pytest.mark.parametrize("key", ["graph", "data"])
def test_a_part_whose_file_is_not_listed_is_refused(key):
    with pytest.raises(BundleError, match=r"other\.onnx"):
        read(put(document(), ("parts", "vision", key), "other.onnx"))


CALIBRATION = {"sha256": "a" * 64, "prompts": 3, "tokens": 8192}


def test_a_calibration_is_read_and_written_and_its_absence_is_kept():
    plain = read(document())
    calibrated = read(document() | {"calibration": CALIBRATION})

    assert plain.calibration is None
    assert "calibration" not in json.loads(plain.to_json())
    assert calibrated.calibration is not None
    assert dataclasses.asdict(calibrated.calibration) == CALIBRATION
    assert json.loads(calibrated.to_json())["calibration"] == CALIBRATION
    VALIDATOR.validate(json.loads(calibrated.to_json()))


@pytest.mark.parametrize(
    "changed",
    [
        {"sha256": "a" * 63},
        {"sha256": "A" * 64},
        {"prompts": 0},
        {"tokens": -1},
        {"tokens": "8192"},
        {"tokens": True},
        {"colour": 1},
    ],
)
def test_a_damaged_calibration_is_refused(changed):
    damaged = document() | {"calibration": CALIBRATION | changed}

    with pytest.raises(BundleError, match="calibration"):
        read(damaged)
    assert not VALIDATOR.is_valid(damaged)


def test_a_cache_in_bytes_and_what_its_scales_were_measured_on_go_together():
    both = read(document() | {"kv_dtype": "int8", "kv_calibration": CALIBRATION})

    assert both.kv_calibration is not None
    assert json.loads(both.to_json())["kv_calibration"] == CALIBRATION
    assert "kv_calibration" not in json.loads(read(document()).to_json())
    VALIDATOR.validate(json.loads(both.to_json()))
    for wrong in ({"kv_dtype": "int8"}, {"kv_calibration": CALIBRATION}):
        with pytest.raises(BundleError, match="kv_calibration belongs to"):
            read(document() | wrong)
        assert not VALIDATOR.is_valid(document() | wrong)


def test_a_calibration_without_a_key_is_refused():
    with pytest.raises(BundleError, match="lacks the key 'tokens'"):
        read(document() | {"calibration": {"sha256": "a" * 64, "prompts": 3}})


# --- the optional part


def with_prefill(**changes: Any) -> Any:
    """A document that lists the part for prompts, and its files."""
    value = document({**CONTENT, "prefill.onnx": b"graph four", "prefill.onnx.data": b"x"})
    value["parts"]["prefill"] = {
        "graph": "prefill.onnx",
        "data": "prefill.onnx.data",
        "weight_bytes": 1,
        "integer": True,
    } | changes
    return value


def test_a_part_for_prompts_is_read_written_and_described():
    manifest = read(with_prefill())

    assert manifest.parts["prefill"].integer and not manifest.parts["decoder"].integer
    assert json.loads(manifest.to_json()) == with_prefill()
    assert Manifest.from_json(manifest.to_json()) == manifest
    VALIDATOR.validate(with_prefill())


def test_a_part_that_says_it_is_no_integer_one_is_the_same_as_one_that_says_nothing():
    value = with_prefill(integer=False)

    manifest = read(value)

    VALIDATOR.validate(value)
    del value["parts"]["prefill"]["integer"]
    assert json.loads(manifest.to_json()) == value
    assert read(value) == manifest


@pytest.mark.parametrize("integer", [0, 1, "true", None, [], {}])
def test_an_integer_mark_that_is_no_boolean_is_refused(integer: Any):
    value = with_prefill(integer=integer)

    with pytest.raises(BundleError, match=r"parts\.prefill\.integer is .*must be of type bool"):
        read(value)
    assert not VALIDATOR.is_valid(value)


@pytest.mark.parametrize("missing", ["graph", "data", "weight_bytes"])
def test_a_part_for_prompts_must_be_whole(missing: str):
    value = with_prefill()
    del value["parts"]["prefill"][missing]

    with pytest.raises(BundleError, match=f"parts.prefill lacks the key '{missing}'"):
        read(value)
    assert not VALIDATOR.is_valid(value)


@pytest.mark.parametrize("file", ["prefill.onnx", "prefill.onnx.data"])
def test_a_part_for_prompts_whose_files_are_not_listed_is_refused(file: str):
    value = with_prefill()
    value["files"] = [entry for entry in value["files"] if entry["path"] != file]

    with pytest.raises(BundleError, match=f"part prefill needs {file}, which is not among its files"):
        read(value)


@pytest.mark.parametrize("name", ["Prefill", "prefil", "decoder2", ""])
def test_no_other_part_is_known(name: str):
    value = with_prefill()
    value["parts"][name] = value["parts"].pop("prefill")

    with pytest.raises(BundleError, match="optionally with prefill"):
        read(value)
    assert not VALIDATOR.is_valid(value)


@pytest.mark.parametrize("name", ["decoder", "embedding", "vision"])
def test_a_part_for_prompts_replaces_none_of_the_others(name: str):
    value = with_prefill()
    del value["parts"][name]

    with pytest.raises(BundleError, match="lists the parts"):
        read(value)
    assert not VALIDATOR.is_valid(value)


@pytest.mark.parametrize(
    ("form", "valid"),
    [
        ({"bits": 8, "per": "channel", "groups": 2}, True),
        ({"bits": 4, "per": "channel", "groups": 1}, False),
        ({"bits": 8, "per": "row", "groups": 1}, False),
        ({"bits": 8, "per": "channel", "groups": 0}, False),
        ({"bits": 8, "per": "channel"}, False),
        ({"bits": 8, "per": "channel", "groups": 1, "symmetric": True}, False),
    ],
)
def test_the_schema_and_the_reader_of_recipes_agree_about_scales_per_channel(form: Any, valid: bool):
    rule = {"pattern": "model.visual.*", "format": form, "layers": None, "refine": "none"}
    recipe = PRESETS["int4"].to_json() | {"rules": [rule], "prefill": "int8"}

    assert VALIDATOR.is_valid(document() | {"recipe": recipe}) is valid
    if valid:
        assert Recipe.from_json(recipe).to_json() == recipe
    else:
        with pytest.raises(QuantError):
            Recipe.from_json(recipe)
