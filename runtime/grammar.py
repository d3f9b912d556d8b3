"""Answers held to JSON: a schema in, for each token of an answer the ids that may come next out.

In: JSON Schemas, a tokenizer, the ids that end an answer. Out: `Grammar`s, which any number of answers share,
and a `Matcher` for each answer. Knows nothing of logits, prompts and HTTP. llguidance does the work (an
Earley parser over a trie of all tokens); it is loaded when the first grammar is asked for.

A schema may come from a stranger, so its size is bounded before it is compiled, and the library counts its
own steps, states and rows and gives up where they run out: while compiling, or in the middle of an answer.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import DependencyError, RequestError

from .prompt.build import ALLOWED_TAGS
from .prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Bool = NDArray[np.bool_]

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of any JSON object."""
MAX_BYTES = 64_000
"""Of a schema as compact JSON; a schema of 95 kB took 6 s to compile."""
MAX_DEPTH = 64
"""Lists and objects within each other in a schema."""
MAX_TEXT = 8_000
"""Characters of one string in a schema; a constant of 60,000 took 2.5 s for one token, one of 8,000 6 ms."""
MAX_NAMES = 1_000
"""Members of one object in a schema; their number counts squared while compiling."""

_KEPT, _KEPT_BYTES = 16, 256_000
"""Grammars, and bytes of their schemas; a schema of 48 kB takes 6 MB compiled."""
_OPEN, _CLOSE = "<think>", "</think>"
_SPACE = r"[ ]{1,3}|\n[ ]{0,32}"
"""Between the parts of a document: some spaces, or a line break with its indentation. JSON allows any amount,
in which a weak model can lose itself until its tokens are used up."""
_LIMITS = {
    "max_items_in_row": 5_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,  # of up to 2 kB, for each answer under way
    "max_grammar_size": 100_000,
}
_SHOWN = 200
_STUCK = "NoExtension"
"""What llguidance says where no byte can come next."""


class Grammar:
    """A compiled schema. Never changes; answers in any thread may share it.

    Attributes:
        source: the schema as compact JSON.
        after_thought: whether a thought may stand before the JSON.
        vocab: ids that the tokenizer knows.
    """

    def __init__(
        self, source: str, compiled: LLMatcher, vocabulary: _Vocabulary, *, after_thought: bool
    ) -> None:
        """Made by `Grammars`."""
        self.source = source
        self.after_thought = after_thought
        self.vocab = vocabulary.size
        self._compiled = compiled
        self._vocabulary = vocabulary

    def begin(self, prompt_ids: NDArray[np.integer[Any]] | None = None) -> Matcher:
        """Start an answer.

        Args:
            prompt_ids: (T,) ids before it; one that ends with `<think>` has begun the thought already.
        """
        thinking: bool | None = None if self.after_thought else False
        if thinking is None and prompt_ids is not None and self._vocabulary.opened(prompt_ids):
            thinking = True
        return Matcher(self._compiled.deep_copy(), self._vocabulary, thinking=thinking)


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, parser: LLMatcher, vocabulary: _Vocabulary, *, thinking: bool | None) -> None:
        """Made by `Grammar.begin`.

        Args:
            parser: at the beginning; nobody else's.
            vocabulary: of the grammar.
            thinking: whether the answer is within a thought; None if it may begin with one.
        """
        self._parser = parser
        self._vocabulary = vocabulary
        self._thinking = thinking
        self._tail = b""
        self._tokens = 0
        self._bits: bytes | None = None  # of the next token, once somebody asked

    def takes(self, token: int) -> bool:
        """Whether that id may come next: what `allowed` says of it, without unpacking the whole.

        Raises:
            RequestError: as for `allowed`.
        """
        if self._thinking is True or (self._thinking is None and token == self._vocabulary.open):
            return True
        return bool(self._next_bits()[token >> 3] >> (token & 7) & 1)

    def allowed(self) -> Bool | None:
        """Ids that may come next, (vocab,); None within a thought, where all may.

        Raises:
            RequestError: none, or the library gave up.
        """
        if self._thinking is True:
            return None
        mask = mask_of(self._next_bits(), self._vocabulary.size)
        if self._thinking is None and self._vocabulary.open is not None:
            mask[self._vocabulary.open] = True
        return mask

    def push(self, token: int) -> int:
        """The id that was picked among those allowed.

        Returns:
            The next id of the answer: that one, but for a thought that would end the answer, or go on in the
            middle of a token. There the end of the thought takes its place.

        Raises:
            RequestError: it was not allowed, or the library gave up.
        """
        self._tokens += 1
        self._bits = None
        if self._thinking is None:
            self._thinking = token == self._vocabulary.open
            if self._thinking:
                return token
        if self._thinking:
            return self._think(token)
        if token not in self._vocabulary.eos:
            self._parser.consume_token(token)
            self._check()
        return token

    def _think(self, token: int) -> int:
        close = self._vocabulary.close
        assert close is not None
        if token in self._vocabulary.eos:
            self._thinking = False
            return close
        text = self._tail + self._vocabulary.tokenizer.bytes_of(token)
        before, tag, rest = text.partition(_CLOSE.encode())
        if tag:
            self._thinking = False
            return close if rest.strip() else token
        self._tail = before[1 - len(_CLOSE) :]
        return token

    def _next_bits(self) -> bytes:
        """One bit per id, lowest first. Where only one text can come, only its own tokens may spell it."""
        if self._bits is None:
            self._bits = self._parser.compute_bitmask()
            self._check(stuck=not self._bits.strip(b"\0"))
        return self._bits

    def _check(self, *, stuck: bool = False) -> None:
        error = self._parser.get_error()
        if (stuck and not error) or error.startswith(_STUCK):
            error = "nothing can follow"
        if error:
            raise RequestError(
                f"the answer could not be held to its JSON schema after token {self._tokens} "
                f"({sentence_of(error)}); simplify the schema"
            )


