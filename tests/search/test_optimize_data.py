"""What a search calibrates on, evaluates on and remembers: recipes, resumed searches, and what they depend on."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rarefy
from rarefy.common.errors import ContainerError
from rarefy.evaluation.quality import Metric, metric_of
from rarefy.search import optimize as optimize_module
from rarefy.search.optimize import _split, optimize
from rarefy.search.search_key import function_key

pytestmark = pytest.mark.usefixtures("one_line")

X = torch.randn(96, 24, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 6, (96,), generator=torch.Generator().manual_seed(1))


def network(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 6)).eval()


NET = network()
BATCHES = list(zip(X.split(16), LABELS.split(16)))
FAST = {"max_loss": None, "speedup": 1000, "target": "latency", "minutes": 5}  # the fastest one, which is pruned


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ---- data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [BATCHES, BATCHES[:2], [(X, LABELS)], [(X[:2], LABELS[:2])]])
def test_the_last_quarter_is_for_evaluation(data):
    calibration, evaluation = _split(data, None, "accuracy", X[:2])
    samples = [torch.cat([x for x, _ in part]) for part in (data, calibration, evaluation)]
    assert torch.equal(torch.cat(samples[1:]), samples[0])
    assert 1 <= len(samples[2]) <= max(1, len(samples[0]) // 2) and len(samples[2]) >= len(samples[0]) // 6


@pytest.mark.parametrize("data", [BATCHES, [(X, LABELS)]])
def test_the_recipe_gives_the_same_weights_from_the_data_of_the_result(data):
    found = optimize(NET, X[:4], data, "accuracy", **FAST)
    assert any(next(iter(stage)) != "cast" for stage in found.best_point.recipe["stages"])
    again = copy.deepcopy(NET)
    rarefy.compress_(again, found.best_point.recipe, found.best.data)
    assert same_weights(again, found.best.compressed)
    assert set(found.best.data) == {"calibrate"} and sum(len(x) for x, _ in found.best.data["calibrate"]) < len(X)


@pytest.mark.slow
def test_a_trained_model_is_made_again_from_the_data_of_the_result():
    found = optimize(NET, X[:4], BATCHES, "agreement", train_minutes=0.3, **FAST)
    index = next(i for i, p in enumerate(found.points) if "trained" in p.name)
    point, again = found.points[index], copy.deepcopy(NET)
    trained = sum(len(x) for x, _ in BATCHES[:-1])
    rarefy.compress_(again, point.recipe, {"calibrate": BATCHES[:-1], "train": BATCHES[:-1]})
    assert trained == 80 and point.quality == pytest.approx(
        metric_of("agreement", NET, BATCHES[-1:]).measure(rarefy.compile(again, X[:4], precision=point.precision))
    )
    if index == found.best_index:
        assert set(found.best.data) == {"calibrate", "train"} and same_weights(again, found.best.compressed)


# ---- resumed searches --------------------------------------------------------------------------------------------


def first(model):
    return float((model(X).argmax(1) == LABELS).float().mean())


def second(model):
    return float((model(X).argmax(1) == LABELS).float().sum())


BEGIN = {"max_loss": 0.5, "minutes": 0.03}
OTHER_DATA = [(x + 1e-3, y) for x, y in BATCHES]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"net": network(2)}, "weights"),
        ({"example": X[:3]}, "example"),
        ({"data": OTHER_DATA}, "data"),
        ({"evaluate": second}, "evaluate, metric"),
        ({"higher_is_better": False}, "higher_is_better"),
        ({"seed": 1}, "seed"),
        ({"batch": 2}, "batches"),
        ({"max_loss": 0.4}, "targets"),
        ({"train_minutes": 0.01}, "train_minutes, train_data"),
        ({"layers": "2"}, "layers"),
    ],
)
def test_another_search_is_not_continued(tmp_path, change, differs):
    options = {"net": NET, "example": X[:4], "data": BATCHES, "evaluate": first, **BEGIN, "resume_dir": tmp_path}

    def run(net, example, data, evaluate, **options):
        return optimize(net, example, data, evaluate, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimize_module, "_run", lambda search: SimpleNamespace(best=None))  # the journal alone
        run(**options)
        run(**options)
        with pytest.raises(
            ContainerError, match=rf"belongs to another search \({differs} differ\): pass another resume_dir"
        ):
            run(**{**options, **change})


def test_other_evaluation_data_and_threads_are_another_search(tmp_path, monkeypatch):
    monkeypatch.setattr(optimize_module, "_run", lambda search: SimpleNamespace(best=None))
    optimize(NET, X[:4], BATCHES, "accuracy", eval_data=BATCHES[:2], resume_dir=tmp_path, **BEGIN)
    with pytest.raises(ContainerError, match=r"another search \(eval_data differ\)"):
        optimize(NET, X[:4], BATCHES, "accuracy", eval_data=BATCHES[:3], resume_dir=tmp_path, **BEGIN)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(ContainerError, match=r"another search \(threads differ\)"):
        optimize(NET, X[:4], BATCHES, "accuracy", eval_data=BATCHES[:2], resume_dir=tmp_path, **BEGIN)


def test_functions_are_told_apart_by_name_and_code():
    def make(text):
        place = {"__name__": "place"}
        exec(text, place)
        return place["score"]

    plain = make("def score(m):\n    return m + 1.0")
    moved = make("\n\n# a comment\ndef score(m):\n    'What it does.'\n    return m + 1.0")
    other = make("def score(m):\n    return m + 2.0")
    inner = [make(f"def score(m):\n    return (lambda y: y in {{'a', 'b'}} and {n})(m)") for n in (1, 1, 2)]
    assert function_key(plain) == function_key(make("def score(m):\n    return m + 1.0")) != function_key(other)
    assert function_key(inner[0]) == function_key(inner[1]) != function_key(inner[2])
    assert function_key(plain) != function_key(moved)  # its text is a constant of the code
    assert function_key(functools.partial(plain)) == function_key(plain)
    assert function_key(Metric("x", True, plain)) == function_key(metric_of(plain, NET, None)) == function_key(plain)
    assert function_key(None) is None and function_key("accuracy") == "accuracy"


def test_what_failed_is_measured_again(tmp_path):
    calls = []

    def score(model):
        calls.append(1)
        if broken and len(calls) == 2:
            raise ValueError("a mistake in the function")
        return first(model)

    broken = True
    options = {**BEGIN, "minutes": 5, "resume_dir": tmp_path}
    before = optimize(NET, X[:4], BATCHES, score, **options)
    failed = [p for p in before.points if p.error]
    assert len(failed) == 1 and "a mistake" in failed[0].error
    broken = False
    after = optimize(NET, X[:4], BATCHES, score, **options)
    assert not any(p.error for p in after.points)
    assert next(p for p in after.points if p.name == failed[0].name).quality is not None


def test_ctrl_c_while_other_engines_are_measured_leaves_the_dense_model(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(optimize_module, "measured_engines", interrupted)
    found = optimize(NET, X[:4], BATCHES, first, other_engines=True, **BEGIN)
    assert found.finished == "interrupted" and [p.name for p in found.points] == ["dense, fp32"]
    assert torch.allclose(found.best.model(X), NET(X), atol=1e-5)


def test_a_folder_that_is_in_use_or_no_folder_is_refused(tmp_path, monkeypatch):
    options = {**BEGIN, "resume_dir": tmp_path / "work"}

    def again(search):
        with pytest.raises(ContainerError, match="is in use by another run"):
            optimize(NET, X[:4], BATCHES, first, **options)
        return SimpleNamespace(best=None)

    with monkeypatch.context() as patch:
        patch.setattr(optimize_module, "_run", again)
        optimize(NET, X[:4], BATCHES, first, **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(ContainerError, match="is a file: give the name of a folder"):
        optimize(NET, X[:4], BATCHES, first, **{**options, "resume_dir": tmp_path / "file"})
