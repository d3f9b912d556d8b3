"""A model folder in the form that transformers saves: settings, weights, tokenizer.

In: a folder, a hub id, or "pocket". Out: `Checkpoint`, checked: its settings are supported, every tensor is
there with the right shape and in a float format, and the files that a runtime needs besides the weights are
at hand. This is the only module that knows model families by name. Knows nothing of graphs and bundles.

Tensor names and shapes are those of transformers' `modeling_glm4v.py`, the same on disk for versions 4 and 5.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoglm_edge.embedded import POCKET_NAME, pocket_path
from autoglm_edge.errors import CheckpointError

from . import hub
from .config import CONFIG_NAME, GENERATION_NAME, ModelConfig, TextConfig, VisionConfig
from .tensors import FLOATS, LFS_MAGIC, TensorStore, lfs_message, read_json

__all__ = ["Checkpoint", "ModelConfig", "TextConfig", "VisionConfig", "check_family", "expected_tensors"]

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

PREPROCESSOR_NAME = "preprocessor_config.json"
PROCESSOR_NAME = "processor_config.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
TEMPLATE_NAME = "chat_template.jinja"
TEMPLATE_JSON_NAME = "chat_template.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
QUANTIZED_SUFFIXES = (
    ".qweight",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".absmax",
    ".quant_state",
)

_COMPARED_ROWS = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened and checked checkpoint.

    Attributes:
        path: the folder.
        config: what its JSON files say.
        tensors: its weights.
        revision: commit of a hub download, else None.
    """

    path: Path
    config: ModelConfig
    tensors: TensorStore
    revision: str | None

    @classmethod
    def open(cls, path_or_name: str | Path, revision: str | None = None) -> Checkpoint:
        """Open a folder, a hub id ("org/name", downloaded when it is not a folder) or "pocket".

        Args:
            path_or_name: what to open; an existing path always wins over the other two meanings.
            revision: branch, tag or commit of a hub id.

        Raises:
            CheckpointError: nothing there, another model, an unsupported setting, or incomplete or damaged
                files; said before any tensor value is read.
            DependencyError: a hub id, and huggingface_hub is not installed.
        """
        try:
            return cls._open(*_locate(path_or_name, revision))
        except OSError as error:  # a folder or link that may not be followed; files are converted by name
            raise CheckpointError(
                f"{error.filename or path_or_name} cannot be read ({error.strerror})"
            ) from error

    @classmethod
    def _open(cls, folder: Path, name: str, commit: str | None) -> Checkpoint:
        config_bytes = _read(folder / CONFIG_NAME)
        document = read_json(folder / CONFIG_NAME)
        check_family(document, folder / CONFIG_NAME)
        processor, processor_name = _processor_settings(folder)
        generation = folder / GENERATION_NAME
        config = ModelConfig.from_documents(
            document,
            processor,
            read_json(generation) if generation.exists() else {},
            processor_name=processor_name,
            source=name,
            config_sha256=hashlib.sha256(config_bytes).hexdigest(),
        )
        tensors = TensorStore.open(folder)
        config = _with_real_head(config, tensors)
        checkpoint = cls(folder, config, tensors, commit)
        checkpoint.check(expected_tensors(config))
        _check_tokenizer(folder, config)
        _template(folder)
        return checkpoint

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the weights with what a model of this geometry consists of.

        Args:
            expected: tensor name -> shape.

        Raises:
            CheckpointError: a tensor is missing, has another shape or is no float; names the first, counts
                the rest.
        """
        packed = [name for name in self.tensors.names if name.endswith(QUANTIZED_SUFFIXES)]
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            if packed:
                raise CheckpointError(f"{self.path} holds {packed[0]!r}: it is {_ALREADY_QUANTIZED}")
            raise CheckpointError(
                f"{self.path} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r}; it is "
                f"incomplete or does not belong to its {CONFIG_NAME}"
            )
        odd = [name for name, shape in expected.items() if self.tensors.shape(name) != shape]
        if odd:
            raise CheckpointError(
                f"{self.path} holds {odd[0]!r} with the shape {self.tensors.shape(odd[0])}, {CONFIG_NAME} "
                f"asks for {expected[odd[0]]} ({len(odd)} tensors differ in all); the files belong to "
                "different models"
            )
        foreign = [name for name in expected if self.tensors.dtype(name) not in FLOATS.values()]
        if foreign:
            raise CheckpointError(
                f"{self.path} holds {foreign[0]!r} as {self.tensors.dtype(foreign[0])}: it is "
                f"{_ALREADY_QUANTIZED}"
            )
        extra = [name for name in self.tensors.names if name not in expected]
        if extra:
            _log.warning("%s holds %d tensors that are not used, first %r", self.path, len(extra), extra[0])

    def side_files(self) -> dict[str, bytes]:
        """Files that a bundle takes over, by the names they have there.

        The template comes out as chat_template.jinja and the image processor's settings as
        preprocessor_config.json, wherever this checkpoint keeps them. Optional files that it does not have
        are left out.
        """
        files = {
            name: _read(self.path / name)
            for name in (
                CONFIG_NAME,
                GENERATION_NAME,
                TOKENIZER_NAME,
                TOKENIZER_CONFIG_NAME,
                SPECIAL_TOKENS_NAME,
            )
            if (self.path / name).exists()
        }
        files[TEMPLATE_NAME] = _template(self.path).encode()
        settings, name = _processor_settings(self.path)
        files[PREPROCESSOR_NAME] = (
            _read(self.path / name)
            if name == PREPROCESSOR_NAME
            else (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
        )
        return files


_ALREADY_QUANTIZED = (
    "an already quantized checkpoint; an export needs the original bfloat16, float16 or float32 weights"
)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model, in the order of its computation; no head if it is tied."""
    text, vision = config.text, config.vision
    c, v = text.hidden, vision.hidden
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (text.vocab, c)}
    for number in range(text.layers):
        layer = f"model.language_model.layers.{number}."
        for letter, heads in (("q", text.heads), ("k", text.kv_heads), ("v", text.kv_heads)):
            tensors[f"{layer}self_attn.{letter}_proj.weight"] = (heads * text.head_dim, c)
            if text.attention_bias:
                tensors[f"{layer}self_attn.{letter}_proj.bias"] = (heads * text.head_dim,)
        tensors[f"{layer}self_attn.o_proj.weight"] = (c, text.heads * text.head_dim)
        tensors[f"{layer}mlp.gate_up_proj.weight"] = (2 * text.intermediate, c)
        tensors[f"{layer}mlp.down_proj.weight"] = (c, text.intermediate)
        for norm in ("input", "post_self_attn", "post_attention", "post_mlp"):
            tensors[f"{layer}{norm}_layernorm.weight"] = (c,)
    tensors["model.language_model.norm.weight"] = (c,)
    if not text.tied_head:
        tensors[HEAD] = (text.vocab, c)
    tower = "model.visual."
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    tensors[f"{tower}patch_embed.proj.weight"] = (v, *kernel)
    tensors[f"{tower}patch_embed.proj.bias"] = (v,)
    tensors[f"{tower}post_conv_layernorm.weight"] = (v,)
    tensors[f"{tower}embeddings.position_embedding.weight"] = (vision.position_side**2, v)
    for number in range(vision.depth):
        block = f"{tower}blocks.{number}."
        tensors[f"{block}norm1.weight"] = (v,)
        tensors[f"{block}attn.qkv.weight"] = (3 * v, v)
        if vision.attention_bias:
            tensors[f"{block}attn.qkv.bias"] = (3 * v,)
        tensors[f"{block}attn.proj.weight"] = (v, v)
        tensors[f"{block}norm2.weight"] = (v,)
        tensors[f"{block}mlp.gate_proj.weight"] = (vision.out_hidden, v)
        tensors[f"{block}mlp.up_proj.weight"] = (vision.out_hidden, v)
        tensors[f"{block}mlp.down_proj.weight"] = (v, vision.out_hidden)
    o, m = vision.out_hidden, vision.merger_intermediate
    tensors[f"{tower}post_layernorm.weight"] = (v,)
    tensors[f"{tower}downsample.weight"] = (o, v, vision.merge_size, vision.merge_size)
    tensors[f"{tower}downsample.bias"] = (o,)
    tensors[f"{tower}merger.proj.weight"] = (o, o)
    tensors[f"{tower}merger.post_projection_norm.weight"] = (o,)
    tensors[f"{tower}merger.post_projection_norm.bias"] = (o,)
    tensors[f"{tower}merger.gate_proj.weight"] = (m, o)
    tensors[f"{tower}merger.up_proj.weight"] = (m, o)
    tensors[f"{tower}merger.down_proj.weight"] = (o, m)
    return tensors


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
        raise CheckpointError(f"{path} has a quantization_config ({method}): it is {_ALREADY_QUANTIZED}")


