"""Several processes: what they compress together is what one compresses alone."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import rarefy
from conftest import Net, image_batches, text_model, tiny_llama
from helpers.marks import slow_case
from rarefy.common.errors import RecipeError
from rarefy.model import distributed
from rarefy.train.fit import Steps

pytest.importorskip("transformers")


def texts(n=5):
    g = torch.Generator().manual_seed(0)
    found = [{"input_ids": torch.randint(3, 64, (4, 16), generator=g)} for _ in range(n)]
    return [b | {"labels": b["input_ids"]} for b in found]


WORK = {
    "obs": lambda m: rarefy.prune_(m, sparsity=0.5, solver="obs", data=texts()),
    "admm, asymmetric": lambda m: rarefy.prune_(
        m, "2:4", solver=rarefy.Solver(name="admm", asymmetric=0.5), data=texts()
    ),
    "blocks learn": lambda m: rarefy.prune_(
        m, sparsity=0.5, solver=rarefy.Solver(name="refit", reconstruct=1), data=texts()
    ),
    "wanda": lambda m: rarefy.prune_(m, sparsity=0.5, score="wanda", data=texts()),
    "fisher": lambda m: rarefy.prune_(m, sparsity=0.5, score="fisher", data=texts()),
    "errors": lambda m: rarefy.prune_(m, sparsity=0.5, solver="obs", allocate="errors", data=texts()),
    "fewer batches than processes": lambda m: rarefy.prune_(m, sparsity=0.5, solver="obs", data=texts(1)),
    "int4": lambda m: rarefy.quantize_(m, "int4", group=16, solver="obs", data=texts()),
    "low rank": lambda m: rarefy.factorize_(m, keep=0.6, data=texts(), layers="*mlp*"),
    "trained": lambda m: rarefy.fit_(
        m, texts(), epochs=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        prune=rarefy.Gradual(sparsity=0.5, steps=3), steps=Steps(accumulate=2, clip=1.0),
    ),
    "taught": lambda m: taught(m),
}  # fmt: skip


QUICK = ("obs", "wanda", "fewer batches than processes", "trained")
PARTS = {"some": QUICK, "others": tuple(n for n in WORK if n not in QUICK)}


def taught(model):
    with torch.no_grad():
        teacher = tiny_llama(tie=False)
        for p in model.parameters():
            p.mul_(1.1)
    distiller = rarefy.Distiller(model, teacher, rarefy.Distill(hidden="mse"), example=texts(1)[0])
    rarefy.fit_(model, texts(), distill=distiller, optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
    distiller.close()


def work(name):
    model = tiny_llama(tie=False)
    WORK[name](model)
    return {n: t.clone() for n, t in rarefy.fold_(model).state_dict().items()}


def _worker(rank: int, out: str, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    found = {}
    for name in names:
        found.update({f"{name}/{k}": v for k, v in work(name).items()})
    x, y = image_batches()[0]
    part, share = distributed.local_samples((x[:3], y[:3]))
    found["share"] = torch.tensor([len(part[0]), share])
    found["alone"] = torch.tensor([len(distributed.local_samples((x[:1], y[:1]))[0][0])])
    try:
        rarefy.compress_(Net(), {"stages": [{"train": {}}]}, {"train": image_batches()}, resume_dir=f"{out}/w")
    except RecipeError as error:
        found["refused"] = torch.tensor([float("single process" in str(error))])
    torch.save(found, f"{out}/{rank}.pt")
    dist.barrier()
    os._exit(0)


@pytest.mark.parametrize("part", ["some", slow_case("others")])
def test_two_processes_do_what_one_does(part, tmp_path):
    names = PARTS[part]
    mp.spawn(_worker, args=(str(tmp_path), names), nprocs=2)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert first.pop("share").tolist() == [1, pytest.approx(2 / 3)] and second.pop("share")[0] == 2
    assert first.pop("alone") == second.pop("alone") == 1 and first.pop("refused") == second.pop("refused") == 1
    torch.set_num_threads(1)
    for name in names:
        want = work(name)
        for key, tensor in want.items():
            a, b = first[f"{name}/{key}"], second[f"{name}/{key}"]
            assert torch.equal(a, b), f"{name}/{key}"
            near = torch.isclose(a, tensor, atol=1e-4, rtol=1e-3)
            # where two scores are a rounding error apart, another weight may go
            assert near.float().mean() > 0.995, f"{name}/{key}: {1 - near.float().mean():.4f} differ"


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path):
    text_model(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "data: {calibrate: text.txt, train: text.txt, tokens: 16, batch: 2, samples: 8, train_samples: 8}\n"
        "stages:\n- prune: {sparsity: 0.5, solver: obs}\n"
        "- train: {epochs: 2, optimizer: {name: sgd, lr: 0.05}, distill: {logits: 1.0, hidden: squarehead}}\n"
        "evaluate: {metric: perplexity, data: text.txt, samples: 4, tokens: 16}\n"
    )
    words = ["compress", tmp_path / "model", "-r", tmp_path / "r.yaml", "--json", "-q", "--threads", "1"]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rarefy"]
    receipts = {}
    for name, start in (("two", together), ("one", [sys.executable, "-m", "rarefy"])):
        ran = subprocess.run(
            [*start, *map(str, words), "-o", str(tmp_path / name)], capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stderr
        receipts[name] = json.loads((tmp_path / name / "receipt.json").read_text())
        assert json.loads(ran.stdout)["quality"] == receipts[name]["quality"]  # printed once
    one, two = (receipts[n]["quality"] for n in ("one", "two"))
    assert two["before"] == pytest.approx(one["before"]) and two["after"] == pytest.approx(one["after"], rel=2e-3)
    wrong = subprocess.run(
        [*together, *map(str, words[:2]), "-r", "nowhere.yaml", "-o", str(tmp_path / "x")],
        capture_output=True,
        text=True,
    )
    assert wrong.returncode != 0 and "no recipe file 'nowhere.yaml'" in wrong.stderr and not (tmp_path / "x").exists()
