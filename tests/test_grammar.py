"""Answers held to JSON: every one that ends is valid, whatever the model would rather say."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_edge.embedded import pocket_path
from autoglm_edge.errors import DependencyError, RequestError
from autoglm_edge.runtime import grammar as module
from autoglm_edge.runtime.grammar import ANY_OBJECT, Grammar, Grammars, read_schema, sentence_of
from autoglm_edge.runtime.prompt.tokenizer import Tokenizer
from autoglm_edge.runtime.sampling import Sampler, SamplingParams

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

POINT = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": 999},
    "minItems": 2,
    "maxItems": 2,
}
TAP = {
    "type": "object",
    "properties": {"action": {"const": "Tap"}, "element": POINT},
    "required": ["action", "element"],
    "additionalProperties": False,
}
TYPE = {
    "type": "object",
    "properties": {"action": {"const": "Type"}, "text": {"type": "string", "maxLength": 20}},
    "required": ["action", "text"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "any object": ANY_OBJECT,
    "any json": True,
    "no words": {},
    "an action": {"anyOf": [TAP, TYPE]},
    "one of two": {"oneOf": [TAP, TYPE]},
    "named parts": {
        "$defs": {"p": POINT},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/p"}},
        "required": ["a"],
    },
    "recursion": {
        "$defs": {
            "n": {
                "type": "object",
                "properties": {"n": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
                "required": ["n"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/n",
    },
    "enum": {"enum": ["打开", 'a"b', 3, None, [1, {"a": False}]]},
    "const": {"const": {"a": [1, "x"]}},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "lengths": {"type": "string", "minLength": 2, "maxLength": 4},
    "date": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "bounds": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "string"}, {"type": "boolean"}],
        "items": False,
        "minItems": 2,
    },
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    "patterned": {
        "type": "object",
        "patternProperties": {"^x": {"type": "null"}},
        "additionalProperties": False,
    },
    "several types": {"type": ["string", "null", "boolean"]},
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "integer"}, "c": TAP},
    },
    "odd names": {
        "type": "object",
        "properties": {"": {"type": "null"}, 'a"\\b': {"type": "null"}, "名": {"type": "null"}},
        "required": ["", 'a"\\b', "名"],
        "additionalProperties": False,
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "string"}}, "required": ["b"]},
        ]
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(pocket_path())


@pytest.fixture(scope="module")
def eos(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(token for name in ("</answer>", "<|user|>") if (token := tokenizer.id_of(name)) is not None)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer, eos: tuple[int, ...]) -> Grammars:
    return Grammars(tokenizer, eos)


class Babbler:
    """Scores at random, and ever more for what ends strings, lists, objects and answers."""

    def __init__(self, tokenizer: Tokenizer, eos: tuple[int, ...], seed: int) -> None:
        self._random = np.random.default_rng(seed)
        ends = [token for token in range(tokenizer.vocab_size) if tokenizer.bytes_of(token)[:1] in b'"]}']
        self._ends = np.array([*ends, *eos])
        self._vocab = tokenizer.vocab_size
        self._count = 0

    def scores(self) -> np.ndarray:
        row = self._random.standard_normal(self._vocab).astype(np.float32) * 3
        row[self._ends] += 0.2 * self._count
        self._count += 1
        return row


def babble(tokenizer: Tokenizer, eos: tuple[int, ...], params: SamplingParams, most: int = 300) -> list[int]:
    """Ids of an answer, with its end token if it came to that."""
    sampler = Sampler(params, vocab=tokenizer.vocab_size)
    babbler = Babbler(tokenizer, eos, params.seed or 0)
    ids: list[int] = []
    while len(ids) < most and not (ids and ids[-1] in eos):
        ids.append(sampler.sample(babbler.scores()))
    return ids


def strict(text: str) -> Any:
    """A document by the letter of RFC 8259."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


# --- what comes out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_a_model_babbles_is_json_of_the_schema(
    tokenizer: Tokenizer, eos: tuple[int, ...], grammars: Grammars, name: str, temperature: float
) -> None:
    compiled = grammars.compile(SCHEMAS[name])
    check = jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    ended = 0
    for seed in range(4):
        params = SamplingParams(temperature=temperature, top_p=0.9, seed=seed, grammar=compiled)
        ids = babble(tokenizer, eos, params)
        if ids[-1] in eos:
            ended += 1
            check.validate(strict(tokenizer.decode(ids[:-1])))
        assert not set(ids[:-1]) & {*tokenizer.special_ids, *eos}

    assert ended, "no answer came to its end"


