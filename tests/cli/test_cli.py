"""The command line as users meet it: files whole or absent, JSON alone on standard output, one line for each mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rarefy
from conftest import Net, shell, text_model, tree
from rarefy.data import builtin
from rarefy.model import hf
from rarefy.recipe import parser as recipes
from rarefy.runtime import bindings

RECIPE = """\
name: tiny
about: for the tests of the command line
data: {calibrate: text.txt, samples: 4, tokens: 16, batch: 2}
stages:
  - prune: {pattern: 2:4, score: wanda}
  - cast: {dtype: bf16}
evaluate: {metric: perplexity, data: text.txt, samples: 4, tokens: 16}
"""
HALF = "name: half\nstages: [{prune: {score: random, sparsity: 0.5}}]\n"


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with a tiny language model, its tokenizer, a text and recipes; tests do not change it."""
    folder = tmp_path_factory.mktemp("given")
    text_model(folder)
    (folder / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "half.yaml").write_text(HALF, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def packed(given, tmp_path_factory) -> Path:
    """The model above, compressed by the real command in a process of its own."""
    out = tmp_path_factory.mktemp("packed") / "out"
    ran = shell("compress", given / "model", "-r", given / "tiny.yaml", "-o", out, "--json")
    assert ran.returncode == 0, ran.stderr
    (out.parent / "stdout").write_text(ran.stdout)
    (out.parent / "stderr").write_text(ran.stderr)
    return out


def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))


# compress


def test_json_is_alone_on_standard_output_and_in_the_folder(packed):
    printed = json.loads((packed.parent / "stdout").read_text())
    assert printed == json.loads((packed / "receipt.json").read_text())
    assert printed["name"] == "tiny" and printed["quality"]["metric"] == "perplexity"
    assert printed["sparsity"]["achieved"] == 0.5 and {r["pattern"] for r in printed["sparsity"]["layers"]} == {"2:4"}
    assert f"written to {packed}" in (packed.parent / "stderr").read_text()
    assert "Traceback" not in (packed.parent / "stderr").read_text()