class Grammars:
    """Compiles schemas for one tokenizer, and keeps the latest. For any thread."""

    def __init__(self, tokenizer: Tokenizer, eos: Collection[int]) -> None:
        """Prepare; nothing is loaded before the first grammar.

        Args:
            tokenizer: of the model.
            eos: ids that end an answer.
        """
        self._tokenizer = tokenizer
        self._eos = tuple(eos)
        self._vocabulary: _Vocabulary | None = None
        self._kept: OrderedDict[tuple[str, bool], Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, schema: object, *, after_thought: bool = False) -> Grammar:
        """The grammar of a schema, from the latest ones if it is there.

        Args:
            schema: a JSON Schema: an object, or True for any JSON.
            after_thought: let the answer begin with `<think>`; the JSON comes after `</think>` then.

        Raises:
            RequestError: it is no schema, too large, cannot be held to, or allows nothing; or the tokenizer
                has no tokens for a thought.
            DependencyError: llguidance is not installed.
        """
        source = read_schema(schema)
        key = (source, after_thought)
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
            vocabulary = self._vocabulary = self._vocabulary or _Vocabulary(self._tokenizer, self._eos)
        if after_thought and (vocabulary.open is None or vocabulary.close is None):
            raise RequestError(
                f"enable_thinking cannot go with a grammar, because this model has no tokens {_OPEN} and "
                f"{_CLOSE}; leave it out"
            )
        made = Grammar(source, _compile(source, vocabulary), vocabulary, after_thought=after_thought)
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > _KEPT or sum(len(source) for source, _ in self._kept) > _KEPT_BYTES:
                self._kept.popitem(last=False)
        return made


class _Vocabulary:
    """The tokens as llguidance wants them: their bytes, and which of them are no text.

    Special tokens, end tokens and the tags of thinking and answer never stand within JSON: they would vanish
    from the text, or end it.
    """

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        library = _library()
        self.tokenizer = tokenizer
        self.size = tokenizer.vocab_size
        self.eos = frozenset(eos)
        self.open = tokenizer.id_of(_OPEN)
        self.close = tokenizer.id_of(_CLOSE)
        words = library.TokenizerWrapper(_Words(tokenizer, eos))
        self.backend: LLTokenizer = library.LLTokenizer(words, n_vocab=self.size, eos_token=list(eos))
        words.tokens = ()

    def opened(self, prompt_ids: NDArray[np.integer[Any]]) -> bool:
        """Whether a prompt ends with `<think>`, but for white space."""
        for token in reversed(prompt_ids[-4:].tolist()):
            if token == self.open:
                return True
            if self.tokenizer.bytes_of(token).strip():
                return False
        return False


