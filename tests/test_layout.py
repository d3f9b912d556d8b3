"""The project's own rules: one import name over mapped folders, import directions, what a wheel holds.

Reads pyproject.toml, the folders and the source (as syntax trees); builds one wheel without a network.
    python -m pytest tests/test_layout.py
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import autoglm_edge
from autoglm_edge.runtime.layerwise.expansion import COMPILED

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_DIR: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
# Folders of the product by import name; the namespace folder of the optimum plug-in is not ours to import.
PRODUCT = {name: ROOT / path for name, path in PACKAGE_DIR.items() if name.split(".")[0] == "autoglm_edge"}
FOLDERS = {name.partition(".")[2]: path for name, path in PRODUCT.items() if name.count(".") == 1}
NAMES = {path: name for name, path in PRODUCT.items()}
PLUG_IN = ROOT / "optimum" / "commands" / "register"
NOT_PRODUCT = {"tests", "scripts", "benchmarks", "typings", "docs", "build", "dist", "out", "bundles"}

# Who may import what: third-party packages, and modules of this package outside the own folder.
THIRD_PARTY = {
    "runtime": {"numpy", "onnxruntime", "tokenizers", "jinja2", "PIL", "llguidance"},
    "quantize": {"numpy"},
    "export": {
        "numpy",
        "onnxruntime",
        "safetensors",
        "ml_dtypes",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "huggingface_hub",
    },
    "parity": {"numpy", "safetensors", "PIL", "torch", "transformers"},
    "autorecipe": {"numpy", "onnx_ir", "onnxruntime", "PIL"},
    "measure": {"numpy", "onnxruntime", "PIL"},
    "android_sim": {"numpy", "onnxruntime", "PIL"},
    "server": {"numpy", "PIL", "fastapi", "starlette", "uvicorn"},
    "offline": {"numpy", "PIL"},
    "cluster": {"ray", "numpy", "h11", "starlette"},
    "speech": {"numpy", "torch", "whisper"},
    "commands": {"click", "PIL"},
    "": {"click"},
}
INTERNAL = {
    "runtime": ("autoglm_edge.errors", "autoglm_edge.files"),
    "quantize": ("autoglm_edge.errors", "autoglm_edge.files"),
    "export": (
        "autoglm_edge.errors",
        "autoglm_edge.files",
        "autoglm_edge.embedded",
        "autoglm_edge.quantize",
        "autoglm_edge.runtime.bundle",
        "autoglm_edge.runtime.layerwise.index",
        "autoglm_edge.runtime.machine.limits",
        "autoglm_edge.runtime.machine.topology",
        "autoglm_edge.runtime.manifest",
        "autoglm_edge.runtime.prompt",
        "autoglm_edge.runtime.session",
    ),
    "parity": (
        "autoglm_edge.errors",
        "autoglm_edge.files",
        "autoglm_edge.embedded",
        "autoglm_edge.export.source.checkpoint",
        "autoglm_edge.runtime",
    ),
    "autorecipe": (
        "autoglm_edge.errors",
        "autoglm_edge.files",
        "autoglm_edge.embedded",
        "autoglm_edge.export",
        "autoglm_edge.parity",
        "autoglm_edge.quantize",
        "autoglm_edge.runtime",
    ),
    "measure": ("autoglm_edge.errors", "autoglm_edge.files", "autoglm_edge.runtime"),
    "android_sim": (
        "autoglm_edge.errors",
        "autoglm_edge.files",
        "autoglm_edge.embedded",
        "autoglm_edge.measure",
        "autoglm_edge.parity",
        "autoglm_edge.runtime",
    ),
    "server": (
        "autoglm_edge.errors",
        "autoglm_edge.files",
        "autoglm_edge.measure.memory",
        "autoglm_edge.runtime",
        "autoglm_edge.speech",
    ),
    "offline": ("autoglm_edge.errors", "autoglm_edge.files", "autoglm_edge.runtime", "autoglm_edge.server"),
    "cluster": (
        "autoglm_edge.errors",
        "autoglm_edge.files",
        "autoglm_edge.offline",
        "autoglm_edge.runtime",
        "autoglm_edge.server",
    ),
    "speech": ("autoglm_edge.errors", "autoglm_edge.files"),
    "commands": (
        "autoglm_edge.errors",
        "autoglm_edge.files",
        "autoglm_edge.embedded",
        "autoglm_edge.android_sim",
        "autoglm_edge.autorecipe",
        "autoglm_edge.cluster",
        "autoglm_edge.export",
        "autoglm_edge.measure",
        "autoglm_edge.offline",
        "autoglm_edge.parity",
        "autoglm_edge.quantize",
        "autoglm_edge.runtime",
        "autoglm_edge.server",
        "autoglm_edge.speech",
    ),
    "": ("autoglm_edge",),
}
# Where the original model is asked, and where whisper listens.
TORCH_USERS = {("parity", "torch_model.py"), ("speech", "recogniser.py")}
# Distribution that an import name comes from, where the two differ.
DISTRIBUTIONS = {"PIL": "pillow", "onnx_ir": "onnx-ir", "whisper": "openai-whisper"}
HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes", "optimum")


@dataclass(frozen=True)
class Import:
    """One import statement: where it stands and the dotted name that it asks for."""

    path: Path
    line: int
    name: str
    level: int

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {'.' * self.level}{self.name}"


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file, those inside functions and TYPE_CHECKING blocks included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, 0)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield Import(path, node.lineno, module, node.level)
            if node.level == 0:  # `from autoglm_edge.runtime import bundle` names a module, too
                for alias in node.names:
                    yield Import(path, node.lineno, f"{module}.{alias.name}", 0)


def loading_imports(path: Path) -> Iterator[Import]:
    """The imports that happen when a module is loaded."""
    later = {
        node.lineno
        for outer in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.If))
        for node in ast.walk(outer)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    return (item for item in imports_of(path) if item.line not in later)


def folder_imports(folder: str) -> list[Import]:
    """The imports of one product folder and the folders in it; "" is the front door."""
    path = FOLDERS[folder] if folder else PRODUCT["autoglm_edge"]
    found = [item for file in sorted(path.rglob("*.py")) for item in imports_of(file)]
    assert found, f"{path} holds no imports: is it the right folder?"
    return found


def is_within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the modules, or something inside one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def run_python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """The standard output of a fresh interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the map of folders


