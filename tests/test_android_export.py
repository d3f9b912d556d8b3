"""The folder for Android apps: laid out whole, checked against a release, and right in what it says.

Nothing here runs on Android. What app.json and the sample say of the graphs is carried out with this
machine's onnxruntime, called as bare as an app calls it.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from autoglm_edge.commands.export import export as export_command
from autoglm_edge.errors import ExportError
from autoglm_edge.export.app import android
from autoglm_edge.export.app.android import describe_app, lay_out_android, read_graphs
from autoglm_edge.export.app.android_check import android_table, check_graph, read_table
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.engine import Engine

SAMPLE = Path(android.__file__).with_name(android.SAMPLE_NAME)
RECIPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {},
    "int8": {},
    "int4": {"prefill": "int8"},
    "int8-blocks": {},
}


@pytest.fixture(scope="module")
def bundle(
    checkpoint_of: Callable[..., Path],
    bundle_of: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """Of these tests alone: its files get hard links, which onnx's checker refuses."""
    folder = tmp_path_factory.mktemp("android") / "int4"
    shutil.copytree(bundle_of(checkpoint_of("tiny"), "int4"), folder)
    return Bundle.open(folder)


@pytest.fixture
def decoder(bundle: Bundle) -> onnx.ModelProto:
    """A copy that a test may spoil."""
    return copy.deepcopy(read_graphs(bundle)["decoder.onnx"])


def node_of(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == kind)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(export_command, [str(argument) for argument in arguments])


# --- operators


