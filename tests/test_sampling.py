import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_edge.errors import BundleError, RequestError
from autoglm_edge.runtime.sampling import Sampler, SamplingParams

V = 1009


def row(seed: int = 0, size: int = V, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def dense(sampler: Sampler, logits: np.ndarray, size: int | None = None) -> np.ndarray:
    ids, probabilities = sampler.distribution(logits)
    full = np.zeros(size or logits.size)
    full[ids] = probabilities
    return full


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def huggingface(logits: np.ndarray, *processors, ids=(0,)) -> np.ndarray:
    torch = pytest.importorskip("torch")
    scores = torch.from_numpy(logits.copy())[None]
    history = torch.tensor([list(ids)], dtype=torch.long)
    for processor in processors:
        scores = processor(history, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_temperature_equals_transformers(seed, temperature):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = row(seed)

    ours = dense(Sampler(SamplingParams(temperature=temperature), vocab=V), logits)

    theirs = huggingface(logits, warpers.TemperatureLogitsWarper(temperature))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("top_k", [1, 2, 50, V - 1, V, 5 * V])
def test_top_k_equals_transformers(seed, top_k):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = row(seed)

    ours = dense(Sampler(SamplingParams(temperature=1, top_k=top_k), vocab=V), logits)

    np.testing.assert_allclose(
        ours, huggingface(logits, warpers.TopKLogitsWarper(top_k)), rtol=1e-5, atol=1e-12
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.85, 0.9999])
def test_top_p_equals_transformers(seed, scale, top_p):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = row(seed, scale=scale)

    ours = dense(Sampler(SamplingParams(temperature=1, top_p=top_p), vocab=V), logits)

    theirs = huggingface(logits, warpers.TopPLogitsWarper(top_p))
    # transformers sums in float32: at the very edge of the nucleus one token may differ
    assert abs(int((ours > 0).sum()) - int((theirs > 0).sum())) <= 1
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("min_p", [0.001, 0.1, 0.9, 1.0])
def test_min_p_equals_transformers(seed, min_p):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = row(seed)

    ours = dense(Sampler(SamplingParams(temperature=1, min_p=min_p), vocab=V), logits)

    np.testing.assert_allclose(
        ours, huggingface(logits, warpers.MinPLogitsWarper(min_p)), rtol=1e-5, atol=1e-12
    )


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_equals_transformers_and_counts_prompt_and_answer(penalty):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = row(4)
    prompt = np.array([3, 3, 17, 400, V - 1], dtype=np.int64)
    sampler = Sampler(
        SamplingParams(temperature=1, repetition_penalty=penalty, seed=1), vocab=V, prompt_ids=prompt
    )
    drawn = [sampler.sample(logits) for _ in range(4)]

    ours = dense(sampler, logits)

    processor = warpers.RepetitionPenaltyLogitsProcessor(penalty)
    np.testing.assert_allclose(
        ours, huggingface(logits, processor, ids=[*prompt, *drawn]), rtol=1e-5, atol=1e-12
    )


@pytest.mark.parametrize("seed", range(4))
def test_all_steps_together_come_in_the_order_of_transformers(seed):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = row(seed)
    params = SamplingParams(temperature=0.7, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.2)

    ours = dense(Sampler(params, vocab=V, prompt_ids=np.arange(0, V, 7)), logits)

    theirs = huggingface(
        logits,
        warpers.RepetitionPenaltyLogitsProcessor(1.2),
        warpers.TemperatureLogitsWarper(0.7),
        warpers.TopKLogitsWarper(40),
        warpers.TopPLogitsWarper(0.8),
        warpers.MinPLogitsWarper(0.05),
        ids=range(0, V, 7),
    )
    assert np.array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    frequency=st.floats(-2, 2, width=32),
    presence=st.floats(-2, 2, width=32),
    seed=st.integers(0, 1000),
)
def test_frequency_and_presence_penalties_follow_the_published_formula(frequency, presence, seed):
    logits = row(seed, size=40)
    params = SamplingParams(temperature=1, frequency_penalty=frequency, presence_penalty=presence, seed=seed)
    sampler = Sampler(params, vocab=40, prompt_ids=np.arange(40))
    counts = np.zeros(40)
    for _ in range(12):
        expected = logits - counts * frequency - (counts > 0) * presence

        np.testing.assert_allclose(dense(sampler, logits), softmax(expected), rtol=1e-4, atol=1e-9)

        counts[sampler.sample(logits)] += 1