def test_the_package_list_names_the_mapped_folders() -> None:
    packages = PROJECT["tool"]["setuptools"]["packages"]

    assert sorted(packages) == sorted(PACKAGE_DIR)
    assert all((ROOT / folder).is_dir() for folder in PACKAGE_DIR.values())


def test_every_top_level_folder_with_a_package_is_mapped() -> None:
    on_disk = {path.parent.name for path in ROOT.glob("*/__init__.py")} - NOT_PRODUCT

    assert on_disk == {"autoglm_edge", *FOLDERS}


def test_every_module_lies_in_a_mapped_folder_so_that_the_wheel_misses_nothing() -> None:
    files = [file for folder in PRODUCT.values() for file in folder.rglob("*.py")]

    assert [str(file) for file in files if file.parent not in NAMES] == []


def test_a_folder_within_a_folder_is_mapped_under_its_own_path() -> None:
    for name, path in PACKAGE_DIR.items():
        if name.startswith("autoglm_edge."):
            assert path == name.partition(".")[2].replace(".", "/")


def test_the_optimum_namespace_has_no_init_files() -> None:
    assert sorted(path.name for path in PLUG_IN.glob("*.py")) == ["register_autoglm_export.py"]
    assert list((ROOT / "optimum").rglob("__init__.py")) == []


def test_typings_hold_a_link_for_every_folder_and_front_door_file() -> None:
    typings = ROOT / "typings" / "autoglm_edge"
    if (typings / "runtime").is_file():
        pytest.skip(
            "this checkout has no symbolic links (core.symlinks=false); only type checking needs them"
        )
    front_door = PRODUCT["autoglm_edge"]
    files = [*front_door.glob("*.py"), front_door / "py.typed"]

    links = {path.name: path.resolve() for path in typings.iterdir() if path.name != "__pycache__"}

    assert links == {**FOLDERS, **{path.name: path for path in files}}


def test_tools_look_at_every_product_folder() -> None:
    folders = sorted(["autoglm_edge", *FOLDERS])

    assert PROJECT["tool"]["mypy"]["packages"] == ["autoglm_edge"]
    assert sorted(PROJECT["tool"]["coverage"]["run"]["source"]) == folders


# --- import directions


@pytest.mark.parametrize("folder", [*FOLDERS, ""])
def test_a_folder_imports_only_what_the_design_allows(folder: str) -> None:
    allowed = THIRD_PARTY[folder] | set(sys.stdlib_module_names)
    wrong = []
    for item in folder_imports(folder):
        if item.level:
            continue
        if item.name.split(".")[0] != "autoglm_edge":
            fine = item.name.split(".")[0] in allowed
        elif any(prefix.startswith(item.name + ".") for prefix in INTERNAL[folder]):
            continue  # the first half of `from autoglm_edge.runtime import bundle`; the second half is judged
        else:
            fine = is_within(item.name, (*INTERNAL[folder], f"autoglm_edge.{folder}"))
        if not fine:
            wrong.append(str(item))

    assert wrong == []


