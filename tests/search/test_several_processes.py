"""A search on several processes: the same search, its steps side by side."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from functools import partial
from threading import Thread

import pytest
import torch
import torch.distributed as dist
from torch import nn

import rarefy
from conftest import text_model
from rarefy.common.errors import ModelError, RarefyError
from rarefy.dependency.graph import trace
from rarefy.evaluation.quality import metric_of
from rarefy.search import deploy
from rarefy.search import search as searches
from rarefy.search.deploy import PLAIN
from rarefy.search.frontier import Point
from rarefy.search.line_search import next_choice
from rarefy.search.optimize import save_result
from rarefy.search.search import Search
from rarefy.search.several_processes import (
    PROCESSES,
    ProcessError,
    SharedJournal,
    SideBySideJournal,
    next_choices,
    open_journal,
)
from rarefy.search.solve import Choice
from rarefy.search.space import CUTS, cuttable_groups
from rarefy.search.targets import parse_targets
from rarefy.search.task import Task

# ---- the schedule ------------------------------------------------------------------------------------------------

# of a step, of MiniLM on two cores
SECONDS = {"point": 40.0, "loss": 3.0, "errors": 3.0, "score": 20.0, "time": 30.0, "joint": 1.0, "until": 0.0}
SAVED = {"neuron": 0.25, "head": 0.15, "1x4": 0.35, "layer": 0.4}  # of a call's time; other methods save too little


EACH = {"neuron": 6, "head": 6, "1x4": 36, "layer": 3}  # parts of a method


class Simulated(SideBySideJournal):
    """Steps on so many idle machines: results come from formulas, and the clock is moved on by the longest step."""

    def __init__(self, processes):
        self.now, self.processes = 0.0, processes
        super().__init__(None, {}, lambda: self.now)
        if processes > 1:
            self.values[PROCESSES] = processes

    def _measure(self, steps):
        assert 1 <= len(steps) <= self.processes
        costs = []
        for step in steps:
            kind, method = step.key.split()[0], step.key.split()[2]
            value = step.compute() if kind in ("point", "errors", "joint", "until") else "magnitude"
            if kind == "loss":
                value = 1e-3 * math.exp(spread(step.key))
            elif kind == "time":
                value = {"1": SAVED.get(method, 0.01)}
            costs.append(SECONDS[kind])
            self._add(step.key, json.loads(json.dumps(value)), costs[-1], step.keep)
        self.now += max(costs)
        return {}


def spread(text):
    """Return a number between -1 and 1 that a text determines."""
    return zlib.crc32(text.encode()) / 2**31 - 1


def lost_by(amounts):
    """Return the loss of amounts of parts together."""
    return sum(a**2 * math.exp(spread(f"{m} {n}") + 0.5 * spread(n)) / EACH[m] for (m, n), a in amounts.items())


lost_by.score_units = lambda: None  # as a `JointLoss` has it


class Simulation(Search):
    """A search whose points lose and save what formulas say: not quite what the parts predict."""

    def _measured(self, name, recipe, variant):
        amounts = {}
        for stage in recipe["stages"]:
            verb, options = next(iter(stage.items()))
            if verb == "cut" and options["units"] == "layer":
                amounts |= {("layer", n): 1.0 for n in options["layers"]}
            elif verb == "cut":
                amounts |= {
                    (options["units"], n): 1 - left / self.sizes[options["units"], n]
                    for n, left in options["counts"].items()
                }
            elif verb == "prune":
                amounts |= {(options["pattern"], n): amount for n, amount in options["per_layer"].items()}
        saved = sum(2 * SAVED[m] * a / EACH[m] for (m, _), a in amounts.items())
        lost = lost_by(amounts)
        speed = {None: 1.0, "bf16": 1.3, "int16": 1.2, "int8": 2.5}[variant.precision]
        quality = 1 - self.lost * lost - (0.001 if variant.precision else 0)
        quartiles = dict.fromkeys(("low", "median", "high"), max(1 - 0.6 * saved, 0.2) / speed)
        loss = 0.0 if self.reference is None else 1 - quality
        point = Point(
            name, quality, loss, {"1": quartiles}, {"1": 1 / quartiles["median"]}, 1, 1, recipe, variant.precision,
            seconds=SECONDS["point"],
        )  # fmt: skip
        return asdict(point)


def simulated(processes, lost, max_loss=0.01):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 12}
    model = BertModel(BertConfig(**sizes, num_hidden_layers=6, max_position_embeddings=64)).eval()
    batch = {"input_ids": torch.randint(3, 64, (2, 8))}
    metric = metric_of(lambda model: 1.0, model, None)
    task = Task(model, batch, [batch], metric, parse_targets(max_loss, "latency"), (1,), math.inf)
    search = Simulation(task, Simulated(processes))
    graph = trace(model, batch)
    groups = [(m, g) for m in CUTS for g in cuttable_groups(model, graph, m, None, None)]
    search.sizes = {(m, g.name): g.size for m, g in groups}
    search.joint, search.lost = lost_by, lost
    search.reference = search.bases[PLAIN] = search.add(search.point("dense", PLAIN, search.stages({}, (), PLAIN)))
    assert search.run() == "done"
    return search


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0.02, 0.05])  # of the quality, where all parts are gone
def test_two_machines_find_as_fast_a_model_in_less_time(lost):
    pytest.importorskip("transformers")
    one, two = simulated(1, lost), simulated(2, lost)
    assert one.journal.now >= 1.35 * two.journal.now
    qualities = []
    for search in (one, two):
        index, met = search.task.targets.best(search.points)
        assert met
        qualities.append(search.points[index].slowest)
    assert qualities[1] >= 0.99 * qualities[0]
    parts = [{k for k in s.journal.values if k.startswith(("loss", "errors", "time", "score"))} for s in (one, two)]
    assert parts[0] == parts[1]  # the same is measured of the parts, and nothing more


def test_choices_side_by_side():
    line = [Choice({}, i / 128, i / 128) for i in range(129)]
    targets = parse_targets(0.01, "latency")
    loss = {0: 0.0, 96: 0.02}
    seen = {i: Point("", 1.0, l, {}, {"1": 1.0}, 0, 0, {}, None) for i, l in loss.items()}
    first = next_choice(line, seen, 0, 96, targets)
    assert first == 48  # half of the loss is expected in the middle
    assert next_choices(first, line, seen, 0, 96, targets, 1) == [48]
    assert next_choices(first, line, seen, 0, 96, targets, 2) == [32, 64]
    assert next_choices(first, line, seen, 0, 96, targets, 5) == [16, 32, 48, 64, 80]
    assert next_choices(64, line, {0: seen[0]}, 0, 129, targets, 3) == [64, 96, 112]  # as if the first kept the loss
    assert next_choices(128, line, {0: seen[0]}, 0, 129, targets, 3) == [128]


def test_a_trained_model_stays_in_memory():
    """No time is set aside to make it again, which would leave none to train a second one."""
    net = nn.Linear(4, 4)
    task = Task(net, torch.randn(2, 4), [], metric_of(len, net, None), parse_targets(0.01, "latency"), (1,), 1000.0)
    search = Search(task, Simulated(2))
    for stages, left in (([{"cut": {}}], 570.0), ([{"cut": {}}, {"train": {}}], 970.0)):
        search.points = [Point("", 1.0, 0.0, {}, {"1": 2.0}, 0, 0, {"stages": stages}, None, seconds=400.0)]
        assert search.left() == left


# ---- two processes -----------------------------------------------------------------------------------------------

X = torch.randn(96, 24, generator=torch.Generator().manual_seed(0))
MANY = torch.randn(450, 24, generator=torch.Generator().manual_seed(1))  # a third is held back
TRAINING = {"eval_data": list(MANY.split(50)), "train_minutes": 1.0}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 512), nn.ReLU(), nn.Linear(512, 6)).eval()  # a cut is faster for sure


def search(folder, **options):
    torch.set_num_threads(1)
    deploy.SECONDS = 0.02  # of calls that are timed: which model is the fastest does not matter
    searches.fitting = lambda seconds, each, batches: (batches, 1)  # one epoch, on slow machines too
    return rarefy.optimize(
        network(), X[:64], list(X.split(32)), "similarity", max_loss=0.1, batch=(64,), resume_dir=folder, **options
    )


def fails(error):
    raise error


def errors_of_both():
    """Return what is raised where the processes do not fit together, or one of them fails."""
    journal = SharedJournal(None, {}, {}, 60.0)
    net, targets = network(), parse_targets(0.01, "latency")
    without_hash = Task(net, object(), [], metric_of(lambda model: 1.0, net, None), targets, (1,), 60.0)
    steps = {
        "a": lambda: 1,
        "b": partial(fails, KeyError(f"no labels in {dist.get_rank()}")),
        "c": partial(fails, ModelError("no layers")),
        "d": partial(fails, KeyError(f"no labels in {dist.get_rank()}")),
    }
    calls = (
        lambda: search(None, seed=dist.get_rank()),
        lambda: search(None, minutes=1 + dist.get_rank(), other_engines=dist.get_rank() == 1),
        lambda: search(__file__),
        lambda: open_journal(None, without_hash, None, None),
        lambda: journal.get("c", steps["c"]),
        lambda: journal.get(f"step {dist.get_rank()}", steps["a"]),
        lambda: journal.get("outer", lambda: journal.get("inner", steps["a"])),
        lambda: journal.prefetch(partial(journal.get, key, steps[key]) for key in "bd"),
        lambda: journal.prefetch(partial(journal.get, key, steps[key]) for key in "ab"),
    )
    errors = []
    for call in calls:
        try:
            call()
        except (RarefyError, ProcessError, KeyError, RuntimeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    journal.close()
    return errors


def worker(rank, out, victim):
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    if rank == victim:
        Thread(target=kill_later, args=(out / "work" / "search.jsonl",), daemon=True).start()
    try:
        if victim is None:
            report = {"errors": errors_of_both(), "begun": [p.name for p in search(out / "begun").points]}
            frontier = search(out / "work", **TRAINING)
            report |= {"frontier": frontier.to_dict(), "has_model": frontier.best is not None}
            if rank:
                with pytest.raises(ModelError, match="of several processes the first one has it"):
                    save_result(frontier, out / "saved")
            (out / f"{rank}.json").write_text(json.dumps(report))
        else:
            search(out / "work")
    except RarefyError as error:
        (out / f"{rank}.txt").write_text(str(error))
        os._exit(2)
    dist.barrier()
    os._exit(0)


def kill_later(journal):
    """Kill this process by SIGKILL once a few results are on disk."""
    while not journal.exists() or journal.read_bytes().count(b"\n") < 6:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def run_two(out, victim=None):
    """Return the exit codes of two processes."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, out, victim)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