def test_the_folder_holds_what_the_receipt_says(packed, given):
    receipt = json.loads((packed / "receipt.json").read_text())
    model = rarefy.load(packed)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    zeros = sum(
        int((dict(model.named_parameters())[f"{r['layer']}.weight"] == 0).sum()) for r in receipt["sparsity"]["layers"]
    )
    assert zeros == receipt["sparsity"]["zeros"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (packed / name).read_bytes() == (given / "model" / name).read_bytes()
    stored = sum(f.stat().st_size for f in packed.glob("*.safetensors"))
    assert receipt["disk"]["after"] < stored < receipt["disk"]["after"] + 10_000  # the names take some room
    assert not list(packed.parent.glob(".*"))


def test_the_receipt_is_printed(run, given, tmp_path):
    words = ("compress", given / "model", "--recipe", given / "tiny.yaml", "--out", tmp_path / "out", "--threads", 1)
    ran = run(*words)
    assert ran.code == 0 and ran.out.startswith("Receipt: tiny\n") and "perplexity" in ran.out
    assert "1 threads" in ran.out and f"written to {tmp_path / 'out'}" in ran.err and "calibrating wanda" in ran.err
    whole = (tmp_path / "out" / "receipt.txt").read_text()
    assert "model.layers.*" in whole and "model.layers.*" not in ran.out  # the table of layers is for --verbose
    assert {*ran.out.splitlines()} < {*whole.splitlines()}
    verbose = run(*words, "--verbose", "--force").out
    assert "model.layers.*" in verbose and verbose == (tmp_path / "out" / "receipt.txt").read_text() + "\n"
    bars = [line for line in ran.err.splitlines() if not line.startswith("written to")]
    assert bars and max(map(len, bars)) <= 80  # a progress bar fits its line
    assert "evaluating all" not in ran.err and "note: perplexity was measured on 1 batch\n" in ran.out
    ran = run(*words, "--force", "--set", "evaluate.samples=null")
    count = re.search(
        r"^evaluating all (\d+) batches, before and after; evaluate.samples=24 reads less$", ran.err, re.M
    )
    assert count and f"note: perplexity was measured on {count[1]} batches, all of the data\n" in ran.out


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_verbose_with_no_text_to_print(run, given, tmp_path, option):
    ran = run("compress", given / "model", "-r", given / "tiny.yaml", "-o", tmp_path / "out", "--verbose", option)
    assert ran.code == 2 and "--verbose has no effect with --json, which has all rows, or with --quiet" in ran.err


def test_quiet_prints_nothing(run, given, tmp_path):
    ran = run("compress", given / "model", "-r", given / "tiny.yaml", "-o", tmp_path / "out", "-q")
    assert (ran.code, ran.out) == (0, "") and (tmp_path / "out" / "rarefy.json").is_file()
    assert ran.err == ""  # no bars of other libraries either


def test_quiet_json_is_json(run, given, tmp_path):
    ran = run("compress", given / "model", "-r", given / "half.yaml", "-o", tmp_path / "out", "-q", "--json")
    assert ran.code == 0 and json.loads(ran.out)["name"] == "half"


def test_a_dry_run_writes_nothing(run, given, tmp_path):
    before = tree(given)
    ran = run("compress", given / "model", "-r", given / "tiny.yaml", "-o", tmp_path / "out", "--dry-run")
    assert ran.code == 0 and ran.out.startswith("dry run of tiny: nothing computed\n") and "layers: 14 of 15" in ran.out
    ran = run("compress", given / "model", "-r", given / "tiny.yaml", "--dry-run", "--json")
    summary = json.loads(ran.out)["summary"]
    assert ran.code == 0 and summary["bytes expected"] < summary["bytes now"]
    ran = run("compress", given / "model", "-r", given / "tiny.yaml", "--dry-run", "--quiet")
    assert (ran.code, ran.out) == (0, "")
    assert not list(tmp_path.iterdir()) and tree(given) == before


def random_masks(run, given, out, *words) -> dict[str, torch.Tensor]:
    assert run("compress", given / "model", "-r", given / "half.yaml", "-o", out, "-q", *words).code == 0
    return {n: p == 0 for n, p in rarefy.load(out).named_parameters()}


def test_a_field_as_an_option_is_explained(run, given, tmp_path):
    words = ("compress", given / "model", "-r", given / "half.yaml", "-o", tmp_path / "out")
    hint = "rarefy: sparsity is a field of the recipe: pass --set sparsity=0.4\n"
    for more in (["--sparsity", "0.4"], ["--sparsity=0.4"]):
        ran = run(*words, *more)
        assert ran.code == 2 and ran.err.endswith(hint) and "No such option" in ran.err
    ran = run("compress", given / "model", "--data", "wiki")  # an option, and a field too
    assert ran.code == 2 and "is a field" not in ran.err


def test_the_seed_decides(run, given, tmp_path):
    first, same, other = (random_masks(run, given, tmp_path / str(i), "--seed", s) for i, s in enumerate((5, 5, 6)))
    assert all(torch.equal(m, same[n]) for n, m in first.items())
    assert not all(torch.equal(m, other[n]) for n, m in first.items())
    assert json.loads((tmp_path / "0" / "receipt.json").read_text())["settings"]["seed"] == 5


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["--set", "sparsity=0.25"], {"sparsity": 0.25, "pattern": "unstructured", "layers": None}),
        (["--set", "sparsity=null", "--set", "pattern=1:4"], {"sparsity": None, "pattern": "1:4"}),
        (["--set", "pattern=4x1", "--set", "layers=model.layers.0.*"], {"pattern": "4x1", "layers": ["model.layers.0.*"]}),
        (["--set", "ignore=[model.layers.0.*, model.layers.1.*mlp*]"], {"ignore": ["model.layers.0.*", "model.layers.1.*mlp*"]}),
        (["--set", "layers=re:model.*q_proj"], {"layers": ["re:model.*q_proj"]}),
        (["--set", "layers=[re:model.*q_proj, re:model.*k_proj]"], {"layers": ["re:model.*q_proj", "re:model.*k_proj"]}),
        (["--set", "ignore=*.mlp.*"], {"ignore": ["*.mlp.*"]}),
        (["--set", "sparsity=2.5e-1"], {"sparsity": 0.25}),
        (["--set", "sparsity=25e-2"], {"sparsity": 0.25}),
    ],
)  # fmt: skip
def test_set_replaces_fields(run, given, tmp_path, words, want):
    ran = run("compress", given / "model", "-r", given / "half.yaml", "-o", tmp_path / "out", "-q", *words)
    assert ran.code == 0, ran.err
    [stage] = json.loads((tmp_path / "out" / "rarefy.json").read_text())["meta"]["recipe"]["stages"]
    assert {k: stage["prune"][k] for k in want} == want