@pytest.mark.parametrize("folder", [*FOLDERS, ""])
def test_imports_are_relative_inside_a_folder_and_absolute_across(folder: str) -> None:
    wrong = [
        str(item)
        for item in folder_imports(folder)
        if item.level > 1
        or (folder and item.level == 0 and is_within(item.name, (NAMES[item.path.parent],)))
        or (item.level == 0 and item.name.split(".")[0] in FOLDERS)
    ]

    assert wrong == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    files = {
        f"{package}.{file.stem}".removesuffix(".__init__"): file
        for folder, package in NAMES.items()
        for file in folder.glob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        package = NAMES[file.parent]
        named = {f"{package}.{item.name}" if item.level else item.name for item in loading_imports(file)}
        graph[name] = {other for other in named if other in files and other not in (name, package)}

    assert len(graph) > 100
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_tests_scripts_and_benchmarks_import_the_folders_by_their_full_name() -> None:
    files = [
        file
        for folder in ("tests", "scripts", "benchmarks", "optimum")
        for file in (ROOT / folder).rglob("*.py")
    ]

    wrong = [str(item) for file in files for item in imports_of(file) if item.name.split(".")[0] in FOLDERS]

    assert len(files) > 3
    assert wrong == []


@pytest.mark.parametrize("folder", [*FOLDERS, ""])
def test_no_product_code_but_recorder_and_listener_imports_torch_or_transformers(folder: str) -> None:
    heavy = [item for item in folder_imports(folder) if item.name.split(".")[0] in HEAVY]

    assert [str(item) for item in heavy if (folder, item.path.name) not in TORCH_USERS] == []


def test_third_party_imports_are_declared_dependencies() -> None:
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=!~; ]", item)[0].lower() for item in requirements}

    extras = PROJECT["project"]["optional-dependencies"]
    plain = names(PROJECT["project"]["dependencies"])
    export = plain | names(extras["export"])
    parity = export | names(extras["parity"])
    server = plain | names(extras["server"])

    def declared(folder: str) -> set[str]:
        return {DISTRIBUTIONS.get(name, name).lower() for name in THIRD_PARTY[folder]}

    # fastapi stands on starlette and shows its types, uvicorn on h11; grammars are an extra.
    below = {"starlette", "h11"}
    assert declared("runtime") - names(extras["grammar"]) <= plain
    assert declared("measure") | declared("android_sim") | declared("offline") <= plain
    assert declared("commands") | declared("") <= plain
    assert declared("server") - below <= server
    assert declared("cluster") - below <= plain | names(extras["ray"])
    assert declared("speech") - {"torch"} <= plain | names(extras["speech"])  # whisper stands on torch
    assert declared("export") | declared("quantize") | declared("autorecipe") <= export
    assert declared("parity") <= parity


# --- what an import brings along


def modules_after(statement: str, cwd: Path) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(run_python(code, cwd=cwd).splitlines()[-1].split())


def test_the_front_door_and_the_command_line_load_nothing_heavy(tmp_path: Path) -> None:
    loaded = modules_after("import autoglm_edge, autoglm_edge.cli", tmp_path)
    heavy = {*HEAVY, "numpy", "onnxruntime", "onnx", "onnxscript", "safetensors", "tokenizers", "PIL"}

    assert loaded & heavy == set()


def test_the_runtime_loads_neither_torch_nor_the_exporter(tmp_path: Path) -> None:
    loaded = modules_after("import autoglm_edge.runtime.engine", tmp_path)

    assert {"numpy", "onnxruntime"} <= loaded
    assert loaded & {*HEAVY, "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes", "click"} == set()


def test_the_exporter_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    loaded = modules_after("import autoglm_edge.export.pipeline", tmp_path)

    assert loaded & set(HEAVY) == set()


