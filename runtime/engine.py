"""The engine: messages in, an answer out, one token at a time. The one decode loop of the project.

    messages ─ prompt (template, images, positions) ─ prefill in chunks ─ sample ─ decode … ─ deltas of text

In: a bundle. Out: `Delta`s, logits or token ids. Knows no model family, no HTTP and no files beside the
bundle.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autoglm_edge.errors import ContextLengthError, RequestError

from .answer import Delta, FinishReason, Timings, Usage
from .bundle import Bundle
from .messages import read_messages
from .model import Model
from .prompt import Prompt, build_prompt, prompt_from_ids, prompt_ids
from .sampling import Sampler, SamplingParams
from .session import Device, SessionOptions
from .stops import StopText
from .template import ChatTemplate, ImageLayout
from .tokenizer import StreamDecoder, Tokenizer

DEFAULT_CONTEXT = 25480
"""Tokens held unless asked otherwise: what the reference deployment of the phone agent serves."""
PREFILL_CHUNK = 512
"""Tokens per decoder run of a prefill; bounds its activations."""
SCORE_CHUNK = 64
"""Tokens per run when every position is scored: V floats each."""
GUARD_STOPS = ("</answer>",)
"""Never part of an answer: agents parse what stands before it, and a trailing one breaks their parser."""


class Engine:
    """A loaded bundle. A context manager; one answer at a time.

    Attributes:
        bundle: what was loaded.
        tokenizer: of the bundle.
        context: tokens that prompt and answer may have together.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        options: SessionOptions | None = None,
        context: int | None = None,
        image_layout: ImageLayout = "plain",
        max_image_tokens: int | None = None,
    ) -> None:
        """Open the sessions.

        Args:
            bundle: opened bundle.
            options: device and threads.
            context: tokens to hold; default the model's, at most DEFAULT_CONTEXT.
            image_layout: "plain" puts text right after an image, as the checkpoint's template does; "newline"
                puts a newline between them, as vLLM's string content format does.
            max_image_tokens: lowers the pixel budget of the bundle for this engine.

        Raises:
            RequestError: an option is outside what the bundle allows.
        """
        manifest = bundle.manifest
        limit = manifest.geometry.context_length
        self.bundle = bundle
        self.context = min(limit, DEFAULT_CONTEXT) if context is None else context
        if not 1 <= self.context <= limit:
            raise RequestError(f"context is {context}, but this model has positions for 1 to {limit} tokens")
        self.image_layout: ImageLayout = image_layout
        self.image = (
            manifest.image if max_image_tokens is None else manifest.image.with_max_tokens(max_image_tokens)
        )
        self.tokenizer = Tokenizer.from_folder(bundle.path)
        self.template = ChatTemplate.from_folder(bundle.path)
        self._model = Model(bundle, options or SessionOptions())
        self._cache = self._model.new_cache(self.context)
        self._busy = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: Device = "cpu",
        threads: int = 0,
        context: int | None = None,
        image_layout: ImageLayout = "plain",
        max_image_tokens: int | None = None,
    ) -> Engine:
        """Open the bundle at `path`; the arguments are those of `SessionOptions` and `Engine`.

        Raises:
            BundleError: the folder is not a complete bundle.
            DeviceError: the device is not there.
            RequestError: an option is outside what the bundle allows.
        """
        return cls(
            Bundle.open(path),
            options=SessionOptions(device, threads),
            context=context,
            image_layout=image_layout,
            max_image_tokens=max_image_tokens,
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free sessions and cache. The engine cannot be used afterwards."""
        del self._model, self._cache

    def prompt(self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int = 1) -> Prompt:
        """Messages as the model will see them: ids, patched images and positions.

        Raises:
            RequestError: a message or an image is wrong.
            ContextLengthError: no room for `max_tokens` more; known before an image is resized.
        """
        return build_prompt(
            read_messages(messages),
            tokenizer=self.tokenizer,
            template=self.template,
            image=self.image,
            tokens=self.bundle.manifest.tokens,
            image_layout=self.image_layout,
            context=self.context,
            max_tokens=max_tokens,
        )

    def tokenize(self, messages: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
        """Token ids (T,) of a conversation, image placeholders expanded, up to where the answer begins."""
        return prompt_ids(
            read_messages(messages),
            tokenizer=self.tokenizer,
            template=self.template,
            image=self.image,
            tokens=self.bundle.manifest.tokens,
            image_layout=self.image_layout,
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        cancel: threading.Event | None = None,
    ) -> Iterator[Delta]:
        """Answer a conversation; greedy unless a temperature is given.

        Everything that can be wrong with the request is found before the iterator is returned, so an error
        comes from this call and not from the first step. Closing the iterator, or setting `cancel`, ends the
        work within one decoder run.

        Args:
            messages: OpenAI-style, images as PIL, bytes, path or data URI.
            max_tokens: answer tokens at most; default what the context has left.
            temperature: 0 picks the most likely token; the penalties and the bias act then, too.
            top_p: nucleus of the distribution.
            top_k: number of candidates, 0 for all.
            min_p: least probability relative to the best candidate's.
            repetition_penalty: as transformers: over prompt and answer.
            frequency_penalty: as OpenAI: per occurrence in the answer.
            presence_penalty: as OpenAI: once for each id in the answer.
            logit_bias: added to the logits, by token id.
            seed: makes sampling repeatable.
            stop: strings that end the answer and are not part of it.
            cancel: checked before each decoder run.

        Raises:
            RequestError: a message, an image or an option is wrong.
            ContextLengthError: prompt and answer do not fit.
        """
        clock = _Clock()
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            logit_bias=logit_bias or {},
            seed=seed,
        )
        if max_tokens is not None and max_tokens < 1:
            raise RequestError(f"max_tokens is {max_tokens}, must be at least 1")
        stops = StopText((*GUARD_STOPS, *([stop] if isinstance(stop, str) else stop)))
        prompt = self.prompt(messages, max_tokens=max_tokens or 1)
        sampler = Sampler(params, vocab=self.tokenizer.vocab_size, prompt_ids=prompt.ids)
        budget = max_tokens or self.context - len(prompt.ids)
        return self._answer(prompt, sampler, stops, budget, cancel or threading.Event(), clock)

    def score(
        self,
        input_ids: Sequence[int] | NDArray[np.int64],
        images: Sequence[Image.Image | bytes | str | Path] = (),
    ) -> NDArray[np.float32]:
        """Logits (T, V) of every position of a given sequence.

        Args:
            input_ids: (T,), each image as one placeholder or as all of its placeholders.
            images: in the order of their placeholders.

        Raises:
            RequestError: placeholders and images do not agree, or an id is unknown.
            ContextLengthError: the sequence does not fit.
        """
        prompt = prompt_from_ids(
            np.asarray(input_ids, np.int64), images, image=self.image, tokens=self.bundle.manifest.tokens
        )
        vocab = self.bundle.manifest.geometry.vocab
        if not 0 <= prompt.ids.min() <= prompt.ids.max() < vocab:
            raise RequestError(
                f"input_ids range from {prompt.ids.min()} to {prompt.ids.max()}, "
                f"the model knows 0 to {vocab - 1}"
            )
        if len(prompt.ids) > self.context:
            raise ContextLengthError(len(prompt.ids), 0, self.context)
        with self._claim():
            features = self._encode(prompt)
            return np.concatenate(
                list(self._prefill(prompt, features, SCORE_CHUNK, threading.Event(), keep=0))
            )

    def _answer(
        self,
        prompt: Prompt,
        sampler: Sampler,
        stops: StopText,
        budget: int,
        cancel: threading.Event,
        clock: _Clock,
    ) -> Iterator[Delta]:
        """Prefill, then sample and decode until something ends it. The last delta carries the counts."""
        eos = frozenset(self.bundle.manifest.tokens.eos)
        decoder = StreamDecoder(self.tokenizer)
        text, sampled = "", 0
        ids: tuple[int, ...] = ()
        reason: FinishReason | None = None
        with self._claim():
            features = self._encode(prompt)
            clock.images_done()
            logits = None
            for scored in self._prefill(prompt, features, PREFILL_CHUNK, cancel, keep=1):
                logits = scored
            clock.prefill_done()
            while reason is None:
                if cancel.is_set() or logits is None:
                    reason, text, ids = "cancelled", "", ()
                    break
                token = sampler.sample(logits[-1])
                sampled += 1
                clock.token_done(sampled)
                if token in eos:
                    reason, text, ids = "stop", "", ()
                    break
                ids = (token,)
                text, stopped = stops.push(decoder.push(token))
                if stopped or sampled == budget:
                    reason = "stop" if stopped else "length"
                    break
                yield Delta(text, ids)
                position = np.full((3, 1), prompt.next_position + sampled - 1, np.int64)
                logits = self._model.forward(
                    self._model.embed(np.array(ids, np.int64)), position, self._cache
                )
        usage = Usage(len(prompt.ids), prompt.image_tokens, sampled)
        yield Delta(text + _rest(decoder, stops), ids, reason, usage, clock.timings(len(prompt.ids), sampled))

    def _encode(self, prompt: Prompt) -> NDArray[np.floating] | None:
        """Features (N, C) of all images of a prompt, or None if it has none."""
        if not prompt.images:
            return None
        return np.concatenate([self._model.encode_image(image) for image in prompt.images])

    def _prefill(
        self,
        prompt: Prompt,
        features: NDArray[np.floating] | None,
        chunk: int,
        cancel: threading.Event,
        keep: int,
    ) -> Iterator[NDArray[np.float32]]:
        """Fill an empty cache chunk by chunk; yields logits of each chunk's last position, or all (0)."""
        self._cache.clear()
        is_image = prompt.ids == self.bundle.manifest.tokens.image
        used = 0
        for start in range(0, len(prompt.ids), chunk):
            if cancel.is_set():
                return
            part = slice(start, start + chunk)
            count = int(is_image[part].sum())
            own = None if features is None else features[used : used + count]
            used += count
            yield self._model.forward(
                self._model.embed(prompt.ids[part], own), prompt.positions[:, part], self._cache, keep
            )

    @contextmanager
    def _claim(self) -> Iterator[None]:
        """Hold the cache for one sequence."""
        if not self._busy.acquire(blocking=False):
            raise RequestError(
                "this engine is giving another answer; finish or close that one, or load a second engine"
            )
        try:
            yield
        finally:
            self._busy.release()


class _Clock:
    """Moments of one answer."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._images = self._prefill = self._first = self._last = self._started

    def images_done(self) -> None:
        self._images = time.perf_counter()

    def prefill_done(self) -> None:
        self._prefill = time.perf_counter()

    def token_done(self, count: int) -> None:
        self._last = time.perf_counter()
        if count == 1:
            self._first = self._last

    def timings(self, prompt_tokens: int, sampled: int) -> Timings:
        return Timings(
            image_ms=1e3 * (self._images - self._started),
            prefill_ms=1e3 * (self._prefill - self._images),
            decode_ms=1e3 * (self._last - self._first),
            ttft_ms=1e3 * (self._first - self._started),
            prompt_tokens=prompt_tokens,
            decoded_tokens=max(0, sampled - 1),
        )


def _rest(decoder: StreamDecoder, stops: StopText) -> str:
    """What was held back when an answer ends: an incomplete character, the beginning of a stop string."""
    text, stopped = stops.push(decoder.flush())
    return text if stopped else text + stops.flush()