_SCALARS = st.one_of(
    st.just({"type": "string"}),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3),
        st.integers(0, 5),
    ),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-999, 999),
        st.integers(0, 999),
    ),
    st.builds(
        lambda values: {"enum": values},
        st.lists(
            st.one_of(st.text(st.characters(codec="utf-8"), max_size=5), st.integers(-9, 9), st.none()),
            min_size=1,
            max_size=4,
        ),
    ),
)


def _deeper(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.text(st.characters(codec="utf-8"), max_size=4)
    return st.one_of(
        st.builds(
            lambda item, most: {"type": "array", "items": item, "maxItems": most}, inner, st.integers(0, 3)
        ),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda parts, more: {
                "type": "object",
                "properties": parts,
                "required": list(parts),
                "additionalProperties": more,
            },
            st.dictionaries(names, inner, max_size=3),
            st.just(False),
        ),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schema=st.recursive(_SCALARS, _deeper, max_leaves=6), seed=st.integers(0, 2**32))
def test_answers_fit_schemas_of_all_shapes(
    tokenizer: Tokenizer, eos: tuple[int, ...], grammars: Grammars, schema: Any, seed: int
) -> None:
    params = SamplingParams(temperature=1, seed=seed, grammar=grammars.compile(schema))
    ids = babble(tokenizer, eos, params)

    if ids[-1] in eos:
        jsonschema.Draft202012Validator(schema).validate(strict(tokenizer.decode(ids[:-1])))
    else:
        assert len(ids) == 300


def test_one_id_is_judged_as_all_of_them_are(tokenizer: Tokenizer, grammars: Grammars) -> None:
    rng = np.random.default_rng(0)
    for name in ("an action", "any object", "recursion"):
        matcher = grammars.compile(SCHEMAS[name], after_thought=name == "recursion").begin()
        for _ in range(8):
            mask = matcher.allowed()
            assert mask is not None
            assert mask.tolist() == [matcher.takes(token) for token in range(tokenizer.vocab_size)]
            token = int(rng.choice(np.flatnonzero(mask & (np.arange(len(mask)) < 6000))))
            matcher.push(token)


def test_a_name_that_must_come_is_spelled_in_the_tokens_it_has_in_prompts(
    tokenizer: Tokenizer, grammars: Grammars
) -> None:
    matcher = grammars.compile(TAP).begin()
    matcher.push(tokenizer.encode('{"')[0])

    mask = matcher.allowed()

    assert mask is not None
    assert [tokenizer.bytes_of(int(token)) for token in np.flatnonzero(mask)] == [b"action"]


def test_a_complete_document_leaves_only_end_tokens_and_an_incomplete_one_none(
    tokenizer: Tokenizer, eos: tuple[int, ...], grammars: Grammars
) -> None:
    matcher = grammars.compile(TAP).begin()
    *ids, last = tokenizer.encode('{"action": "Tap", "element": [12, 900]}')
    for token in ids:
        mask = matcher.allowed()
        assert mask is not None
        assert mask[token]
        assert not mask[list(eos)].any()
        matcher.push(token)
    matcher.push(last)

    mask = matcher.allowed()

    assert mask is not None
    assert np.flatnonzero(mask).tolist() == sorted(eos)


def test_white_space_is_free_but_not_without_end(tokenizer: Tokenizer, grammars: Grammars) -> None:
    def fits(text: str) -> bool:
        matcher = grammars.compile(TAP).begin()
        for token in tokenizer.encode(text):
            if not matcher.takes(token):
                return False
            matcher.push(token)
        return True

    assert fits('{"action":"Tap","element":[1,2]}')
    assert fits('{"action": "Tap", "element": [1, 2]}')
    assert fits('{\n  "action": "Tap",\n  "element": [\n    1,\n    2\n  ]\n}')
    assert not fits('{"action":' + " " * 100)
    assert not fits('{"action":' + "\n" * 100)


# --- sampling


