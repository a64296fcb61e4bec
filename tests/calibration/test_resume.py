"""Long runs: what a killed one leaves, how the next goes on, and how little memory it can do with."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
import torch
from torch import nn

import rarefy
from conftest import Net, image_batches, text_model, tiny_llama
from helpers.interrupt import stopping
from helpers.marks import slow_case
from helpers.small_blocks import Decoder, lin, rows
from rarefy.calibration import offload, resume
from rarefy.cli import main
from rarefy.common import atomic_io
from rarefy.common.errors import ContainerError, DataError, PatternError, RarefyError, RecipeError
from rarefy.prune import layerwise, prune

LEARN = rarefy.Solver(name="refit", reconstruct=4, lr=1e-2)

HOWS = {
    "obs": "obs",
    "asymmetric": rarefy.Solver(name="admm", asymmetric=0.25, steps=3),
    "refit": rarefy.Solver(name="refit", refits=3),
    "reconstruct": rarefy.Solver(name="refit", asymmetric=0.25, reconstruct=2),
}


class Twice(nn.Module):
    """A layer called two times, with another between."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.a(self.b(self.a(x).relu()).relu())


def tokens(count=3):
    g = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(0, 64, (2, 24), generator=g)} for _ in range(count)]


MODELS = {
    "llama": (tiny_llama, tokens),
    "cnn": (lambda: Net().eval(), image_batches),
    "twice": (
        lambda: Twice().eval(),
        lambda: [torch.randn(9, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)],
    ),
}
CASES = [(m, h) for m in MODELS for h in HOWS if h != "reconstruct" or m == "llama"]


def fresh(name):
    torch.manual_seed(0)
    return MODELS[name][0]()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def counting(monkeypatch):
    """Return a list that grows with every group that is solved."""
    solved, real = [], layerwise._solve_group
    monkeypatch.setattr(layerwise, "_solve_group", lambda stop, *a: solved.append(stop) or real(stop, *a))
    return solved


@pytest.mark.parametrize(("name", "how"), [slow_case(*c) if i % 2 else c for i, c in enumerate(CASES)])
def test_an_interrupted_run_goes_on_to_the_same_bits(name, how, tmp_path, monkeypatch):
    data, what = MODELS[name][1](), {"sparsity": 0.5, "solver": HOWS[how]}
    want = fresh(name)
    rows = rarefy.prune_(want, data=data, resume_dir=tmp_path / "whole", **what).rows
    solved = counting(monkeypatch)
    rarefy.prune_(fresh(name), data=data, **what)
    count = len(list((tmp_path / "whole").glob("stop-*")))
    for writes in {1, count // 2, count - 1}:
        work = tmp_path / f"{writes}"
        with monkeypatch.context() as patch:
            stopping(patch, writes)
            with pytest.raises(KeyboardInterrupt):
                rarefy.prune_(fresh(name), data=data, resume_dir=work, **what)
        model, _ = fresh(name), solved.clear()
        again = rarefy.prune_(model, data=data, resume_dir=work, **what).rows
        assert same(model, want)
        assert len(solved) == sum(1 for i in range(writes, count) if how != "reconstruct" or i % 5 != 4)
        assert [dict(r, seconds=0) for r in again] == [dict(r, seconds=0) for r in rows]


def test_a_finished_run_only_passes(tmp_path, monkeypatch):
    first, second = fresh("llama"), fresh("llama")
    rarefy.prune_(first, sparsity=0.5, solver="obs", data=tokens(), resume_dir=tmp_path / "w")
    monkeypatch.setattr(layerwise, "_solve_group", lambda *a: pytest.fail("solved again"))
    rarefy.prune_(second, sparsity=0.5, solver="obs", data=tokens(), resume_dir=tmp_path / "w")
    assert same(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 0.6}, "sparsity 0.5 -> 0.6"),
        ({"sparsity": None, "pattern": "2:4"}, r"\(pattern 'unstructured' -> '2:4'\)"),
        ({"solver": "admm"}, r"\(solver 'obs' -> 'admm'\)"),
        ({"solver": {"name": "obs", "damping": 0.5}}, r"\(solver.damping 0.01 -> 0.5\)"),
        ({"data": tokens(2)}, "other data"),
        ({"model": lambda m: m.model.layers[1].mlp.up_proj.weight.data[3, 4].add_(1)}, "other weights"),
        ({"model": lambda m: setattr(m.model.layers[1].mlp, "act_fn", nn.Tanh())}, "other model"),
    ],
)
def test_the_state_of_another_run_is_neither_used_nor_lost(change, message, tmp_path):
    how = {"sparsity": 0.5, "solver": "obs", "data": tokens()}
    rarefy.prune_(fresh("llama"), resume_dir=tmp_path / "w", **how)
    before = {p.name: p.read_bytes() for p in (tmp_path / "w").iterdir()}
    model, change = fresh("llama"), dict(change)
    change.pop("model", lambda m: None)(model)
    with pytest.raises(ContainerError, match=f"holds the state of another run .*{message}.*remove .*w .*to start anew"):
        rarefy.prune_(model, resume_dir=tmp_path / "w", **(how | change))
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "w").iterdir()}


