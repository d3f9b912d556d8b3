"""Rules out of recipe files and manifests: TOML tables and JSON objects in, checked `Rule`s out.

In: parsed documents. Out: rules, or an error that names the place. Knows which keys a rule has and what its
absent keys mean; knows nothing of what a recipe holds besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from autoglm_edge.errors import QuantError

from .channels import ChannelFormat, WeightFormat
from .formats import BlockFormat
from .rule import Refinement, Rule

FLOAT_BITS: dict[int, str] = {32: "float32", 16: "float16"}
RULE_KEYS = ("pattern", "bits", "per", "groups", "block_size", "symmetric", "keep", "layers", "refine")
DEFAULT_BLOCK_SIZE = {2: 64, 3: 64, 4: 64, 8: 128}
DEFAULT_SYMMETRIC = {2: False, 3: False, 4: False, 8: True}
PER_KEYS: dict[str, tuple[str, ...]] = {"block": ("block_size", "symmetric"), "channel": ("groups",)}
"""What a scale may be for, and the keys of a rule that go with it."""


def rule_from_toml(table: Any, activations: str, where: str) -> Rule:
    """A rule of a recipe file.

    Args:
        table: a [[rule]].
        activations: of the recipe; floats are stored like these.
        where: for the error.

    Raises:
        QuantError: an unknown key, a value of a wrong type or out of range, or keys that contradict others.
    """
    if not isinstance(table, dict):
        raise QuantError(f"{where} is {table!r}, must be a [[rule]] table")
    known_keys(table, RULE_KEYS, where)
    pattern = of_type(table, "pattern", str, where)
    layers = of_type(table, "layers", str, where) if "layers" in table else None
    keep = of_type(table, "keep", bool, where) if "keep" in table else False
    if keep == ("bits" in table):
        raise QuantError(f"{where} must have either bits or keep = true")
    bits = 0 if keep else of_type(table, "bits", int, where)
    if keep or bits in FLOAT_BITS:
        if useless := sorted({"block_size", "groups", "per", "refine", "symmetric"} & set(table)):
            raise QuantError(f"{where} keeps {pattern} float, so {useless[0]} means nothing; remove it")
        if bits in FLOAT_BITS and FLOAT_BITS[bits] != activations:
            raise QuantError(
                f"{where} asks for {bits}-bit floats, but floats are stored like the activations, which are "
                f"{activations}; write keep = true, or change activations"
            )
        return Rule(pattern, None, layers)
    if bits not in DEFAULT_BLOCK_SIZE:
        raise QuantError(f"{where} has bits = {bits}, must be 2, 3, 4, 8, 16 or 32")
    refine = cast(Refinement, of_type(table, "refine", str, where)) if "refine" in table else "none"
    try:
        return Rule(pattern, _format_from_toml(table, bits, where), layers, refine)
    except QuantError as error:
        raise QuantError(f"{where}: {error}") from error


def _format_from_toml(table: Mapping[str, Any], bits: int, where: str) -> WeightFormat:
    per = of_type(table, "per", str, where) if "per" in table else "block"
    if per not in PER_KEYS:
        raise QuantError(f"{where}: per is {per!r}, must be block or channel")
    if useless := [key for other, keys in PER_KEYS.items() if other != per for key in keys if key in table]:
        raise QuantError(f"{where} has a scale per {per}, so {useless[0]} means nothing; remove it")
    if per == "channel":
        return ChannelFormat(bits, of_type(table, "groups", int, where) if "groups" in table else 1)
    size = of_type(table, "block_size", int, where) if "block_size" in table else DEFAULT_BLOCK_SIZE[bits]
    symmetric = of_type(table, "symmetric", bool, where) if "symmetric" in table else DEFAULT_SYMMETRIC[bits]
    return BlockFormat(bits, size, symmetric)


def rule_from_json(rule: Any, where: str) -> Rule:
    """A rule as `Rule.to_json` wrote it.

    Raises:
        QuantError: a key too many or missing, or a value of a wrong type or out of range.
    """
    if not isinstance(rule, dict):
        raise QuantError(f"{where} is {rule!r}, must be an object")
    # Bundles of version 0.1.0 say nothing of refinement: they have none.
    rule = {"refine": "none", **rule}
    exact_keys(rule, ("pattern", "format", "layers", "refine"), where)
    layers = None if rule["layers"] is None else of_type(rule, "layers", str, where)
    refine = cast(Refinement, of_type(rule, "refine", str, where))
    form = rule["format"]
    if form is None:
        return Rule(of_type(rule, "pattern", str, where), None, layers, refine)
    if not isinstance(form, dict):
        raise QuantError(f"{where}: format is {form!r}, must be an object or null")
    stored: WeightFormat
    if "per" in form:
        exact_keys(form, ("bits", "per", "groups"), f"{where}: format")
        if form["per"] != "channel":
            raise QuantError(f"{where}: format: per is {form['per']!r}, must be channel")
        stored = ChannelFormat(of_type(form, "bits", int, where), of_type(form, "groups", int, where))
    else:
        exact_keys(form, ("bits", "block_size", "symmetric"), f"{where}: format")
        stored = BlockFormat(
            of_type(form, "bits", int, where),
            of_type(form, "block_size", int, where),
            of_type(form, "symmetric", bool, where),
        )
    return Rule(of_type(rule, "pattern", str, where), stored, layers, refine)


def exact_keys(document: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Refuse a document with other keys than these."""
    known_keys(document, keys, where)
    if missing := [key for key in keys if key not in document]:
        raise QuantError(f"{where} lacks the key {missing[0]!r}")


def known_keys(document: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Refuse a document with a key that is not among these."""
    if extra := [key for key in document if key not in keys]:
        raise QuantError(f"{where} has the unknown key {extra[0]!r}; known keys are {', '.join(keys)}")


def of_type(document: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """The value of a key, if it is there and of this type; a boolean is no integer."""
    if key not in document:
        raise QuantError(f"{where} lacks the key {key!r}")
    value = document[key]
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise QuantError(f"{where}: {key} is {value!r}, must be of type {kind.__name__}")
    return value
