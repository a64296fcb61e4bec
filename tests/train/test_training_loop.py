"""Sparsity schedules against their formulas, and the training loop."""

import pytest
import torch
from torch import nn

import rarefy
from conftest import Net, image_batches
from rarefy import Gradual, fit_
from rarefy.common.errors import DataError, ModelError, PatternError, RecipeError
from rarefy.train.optimizers import LR_SCHEDULES, optimizer_of
from rarefy.train.sparsity_schedule import sparsities


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("linear", lambda t: 0.1 + 0.7 * t),
        ("cubic", lambda t: 0.8 + (0.1 - 0.8) * (1 - t) ** 3),
        ("exponential", lambda t: 1 - 0.9 * (0.2 / 0.9) ** t),
    ],
)
def test_schedules(kind, at):
    way = sparsities(kind, 0.8, 7, first=0.1)
    assert way == pytest.approx([at((i + 1) / 7) for i in range(7)]) and way[-1] == 0.8
    assert way == sorted(way) and sparsities(kind, 0.8, 1) == [0.8]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("cubik", 0.5, 3), "unknown schedule 'cubik'.*did you mean 'cubic'"),
        (("linear", 0.5, 0), "steps: expected 1 to 100,000, got 0"),
        (("linear", 0.2, 3, 0.5), "expected 0 <= first <= last <= 1, got first 0.5 and last 0.2"),
        (("exponential", 1.0, 3), "never reaches sparsity 1"),
    ],
)
def test_messages_for_wrong_schedules(args, message):
    with pytest.raises(PatternError, match=message):
        sparsities(*args)


def losses(report):
    return [r["loss"] for r in report.rows]


def test_training_lowers_the_loss_and_keeps_the_masks():
    model, data = Net(), image_batches()
    rarefy.prune_(model, sparsity=0.5)
    kept = {n: m.clone() for n, m in rarefy.masks(model).items()}
    report = fit_(model, data, epochs=8, optimizer=optimizer_of("sgd", 0.1, momentum=0.9, weight_decay=1e-3), seed=0)
    assert losses(report)[-1] < losses(report)[0]
    assert all(torch.equal(m, kept[n]) for n, m in rarefy.masks(model).items())
    assert bool((model.hidden.weight[~kept["hidden"]] == 0).all())


def test_the_same_seed_gives_the_same_weights():
    out = []
    for _ in range(2):
        torch.manual_seed(3)
        model = Net()
        fit_(model, image_batches(), epochs=2, seed=5)
        out.append(model.hidden.weight.detach())
    assert torch.equal(*out)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