def test_an_allocation_is_searched_once(tmp_path, monkeypatch):
    data = [b | {"labels": b["input_ids"]} for b in tokens()]
    how = {"sparsity": 0.6, "solver": "obs", "data": data, "allocate": "search"}
    want, model, work = fresh("llama"), fresh("llama"), tmp_path / "w"
    rows = rarefy.prune_(want, **how).rows
    with monkeypatch.context() as patch:
        real = layerwise.calibrate_sequentially
        patch.setattr(
            layerwise,
            "calibrate_sequentially",
            lambda *a, **k: pytest.fail("killed") if "num_done" in k else real(*a, **k),
        )
        with pytest.raises(pytest.fail.Exception):
            rarefy.prune_(model, resume_dir=work, **how)
    assert {p.name for p in work.iterdir()} == {"key.json", "each.json"}
    monkeypatch.setattr(prune, "search_allocation", lambda *a, **k: pytest.fail("searched again"))
    with pytest.raises(ContainerError, match="another run .seed 0 -> 1"):
        rarefy.prune_(fresh("llama"), resume_dir=work, seed=1, **how)
    again = rarefy.prune_(model, resume_dir=work, **how).rows
    assert same(model, want) and [dict(r, seconds=0) for r in again] == [dict(r, seconds=0) for r in rows]
    file = work / "each.json"
    good = file.read_text()
    value = json.loads(good)
    name = next(iter(value["value"][0]))
    value["value"][0][name] = 7.0
    for text, message in [
        (good[:9], "each.json is damaged .*remove"),
        (json.dumps(value), "each.json is damaged or of another run"),
        (json.dumps(value | {"digest": resume.digest(json.dumps(value["value"]))}), "does not fit the model"),
    ]:
        file.write_text(text)
        with pytest.raises(ContainerError, match=message):
            rarefy.prune_(fresh("llama"), resume_dir=work, **how)


def test_another_loss_is_another_run(tmp_path):
    how = {"sparsity": 0.5, "solver": "obs", "allocate": "errors", "data": tokens(), "resume_dir": tmp_path / "w"}
    one, other = (lambda o, b, s=s: s * o.logits.square().mean() for s in (1.0, -1.0))
    want, again = fresh("llama"), fresh("llama")
    rarefy.prune_(want, loss=one, **how)
    rarefy.prune_(again, loss=one, **how)
    assert same(want, again)
    with pytest.raises(ContainerError, match="holds the state of another run .other loss"):
        rarefy.prune_(fresh("llama"), loss=other, **how)