@pytest.mark.parametrize("precision", RECIPES)
def test_every_graph_of_every_recipe_passes(
    precision: str, checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    bundle = Bundle.open(bundle_of(checkpoint_of("tiny"), precision, **RECIPES[precision]))

    faults = {name: check_graph(model, android_table()) for name, model in read_graphs(bundle).items()}

    assert len(faults) >= 3
    assert not any(faults.values()), faults


def test_an_operator_that_came_later_is_named(decoder: onnx.ModelProto) -> None:
    node_of(decoder, "RotaryEmbedding").op_type = "MRotaryEmbedding"  # com.microsoft has it since 1.29 or so
    node_of(decoder, "MRotaryEmbedding").domain = "com.microsoft"

    (fault,) = check_graph(decoder, android_table())

    assert fault.startswith("com.microsoft:MRotaryEmbedding is no operator of onnxruntime 1.27.0")


def test_an_attribute_that_came_later_is_named(decoder: onnx.ModelProto) -> None:
    node_of(decoder, "GroupQueryAttention").attribute.append(onnx.helper.make_attribute("new_thing", 1))

    assert check_graph(decoder, android_table()) == [
        "com.microsoft:GroupQueryAttention of onnxruntime 1.27.0 has no attribute 'new_thing'"
    ]


def test_an_input_that_came_later_is_named(decoder: onnx.ModelProto) -> None:
    node = node_of(decoder, "MatMulNBits")
    node.input.extend([""] * 6)

    (fault,) = check_graph(decoder, android_table())

    assert f"has {len(node.input)} inputs, onnxruntime 1.27.0 takes 3 to 6" in fault


def test_a_number_type_without_a_kernel_is_named(decoder: onnx.ModelProto) -> None:
    node = node_of(decoder, "MatMulNBits")
    scales = next(tensor for tensor in decoder.graph.initializer if tensor.name == node.input[2])
    scales.data_type = onnx.TensorProto.BFLOAT16
    activations = next(other for other in decoder.graph.node if node.input[0] in other.output)
    activations.op_type, activations.domain = "Unknown", "com.microsoft"

    faults = check_graph(decoder, android_table())

    assert any("MatMulNBits has no CPU kernel for T1 = bfloat16" in fault for fault in faults), faults


def test_types_are_followed_to_every_operator(bundle: Bundle) -> None:
    # A release whose kernels took nothing but text would fail every node whose types are known.
    table = android_table()
    texts = {
        name: {
            "attributes": list(item.attributes),
            "inputs": [["", kind, False] for kind in item.inputs],
            "outputs": [["", kind, False] for kind in item.outputs],
            "min_inputs": item.min_inputs,
            "max_inputs": item.max_inputs,
            "kernels": [{variable: ["string"] for kernel in item.kernels for variable in kernel}],
        }
        for name, item in table.operators.items()
    }
    strict = read_table({"onnxruntime": "0", "opsets": table.opsets, "operators": texts})

    for name, model in read_graphs(bundle).items():
        kinds = {node.op_type for node in model.graph.node}
        blamed = {fault.split(" has no CPU kernel")[0].split(":")[-1] for fault in check_graph(model, strict)}
        assert kinds == blamed, name


def test_another_opset_is_refused(decoder: onnx.ModelProto) -> None:
    decoder.opset_import[0].version = 24

    assert "opset 24" in check_graph(decoder, android_table())[0]


def test_a_table_of_another_form_is_refused() -> None:
    with pytest.raises(ExportError, match="another form"):
        read_table({"onnxruntime": "1", "opsets": {}, "operators": {"a:B": {"attributes": 3}}})


# --- the folder


def test_the_folder_holds_the_bundle_and_what_an_app_must_know(bundle: Bundle, tmp_path: Path) -> None:
    app = lay_out_android(bundle, tmp_path / "app")

    assert (app.onnxruntime, app.model_bytes) == ("1.27.0", bundle.manifest.total_bytes)
    assert Bundle.open(app.path / "model").fingerprint == bundle.fingerprint
    Bundle.open(app.path / "model").verify()
    document = json.loads((app.path / "app.json").read_text(encoding="utf-8"))
    assert document["bundle"]["fingerprint"] == bundle.fingerprint
    assert document["tokens"]["eos"] == list(bundle.manifest.tokens.eos)
    assert (app.path / "kotlin" / "AutoGlmSession.kt").read_bytes() == SAMPLE.read_bytes()
    assert "onnxruntime-android:1.27.0" in (app.path / "README.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["app"]


def test_app_json_says_what_the_graphs_are(bundle: Bundle) -> None:
    document = describe_app(bundle, read_graphs(bundle), "1.27.0")
    layers = bundle.manifest.geometry.layers

    for name, part in document["parts"].items():
        session = ort.InferenceSession(bundle.path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for key, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            said = [
                entry["name"].format(layer=layer)
                for entry in part[key]
                if not entry.get("optional")
                for layer in range(entry.get("layers", 1))
            ]
            assert sorted(said) == sorted(value.name for value in found), (name, key)
            dtypes = {entry["name"].format(layer=0): entry["dtype"] for entry in part[key]}
            types = {"tensor(float)": "float32", "tensor(int64)": "int64"}
            assert all(dtypes[v.name] == types[v.type] for v in found if v.name in dtypes)
        optional = [entry["name"] for entry in part["inputs"] if entry.get("optional")]
        assert optional == [value.name for value in session.get_overridable_initializers()]
    assert document["geometry"]["layers"] == layers


def test_files_are_linked_where_that_works_and_copied_where_not(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = lay_out_android(bundle, tmp_path / "linked")
    seen: list[int] = []

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    copied = lay_out_android(
        bundle, tmp_path / "copied", progress=lambda event: seen.append(event.done_bytes)
    )

    assert (linked.linked, copied.linked) == (True, False)
    data = "decoder.onnx.data"
    assert os.path.samefile(linked.path / "model" / data, bundle.path / data)
    assert not os.path.samefile(copied.path / "model" / data, bundle.path / data)
    assert (copied.path / "model" / data).read_bytes() == (bundle.path / data).read_bytes()
    assert seen == sorted(seen) and seen[-1] > bundle.manifest.total_bytes


def test_a_disk_without_room_for_copies_is_a_sentence_and_leaves_nothing(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)

    with pytest.raises(ExportError, match="free some space"):
        lay_out_android(bundle, tmp_path / "app")
    assert not list(tmp_path.iterdir())


def test_nothing_foreign_is_replaced(bundle: Bundle, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "diary.txt").write_text("dear")

    with pytest.raises(ExportError, match="is no app folder"):
        lay_out_android(bundle, place, force=True)
    with pytest.raises(ExportError, match="lies in the bundle"):
        lay_out_android(bundle, bundle.path / "app")
    lay_out_android(bundle, tmp_path / "app")
    with pytest.raises(ExportError, match="--force"):
        lay_out_android(bundle, tmp_path / "app")
    lay_out_android(bundle, tmp_path / "app", force=True)

    assert (place / "diary.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("offset", "100", "no multiple of 4096"),
        ("offset", str(1 << 40), "beyond the"),
        ("offset", "-4096", "beyond the"),
        ("length", "x", "does not say where"),
    ],
)
def test_weights_that_cannot_be_mapped_are_refused(
    key: str, value: str, message: str, bundle: Bundle, decoder: onnx.ModelProto
) -> None:
    tensor = next(item for item in decoder.graph.initializer if item.external_data)
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value

    with pytest.raises(ExportError, match=message):
        android.check_weights(decoder, bundle, "decoder.onnx")


def test_a_graph_that_cannot_run_leaves_no_folder(
    bundle: Bundle, decoder: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node_of(decoder, "QuickGelu").op_type = "FutureGelu"
    monkeypatch.setattr(android, "read_graphs", lambda _: {"decoder.onnx": decoder})

    with pytest.raises(ExportError, match=r"decoder\.onnx cannot run on com\.microsoft"):
        lay_out_android(bundle, tmp_path / "app")
    assert not list(tmp_path.iterdir())


# --- the sample


def test_the_sample_names_inputs_and_outputs_as_the_graphs_do(bundle: Bundle) -> None:
    text = SAMPLE.read_text(encoding="utf-8")
    fed = {name.replace("$name", "0.key") for name in re.findall(r'inputs\["([^"]+)"\]', text)}
    fed |= set(re.findall(r'"(\w+)" to ', text))
    fetched = {name.replace("$name", "0.key") for name in re.findall(r'outputs\["([^"]+)"\]', text)}
    fetched |= set(re.findall(r'setOf\("(\w+)"\)', text))
    sessions = [
        ort.InferenceSession(bundle.path / f"{part}.onnx", providers=["CPUExecutionProvider"])
        for part in ("embedding", "vision", "decoder")
    ]
    inputs = {value.name for session in sessions for value in session.get_inputs()}
    outputs = {value.name for session in sessions for value in session.get_outputs()}

    assert fed == {name for name in inputs if not re.match(r"past_key_values\.(?!0\.key)", name)}
    assert fetched == {"logits", "present.0.key"} <= outputs


def test_the_sample_reads_what_app_json_has(bundle: Bundle) -> None:
    text = SAMPLE.read_text(encoding="utf-8")
    document = describe_app(bundle, read_graphs(bundle), "1.27.0")
    found = re.findall(r'(\w+)\.get(?:JSONObject|JSONArray|Int|Long|String|Boolean)\("(\w+)"\)', text)
    holders = {
        "app": document,
        "geometry": document["geometry"],
        "tokens": document["tokens"],
        "kv": document["kv"],
        "described": document["parts"]["decoder"],
    }

    assert len(found) >= 12
    assert all(key in holders[holder] for holder, key in found), found
    assert 'getJSONObject("image").getInt("merge_size")' in text and "merge_size" in document["image"]


def test_what_the_sample_does_gives_the_answer_of_the_engine(bundle: Bundle, tmp_path: Path) -> None:
    folder = lay_out_android(bundle, tmp_path / "app").path
    app = json.loads((folder / "app.json").read_text(encoding="utf-8"))
    picture = Image.effect_noise((90, 120), 60).convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "打开设置"}]
    messages = [{"role": "user", "content": content}]
    with Engine.load(bundle.path, prefill="decoder") as engine:
        prompt = engine.prompt(messages)
        wanted = [token for delta in engine.chat(messages, max_tokens=8) for token in delta.token_ids]
    sessions = {}
    for name, part in app["parts"].items():
        settings = ort.SessionOptions()
        for key, value in part["session_entries"].items():
            settings.add_session_config_entry(key, value)
        sessions[name] = ort.InferenceSession(
            folder / part["graph"], settings, providers=["CPUExecutionProvider"]
        )
    kv, capacity = app["kv"], len(prompt.ids) + 8
    shape = (1, kv["heads"], capacity, kv["head_dim"])
    cache = {
        f"{layer}.{kind}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, kv["dtype"]))
        for layer in range(app["geometry"]["layers"])
        for kind in ("key", "value")
    }

    def step(ids: np.ndarray, features: np.ndarray, positions: np.ndarray, used: int) -> int:
        feeds = {"input_ids": ids[None], "image_features": features}
        (states,) = sessions["embedding"].run(None, feeds)
        binding = sessions["decoder"].io_binding()
        binding.bind_cpu_input("inputs_embeds", states)
        binding.bind_cpu_input("attention_mask", np.ones((1, used + len(ids)), np.int64))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions[:, None]))
        for name, value in cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits", "cpu")
        sessions["decoder"].run_with_iobinding(binding)
        logits = next(
            value for value in binding.get_outputs() if value.shape()[-1] == app["geometry"]["vocab"]
        )
        assert logits.shape()[:2] == [1, 1]
        return int(logits.numpy()[0, 0].argmax())

    image = prompt.images[0]
    grid = np.array([[1, *image.grid[1:]]], np.int64)
    (features,) = sessions["vision"].run(None, {"pixel_values": image.pixel_values, "image_grid_thw": grid})
    none = np.zeros((0, app["geometry"]["hidden"]), app["activations"])
    tokens, used, position = [], len(prompt.ids), prompt.next_position
    token = step(prompt.ids, features, prompt.positions, 0)
    while token not in app["tokens"]["eos"] and len(tokens) < 8:
        tokens.append(token)
        token = step(np.array([token]), none, np.full((3, 1), position, np.int64), used)
        used, position = used + 1, position + 1

    assert tokens == wanted


