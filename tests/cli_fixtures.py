"""A command called in this process, an engine that answers from a queue, and a bundle without graphs."""

import hashlib
import inspect
import os
import signal
from types import SimpleNamespace

from click.testing import CliRunner
from PIL import Image

from autoglm_edge import cli
from autoglm_edge.runtime.answer import Delta, Timings, Usage
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.manifest import (
    FileEntry,
    Geometry,
    ImageSpec,
    Manifest,
    Part,
    Source,
    TokenSpec,
)

TAP = '<think>Here.</think><answer>do(action="Tap", element=[500,250])'


def invoke(*arguments, command=cli.cli, **options):
    return CliRunner().invoke(
        command, [str(argument) for argument in arguments], prog_name="autoglm", **options
    )


class FakeEngine:
    """Answers from a queue through the interface of the real engine, and remembers what it was asked."""

    answers: list = []  # noqa: RUF012 - reset by the fixture
    loads: list = []  # noqa: RUF012
    chats: list = []  # noqa: RUF012

    @classmethod
    def load(cls, path, **options):
        inspect.signature(Engine.load).bind(path, **options)
        cls.loads.append({"path": path, **options})
        return cls()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def chat(self, messages, **options):
        inspect.signature(Engine.chat).bind(self, messages, **options)
        self.chats.append(SimpleNamespace(messages=[dict(message) for message in messages], options=options))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return self._deltas(answer, options.get("cancel"))

    def _deltas(self, answer, cancel):
        for number, character in enumerate(answer):
            if cancel is not None and cancel.is_set():
                break
            if character == "\x03":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                yield Delta(character, (number,))
        stopped = cancel is not None and cancel.is_set()
        yield Delta(
            "",
            (),
            "cancelled" if stopped else "stop",
            Usage(prompt_tokens=90, image_tokens=72, completion_tokens=len(answer)),
            Timings(20.0, 100.0, 50.0, 121.0, prompt_tokens=90, decoded_tokens=10),
        )


def replaced_engine(monkeypatch):
    """FakeEngine in the place of the engine, until the test is over."""
    monkeypatch.setattr("autoglm_edge.runtime.engine.Engine", FakeEngine)
    FakeEngine.answers, FakeEngine.loads, FakeEngine.chats = [TAP], [], []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs of some shells
    yield FakeEngine
    signal.signal(signal.SIGINT, before)


def write_bundle(folder):
    """A bundle with a manifest of a 9B model and files without graphs."""
    folder.mkdir()
    files = []
    for part in ("decoder", "embedding", "vision"):
        for name in (f"{part}.onnx", f"{part}.onnx.data"):
            content = name.encode() * 100
            (folder / name).write_bytes(content)
            files.append(FileEntry(name, len(content), hashlib.sha256(content).hexdigest()))
    manifest = Manifest(
        format_version=1,
        created_by="autoglm-edge 0.1.0",
        tools={},
        source=Source("pocket", None, "0" * 64, 3_570_000),
        geometry=Geometry(40, 4096, 32, 2, 128, 151552, 65536),
        image=ImageSpec(14, 2, 2, 12544, 9633792, (0.5,) * 3, (0.5,) * 3, 1 / 255, 3),
        tokens=TokenSpec((1,), None, 2, 3, 4),
        recipe={"name": "int4"},
        activations="float32",
        kv_dtype="float32",
        kv_bytes_per_token=81920,
        parts={
            name: Part(f"{name}.onnx", f"{name}.onnx.data", 1300)
            for name in ("decoder", "embedding", "vision")
        },
        generation={},
        files=tuple(files),
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def write_screen(path):
    """A picture of 200x400 pixels."""
    Image.new("RGBA", (200, 400)).save(path)
    return path
