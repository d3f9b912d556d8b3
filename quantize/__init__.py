"""Number formats of weights, how their integers are chosen, and recipes that say which tensor gets which."""

from .channels import (
    ChannelFormat,
    QuantizedChannels,
    WeightFormat,
    dequantize_channels,
    quantize_channels,
)
from .formats import BlockFormat, Quantized, dequantize_rows
from .gptq import GptqFactor, factor, gptq_rows
from .recipe import PRESETS, Recipe, Rule
from .recipe_reading import read_recipe, resolve
from .refine import search_rows
from .rounding import quantize_rows
from .rule import Refinement

__all__ = [
    "PRESETS",
    "BlockFormat",
    "ChannelFormat",
    "GptqFactor",
    "Quantized",
    "QuantizedChannels",
    "Recipe",
    "Refinement",
    "Rule",
    "WeightFormat",
    "dequantize_channels",
    "dequantize_rows",
    "factor",
    "gptq_rows",
    "quantize_channels",
    "quantize_rows",
    "read_recipe",
    "resolve",
    "search_rows",
]
