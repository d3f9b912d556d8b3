"""Recipes: which checkpoint tensor gets which number format.

In: rules; files of them are read by `recipe_reading.py`. Out: a `Recipe`, asked tensor by tensor, and the
presets. Knows the tensor names of the AutoGLM-Phone family and nothing of shapes, files or graphs.

A recipe is an ordered list of rules; the first rule whose pattern matches a tensor's name decides, and a
tensor that no rule matches stays float. Some tensors stay float whatever the rules say (`ALWAYS_FLOAT`): they
are small, and their errors would touch every token. Floats are stored in the dtype of the activations.

A rule may be limited to some layers of a stack, relative to its depth ("outer:1/8"), so that one recipe
serves checkpoints of every depth; `Recipe.for_layers` turns that into layer numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

from autoglm_edge.errors import QuantError

from .channels import ChannelFormat, WeightFormat
from .formats import BlockFormat
from .rule import Refinement
from .rule import Rule as Rule
from .rule_reading import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_SYMMETRIC,
    exact_keys,
    of_type,
    rule_from_json,
)

Activations = Literal["float32", "float16"]

Prefill = Literal["none", "int8"]
"""Whether a bundle gets a second form of the decoder's layers, to fill the cache with: "int8", or "none"."""

PREFILLS: tuple[Prefill, ...] = get_args(Prefill)

ALWAYS_FLOAT = ("*.bias", "*norm*", "model.visual.patch_embed.*", "model.visual.embeddings.*")
"""Name patterns of tensors that no rule reaches: biases, norms, patch embedding, table of positions."""

FLOAT_PRESETS = {"float32": "fp32", "float16": "fp16"}
"""Preset that keeps everything float, by its activations."""