def test_other_masks_are_another_run(tmp_path):
    data = [b | {"labels": b["input_ids"]} for b in tokens()]
    how = {"sparsity": 0.5, "solver": "refit", "score": "taylor", "data": data, "resume_dir": tmp_path / "w"}
    want, again = fresh("llama"), fresh("llama")
    rarefy.prune_(want, **how)
    rarefy.prune_(again, **how)
    assert same(want, again)
    with pytest.raises(ContainerError, match="holds the state of another run .other masks"):
        rarefy.prune_(fresh("llama"), loss=lambda output, batch: -output.logits.var(), **how)


def test_two_runs_do_not_share_a_state(tmp_path):
    how = {"sparsity": 0.5, "solver": "obs", "resume_dir": tmp_path / "w", "data": tokens()}
    first = resume.open_state(tmp_path / "w", {"a": 1})
    with pytest.raises(ContainerError, match="w is in use by another run; wait for it, or give another name"):
        rarefy.prune_(fresh("llama"), **how)
    first.close()
    (tmp_path / "w" / "key.json").unlink()
    rarefy.prune_(fresh("llama"), **how)


def test_what_lies_in_the_folder_is_not_trusted(tmp_path):
    how, work = {"sparsity": 0.5, "solver": "obs", "data": tokens()}, tmp_path / "w"
    rarefy.prune_(fresh("llama"), resume_dir=work, **how)
    file = work / "stop-000001.safetensors"
    good, other = file.read_bytes(), work / "stop-000000.safetensors"
    flipped = good[:-20] + bytes([good[-20] ^ 1]) + good[-19:]
    for bad in (good[:100], flipped, other.read_bytes(), b""):
        file.write_bytes(bad)
        with pytest.raises(ContainerError, match=r"stop-000001.* is damaged.*start anew|does not fit the model"):
            rarefy.prune_(fresh("llama"), resume_dir=work, **how)
    file.unlink()  # a hole: what comes after it is made again
    model, want = fresh("llama"), fresh("llama")
    rarefy.prune_(model, resume_dir=work, **how)
    rarefy.prune_(want, **how)
    assert same(model, want) and file.is_file()
    (work / "key.json").unlink()
    with pytest.raises(ContainerError, match="has no key.json"):
        rarefy.prune_(fresh("llama"), resume_dir=work, **how)
    (work / "key.json").write_text("{")
    with pytest.raises(ContainerError, match="its key.json is not readable"):
        rarefy.prune_(fresh("llama"), resume_dir=work, **how)


@pytest.mark.parametrize("name", ["thesis.txt", "key.json"])
def test_a_folder_of_someone_else_stays(name, tmp_path):
    how = {"sparsity": 0.5, "solver": "obs", "data": tokens()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("years of work")
    with pytest.raises(
        ContainerError, match=r"mine (is for the state of a run, but holds thesis|holds the state of an)"
    ):
        rarefy.prune_(fresh("llama"), resume_dir=tmp_path / "mine", **how)
    assert (tmp_path / "mine" / name).read_text() == "years of work"
    with pytest.raises(ContainerError, match=r"key.json|thesis.txt is a file; give the name of a folder"):
        rarefy.prune_(fresh("llama"), resume_dir=tmp_path / "mine" / name, **how)
    with pytest.raises(ContainerError, match=r"expected the path of a folder, got 3"):
        rarefy.prune_(fresh("llama"), resume_dir=3, **how)


KILLED_WHILE_SAVING = """
import resource, signal, sys
import torch
from safetensors.torch import save_file
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
save_file({"x": torch.zeros(100_000)}, sys.argv[1])
"""


def test_files_that_safetensors_has_not_finished_are_removed(tmp_path):
    """It writes to a file of another name first, which a kill leaves there."""
    work, key = tmp_path / "w", {"run": 1}
    with closing(resume.open_state(work, key)) as state:
        state.write(0, resume.StepState({"x": torch.ones(2)}, {}))
    process = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(work / "partial")])
    assert process.returncode == -signal.SIGXFSZ
    with closing(resume.open_state(work, key)) as state:
        assert state.num_done == 1 and state.read(0).weights["x"].tolist() == [1, 1]
    assert {f.name for f in work.iterdir()} <= {"key.json", "partial", "stop-000000.safetensors"}


