"""genai_config.json, with which onnxruntime-genai loads a bundle folder as it is.

In: the model's geometry and ids, and the decoder graph. Out: a JSON document, and that graph in the form that
onnxruntime-genai takes. Knows nothing of this project's own runtime, which reads neither.

The model type is "qwen2_5_vl": the list of types in onnxruntime-genai is closed and has no GLM-4.1V, and for
still images the two share inputs, outputs and the rule for positions. Its image processor is another one,
though: feed pixel_values, image_grid_thw and num_image_tokens yourself (docs/bundle.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import onnx

from autoglm_edge.export.source.checkpoint import ModelConfig

from .plan import PartPlan

GENAI_NAME = "genai_config.json"
GENAI_DECODER_NAME = "decoder.genai.onnx"
MODEL_TYPE = "qwen2_5_vl"
SEARCH_KEYS = ("temperature", "top_k", "top_p", "repetition_penalty")


def genai_config(
    config: ModelConfig, plans: Mapping[str, PartPlan], ids: Mapping[str, Any]
) -> dict[str, Any]:
    """The document.

    Args:
        config: of the checkpoint, with the image budget of the bundle.
        plans: decoder, embedding and vision; their file names go in.
        ids: config.json of the checkpoint, for the token ids that this project itself does not need
            (bos_token_id, video_token_id); they are left out where the checkpoint has none.
    """
    text, tokens = config.text, config.tokens
    model: dict[str, Any] = {
        "type": MODEL_TYPE,
        "context_length": text.context_length,
        "vocab_size": text.vocab,
        "eos_token_id": list(tokens.eos),
        "pad_token_id": tokens.eos[0] if tokens.pad is None else tokens.pad,
        "image_token_id": tokens.image,
        "vision_start_token_id": tokens.image_start,
        "decoder": {
            "filename": GENAI_DECODER_NAME,
            "session_options": _session_options(),
            "head_size": text.head_dim,
            "hidden_size": text.hidden,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "num_key_value_heads": text.kv_heads,
            "inputs": {
                "inputs_embeds": "inputs_embeds",
                "attention_mask": "attention_mask",
                "position_ids": "position_ids",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
        "embedding": {
            "filename": plans["embedding"].graph_file,
            "session_options": _session_options(),
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": {
            "filename": plans["vision"].graph_file,
            "session_options": _session_options(),
            "config_filename": "preprocessor_config.json",
            "spatial_merge_size": config.image.merge_size,
            "patch_size": config.image.patch_size,
            "inputs": {"pixel_values": "pixel_values", "image_grid_thw": "image_grid_thw"},
            "outputs": {"image_features": "image_features"},
        },
    }
    for key in ("bos_token_id", "video_token_id"):
        if (found := _find_id(ids, key)) is not None:
            model[key] = found
    search: dict[str, Any] = {
        "do_sample": False,
        "max_length": text.context_length,
        "num_beams": 1,
        "past_present_share_buffer": False,
    }
    search.update({key: value for key, value in config.generation.items() if key in SEARCH_KEYS})
    if "top_k" in search:
        search["top_k"] = int(search["top_k"])
    return {"model": model, "search": search}


def genai_decoder(graph: bytes) -> bytes:
    """The decoder graph, over the same data file, with one row of logits and nothing to choose.

    onnxruntime-genai allocates logits for every position of a prompt unless the graph says that there is one,
    and it does not know the optional input.

    Args:
        graph: decoder.onnx, serialized, its weights outside.
    """
    model = onnx.ModelProto.FromString(graph)
    kept = [value for value in model.graph.input if value.name != "num_logits_to_keep"]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    (logits,) = (value for value in model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def to_bytes(document: Mapping[str, Any]) -> bytes:
    """The document as it is written."""
    return (json.dumps(document, indent=2) + "\n").encode()


def _session_options() -> dict[str, Any]:
    return {"log_id": "onnxruntime-genai", "provider_options": []}


def _find_id(document: Mapping[str, Any], key: str) -> int | None:
    """A token id at the top of config.json, or under text_config, where newer releases keep some."""
    nested = document.get("text_config")
    for place in (document, nested if isinstance(nested, Mapping) else {}):
        value = place.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