def _locate(path_or_name: str | Path, revision: str | None) -> tuple[Path, str, str | None]:
    """Folder, name and commit of what was asked for."""
    try:
        path = Path(path_or_name).expanduser()
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a zero byte, of an unknown user
        raise CheckpointError(f"{str(path_or_name)!r} cannot be a path ({error})") from error
    if not str(path_or_name):
        raise CheckpointError(
            "the model is an empty string; give a folder, a hub id such as zai-org/AutoGLM-Phone-9B, or "
            "pocket"
        )
    if exists:
        if not is_folder:
            raise CheckpointError(
                f"{path} is a file; give the folder that holds {CONFIG_NAME} and the weights"
            )
        _check_folder(path)
        if revision is not None:
            raise CheckpointError(
                f"{path} is a folder, which has no revision {revision!r}; leave the revision out"
            )
        name, commit = _name_of(path)
        return path, name, commit
    name = str(path_or_name)
    if name == POCKET_NAME:
        if revision is not None:
            raise CheckpointError(f"the embedded model has no revision {revision!r}; leave the revision out")
        return pocket_path(), POCKET_NAME, None
    if hub.is_hub_id(name):
        folder, commit = hub.download(name, revision, inspect=check_family)
        return folder, name, commit
    raise CheckpointError(
        f"{name!r} does not exist; give a folder, a hub id such as zai-org/AutoGLM-Phone-9B, or pocket"
    )


