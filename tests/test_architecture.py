"""Which module may import which, what importing costs, and that nothing loads files unsafely: read off the sources."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]

BELOW: dict[str, set[str]] = {
    "utils": set(),
    "config": {"utils"},
    "geometry": {"utils"},
    "datasets": {"utils"},
    "modules": {"utils"},
    "models": {"modules", "utils"},
    "preparation": {"datasets", "geometry", "utils"},
    "trainers": {"models", "modules", "datasets", "geometry", "utils", "config"},
    # The tokenizer reads what the trainer writes and prepares a shape as the preparation does.
    "pipelines": {"trainers", "preparation", "models", "modules", "datasets", "geometry", "utils", "config"},
}
"""What each part of trellis may import besides itself; parts that are not listed are the edge and may import all."""
EDGE = {"cli", "doctor", "doctor_probes"}

HEAVY = ["scipy", "warp", "trimesh", "pyvista", "vtk", "vtkmodules", "nibabel", "SimpleITK", "dask", "distributed",
         "triton"]
"""What training on a GPU node must not need."""


def library_files() -> list[Path]:
    return sorted((ROOT / "trellis").rglob("*.py"))


def all_files() -> list[Path]:
    folders = ("dataset_toolkits", "scripts", "examples", "benchmarks")
    edge = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    train = [ROOT / "train.py"] if (ROOT / "train.py").exists() else []
    return [*library_files(), *edge, *train]


def imported_names(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a module, function-level ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}"


def package_of(path: Path) -> list[str]:
    return list(path.relative_to(ROOT).parent.parts)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def part_of(path: Path) -> str:
    """`utils` of trellis/utils/blocks.py, `cli` of trellis/cli.py, `` of trellis/__init__.py."""
    inner = path.relative_to(ROOT / "trellis").with_suffix("").parts
    return "" if inner == ("__init__",) else inner[0]


def offending_imports(part: str, names: Iterator[tuple[int, str]]) -> list[str]:
    """Imports of `names` that the table does not grant to `part`."""
    found = []
    for line, name in names:
        pieces = name.split(".")
        if pieces[0] in {"dataset_toolkits", "scripts", "train", "tests", "benchmarks", "examples"}:
            found.append(f"line {line}: {name} (the library imports no script)")
        if pieces[0] != "trellis" or len(pieces) < 2:
            continue
        target = pieces[1]
        if part not in EDGE and target not in {part, *BELOW.get(part, set())}:
            found.append(f"line {line}: trellis.{part or '__init__'} -> {name}")
    return found


def test_every_part_is_in_the_table():
    parts = {part_of(path) for path in library_files()} - {""}
    assert parts <= set(BELOW) | EDGE, "a new part of trellis has no place in the table of arrows"


def test_table_has_no_cycle():
    seen: set[str] = set()
    while len(seen) < len(BELOW):
        ready = {part for part, below in BELOW.items() if part not in seen and below <= seen}
        assert ready, f"the arrows run in a circle among {set(BELOW) - seen}"
        seen |= ready


def test_arrows_hold():
    problems = [
        f"{path.relative_to(ROOT)}: {problem}"
        for path in library_files()
        for problem in offending_imports(part_of(path), imported_names(parse(path), package_of(path)))
    ]
    assert not problems, "\n".join(problems)


def test_arrow_check_can_fail():
    source = "def f():\n    from trellis.modules.quantizers import x\nfrom ..models import base\nimport train\n"
    names = list(imported_names(ast.parse(source), ["trellis", "geometry"]))
    assert (3, "trellis.models.base") in names
    assert len(offending_imports("geometry", iter(names))) == 3


def star_imports(tree: ast.AST) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]


def test_no_star_imports():
    problems = [f"{path.relative_to(ROOT)}:{line}" for path in all_files() for line in star_imports(parse(path))]
    assert not problems, problems


def test_library_does_not_print():
    problems = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in library_files()
        if part_of(path) != "cli"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not problems, f"print() inside the library: {problems}"


PICKLE_READERS = {"pickle.load", "pickle.loads", "pickle.Unpickler", "pickle.*", "_pickle.loads"}


def unsafe_loads(tree: ast.AST) -> list[str]:
    """Calls and imports that could run code from a file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            from_module = getattr(node, "module", None)
            names = [f"{from_module}.{alias.name}" if from_module else alias.name for alias in node.names]
            unsafe = {"dill", "joblib", "cloudpickle", "marshal", "shelve", "yaml"}
            found += [f"line {node.lineno}: import {name}" for name in names if name.split(".")[0] in unsafe]
            found += [f"line {node.lineno}: import {name}" for name in names if name in PICKLE_READERS]
        if isinstance(node, ast.Attribute) and ast.unparse(node) in PICKLE_READERS:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: k.value for k in node.keywords}
        if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
            found.append(f"line {node.lineno}: {node.func.id}()")
        if not (isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)):
            continue
        called = f"{node.func.value.id}.{node.func.attr}"
        required = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
        required["numpy.load"] = required["np.load"]
        if called in required:
            name, wanted = required[called]
            given = keywords.get(name)
            if not (isinstance(given, ast.Constant) and given.value is wanted):
                found.append(f"line {node.lineno}: {called} without {name}={wanted}")
    return found


