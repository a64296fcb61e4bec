"""Recipe files as other tools really wrote them: comments, anchors, formulas, licences, several in one README."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy
from helpers.vision_models import Small
from helpers.vision_models import data as batches
from rarefy.common.errors import RecipeError
from rarefy.migration.folder import migrate_folder, write_entries
from rarefy.migration.translate import Request
from rarefy.recipe import parser

RECIPES = Path(__file__).parent / "recipes"
VARIABLES = {"start_quant_epoch": 9, "warm_up_epochs": 1, "pruning_epochs": 7}


class Encoder(Small):
    """With layers that have the names of the recipes."""

    def __init__(self):
        super().__init__()
        names = ("query", "value")
        layers = nn.ModuleList(
            nn.ModuleDict(
                {"attention": nn.ModuleDict({n: nn.Linear(32, 32) for n in names}), "output": nn.Linear(32, 32)}
            )
            for _ in range(4)
        )
        self.encoder = nn.ModuleDict({"layer": layers})
        self.classifier = nn.Linear(32, 5)

    def forward(self, x):
        x = self.features(x)
        for layer in self.encoder["layer"].children():
            attention = layer["attention"]
            x = x + layer["output"]((attention["query"](x) * attention["value"](x)).tanh()).relu()
        return self.classifier(x) + self.out(x)


ATTENTION = {f"encoder.layer.{i}.attention.{n}": None for i in range(4) for n in ("query", "value")}
SPARSITIES = {
    "text_anchors.md": {**dict.fromkeys(ATTENTION, 0.75), "encoder.layer.0.output": 0.75, "encoder.layer.1.output": 0},
    "text_pruned_quantized.md": {**dict.fromkeys(ATTENTION, 0.5), "encoder.layer.3.output": 0.5},
    "image_three_groups.md": {"encoder.layer.0.attention.query": 0.4, "hidden": 0.5, "more": 0.6},
    "detection_warmup.md": {"hidden": 0.3, "more": 0.7, "encoder.layer.0.output": 0.7},
    "segmentation_formulas.md": {"encoder.layer.0.output": 0.5, "hidden": 0.75, "more": 0.75},
    "transfer_phases.md": {"hidden": 0, "encoder.layer.3.output": 0.5},
    "transfer_new_head.md": {"more": 0.5, "encoder.layer.0.output": 0.5},
    "one_modifier_per_layer.yaml": {"hidden": 0.75, "encoder.layer.1.attention.value": 0.75},
    "names_twice.yaml": {f"encoder.layer.{i}.output": 0.8 for i in range(4)},
    "words_in_formulas.yaml": {"more": 0},
    "alternating.md": {},
    "early_names.yaml": {"hidden": 0.6, "more": 0.8, "encoder.layer.1.output": 0.8},
    "one_shot_tags.yaml": {"hidden": 0.5, "encoder.layer.0.output": 0.5},
    "second_order.md": {"hidden": 0.35},
    "block_surgeon.yaml": {"encoder.layer.2.output": 0.5, "hidden": 0},
    "stages.yaml": {"encoder.layer.0.output": 0.5},
    "stages_early_scheme.yaml": {},
    "stages_prune_again.yaml": {"encoder.layer.0.output": 0.5, "encoder.layer.2.output": 0},
    "stages_without_values.yaml": {"hidden": 0.5, "more": 0.5},
    "stages_wanda.yaml": {"hidden": 0.5, "encoder.layer.1.output": 0.5},
    "merge_keys.yaml": {"hidden": 0.6, "more": 0.8},
    "dense.yaml": {"hidden": 0},
    "no_front_matter.md": {"hidden": 0.5},
    "open_front_matter.md": {"more": 0.7},
}
REFUSED = {
    "activation_regularization.yaml": r"ASRegModifier has no counterpart: it makes .* \[activation_regularization.yaml line 18\]",
    "float_scheme.yaml": r"numbers of type 'float' are not supported; int is \[float_scheme.yaml line 3\]",
}
QUANTIZED_TO_ZERO = {"stages_early_scheme.yaml", "one_shot_tags.yaml", "stages.yaml", "text_pruned_quantized.md"}


def variables_of(name):
    return VARIABLES if name == "stages_without_values.yaml" else None


def zeros(weight):
    return float((weight == 0).float().mean())


@pytest.mark.parametrize("name", SPARSITIES)
def test_files_translate_and_run(name):
    made = rarefy.migrate(RECIPES / name, variables=variables_of(name))
    torch.manual_seed(0)
    model = Encoder().eval()
    if name.startswith("transfer"):  # of a sparse model
        rarefy.prune_(model, sparsity=0.5, layers=["encoder.layer.*.output"])
        rarefy.fold_(model)
    few = {"epochs": 2} if any(type(s).__name__ == "Train" or hasattr(s, "epochs") for s in made.recipe.stages) else {}
    rarefy.compress_(model, made.recipe, {"calibrate": batches(), "train": batches()}, **few)
    for layer, sparsity in SPARSITIES[name].items():
        got = zeros(rarefy_weight(model.get_submodule(layer)))
        assert got == pytest.approx(sparsity, abs=0.03) or (name in QUANTIZED_TO_ZERO and got > sparsity), layer


def rarefy_weight(layer):
    weight = layer.weight
    return weight.dequantize() if hasattr(weight, "dequantize") and not weight.is_floating_point() else weight


def test_every_file_is_known():
    assert {p.name for p in RECIPES.iterdir()} == {*SPARSITIES, *REFUSED, "README.md", "other_framework.yaml"}
    assert len(REFUSED) <= 0.1 * len(SPARSITIES)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_named(name):
    with pytest.raises(RecipeError, match=REFUSED[name]):
        rarefy.migrate(RECIPES / name)


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path):
    for name in ("text_anchors.md", "one_modifier_per_layer.yaml", "stages.yaml"):
        text = (RECIPES / name).read_text()
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        assert rarefy.migrate(tmp_path / name).text == rarefy.migrate(RECIPES / name).text


def test_lines_are_those_of_the_file(tmp_path):
    text = (RECIPES / "text_anchors.md").read_text()
    (tmp_path / "r.md").write_text(text.replace("leave_enabled: True", "final_sparsity: much"))
    line = 1 + text.splitlines().index("  - !GMPruningModifier")
    with pytest.raises(RecipeError, match=rf"expected final_sparsity as a number, got 'much' \[r.md line {line}\]"):
        rarefy.migrate(tmp_path / "r.md")


def test_of_a_key_that_is_written_twice_the_last_value_counts():
    text = rarefy.migrate(RECIPES / "one_modifier_per_layer.yaml").text
    assert "# line 19: mask_type is written twice; the last value counts" in text and "pattern: 1x4" in text
    text = rarefy.migrate(RECIPES / "names_twice.yaml").text
    assert "# line 12: num_epochs is written twice" in text and "epochs: 12" in text
    assert "init_sparsity is written twice" not in text  # with the same value


def test_a_method_after_another_becomes_a_stage():
    first, second = rarefy.migrate(RECIPES / "alternating.md").recipe.stages
    assert (first.epochs, second.epochs) == (34, 6)
    assert (first.prune.method, first.prune.sparsity, second.prune.method, second.prune.first) == ("alternate", 0.75, "gradual", 0.75)  # fmt: skip
    assert (first.prune.start, first.prune.end, second.prune.start, second.prune.end) == pytest.approx((2 / 34, 30 / 34, 0, 1))  # fmt: skip


def test_quantization_comes_after_pruning():
    stages = [s.to_dict() if hasattr(s, "to_dict") else s for s in rarefy.migrate(RECIPES / "stages_prune_again.yaml").recipe.stages]  # fmt: skip
    text = rarefy.migrate(RECIPES / "stages_prune_again.yaml").text
    assert len(stages) == 3 and text.count("- prune:") == 2 and text.rindex("- prune:") < text.index("- quantize:")
    assert "pattern: 2:4" in text and "damping: 0.02" in text and "smooth: 0.5" in text
    assert "ignored without layers to quantize: LlamaRMSNorm, SiLUActivation" in text
    text = rarefy.migrate(RECIPES / "stages_early_scheme.yaml").text
    assert text.count("- quantize:") == 1 and "name: obs" in text and "damping: 0.05" in text
    assert "no counterpart of scheme_overrides of Embedding" in text


def test_a_readme_with_several_recipes_asks_which():
    readme = RECIPES / "README.md"
    with pytest.raises(RecipeError) as caught:
        rarefy.migrate(readme)
    for part in ("README.md holds 3 recipes: pass block=NUMBER (shell: pass --block NUMBER)", "1: line 20, EpochRangeModifier, GMPruningModifier;", "3: line 68, SparseGPTModifier"):  # fmt: skip
        assert part in str(caught.value)
    assert rarefy.migrate(readme, block=1).recipe.stages[0].epochs == 12
    assert rarefy.migrate(readme, block=2).recipe.stages[0].keep_zeros
    assert rarefy.migrate(readme, block=3).tool == "llm-compressor"
    for wrong in (0, 4, True, "1"):
        with pytest.raises(RecipeError, match=f"block: expected a number from 1 to 3, .*; got {wrong!r}"):
            rarefy.migrate(readme, block=wrong)
    with pytest.raises(
        RecipeError, match="block: expected a number from 1 to 1, since dense.yaml holds 1 recipe; got 2"
    ):
        rarefy.migrate(RECIPES / "dense.yaml", block=2)


STAGED = RECIPES / "stages_without_values.yaml"


def test_variables_without_a_value_are_named():
    with pytest.raises(RecipeError) as caught:
        rarefy.migrate(STAGED)
    assert str(caught.value).startswith("variables 'start_quant_epoch', 'warm_up_epochs', 'pruning_epochs' have no value: pass variables={'start_quant_epoch': VALUE, ")  # fmt: skip
    assert "[stages_without_values.yaml line 4]" in str(caught.value)
    with pytest.raises(RecipeError, match=r"variable 'pruning_epochs' has no value: pass .*--set pruning_epochs=VALUE"):
        rarefy.migrate(STAGED, variables={"warm_up_epochs": 1, "start_quant_epoch": 9})
    with pytest.raises(RecipeError, match=r"has no value \(did you mean 'pruning_epoch'\?\)"):
        rarefy.migrate(STAGED, variables={"warm_up_epochs": 1, "start_quant_epoch": 9, "pruning_epoch": 7})


def test_given_variables_go_first():
    made = rarefy.migrate(RECIPES / "words_in_formulas.yaml", variables={"num_epochs": 20, "mask_type": [1, 4]})
    assert made.recipe.stages[0].epochs == 20 and str(made.recipe.stages[0].prune.pattern) == "1x4"
    assert "# num_epochs = 20 was given" in made.text
    made = rarefy.migrate(STAGED, variables=VARIABLES)
    assert made.recipe.stages[0].prune.start == pytest.approx(1 / 9)
    for wrong, says in {
        "num_epoch": r"unknown variable 'num_epoch'; choose from .*\(did you mean 'num_epochs'\?\)",
        "zzz": "unknown variable 'zzz'; choose from",
    }.items():
        with pytest.raises(RecipeError, match=says):
            rarefy.migrate(RECIPES / "words_in_formulas.yaml", variables={wrong: 3})
    with pytest.raises(RecipeError, match="variable 'x' has no effect: the recipe has no variables"):
        rarefy.migrate(RECIPES / "stages.yaml", variables={"x": 3})
    with pytest.raises(RecipeError, match="variables have no effect on a config of nncf"):
        rarefy.migrate({"compression": {"algorithm": "magnitude_sparsity"}}, variables={"x": 3})
    with pytest.raises(RecipeError, match=r"variable mask_type is \[1, 4\]; arithmetic takes numbers"):
        rarefy.migrate({"mask_type": [1, 4], "modifiers": [{"!EpochRangeModifier": {"end_epoch": "eval(mask_type + 1)"}}]})  # fmt: skip
    with pytest.raises(RecipeError, match="expected text, numbers, lists and dicts in a config, got Tensor"):
        rarefy.migrate(STAGED, variables={"x": torch.ones(2)})


def test_variables_of_a_file_in_the_same_folder(tmp_path):
    shutil.copy(STAGED, tmp_path / "r.yaml")
    (tmp_path / "train.yaml").write_text("seed: 3\nrecipe_args:\n  warm_up_epochs: 1\n  pruning_epochs: 7\n")
    (tmp_path / "more.json").write_text('{"start_quant_epoch": 9}')
    (tmp_path / "other.yaml").write_text("pruning_epochs: 3\nmodifiers: []\n")  # a recipe has its own
    (tmp_path / "broken.yaml").write_text("pruning_epochs: [")
    made = rarefy.migrate(tmp_path / "r.yaml")
    assert made.recipe == rarefy.migrate(STAGED, variables=VARIABLES).recipe
    assert "# warm_up_epochs = 1 is from train.yaml line 3" in made.text
    (tmp_path / "again.yaml").write_text("pruning_epochs: 8\n")
    with pytest.raises(
        RecipeError, match=r"pruning_epochs is 8 in again.yaml line 1 and 7 in train.yaml line 4: pass "
    ):
        rarefy.migrate(tmp_path / "r.yaml")
    assert rarefy.migrate(tmp_path / "r.yaml", variables={"pruning_epochs": 7}).recipe == made.recipe


def test_a_folder(tmp_path):
    entries = migrate_folder(RECIPES, Request(variables=VARIABLES))
    assert [e.name for e in entries if e.migrated is None] == list(REFUSED)
    assert {"README.md#1", "README.md#3"} <= {e.name for e in entries} and len(entries) == len(SPARSITIES) + 6
    write_entries(entries, tmp_path / "new", force=False)
    written = sorted(p.name for p in (tmp_path / "new").iterdir())
    assert len(written) == len(entries) - 2 and {"README.1.yaml", "alternating.yaml"} <= set(written)
    for path in (tmp_path / "new").iterdir():
        assert parser.load(path).stages
    with pytest.raises(RecipeError, match=r"README.1.yaml exists: pass --force, or give another folder"):
        write_entries(entries, tmp_path / "new", force=False)
    write_entries(entries, tmp_path / "new", force=True)
    with pytest.raises(RecipeError, match=f"{tmp_path / 'new'} holds no recipe of another tool: looked into 28 files"):
        migrate_folder(tmp_path / "new", Request())
    with pytest.raises(RecipeError, match="unknown variable 'zzz'"):
        migrate_folder(RECIPES, Request(variables={"zzz": 1, **VARIABLES}))


def test_equal_names_in_a_folder_stay_apart(tmp_path):
    text = (RECIPES / "dense.yaml").read_text()
    (tmp_path / "in").mkdir()
    for name in ("a.yaml", "a.md", "in/a.yaml", ".hidden.yaml"):
        (tmp_path / name).write_text(text)
    (tmp_path / "notes.md").write_text("# no recipe")
    (tmp_path / "hyp.yaml").write_text("lr0: 0.1")
    (tmp_path / "broken.yaml").write_text("modifiers: [")
    (tmp_path / "nncf.json").write_text('{"compression": {"algorithm": "magnitude_sparsity"}}')
    entries = migrate_folder(tmp_path, Request())
    assert [e.name for e in entries] == ["a.md", "a.yaml", "broken.yaml", "in/a.yaml", "nncf.json"]
    assert [e.why_not for e in entries if e.why_not] == ["broken.yaml line 1: not YAML: expected the node content, but found '<stream end>'"]  # fmt: skip
    write_entries(entries, tmp_path / "out", force=False)
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.yaml")) == ["a.md.yaml", "a.yaml.yaml", "in/a.yaml", "nncf.yaml"]  # fmt: skip
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="file is a file: --out takes a folder where the source is one"):
        write_entries(entries, tmp_path / "file", force=False)


WRONG = {
    "a folder": (lambda p: p, "is a folder: give one of its files, or run `rarefy migrate"),
    "no file": (lambda p: p / "nowhere.yaml", "no file .*nowhere.yaml'"),
    "a misspelt name": (lambda p: write(p / "recipe.yaml", b"").with_name("recpie.yaml"), r"no file .*recpie.yaml' \(did you mean .*recipe.yaml'\?\)"),
    "a checkpoint": (lambda p: write(p / "m.safetensors", b"\x00\xff"), "m.safetensors is a checkpoint; migrate reads recipes"),
    "bytes": (lambda p: write(p / "r.yaml", b"modifiers:\xff"), "r.yaml: a recipe is UTF-8 text; byte 10 is not: invalid start byte"),
    "python": (lambda p: write(p / "r.py", b"modifiers = 1"), "r.py is Python code: save the text of its recipe as a .yaml file"),
    "our own": (lambda p: write(p / "r.yaml", b"stages:\n- prune: {sparsity: 0.5}\n"), r"is a recipe of Rarefy already: .* \[r.yaml line 1\]"),
    "a typo": (lambda p: write(p / "r.yaml", b"modifers:\n  - !GMPruningModifier {}\n"), r"neither modifiers nor a config of a known tool \(did you mean 'modifiers' by 'modifers'\?\): .* \[r.yaml line 1\]"),
    "no modifiers": (lambda p: write(p / "r.yaml", b"modifiers: []\n"), r"no modifiers below the keys that end in modifiers"),
    "an alias of nothing": (lambda p: write(p / "r.yaml", b"modifiers:\n  - !EpochRangeModifier {end_epoch: *n}\n"), r"r.yaml line 2: \*n repeats nothing: no value before it has &n"),
    "a merge of a word": (lambda p: write(p / "r.yaml", b"modifiers:\n  - !EpochRangeModifier {<<: x}\n"), "r.yaml line 2: << merges keys and values, got 'x'"),
    "words only": (lambda p: write(p / "r.md", b"# Words\n\nThe modifiers: none\n"), "r.md holds no recipe: expected YAML with modifiers between"),
}  # fmt: skip


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name, tmp_path):
    source, says = WRONG[name]
    with pytest.raises(RecipeError, match=says):
        rarefy.migrate(source(tmp_path))


def test_from_a_shell(tmp_path, capfd, monkeypatch):
    from rarefy.cli import main

    def rarefy_(*words):
        monkeypatch.setattr(sys, "argv", ["rarefy", "migrate", *map(str, words)])
        monkeypatch.setattr(main, "_leave", lambda error: None)
        with pytest.raises(SystemExit) as end:
            main.main()
        return (end.value.code or 0, *capfd.readouterr())

    code, out, _ = rarefy_(RECIPES)
    assert code == 1 and "migrated: 27 of 30" in out and "recipe " in out.splitlines()[1]
    assert "pass --set start_quant_epoch=VALUE --set warm_up_epochs=VALUE" in out
    given = [f"--set={k}={v}" for k, v in VARIABLES.items()]
    code, out, _ = rarefy_(RECIPES, "--skip", "--json", *given)
    assert code == 1 and json.loads(out)["summary"] == {"migrated": "29 of 30"}
    (tmp_path / "one").mkdir()
    shutil.copy(STAGED, tmp_path / "one")
    code, out, _ = rarefy_(tmp_path / "one", "--out", tmp_path / "new", *given)
    assert (
        code == 0 and (tmp_path / "new" / STAGED.name).read_text() == rarefy.migrate(STAGED, variables=VARIABLES).text
    )
    code, out, _ = rarefy_(STAGED, *given)
    assert code == 0 and out == rarefy.migrate(STAGED, variables=VARIABLES).text
    code, out, _ = rarefy_(RECIPES / "words_in_formulas.yaml", "--set", "mask_type=[1, 4]", "--set", "init_lr=2e-4")
    assert code == 0 and "pattern: 1x4" in out and "lr: 0.0002" in out
    assert rarefy_(RECIPES / "README.md", "--block", "2")[0] == 0
    for words, says in {
        (RECIPES / "README.md",): "README.md holds 3 recipes: pass --block NUMBER for one of them.",
        (RECIPES, "--block", "1"): "--block names a recipe of one file: leave it out",
        (STAGED, "--set", "warm_up_epochs"): "--set 'warm_up_epochs': expected name=value, such as num_epochs=10",
        (STAGED, "--set", "a=1", "--set", "a=2"): "--set a is given twice",
        (STAGED, "--set", "a=["): "--set a line 1: not YAML",
    }.items():
        code, out, err = rarefy_(*words)
        assert code == 2 and says in err and not out


def bomb(levels, width=9):
    return "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width) if i else 'x'}]" for i in range(levels))


TAIL = "\nmodifiers:\n  - !EpochRangeModifier {end_epoch: 3}\n"
HOSTILE = {
    "laughs": (bomb(12) + TAIL, "more than 10,000 values, aliases"),
    "laughs of mappings": ("\n".join(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9)) if i else 'x: 1'}}}" for i in range(12)) + TAIL, "more than 10,000 values"),
    "laughs by merging": ("a0: &a0 {x: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)) + TAIL, "more than 10,000 values"),
    "a chain": ("a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 2000)) + TAIL, "more than 10,000 values"),
    "a cycle": ("a: &a [*a]" + TAIL, r"line 1: \*a is part of the value that it repeats"),
    "a cycle of mappings": ("a: &a {b: {c: *a}}" + TAIL, r"line 1: \*a is part of the value that it repeats"),
    "a cycle by merging": ("a: &a {<<: *a}" + TAIL, r"line 1: \*a is part of the value that it repeats"),
    "a cycle of formulas": ("a: eval(b)\nb: eval(a)\n" + TAIL.replace("3", "eval(a)"), "depends on itself"),
    "a long word many times": ("w: &w " + "x" * 60_000 + "\nl: [" + "*w, " * 1000 + "]" + TAIL, "no modifiers|r.yaml|migrated"),
    "values": ("a: [" + "1, " * 21_000 + "]" + TAIL, "more than 10,000 values"),
    "keys": ("".join(f"k{i}: 1\n" for i in range(6000)) + TAIL, "migrated"),
    "depth": ("a: " + "[" * 30_000, "nested deeper than a recipe may be"),
    "depth of blocks": ("- " * 30_000, "nested deeper than a recipe may be"),
    "depth of questions": ("? " * 30_000, "expected a string as key"),
    "length": ("#" * 70_000 + TAIL, "at most 65,536"),
    "documents": ("---\n" * 15_000 + "a: 1", "not YAML: but found another document|no known|neither modifiers"),
    "anchors": ("".join(f"- &a{i} x\n" for i in range(6000)), "more than 10,000 values|not a recipe"),
    "a long formula": ("a: eval(" + "1 + " * 10_000 + "1)" + TAIL.replace("3", "eval(a)"), "the expression has 40,001 characters"),
    "blanks before a key": ("\n" * 60_000 + "x: 1", "neither modifiers"),
    "one long line": (" " * 60_000 + "x", "not a recipe"),
}  # fmt: skip
SCRIPT = """
import json, resource, sys, time
import rarefy
from rarefy.common.errors import RecipeError
rarefy.migrate([{"tensor_fqn": "fc.weight", "sparsity_level": 0.5}])  # imports what is needed
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
results = {}
for path in sys.argv[1:]:
    began = time.process_time()
    try:
        rarefy.migrate(path)
        said = "migrated"
    except RecipeError as error:
        said = str(error)
    results[path] = (time.process_time() - began, said)
