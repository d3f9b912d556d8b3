"""Recipes by name or from a TOML file.

In: a preset's name, or a path. Out: a `Recipe`; unknown keys and values are refused. Knows nothing of
tensors.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import cast

from autoglm_edge.errors import QuantError

from .recipe import PRESETS, Activations, Prefill, Recipe, check_level
from .rule_reading import known_keys, of_type, rule_from_toml

FILE_KEYS = ("name", "base", "activations", "accuracy_level", "balance", "prefill", "rule")


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a TOML file; docs/quantization.md shows one.

    Raises:
        QuantError: the file cannot be read, is not TOML, has an unknown key, or a value that is not allowed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise QuantError(f"the recipe {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or nested without end
        raise QuantError(f"the recipe {path} is not TOML: {error}") from error
    where = str(path)
    known_keys(document, FILE_KEYS, where)
    base = None
    if "base" in document:
        base = _preset(of_type(document, "base", str, where), f'{where}: base = "{document["base"]}"')
    activations = base.activations if base else "float32"
    if "activations" in document:
        activations = cast(Activations, of_type(document, "activations", str, where))
    level = of_type(document, "accuracy_level", int, where) if "accuracy_level" in document else 4
    tables = of_type(document, "rule", list, where) if "rule" in document else []
    if not tables and base is None:
        raise QuantError(
            f"{where} has neither a [[rule]] nor a base, so it would quantize nothing; use precision fp32"
        )
    rules = tuple(
        rule_from_toml(table, activations, f"{where}: rule {n}") for n, table in enumerate(tables, 1)
    )
    if base and activations == "float16":
        base = base if all(rule.format is None for rule in base.rules) else base.with_(activations="float16")
    balance = base.balance if base else any(rule.format is not None for rule in rules)
    recipe = Recipe(
        name=of_type(document, "name", str, where) if "name" in document else path.stem,
        activations=activations,
        accuracy_level=base.accuracy_level if base and "accuracy_level" not in document else level,
        rules=rules + (base.rules if base else ()),
        balance=of_type(document, "balance", bool, where) if "balance" in document else balance,
        prefill=cast(Prefill, of_type(document, "prefill", str, where)) if "prefill" in document else "none",
    )
    if "accuracy_level" in document:
        check_level(recipe)
    return recipe


def resolve(name_or_path: str | Path) -> Recipe:
    """The preset of this name, or the recipe in this file.

    Raises:
        QuantError: neither a preset nor a readable recipe.
    """
    if isinstance(name_or_path, str) and name_or_path in PRESETS:
        return PRESETS[name_or_path]
    if str(name_or_path).endswith(".toml") or Path(name_or_path).is_file():
        return read_recipe(name_or_path)
    return _preset(str(name_or_path), f"recipe {str(name_or_path)!r}")


def _preset(name: str, where: str) -> Recipe:
    if name not in PRESETS:
        raise QuantError(f"{where} is unknown, must be one of {', '.join(PRESETS)}, or a .toml file")
    return PRESETS[name]