# --- the command


def test_the_command_lays_out_a_bundle_that_is_there(bundle: Bundle, tmp_path: Path) -> None:
    result = call(bundle.path, "--android", "-o", tmp_path / "app", "--json")

    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])["android"]
    assert document["path"] == str(tmp_path / "app") and document["onnxruntime_android"] == "1.27.0"
    assert Bundle.open(tmp_path / "app" / "model").fingerprint == bundle.fingerprint


def test_an_export_can_lay_out_its_own_bundle(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    place = tmp_path / "out"
    result = call(checkpoint_of("tiny"), "--int8", "--android", "-o", place, "--json")

    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["android"]["path"] == f"{place}-android"
    parts = json.loads((tmp_path / "out-android" / "app.json").read_text())["parts"]
    assert parts["decoder"]["session_entries"] == {"session.disable_prepacking": "1"}
    again = call(checkpoint_of("tiny"), "--int8", "--android", "-o", tmp_path / "out2")
    assert again.exit_code == 0
    refused = call(checkpoint_of("tiny"), "--int8", "--android", "-o", place)
    assert refused.exit_code == 1 and "--force" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--android", "--int8"], "cannot change"),
        (["--android", "--recipe", "int4-all"], "cannot change"),
        ([], "is a bundle already"),
        (["--android", "--estimate"], "cannot be estimated"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_done(
    arguments: list[str], message: str, bundle: Bundle, tmp_path: Path
) -> None:
    result = call(bundle.path, *arguments, "-o", tmp_path / "app")

    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "app").exists()