def _check_folder(folder: Path) -> None:
    if (folder / CONFIG_NAME).is_file():
        return
    names = {path.name for path in folder.iterdir()}
    if not names:
        raise CheckpointError(f"{folder} is empty; give the folder that holds {CONFIG_NAME} and the weights")
    snapshots = sorted(folder.glob("snapshots/*/config.json"))
    if snapshots:
        raise CheckpointError(
            f"{folder} is a cache folder of the hub; give the snapshot in it, {snapshots[-1].parent}"
        )
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{folder} holds an adapter (LoRA), not a model; merge it into its base model first"
        )
    gguf = sorted(name for name in names if name.lower().endswith(".gguf"))
    if gguf:
        raise CheckpointError(
            f"{folder} holds {gguf[0]}, a GGUF file, which is already converted and quantized; give the "
            "original safetensors checkpoint"
        )
    if "manifest.json" in names:
        raise CheckpointError(
            f"{folder} is an exported bundle, not a checkpoint; run it, or give the checkpoint it was made "
            "from"
        )
    raise CheckpointError(f"{folder} has no {CONFIG_NAME}; give the folder that holds it and the weights")


def _name_of(folder: Path) -> tuple[str, str | None]:
    """Name and commit: of a snapshot in the hub's cache, those of the hub; else the folder's name."""
    real = folder.resolve()
    match = re.fullmatch(r"models--([^/]+?)--([^/]+)", real.parent.parent.name)
    if match and real.parent.name == "snapshots":
        return f"{match[1]}/{match[2]}", real.name
    return real.name, None