class _Words:
    """What `llguidance.TokenizerWrapper` reads."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        tags = [token for tag in ALLOWED_TAGS if (token := tokenizer.id_of(tag)) is not None]
        self.eos_token_id = eos[0]
        self.tokens = [tokenizer.bytes_of(token) for token in range(tokenizer.vocab_size)]
        self._special = frozenset({*tokenizer.special_ids, *eos, *tags})
        self.special_token_ids = sorted(self._special)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Ids of a text; the library tries with bytes first, and takes an error as a no."""
        if not isinstance(text, str):
            raise TypeError("text must be a string")
        ids = self._tokenizer.encode(text)
        # A special token that is written out is text here, and spelled letter by letter.
        return [piece for token in ids for piece in self._spelled(token)]

    def _spelled(self, token: int) -> Sequence[int]:
        if token not in self._special:
            return (token,)
        letters = self.tokens[token].decode("utf-8")
        return [piece for letter in letters for piece in self._tokenizer.encode(letter)]


def read_schema(schema: object) -> str:
    """A schema as compact JSON, its parts in their order.

    Raises:
        RequestError: it is no JSON object or boolean, or larger than what is taken from a stranger.
    """
    if not isinstance(schema, (Mapping, bool)):
        raise RequestError(f"a JSON schema is {_kind_of(schema)}, must be an object, or true for any JSON")
    if schema is False:
        raise _refused("no JSON at all fits it")
    schema = {} if schema is True else schema
    _check_sizes(schema)
    try:
        source = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(source.encode())
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise RequestError(f"a JSON schema holds what is no JSON ({sentence_of(str(error))})") from error
    if size > MAX_BYTES:
        raise RequestError(f"a JSON schema has {size} bytes, at most {MAX_BYTES} are taken; shorten it")
    if "x-guidance" in schema:
        raise RequestError("a JSON schema has the key 'x-guidance', which is not taken here; remove it")
    return source


def mask_of(bits: bytes, size: int) -> Bool:
    """One value per id, (size,), from one bit per id, lowest first."""
    values = np.unpackbits(np.frombuffer(bits, np.uint8), count=size, bitorder="little")
    return values.view(np.bool_)


def sentence_of(message: str) -> str:
    """What a library says, in one line: of several the one that gives the reason."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    text = (reason or (lines[0] if lines else "no reason given")).rstrip(".")
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _compile(source: str, vocabulary: _Vocabulary) -> LLMatcher:
    """A parser at its beginning; another one like it was asked for a first token."""
    library = _library()
    try:
        text = library.LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_pattern": _SPACE})
    except ValueError as error:
        raise _refused(str(error)) from error
    limits = library.LLParserLimits(verbose_errors=False, **_LIMITS)
    parser: LLMatcher = library.LLMatcher(vocabulary.backend, text, log_level=0, limits=limits)
    if parser.is_error():
        raise _refused(parser.get_error())
    trial = parser.deep_copy()
    mask = mask_of(trial.compute_bitmask(), vocabulary.size)
    said = trial.get_error()
    if said.startswith(_STUCK) or not (said or mask.any()):
        raise _refused("no JSON at all fits it")
    if said:
        raise _refused(said)
    return parser


def _refused(reason: str) -> RequestError:
    return RequestError(
        f"an answer cannot be held to this JSON schema: {sentence_of(reason)}; leave that out, or ask for "
        "any JSON object"
    )


def _check_sizes(schema: object) -> None:
    """Raises RequestError if anything in a schema is too deep, too long or too many."""
    left: list[tuple[object, int]] = [(schema, 1)]
    while left:
        value, depth = left.pop()
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise RequestError(
                f"a JSON schema has a string of {len(value)} characters, at most {MAX_TEXT} are taken"
            )
        if not isinstance(value, (Mapping, list, tuple)):
            continue
        if depth > MAX_DEPTH:
            raise RequestError(
                f"a JSON schema is more than {MAX_DEPTH} levels deep; give the parts names in $defs"
            )
        if isinstance(value, Mapping) and len(value) > MAX_NAMES:
            raise RequestError(
                f"a JSON schema has an object with {len(value)} members, at most {MAX_NAMES} are taken"
            )
        parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else list(value)
        left += [(part, depth + 1) for part in parts]


def _kind_of(value: object) -> str:
    return "nothing" if value is None else f"of type {type(value).__name__}"


def _library() -> Any:
    """Llguidance.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise DependencyError(
            "holding answers to JSON needs llguidance, which is not installed; "
            "pip install 'autoglm-edge[grammar]'"
        ) from error
    return llguidance