def test_data_without_bytes_cannot_be_known_again(tmp_path):
    with pytest.raises(DataError, match="resume_dir needs data that identifies a run.*got object"):
        rarefy.prune_(fresh("llama"), sparsity=0.5, solver="obs", data=[*tokens(), object()], resume_dir=tmp_path / "w")


@pytest.mark.parametrize(("name", "how"), CASES)
def test_suspended_activations_may_lie_in_files(name, how, tmp_path, monkeypatch):
    data, what = MODELS[name][1](), {"sparsity": 0.5, "solver": HOWS[how]}
    want, model = fresh(name), fresh(name)
    rarefy.prune_(want, data=data, **what)
    moved, real = [], offload.to_file
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    monkeypatch.setattr(offload, "available_bytes", lambda: 0)
    monkeypatch.setattr(
        offload, "to_file", lambda groups, folder: moved.append(offload.nbytes(groups)) or real(groups, folder)
    )
    rarefy.prune_(model, data=data, **what)
    assert same(model, want) and sum(moved) > 1000


def test_only_what_is_over_the_budget_goes_to_a_file(monkeypatch):
    moved, kept = [], []
    real = offload.to_file
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    monkeypatch.setattr(offload, "available_bytes", lambda: 2 * 30_000)
    monkeypatch.setattr(
        offload, "to_file", lambda groups, folder: moved.append(offload.nbytes(groups)) or real(groups, folder)
    )
    monkeypatch.setattr(offload, "movable", lambda *a, real=offload.movable: kept.append(real(*a)) or kept[-1])
    rarefy.prune_(fresh("llama"), sparsity=0.5, solver="obs", data=tokens(4))
    assert 0 < len(moved) < len(kept)


def test_tensors_that_others_see_stay():
    x = torch.randn(100, 300)
    view, other = x[3:], torch.randn(100, 300)
    assert offload.movable([x], set()) == []  # `view` would not follow
    assert [len(g) for g in offload.movable([x, view, other], offload.storage_pointers([other]))] == [2]
    before, ptr = x.clone(), x.data_ptr()
    offload.to_file(offload.movable([x, view], set()))
    assert x.data_ptr() != ptr and torch.equal(x, before) and torch.equal(view, before[3:])
    x.add_(1)
    assert torch.equal(view, before[3:] + 1)


@pytest.mark.parametrize("how", HOWS)
def test_weights_stay_in_their_files(how, tmp_path):
    fresh("llama").save_pretrained(tmp_path / "hf")
    what = {"sparsity": 0.5, "solver": HOWS[how], "data": tokens()}
    from rarefy.model import hf

    want, model = hf.load_folder(tmp_path / "hf"), hf.load_folder(tmp_path / "hf")
    a = rarefy.prune_(want, **what)
    b = rarefy.prune_(model, memory=1 << 28, resume_dir=tmp_path / "w", **what)
    assert not rarefy.masks(model)
    assert same(model, rarefy.fold_(want))
    assert [r["kept"] for r in a.rows] == [r["kept"] for r in b.rows]
    assert b.summary["sparsity"] == a.summary["sparsity"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"memory": 1 << 30}, "memory has no effect without a solver"),
        ({"resume_dir": "w"}, "resume_dir has no effect without a solver"),
        ({"memory": 1 << 30, "solver": "obs"}, "memory needs resume_dir=FOLDER"),
        (
            {"memory": 1 << 30, "solver": "refit", "resume_dir": "w", "score": "taylor"},
            "score 'taylor' over all layers",
        ),
        ({"memory": 1 << 30, "solver": "obs", "resume_dir": "w", "allocate": "errors"}, "allocate='errors' needs all"),
    ],
)
def test_what_memory_and_work_cannot_do(how, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PatternError, match=message):
        rarefy.prune_(fresh("llama"), sparsity=0.5, data=tokens(), **how)
    assert not list(tmp_path.iterdir())


