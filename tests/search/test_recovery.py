"""Training after a search, whole blocks and low rank as what it may do, and recipes of both."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rarefy
from rarefy.common.errors import ContainerError, DataError, RecipeError
from rarefy.model.masks import masks
from rarefy.search import recovery
from rarefy.search.deploy import Variant
from rarefy.search.frontier import Point
from rarefy.search.recovery import can_train, candidate, fitting, train_stage, with_training
from rarefy.search.solve import front, shrunk
from rarefy.search.space import Part, measured_block_loss, measured_rank_loss, removable_blocks
from rarefy.search.stages import renumbered, stages_of
from rarefy.search.targets import parse_targets

pytestmark = pytest.mark.usefixtures("one_line")

INT8 = Variant("int8", "int8")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Deep(nn.Module):
    """Blocks of which one does nothing."""

    def __init__(self, blocks=4, width=32, idle=1):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 5)
        with torch.no_grad():
            self.layers[idle].down.weight.mul_(1e-4)
            self.layers[idle].down.bias.zero_()

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = torch.randn(256, 16, generator=torch.Generator().manual_seed(3))
NET = Deep().eval()


def point(name, loss, speed, stages=({"cut": {"units": "neuron"}},), precision="int8"):
    return Point(name, 1 - loss, loss, {"1": {"median": 1 / speed}}, {"1": speed}, 1, 1, {"stages": stages}, precision)


# ---- whole blocks and low rank -----------------------------------------------------------------------------------


def test_a_block_that_does_nothing_costs_least():
    blocks = removable_blocks(NET, X[:2], None, None)
    assert [b.name for b in blocks] == ["layers.0", "layers.1", "layers.2", "layers.3"]
    with torch.no_grad():
        losses = [measured_block_loss(NET, b, [X], [NET(X)]) or 0.0 for b in blocks]
    assert min(range(4), key=losses.__getitem__) == 1 and losses[1] < 1e-4 < min(losses[0], losses[2])


def test_blocks_with_layers_that_stay_are_left_out():
    assert [b.name for b in removable_blocks(NET, X[:2], None, ["layers.2.up"])] == ["layers.0", "layers.1", "layers.3"]


def test_full_rank_loses_nothing_and_less_rank_loses_more():
    layer = next(l for l in rarefy.model.layers.select_layers(NET, None, None) if l.full_name == "layers.0.up")
    with torch.no_grad():
        wanted = [NET(X)]
        losses = [measured_rank_loss(NET, layer, level, {}, [X], wanted) or 0.0 for level in (-0.25, 0.3, 0.7)]
        assert torch.equal(NET(X), wanted[0])
    assert losses[0] < 1e-9 < losses[1] < losses[2]


def test_names_after_blocks_are_gone():
    assert renumbered("layers.2.up.weight:0", ["layers.1"]) == "layers.1.up.weight:0"
    assert renumbered("3.up", ["1", "2"]) == "1.up"
    assert renumbered("other.2.up", ["layers.1"]) == "other.2.up" and renumbered("head", ["layers.1"]) == "head"


def test_the_recipe_of_a_choice_gives_the_layers_that_were_chosen():
    parts = [
        Part("layer", "layers.1", 1, (1.0,), (0.1,), {"1": (0.2,)}),
        Part("neuron", "layers.2.up.weight:0", 128, (0.5,), (0.1,), {"1": (0.1,)}),
        Part("low rank", "layers.3.up", 4096, (0.5,), (0.1,), {"1": (0.1,)}),
        Part("unstructured", "layers.3.down", 4096, (0.5,), (0.1,), {"1": (0.1,)}),
    ]
    stages = stages_of({p.key: p.amounts[0] for p in parts}, parts, INT8, {"neuron": "magnitude"}, False)
    assert [next(iter(s)) for s in stages] == ["cut", "cut", "factorize", "prune"]
    net = copy.deepcopy(NET)
    rarefy.compress_(net, {"stages": stages}, {"calibrate": [X[:32]]})
    assert len(net.layers) == 3 and net.layers[1].up.out_features == 64
    assert torch.equal(net.layers[0].up.weight, NET.layers[0].up.weight)
    assert not isinstance(net.layers[2].up, nn.Linear)
    assert float((net.layers[2].down.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_a_removed_block_undoes_what_was_done_inside_and_one_of_each_list_stays():
    parts = [
        Part("neuron", "layers.0.up.weight:0", 8, (0.5,), (0.1,), {"1": (0.1,)}),
        Part("neuron", "head.weight:0", 8, (0.5,), (10.0,), {"1": (0.1,)}),
        Part("layer", "layers.0", 1, (1.0,), (1.0,), {"1": (0.4,)}),
        Part("layer", "layers.1", 1, (1.0,), (5.0,), {"1": (0.4,)}),
    ]
    chosen = [(set(c.amounts), round(c.loss, 6), round(c.saving, 6)) for c in front(parts)]
    assert chosen == [
        (set(), 0.0, 0.0),
        ({("neuron", "layers.0.up.weight:0")}, 0.1, 0.1),
        ({("layer", "layers.0")}, 1.0, 0.4),
        ({("layer", "layers.0"), ("neuron", "head.weight:0")}, 11.0, 0.5),
    ]
    kept = {p.key: p.losses for p in shrunk(parts, 1.0)}
    assert kept["layer", "layers.0"] == (1.0,) and kept["layer", "layers.1"] == (5.0,)


@pytest.mark.slow
def test_the_search_removes_the_block_that_does_nothing():
    deep = Deep(width=256).eval()
    labels = deep(X).argmax(1)
    frontier = rarefy.optimize(
        deep, X, X.split(64), lambda m: float((m(X).argmax(1) == labels).float().mean()), max_loss=0.02, minutes=9,
        batch=(256,),
    )  # fmt: skip
    tried = [s["cut"]["layers"] for p in frontier.points for s in p.recipe["stages"] if "layers" in s.get("cut", {})]
    assert tried and all("layers.1" in layers for layers in tried)


# ---- training ----------------------------------------------------------------------------------------------------


def test_training_comes_before_quantization():
    train = {"train": {"epochs": 1}}
    stages = [{"cut": {}}, {"quantize": {"weights": "int4"}}]
    assert with_training(stages, train) == [{"cut": {}}, train, {"quantize": {"weights": "int4"}}]
    assert with_training([{"prune": {}}], train) == [{"prune": {}}, train]


def test_what_is_learned_depends_on_the_outputs_and_the_metric():
    assert train_stage(NET, X[:2], "accuracy", 3)["train"]["distill"] == {"task": 0.0}
    assert train_stage(NET, X[:2], "my function", 3)["train"]["distill"] == {"task": 0.0, "by": "mse"}
    bert = rarefy.model.hf.load_folder(rarefy.data.builtin.model_folder("minilm")).eval()
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    learned = train_stage(bert, batch, "retrieval R@1", 3)["train"]["distill"]
    assert learned["logits"] == 0 and learned["hidden"] == "squarehead" and learned["embedding"] > 0


def test_the_point_that_training_is_expected_to_bring_within_the_limit_is_trained():
    base = point("dense, int8", 0.0, 2.0, ({"cast": {"dtype": "fp32"}},))
    points = [base, point("slow", 0.005, 2.5), point("fast", 0.02, 3.0), point("too fast", 0.2, 4.0)]
    targets = parse_targets(0.01, "latency")
    assert candidate(points, {("int8", (), (), "fp32"): base}, targets, 0.35) == 2
    assert (
        candidate(points, {("int8", (), (), "fp32"): base}, targets, 0.9) == 1
    )  # training brings too little for the faster one
    trained = point("trained", 0.009, 3.5, ({"cut": {}}, {"train": {}}))
    assert not can_train(trained) and not can_train(base)
    assert candidate([*points, trained], {("int8", (), (), "fp32"): base}, targets, 0.35) is None


def test_batches_and_epochs_fill_the_time():
    assert fitting(50, 1.0, 20) == (20, 2) and fitting(5, 1.0, 20) == (5, 1)
    assert fitting(0.1, 1.0, 20) == fitting(-5.0, 1.0, 20) == (0, 0)


@pytest.mark.slow
def test_training_that_does_not_fit_is_left_out_and_tried_again_with_more_time(tmp_path):
    labels = NET(X).argmax(1)

    def accuracy(model):
        return float((model(X).argmax(1) == labels).float().mean())

    options = {"max_loss": 0.02, "batch": (256,), "minutes": 0.1, "resume_dir": tmp_path}
    found = rarefy.optimize(NET, X, X.split(64), accuracy, train_minutes=1e-6, **options)
    assert not any("trained" in p.name for p in found.points)
    keys = [json.loads(line).get("key", "") for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert not [k for k in keys if k.startswith(("epochs of", "training batches"))]


def test_what_the_first_run_loads_does_not_hide_the_time_of_a_batch(monkeypatch):
    clock = [0.0]

    def run_stage(student, stage, context):
        clock[0] += (3.0 if clock[0] == 0 else 0.5) + 0.25 * len(context.data.values["train"])

    monkeypatch.setattr(recovery, "run_stage", run_stage)
    monkeypatch.setattr(recovery, "RunData", lambda recipe, data: data)
    monkeypatch.setattr(recovery, "RunContext", lambda data, **_: SimpleNamespace(data=SimpleNamespace(values=data)))
    monkeypatch.setattr(recovery.time, "perf_counter", lambda: clock[0])
    each = recovery.seconds_a_batch(NET, NET, {"train": {"epochs": 1}}, [X] * 20, 0)
    assert each == pytest.approx(0.25)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    wide = Deep(blocks=2, width=64, idle=1).eval()
    wanted = wide(X)

    def likeness(model):
        return float(1 - (model(X) - wanted).square().mean() / wanted.square().mean())

    place = tmp_path_factory.mktemp("search")
    options = {"max_loss": 0.02, "minutes": 9, "batch": (256,), "resume_dir": place}
    train = torch.randn(512, 16, generator=torch.Generator().manual_seed(5)).split(32)
    frontier = rarefy.optimize(wide, X, X.split(64), likeness, train_minutes=0.25, train_data=train, **options)
    return wide, train, frontier, options, likeness


@pytest.mark.slow
def test_a_trained_point_loses_less_than_before(trained):
    _, _, frontier, _, _ = trained
    after = [p for p in frontier.points if "trained" in p.name]
    assert 1 <= len(after) <= 2 and not any(n.startswith("nothing was trained") for n in frontier.notes)
    for p in after:
        before = next(b for b in frontier.points if f"{b.name}, trained" == p.name)
        assert p.loss < before.loss and [s for s in p.recipe["stages"] if "train" not in s] == before.recipe["stages"]


@pytest.mark.slow
def test_the_recipe_of_a_trained_point_gives_the_same_weights(trained):
    wide, train, frontier, _, _ = trained
    index, p = next((i, p) for i, p in enumerate(frontier.points) if "trained" in p.name)
    twice = []
    for _ in range(2):
        net = copy.deepcopy(wide)
        epochs = next(s["train"]["epochs"] for s in p.recipe["stages"] if "train" in s)
        assert epochs >= 1
        rarefy.compress_(net, dict(p.recipe), {"calibrate": list(X.split(64)), "train": list(train)})
        assert not masks(net)
        twice.append(net)
    assert all(torch.equal(a, b) for a, b in zip(twice[0].parameters(), twice[1].parameters()))
    if index == frontier.best_index:
        pairs = zip(twice[0].parameters(), frontier.best.compressed.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_a_search_with_training_resumes_to_the_same_points(trained):
    wide, train, frontier, options, likeness = trained
    again = rarefy.optimize(wide, X, X.split(64), likeness, train_minutes=0.25, train_data=train, **options)
    assert [p.name for p in again.points] == [p.name for p in frontier.points]
    assert again.best_point.quality == frontier.best_point.quality


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"train_minutes": -1}, RecipeError, "train_minutes: expected a number of at least 0, got -1"),
        ({"train_minutes": True}, RecipeError, "train_minutes: expected a number of at least 0, got True"),
        ({"train_data": [X]}, RecipeError, "train_data has no effect without training: give train_minutes"),
        ({"train_minutes": 1}, DataError, "training needs data"),
        ({"train_minutes": 1, "train_data": 3}, DataError, "train_data"),
    ],
)
def test_wrong_options(options, error, text):
    with pytest.raises(error, match=text):
        rarefy.optimize(NET, X[:2], None, lambda m: 1.0, **options)


def test_training_without_dropout_leaves_the_rates_as_they_were():
    net = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 5))
    seen = []
    net[1].register_forward_hook(lambda m, i, o: seen.append((m.training, torch.equal(i[0], o))))
    batches = [(X[:8], torch.zeros(8, dtype=torch.long))]
    rarefy.fit_(net, batches, steps=rarefy.train.fit.Steps(dropout=False))
    assert seen == [(False, True)] and net[1].training
    rarefy.fit_(net, batches)
    assert seen[-1] == (True, False)


def test_without_dropout_nothing_drops_and_batch_norms_learn():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm = nn.Linear(16, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            return self.norm(nn.functional.dropout(self.lin(x), 0.9, self.training))

    net, seen = Drops(), []
    net.lin.register_forward_hook(lambda m, i, o: seen.append(net.training))
    before = net.norm.running_mean.clone()
    rarefy.fit_(net, [(X[:8], torch.zeros(8, dtype=torch.long))], steps=rarefy.train.fit.Steps(dropout=False))
    assert seen == [False] and not torch.equal(net.norm.running_mean, before) and net.training


def test_a_search_of_other_layers_is_refused_in_the_same_folder(tmp_path):
    options = {"max_loss": 0.5, "minutes": 9, "resume_dir": tmp_path}
    rarefy.optimize(NET, X[:2], layers=["first"], **options)
    with pytest.raises(ContainerError, match="belongs to another search \\(layers differ"):
        rarefy.optimize(NET, X[:2], **options)


def test_training_data_that_the_model_does_not_run_on_is_found_before_the_search():
    with pytest.raises(DataError, match="train_data: the model does not run on its first batch"):
        rarefy.optimize(NET, X[:2], X.split(64), train_minutes=1, train_data=[torch.randn(4, 9)])
