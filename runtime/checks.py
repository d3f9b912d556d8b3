"""What may be asked of an engine: numbers in their bounds, and a bundle whose parts belong together.

In: values of a caller, of whatever type. Out: nothing, or an error that says what is wrong.
"""

from __future__ import annotations

from numbers import Integral

from autoglm_edge.errors import BundleError, RequestError

from .bundle import Bundle
from .prompt.tokenizer import Tokenizer

MOST_ANSWERS = 64
"""That a batch may give at a time."""


def check_context(context: int | None, limit: int) -> None:
    """Tokens to hold.

    Raises:
        RequestError: the model has no positions for so many.
    """
    if context is not None and not (is_whole(context) and 1 <= context <= limit):
        raise RequestError(f"context is {context!r}, but this model has positions for 1 to {limit} tokens")


def check_concurrency(concurrency: int) -> None:
    """Answers at a time.

    Raises:
        RequestError: out of bounds.
    """
    if not (is_whole(concurrency) and 1 <= concurrency <= MOST_ANSWERS):
        raise RequestError(f"concurrency is {concurrency!r}, must be an integer from 1 to {MOST_ANSWERS}")


def check_max_tokens(max_tokens: int | None) -> None:
    """Tokens of an answer.

    Raises:
        RequestError: not one at least.
    """
    if max_tokens is not None and not (is_whole(max_tokens) and max_tokens >= 1):
        raise RequestError(f"max_tokens is {max_tokens!r}, must be an integer of at least 1")


def is_whole(value: object) -> bool:
    """Whether it is an integer, of Python or numpy, and not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_ids(bundle: Bundle, tokenizer: Tokenizer) -> None:
    """Every id that can be fed or sampled must have a row in embedding and head.

    Raises:
        BundleError: tokenizer.json or manifest.json names an id beyond.
    """
    vocab, tokens = bundle.manifest.geometry.vocab, bundle.manifest.tokens
    if tokenizer.vocab_size > vocab:
        raise BundleError(
            f"{bundle.path}: tokenizer.json has ids up to {tokenizer.vocab_size - 1}, but the decoder scores "
            f"{vocab}; they are not of one export, export the checkpoint again"
        )
    meant = {"image": tokens.image, "image_start": tokens.image_start, "image_end": tokens.image_end}
    for name, token in [*meant.items(), *(("eos", token) for token in tokens.eos)]:
        if token >= vocab:
            raise BundleError(
                f"{bundle.path}: manifest.json names {token} as {name} token, but the decoder scores "
                f"{vocab} ids; export the checkpoint again"
            )