STAGE = {"prune": {"sparsity": 0.5, "solver": "obs"}}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"stages": [{"prune": {"score": "magnitude", "sparsity": 0.5}}]}, "a prune stage without solver .*stage 1"),
        ({"stages": [STAGE, {"cast": {"dtype": "bf16"}}]}, "cast needs all weights in memory.*stage 2"),
        (
            {
                "stages": [STAGE],
                "evaluate": {"metric": "perplexity", "data": "x.txt", "decode": {"prompt": 4, "new": 4, "repeats": 3}},
            },
            "timing needs two copies of the model",
        ),
    ],
)
def test_recipes_that_need_the_whole_model(recipe, message):
    with pytest.raises(RecipeError, match=message):
        rarefy.compress_(fresh("llama"), {"name": "r", **recipe}, tokens(), memory=1 << 30, resume_dir="w")


# a real kill, through the command line

RECIPE = """\
name: long
about: for the test that kills it
data: {calibrate: text.txt, samples: 8, tokens: 32, batch: 2}
stages:
  - prune: {sparsity: 0.5, solver: {name: admm, asymmetric: 0.25, reconstruct: 1, steps: 40}}
evaluate: {metric: perplexity, data: text.txt, samples: 4, tokens: 32}
"""


def words(tmp_path, out, *more):
    place = [
        sys.executable,
        "-m",
        "rarefy.cli.main",
        "compress",
        tmp_path / "model",
        "-r",
        tmp_path / "r.yaml",
        "-o",
        out,
    ]
    return [str(w) for w in [*place, "--threads", "1", *more]]


