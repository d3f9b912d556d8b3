"""Number formats of weights, and recipes that say which tensor gets which."""

from .formats import BlockFormat, Quantized, dequantize_rows, quantize_rows
from .recipe import PRESETS, Recipe, Rule, read_recipe, resolve

__all__ = [
    "PRESETS",
    "BlockFormat",
    "Quantized",
    "Recipe",
    "Rule",
    "dequantize_rows",
    "quantize_rows",
    "read_recipe",
    "resolve",
]
