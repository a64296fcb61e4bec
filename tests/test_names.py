"""Retired names stay retired: files and identifiers that were metaphors or everyday words.

Also: every public name has a docstring with arguments, what it returns and an example, and functions stay short.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest

import rarefy
from rarefy.common.options import Options
from source_files import files_by_folder

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "rarefy"
FOLDERS = files_by_folder(SRC)

OLD_FILES = [
    "account.py",
    "adapters/__init__.py",
    "adapters/lightning.py",
    "adapters/trainer.py",
    "api.py",
    "cli.py",
    "commands.py",
    "compat/arithmetic.py",
    "compat/compressed_tensors.py",
    "compat/configs.py",
    "compat/draft.py",
    "compat/from_onnx.py",
    "compat/migrate.py",
    "compat/modifiers.py",
    "compat/onnx.py",
    "compat/onnx_codes.py",
    "compat/onnx_fused.py",
    "compat/onnx_graph.py",
    "compat/onnx_modules.py",
    "compat/onnx_proof.py",
    "compat/onnx_read.py",
    "compat/sparseml.py",
    "compat/withdrawn.py",
    "csrc/emulated.hpp",
    "csrc/generic.hpp",
    "csrc/image.hpp",
    "csrc/kernels.hpp",
    "csrc/panels.hpp",
    "csrc/pixels.hpp",
    "csrc/plan.cpp",
    "csrc/rarefy.cpp",
    "csrc/rows.hpp",
    "csrc/sell.hpp",
    "csrc/settle.hpp",
    "csrc/steps.hpp",
    "csrc/table.h",
    "csrc/threads.h",
    "csrc/unfold.hpp",
    "cut/absent.py",
    "cut/ask.py",
    "cut/attributes.py",
    "cut/columns.py",
    "cut/config.py",
    "cut/cut.py",
    "cut/depth.py",
    "cut/heads.py",
    "cut/optimizers.py",
    "cut/permute.py",
    "cut/plan.py",
    "cut/readers.py",
    "cut/repair.py",
    "cut/score.py",
    "cut/structure.py",
    "cut/surgery.py",
    "data.py",
    "doctor.py",
    "engine/cache.py",
    "engine/compiled.py",
    "engine/convolve.py",
    "engine/formulas.py",
    "engine/heads.py",
    "engine/images.py",
    "engine/language.py",
    "engine/lower.py",
    "engine/operators.py",
    "engine/outputs.py",
    "engine/phrases.py",
    "engine/plan.py",
    "engine/prove.py",
    "engine/sizes.py",
    "engine/stored.py",
    "engine/text.py",
    "engine/timed.py",
    "engine/trace.py",
    "engine/words.py",
    "engine/writing.py",
    "engine/written.py",
    "errors.py",
    "files.py",
    "formats/bits.py",
    "formats/sparse.py",
    "formats/values.py",
    "given.py",
    "migration.py",
    "model/attach.py",
    "model/attention.py",
    "model/axes.py",
    "model/experts.py",
    "model/gram.py",
    "model/graph.py",
    "model/grid.py",
    "model/inputs.py",
    "model/layer_rules.py",
    "model/mask.py",
    "model/operators.py",
    "model/pages.py",
    "model/ranks.py",
    "model/rules.py",
    "model/select.py",
    "model/shards.py",
    "model/stats.py",
    "model/taps.py",
    "model/walk.py",
    "nodes.py",
    "plan.py",
    "progress.py",
    "proof/bench.py",
    "proof/evaluate.py",
    "proof/measure.py",
    "proof/receipt.py",
    "proof/report.py",
    "prune/allocate.py",
    "prune/estimate.py",
    "prune/journal.py",
    "prune/pattern.py",
    "prune/reconstruct.py",
    "prune/score.py",
    "prune/search.py",
    "prune/solve.py",
    "prune/solver.py",
    "prune/stage.py",
    "recipe.py",
    "runtime/choices.py",
    "runtime/choose.py",
    "runtime/forms.py",
    "runtime/layers.py",
    "runtime/native.py",
    "runtime/observe.py",
    "runtime/ops.py",
    "runtime/packed.py",
    "runtime/pages.py",
    "runtime/squares.py",
    "runtime/table.py",
    "runtime/ways.py",
    "samples.py",
    "shell.py",
    "stages.py",
    "store.py",
    "train/answers.py",
    "train/logs.py",
    "train/loop.py",
    "train/methods.py",
    "train/plans.py",
    "train/schedule.py",
    "training.py",
    "values/activations.py",
    "values/factors.py",
    "values/fit.py",
    "values/gptq.py",
    "values/lowrank.py",
    "values/quantize.py",
    "values/rounding.py",
    "values/share.py",
    "values/smooth.py",
    "values/tie.py",
]

EVERYDAY = set(["told", "how", "most", "least", "kept", "found", "made", "some", "here", "there", "given", "asked"])
CLASSES = {"Ask", "Asked", "Given", "Places", "Made", "Segment", "Alone", "Traced", "Written"}
FUNCTIONS = set(
    [
        "put",
        "added",
        "new_constant",
        "drop",
        "parts",
        "thirds",
        "written",
        "gained",
        "heads",
        "_settle",
        "settle_bytes",
        "taken_apart",
        "put_together",
    ]
)
OPERATORS = {"product", "times", "average", "rotate", "recall", "planes", "attend"}
STEP_FIELDS = {"more", "apart", "few", "wait", "least"}
PARAMETERS = {"values", "work", "choices", "teach", "least", "at_most_worse"}


def bound_names(tree: ast.AST) -> list[tuple[int, str, str]]:
    """Return (line, name, kind) of all that a file binds: functions, classes, arguments, variables, attributes."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.append((node.lineno, node.name, "function"))
        elif isinstance(node, ast.ClassDef):
            names.append((node.lineno, node.name, "class"))
        elif isinstance(node, ast.arg):
            names.append((node.lineno, node.arg, "argument"))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.id, "variable"))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.attr, "attribute"))
    return names