@pytest.fixture
def job(tmp_path):
    text_model(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--memory", "1G")])
def test_killed_and_gone_on(job, more):
    subprocess.run(words(job, job / "whole", *more), check=True, capture_output=True)
    ran = subprocess.Popen(words(job, job / "out", *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    state = job / ".out.work" / "stage-1"
    while not len(list(state.glob("stop-*"))) >= 1:
        assert ran.poll() is None, ran.communicate()
        time.sleep(0.005)
    os.kill(ran.pid, signal.SIGKILL)
    ran.communicate()
    assert not (job / "out").exists()
    done = len(list(state.glob("stop-*")))
    again = subprocess.run(words(job, job / "out", *more), check=True, capture_output=True, text=True)
    assert "resuming after" in again.stderr and not state.exists()
    index = [json.loads((job / n / "rarefy.json").read_text()) for n in ("whole", "out")]
    assert index[0]["shards"] == index[1]["shards"] and done < 3


def test_what_is_kept_is_said_and_what_is_removed_was_ours(tmp_path, capsys):
    prune = tmp_path / ".out.work" / "stage-1"
    prune.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), atomic_io.resume_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not prune.exists() and capsys.readouterr().err == ""  # nothing was done yet
    prune.mkdir(parents=True)
    (prune / "search.jsonl").write_text('{"settings": {}}\n')
    with pytest.raises(RarefyError), atomic_io.resume_folder(tmp_path / "out"):
        raise RarefyError("the dense model cannot be measured")
    assert not prune.exists() and capsys.readouterr().err == ""  # a search that has measured nothing
    prune.mkdir(parents=True)
    (prune / "search.jsonl").write_text('{"settings": {}}\n{"key": "point cast None: 1"}\n')
    with pytest.raises(KeyboardInterrupt), atomic_io.resume_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert prune.exists() and "again to resume" in capsys.readouterr().err
    atomic_io.remove_resume_state(prune.parent)
    prune.mkdir(parents=True)
    for name in ("search.jsonl", "key.json"):  # a run that goes on, and has nothing to resume from yet
        prune.mkdir(parents=True, exist_ok=True)
        with closing(atomic_io.lock_file(prune / name)):
            for anew in (False, True):
                with pytest.raises(ContainerError), atomic_io.resume_folder(tmp_path / "out", fresh=anew):
                    atomic_io.lock_file(prune / name)
                assert (prune / name).exists() and capsys.readouterr().err == ""
        atomic_io.remove_resume_state(prune.parent)
    for anew in (False, True):
        prune.mkdir(parents=True)
        (prune / "stop-000000.safetensors").touch()
        (prune / "key.json").touch()
        (prune.parent / "thesis.txt").touch()
        if not anew:
            with pytest.raises(KeyboardInterrupt), atomic_io.resume_folder(tmp_path / "out"):
                raise KeyboardInterrupt
            assert (
                f"progress is saved in {prune.parent}: run the same command again to resume" in capsys.readouterr().err
            )
            assert (prune / "stop-000000.safetensors").exists()
        with atomic_io.resume_folder(tmp_path / "out", fresh=anew):
            assert prune.exists() != anew
        assert [p.name for p in prune.parent.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["4", "G", "-1G", "4 potatoes", "", "0G", "100M"])
def test_memory_in_words(text, monkeypatch, capsys, tmp_path):
    words = ["rarefy", "compress", "x", "-r", "fast", "-o", str(tmp_path / "o"), "--memory", text]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    why = "expected at least 256M" if text in ("0G", "100M") else "expected bytes as a whole number, or"
    printed = capsys.readouterr().err
    assert f"memory: {why}" in printed and f"got {text!r}" in printed


@pytest.mark.parametrize("wrong", [4e9, True, float("nan"), 5])
def test_memory_in_other_types(wrong, tmp_path):
    with pytest.raises(RecipeError, match="memory"):
        rarefy.prune_(
            fresh("llama"), sparsity=0.5, solver="obs", data=tokens(), resume_dir=tmp_path / "w", memory=wrong
        )


def test_memory_in_bytes():
    texts = ("4G", "1.5g", "300M", "2GiB", "600000kb", 1 << 30)
    assert [atomic_io.parse_bytes(t) for t in texts] == [4 << 30, 3 << 29, 300 << 20, 2 << 30, 600000 << 10, 1 << 30]


def test_work_without_a_solver():
    recipe = {"name": "r", "stages": [{"prune": {"score": "magnitude", "sparsity": 0.5}}]}
    with pytest.raises(
        RecipeError, match="resume_dir has no effect: recipe r has neither a prune stage with a solver nor"
    ):
        rarefy.compress_(fresh("llama"), recipe, resume_dir="w")


def test_a_run_resumes_between_a_group_and_its_block(tmp_path, monkeypatch):
    from helpers.interrupt import stopping

    want = Decoder()
    state = {n: t.clone() for n, t in want.state_dict().items()}
    rarefy.prune_(want, sparsity=0.5, solver=LEARN, data=rows())
    for writes in (1, 2, 3, 4):
        nets = [Decoder(), Decoder()]
        for net in nets:
            net.load_state_dict(state)
        with monkeypatch.context() as patch:
            stopping(patch, writes)
            with pytest.raises(KeyboardInterrupt):
                rarefy.prune_(nets[0], sparsity=0.5, solver=LEARN, data=rows(), resume_dir=tmp_path / f"{writes}")
        rarefy.prune_(nets[1], sparsity=0.5, solver=LEARN, data=rows(), resume_dir=tmp_path / f"{writes}")
        assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), nets[1].state_dict().values()))


class Part(nn.Module):
    """A block; blocks are of one class, whatever their forward does here."""

    def __init__(self, way):
        super().__init__()
        self.f, self.g, self.way = lin(), lin(), way

    def forward(self, x):
        return self.way(self, x)


def block(way=lambda m, x: x + m.g(torch.relu(m.f(x)))):
    return Part(way).eval()