@pytest.fixture
def quick(monkeypatch):
    """Let `search` change module variables."""
    monkeypatch.setattr(deploy, "SECONDS", deploy.SECONDS)
    monkeypatch.setattr(searches, "fitting", searches.fitting)


@pytest.mark.slow
def test_two_processes_search_what_one_goes_on_with(tmp_path, quick):
    begun = search(tmp_path / "begun")
    before = (tmp_path / "begun" / "search.jsonl").read_bytes()
    assert run_two(tmp_path) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    # from one process to two: nothing is left to measure
    assert (tmp_path / "begun" / "search.jsonl").read_bytes() == before
    assert first["begun"] == second["begun"] == [p.name for p in begun.points]
    # two processes, with training and data held back
    assert first["has_model"] and not second["has_model"]
    frontier = first["frontier"]
    assert frontier["points"] == second["frontier"]["points"] and frontier["met"]
    assert any("on one machine" in note for note in frontier["notes"])
    assert any("train" in stage for p in frontier["points"] for stage in p["recipe"]["stages"])
    assert frontier["points"][frontier["best_index"]]["checked_loss"] is not None
    # from two to one
    before = (tmp_path / "work" / "search.jsonl").read_bytes()
    alone = search(tmp_path / "work", **TRAINING)
    assert (tmp_path / "work" / "search.jsonl").read_bytes() == before
    assert [p.name for p in alone.points] == [p["name"] for p in frontier["points"]]
    assert alone.best_index == frontier["best_index"] and alone.best is not None
    check_errors(first["errors"], second["errors"])