def test_penalties_act_at_temperature_zero():
    logits = np.array([1.0, 1.3, 0.0], np.float32)
    sampler = Sampler(SamplingParams(frequency_penalty=0.2), vocab=3)

    assert [sampler.sample(logits) for _ in range(5)] == [1, 1, 0, 1, 0]


def test_bias_acts_before_the_repetition_penalty_and_at_temperature_zero():
    logits = np.array([-1.0, 0.5], np.float32)
    params = SamplingParams(logit_bias={0: 3}, repetition_penalty=10)

    # token 0: (-1 + 3) / 10 = 0.2, below 0.5; with the penalty first it would be -10 + 3
    assert Sampler(params, vocab=2, prompt_ids=np.array([0])).sample(logits) == 1
    assert Sampler(params, vocab=2).sample(logits) == 0


def test_greedy_takes_the_lowest_of_equal_ids():
    assert Sampler(SamplingParams(), vocab=4).sample(np.array([0, 2, 2, 2], np.float32)) == 1


def test_top_p_prefers_the_lowest_of_equal_ids():
    ids, _ = Sampler(SamplingParams(temperature=1, top_p=0.5), vocab=4).distribution(np.zeros(4, np.float32))

    assert ids.tolist() == [0, 1]


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_a_tiny_top_p_keeps_one_token(top_p):
    ids, _ = Sampler(SamplingParams(temperature=2, top_p=top_p), vocab=V).distribution(row(3))

    assert ids.tolist() == [int(row(3).argmax())]


def test_ids_past_the_tokenizer_are_never_chosen():
    logits = row(1, size=64)
    logits[50:] = 100

    assert Sampler(SamplingParams(), vocab=50).sample(logits) == int(logits[:50].argmax())
    sampler = Sampler(SamplingParams(temperature=2, seed=0), vocab=50)
    assert max(sampler.sample(logits) for _ in range(300)) < 50


def test_nan_among_the_masked_ids_does_no_harm():
    logits = row(1, size=64)
    logits[60] = np.nan

    assert Sampler(SamplingParams(), vocab=50).sample(logits) == int(logits[:50].argmax())


@pytest.mark.parametrize("temperature", [0, 1])
def test_minus_infinity_is_never_chosen(temperature):
    logits = np.full(V, -np.inf, np.float32)
    logits[[5, 900]] = 1.0
    sampler = Sampler(
        SamplingParams(temperature=temperature, seed=3, frequency_penalty=0.5, top_k=30), vocab=V
    )

    assert {sampler.sample(logits) for _ in range(30)} == {5, 900}


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, r"\+inf")])
def test_broken_logits_are_an_error_that_says_where(temperature, value, name):
    logits = row()
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0), vocab=V)
    sampler.sample(logits)
    logits[77] = value

    with pytest.raises(BundleError, match=rf"gave {name} for token id 77 at answer token 2.*--verify"):
        sampler.sample(logits)


def test_a_row_without_any_possible_token_is_an_error():
    with pytest.raises(BundleError, match="only -inf"):
        Sampler(SamplingParams(), vocab=3).sample(np.full(3, -np.inf, np.float32))


@pytest.mark.parametrize("shape", [(3,), (1, 9)])
def test_logits_of_a_wrong_shape_are_an_error(shape):
    with pytest.raises(BundleError, match="tokenizer of 9 ids"):
        Sampler(SamplingParams(), vocab=9).sample(np.zeros(shape, np.float32))


