"""What a calibration runs: prompts with their answers, as token ids, positions and patches.

In: a JSON Lines file of questions (`runtime.questions`) and a checkpoint's tokenizer, template and settings.
Out: a `CalibrationSet` of so many tokens. Knows nothing of graphs and weights.

Questions are taken in the order of the file until there are enough tokens; the last one is cut where they
end, which a causal model does not mind. Lines after it are not read. If the last message of a question is
an assistant's, it is the answer, which stands behind the prompt as a model would have written it.

Held in memory: 32 bytes per token, and the patches of a merge block per image token, 2.4 kB for GLM-4.1V.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.embedded import pocket_path
from autoglm_edge.errors import ContextLengthError, ExportError, ImageError, PromptError, RequestError
from autoglm_edge.export.files import SPECIAL_TOKENS_NAME, TEMPLATE_NAME, TOKENIZER_CONFIG_NAME
from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.export.source.config import ModelConfig
from autoglm_edge.runtime.manifest import Calibration
from autoglm_edge.runtime.prompt.build import build_prompt, prompt_ids
from autoglm_edge.runtime.prompt.image import PatchedImage
from autoglm_edge.runtime.prompt.messages import Message, TextPart, read_messages
from autoglm_edge.runtime.prompt.questions import Question, read_questions
from autoglm_edge.runtime.prompt.template import ChatTemplate
from autoglm_edge.runtime.prompt.tokenizer import Tokenizer

MAX_TOKENS = 8192
"""Tokens of a set, prompts, pictures and answers together."""

BUILT_IN = "calibration.jsonl"
"""The set that comes with the package, beside the pocket checkpoint."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt with its answer.

    Attributes:
        ids: (T,) int64, one placeholder per image token.
        positions: (3, T) int64.
        images: in prompt order. If the sample was cut, the last one may have more tokens than placeholders.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    images: tuple[PatchedImage, ...]

    def cut(self, tokens: int, image_token: int) -> Sample:
        """The first `tokens` tokens, with the pictures that begin within them."""
        if tokens >= len(self.ids):
            return self
        ids = self.ids[:tokens]
        left = int(np.count_nonzero(ids == image_token))
        images = []
        for image in self.images:
            if left <= 0:
                break
            images.append(image)
            left -= image.tokens
        return Sample(ids, self.positions[:, :tokens], tuple(images))


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Samples, and what identifies them.

    Attributes:
        samples: in the order in which they run.
        sha256: of ids, positions and patches of all samples.
    """

    samples: tuple[Sample, ...]
    sha256: str

    @property
    def tokens(self) -> int:
        """Over all samples."""
        return sum(len(sample.ids) for sample in self.samples)

    @property
    def images(self) -> tuple[PatchedImage, ...]:
        """Over all samples."""
        return tuple(image for sample in self.samples for image in sample.images)

    @property
    def description(self) -> Calibration:
        """As a manifest records it."""
        return Calibration(self.sha256, len(self.samples), self.tokens)


def built_in_set() -> Path:
    """The file that comes with the package.

    Raises:
        ExportError: it does not come with this one.
    """
    path = pocket_path() / BUILT_IN
    if not path.is_file():
        raise ExportError(
            f"this installation has no calibration set of its own at {path}; name one with --calibration"
        )
    return path


def read_calibration(
    path: Path, checkpoint: Checkpoint, config: ModelConfig, *, max_tokens: int = MAX_TOKENS
) -> CalibrationSet:
    """Read a set and make prompts of it.

    Args:
        path: the JSON Lines file.
        checkpoint: its tokenizer and template are used.
        config: of the checkpoint, with the image budget of the bundle.
        max_tokens: see the module.

    Raises:
        ExportError: the file cannot be used; says where and why.
    """
    if not path.is_file():
        raise ExportError(f"the calibration set {path} is not a file; give a JSON Lines file of prompts")
    maker = _Maker(checkpoint, config)
    samples: list[Sample] = []
    left = max_tokens
    questions = read_questions(path)
    while left > 0:
        try:
            question = next(questions, None)
            if question is None:
                break
            sample = maker.sample(question)
        except (RequestError, ExportError) as error:
            raise ExportError(f"the calibration set {path} cannot be used: {error}") from error
        samples.append(sample.cut(left, config.tokens.image))
        left -= len(samples[-1].ids)
    return CalibrationSet(tuple(samples), _sha256(samples))


class _Maker:
    """Makes samples with what a checkpoint has for it."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._config = config
        self._tokenizer = Tokenizer.from_folder(checkpoint.path)
        self._template = _template(checkpoint)

    def sample(self, question: Question) -> Sample:
        messages = read_messages(question.messages)
        answer: list[int] = []
        try:
            if len(messages) > 1 and messages[-1].role == "assistant":
                answer = self._answer(messages)
                messages = messages[:-1]
            prompt = build_prompt(
                messages,
                tokenizer=self._tokenizer,
                template=self._template,
                image=self._config.image,
                tokens=self._config.tokens,
                context=self._config.text.context_length,
                max_tokens=max(1, len(answer)),
            )
        except (PromptError, ImageError, ContextLengthError) as error:
            raise ExportError(f"{question.name!r} cannot be run: {error}") from error
        following = prompt.next_position + np.arange(len(answer))
        return Sample(
            np.concatenate([prompt.ids, np.array(answer, np.int64)]),
            np.concatenate([prompt.positions, np.broadcast_to(following, (3, len(answer)))], axis=1),
            prompt.images,
        )

    def _answer(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the last message as a model writes them."""
        if messages[-1].images:
            raise PromptError("its answer holds a picture, must be text")
        # As part of a history it is checked for special tokens.
        prompt_ids(
            messages,
            tokenizer=self._tokenizer,
            template=self._template,
            image=self._config.image,
            tokens=self._config.tokens,
        )
        text = "".join(part.text for part in messages[-1].parts if isinstance(part, TextPart))
        return self._tokenizer.encode(text)


def _template(checkpoint: Checkpoint) -> ChatTemplate:
    """The template that the bundle will have, wherever the checkpoint keeps it."""
    files = checkpoint.side_files()
    with TemporaryDirectory() as folder:
        for name in (TEMPLATE_NAME, TOKENIZER_CONFIG_NAME, SPECIAL_TOKENS_NAME):
            if name in files:
                (Path(folder) / name).write_bytes(files[name])
        return ChatTemplate.from_folder(folder)


def _sha256(samples: Sequence[Sample]) -> str:
    """As docs/bundle.md specifies it."""
    digest = hashlib.sha256()
    for sample in samples:
        grids = [side for image in sample.images for side in image.grid]
        digest.update(np.array([len(sample.ids), len(sample.images), *grids], "<i8").tobytes())
        digest.update(sample.ids.astype("<i8").tobytes())
        digest.update(np.ascontiguousarray(sample.positions, "<i8").tobytes())
        for image in sample.images:
            digest.update(np.ascontiguousarray(image.patches).tobytes())
            digest.update(np.ascontiguousarray(image.values, "<f4").tobytes())
    return digest.hexdigest()
