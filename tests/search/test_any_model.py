"""Searches of models that are built unlike most: what may not change, odd inputs, layers that few others have."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import rarefy
from conftest import tiny_llama
from rarefy.common.errors import ContainerError, DataError, RecipeError
from rarefy.dependency.graph import trace
from rarefy.evaluation.quality import metric_of
from rarefy.model.batches import count_samples, first_samples
from rarefy.pipeline.speed import resize_batch
from rarefy.prune import prune
from rarefy.search import parts, space
from rarefy.search.deploy import PLAIN, distance, outputs_of
from rarefy.search.joint_loss import JointLoss
from rarefy.search.journal import Journal
from rarefy.search.optimize import optimize, save_result
from rarefy.search.parts import PartMeasurer
from rarefy.search.search import Search
from rarefy.search.search_key import function_key
from rarefy.search.space import PATTERNS, Part
from rarefy.search.targets import parse_targets
from rarefy.search.task import Task
from rarefy.structured.cut import remove_and_compensate
from rarefy.structured.unit_selection import keep_masks

torch.manual_seed(0)
X = torch.randn(128, 32)
NET = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
DATA = [*X.split(32)]


def test_ignored_layers_stay_in_fp32():
    frontier = optimize(NET, X[:4], DATA, "agreement", max_loss="90%", ignore=["2"], minutes=0.2)
    changed = [p for p in frontier.points if p.precision is not None and not p.error]
    assert changed and all(p.ignore == ("2",) for p in changed)
    in_8_bits = rarefy.optimize(NET, X[:4], DATA, "agreement", max_loss="90%", ignore=["2"], target="size", minutes=0.2)
    kinds = {n.removesuffix(".weight"): k.held[0].kind for n, k in kernels_of(in_8_bits.best.model).items()}
    assert kinds["2"] == "fp32" and {kinds["0"], kinds["4"]} != {"fp32"}


def kernels_of(compiled):
    names = compiled.exported.layers
    return {names[node]: kernel for node, kernel in compiled.kernels.items() if node in names}


def test_without_data_a_function_judges_cuts_too(monkeypatch):
    saved = lambda self, method, smaller, level=None: {"1": 0.4 if method == "neuron" else 0.0}  # noqa: E731
    monkeypatch.setattr(PartMeasurer, "_saved", saved)  # times of so small a model vary
    wanted = NET(X).argmax(1)
    judge = lambda model: float((model(X).argmax(1) == wanted).float().mean())  # noqa: E731
    frontier = optimize(NET, X[:4], None, judge, max_loss="60%", target="size", minutes=0.3)
    cut = [p for p in frontier.points if "fewer" in p.name]
    assert cut and not any(p.error for p in cut), [p.error for p in cut]
    net = copy.deepcopy(NET)
    rarefy.compress_(net, frontier.best.point.recipe, frontier.best.data)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), frontier.best.compressed.parameters()))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.slow
def test_models_that_run_but_cannot_be_saved():
    torch.manual_seed(0)
    x = torch.randn(16, 5, 8)
    frontier = optimize(Recurrent().eval(), x[:2], [*x.split(4)], "similarity", max_loss="20%", minutes=0.1)
    assert frontier.best is not None and all(p.disk_bytes == 0 for p in frontier.points if not p.error)
    assert any("cannot be saved" in note for note in frontier.notes)
    limited = optimize(Recurrent().eval(), x[:2], [*x.split(4)], "similarity", max_loss="20%", size_mb=9, minutes=0.1)
    assert not limited.met


@pytest.mark.slow
def test_a_model_that_cannot_be_saved_leaves_its_recipe_and_all_points(tmp_path):
    x = torch.randn(16, 5, 8)
    frontier = optimize(Recurrent().eval(), x[:2], [*x.split(4)], "similarity", max_loss="20%", minutes=0.1)
    assert any("a folder gets the recipe without a model" in note for note in frontier.notes)
    assert not any("no layer is selected" in note for note in frontier.notes)
    assert save_result(frontier, tmp_path / "out") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["frontier.json", "recipe.yaml"]
    with pytest.raises(ContainerError, match="exists and is a Rarefy folder; pass overwrite=True"):
        save_result(frontier, tmp_path / "out")
    assert save_result(frontier, tmp_path / "out", overwrite=True) == 0
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(ContainerError, match="not only Rarefy's"):
        save_result(frontier, tmp_path / "out", overwrite=True)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, mask):
        return self.b(torch.relu(self.a(mask @ x)))


@pytest.mark.parametrize("samples", [1, 4])
def test_inputs_without_a_batch_dimension_stay(samples):
    inputs = {"x": torch.randn(samples, 6, 32), "mask": torch.eye(6)}
    assert {k: len(v) for k, v in resize_batch(inputs, 3).items()} == {"x": 3, "mask": 6}
    frontier = optimize(
        Masked().eval(), inputs, [inputs] * 2, "similarity", max_loss="50%", batch=(1, samples), minutes=0.1
    )
    assert frontier.dense.quality == pytest.approx(1.0)


def test_more_minutes_keep_what_was_measured(tmp_path):
    options = {"max_loss": "60%", "resume_dir": tmp_path, "target": "size"}
    first = optimize(NET, X[:4], DATA, "agreement", minutes=0.05, **options)
    later = optimize(NET, X[:4], DATA, "agreement", minutes=0.2, **options)
    recipes = lambda frontier: [(p.recipe["stages"], p.precision) for p in frontier.points if not p.error]  # noqa: E731
    assert all(r in recipes(later) for r in recipes(first))
    assert later.best_point.disk_bytes <= first.best_point.disk_bytes


def test_what_an_earlier_search_measured_corrects_the_times():
    search = search_of(parse_targets(0.5, "latency"))
    recipe = {"stages": [{"cast": {"dtype": "fp32"}}, {"prune": {"sparsity": 0.5}}], "seed": 0}
    earlier = dataclasses.replace(search.reference, name="earlier", recipe=recipe, speedup={"1": 2.0})
    sums = {"loss": 0.1, "savings": {"1": 0.4}}
    search.journal.values["point cast+prune None: 1"] = {**dataclasses.asdict(earlier), "predicted": sums}
    search.add_earlier_points()
    search.add_earlier_points()
    [observed] = search.observed
    assert observed.point.name == "earlier" and observed.savings == {"1": 0.4} and observed.base == search.reference
    assert [p.name for p in search.points] == ["dense, fp32", "earlier"]


class Block(nn.Module):
    """Of torchvision's kind."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