@dataclass(frozen=True)
class Recipe:
    """A named list of rules, and what is the same for the whole model.

    Attributes:
        name: of the preset, or of the file it was read from.
        activations: dtype of hidden states, float weights and scales: "float32" or "float16".
        accuracy_level: of MatMulNBits. 4: activations become 8-bit integers per block, the fast kernel of
            CPUs; 0: computed in the dtype of the activations; 1, 2, 3: in float32, float16, bfloat16.
        rules: the first that matches decides.
        balance: whether channels that are large in activations and small in weights, or the other way round,
            are evened out before anything is quantized. It does not change what the model computes.
        prefill: "int8" for a second form of the decoder's layers, 8 bits per channel, that reads prompts.
    """

    name: str
    activations: Activations
    accuracy_level: int
    rules: tuple[Rule, ...]
    balance: bool = False
    prefill: Prefill = "none"

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise QuantError("a recipe has an empty name; give it one, or leave the name out of its file")
        if self.activations not in ("float32", "float16"):
            raise QuantError(
                f"recipe {self.name}: activations is {self.activations!r}, must be float32 or float16"
            )
        if isinstance(self.accuracy_level, bool) or self.accuracy_level not in range(5):
            raise QuantError(f"recipe {self.name}: accuracy_level is {self.accuracy_level!r}, must be 0 to 4")
        if not isinstance(self.balance, bool):
            raise QuantError(f"recipe {self.name}: balance is {self.balance!r}, must be true or false")
        if self.prefill not in PREFILLS:
            raise QuantError(f"recipe {self.name}: prefill is {self.prefill!r}, must be none or int8")
        if all(rule.format is None for rule in self.rules):
            _refuse_for_floats(
                self, balance=self.balance or None, prefill=None if self.prefill == "none" else self.prefill
            )
        if self.activations != "float32":
            _refuse_integers(self)

    @property
    def multiplies_blocks(self) -> bool:
        """Whether a rule stores a matrix of a product in blocks; the embedding's table is looked up."""
        return any(isinstance(rule.format, BlockFormat) and rule.pattern != _EMBEDDING for rule in self.rules)

    def format_for(self, name: str) -> WeightFormat | None:
        """The format of a checkpoint tensor, or None if it stays float.

        Raises:
            QuantError: a rule speaks of layers relative to a depth that is not known; see `for_layers`.
        """
        rule = self.rule_for(name)
        return None if rule is None else rule.format

    def refinement_for(self, name: str) -> Refinement:
        """How the integers of a checkpoint tensor are chosen; "none" if it stays float.

        Raises:
            QuantError: as `format_for`.
        """
        rule = self.rule_for(name)
        return "none" if rule is None else rule.refine

    def rule_for(self, name: str) -> Rule | None:
        """The rule that decides about a checkpoint tensor; None if none does and it stays float.

        Raises:
            QuantError: a rule speaks of layers relative to a depth that is not known; see `for_layers`.
        """
        if _always_float(name):
            return None
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def for_layers(self, *, decoder: int, vision: int) -> Recipe:
        """The same recipe with layer numbers in place of "first:1/8" and the like.

        Args:
            decoder: layers of the decoder.
            vision: blocks of the vision tower.
        """
        return replace(
            self, rules=tuple(rule.for_layers(decoder=decoder, vision=vision) for rule in self.rules)
        )

    def with_(
        self,
        *,
        block_size: int | None = None,
        symmetric: bool | None = None,
        activations: Activations | None = None,
        accuracy_level: int | None = None,
        refine: Refinement | None = None,
        prefill: Prefill | None = None,
    ) -> Recipe:
        """A changed copy; None keeps what there is.

        `block_size`, `symmetric` and `refine` change the rules with the fewest bits only: the 4-bit ones of
        int4, int4-mixed and int4-all, hence not the 8-bit head, embedding and vision; and all of int8-blocks.

        Matrix units take float32 activations only, so with float16 a preset that has a few matrices in that
        form, as int4 has in vision, stores them in blocks of 128; int8 itself, and a recipe of your own, are
        refused.

        Raises:
            QuantError: a change that means nothing to the recipe, or contradicts it, or a value that is not
                allowed.
        """
        rules = self.rules
        if activations == "float16" and self.name != "int8" and self == PRESETS.get(self.name):
            rules = tuple(_in_blocks(rule) for rule in rules)
        formats = [rule.format for rule in rules if rule.format is not None]
        if formats:
            bits = min(form.bits for form in formats)
            _refuse_for_channels(self, bits, block_size=block_size, symmetric=symmetric)
            if accuracy_level is not None:
                check_level(self)
            rules = tuple(_changed(rule, bits, block_size, symmetric, refine) for rule in rules)
        else:
            _refuse_for_floats(
                self,
                block_size=block_size,
                symmetric=symmetric,
                accuracy_level=accuracy_level,
                refine=refine,
                prefill=None if prefill == "none" else prefill,
            )
            if activations in FLOAT_PRESETS and activations != self.activations:
                raise QuantError(
                    f"recipe {self.name} stores every tensor as {self.activations}, which contradicts "
                    f"activations {activations}; take the recipe {FLOAT_PRESETS[activations]}"
                )
        return replace(
            self,
            rules=rules,
            activations=self.activations if activations is None else activations,
            accuracy_level=self.accuracy_level if accuracy_level is None else accuracy_level,
            prefill=self.prefill if prefill is None else prefill,
        )

    def for_prefill(self) -> Recipe:
        """How the second form of the decoder stores things: per channel what is in blocks, the rest alike."""
        rules = (
            replace(rule, format=ChannelFormat(), refine="none")
            if isinstance(rule.format, BlockFormat)
            else rule
            for rule in self.rules
        )
        return replace(self, rules=tuple(rules), prefill="none")

    def check_names(self, names: Collection[str]) -> None:
        """Refuse a rule that decides nothing about a checkpoint, most likely for a slip in its pattern.

        Args:
            names: of all tensors of the checkpoint.

        Raises:
            QuantError: a rule matches no tensor, or asks for integers where everything stays float.
        """
        for rule in self.rules:
            where = f"recipe {self.name}: the rule for {rule.pattern}" + (
                f" in layers {rule.layers}" if rule.layers else ""
            )
            matched = [name for name in names if rule.matches(name)]
            if not matched:
                raise QuantError(
                    f"{where} matches no tensor of this checkpoint; docs/quantization.md lists the names"
                )
            if rule.format is not None and all(_always_float(name) for name in matched):
                raise QuantError(
                    f"{where} matches only tensors that always stay float, such as {matched[0]}; remove it"
                )
        if isinstance(self.format_for(_EMBEDDING), ChannelFormat):
            raise QuantError(
                f"recipe {self.name} stores {_EMBEDDING} with a scale per channel, but it is looked up row "
                "by row and multiplied with nothing; give it blocks, or keep it float"
            )
        layers = [name for name in names if fnmatchcase(name, _DECODER)]
        if self.prefill != "none" and not any(isinstance(self.format_for(n), BlockFormat) for n in layers):
            raise QuantError(
                f"recipe {self.name} stores no matrix of the decoder's layers in blocks, so prefill = "
                f'"{self.prefill}" would change nothing; leave it out'
            )

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values, as a manifest records it."""
        return {
            "name": self.name,
            "activations": self.activations,
            "accuracy_level": self.accuracy_level,
            "balance": self.balance,
            "prefill": self.prefill,
            "rules": [rule.to_json() for rule in self.rules],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Recipe:
        """The reverse of `to_json`.

        Raises:
            QuantError: a key too many or missing, or a value of a wrong type or out of range.
        """
        where = "recipe"
        document = {"balance": False, "prefill": "none", **document}  # absent where they mean nothing
        keys = ("name", "activations", "accuracy_level", "balance", "prefill", "rules")
        exact_keys(document, keys, where)
        rules = of_type(document, "rules", list, where)
        return cls(
            name=of_type(document, "name", str, where),
            activations=cast(Activations, of_type(document, "activations", str, where)),
            accuracy_level=of_type(document, "accuracy_level", int, where),
            rules=tuple(
                rule_from_json(rule, f"recipe rule {number}") for number, rule in enumerate(rules, 1)
            ),
            balance=of_type(document, "balance", bool, where),
            prefill=cast(Prefill, of_type(document, "prefill", str, where)),
        )


def _always_float(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in ALWAYS_FLOAT)


def _refuse_for_floats(recipe: Recipe, **changes: object) -> None:
    """Refuse what only says how integers are stored or computed with."""
    if useless := [key for key, value in changes.items() if value is not None]:
        raise QuantError(
            f"recipe {recipe.name} keeps every tensor float, so {useless[0]} means nothing; leave it out or "
            "take an int8 or int4 recipe"
        )


def _refuse_integers(recipe: Recipe) -> None:
    """Refuse activations that matrix units do not take."""
    if recipe.prefill != "none":
        raise QuantError(
            f'recipe {recipe.name}: prefill = "{recipe.prefill}" needs float32 activations, they are '
            f"{recipe.activations}; leave one of the two out"
        )
    for rule in recipe.rules:
        if isinstance(rule.format, ChannelFormat):
            raise QuantError(
                f"recipe {recipe.name} stores {rule.pattern} with a scale per channel, which needs float32 "
                f"activations, they are {recipe.activations}; take blocks, as in the preset int8-blocks"
            )


def _refuse_for_channels(recipe: Recipe, bits: int, **changes: object) -> None:
    """Refuse what only says how blocks are stored, where the rules to be changed have none."""
    useless = [key for key, value in changes.items() if value is not None]
    per_channel = [
        rule for rule in recipe.rules if isinstance(rule.format, ChannelFormat) and rule.format.bits == bits
    ]
    if useless and per_channel:
        raise QuantError(
            f"recipe {recipe.name} stores {per_channel[0].pattern} with a scale per channel, so {useless[0]} "
            "means nothing; leave it out, or take int8-blocks"
        )


def check_level(recipe: Recipe) -> None:
    """Refuse an accuracy level that no product reads; the embedding is looked up."""
    if all(rule.format is None for rule in recipe.rules):
        _refuse_for_floats(recipe, accuracy_level=recipe.accuracy_level)
    if not recipe.multiplies_blocks:
        raise QuantError(
            f"recipe {recipe.name} multiplies no matrix in blocks, so accuracy_level means nothing; leave it "
            "out, or take int8-blocks"
        )


def _in_blocks(rule: Rule) -> Rule:
    """The rule with blocks in place of channels, as the preset int8-blocks has them."""
    return replace(rule, format=INT8) if isinstance(rule.format, ChannelFormat) else rule


def _changed(
    rule: Rule, bits: int, block_size: int | None, symmetric: bool | None, refine: Refinement | None
) -> Rule:
    form = rule.format
    if form is None or form.bits != bits:
        return rule
    if isinstance(form, ChannelFormat):
        return rule if refine is None else replace(rule, refine=refine)
    return replace(
        rule,
        format=BlockFormat(
            bits,
            form.block_size if block_size is None else block_size,
            form.symmetric if symmetric is None else symmetric,
        ),
        refine=rule.refine if refine is None else refine,
    )


INT2 = BlockFormat(bits=2, block_size=DEFAULT_BLOCK_SIZE[2], symmetric=DEFAULT_SYMMETRIC[2])
INT3 = BlockFormat(bits=3, block_size=DEFAULT_BLOCK_SIZE[3], symmetric=DEFAULT_SYMMETRIC[3])
INT4 = BlockFormat(bits=4, block_size=DEFAULT_BLOCK_SIZE[4], symmetric=DEFAULT_SYMMETRIC[4])
INT8 = BlockFormat(bits=8, block_size=DEFAULT_BLOCK_SIZE[8], symmetric=DEFAULT_SYMMETRIC[8])
CHANNELS = ChannelFormat()

_DECODER = "model.language_model.layers.*"
_EMBEDDING = "model.language_model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_VISION = "model.visual.*"


def _everything(
    layers: WeightFormat, head: WeightFormat, table: BlockFormat, vision: WeightFormat
) -> tuple[Rule, ...]:
    """Rules for the decoder's layers, head, embedding and vision."""
    return (Rule(_DECODER, layers), Rule(_HEAD, head), Rule(_EMBEDDING, table), Rule(_VISION, vision))