def test_data_of_the_command_line(run, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text((given / "text.txt").read_text()[::-1].replace("w", "w1 w"))
    words = (
        "compress",
        given / "model",
        "-r",
        given / "tiny.yaml",
        "-q",
        "--data",
        "mine.txt",
        "--eval-data",
        "mine.txt",
    )
    assert run(*words, "-o", "out").code == 0  # relative to here, not to the recipe
    recipe = json.loads((tmp_path / "out" / "rarefy.json").read_text())["meta"]["recipe"]
    assert recipe["data"]["calibrate"] == recipe["evaluate"]["data"] == str(tmp_path / "mine.txt")


def test_data_for_a_recipe_that_names_none(run, given, tmp_path):
    (tmp_path / "r.yaml").write_text("stages: [{prune: {pattern: 2:4, score: wanda}}]\n")
    words = ("compress", given / "model", "-r", tmp_path / "r.yaml", "-o", tmp_path / "out", "-q", "--set", "seed=1")
    ran = run(*words)
    assert ran.code == 2 and "no calibrate data: name it in the recipe, or pass --data FILE\n" in ran.err
    (tmp_path / "long.txt").write_text(" ".join([(given / "text.txt").read_text()] * 100))
    ran = run(*words, "--data", tmp_path / "long.txt")
    assert ran.code == 0, ran.err


def test_an_output_folder_that_exists_is_left_alone(run, given, tmp_path):
    out = tmp_path / "out"
    words = ("compress", given / "model", "-r", given / "half.yaml", "-q", "-o", out)
    assert run(*words).code == 0
    before = tree(out)
    ran = run(*words, "--seed", 9)
    assert ran.code == 2 and ran.out == "" and tree(out) == before
    assert ran.err == f"rarefy: {out} exists and is a Rarefy folder; pass --force, or another name\n"
    assert run(*words, "--seed", 9, "--force").code == 0
    after = tree(out)
    assert after.keys() == before.keys() and after["weights-00001.safetensors"] != before["weights-00001.safetensors"]


def test_force_does_not_replace_what_is_not_ours(run, given, tmp_path):
    for name in ("full", "deep"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "deep" / "rarefy.json").write_text("{}")
    (tmp_path / "deep" / "more").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in (
        ("full", "it contains thesis.tex"),
        ("deep", "it contains more"),
        ("file", "is a file; give the name of a folder"),
    ):
        ran = run("compress", given / "model", "-r", given / "half.yaml", "-q", "-o", tmp_path / name, "--force")
        assert ran.code == 2 and message in ran.err, ran.err
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work" and (tmp_path / "file").read_text() == "x"
    assert (tmp_path / "deep" / "more").is_dir()


def test_a_failed_check_is_exit_code_1_and_writes_the_folder(run, given, tmp_path):
    words = ("compress", given / "model", "-r", given / "tiny.yaml", "-o", tmp_path / "out")
    ran = run(*words, "--set", "max_degradation=-0.9")
    assert ran.code == 1 and "OVER -90%" in ran.out
    assert ran.err.rstrip().endswith("check failed: perplexity got worse than the recipe allows")
    assert json.loads((tmp_path / "out" / "receipt.json").read_text())["quality"]["passed"] is False
    assert rarefy.load(tmp_path / "out")
    ran = run(*words, "--set", "max_degradation=1.0", "--force")
    assert ran.code == 0 and "within 100%" in ran.out


# what is wrong


GO = "compress {model} -r {half} -o {out}"
MISTAKES = {
    "no such model": ("compress smolm2-135m -r {half} -o {out}", "no model folder 'smolm2-135m' and no built-in model of that name (smollm2-135m, minilm); did you mean 'smollm2-135m'?"),
    "nothing like it": ("compress zzz -r {half} -o {out}", "no model folder 'zzz' and no built-in model of that name (smollm2-135m, minilm)"),
    "an empty folder": ("compress {tmp}/empty -r {half} -o {out}", "empty is neither a folder written by Rarefy nor a Hugging Face folder (no config.json)"),
    "a file": ("compress {model}/model.safetensors -r {half} -o {out}", "is neither a folder written by Rarefy nor a Hugging Face folder"),
    "a config of nothing": ("compress {tmp}/nonsense -r {half} -o {out}", "nonsense: the config is not usable: "),
    "dry run of nothing": ("compress {tmp}/empty -r {half} --dry-run", "empty: a dry run needs the model's config.json"),
    "no such recipe": ("compress {model} -r smollm2-dmo -o {out}", "did you mean 'smollm2-demo'?"),
    "a wrong field in the recipe": ("compress {model} -r {tmp}/odd.yaml -o {out}", "odd.yaml line 3: stages[0].prune: unknown field 'sparsty'"),
    "a wrong field in --set": (GO + " --set sparsty=0.4", "unknown override 'sparsty'; choose from "),
    "a wrong value in --set": (GO + " --set sparsity=1.4", "sparsity: expected a number between 0 and 1, got 1.4"),
    "--set without a value": (GO + " --set sparsity", "--set 'sparsity': expected field=value, such as sparsity=0.4"),
    "--set without a name": (GO + " --set =4", "--set '=4': expected field=value"),
    "--set that is no YAML": (GO + " --set layers=[a", "--set 'layers=[a'"),
    "--set with a date for a number": (GO + " --set sparsity=2024-13-45", "expected a number between 0 and 1, got '2024-13-45'"),
    "no --out": ("compress {model} -r {half}", "compress needs --out FOLDER (or --dry-run)"),
    "no such data": ("compress {model} -r {tiny} -o {out} --data wiky", "did you mean wiki"),
    "data too short": ("compress {model} -r {tiny} -o {out} --data {tmp}/short.txt", "short.txt is too short: 2 tokens make 0 windows of 16; 4 are needed (64 tokens): give more text"),
    "held-out data too short": ("compress {model} -r {tiny} -o {out} --eval-data {tmp}/short.txt", "rarefy: evaluate "),
    "--eval-data without evaluate": (GO + " --eval-data wiki", "evaluate"),
    "no layer matches": (GO + " --set layers=model.layer.*", "layers: 'model.layer.*' matches no layer; nearest: "),
    "no layer matches, dry": ("compress {model} -r {half} --dry-run --set layers=model.layer.*", "layers: 'model.layer.*' matches no layer; nearest: "),
    "a large seed": (GO + " --seed 99999999999999999999999", "seed: expected a whole number from 0 to 4294967295"),
    "inspect nothing": ("inspect {tmp}/zzz", "no model folder"),
    "inspect an empty folder": ("inspect {tmp}/empty", "expected a saved folder, a folder with .safetensors files, or a .safetensors or .gguf file"),
    "inspect a text": ("inspect {tmp}/short.txt", "expected a saved folder"),
    "bench nothing": ("bench {tmp}/empty", "is neither a folder written by Rarefy nor a Hugging Face folder"),
    "bench against nothing": ("bench {model} --against zzz", "no model folder 'zzz'"),
    "export a plain folder": ("export {model} -o {out}", "model is not a Rarefy folder: it looks like a Hugging Face folder"),
    "export nothing": ("export {tmp}/zzz -o {out}", "zzz"),
    "recipes of no name": ("recipes smollm2-dmo", "did you mean 'smollm2-demo'?"),
    "recipes of no name, JSON": ("recipes smollm2-dmo --json", "did you mean 'smollm2-demo'?"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(run, given, tmp_path, case):
    (tmp_path / "odd.yaml").write_text("name: a\nstages:\n  - prune: {sparsty: 0.5}\n")
    (tmp_path / "short.txt").write_text("w1 w2")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nonsense").mkdir()
    (tmp_path / "nonsense" / "config.json").write_text("{not json")
    places = {
        "model": given / "model",
        "half": given / "half.yaml",
        "tiny": given / "tiny.yaml",
        "tmp": tmp_path,
        "out": tmp_path / "out",
    }
    words, message = MISTAKES[case]
    ran = run(*(word.format(**places) for word in words.split()))
    mine = [l for l in ran.err.splitlines() if l.startswith("rarefy: ")]
    assert ran.code == 2 and ran.out == "" and len(mine) == 1 and message in mine[0], ran
    assert ran.err.rstrip().endswith(mine[0]) and "Traceback" not in ran.err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "m", "-r", "x", "--wrong"], "--wrong"),
        (["compress", "m", "-r", "x", "--sed", "3"], "--seed"),
        (["compress", "m"], "--recipe"),
        (["compress"], "model"),
        (["comprss"], "compress"),
        (["compress", "m", "-r", "x", "--seed", "three"], "--seed"),
        (["compress", "m", "-r", "x", "--threads", "0"], "--threads"),
        (["bench", "m", "--repeats", "1"], "--repeats"),
        (["bench", "m", "--tokens", "0"], "--tokens"),
        (["export", "m"], "--out"),
    ],
)
def test_wrong_options_are_exit_code_2(run, words, message):
    ran = run(*words)
    assert ran.code == 2 and ran.out == "" and message in ran.err


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_damaged_model_folder_is_named(run, given, tmp_path, name):
    (tmp_path / "model").mkdir()
    for file, content in tree(given / "model").items():
        (tmp_path / "model" / file).write_bytes(content if file != name else content[: len(content) // 2])
    ran = run(
        "compress",
        tmp_path / "model",
        "-r",
        given / "tiny.yaml",
        "--data",
        given / "text.txt",
        "-o",
        tmp_path / "out",
        "-q",
    )
    assert ran.code == 2 and f"rarefy: {tmp_path / 'model'}" in ran.err and not (tmp_path / "out").exists()


def test_the_real_command_does_not_show_a_traceback(given, tmp_path):
    ran = shell("compress", "smolm2", "-r", given / "half.yaml", "-o", tmp_path / "out")
    assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("rarefy: no model folder 'smolm2'") and not list(tmp_path.iterdir())


def test_help_names_every_command(run):
    ran = run("--help")
    assert ran.code == 0 and all(c in ran.out for c in ("compress", "inspect", "bench", "export", "recipes", "doctor"))
    assert "Exit code 1: quality fell" in run("compress", "--help").out


def test_interrupting_leaves_nothing(given, tmp_path):
    """Once metrics of an epoch are in the log, the process is in the middle of its work."""
    shutil.copy(given / "text.txt", tmp_path)
    (tmp_path / "r.yaml").write_text(
        "data: {train: text.txt, tokens: 16, batch: 2}\nstages: [{train: {epochs: 1000000}}]\n"
    )
    inside, log = tmp_path / "inside", tmp_path / "log.jsonl"
    # a shell's background job ignores SIGINT, and so would Python
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from rarefy.cli.main import main; main()"
    words = ["compress", given / "model", "-r", tmp_path / "r.yaml", "-o", inside / "a" / "out", "--log", log]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        for _ in range(600):
            if log.exists() and log.stat().st_size:
                break
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and out == ""
    assert err.rstrip().endswith("rarefy: interrupted; the output was not written") and "Traceback" not in err
    assert not inside.exists()


# inspect


def test_inspect_a_folder_of_ours(run, packed):
    ran = run("inspect", packed)
    assert ran.code == 0 and ran.out.startswith(f"{packed}\n") and "2:4" in ran.out and "tensors: " in ran.out
    report = json.loads(run("inspect", packed, "--json").out)
    rows = {r["tensor"]: r for r in report["rows"]}
    row = rows["model.layers.0.mlp.up_proj.weight"]
    assert (row["shape"], row["dtype"], row["sparsity"], row["pattern"]) == ("64x32", "bfloat16", 0.5, "2:4")
    assert row["dense_bytes"] == 64 * 32 * 2 and row["bytes"] < row["dense_bytes"] and row["format"] != "dense"
    receipt = json.loads((packed / "receipt.json").read_text())
    assert report["summary"]["bytes"] == sum(r["bytes"] for r in rows.values()) == receipt["disk"]["after"]


@pytest.mark.parametrize("what", ["model", "model/model.safetensors"])
def test_inspect_a_plain_checkpoint(run, given, what):
    report = json.loads(run("inspect", given / what, "--json").out)
    rows = {r["tensor"]: r for r in report["rows"]}
    assert rows["model.embed_tokens.weight"]["shape"] == "64x32" and rows["model.norm.weight"]["sparsity"] == 0
    assert {r["format"] for r in rows.values()} == {"dense"} and report["summary"]["ratio"] == 1


def test_inspect_a_damaged_file(run, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense" * 10)
    ran = run("inspect", tmp_path / "x.safetensors")
    assert ran.code == 2 and "x.safetensors: not a valid safetensors file" in ran.err


# export


def test_export_to_a_folder_that_transformers_loads(run, packed, given, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ran = run("export", packed, "--to", "hf", "-o", tmp_path / "hf")
    assert ran.code == 0 and f"exported to {tmp_path / 'hf'}" in ran.out
    ours = rarefy.load(packed)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids()).logits, theirs(input_ids=ids()).logits)
    assert theirs.dtype == torch.bfloat16 and theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("w1 w2")["input_ids"] == [4, 5]
    assert not (tmp_path / "hf" / "rarefy.json").exists()


def test_export_to_one_file(run, packed, tmp_path):
    from safetensors.torch import load_file

    ran = run("export", packed, "--to", "safetensors", "-o", tmp_path / "st", "--json")
    assert (
        ran.code == 0
        and json.loads(ran.out)["summary"]["bytes"] == (tmp_path / "st" / "model.safetensors").stat().st_size
    )
    state, want = load_file(tmp_path / "st" / "model.safetensors"), rarefy.load(packed).state_dict()
    assert set(want) == set(state)
    assert all(torch.equal(t, want[n]) for n, t in state.items())


def test_export_errors(run, packed, tmp_path):
    ran = run("export", packed, "--to", "onnx", "-o", tmp_path / "x")
    assert ran.code == 2 and "rarefy.export_onnx(model" in ran.err and not list(tmp_path.iterdir())
    ran = run("export", packed, "--to", "onyx", "-o", tmp_path / "x")
    assert (
        ran.code == 2 and "'onyx'; choose from compressed-tensors, gguf, hf" in ran.err and not list(tmp_path.iterdir())
    )
    rarefy.save(Net(), tmp_path / "net")
    ran = run("export", tmp_path / "net", "-o", tmp_path / "x")
    assert (
        ran.code == 2
        and "holds a Net, which is built in Python: rarefy.load(" in ran.err
        and not (tmp_path / "x").exists()
    )
    assert run("export", tmp_path / "net", "-o", tmp_path / "x", "--to", "safetensors").code == 0
    before = tree(tmp_path / "x")
    ran = run("export", packed, "-o", tmp_path / "x", "--to", "safetensors")
    assert ran.code == 2 and "exists" in ran.err and tree(tmp_path / "x") == before
    assert run("export", packed, "-o", tmp_path / "x", "--to", "safetensors", "--force").code == 0
    assert tree(tmp_path / "x") != before


# bench


def test_bench_two_models_in_turns(run, packed, given):
    ran = run(
        "bench",
        given / "model",
        "--against",
        packed,
        "--tokens",
        8,
        "--new",
        2,
        "--repeats",
        2,
        "--threads",
        1,
        "--json",
    )
    report = json.loads(ran.out)
    assert ran.code == 0 and [(r["what"], r["of"]) for r in report["rows"]] == [
        (k, m) for k in ("prefill", "decode") for m in ("model", "against", "engine")
    ]
    assert report["summary"]["threads"] == 1
    assert report["summary"]["bytes in memory, against"] < report["summary"]["bytes in memory, model"]


@pytest.mark.slow
def test_bench_with_layers_that_skip_zeros(run, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    words = ("bench", packed, "--accelerate", "--tokens", 8, "--new", 2, "--repeats", 2)
    report = json.loads(run(*words, "--json").out)
    assert {r["of"] for r in report["rows"]} == {"model", "accelerated", "engine"}
    assert re.fullmatch(r"\d+ of \d+", report["summary"]["layers that run sparse"])
    assert (tmp_path / "tuning_cache.json").is_file() == (bindings.missing() is None)
    ran = run(*words)
    assert ran.code == 0 and ran.out.startswith("bench\n") and "decode" in ran.out
    assert "layers that run sparse: " in ran.out and "instruction set" not in ran.out
    verbose = run(*words, "--verbose")
    assert verbose.code == 0 and verbose.out.startswith("bench\n") and "batch 8" in verbose.out
    assert verbose.out.index("decode") < verbose.out.index("accelerated\n")
    for more in ((), ("--accelerate", "--json"), ("--accelerate", "--quiet")):
        ran = run("bench", packed, "--verbose", *more)
        assert ran.code == 2 and "--verbose has no effect without --accelerate, nor with --json or --quiet" in ran.err


def test_bench_of_what_was_compiled(run, given, tmp_path):
    words = ("--tokens", 8, "--new", 2, "--repeats", 2, "--json", "-q")
    made, out = rarefy.decoder(hf.load_folder(given / "model")), tmp_path / "out"
    rarefy.save(made, out)
    report = json.loads(run("bench", out, *words).out)
    assert [(r["what"], r["of"]) for r in report["rows"]] == [("prefill", "model"), ("decode", "model")]
    report = json.loads(run("bench", given / "model", "--against", out, "--no-engine", *words).out)
    assert {r["of"] for r in report["rows"]} == {"model", "against"}
    for more, message in (
        (["--precision", "int8"], "--precision has no effect: "),
        (["--accelerate"], "--accelerate has no effect: "),
        (["--table", tmp_path / "t.json"], "--table has no effect: "),
    ):
        ran = run("bench", out, *more)
        assert ran.code == 2 and ran.out == "" and message in ran.err and "holds a decoder" in ran.err
    ran = run("bench", given / "model", "--no-engine", "--precision", "int8")
    assert ran.code == 2 and "--precision has no effect without the engine" in ran.err
    for more, message in (
        (["--batch", 4], "--batch has no effect: language models read and generate one text at a time"),
        (["--new", 2, "--table", tmp_path / "t.json"], "--new has no effect: no text is generated"),
    ):
        ran = run("bench", given / "model", *more)
        assert ran.code == 2 and ran.out == "" and message in ran.err and not (tmp_path / "t.json").exists()


# recipes, doctor


def test_recipes_are_listed(run):
    ran = run("recipes")
    assert ran.code == 0 and all(n in ran.out and recipes.load(n).about in ran.out for n in recipes.presets())
    rows = json.loads(run("recipes", "--json").out)["rows"]
    assert [r["recipe"] for r in rows] == list(recipes.presets())


def test_a_recipe_is_printed_as_it_is_written(run):
    ran = run("recipes", "smollm2-demo")
    assert ran.code == 0 and ran.out == recipes.presets()["smollm2-demo"].read_text()
    assert recipes.from_yaml(ran.out) == recipes.load("smollm2-demo")
    values = json.loads(run("recipes", "smollm2-demo", "--json").out)
    assert recipes.from_dict(values) == recipes.load("smollm2-demo")


def test_a_recipe_file_is_printed_too(run, given):
    ran = run("recipes", given / "tiny.yaml")
    assert ran.code == 0 and recipes.from_yaml(ran.out) == recipes.load(given / "tiny.yaml")


def test_the_schema_of_recipes_is_printed(run):
    schema = json.loads(run("recipes", "--schema").out)
    assert schema["$schema"].startswith("https://json-schema.org/") and "PruneOptions" in schema["$defs"]
    assert schema["$defs"]["PruneOptions"]["properties"]["sparsity"]["description"].startswith("fraction of zeros")
    ran = run("recipes", "--schema", "fast")
    assert ran.code == 2 and "--schema describes all recipes: leave 'fast' out" in ran.err


def test_doctor(run, monkeypatch):
    monkeypatch.setitem(
        builtin.SOURCES, "wiki", builtin.Source("no_such_package_x", "a", "pip install wiki-please", "MIT")
    )
    rows = {r["what"]: r for r in json.loads(run("doctor", "--json").out)["rows"]}
    assert rows["torch"]["is"] == torch.__version__
    assert rows["sample wiki"]["is"] == "missing" and rows["sample wiki"]["get it with"] == "pip install wiki-please"
    ran = run("doctor")
    assert ran.code == 0 and ran.out.startswith("rarefy doctor\n") and "pip install wiki-please" in ran.out


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["compress", "--help"], ["--show-completion", "bash"]])
def test_help_and_version_do_not_import_torch(words):
    code = (
        "import sys; from rarefy.cli.main import main\n"
        f"sys.argv = ['rarefy', *{words!r}]\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    env = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr
    assert ran.stderr.strip().splitlines()[-1] == "[]", ran.stderr


def test_warnings_are_lines_without_places_in_the_code(capsys, monkeypatch):
    import warnings

    from rarefy.cli import main as cli

    def warn(**_):
        warnings.warn("the values are small", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(cli, "app", warn)
        cli.main()
    assert capsys.readouterr().err == "rarefy: warning: the values are small\n"


def test_a_compressed_onnx_file_says_what_loads_and_exports_it(run, tmp_path):
    from helpers.onnx_files import export

    net, x = (
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval(),
        torch.randn(3, 4),
    )
    file = export(net, x, tmp_path / "net.onnx", 17)
    rarefy.save(rarefy.from_onnx(file), tmp_path / "saved")
    ran = run("bench", tmp_path / "saved")
    assert ran.code == 2 and "model=rarefy.from_onnx('FILE.onnx'))" in ran.err
    ran = run("export", tmp_path / "saved", "--to", "onnx", "-o", tmp_path / "there")
    assert ran.code == 2 and "rarefy.export_onnx(model, example, 'model.onnx')" in ran.err
    with pytest.raises(rarefy.common.errors.ContainerError, match=r"it is an ONNX file: rarefy.from_onnx reads it"):
        rarefy.load(file)