def test_heads_of_torchs_attention_have_a_loss():
    torch.manual_seed(0)
    net, x = nn.Sequential(Block(), Block()).eval(), torch.randn(8, 6, 32)
    graph = trace(net, x)
    group = next(g for g in graph.groups if g.kind == "head")
    loss = space.measured_group_loss(net, x, group, torch.arange(4.0), 2, [x], outputs_of(net, [x]))
    assert loss is not None and 0 < loss < 1
    part = Part("head", group.name, 4, (0.5,), (1.0,), {})
    joint = JointLoss(net, x, [part], {"head": "magnitude"}, [x])
    assert (joint({part.key: 0.5}) or 0.0) > 0


class Own(nn.Linear):
    """A class of the user's."""


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 4, 1)), (4, 3, 8, 8)),
        (lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.ConvTranspose2d(16, 4, 2)), (4, 3, 8, 8)),
        (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Own(16, 4)), (16, 8)),
    ],
)
def test_units_that_other_layers_read_count_in_the_joint_loss(make, shape):
    """Grouped and transposed convolutions, and classes of users: as much as where the units have really gone."""
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(*shape)
    graph = trace(net, x)
    group = next(g for g in graph.groups if g.lock is None and g.kind != "group" and g.name == "0.weight:0")
    part = Part("channel" if len(shape) == 4 else "neuron", group.name, group.size, (0.5,), (1.0,), {})
    joint = JointLoss(net, x, [part], {part.method: "magnitude"}, [])
    found = joint({part.key: 0.5})
    smaller = copy.deepcopy(net)
    small = trace(smaller, x)
    same = next(g for g in small.groups if (g.name, g.kind) == (group.name, group.kind))
    remove_and_compensate(
        smaller, x, small, keep_masks({same.axis: joint.scores[part.key]}, {same.axis: same.size // 2}), (), []
    )
    assert found == pytest.approx(distance(smaller, outputs_of(net, [x]), [x]), rel=1e-4) and (found or 0.0) > 0


def test_data_that_do_not_fit_the_model_are_refused_at_once():
    judge = lambda model: float(model(X).sum())  # noqa: E731
    with pytest.raises(DataError, match="data: the model does not run on its first batch"):
        optimize(NET, X[:4], [torch.randn(8, 31)] * 4, judge, max_loss=0.5)


def search_of(targets, **points):
    """A search whose precisions have these losses and speed-ups."""
    metric = metric_of("agreement", NET, DATA)
    search = Search(Task(NET, X[:4], DATA, metric, targets, (1,), 60.0), Journal(None, {}))
    dense = search.measure_dense()
    made = {n: (loss, speed, size) for n, (loss, speed, size) in points.items()}

    def point(name, variant, stages, **more):
        loss, speed, size = made.get(variant.name, (0.5, 0.1, 99))
        recipe = {"stages": [variant.name], "seed": 0}
        return dataclasses.replace(
            dense,
            name=name,
            loss=loss,
            speedup={"1": speed},
            disk_bytes=size,
            precision=variant.precision,
            recipe=recipe,
        )

    search.point = point
    return search


def test_the_precision_of_a_search_depends_on_the_target(monkeypatch):
    precision = rarefy.search.deploy.variants_of(NET, True, False)[0].name
    points = {precision: (1e-5, 1.5, 50), "int8": (1e-4, 2.5, 25)}
    fastest = search_of(parse_targets(0.01, "latency"), **points)
    assert fastest._variants().name == "int8"
    exact = search_of(parse_targets(None, "loss", speedup=2.0), **points)
    assert exact._variants().name == precision  # int8 is fast enough: cuts could only make it worse
    small = search_of(parse_targets(0.01, "size"), **points)
    assert small._variants().name == "int8"


def test_functions_with_a_decorator_are_known_by_their_code():
    def first(model):
        return 1.0

    def second(model):
        return 2.0

    second.__qualname__ = first.__qualname__
    keys = [function_key(torch.no_grad()(f)) for f in (first, second)]
    assert keys[0] != keys[1] and keys[0] == function_key(torch.no_grad()(first))
    assert function_key(lambda m, a=1: a) != function_key(lambda m, a=2: a)


def test_samples_of_inputs_with_a_target_are_counted():
    batch = {"input_ids": torch.ones(64, 5, dtype=torch.long), "attention_mask": torch.ones(64, 5)}, torch.ones(64)
    assert count_samples(batch) == 64
    inputs, target = first_samples(batch, 3)
    assert len(inputs["input_ids"]) == len(target) == 3
    assert count_samples(({"x": torch.ones(4, 2)}, torch.ones(5))) == 1  # they do not agree


def test_training_that_did_not_happen_has_a_note():
    frontier = optimize(NET, X[:4], DATA, "agreement", max_loss=1e-9, minutes=0.05, train_minutes=1e-4)
    assert not any("trained" in p.name for p in frontier.points)
    assert any(n.startswith("nothing was trained") for n in frontier.notes)


@pytest.mark.slow
def test_the_model_that_is_found_keeps_keys_and_values_as_before():
    model, ids = tiny_llama(), torch.randint(0, 60, (4, 8))
    assert model.config.use_cache
    found = optimize(model, {"input_ids": ids}, [{"input_ids": ids}] * 4, "agreement", max_loss="90%", minutes=0.05)
    assert found.best.compressed.config.use_cache and model.config.use_cache


def test_limits_are_still_checked_first():
    with pytest.raises(RecipeError, match="nothing limits the loss"):
        optimize(NET, X[:4], DATA, max_loss=None)


class WithIdle(nn.Module):
    """A layer that no call uses."""

    def __init__(self):
        super().__init__()
        self.net, self.idle = copy.deepcopy(NET), nn.Linear(32, 64)

    def forward(self, x):
        return self.net(x)


def test_a_layer_that_no_data_reach_leaves_the_others_their_parts(monkeypatch):
    """Statistics of all layers take one pass, although one layer has none."""
    passes = []
    monkeypatch.setattr(parts, "calibrate", lambda *args, **how: passes.append(1) or prune.calibrate(*args, **how))
    monkeypatch.setattr(PartMeasurer, "_saved", lambda self, method, smaller, level=None: {"1": level or 0.5})
    named = []
    for net in (NET, WithIdle().eval()):
        journal = Journal(None, {})
        measurer = PartMeasurer(net, X[:4], DATA, PLAIN, ["1"], journal, None, None, lambda *k: True, False)
        named.append({(p.method, p.name.removeprefix("net.")) for p in measurer.measure() if p.method in PATTERNS})
    assert named[0] == named[1] and ("1x4", "2") in named[0] and len(passes) == 2