def test_nothing_is_unpickled():
    problems = [f"{path.relative_to(ROOT)}: {problem}" for path in all_files() for problem in unsafe_loads(parse(path))]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "from pickle import load",
        "import joblib.numpy_pickle",
        "import pickle\npickle.loads(b)",
        "eval(text)",
    ],
)
def test_unsafe_load_check_can_fail(source: str):
    assert unsafe_loads(ast.parse(source))


IMPORT_ALL = """
import importlib, json, pkgutil, sys
import torch, numpy, safetensors
before = set(sys.modules)
import trellis
names = ["trellis.models", "trellis.modules", "trellis.trainers", "trellis.datasets"]
for name in list(names):
    package = importlib.import_module(name)
    if hasattr(package, "__path__"):
        for info in pkgutil.walk_packages(package.__path__, name + "."):
            if info.name not in sys.argv[1:]:
                importlib.import_module(info.name)
print("\\n" + json.dumps(sorted(set(sys.modules) - before)))
"""


def kernel_modules() -> set[str]:
    """Dotted names of modules that import Triton at their top, by themselves or through another such module."""
    top_level = {}
    for path in library_files():
        nodes = [node for node in parse(path).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {name for node in nodes for _, name in imported_names(node, package_of(path))}
        top_level[".".join(path.relative_to(ROOT).with_suffix("").parts)] = names
    found: set[str] = set()
    while True:
        # `from package import module` and `from module import name` both count
        needs = {m for m, names in top_level.items() for n in names if {n, n.rpartition(".")[0]} & (found | {"triton"})}
        if needs <= found:
            return found
        found |= needs


def test_kernels_have_their_place():
    """Whatever needs Triton as soon as it is imported is a kernel's module, and is called so."""
    for name in kernel_modules():
        package, _, last = name.rpartition(".")
        assert package.startswith("trellis.modules.sparse"), name
        assert package.endswith(".kernels") or last.startswith("triton"), name


def test_training_imports_are_light():
    """In a fresh interpreter: everything that training imports, beyond what torch brings by itself."""
    command = [sys.executable, "-c", IMPORT_ALL, *sorted(kernel_modules())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = {name.split(".")[0] for name in json.loads(done.stdout.strip().splitlines()[-1])}
    assert not loaded & set(HEAVY), f"training pulls in {sorted(loaded & set(HEAVY))}"
    assert done.stdout.strip().count("\n") == 0, f"importing prints: {done.stdout[:500]}"


def test_files_open_with_a_sentence():
    problems = [
        str(path.relative_to(ROOT))
        for path in all_files()
        if parse(path).body and not (ast.get_docstring(parse(path)) or "").strip()
    ]
    assert not problems, f"no module docstring: {problems}"


def test_gpu_tests_run_where_only_training_does():
    """`-m gpu` imports the files that hold such tests alone, and these need no more than training does."""
    spec = importlib.util.spec_from_file_location("the_conftest", ROOT / "tests" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    config = SimpleNamespace(getoption=lambda name: "gpu")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    kept = [path for path in files if conftest.pytest_ignore_collect(path, config) is None]
    names = {path.name for path in kept}
    assert {"test_triton_conv.py", "test_training_cuda.py"} <= names and "test_bad_sources.py" not in names
    problems = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in kept
        for node in parse(path).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for _, name in imported_names(node, package_of(path))
        if name.split(".")[0] in HEAVY
    ]
    assert not problems, problems
    config = SimpleNamespace(getoption=lambda name: "not gpu")
    assert all(conftest.pytest_ignore_collect(path, config) is None for path in files)