def retired(name: str, kind: str) -> bool:
    bare = name.strip("_")
    return (
        bare in EVERYDAY
        or (kind == "class" and name in CLASSES)
        or (kind == "function" and (name in FUNCTIONS or bare in EVERYDAY))
        or re.match(r"_?(MOST|LEAST|most|least)_", name) is not None
    )


def test_the_check_finds_a_retired_name():
    tree = ast.parse("def put(told):\n    MOST_SIZES = told\nclass Segment: pass")
    assert [n for _, n, k in bound_names(tree) if retired(n, k)] == ["put", "Segment", "told", "MOST_SIZES"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_retired_identifiers(folder):
    names = [(path, *found) for path in FOLDERS[folder] for found in bound_names(ast.parse(path.read_text()))]
    assert not [f"{path}:{line}: {name}" for path, line, name, kind in names if retired(name, kind)]


def test_no_retired_files():
    assert not [f for f in OLD_FILES if (ROOT / f if f.startswith("csrc/") else SRC / f).exists()]


def test_no_retired_operators_and_step_fields():
    header = (ROOT / "csrc" / "rarefy.h").read_text()
    step = re.search(r"struct rarefy_step \{(.*?)\n\}", header, re.DOTALL)
    assert step is not None
    words = set(re.findall(r"[a-z_]+", re.sub(r"/\*.*?\*/|//[^\n]*", "", step[1], flags=re.DOTALL)))
    assert not words & STEP_FIELDS
    from rarefy.compiler import ops

    assert not [name for name in OPERATORS if hasattr(ops, name)]


PUBLIC = [n for n in rarefy.__all__ if not n.startswith("__")]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    thing = getattr(rarefy, name)
    text = inspect.getdoc(thing) or ""
    assert re.match(r"[^.]*?\S.*?[.:](\s|$)", text, re.DOTALL), "a first sentence"
    assert ">>>" in text, "an example"
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return
    if inspect.isclass(thing) and issubclass(thing, Options):
        assert not [f for f, field in thing.model_fields.items() if not field.description]
        return
    parameters = [p for p in inspect.signature(thing).parameters if p not in ("self", "args", "kwargs", "overrides")]
    missing = [p for p in parameters if not re.search(rf"^\s*\**{p}\b.*:", text, re.MULTILINE)]
    assert not missing, f"parameters without a line: {missing}"
    if not inspect.isclass(thing):
        assert "Returns:" in text or "Yields:" in text


@pytest.mark.parametrize("name", PUBLIC)
def test_no_retired_parameters(name):
    thing = getattr(rarefy, name)
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return
    assert not set(inspect.signature(thing).parameters) & PARAMETERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_functions_stay_short(folder):
    long = []
    for node in (n for path in FOLDERS[folder] for n in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None
            first = node.body[0]
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            if (length := (node.end_lineno or 0) - node.lineno + 1 - docstring) > 70:
                long.append(f"{node.name}: {length} lines")
    assert not long
