"""`optimize` on small models: limits, errors, time, resuming, and recipes that give the same weights."""

import copy
import json
import math
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from torch import nn

import rarefy
from rarefy.common.atomic_io import MODEL_MEASURED
from rarefy.common.errors import ContainerError, DataError, ModelError, RarefyError, RecipeError
from rarefy.runtime.bindings import multiplies_bf16
from rarefy.search import search as search_module
from rarefy.search import space
from rarefy.search.frontier import frontier_from_dict
from rarefy.search.optimize import save_result
from rarefy.search.parts import PartMeasurer
from rarefy.search.targets import mean_speedup

X = torch.randn(192, 48, generator=torch.Generator().manual_seed(0))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.head = nn.Linear(48, 384), nn.Linear(384, 384), nn.Linear(384, 10)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu())


NET = Classifier().eval()
LABELS = NET(X).argmax(1)


def accuracy(model):
    return float((model(X).argmax(1) == LABELS).float().mean())


BATCHES = X.split(32)


def run(evaluate=accuracy, net=NET, data=BATCHES, minutes=9.0, **options):
    return rarefy.optimize(net, X[:4], data, evaluate, **{"max_loss": 0.1, "minutes": minutes, **options})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    return run(resume_dir=work, batch=(1, 16)), work


def test_the_best_model_keeps_the_limit_and_is_what_was_measured(found):
    frontier, _ = found
    best = frontier.best_point
    assert frontier.met and best.loss <= 0.1
    assert accuracy(frontier.best.model) == pytest.approx(best.quality)
    assert best.loss == pytest.approx((1.0 - best.quality) / 1.0)
    assert frontier.batches == ("1", "16") == tuple(best.milliseconds)
    within = [p for p in frontier.points if p.loss is not None and p.loss <= 0.1]
    assert mean_speedup(best.speedup) == max(mean_speedup(p.speedup) for p in within)


def test_more_than_precisions_is_tried(found):
    frontier, _ = found
    names = [p.name for p in frontier.points]
    assert {"dense, fp32", "dense, int8"} <= set(names)
    assert ("dense, bf16" in names) == multiplies_bf16() != ("dense, int16" in names)
    cut = [p for p in frontier.points if "fewer neurons" in p.name]
    assert len(cut) >= 2 and {"milliseconds"} <= set(cut[0].predicted) and "loss" in cut[-1].predicted
    assert {r["layer"] for r in cut[0].layers} >= {"first.weight:0", "second.weight:0"}


@pytest.mark.slow
def test_bf16_is_tried_where_bytes_are_limited():
    assert "dense, bf16" in [p.name for p in run(max_loss=0.0, size_mb=0.05).points]


def test_a_limit_of_bytes_that_only_8_bits_can_keep_is_searched_in_8_bits():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)).eval()
    x = torch.randn(512, 64)
    frontier = rarefy.optimize(net, x[:16], [*x.split(64)], "agreement", size_mb=0.018, max_loss=0.9, minutes=0.5)
    assert frontier.met and frontier.best_point.disk_bytes <= 18_000
    assert frontier.best_point.precision == "int8" and "fewer neurons" in frontier.best_point.name


@pytest.mark.slow
def test_a_gain_is_no_negative_loss():
    frontier = run(lambda net: 1.5 if (net(X) - NET(X)).abs().max() > 1e-4 else 1.0, minutes=0.2)
    assert frontier.best_point.loss == -0.5 and "50 % of the metric gained" in frontier.verdict


def test_the_recipe_gives_the_same_weights(found):
    frontier, _ = found
    model = copy.deepcopy(NET)
    data = list(X.split(32))
    rarefy.compress_(model, dict(frontier.best_point.recipe), {"calibrate": data})
    for a, b in zip(model.parameters(), frontier.best.compressed.parameters(), strict=True):
        assert torch.equal(a, b)
    again = rarefy.compile(model, X[:4], precision=frontier.best_point.precision)
    assert torch.equal(again(X), frontier.best.model(X))


def test_a_search_that_was_done_gives_the_same_result_from_its_folder(found):
    frontier, work = found
    before = (work / "search.jsonl").read_bytes()
    again = run(resume_dir=work, batch=(1, 16))
    assert (work / "search.jsonl").read_bytes() == before  # nothing is measured again
    assert MODEL_MEASURED in before  # by which the command line knows that there is something to resume
    assert [p.name for p in again.points] == [p.name for p in frontier.points]
    assert again.points == frontier_from_dict(frontier.to_dict()).points and again.best_index == frontier.best_index
    assert torch.equal(again.best.model(X), frontier.best.model(X))


def test_another_search_is_refused_in_the_same_folder(found):
    _, work = found
    with pytest.raises(ContainerError, match=r"belongs to another search \(batches"):
        run(resume_dir=work, batch=1)