def test_the_callers_logits_are_left_as_they_were():
    logits = row()
    before = logits.copy()
    params = SamplingParams(
        temperature=0.5, top_p=0.9, frequency_penalty=1, repetition_penalty=2, logit_bias={1: 5}, seed=1
    )
    sampler = Sampler(params, vocab=V, prompt_ids=np.arange(10))

    for _ in range(5):
        sampler.sample(logits)

    assert np.array_equal(logits, before)


def test_float16_logits_are_taken():
    logits = row().astype(np.float16)

    assert Sampler(SamplingParams(frequency_penalty=0.1), vocab=V).sample(logits) == int(logits.argmax())


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    def draw(seed):
        sampler = Sampler(SamplingParams(temperature=1.5, top_p=0.9, seed=seed), vocab=V)
        return [sampler.sample(row(step)) for step in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(-1) == draw(2**64 - 1)
    assert draw(None) != draw(None)


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(SamplingParams(temperature=1, seed=11), vocab=4)

    share = np.bincount([sampler.sample(logits) for _ in range(20_000)], minlength=4) / 20_000

    # three standard deviations of the likeliest share
    np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=3 * np.sqrt(0.25 / 20_000))


def test_a_tiny_temperature_is_greedy_without_overflow():
    logits = row(2, scale=1e4)
    sampler = Sampler(SamplingParams(temperature=5e-324, seed=0), vocab=V)

    assert sampler.sample(logits) == int(logits.argmax())


@pytest.mark.parametrize(
    ("name", "value", "range_"),
    [
        ("temperature", -0.1, "0 to 2"),
        ("temperature", float("nan"), "0 to 2"),
        ("temperature", "0.5", "0 to 2"),
        ("temperature", True, "0 to 2"),
        ("temperature", 10**400, "0 to 2"),
        ("top_p", 1.1, "0 to 1"),
        ("top_k", -2, "-1 or more"),
        ("top_k", 1.5, "-1 or more"),
        ("min_p", float("inf"), "0 to 1"),
        ("repetition_penalty", 0, "above 0 to 10"),
        ("frequency_penalty", 2.5, "-2 to 2"),
        ("presence_penalty", -3, "-2 to 2"),
        ("seed", 2**64, str(2**64 - 1)),
        ("seed", True, str(2**64 - 1)),
        ("logit_bias", {3: 101}, "-100 to 100"),
        ("logit_bias", {-3: 1}, "from 0"),
        ("logit_bias", {"a": 1}, "from 0"),
        ("logit_bias", "5", "-100 to 100"),
        ("logit_bias", ((1, 2, 3),), "-100 to 100"),
        ("logit_bias", {"5": 1, 5: 2}, "twice"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value, range_):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})

    assert name in str(caught.value)
    assert range_ in str(caught.value)


def test_numpy_numbers_and_json_keys_are_taken():
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(4), logit_bias={"7": 1, 2: -1})

    assert params.logit_bias == ((2, -1.0), (7, 1.0))
    assert hash(params)


def test_a_bias_on_an_unknown_id_is_refused():
    with pytest.raises(RequestError, match="token id 50, must be 0 to 49"):
        Sampler(SamplingParams(logit_bias={50: 1}), vocab=50)


def test_values_of_a_request_are_read_by_name():
    params = SamplingParams.from_values({"temperature": 0.5, "top_p": None})

    assert params == SamplingParams(temperature=0.5)
    with pytest.raises(RequestError, match="'top_q' is not a sampling parameter"):
        SamplingParams.from_values({"top_q": 1})


def test_a_greedy_token_of_the_full_vocabulary_takes_under_two_milliseconds():
    logits = row(size=151_552)
    sampler = Sampler(SamplingParams(frequency_penalty=0.2), vocab=151_365)
    for _ in range(200):
        sampler.sample(logits)

    times = []
    for _ in range(50):
        start = time.perf_counter()
        sampler.sample(logits)
        times.append(time.perf_counter() - start)

    assert min(times) < 2e-3
