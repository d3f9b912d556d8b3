"""Writes a recipe as the TOML file that `quantize.recipe.read_recipe` reads.

In: a recipe, and remarks for people. Out: a file, explicit in every key, so that it means the same under any
default. Knows nothing of checkpoints and measurements.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from autoglm_edge.errors import QuantError
from autoglm_edge.files import replace_file
from autoglm_edge.quantize.channels import ChannelFormat
from autoglm_edge.quantize.recipe import Recipe
from autoglm_edge.quantize.rule import Rule


def write_recipe(path: str | Path, recipe: Recipe, remarks: Iterable[str] = ()) -> None:
    """Write a recipe; a file of that name is replaced, in one step.

    Args:
        path: *.toml.
        recipe: to write; `read_recipe` gives an equal one.
        remarks: lines of the comment at the top.

    Raises:
        QuantError: the recipe has no rule, which a file must have, or the file cannot be written.
    """
    target = Path(path)
    if not recipe.rules:
        raise QuantError(
            f"recipe {recipe.name} has no rules, so it needs no file; take the precision fp32 or fp16"
        )
    lines = [f"# {_printable(line)}".rstrip() for remark in remarks for line in (remark.splitlines() or [""])]
    lines += [
        f"name = {_text(recipe.name)}",
        f"activations = {_text(recipe.activations)}",
    ]
    if any(rule.format is not None for rule in recipe.rules):
        if recipe.multiplies_blocks:
            lines.append(f"accuracy_level = {recipe.accuracy_level}")
        lines.append(f"balance = {str(recipe.balance).lower()}")
        lines.append(f"prefill = {_text(recipe.prefill)}")
    for rule in recipe.rules:
        lines += ["", "[[rule]]", *_rule_lines(rule)]
    try:
        replace_file(target, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise QuantError(f"the recipe {target} cannot be written: {error.strerror or error}") from error


def _rule_lines(rule: Rule) -> list[str]:
    lines = [f"pattern = {_text(rule.pattern)}"]
    if rule.layers is not None:
        lines.append(f"layers = {_text(rule.layers)}")
    if rule.format is None:
        return [*lines, "keep = true"]
    lines.append(f"bits = {rule.format.bits}")
    if isinstance(rule.format, ChannelFormat):
        lines += ['per = "channel"', f"groups = {rule.format.groups}"]
    else:
        symmetric = "true" if rule.format.symmetric else "false"
        lines += [f"block_size = {rule.format.block_size}", f"symmetric = {symmetric}"]
    if rule.refine != "none":
        lines.append(f"refine = {_text(rule.refine)}")
    return lines


def _text(value: str) -> str:
    """A TOML basic string: JSON's, and 0x7f escaped, too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _printable(line: str) -> str:
    """Without control characters, which a TOML comment may not hold."""
    return "".join(letter if letter.isprintable() else " " for letter in line)