def test_saved_and_loaded(found, tmp_path):
    frontier, _ = found
    assert save_result(frontier, tmp_path / "fast") > 0
    assert torch.equal(rarefy.load(tmp_path / "fast")(X), frontier.best.model(X))
    read = frontier_from_dict(json.loads((tmp_path / "fast" / "frontier.json").read_text()))
    assert read.best_point.name == frontier.best_point.name and read.best is None
    model = copy.deepcopy(NET)
    rarefy.compress_(model, tmp_path / "fast" / "recipe.yaml", {"calibrate": list(X.split(32))})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), frontier.best.compressed.parameters()))
    with pytest.raises(ContainerError, match="overwrite=True"):
        save_result(frontier, tmp_path / "fast")


def test_the_model_is_left_as_it_is(found):
    assert torch.equal(NET(X).argmax(1), LABELS) and not rarefy.masks(NET) and not NET.training


def test_text_of_a_frontier(found):
    frontier, _ = found
    text = str(frontier)
    assert "models tried in" in text and "All limits are kept" in text and "dense" in text


# ---- what users do -----------------------------------------------------------------------------------------------


def test_without_data_sizes_of_weights_are_tried_where_a_function_judges():
    frontier = rarefy.optimize(NET, X[:4], None, accuracy, max_loss=0.5, minutes=9)
    assert frontier.best is not None and any("cut" in stage for p in frontier.points for stage in p.recipe["stages"])


def test_targets_of_another_number_of_samples_are_refused():
    with pytest.raises(DataError, match="data: batch 1 has 4 samples and 3 targets"):
        rarefy.optimize(NET, X[:4], [(X[:4], torch.zeros(n).long()) for n in (4, 3)], "accuracy", max_loss=0.5)


@pytest.mark.slow
def test_a_limit_that_the_dense_model_keeps_is_met_at_once():
    frontier = run(speedup=0.5, max_loss=0.0)
    assert frontier.met and frontier.points[frontier.best_index].loss <= 0


@pytest.mark.slow
def test_a_limit_that_nothing_keeps_ends_with_the_nearest_model():
    frontier = run(speedup=1000.0)
    assert not frontier.met and frontier.best is not None
    assert "Not all limits are kept" in frontier.verdict and "speedup by" in frontier.verdict
    assert "The fastest model tried is" in frontier.verdict


@pytest.mark.slow
def test_what_misses_a_loss_is_said_in_its_unit():
    frontier = run(speedup=1000.0, max_loss="-150 points", minutes=0.1)
    assert "misses max_loss by 15" in frontier.verdict and "points" in frontier.verdict.partition("max_loss")[2]


@pytest.mark.slow
def test_a_part_that_cannot_be_used_is_left_out(monkeypatch):
    def refused(plain):
        def loss(model, part, *arguments, **options):
            if "second" in getattr(part, "full_name", ""):
                raise ModelError("the outputs contain NaN")
            return plain(model, part, *arguments, **options)

        return loss

    for name in ("measured_layer_loss", "measured_rank_loss"):
        monkeypatch.setattr(space, name, refused(getattr(space, name)))
    faster = lambda measurer, smaller: dict.fromkeys(measurer.names, 0.3)  # noqa: E731 - times of so small a net vary
    monkeypatch.setattr(PartMeasurer, "_saved_by", faster)
    frontier = run(speedup=1000.0)
    changed = {n for p in frontier.points for s in p.recipe["stages"] for n in s.get("prune", {}).get("per_layer", ())}
    factorized = {
        n for p in frontier.points for s in p.recipe["stages"] for n in s.get("factorize", {}).get("layers", ())
    }
    assert "second" not in changed | factorized and changed | factorized


@pytest.mark.slow
def test_the_least_loss_at_a_speed():
    frontier = run(max_loss=None, speedup=1.2)
    others = [p for p in frontier.points if p.loss is not None and p.slowest >= 1.2]
    assert frontier.met and frontier.best_point.loss == min(p.loss for p in others)


@pytest.mark.slow
def test_a_lower_number_can_be_better():
    want = NET(X)
    frontier = run(lambda m: float((m(X) - want).square().mean()) + 1.0, max_loss=0.05, higher_is_better=False)
    assert frontier.met and frontier.points[frontier.best_index].quality <= 1.05


@pytest.mark.slow
def test_a_constant_number_is_named():
    frontier = run(lambda m: 1.0)
    assert frontier.met and "is the same for all models" in frontier.notes[0]


@pytest.mark.slow
def test_evaluation_that_fails_on_a_candidate_is_a_point_with_an_error():
    calls = []

    def fails_later(model):
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("out of luck")
        return accuracy(model)

    frontier = run(fails_later)
    failed = [p for p in frontier.points if p.error]
    assert len(failed) == 1 and "out of luck" in failed[0].error and frontier.best is not None
    counted = f"1 of {len(frontier.points)} models could not be measured, the first one: {failed[0].name}: "
    assert any(note.startswith(counted) and "out of luck" in note for note in frontier.notes)


