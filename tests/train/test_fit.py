"""Resuming training bit for bit, and the options of fit_."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rarefy
from conftest import Net, image_batches
from helpers.marks import slow_except
from rarefy import fit_
from rarefy.common.errors import ContainerError, DataError, ModelError, RecipeError
from rarefy.train import checkpoint
from rarefy.train.fit import Steps
from rarefy.train.sparsity_config import Gradual, Movement, Rigl

ADAM = lambda p: torch.optim.Adam(p, lr=1e-2)  # noqa: E731


class Noisy(nn.Module):
    """Layers that draw random numbers and keep running means."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16))
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.body(x))


def loader(batch=8):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 12, generator=g), torch.randint(4, (64,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=True)


class Stop(Exception):
    pass


class Breaking:
    """Batches of a loader that raises before its nth batch in all."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def __call__(self, epoch):
        self.batches = loader()
        return self

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            if self.seen > self.at:  # the first look is at what data this is
                raise Stop
            self.seen += 1
            yield batch


def quantized(model):
    rarefy.quantize_(model, "int4", layers="body.4")


RUNS = {
    "plain": {},
    "gradual": {"prune": Gradual(sparsity=0.8, steps=5)},
    "movement": {"prune": Movement(sparsity=0.8, steps=5)},
    "rigl": {"prune": Rigl(sparsity=0.8, steps=4)},
    "on a grid": {"at": {0.4: quantized}, "prune": Gradual(sparsity=0.5, steps=3)},
    "best, on a grid": {
        "validate": lambda m: float(-m.out.weight.detach().abs().sum()),
        "at": {0.4: quantized},
    },
    "best": {"validate": lambda m: float(-m.out.weight.detach().abs().sum())},
    "in pairs": {"steps": Steps(accumulate=3, clip=0.5, autocast="bf16")},
}


def run(how, data, resume_dir=None):
    torch.manual_seed(3)
    model = Noisy()
    report = fit_(
        model, data, epochs=4, optimizer=ADAM, lr_schedule="cosine", seed=5, resume_dir=resume_dir, **RUNS[how]
    )
    return model, report


@pytest.mark.parametrize("how", slow_except(RUNS, "plain", "rigl", "best, on a grid"))
def test_a_stopped_run_resumes_bit_for_bit(how, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    want, told = run(how, lambda epoch: loader())
    for at in (2, 8, 13, 31):
        work = tmp_path / str(at)
        with pytest.raises(Stop):
            run(how, Breaking(at), work)
        got, again = run(how, lambda epoch: loader(), work)
        assert [{k: v for k, v in r.items() if k != "seconds"} for r in told.rows] == [
            {k: v for k, v in r.items() if k != "seconds"} for r in again.rows
        ]
        assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), got.state_dict().values()))
        assert told.summary == again.summary
    once_more, _ = run(how, Breaking(0), tmp_path / "31")  # nothing is left to do
    assert torch.equal(once_more.out.weight, want.out.weight)


@pytest.mark.slow
def test_a_killed_run_resumes(tmp_path):
    code = f"""
import sys, time, torch
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from test_fit import *
checkpoint.EVERY = 0.0
def slow(epoch):
    for batch in loader():
        time.sleep(float(sys.argv[2]))
        yield batch
model, report = run("gradual", slow, sys.argv[1])
torch.save([p.detach() for p in model.parameters()], sys.argv[1] + ".pt")
"""
    work = tmp_path / "work"
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code, str(work), "0.2"])
        file, before = work / "training.safetensors", None
        for _ in range(600):  # killed while it is in the middle of an epoch
            now = file.stat().st_mtime_ns if file.is_file() else None
            if before is not None and now != before:
                break
            before = now if before is None else before
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", code, str(work), "0"], check=True)
    want, _ = run("gradual", lambda epoch: loader())
    got = torch.load(f"{work}.pt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(want.parameters(), got))


def test_the_state_of_another_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    with pytest.raises(Stop):
        run("plain", Breaking(9), tmp_path / "w")
    torch.manual_seed(3)
    with pytest.raises(ContainerError, match="holds the state of another run .*epochs 4 -> 5"):
        fit_(
            Noisy(),
            lambda e: loader(),
            epochs=5,
            optimizer=ADAM,
            lr_schedule="cosine",
            seed=5,
            resume_dir=tmp_path / "w",
        )
    with pytest.raises(ContainerError, match="holds the state of a fit_ run, this is prune_: remove "):
        rarefy.prune_(Noisy(), sparsity=0.5, solver="obs", data=[x for x, _ in loader()], resume_dir=tmp_path / "w")
    file = tmp_path / "w" / "training.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 255
    file.write_bytes(data)
    with pytest.raises(ContainerError, match="is damaged or of another run: remove"):
        run("plain", lambda e: loader(), tmp_path / "w")


def test_accumulated_gradients_match_one_large_batch():
    torch.manual_seed(0)
    x, y, loss = torch.randn(5, 4), torch.randint(3, (5,)), nn.CrossEntropyLoss()
    models = [nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    data = [(x[i : i + 1], y[i : i + 1]) for i in range(5)]
    fit_(models[0], data, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), steps=Steps(accumulate=2, clip=0.3))
    plain = torch.optim.SGD(models[1].parameters(), lr=1.0)
    for part in ([0, 1], [2, 3], [4]):
        plain.zero_grad()
        loss(models[1](x[part]), y[part]).backward()
        nn.utils.clip_grad_norm_(models[1].parameters(), 0.3)
        plain.step()
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_training_needs_no_gradients_outside():
    """Who judges models without gradients trains the next one in the same block."""
    torch.manual_seed(0)
    one, other, batches = Noisy(), Noisy(), list(loader())
    other.load_state_dict(one.state_dict())
    fit_(one, batches, epochs=1, optimizer=ADAM, seed=3)
    with torch.no_grad():
        fit_(other, batches, epochs=1, optimizer=ADAM, seed=3)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_patience_stops_a_run():
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    report = fit_(Net(), image_batches(), epochs=5, validate=lambda m: next(scores), patience=2)
    assert len(report.rows) == 4 and report.summary["best_epoch"] == 2
    assert report.notes == ("stopped after 4 of 5 epochs: 2 without a better one",)


def test_rows_are_logged_to_files_and_tensorboard(tmp_path):
    file, board = tmp_path / "logs" / "run.jsonl", tmp_path / "board"
    report = fit_(Net(), image_batches(), epochs=2, log=[str(file), f"tensorboard:{board}"])
    assert [json.loads(l) for l in file.read_text().splitlines()] == [dict(r) for r in report.rows]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board)).Reload()
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert found == [(r["epoch"], pytest.approx(r["loss"])) for r in report.rows]


def test_rows_are_logged_to_wandb(tmp_path, monkeypatch):
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    fit_(Net(), image_batches(), epochs=2, log="wandb:toy")
    (file,) = tmp_path.rglob("run-*.wandb")
    until = time.monotonic() + 10
    while file.read_bytes().count(b"loss") < 2 and time.monotonic() < until:  # wandb's own process writes it
        time.sleep(0.1)
    assert file.read_bytes().count(b"loss") >= 2


def test_rows_and_receipts_are_logged_to_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from rarefy.integrations.mlflow import log_receipt, metrics_of

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    report = fit_(Net(), image_batches(), epochs=2, log="mlflow:toy")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("toy").experiment_id
    (run,) = client.search_runs([experiment])
    logged = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    assert logged == [(r["epoch"], pytest.approx(r["loss"])) for r in report.rows] and run.info.status == "FINISHED"
    receipt = rarefy.compress_(Net(), {"stages": [{"prune": {"sparsity": 0.5}}]})
    mlflow.set_experiment("receipts")
    with mlflow.start_run() as own:
        fit_(Net(), image_batches(), log="mlflow:ignored")  # into the run that is active
        log_receipt(receipt)
    run = client.get_run(own.info.run_id)
    assert run.data.metrics.items() >= metrics_of(receipt).items() and "loss" in run.data.metrics
    assert run.data.metrics["bytes on disk/after"] == receipt.disk["after"]
    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/receipt.json")
    assert json.loads(text) == receipt.to_dict()
    log_receipt(receipt)  # a run of its own
    assert mlflow.active_run() is None
    with pytest.raises(ModelError, match="expected a receipt, as rarefy.compress_ returns, got dict"):
        log_receipt({})
    mlflow.set_tracking_uri("nowhere://runs")
    for log in (lambda: log_receipt(receipt), lambda: fit_(Net(), image_batches(), log="mlflow:toy")):
        with pytest.raises(ModelError, match="MLflow cannot log to nowhere://runs: .*Install all of MLflow"):
            log()


def test_without_mlflow_the_error_names_it(monkeypatch):
    from rarefy.integrations.mlflow import log_receipt

    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ModelError, match="log_receipt needs MLflow: pip install mlflow"):
        log_receipt(rarefy.Receipt(name="x"))
    with pytest.raises(RecipeError, match="log 'mlflow:x' needs the package mlflow: pip install mlflow"):
        fit_(Net(), image_batches(), log="mlflow:x")


def test_a_loss_that_is_not_finite_restores_the_best_weights():
    model, states = Net(), []

    def loss(out, batch):
        return nn.functional.cross_entropy(out, batch[1]) * (float("nan") if len(states) == 2 else 1.0)

    def validate(m):
        states.append(m.fc.weight.detach().clone())
        return -float(len(states))

    with pytest.raises(ModelError, match="the loss is nan in epoch 3, step 1: lower the learning rate"):
        fit_(model, image_batches(), epochs=4, loss=loss, validate=validate)
    assert torch.equal(model.fc.weight, states[0])


def test_a_loss_that_is_not_finite_names_the_saved_state(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    bad = iter([1.0] * 6 + [float("nan")])
    loss = lambda out, batch: nn.functional.cross_entropy(out, batch[1]) * next(bad)  # noqa: E731
    with pytest.raises(ModelError, match="the state before is in .*/w"):
        fit_(Net(), image_batches(), epochs=4, loss=loss, resume_dir=tmp_path / "w")
    assert (tmp_path / "w" / "training.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"patience": 0, "validate": lambda m: 1.0},
            RecipeError,
            "patience: expected a whole number of at least 1, got 0",
        ),
        ({"patience": 2}, RecipeError, "patience needs a validation metric: give validate"),
        ({"log": "tensorboard:"}, RecipeError, "log 'tensorboard:' lacks a name: tensorboard:FOLDER"),
        ({"log": "tensorbord:x"}, RecipeError, "unknown log 'tensorbord'.*did you mean 'tensorboard'.*without a colon"),
        ({"at": {0.5: 3}}, RecipeError, "at.0.5.: expected a function of the model, such as a lambda, got 3"),
        (
            {"distill": Net()},
            RecipeError,
            "distill: expected a rarefy.Distiller.model, teacher. or a callable.*got Net",
        ),
        ({"validate": lambda m: None}, RecipeError, "validate must return a number, got NoneType"),
        ({"log": "mlflow:"}, RecipeError, "log 'mlflow:' lacks a name: mlflow:EXPERIMENT"),
        ({"log": "wandb:"}, RecipeError, "log 'wandb:' lacks a name: wandb:PROJECT"),
        ({"steps": "fast"}, RecipeError, "steps: expected a rarefy.train.fit.Steps"),
        ({"at": {1.5: print}}, ValueError, "at: expected training progress between 0 and 1, got 1.5"),
        ({"data": lambda epoch: []}, DataError, "the training data is empty in epoch 1"),
    ],
)
def test_messages_for_wrong_settings(settings, error, message):
    data = settings.pop("data", image_batches())
    with pytest.raises(error, match=message):
        fit_(Net(), data, **settings)


def test_weights_that_are_not_finite_are_refused():
    model = Net()
    model.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="fc.weight: NaN or inf in its weights, before training"):
        fit_(model, image_batches())


def test_a_loader_without_a_length():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(image_batches())

    loader = DataLoader(Endless(), batch_size=None)
    report = fit_(Net(), loader, epochs=2, prune=Gradual(sparsity=0.5, steps=2))
    assert report.rows[-1]["sparsity"] == 0.5


def test_parameters_added_during_training_are_trained():
    model, tables = Net(), []

    def share(m):
        rarefy.share_(m, 3, layers="hidden")
        tables.append(next(p for n, p in m.named_parameters() if n.endswith("table")))
        tables.append(tables[0].detach().clone())

    fit_(model, image_batches(), epochs=3, at={0.3: share}, optimizer=ADAM)
    assert not torch.equal(tables[0], tables[1])


def test_recorded_grids_are_kept(tmp_path):
    model = Net()
    rarefy.share_(model, 3, layers="hidden")
    rarefy.quantize_(model, "int4", layers="conv")
    rarefy.save(rarefy.fold_(model), tmp_path / "out")
    again = rarefy.load(tmp_path / "out", Net())
    before = again.hidden.weight.detach().clone()
    fit_(again, image_batches(), epochs=2, optimizer=ADAM)
    rarefy.fold_(again)
    assert len(again.hidden.weight.unique()) <= 8 and not torch.equal(again.hidden.weight, before)
    assert all(len(row.unique()) <= 16 for row in again.conv.weight.detach().unbind())


def test_lost_zeros_are_reported():
    model = Net()
    rarefy.prune_(model, sparsity=0.6, layers="hidden")
    report = fit_(rarefy.fold_(model), image_batches(), optimizer=ADAM)
    assert report.notes == ("zeros without a mask were filled in hidden: rarefy.adopt_(model) before keeps them",)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RecipeError, match="log 'wandb:x' needs the package wandb: pip install wandb"):
        fit_(Net(), image_batches(), log="wandb:x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 0}, "accumulate: expected a whole number of at least 1, got 0"),
        ({"clip": -1.0}, "clip: expected a number above 0, got -1.0"),
        ({"autocast": "bf8"}, "unknown autocast 'bf8'.*did you mean 'bf16'"),
    ],
)
def test_messages_for_wrong_steps(settings, message):
    with pytest.raises(RecipeError, match=message):
        Steps(**settings)