# The mixed recipes of llama.cpp and onnxruntime-genai both give more bits to the values and the way down, in
# the first and last eighth of the layers (and, unlike this one, in every third layer between).
_SENSITIVE = (
    Rule(f"{_DECODER}.self_attn.v_proj.weight", INT8, "outer:1/8"),
    Rule(f"{_DECODER}.mlp.down_proj.weight", INT8, "outer:1/8"),
)

PRESETS: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("fp32", "float32", 0, ()),
            Recipe("fp16", "float16", 0, ()),
            Recipe("int8", "float32", 4, _everything(CHANNELS, CHANNELS, INT8, CHANNELS), balance=True),
            Recipe("int8-blocks", "float32", 4, _everything(INT8, INT8, INT8, INT8), balance=True),
            Recipe("int4", "float32", 4, _everything(INT4, INT8, INT8, CHANNELS), balance=True),
            Recipe(
                "int4-mixed",
                "float32",
                4,
                _SENSITIVE + _everything(INT4, INT8, INT8, CHANNELS),
                balance=True,
            ),
            Recipe("int4-all", "float32", 4, _everything(INT4, INT4, INT4, INT4), balance=True),
            Recipe("int3", "float32", 4, _everything(INT3, INT8, INT8, CHANNELS), balance=True),
            Recipe("int2", "float32", 4, _everything(INT2, INT8, INT8, CHANNELS), balance=True),
        )
    }
)
"""The recipes that have a name. Figures about them are in docs/quantization.md.

int3 and int2 are controls, to see a parity measurement fail: as large as int4, and worse."""