@pytest.mark.parametrize(
    ("result", "message"),
    [(float("nan"), "nan"), (None, "None"), ("good", "good"), (math.inf, "inf")],
)
def test_evaluation_must_return_a_number(result, message):
    with pytest.raises(RarefyError, match=message):
        run(lambda m: result)


def test_evaluation_that_raises_on_the_dense_model_is_passed_on():
    def broken(model):
        raise KeyError("column")

    with pytest.raises(RarefyError, match="column"):
        run(broken)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"minutes": 0}, RecipeError, "minutes: expected a number above 0"),
        ({"minutes": math.nan}, RecipeError, "minutes: expected a number above 0"),
        ({"batch": ()}, RecipeError, "batch: expected batch sizes"),
        ({"batch": 0}, RecipeError, "batch"),
        ({"max_loss": 5}, RecipeError, "text, such as '5%' and '5 points'"),
        ({"max_loss": None}, RecipeError, "nothing limits the loss"),
        ({"speedup": -1}, RecipeError, "speedup: expected a number above 0"),
        ({"target": "fast"}, RecipeError, "unknown target 'fast'"),
        ({"evaluate": "acuracy"}, DataError, "accuracy"),
        ({"evaluate": "accuracy", "data": [X[:1]]}, DataError, "needs data of its own"),
        ({"data": 5}, DataError, "data"),
        ({"data": []}, DataError, "data is empty: give a list of batches, or leave data out"),
        ({"evaluate": "agreement", "eval_data": iter(())}, DataError, "eval_data is empty"),
        ({"data": [X[:4], X[:4] * math.nan]}, DataError, "data: the inputs of batch 1 hold NaN"),
        ({"train_data": [X * math.nan], "train_minutes": 1}, DataError, "train_data: the inputs of batch 0 hold NaN"),
        ({"layers": "nothing.*"}, RarefyError, "matches no layer"),
        ({"net": "folder"}, ModelError, "expected a torch.nn.Module"),
    ],
)
def test_wrong_use(options, kind, message):
    with pytest.raises(kind, match=message):
        run(**options)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ModelError, match="call eval"):
        run(net=Classifier())


@pytest.mark.slow
def test_a_network_of_convolutions_gets_narrower():
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip
    images = torch.randn(32, 3, 24, 24)
    frontier = rarefy.optimize(net, images[:2], images.split(8), max_loss=0.3, minutes=9)
    assert any("fewer channels" in p.name for p in frontier.points)
    assert frontier.best.model(images).shape == (32, 5)


# ---- Ctrl-C and kill -----------------------------------------------------------------------------------------------


def test_ctrl_c_returns_the_best_so_far(monkeypatch):
    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(search_module.Search, "_parts", interrupted)
    frontier = run()
    assert frontier.finished == "interrupted" and frontier.best is not None
    assert "interrupted" in frontier.verdict


@pytest.mark.slow
def test_ctrl_c_in_a_search_that_continues_counts_what_was_measured(monkeypatch, tmp_path):
    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    before = run(resume_dir=tmp_path)
    monkeypatch.setattr(search_module.Search, "_parts", interrupted)
    frontier = run(resume_dir=tmp_path)
    assert frontier.finished == "interrupted"
    assert {p.name for p in frontier.points} == {p.name for p in before.points if not p.error}
    assert frontier.best_point.recipe == before.best_point.recipe


KILLED = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_optimize import run
print(run(resume_dir={work!r}).to_json())
"""


@pytest.mark.slow
def test_a_killed_search_goes_on(tmp_path):
    code = KILLED.format(folder=str(__file__).rsplit("/", 1)[0], work=str(tmp_path / "work"))
    file = tmp_path / "work" / "search.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < 5):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = [json.loads(l) for l in file.read_text().splitlines(keepends=True) if l.endswith("\n")]
    frontier = run(resume_dir=tmp_path / "work")
    after = [json.loads(l) for l in file.read_text().splitlines()]
    assert after[: len(before)] == before and frontier.met
    assert [p.quality for p in frontier.points[:2]] == [r["value"]["quality"] for r in before[1:3]]


@pytest.mark.slow
def test_ten_kills_at_random_moments_lead_to_the_points_of_one_run(tmp_path):
    code = KILLED.format(folder=str(__file__).rsplit("/", 1)[0], work=str(tmp_path / "work"))
    file, chance = tmp_path / "work" / "search.jsonl", random.Random(0)
    for _ in range(10):
        before = file.read_bytes() if file.exists() else b""
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        while process.poll() is None and not file.exists():
            time.sleep(0.05)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=chance.uniform(0.5, 8.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        whole = before[: before.rfind(b"\n") + 1]
        assert file.read_bytes().startswith(whole)  # what was measured stays
    frontier = run(resume_dir=tmp_path / "work")
    records = [json.loads(l) for l in file.read_text().splitlines()[1:]]
    keys = [r["key"] for r in records]
    assert len(keys) == len(set(keys)) and frontier.met  # nothing is measured twice
    again = run(resume_dir=tmp_path / "work")
    assert again.points == frontier.points and again.best_index == frontier.best_index