def test_top_p_looks_at_what_the_grammar_leaves(tokenizer: Tokenizer, grammars: Grammars) -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(tokenizer.vocab_size + 64).astype(np.float32)
    compiled = grammars.compile({"enum": [1, 2, 3, 4, 5]})
    allowed = compiled.begin().allowed()
    assert allowed is not None
    ids = np.flatnonzero(allowed)
    weights = np.exp(logits[ids].astype(np.float64))
    order = np.argsort(-weights)
    share = np.cumsum(weights[order]) / weights.sum()
    kept = ids[order[: int(np.searchsorted(share, 0.6)) + 1]]

    params = SamplingParams(temperature=1, top_p=0.6, grammar=compiled)
    found, chances = Sampler(params, vocab=tokenizer.vocab_size).distribution(logits)

    assert found[chances > 0].tolist() == kept.tolist()
    np.testing.assert_allclose(
        chances[: len(kept)], weights[order][: len(kept)] / weights[order][: len(kept)].sum(), rtol=1e-4
    )


def test_top_k_and_min_p_count_what_the_grammar_leaves(tokenizer: Tokenizer, grammars: Grammars) -> None:
    digits = {str(number): tokenizer.encode(str(number))[0] for number in range(1, 6)}
    logits = np.full(tokenizer.vocab_size, 9.0, np.float32)
    for value, token in digits.items():
        logits[token] = float(value)
    compiled = grammars.compile({"enum": [1, 2, 3, 4, 5]})

    def kept(**options: Any) -> list[int]:
        params = SamplingParams(temperature=1, grammar=compiled, **options)
        found, chances = Sampler(params, vocab=tokenizer.vocab_size).distribution(logits)
        return found[chances > 0].tolist()

    assert kept(top_k=2) == [digits["5"], digits["4"]]
    assert kept(min_p=0.2) == [digits["5"], digits["4"]]
    assert kept(top_k=99) == [digits[value] for value in "54321"]


def test_bias_and_penalties_act_among_what_is_allowed(tokenizer: Tokenizer, grammars: Grammars) -> None:
    five = tokenizer.encode("5")[0]
    word = tokenizer.encode("x")[0]
    logits = np.zeros(tokenizer.vocab_size, np.float32)
    compiled = grammars.compile({"type": "integer", "minimum": 1, "maximum": 9})

    params = SamplingParams(logit_bias={five: 3, word: 90}, grammar=compiled)

    assert Sampler(params, vocab=tokenizer.vocab_size).sample(logits) == five


def test_a_free_answer_is_sampled_as_ever_and_a_seed_repeats_a_held_one(
    tokenizer: Tokenizer, eos: tuple[int, ...], grammars: Grammars
) -> None:
    params = SamplingParams(temperature=0.8, seed=5, grammar=grammars.compile(ANY_OBJECT))

    assert babble(tokenizer, eos, params) == babble(tokenizer, eos, params)
    assert babble(tokenizer, eos, replace(params, grammar=None)) != babble(tokenizer, eos, params)


def test_a_model_that_rules_out_all_that_is_allowed_is_told(tokenizer: Tokenizer, grammars: Grammars) -> None:
    logits = np.full(tokenizer.vocab_size, -np.inf, np.float32)
    logits[tokenizer.encode("x")[0]] = 1
    sampler = Sampler(SamplingParams(grammar=grammars.compile(TAP)), vocab=tokenizer.vocab_size)

    with pytest.raises(RequestError, match="rules out all that the grammar allows at answer token 1"):
        sampler.sample(logits)


def test_a_grammar_of_another_tokenizer_and_what_is_none_are_refused(
    tokenizer: Tokenizer, grammars: Grammars
) -> None:
    compiled = grammars.compile(ANY_OBJECT)

    with pytest.raises(RequestError, match=f"tokenizer of {tokenizer.vocab_size} ids, this one has 7"):
        Sampler(SamplingParams(grammar=compiled), vocab=7)
    with pytest.raises(RequestError, match="grammar is of type dict"):
        SamplingParams(grammar={"type": "object"})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="'grammar' is not a sampling parameter"):
        SamplingParams.from_values({"grammar": compiled})


# --- thoughts


