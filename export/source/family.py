"""Which models are supported, and what the others are that are easily taken for one of them.

In: config.json, parsed. Out: nothing, or an error that names what it is. This is the only module that knows
model families by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoglm_edge.errors import CheckpointError

MODEL_TYPE = "glm4v"
ARCHITECTURE = "Glm4vForConditionalGeneration"
SUPPORTED = (
    "supported are AutoGLM-Phone-9B, AutoGLM-Phone-9B-Multilingual, GLM-4.1V-9B-Thinking and "
    f"GLM-4.1V-9B-Base (model_type {MODEL_TYPE!r})"
)
LOOK_ALIKES = {
    "chatglm": "an older GLM with code of its own (ChatGLM, glm-4-9b, glm-4v-9b)",
    "glm": "a text-only GLM-4",
    "glm4": "a text-only GLM-4",
    "glm4_moe": "a text-only mixture of experts (GLM-4.5, GLM-4.6)",
    "glm4v_moe": "a mixture of experts (GLM-4.5V)",
    "glm46v": "GLM-4.6V, which has another image processor and other tokens",
    "glm4v_text": "the decoder of a GLM-4.1V without its vision tower",
    "glm4v_vision": "the vision tower of a GLM-4.1V without its decoder",
    "glm_ocr": "GLM-OCR",
    "cogvlm": "CogVLM",
    "cogagent": "CogAgent",
}
"""model_type -> what it is, for those that are easily taken for a supported one."""
ALREADY_QUANTIZED = (
    "an already quantized checkpoint; an export needs the original bfloat16, float16 or float32 weights"
)


def check_family(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a config.json of another model, or of an already quantized one.

    Args:
        config: the parsed file.
        path: the file, for messages.
    """
    model_type = config.get("model_type")
    if model_type != MODEL_TYPE:
        if model_type is None:
            raise CheckpointError(f"{path} has no model_type, so it is not a transformers model; {SUPPORTED}")
        known = LOOK_ALIKES.get(model_type) if isinstance(model_type, str) else None
        what = f"{known}, model_type {model_type!r}" if known else f"a model of type {model_type!r}"
        raise CheckpointError(f"{path} describes {what}, which is not supported; {SUPPORTED}")
    architectures = config.get("architectures")
    if architectures and (not isinstance(architectures, list) or ARCHITECTURE not in architectures):
        raise CheckpointError(
            f"{path} names the architectures {architectures!r}, must be {ARCHITECTURE}; {SUPPORTED}"
        )
    text = config.get("text_config")
    quantization = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, dict) else None
    )
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        )
        raise CheckpointError(f"{path} has a quantization_config ({method}): it is {ALREADY_QUANTIZED}")
