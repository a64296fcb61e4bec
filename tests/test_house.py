"""Rules that a machine can check: levels, no import circles, light import, no code from files, short files."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from conftest import SIXTHS, sixth_of
from source_files import files_by_folder

SRC = Path(__file__).parents[1] / "src" / "rarefy"
FILES = sorted(SRC.rglob("*.py"))
FOLDERS = files_by_folder(SRC)
# from the bottom; an import goes to the same unit or to a lower level
LEVELS = [
    {"common"},
    {"model"},
    {"calibration", "evaluation", "formats", "dependency", "data", "onnx"},
    {"prune", "runtime"},
    {"train", "quantization", "lowrank", "structured", "compiler"},
    {"recipe", "generation", "compat"},
    {"checkpoint", "migration"},
    {"pipeline"},
    {"search"},
    {"__init__", "cli", "integrations"},
    {"__main__"},
]
LEVEL = {unit: i for i, units in enumerate(LEVELS) for unit in units}


def unit_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(["rarefy", *path.relative_to(SRC).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_of(p): p for p in FILES}


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Return the nodes of a file that rules are about: imports and calls."""
    kinds = ast.Import | ast.ImportFrom | ast.Call
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


@cache
def imports(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, wherever in it."""
    modules = set()
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rarefy":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                modules.add(full if full in MODULES else str(node.module))
    return modules - {module_of(path)}


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_down(folder):
    for path in FOLDERS[folder]:
        unit = unit_of(path)
        assert unit in LEVEL, f"{unit} has no level"
        others = {unit_of(MODULES[m]) for m in imports(path)} - {unit}
        wrong = {u for u in others if LEVEL[u] >= LEVEL[unit]}
        assert not wrong, f"{path.name} imports {wrong}, which is not on a lower level"


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Return a circle of a directed graph as a path that ends where it begins, [] where there is none."""
    done, stack = set(), list[str]()

    def visit(node: str) -> list[str]:
        if node in stack:
            return [*stack[stack.index(node) :], node]
        if node in done:
            return []
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if circle := visit(other):
                return circle
        stack.pop()
        done.add(node)
        return []

    return next((c for node in sorted(edges) if (c := visit(node))), [])


def test_no_import_circles():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    files = {module: imports(path) for module, path in MODULES.items()}
    assert not circles(files)
    units: dict[str, set[str]] = {}
    for module, others in files.items():
        unit = unit_of(MODULES[module])
        units.setdefault(unit, set()).update({unit_of(MODULES[m]) for m in others} - {unit})
    assert not circles(units)


@pytest.mark.parametrize("unit", ["runtime", "formats"])
def test_what_runs_models_needs_no_calibration(unit):
    reached, left = set(), [m for m in MODULES if m.startswith(f"rarefy.{unit}")]
    while left:
        module = left.pop()
        reached.add(module)
        left += imports(MODULES[module]) - reached
    assert not {m for m in reached if m.startswith("rarefy.calibration")}


@pytest.mark.parametrize("unit", ["runtime", "formats"])
def test_what_runs_models_needs_no_options(unit):
    code = f"import sys, pkgutil, importlib, rarefy.{unit} as unit\n"
    code += f"[importlib.import_module(m.name) for m in pkgutil.iter_modules(unit.__path__, 'rarefy.{unit}.')"
    code += " if not m.name.endswith('_kernels')]\nprint(sorted({'pydantic', 'ruamel'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_code_from_files(folder):
    banned = {"pickle", "dill", "joblib", "importlib.import_module"}
    for path in FOLDERS[folder]:
        calls = {"eval", "exec", "__import__", "importlib.import_module", "torch.load", "yaml.load"}
        if path != SRC / "__init__.py":  # whose table names its own modules
            calls |= {"import_module"}
        for node in nodes_of(path):
            if isinstance(node, ast.Call):
                safe = ast.unparse(node.func) == "torch.load" and "weights_only=True" in map(ast.unparse, node.keywords)
                assert safe or ast.unparse(node.func) not in calls, f"{path}: {ast.unparse(node.func)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {a.name for a in node.names} & banned, path


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_private_or_deprecated_part_of_torch_for_onnx(folder):
    names = {(path, n) for path in FOLDERS[folder] for node in nodes_of(path) for n in imported(node)}
    assert not [(p, n) for p, n in names if n.startswith(("torch.ao", "torch.onnx._", "torch.onnx.symbolic"))]


# units that native calls, or the tensors that they read, come from; other threads may set torch's default type
OF_NATIVE_CALLS = (
    "runtime",
    "compiler",
    "generation",
    "formats",
    "onnx",
    "checkpoint",
    "integrations",
    "calibration",
    "quantization",
    "evaluation",
)
NEW_TENSORS = ("empty", "zeros", "ones", "full", "tensor", "eye", "linspace", "rand", "randn")


def test_new_tensors_name_their_type():
    """Without one, a tensor has torch's default type, which transformers changes for all threads while it loads."""
    unnamed = [
        f"{path.relative_to(SRC)}: {ast.unparse(node)}"
        for path in FILES
        if unit_of(path) in OF_NATIVE_CALLS
        for node in nodes_of(path)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{n}" for n in NEW_TENSORS}
        if not {"dtype", None} & {k.arg for k in node.keywords}
    ]
    assert not unnamed


def imported(node: ast.AST) -> list[str]:
    """Return the full names that an import statement names."""
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_files_stay_short():
    long = {str(p.relative_to(SRC)): n for p in FILES if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_import_is_light():
    """Python's own modules alone are loaded, and few of ours: seconds would depend on the machine's load."""
    code = """
import sys
before = set(sys.modules)
import rarefy
loaded = set(sys.modules) - before
print(sum(name.partition(".")[0] == "rarefy" for name in loaded))
print(",".join(sorted({name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"rarefy"})))
print(len(loaded))
import rarefy.pipeline.compress
print(",".join(sorted({"transformers", "torchvision", "matplotlib", "typer", "rich"} & set(sys.modules))))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, others, count, heavy = ran.stdout.splitlines()
    assert int(ours) <= 8 and others == "" and int(count) < 100 and heavy == ""


# gigabytes whatever the case, and packages that only the slow tests install
SLOW_ALONE = {
    "tests/calibration/test_offload_memory.py",
    "tests/integrations/test_lm_eval.py",
    "tests/onnx/test_detector.py",
}


class Collector:
    """A plugin that keeps what an inner run of pytest selects: node ids, and which of them are slow."""

    def __init__(self, *words: str):
        self.slow: dict[str, bool] = {}
        options = ["--collect-only", "-qq", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
        code = pytest.main([*options, *words], plugins=[self])
        assert code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)

    def pytest_collection_finish(self, session):
        self.slow = {item.nodeid: item.get_closest_marker("slow") is not None for item in session.items}


def test_each_slow_test_is_in_one_sixth_and_each_file_has_a_quick_test(request):
    """Quick tests and six sixths are all tests; no file, and so no subject, waits for the slow tests alone."""
    root = str(request.config.rootpath / "tests")
    slow = Collector(root).slow
    assert len(slow) > 8000
    files = {node.partition("::")[0] for node in slow}
    quick = {node.partition("::")[0] for node, is_slow in slow.items() if not is_slow}
    assert files - quick <= SLOW_ALONE
    sizes = Counter(sixth_of(node) for node, is_slow in slow.items() if is_slow)
    assert set(sizes) == set(range(SIXTHS)) and max(sizes.values()) < 1.2 * min(sizes.values())


@pytest.mark.slow
def test_sixths_are_selected(request):
    file = str(request.config.rootpath / "tests" / "runtime" / "test_native_headers.py")
    every = Collector(file).slow
    sixths = [Collector(file, "--sixth", str(k)).slow for k in range(SIXTHS)]
    assert all(sixths) and all(all(part.values()) for part in sixths)
    assert sorted(node for part in sixths for node in part) == sorted(n for n, is_slow in every.items() if is_slow)
    assert not any(Collector(file, "-m", "not slow").slow.values())


def test_sixths_do_not_move():
    """A test stays in its sixth on every machine and beside any other tests."""
    assert [sixth_of(f"tests/test_{name}.py::test_it[0.5]") for name in "abcdef"] == [0, 2, 5, 5, 0, 0]