def test_validation_loads_neither_torch_nor_the_exporter(tmp_path: Path) -> None:
    statement = "import autoglm_edge.parity.validate, autoglm_edge.parity.page, autoglm_edge.parity.stamp"
    loaded = modules_after(statement, tmp_path)

    assert loaded & {*HEAVY, "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "click"} == set()


def test_the_recorder_loads_torch_only_when_it_records(tmp_path: Path) -> None:
    assert modules_after("import autoglm_edge.parity.record", tmp_path) & set(HEAVY) == set()


# --- public names and the wheel


def test_the_public_names_are_exactly_the_declared_ones() -> None:
    declared = set(autoglm_edge.__all__)
    modules = {path.stem for path in PRODUCT["autoglm_edge"].glob("*.py")} | set(FOLDERS)
    language = {"annotations", "TYPE_CHECKING"}

    public = {name for name in dir(autoglm_edge) if not name.startswith("_")} - language

    assert len(declared) == len(autoglm_edge.__all__)
    assert public - (modules - declared) == declared
    assert [name for name in sorted(declared) if not callable(getattr(autoglm_edge, name))] == []


def test_a_public_name_stays_a_function_after_the_folder_of_that_name_is_imported(tmp_path: Path) -> None:
    code = (
        "import autoglm_edge as ag\n"
        "import autoglm_edge.export.pipeline\n"
        "print(callable(ag.export), callable(ag.export))\n"
    )

    assert run_python(code, cwd=tmp_path).split() == ["True", "True"]


def built_wheel(source: Path, **environment: str) -> Path:
    """The wheel, built by setuptools itself (no network, no build folders in the repository)."""
    for folder in {path.split("/")[0] for path in PACKAGE_DIR.values()}:
        left_out = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
        shutil.copytree(ROOT / folder, source / folder, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"import os; os.environ.update({environment!r})\n"
    run_python(code + "from setuptools import build_meta; build_meta.build_wheel('dist')", cwd=source)
    return next((source / "dist").glob("*.whl"))


def names_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_wheel(tmp_path_factory.mktemp("source"))


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    wanted = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in PACKAGE_DIR.items()
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".py", ".pyi", ".json", ".toml", ".kt") or path.name == "py.typed"
    }
    wanted |= {
        f"autoglm_edge/android_sim/devices/{path.name}" for path in (ROOT / "android_sim/devices").iterdir()
    }
    wanted |= {f"autoglm_edge/pocket/{path.name}" for path in (ROOT / "autoglm_edge" / "pocket").iterdir()}

    names = names_in(wheel)

    assert "autoglm_edge/runtime/manifest.schema.json" in names
    assert "autoglm_edge/pocket/model.safetensors" in names
    compiled = {name for name in names if name.endswith((".so", ".pyd"))}
    assert names - compiled == wanted
    # A compiler that this interpreter can use is there for the wheel if it was for the installation.
    assert bool(compiled) == COMPILED


@pytest.mark.slow
def test_a_machine_without_a_compiler_gets_the_same_wheel_without_the_compiled_loops(tmp_path: Path) -> None:
    names = names_in(built_wheel(tmp_path, CC=str(tmp_path / "no-such-compiler")))

    assert "autoglm_edge/runtime/layerwise/tiles.py" in names
    assert not [name for name in names if name.endswith((".so", ".pyd", ".c"))]


@pytest.mark.slow
def test_the_wheel_adds_one_file_to_the_optimum_namespace(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("optimum/")]

    assert names == ["optimum/commands/register/register_autoglm_export.py"]


@pytest.mark.slow
def test_an_installed_wheel_imports_from_its_own_files(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*pip, str(target), str(wheel)], check=True, cwd=tmp_path, capture_output=True)
    code = (
        "import autoglm_edge.runtime.engine as engine, autoglm_edge.export.pipeline as pipeline\n"
        "from autoglm_edge.embedded import pocket_path\n"
        "print(engine.__file__, pipeline.__file__, pocket_path() / 'model.safetensors', sep='\\n')\n"
    )

    files = [Path(line) for line in run_python(code, cwd=tmp_path, path=target).splitlines()]

    assert len(files) == 3
    assert all(file.is_relative_to(target) and file.is_file() for file in files)


# --- scripts and documentation


@pytest.mark.parametrize("script", ["scripts/quickstart", "scripts/test", "scripts/check", ".ci/run"])
def test_shell_scripts_are_executable_and_parse(script: str) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    if os.name == "posix":
        assert os.access(ROOT / script, os.X_OK)

    done = subprocess.run([bash, "-n", str(ROOT / script)], capture_output=True, text=True, check=False)

    assert done.stderr == ""


def test_links_between_the_documents_lead_somewhere() -> None:
    broken = []
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
            path = target.partition("#")[0]
            if path and not re.match(r"[a-z]+:", target) and not (document.parent / path).exists():
                broken.append(f"{document.relative_to(ROOT)} -> {target}")

    assert broken == []


def test_changelog_and_package_name_the_same_version() -> None:
    version = PROJECT["project"]["version"]

    assert autoglm_edge.__version__ == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[?{re.escape(version)}\b", changelog, re.M)
