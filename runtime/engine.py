"""The engine: messages in, an answer out, a delta per token.

    messages ─ prompt (template, images, positions) ─ batch (runner: reuse, prefill, decode; sampling) ─
    deltas of text

In: a bundle. Out: `Delta`s, logits or token ids. Knows no model family, no HTTP and no files beside the
bundle.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .answer import Clock, Delta
from .batch.batch import Batch
from .batch.job import Job
from .bundle import Bundle
from .checks import check_concurrency, check_context, check_max_tokens
from .claim import Claim
from .conversations import Conversations
from .grammar import ANY_OBJECT, Grammar, Grammars
from .machine.prepared import Tell
from .model import Model
from .plan import ModelPlan
from .prompt.build import Prompt
from .prompt.image import PatchedImage
from .prompt.template import ImageLayout
from .reuse.options import ReuseOptions
from .reuse.pace import BLOCK_COSTS, INTEGER_COSTS, Pace
from .runner import make_runner
from .sampling import SamplingParams
from .scores import Picture, Scorer
from .session import Device, Prefill, SessionOptions, Weights

DEFAULT_CONTEXT = 25480
"""Tokens held unless asked otherwise: what the reference deployment of the phone agent serves."""


class Engine:
    """A loaded bundle. A context manager; one answer at a time, or a `batch` of them.

    Attributes:
        bundle: what was loaded.
        tokenizer: of the bundle.
        context: tokens that prompt and answer may have together.
        reuse: what is kept between answers.
        concurrency: answers that a batch gives at a time.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        options: SessionOptions | None = None,
        context: int | None = None,
        image_layout: ImageLayout = "plain",
        max_image_tokens: int | None = None,
        reuse: ReuseOptions | None = None,
        concurrency: int = 1,
        tell: Tell | None = None,
    ) -> None:
        """Open the sessions.

        Args:
            bundle: opened bundle.
            options: device and threads.
            context: tokens to hold; default the model's, at most DEFAULT_CONTEXT.
            image_layout: "plain" puts text right after an image, as the checkpoint's template does; "newline"
                puts a newline between them, as vLLM's string content format does.
            max_image_tokens: most tokens of a picture; lowers the bundle's pixel budget, never raises it.
            reuse: what is kept between answers, and whether answers are drafted; default ReuseOptions().
            concurrency: answers that a batch gives at a time; each has a cache of `context` tokens, whose
                memory is taken as it fills.
            tell: told when weights are prepared for this machine first, which takes long; default the log.

        Raises:
            BundleError: graphs, tokenizer and manifest are not of one export.
            DeviceError: the device is not there, or has not enough memory.
            RequestError: an option is outside what the bundle allows.
        """
        manifest = bundle.manifest
        limit = manifest.geometry.context_length
        self.bundle = bundle
        check_context(context, limit)
        self.context = min(limit, DEFAULT_CONTEXT) if context is None else int(context)
        self._conversations = Conversations.of(bundle, image_layout, max_image_tokens)
        self.image_layout: ImageLayout = image_layout
        self.image = self._conversations.image
        self.tokenizer = self._conversations.tokenizer
        self.template = self._conversations.template
        self.reuse = reuse or ReuseOptions()
        check_concurrency(concurrency)
        self.concurrency = int(concurrency)
        options = options or SessionOptions()
        model = Model(bundle, options, tell)
        self._runner = make_runner(model, bundle, self.context, self.reuse, self.concurrency)
        self._batch = Batch(
            self._runner,
            self.tokenizer,
            manifest.tokens,
            pace=Pace(INTEGER_COSTS if manifest.parts["decoder"].integer else BLOCK_COSTS),
            lookup=self.reuse.lookup,
        )
        self._claim = Claim()
        self._scorer = Scorer(self._runner, manifest, self.image, self.context, self._claim)
        self._grammars = Grammars(self.tokenizer, manifest.tokens.eos)

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
        weights: Weights = "auto",
        prefill: Prefill = "auto",
        prepare: bool = True,
        reuse: ReuseOptions | None = None,
        concurrency: int = 1,
        tell: Tell | None = None,
    ) -> Self:
        """Open the bundle at `path`; the arguments are those of `SessionOptions` and `Engine`.

        Raises:
            BundleError: the folder is not a complete bundle.
            DeviceError: the device is not there.
            RequestError: an option is outside what the bundle allows.
        """
        return cls(
            Bundle.open(path),
            options=SessionOptions(device, threads, weights, prefill, prepare),
            context=context,
            image_layout=image_layout,
            max_image_tokens=max_image_tokens,
            reuse=reuse,
            concurrency=concurrency,
            tell=tell,
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free sessions and cache; an answer under way ends with an error, and no other can begin."""
        self._runner.close()

    @property
    def plan(self) -> ModelPlan:
        """How the bundle runs on this machine, and why.

        Raises:
            RequestError: the engine is closed.
        """
        return self._runner.plan

    @property
    def cache_bytes(self) -> int:
        """Memory that keys and values take once all contexts are full.

        Raises:
            RequestError: the engine is closed.
        """
        return self.concurrency * self.context * self._runner.sequence.cache.row_bytes

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int = 1,
        variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Messages as the model will see them: ids, patched images and positions.

        Args:
            messages: as in `chat`.
            max_tokens: room to leave for the answer.
            variables: more variables for the template.

        Raises:
            RequestError: a message or an image is wrong.
            ContextLengthError: no room for `max_tokens` more; known before an image is resized.
        """
        return self._conversations.prompt(
            messages, context=self.context, max_tokens=max_tokens, variables=variables
        )

    def tokenize(self, messages: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
        """Token ids (T,) of a conversation, image placeholders expanded, up to where the answer begins."""
        return self._conversations.ids(messages)

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
        grammar: Grammar | None = None,
        stop: str | Sequence[str] | None = (),
        cancel: threading.Event | None = None,
    ) -> Iterator[Delta]:
        """Answer a conversation; greedy unless a temperature is given.

        Everything that can be wrong with the request is found before the iterator is returned, so an error
        comes from this call and not from the first step. Work begins with that step, and the engine is taken
        until the iterator ends, is closed or is forgotten. Closing it, or setting `cancel`, ends the work
        within one run of a graph.

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
            grammar: what the answer is held to, from `grammar`.
            stop: strings that end the answer and are not part of it.
            cancel: checked before each image and each decoder run.

        Raises:
            RequestError: a message, an image or an option is wrong, or the engine is closed. From the first
                step: the engine is giving another answer.
            ContextLengthError: prompt and answer do not fit.
        """
        self._check_open()
        clock = Clock()
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
            grammar=grammar,
        )
        check_max_tokens(max_tokens)
        prompt = self.prompt(messages, max_tokens=max_tokens or 1)
        return self.answer(prompt, params, max_tokens=max_tokens, stop=stop, cancel=cancel, clock=clock)

    def answer(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = (),
        cancel: threading.Event | None = None,
        clock: Clock | None = None,
    ) -> Iterator[Delta]:
        """Answer a prompt that was made before, by `prompt` or otherwise; as `chat` in all else.

        Args:
            prompt: leaves room for `max_tokens` in the context.
            params: how tokens are chosen.
            max_tokens: answer tokens at most; default what the context has left.
            stop: strings that end the answer and are not part of it.
            cancel: checked before each image and each decoder run.
            clock: started when the request came; default now.

        Raises:
            RequestError: an option is wrong, or the engine is closed. From the first step: the engine is
                giving another answer.
            ContextLengthError: prompt and answer do not fit.
        """
        job = self.job(prompt, params, max_tokens=max_tokens, stop=stop, cancel=cancel, clock=clock)
        return self._answer(job)

    def job(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = (),
        cancel: threading.Event | None = None,
        clock: Clock | None = None,
    ) -> Job:
        """What `answer` is asked for, checked; to be added to a `batch` of this engine.

        Args and errors are those of `answer`.
        """
        self._check_open()
        return Job.check(
            prompt,
            params,
            max_tokens=max_tokens,
            stop=stop,
            cancel=cancel,
            clock=clock,
            vocab=self.tokenizer.vocab_size,
            context=self.context,
        )

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """Several answers at a time: the engine is taken until the context is left.

            with engine.batch() as batch:
                number = batch.add(engine.job(prompt, params))
                while batch.active:
                    for number, event in batch.step(): ...

        Raises:
            RequestError: the engine is giving another answer.
        """
        with self._claim.take():
            try:
                yield self._batch
            finally:
                self._batch.clear()

    def grammar(
        self, schema: Mapping[str, Any] | bool | None = None, *, after_thought: bool = False
    ) -> Grammar:
        """What holds an answer to JSON, for `chat` and `SamplingParams`; any number of answers may share it.

        Args:
            schema: a JSON Schema; None for any object, True for any JSON.
            after_thought: let the answer begin with `<think>`; the JSON comes after `</think>` then.

        Raises:
            RequestError: the schema is wrong, too large, or cannot be held to.
            DependencyError: llguidance is not installed.
        """
        return self._grammars.compile(ANY_OBJECT if schema is None else schema, after_thought=after_thought)

    def score(
        self,
        input_ids: Sequence[int] | NDArray[np.int64],
        images: Sequence[Picture] = (),
    ) -> NDArray[np.float32]:
        """Logits (T, V) of every position of a given sequence.

        Args:
            input_ids: (T,), each image as one placeholder or as all of its placeholders.
            images: in the order of their placeholders.

        Raises:
            RequestError: placeholders and images do not agree, or an id is unknown.
            ContextLengthError: the sequence does not fit.
        """
        return np.concatenate(list(self.score_chunks(input_ids, images)))

    def score_chunks(
        self,
        input_ids: Sequence[int] | NDArray[np.int64],
        images: Sequence[Picture] = (),
        *,
        start: int = 0,
    ) -> Iterator[NDArray[np.float32]]:
        """The rows of `score` a few at a time, so that T * V logits never lie in memory together.

        Nothing is reused here: every token is computed.

        Args:
            input_ids: as in `score`.
            images: as in `score`.
            start: first token that is scored. Those before are prefilled as `chat` prefills a prompt, by
                another graph if the bundle has one for it; those from there on go through the decoder, as
                the tokens of an answer do. 0 puts all through the decoder.

        Returns:
            Iterator of (t, V), the rows from `start` on, in order. What is wrong with the request is said by
            this call.

        Raises:
            RequestError: placeholders and images do not agree, an id is unknown, or `start` is no token.
            ContextLengthError: the sequence does not fit.
        """
        self._check_open()
        return self._scorer.chunks(input_ids, images, start)

    def encode_image(self, image: PatchedImage) -> NDArray[np.float32]:
        """Vision features (N, C) of one image, as the decoder gets them."""
        return self._runner.encode_image(image).astype(np.float32, copy=False)

    def _answer(self, job: Job) -> Iterator[Delta]:
        """A batch of one. The last delta carries the counts."""
        with self.batch() as batch:
            batch.add(job)
            while batch.active:
                for _, event in batch.step():
                    if isinstance(event, Exception):
                        raise event
                    yield event

    def _check_open(self) -> None:
        """Raises RequestError if the engine is closed."""
        _ = self._runner.model
