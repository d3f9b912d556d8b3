"""Recording: put the prompt set to the original model and write down what it answers.

In: a checkpoint. Out: a reference file. One prompt at a time; prompts, patches and positions are built by the
runtime's own code from the checkpoint's tokenizer and template. Knows the model only through TorchModel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autoglm_edge.embedded import POCKET_NAME
from autoglm_edge.errors import ContextLengthError, ParityError, RequestError
from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.runtime.prompt.build import Prompt, build_prompt
from autoglm_edge.runtime.prompt.messages import ImagePart, Message, TextPart, read_messages
from autoglm_edge.runtime.prompt.template import ChatTemplate, ImageLayout
from autoglm_edge.runtime.prompt.tokenizer import FILE_NAME, Tokenizer

from .case import Case, Fingerprint, patches_sha256, sample_rows
from .prompts import DEFAULT_SEED, PROMPT_SETS, Question, make_prompts
from .reference import Reference, write_reference
from .rows import Rows, reduce_logits
from .torch_model import Baseline, Device, Dtype, TorchModel

DEFAULT_TOP_K = 64
PROMPT_ROWS = 512
"""Scored positions of a prompt, its last ones: they have the most before them. The answer is scored whole."""

Progress = Callable[[str, int, int], None]


def record(
    checkpoint: str | Path | None,
    output: str | Path,
    *,
    prompts: str = "small",
    seed: int = DEFAULT_SEED,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    baseline: Baseline | None = None,
    like: str | Path | None = None,
    top_k: int = DEFAULT_TOP_K,
    full_logits: bool = False,
    image_layout: ImageLayout = "plain",
    max_image_tokens: int | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Reference:
    """Record what the original model answers.

    Args:
        checkpoint: folder, hub id, or None or "pocket" for the embedded model.
        output: the file to write, *.safetensors.
        prompts: "small", "full" or a JSON Lines file; see prompts.py.
        seed: of the set.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
        baseline: quantize with bitsandbytes on loading: "bnb-nf4" or "bnb-int8".
        like: a reference: its prompts and answers are scored again, at the same tokens, so that the two can
            be compared as exactly as a bundle with the first. For a floor (another dtype) or a baseline.
        top_k: logits kept per position.
        full_logits: keep all of them.
        image_layout: as the engine's.
        max_image_tokens: lowers the pixel budget, as at an export.
        revision: of a hub id.
        force: replace the output.
        progress: called with a prompt's name, the number done and the number in all.

    Raises:
        ParityError: the output exists, `like` is of another model, or the model cannot be loaded.
        CheckpointError: there is no usable checkpoint.
        PromptError: there is no such prompt set.
        ContextLengthError: a prompt is too long for this model.
        DependencyError: torch, transformers or bitsandbytes is not installed.
        DeviceError: there is no CUDA device.
        RequestError: an option is out of range.
    """
    target = Path(output)
    if target.exists() and not force:
        raise ParityError(f"{target} exists; name another file, or replace it with --force")
    if not target.resolve().parent.is_dir():
        raise ParityError(f"the folder of {target} does not exist; make it first")
    if top_k < 1:
        raise RequestError(f"top_k is {top_k}, must be at least 1")
    source = Checkpoint.open(checkpoint or POCKET_NAME, revision)
    first = None if like is None else Reference.open(like)
    if first is not None:
        image_layout = first.fingerprint.image_layout
    recorder = _Recorder(source, image_layout, max_image_tokens, top_k, full_logits)
    if first is None:
        questions = make_prompts(prompts, seed)
        name = prompts if prompts in PROMPT_SETS else Path(prompts).name
    else:
        _check_like(first, recorder)
        name, seed = first.fingerprint.prompt_set, first.fingerprint.seed
        questions = []
    recorder.check_fits(questions)
    model = TorchModel(source.path, device=device, dtype=dtype, baseline=baseline)
    cases: list[Case] = []
    total = len(questions) or len(first or ())
    tell = progress or (lambda case, done, count: None)
    try:
        for index, question in enumerate(questions):
            tell(question.name, index, total)
            cases.append(recorder.record(model, question))
        for index, case in enumerate(first.cases() if first is not None else ()):
            tell(case.name, index, total)
            cases.append(recorder.score_again(model, case))
    except RuntimeError as error:  # torch's: no memory left on the device, a kernel that lacks a shape
        raise ParityError(
            f"torch cannot compute {source.config.source} ({baseline or dtype} on {device}): {error}"
        ) from error
    tell("", total, total)
    fingerprint = dataclasses.replace(
        recorder.fingerprint,
        device=model.device_name,
        dtype=model.dtype,
        baseline=baseline,
        prompt_set=name,
        seed=seed,
        versions=model.versions(),
    )
    write_reference(target, fingerprint, cases)
    return Reference.open(target)


class _Recorder:
    """Prompts of a checkpoint, and the cases made of them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        image_layout: ImageLayout,
        max_image_tokens: int | None,
        top_k: int,
        full_logits: bool,
    ) -> None:
        self._config = checkpoint.config
        files = checkpoint.side_files()
        self._tokenizer = Tokenizer.from_folder(checkpoint.path)
        self._template = ChatTemplate.from_folder(checkpoint.path)
        self._image = checkpoint.config.image
        if max_image_tokens is not None:
            self._image = self._image.with_max_tokens(max_image_tokens)
        self._layout = image_layout
        self._top_k = top_k
        self._full = full_logits
        self.fingerprint = Fingerprint(
            model=checkpoint.config.source,
            revision=checkpoint.revision,
            config_sha256=checkpoint.config.config_sha256,
            weights_sha256=weights_sha256(checkpoint.path),
            tokenizer_sha256=hashlib.sha256(files[FILE_NAME]).hexdigest(),
            template_sha256=hashlib.sha256(files["chat_template.jinja"]).hexdigest(),
            image=self._image,
            image_layout=image_layout,
            vocab=checkpoint.config.text.vocab,
            device="",
            dtype="",
            baseline=None,
            prompt_set="",
            seed=0,
            versions={},
        )

    def check_fits(self, questions: Sequence[Question]) -> None:
        """Say that a prompt is too long before the weights are loaded."""
        for question in questions:
            self._prompt(question.messages, question.max_tokens, question.name)

    def record(self, model: TorchModel, question: Question) -> Case:
        prompt = self._prompt(question.messages, question.max_tokens, question.name)
        answer = self._greedy(model, prompt, question.max_tokens)
        messages, images = _stored(read_messages(question.messages))
        places = self._places(prompt.ids, answer)
        return Case(
            question.name,
            messages,
            images,
            question.box,
            question.max_tokens,
            prompt.ids,
            model.positions(prompt),
            tuple(image.grid for image in prompt.images),
            tuple(patches_sha256(image) for image in prompt.images),
            answer,
            answer,
            places,
            self._rows(model, prompt, np.concatenate([prompt.ids, answer]), places, None),
            _features(model, prompt),
        )

    def score_again(self, model: TorchModel, case: Case) -> Case:
        """The same sequence at the same places and tokens, by this model."""
        prompt = self._prompt(case.chat_messages(), case.max_tokens, case.name)
        if not np.array_equal(prompt.ids, case.ids):
            raise ParityError(f"case {case.name!r} gives other token ids here; the checkpoints differ")
        return dataclasses.replace(
            case,
            positions=model.positions(prompt),
            greedy=self._greedy(model, prompt, case.max_tokens),
            rows=self._rows(model, prompt, case.sequence, case.places, case.rows.top_ids),
            features=_features(model, prompt),
        )

    def _prompt(self, messages: Sequence[Any], max_tokens: int, name: str) -> Prompt:
        try:
            return build_prompt(
                read_messages(messages),
                tokenizer=self._tokenizer,
                template=self._template,
                image=self._image,
                tokens=self._config.tokens,
                image_layout=self._layout,
                context=self._config.text.context_length,
                max_tokens=max_tokens,
            )
        except ContextLengthError as error:
            raise RequestError(f"prompt {name!r} does not fit this model: {error}") from error

    def _greedy(self, model: TorchModel, prompt: Prompt, max_tokens: int) -> NDArray[np.int64]:
        tokens = self._config.tokens
        return model.greedy(prompt, max_tokens, tokens.eos, self._tokenizer.vocab_size, tokens.pad)

    def _places(self, ids: NDArray[np.int64], answer: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions whose next token is text: the last PROMPT_ROWS of the prompt, all of the answer."""
        following = np.concatenate([ids, answer])[1:]
        places = np.flatnonzero(following != self._config.tokens.image)
        before = int((places < len(ids) - 1).sum())
        return places[max(0, before - PROMPT_ROWS) :]

    def _rows(
        self,
        model: TorchModel,
        prompt: Prompt,
        sequence: NDArray[np.int64],
        places: NDArray[np.int64],
        ids: NDArray[np.int64] | None,
    ) -> Rows:
        parts = []
        done = 0
        for logits in model.logits(prompt, sequence, places):
            chunk = slice(done, done + len(logits))
            done += len(logits)
            parts.append(
                reduce_logits(
                    logits,
                    sequence[places[chunk] + 1],
                    top_k=self._top_k,
                    ids=None if ids is None else ids[chunk],
                    keep_all=self._full,
                )
            )
        return Rows.join(parts)


def weights_sha256(folder: Path) -> str:
    """Tells two trainings of one architecture apart; reads all weights once."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _check_like(first: Reference, recorder: _Recorder) -> None:
    ours = recorder.fingerprint
    for name in ("config_sha256", "weights_sha256", "tokenizer_sha256", "template_sha256", "image"):
        if getattr(first.fingerprint, name) != getattr(ours, name):
            raise ParityError(
                f"{first.path} was recorded from {first.fingerprint.model} with another {name}; score it "
                "again with the same checkpoint and image budget"
            )


def _features(model: TorchModel, prompt: Prompt) -> tuple[tuple[NDArray[np.int64], NDArray[np.float32]], ...]:
    kept = []
    for values in model.features(prompt):
        indices = sample_rows(len(values))
        kept.append((indices, values[indices]))
    return tuple(kept)


def _stored(messages: Sequence[Message]) -> tuple[tuple[dict[str, Any], ...], tuple[bytes, ...]]:
    """Messages as JSON with numbered pictures, and the pictures as PNG."""
    images: list[bytes] = []
    stored = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, ImagePart):
                parts.append({"type": "image", "image": len(images)})
                images.append(_png(part.image))
            elif isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
        content = parts[0]["text"] if message.is_string else parts
        stored.append({"role": message.role, "content": content})
    return tuple(stored), tuple(images)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