print(json.dumps(results))
"""


@pytest.mark.slow
def test_hostile_files_are_refused_within_two_seconds_and_a_gigabyte(tmp_path):
    names = {}
    for name, (text, _) in HOSTILE.items():
        path = tmp_path / (name.replace(" ", "_") + ".yaml")
        path.write_text(text)
        names[str(path)] = name
    (tmp_path / "laughs.md").write_text(f"---\n{HOSTILE['laughs'][0]}\n---\n")
    (tmp_path / "fences.md").write_text("```yaml\nmodifiers:\n" * 12_000)
    (tmp_path / "marks.md").write_text("---\nmodifiers:\n" * 12_000)
    paths = [*names, *(str(p) for p in tmp_path.glob("*.md"))]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *paths], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    slow = {Path(p).name: seconds for p, (seconds, _) in results.items() if seconds > 2}
    assert not slow
    for path, name in names.items():
        assert re.search(HOSTILE[name][1], results[path][1]), (name, results[path][1])
    assert all(len(said) < 600 for _, said in results.values())
    refused = {Path(p).stem for p, (_, said) in results.items() if said != "migrated"}
    assert {"laughs", "fences", "marks"} <= refused


def test_a_hostile_file_in_a_folder_is_one_row(tmp_path):
    shutil.copy(RECIPES / "dense.yaml", tmp_path)
    (tmp_path / "bomb.yaml").write_text(bomb(12) + TAIL)
    began = time.process_time()
    entries = migrate_folder(tmp_path, Request())
    assert time.process_time() - began < 4
    assert [(e.name, bool(e.migrated)) for e in entries] == [("bomb.yaml", False), ("dense.yaml", True)]