def _with_real_head(config: ModelConfig, tensors: TensorStore) -> ModelConfig:
    """Untie a head that the config ties although the weights hold another one, as transformers does."""
    if not config.text.tied_head or HEAD not in tensors or EMBEDDING not in tensors:
        return config
    rows = tensors.shape(HEAD)[0] if tensors.shape(HEAD) else 0
    same = tensors.shape(HEAD) == tensors.shape(EMBEDDING) and {
        tensors.dtype(HEAD),
        tensors.dtype(EMBEDDING),
    } <= set(FLOATS.values())
    for start in range(0, rows if same else 0, _COMPARED_ROWS):
        stop = min(rows, start + _COMPARED_ROWS)
        if not np.array_equal(tensors.rows(HEAD, start, stop), tensors.rows(EMBEDDING, start, stop)):
            same = False
            break
    tensors.release(HEAD)
    tensors.release(EMBEDDING)
    if same:
        return config
    _log.warning(
        "%s is there and differs from the embedding, so the head is not tied as the config says", HEAD
    )
    return dataclasses.replace(config, text=dataclasses.replace(config.text, tied_head=False))


def _processor_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """Settings of the image processor and the file they lie in; transformers 5 may nest them."""
    processor = folder / PROCESSOR_NAME
    if processor.exists():
        nested = read_json(processor).get("image_processor")
        if isinstance(nested, dict):
            return nested, PROCESSOR_NAME
    if not (folder / PREPROCESSOR_NAME).exists():
        raise CheckpointError(
            f"{folder} lacks {PREPROCESSOR_NAME}, which says how images become patches; download it with the "
            "checkpoint"
        )
    return read_json(folder / PREPROCESSOR_NAME), PREPROCESSOR_NAME


def _check_tokenizer(folder: Path, config: ModelConfig) -> None:
    """The tokenizer must be one that the embedding has rows for."""
    path = folder / TOKENIZER_NAME
    if not path.exists():
        raise CheckpointError(
            f"{folder} lacks {TOKENIZER_NAME}; download it, or load the tokenizer with transformers and save "
            "it here"
        )
    document = read_json(path)
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict | list) or not vocab:
        raise CheckpointError(f"{path} has no vocabulary; download it again")
    added = document.get("added_tokens") or []
    ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))]
    ids += [item.get("id") for item in added if isinstance(item, dict)]
    if any(type(number) is not int or number < 0 for number in ids):
        raise CheckpointError(f"{path} has a token id that is no number; download it again")
    if max(ids) >= config.text.vocab:
        raise CheckpointError(
            f"{path} knows the token id {max(ids)}, but the model has only {config.text.vocab}; the files "
            "belong to different models"
        )
    known = set(ids)
    for name in ("image", "image_start", "image_end"):
        if (number := getattr(config.tokens, name)) not in known:
            raise CheckpointError(
                f"{CONFIG_NAME} gives {name}_token_id {number}, which {TOKENIZER_NAME} does not know; the "
                "files belong to different models"
            )


def _template(folder: Path) -> str:
    """The chat template, from the first place that has one, in the order of transformers."""
    path = folder / TEMPLATE_NAME
    if path.exists():
        try:
            return _read(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8 text ({error}); download it again") from error
    for name in (TEMPLATE_JSON_NAME, TOKENIZER_CONFIG_NAME):
        path = folder / name
        value = read_json(path).get("chat_template") if path.exists() else None
        if isinstance(value, list):  # several templates by name
            named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
            value = named.get("default")
        if isinstance(value, str):
            return value
        if value is not None:
            raise CheckpointError(f"{path} gives a chat_template that is not text; download it again")
    raise CheckpointError(
        f"{folder} has no chat template ({TEMPLATE_NAME}, {TEMPLATE_JSON_NAME}, or chat_template in "
        f"{TOKENIZER_CONFIG_NAME}); download it with the checkpoint"
    )


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if data.startswith(LFS_MAGIC):
        raise CheckpointError(lfs_message(path))
    return data
