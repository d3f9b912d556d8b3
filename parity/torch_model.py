"""The original model in torch: the only module of the product that imports torch and transformers.

In: a checkpoint folder and how to load it; prompts as the runtime builds them. Out: positions, vision
features, logits and greedy ids as numpy arrays. Pictures come as the patches of the runtime, so both models
see the same input. Knows nothing of files and comparisons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import DependencyError, DeviceError, ParityError
from autoglm_edge.runtime.prompt.build import Prompt

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]
Baseline = Literal["bnb-nf4", "bnb-int8"]

LOGIT_ROWS = 64
"""Rows of hidden states that go through the head at once: V floats each."""


class TorchModel:
    """A loaded Glm4vForConditionalGeneration.

    Attributes:
        device_name: "cpu", or what the accelerator calls itself.
        dtype: of weights and activations.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: Device = "cpu",
        dtype: Dtype = "float32",
        baseline: Baseline | None = None,
    ) -> None:
        """Load the weights.

        Args:
            folder: checkpoint.
            device: where to compute.
            dtype: of weights and activations; of the activations alone with a baseline.
            baseline: let bitsandbytes quantize the linear layers (but the head) on loading.

        Raises:
            DependencyError: torch, transformers or bitsandbytes is not installed.
            DeviceError: there is no CUDA device.
            ParityError: the checkpoint cannot be loaded.
        """
        torch, transformers = _libraries(baseline)
        if device == "cuda" and not torch.cuda.is_available():
            raise DeviceError(
                "torch sees no CUDA device; record with --device cpu, or install a CUDA build of it"
            )
        self._torch = torch
        transformers.utils.logging.disable_progress_bar()
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device_map": {"": device}}
        if baseline is not None:
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=baseline == "bnb-nf4",
                load_in_8bit=baseline == "bnb-int8",
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=getattr(torch, dtype),
            )
        try:
            model = transformers.Glm4vForConditionalGeneration.from_pretrained(folder, **options)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ParityError(f"transformers cannot load {folder}: {' '.join(str(error).split())}") from error
        self._model = model.eval()
        self._device = device
        self.dtype = dtype
        self.device_name = "cpu" if device == "cpu" else str(torch.cuda.get_device_name())

    def positions(self, prompt: Prompt) -> NDArray[np.int64]:
        """(3, T) positions as the model itself computes them."""
        inputs = self._inputs(prompt, prompt.ids)
        if not prompt.images:
            return np.tile(np.arange(len(prompt.ids)), (3, 1))
        found, _ = self._model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        result: NDArray[np.int64] = found[:, 0].cpu().numpy().astype(np.int64)
        return result

    def features(self, prompt: Prompt) -> list[NDArray[np.float32]]:
        """(N, C) float32 vision features of every image."""
        torch = self._torch
        with torch.inference_mode():
            return [
                self._numpy(
                    self._model.model.get_image_features(
                        torch.from_numpy(image.pixel_values).to(self._device),
                        torch.tensor([image.grid], device=self._device),
                    ).pooler_output[0]
                )
                for image in prompt.images
            ]

    def logits(
        self, prompt: Prompt, sequence: NDArray[np.int64], places: NDArray[np.int64]
    ) -> Iterator[NDArray[np.float32]]:
        """Logits at the given places of a sequence that begins with the prompt.

        Args:
            prompt: whose images are used.
            sequence: (S,) ids, the prompt's first.
            places: (n,) positions in the sequence.

        Returns:
            Iterator of (rows, V) float32, in order, LOGIT_ROWS at most.
        """
        torch = self._torch
        with torch.inference_mode():
            hidden = self._model.model(**self._inputs(prompt, sequence), use_cache=False)[0][0]
            for start in range(0, len(places), LOGIT_ROWS):
                chosen = torch.from_numpy(places[start : start + LOGIT_ROWS].copy()).to(self._device)
                yield self._numpy(self._model.lm_head(hidden[chosen]))

    def greedy(
        self, prompt: Prompt, max_tokens: int, eos: Sequence[int], known_ids: int, pad: int | None
    ) -> NDArray[np.int64]:
        """Greedy answer, the end token included if it came.

        Args:
            prompt: to answer.
            max_tokens: limit.
            eos: end tokens.
            known_ids: ids from here on have no token and are never taken, as the engine has it.
            pad: filler, for transformers' peace of mind.
        """
        vocab = int(self._model.config.text_config.vocab_size)
        with self._torch.inference_mode():
            out = self._model.generate(
                **self._inputs(prompt, prompt.ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
                eos_token_id=list(eos),
                pad_token_id=eos[0] if pad is None else pad,
                suppress_tokens=list(range(known_ids, vocab)) or None,
            )
        result: NDArray[np.int64] = out[0, len(prompt.ids) :].cpu().numpy().astype(np.int64)
        return result

    def versions(self) -> dict[str, str]:
        """Of the packages that compute."""
        names = ("torch", "transformers", "bitsandbytes", "numpy", "pillow")
        found = {}
        for name in names:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return found

    def _inputs(self, prompt: Prompt, sequence: NDArray[np.int64]) -> dict[str, Any]:
        torch = self._torch
        ids = torch.from_numpy(sequence[None].copy()).to(self._device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.images:
            pixels = np.concatenate([image.pixel_values for image in prompt.images])
            inputs["pixel_values"] = torch.from_numpy(pixels).to(self._device)
            inputs["image_grid_thw"] = torch.tensor([i.grid for i in prompt.images], device=self._device)
            inputs["mm_token_type_ids"] = (ids == self._model.config.image_token_id).long()
        return inputs

    @staticmethod
    def _numpy(tensor: Any) -> NDArray[np.float32]:
        result: NDArray[np.float32] = tensor.float().cpu().numpy()
        return result


def _libraries(baseline: Baseline | None) -> tuple[Any, Any]:
    """The libraries torch and transformers, and a check that the baseline's package is there."""
    needed = ["torch", "transformers", "accelerate", *(["bitsandbytes"] if baseline else [])]
    for name in needed:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise DependencyError(
                f"recording {baseline or 'a reference'} needs the package {name}, "
                'which is not installed; run pip install "autoglm-edge[parity]"'
            ) from error
    import torch
    import transformers

    return torch, transformers