def check_errors(first, second):
    seed, options, folder, data, refused, steps, nested, both, one = zip(first, second, strict=True)
    assert all("RecipeError: process 1 differs from the first one in seed: start all" in e for e in seed)
    assert all(
        "RecipeError: process 1 differs from the first one in minutes, other_engines: start" in e for e in options
    )
    assert all("ContainerError" in e and "is a file: give the name of a folder" in e for e in folder)
    assert all(e.startswith("DataError: a search on several processes needs data that identifies a run") for e in data)
    assert set(refused) == {"RarefyError: no layers"}
    assert all("ProcessError: processes 0 and 1 are at different steps, ['step 0'] and ['step 1']" in e for e in steps)
    said = "RuntimeError: 'inner' is asked for inside another step, which other processes do not measure"
    assert nested == (said, f"ProcessError: process 0 of the search failed: {said}")
    assert both == ("KeyError: 'no labels in 0'", "KeyError: 'no labels in 1'")  # each its own
    said = "KeyError: 'no labels in 1'"
    assert one == (f"ProcessError: process 1 of the search failed: {said}", said)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_one_process_resumes(tmp_path, quick, victim):
    codes = run_two(tmp_path, victim)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 2
    message = (tmp_path / f"{1 - victim}.txt").read_text()
    assert "another process of the search has ended" in message and "pass the same resume_dir again" in message
    before = (tmp_path / "work" / "search.jsonl").read_bytes()
    frontier = search(tmp_path / "work")
    assert frontier.met and frontier.finished == "done"
    after = (tmp_path / "work" / "search.jsonl").read_bytes()
    assert len(after) > len(before) and after.startswith(before[: before.rindex(b"\n") + 1])


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path):
    pytest.importorskip("transformers")
    text_model(tmp_path)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rarefy",
        "optimize", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--max-loss", "50%", "--minutes", "1", "--tokens", "16",
        "--samples", "8", "-o", str(tmp_path / "out"), "--json", "--threads", "1",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    printed = json.loads(ran.stdout)  # once
    assert printed == json.loads((tmp_path / "out" / "frontier.json").read_text()) and printed["met"]
    assert not (tmp_path / ".out.work").exists() and rarefy.load(tmp_path / "out") is not None
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode != 0 and "--force" in again.stderr