def push_all(compiled: Grammar, ids: list[int], prompt: list[int] | None = None) -> list[int]:
    matcher = compiled.begin(None if prompt is None else np.array(prompt))
    return [matcher.push(token) for token in ids]


def test_json_comes_after_the_thought_or_at_once(tokenizer: Tokenizer, grammars: Grammars) -> None:
    begin, end = tokenizer.id_of("<think>"), tokenizer.id_of("</think>")
    assert begin is not None and end is not None
    compiled = grammars.compile(TAP, after_thought=True)
    matcher = compiled.begin()
    json_begins = tokenizer.encode('{"')[0]

    first = matcher.allowed()
    assert first is not None
    assert first[begin] and first[json_begins] and not first[tokenizer.encode("x")[0]]
    for token in [begin, *tokenizer.encode("Why? {]")]:
        assert matcher.push(token) == token
        assert matcher.allowed() is None
        assert matcher.takes(tokenizer.encode("x")[0])
    assert matcher.push(end) == end

    after = matcher.allowed()
    assert after is not None
    assert after[json_begins] and not after[begin] and not after[end]
    without = grammars.compile(TAP).begin().allowed()
    assert without is not None
    assert not without[begin]


def test_a_thought_that_would_end_the_answer_ends_itself(
    tokenizer: Tokenizer, eos: tuple[int, ...], grammars: Grammars
) -> None:
    begin, end = tokenizer.id_of("<think>"), tokenizer.id_of("</think>")
    assert begin is not None and end is not None
    compiled = grammars.compile(TAP, after_thought=True)

    assert push_all(compiled, [begin, eos[0], *tokenizer.encode('{"action":')])[:2] == [begin, end]


def test_a_thought_ends_where_its_tag_is_spelled_out(tokenizer: Tokenizer, grammars: Grammars) -> None:
    begin, end = tokenizer.id_of("<think>"), tokenizer.id_of("</think>")
    assert begin is not None and end is not None
    compiled = grammars.compile(TAP, after_thought=True)
    spelled = [tokenizer.encode(character)[0] for character in "</think>"]
    assert end not in spelled

    pushed = push_all(compiled, [begin, *spelled, *tokenizer.encode('{"action":')])

    assert pushed[: len(spelled) + 1] == [begin, *spelled]
    longer = next(
        token
        for token in range(tokenizer.vocab_size)
        if (found := tokenizer.bytes_of(token)).startswith(b">") and found[1:].strip()
    )
    assert push_all(compiled, [begin, *spelled[:-1], longer])[-1] == end


def test_a_prompt_that_ends_with_an_open_thought_goes_on_in_it(
    tokenizer: Tokenizer, grammars: Grammars
) -> None:
    begin = tokenizer.id_of("<think>")
    assert begin is not None
    compiled = grammars.compile(TAP, after_thought=True)

    assert compiled.begin(np.array([1, begin])).allowed() is None
    assert compiled.begin(np.array([1, begin, *tokenizer.encode("\n")])).allowed() is None
    assert compiled.begin(np.array([begin, *tokenizer.encode("x")])).allowed() is not None
    assert grammars.compile(TAP).begin(np.array([1, begin])).allowed() is not None


