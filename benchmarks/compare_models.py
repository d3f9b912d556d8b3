"""The same model for every engine: a checkpoint of random weights, its bundles, and GGUF files.

In: a workspace folder and a number of layers. Out: paths, made where they are missing, and the weights and
bytes that one step reads of each. All have the 9B's geometry, and no two layers have the same weights. Knows
nothing of engines.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import peer_gguf

ROOT = Path(__file__).resolve().parent.parent
GEOMETRY = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
}


@dataclass(frozen=True)
class Model:
    """What an engine loads.

    Attributes:
        path: file or folder.
        weights: of the matrices that a step reads: those of all layers, and the head.
        read_bytes: that these take, scales included.
    """

    path: Path
    weights: int
    read_bytes: int


@dataclass(frozen=True)
class Models:
    """All forms of one checkpoint.

    Attributes:
        workspace: where they are made; one folder may hold several layer counts.
        checkpoint: with how many layers.
        peers_python: interpreter that has the package `gguf`.
        given: bundles of the checkpoint that are there already, by name.
    """

    workspace: Path
    checkpoint: Path
    peers_python: str
    given: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def of_layers(cls, workspace: Path, layers: int, peers_python: str, given: Mapping[str, Path]) -> Models:
        """With a checkpoint of the 9B's shape and so many layers, made if it is not there."""
        folder = workspace / f"checkpoint-{layers}"
        if not (folder / "config.json").exists():
            script = str(ROOT / "scripts" / "make_checkpoint.py")
            shape = ["--shape", "autoglm-9b", "--layers", str(layers)]
            partial = folder.with_name(f"{folder.name}.partial")
            _run([sys.executable, script, *shape, "--shards", "4", "-o", str(partial)])
            partial.rename(folder)
        return cls(workspace, folder, peers_python, given)

    @property
    def geometry(self) -> dict[str, int]:
        """Shapes, from the checkpoint's config."""
        config = json.loads((self.checkpoint / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        found = {name: int(text[key]) for name, key in GEOMETRY.items()}
        return {**found, "head_dim": found["hidden"] // found["heads"]}

    def original(self) -> Model:
        """The checkpoint itself, two bytes a weight."""
        weights = step_weights(self.geometry)
        return Model(self.checkpoint, weights, 2 * weights)

    def bundle(self, name: str, *options: str) -> Model:
        """A bundle, exported with `options` if it is not there."""
        folder = self.given.get(name) or self.workspace / f"{name}-{self.geometry['layers']}"
        if not (folder / "manifest.json").exists():
            _run(
                [
                    *[sys.executable, "-m", "autoglm_edge", "export", str(self.checkpoint)],
                    *["-o", str(folder), *options, "--force"],
                ]
            )
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        read = manifest["parts"]["decoder"]["weight_bytes"]
        return Model(folder, step_weights(self.geometry), read)

    def gguf(self, form: str) -> Model:
        """A GGUF file in one of `peer_gguf.FORMATS`."""
        path = self.workspace / f"{form}-{self.geometry['layers']}.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            script = str(Path(peer_gguf.__file__))
            _run([self.peers_python, script, json.dumps(self.geometry), form, str(partial)])
            partial.rename(path)
        counted = peer_gguf.counts(self.geometry, form)
        return Model(path, counted["weights"], counted["read_bytes"])


def step_weights(geometry: dict[str, int]) -> int:
    """Weights of all matrices that one step reads: layers and head."""
    return layer_weights(geometry) + geometry["vocab"] * geometry["hidden"]


def layer_weights(geometry: dict[str, int]) -> int:
    """Weights of the matrices of all layers."""
    hidden, width = geometry["hidden"], geometry["heads"] * geometry["head_dim"]
    kv_width = geometry["kv_heads"] * geometry["head_dim"]
    layer = 2 * hidden * (width + kv_width) + 3 * hidden * geometry["intermediate"]
    return geometry["layers"] * layer


def _run(command: list[str]) -> None:
    """Run a step of preparation; its output goes to stderr.

    Raises:
        SystemExit: it failed.
    """
    print(" ".join(["making:", *command[1:]])[:160], file=sys.stderr)
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