@pytest.mark.parametrize("score", ["magnitude", "taylor", "activation"])
def test_gradual_pruning_reaches_its_sparsity(pattern, score):
    model = nn.Sequential(nn.Flatten(), nn.Linear(243, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    plan = Gradual(
        sparsity=None if pattern == "2:4" else 0.75, pattern=pattern, score=score, steps=4, end=0.6, layers=["3", "5"]
    )
    data = image_batches()
    report = fit_(model, data, epochs=5, prune=plan, calibrate=data)
    seen = [r["sparsity"] for r in report.rows]
    assert seen == sorted(seen) and seen[-1] == (0.5 if pattern == "2:4" else 0.75)
    assert 0 < seen[0] < seen[-1]
    zeros = [1 - m.float().mean().item() for m in rarefy.masks(model).values()]
    assert zeros == pytest.approx([seen[-1]] * 2, abs=0.03)
    if pattern == "2:4":
        assert bool(((model[3].weight != 0).reshape(-1, 4).sum(1) <= 2).all())


def test_regrowth_brings_weights_back():
    kept = {}
    for regrow in (False, True):
        torch.manual_seed(0)
        model, seen = Net(), []
        plan = Gradual(sparsity=0.5, first=0.5, schedule="linear", steps=6, end=1.0, score="random", regrow=regrow)
        for seed in range(2):
            fit_(model, image_batches(), prune=Gradual(**{**plan.__dict__, "seed": seed}))
            seen.append(rarefy.masks(model)["hidden"].clone())
        kept[regrow] = bool((seen[1] & ~seen[0]).any())
    assert kept == {False: False, True: True}


def test_the_best_final_epoch_is_restored():
    model, scores, states = Net(), iter([0.9, 0.1, 0.5, 0.4]), []

    def validate(m):
        states.append(m.hidden.weight.detach().clone())
        return next(scores)

    plan = Gradual(sparsity=0.5, steps=2, end=0.5)
    report = fit_(model, image_batches(), epochs=4, validate=validate, prune=plan)
    # epoch 1 was better, but not yet pruned as asked
    assert report.summary["best_epoch"] == 3 and torch.equal(model.hidden.weight, states[2])
    low = fit_(Net(), image_batches(), epochs=2, validate=lambda m: next(iter([1.0])), maximize=False)
    assert low.summary["best_epoch"] == 1


def test_modes_and_learning_rates_are_restored():
    model = Net().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit_(model, image_batches(), optimizer=optimizer, lr_schedule="cosine", epochs=2)
    assert not model.training and optimizer.param_groups[0]["lr"] == 0.1
    assert all(0 <= f(t / 10) <= 1 for f in LR_SCHEDULES.values() for t in range(11))


def test_data_may_be_a_function_of_the_epoch():
    seen = []

    def data(epoch):
        seen.append(epoch)
        return image_batches()

    fit_(Net(), data, epochs=3)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr_schedule": "cosin"}, RecipeError, "unknown lr_schedule 'cosin'.*did you mean 'cosine'"),
        ({"epochs": 0}, RecipeError, "epochs: expected a whole number of at least 1, got 0"),
        ({"data": []}, DataError, "the training data is empty in epoch 1"),
        (
            {"data": iter(image_batches()), "epochs": 2},
            DataError,
            "empty in epoch 2 .an iterator gives its batches only once",
        ),
        (
            {"loss": lambda out, batch: out.sum() * float("nan")},
            ModelError,
            "the loss is nan in epoch 1, step 1: lower the learning rate",
        ),
        (
            {"prune": Gradual(sparsity=0.5, score="wanda")},
            DataError,
            "score 'wanda' needs data: give calibrate=batches",
        ),
    ],
)
def test_messages_for_wrong_arguments(settings, error, message):
    data = settings.pop("data", image_batches())
    with pytest.raises(error, match=message):
        fit_(Net(), data, **settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "wandda"}, "unknown score 'wandda'"),
        ({"start": 0.8, "end": 0.2}, "expected start <= end, got start 0.8 and end 0.2"),
        ({"sparsity": 5}, "sparsity: expected a number between 0 and 1, got 5"),
    ],
)
def test_a_wrong_configuration_is_refused_at_once(options, message):
    with pytest.raises(PatternError, match=message):
        Gradual(**{"sparsity": 0.5, **options})


def test_a_frozen_model_is_refused():
    with pytest.raises(ModelError, match="Net has no trainable parameters"):
        fit_(Net().requires_grad_(False), image_batches())


def test_optimizers_by_name():
    with pytest.raises(RecipeError, match="unknown optimizer 'adamx'.*did you mean 'adam"):
        optimizer_of("adamx", 0.1)
    with pytest.raises(RecipeError, match="optimizer 'adam' cannot be made with lr=0.1, .'momentum': 0.9."):
        optimizer_of("adam", 0.1, momentum=0.9)


def test_schedules_work_with_generators():
    model, data = Net(), image_batches(6)
    seen = []

    def loss(out, batch):
        seen.append(sum(int((~m).sum()) for m in rarefy.masks(model).values()))
        return nn.functional.cross_entropy(out, batch[1])

    fit_(model, lambda epoch: iter(data), prune=Gradual(sparsity=0.9, steps=4, end=0.6), loss=loss)
    assert len(set(seen)) >= 4 and seen == sorted(seen)


def test_silent_mistakes_are_refused():
    with pytest.raises(PatternError, match="regrow has no effect with score 'taylor': masked weights have no gradient"):
        fit_(
            Net(), image_batches(), prune=Gradual(sparsity=0.5, score="taylor", regrow=True), calibrate=image_batches()
        )
    with pytest.raises(ModelError, match="the validation metric is nan in epoch 1"):
        fit_(Net(), image_batches(), validate=lambda m: float("nan"))


def test_sparsity_is_reported():
    plan = Gradual(sparsity=0.9, first=0.5, start=0.9, end=0.9, steps=1)
    assert [r["sparsity"] for r in fit_(Net(), image_batches(4), epochs=2, prune=plan).rows] == [0.0, 0.9]