# --- schemas that are refused


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (None, "is nothing, must be an object"),
        ([], "of type list"),
        ("{}", "of type str"),
        (False, "no JSON at all fits it"),
        ({"not": {"type": "string"}}, r'Unimplemented keys: \["not"\]'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "iri"}, "Unknown format: iri"),
        ({"type": "nope"}, "Invalid type: nope"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"$ref": "http://127.0.0.1/schema"}, "not present in a registry"),
        ({"$ref": "file:///etc/passwd"}, "not present in a registry"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"$ref": "#"}, "no JSON at all fits it"),
        (
            {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
            "no JSON at all",
        ),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "greater than maximum"),
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
        ({"const": float("nan")}, "no JSON"),
        ({"const": 1 << 20000}, "no JSON"),
        ({"const": "\ud800"}, "no JSON"),
        ({"const": {1, 2}}, "no JSON"),
        ({"type": "integer", "multipleOf": 10**15 + 37}, "multipleOf"),
    ],
)
def test_what_cannot_be_held_is_refused_in_one_sentence_that_names_it(
    grammars: Grammars, schema: Any, said: str
) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        grammars.compile(schema)

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def nested(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


HOSTILE: dict[str, Callable[[], Any]] = {
    "deep": lambda: nested(100_000),
    "long": lambda: {"enum": ["x" * 60_000]},
    "many": lambda: {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}},
    "large": lambda: {"const": [["y" * 900] * 9] * 9},
    "groups": lambda: {"type": "string", "pattern": "(" * 4000 + "a" + ")" * 4000},
    "product": lambda: {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(3)]}
            for i in range(12)
        ]
    },
    "conjunction": lambda: {
        "allOf": [{"type": "string", "pattern": f"(a|b|c).{{{5 + i}}}d"} for i in range(12)]
    },
    "digits": lambda: {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_before_it_costs_much(grammars: Grammars, name: str) -> None:
    with pytest.raises(RequestError):
        grammars.compile(HOSTILE[name]())


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a|b)*a(a|b){20}$"},
        {"type": "string", "pattern": "^(.*a.{12}){3}$"},
        {"type": "string", "pattern": "^(\\w{1,1000}){1,1000}$"},
        {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
        {"type": "string", "minLength": 10**6},
        {"enum": ["z" * 7999 + end for end in "ab"]},
        {
            "anyOf": [
                {
                    "type": "array",
                    "items": {"anyOf": [{"type": "array", "items": {"type": "string"}} for _ in range(30)]},
                }
                for _ in range(30)
            ]
        },
        {"type": "object", "properties": {f"p{i}": {} for i in range(900)}},
    ],
)
def test_a_costly_answer_goes_on_or_ends_with_one_sentence(
    tokenizer: Tokenizer, eos: tuple[int, ...], grammars: Grammars, schema: Any
) -> None:
    params = SamplingParams(temperature=1, seed=3, grammar=grammars.compile(schema))
    try:
        ids = babble(tokenizer, eos, params, most=60)
    except RequestError as error:
        assert "could not be held to its JSON schema after token" in str(error)
        assert "\n" not in str(error)
    else:
        assert len(ids) == 60 or ids[-1] in eos


def test_schemas_keep_the_order_of_their_parts() -> None:
    assert read_schema({"b": 1, "a": "名"}) == '{"b":1,"a":"名"}'


def test_a_librarys_message_becomes_one_line() -> None:
    assert sentence_of("regex parse error:\n    (a\n    ^\nerror: unclosed group") == "unclosed group"
    assert sentence_of("Too large.\n<state>\nx") == "Too large"
    assert sentence_of("") == "no reason given"
    assert len(sentence_of("x" * 999)) == 200


# --- sharing


def test_grammars_are_kept_shared_and_forgotten(tokenizer: Tokenizer, eos: tuple[int, ...]) -> None:
    grammars = Grammars(tokenizer, eos)
    first = grammars.compile({"const": 0})
    assert grammars.compile({"const": 0}) is first
    assert grammars.compile({"const": 0}, after_thought=True) is not first

    for number in range(1, 40):
        grammars.compile({"const": number})

    assert grammars.compile({"const": 0}) is not first
    assert len(grammars._kept) == module._KEPT

    large = [grammars.compile({"const": ["x" * 7000] * 8 + [number]}) for number in range(6)]

    assert len(grammars._kept) == 4
    assert grammars.compile(json.loads(large[-1].source)) is large[-1]


def test_answers_of_one_grammar_do_not_disturb_each_other(
    tokenizer: Tokenizer, eos: tuple[int, ...], grammars: Grammars
) -> None:
    compiled = grammars.compile(SCHEMAS["any object"])
    alone = [
        babble(tokenizer, eos, SamplingParams(temperature=1, seed=seed, grammar=compiled))
        for seed in range(4)
    ]
    found: dict[int, list[int]] = {}

    def answer(seed: int) -> None:
        found[seed] = babble(tokenizer, eos, SamplingParams(temperature=1, seed=seed, grammar=compiled))

    threads = [threading.Thread(target=answer, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert [found[seed] for seed in range(4)] == alone


def test_without_the_library_one_sentence_says_what_to_install(
    tokenizer: Tokenizer, eos: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)

    with pytest.raises(DependencyError, match=r"pip install 'autoglm-edge\[grammar\]'"):
        Grammars(tokenizer, eos).compile(ANY_OBJECT)
