"""`rarefy.compat.torch_prune` against `torch.nn.utils.prune`: every function, shape, amount and repeated call."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as theirs

import rarefy
from helpers.marks import slow_except
from rarefy.common.errors import ModelError, PatternError
from rarefy.compat import torch_prune as ours

MODULES = {
    "linear": lambda: nn.Linear(12, 10),
    "conv": lambda: nn.Conv2d(6, 8, 3),
    "conv1d": lambda: nn.Conv1d(4, 6, 5, groups=2),
    "embedding": lambda: nn.Embedding(9, 7),
    "norm": lambda: nn.LayerNorm(11),
    "recurrent": lambda: nn.LSTM(5, 4),
}
NAMES = {"recurrent": ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0")}
AMOUNTS = (0.0, 0.3, 0.5, 1.0, 0, 3)
CALLS = {
    "identity": lambda lib, m, n, a: lib.identity(m, n),
    "random": lambda lib, m, n, a: lib.random_unstructured(m, n, amount=a),
    "l1": lambda lib, m, n, a: lib.l1_unstructured(m, n, amount=a),
    "l1 of scores": lambda lib, m, n, a: lib.l1_unstructured(m, n, a, importance_scores=some(m, n)),
    "random rows": lambda lib, m, n, a: lib.random_structured(m, n, amount=a, dim=0),
    "random columns": lambda lib, m, n, a: lib.random_structured(m, n, a, -1),
    "L2 of rows": lambda lib, m, n, a: lib.ln_structured(m, n, amount=a, n=2, dim=0),
    "L1 of columns": lambda lib, m, n, a: lib.ln_structured(m, n, a, 1, 1),
    "L-inf": lambda lib, m, n, a: lib.ln_structured(m, n, a, float("-inf"), 0),
    "L2 of scores": lambda lib, m, n, a: lib.ln_structured(m, n, a, 2, 0, importance_scores=some(m, n)),
    "custom": lambda lib, m, n, a: lib.custom_from_mask(m, n, (some(m, n) > 0.4)),
}


def some(module, name):
    """Scores in the shape of a parameter, the same for both."""
    original = getattr(module, f"{name}_orig", None)
    shape = getattr(module, name).shape if original is None else original.shape
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def both(make):
    torch.manual_seed(0)
    module = make()
    return module, copy.deepcopy(module)


def outcome(call, lib, module, name, amount):
    torch.manual_seed(5)
    try:
        call(lib, module, name, amount)
    except (ValueError, IndexError, TypeError) as error:
        return type(error)
    return None


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("amount", slow_except(AMOUNTS, 0.3, 3))
def test_every_function_chooses_what_torch_chooses(kind, way, amount):
    for name in NAMES.get(kind, ("weight", "bias")):
        mine, torchs = both(MODULES[kind])
        if getattr(mine, name, None) is None:
            continue
        for _ in range(3):  # again and again, of what is left
            wrong = outcome(CALLS[way], theirs, torchs, name, amount)
            failed = outcome(CALLS[way], ours, mine, name, amount)
            assert (wrong is None) == (failed is None), (wrong, failed)
            if wrong is not None:
                assert issubclass(failed, ValueError)
                return
            assert torch.equal(getattr(mine, name), getattr(torchs, name))
            assert torch.equal(
                rarefy.masks(mine)[name if name != "weight" else ""].float(), getattr(torchs, f"{name}_mask")
            )


@pytest.mark.parametrize("first", CALLS)
@pytest.mark.parametrize("second", CALLS)
def test_one_after_another(first, second):
    mine, torchs = both(MODULES["conv"])
    for way in (first, second, first):
        assert outcome(CALLS[way], theirs, torchs, "weight", 0.4) is None
        assert outcome(CALLS[way], ours, mine, "weight", 0.4) is None
    assert torch.equal(mine.weight, torchs.weight)


@pytest.mark.parametrize("method", [theirs.L1Unstructured, theirs.RandomUnstructured])
@pytest.mark.parametrize("amount", [0.3, 25])
@pytest.mark.parametrize("scored", [False, True])
def test_global(method, amount, scored):
    def pairs(net):
        return [(net[0], "weight"), (net[0], "bias"), (net[1], "weight")]

    a, b = both(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(9, 5)))
    for _ in range(2):
        for lib, net in ((theirs, a), (ours, b)):
            torch.manual_seed(1)
            scores = {p: some(*p) for p in pairs(net)[:2]} if scored else None
            lib.global_unstructured(pairs(net), method, importance_scores=scores, amount=amount)
    for (m, n), (o, _) in zip(pairs(a), pairs(b)):
        assert torch.equal(getattr(m, n), getattr(o, n))


@pytest.mark.parametrize(
    ("make", "norm"), [("linear", "fro"), ("conv1d", "nuc"), ("linear", float("inf")), ("conv", 0)]
)
def test_norms(make, norm):
    mine, torchs = both(MODULES[make])
    for lib, net in ((ours, mine), (theirs, torchs)):
        lib.ln_structured(net, "weight", 0.5, norm, 0)
    assert torch.equal(mine.weight, torchs.weight)


def test_remove_and_is_pruned():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert not ours.is_pruned(net)
    ours.l1_unstructured(net[0], "weight", 0.5)
    ours.l1_unstructured(net[0], "bias", 0.5)
    before = net[0].weight.detach().clone()
    assert ours.is_pruned(net) and ours.is_pruned(net[0]) and not ours.is_pruned(net[1])
    ours.remove(net[0], "weight")
    assert ours.is_pruned(net) and torch.equal(net[0].weight, before) and isinstance(net[0].weight, nn.Parameter)
    ours.remove(net[0], "bias")
    assert not ours.is_pruned(net) and int((net[0].bias == 0).sum()) == 2
    with pytest.raises(ModelError, match="'weight' of Linear has no mask"):
        ours.remove(net[0], "weight")


def test_what_torch_has_pruned_goes_on_here():
    mine, torchs = both(MODULES["linear"])
    for net in (mine, torchs):
        theirs.l1_unstructured(net, "weight", 0.5)
    ours.l1_unstructured(mine, "weight", 0.5)
    theirs.l1_unstructured(torchs, "weight", 0.5)
    assert torch.equal(mine.weight, torchs.weight) and not hasattr(mine, "weight_orig")
    theirs.random_unstructured(mine, "bias", 2)
    assert ours.is_pruned(mine)
    ours.remove(mine, "bias")
    assert int((mine.bias == 0).sum()) == 2


def test_masked_biases_and_norms_hold_in_training_fold_and_file(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    ours.l1_unstructured(net[0], "bias", 3), ours.random_unstructured(net[1], "weight", 2)
    ours.l1_unstructured(net[2], "weight", 0.5)
    zeros = {n: m.clone() for n, m in rarefy.masks(net).items()}
    assert set(zeros) == {"0.bias", "1", "2"}
    x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
    rarefy.fit_(net, [(x, y)] * 5, optimizer=lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1))
    want = net(x).detach()
    rarefy.fold_(net)
    assert not rarefy.masks(net) and torch.equal(net(x), want)
    for name, mask in zeros.items():
        weight = net.get_parameter(name if "." in name else f"{name}.weight")
        assert not weight[~mask].any() and weight[mask].all()
    rarefy.save(net, tmp_path / "out")
    plain = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    assert torch.equal(rarefy.load(tmp_path / "out", model=plain)(x), want)


def pruned_by_torch():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.Linear(16, 4)
    )
    theirs.random_structured(net[0], "weight", 0.25, 0)
    theirs.l1_unstructured(net[0], "weight", 0.3)  # a container of two
    theirs.l1_unstructured(net[4], "weight", 0.8), theirs.l1_unstructured(net[4], "bias", 4)
    theirs.global_unstructured([(net[5], "weight"), (net[5], "bias")], theirs.L1Unstructured, amount=0.5)
    return net


@pytest.mark.parametrize("how", ["model", "state"])
def test_adopt_train_save_load_run(how, tmp_path):
    net, x = pruned_by_torch(), torch.randn(16, 3, 8, 8)
    net.eval()
    want = net(x).detach()
    if how == "state":  # what torch.save(net.state_dict()) keeps: weight_orig and weight_mask
        state, net = (
            net.state_dict(),
            nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.Linear(16, 4)
            ).eval(),
        )
        rarefy.adopt_(net, state=state)
    else:
        rarefy.adopt_(net)
    assert torch.equal(net(x), want) and not theirs.is_pruned(net)
    zeros = rarefy.masks(net)
    assert set(zeros) == {"0", "4", "4.bias", "5", "5.bias"}
    rarefy.fit_(net, [(x, torch.randint(0, 4, (16,)))] * 3)
    for name, mask in zeros.items():
        module, _, param = (name if "." in name else f"{name}.weight").rpartition(".")
        assert not getattr(net.get_submodule(module), param).detach()[~mask].any()
    rarefy.save(net, tmp_path / "out")
    again = pruned_by_torch()
    for module, name in itertools.product(again, ("weight", "bias")):
        if hasattr(module, f"{name}_orig"):
            theirs.remove(module, name)
    assert torch.equal(rarefy.load(tmp_path / "out", model=again).eval()(x), net.eval()(x))


MISTAKES = [
    (lambda m: ours.l1_unstructured(m, "weight", 1.5), PatternError, r"amount: expected a fraction between 0.0 and 1.0, got 1.5"),
    (lambda m: ours.l1_unstructured(m, "weight", 3.0), PatternError, r"got 3.0; write a count as an int: 3"),
    (lambda m: ours.l1_unstructured(m, "weight", 17), PatternError, r"amount: expected a count between 0 and 16 .*, got 17"),
    (lambda m: ours.l1_unstructured(m, "weight", -1), PatternError, r"amount: expected a count between 0 and 16 .*, got -1"),
    (lambda m: ours.l1_unstructured(m, "weight", "half"), PatternError, r"amount: expected a fraction .* or a count, got 'half'"),
    (lambda m: ours.l1_unstructured(m, "weight", True), PatternError, r"got True"),
    (lambda m: ours.l1_unstructured(m, "wieght", 0.5), ModelError, r"unknown parameter 'wieght'.*'weight'"),
    (lambda m: ours.l1_unstructured("m", "weight", 0.5), ModelError, r"expected a torch.nn.Module, got str"),
    (lambda m: ours.l1_unstructured(m, "weight", float("nan")), PatternError, "amount: expected a fraction between 0.0 and 1.0, got nan"),
    (lambda m: ours.l1_unstructured(m, "weight", float("inf")), PatternError, "amount: expected a fraction between 0.0 and 1.0, got inf"),
    (lambda m: ours.identity(m, None), ModelError, "expected the name of a parameter, got NoneType"),
    (lambda m: ours.l1_unstructured(m, "weight", 0.5, [1.0]), PatternError, "importance_scores: expected the shape of weight, .*, got list"),
    (lambda m: ours.global_unstructured(5, "L1Unstructured", amount=0.5), PatternError, r"parameters: expected a list of \(module, name\) pairs, got 5"),
    (lambda m: ours.global_unstructured([(m, "weight")], "L1Unstructured", [1.0], amount=0.5), PatternError, r"importance_scores: expected a dict \{\(module, name\): scores\}, got list"),
    (lambda m: ours.l1_unstructured(m, "weight", 0.5, torch.ones(3)), PatternError, r"importance_scores: expected the shape of weight, \[4, 4\], got \[3\]"),
    (lambda m: ours.ln_structured(m, "weight", 0.5, 2, 2), PatternError, r"dim: expected a dimension of weight between -2 and 1, got 2"),
    (lambda m: ours.ln_structured(m, "bias", 0.5, 2, 0), PatternError, r"bias has 1 dimension"),
    (lambda m: ours.ln_structured(m, "weight", 0.5, "two", 0), PatternError, r"n: expected a norm order .*got 'two'"),
    (lambda m: ours.ln_structured(m, "weight", 0.5, "nuc", 0), PatternError, r"'nuc' for three dimensions"),
    (lambda m: ours.custom_from_mask(m, "weight", torch.ones(2)), PatternError, r"mask: expected the shape of weight, \[4, 4\], got \[2\]"),
    (lambda m: ours.global_unstructured([m], "L1Unstructured", amount=0.5), PatternError, r"parameters: expected a list of \(module, name\) pairs"),
    (lambda m: ours.global_unstructured([(m, "weight")], theirs.LnStructured, amount=0.5), PatternError, r"unknown pruning method 'LnStructured'"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "says"), MISTAKES)
def test_mistakes(wrong, error, says):
    module = nn.Linear(4, 4)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=says):
        wrong(module)
    assert {k: v.tolist() for k, v in module.state_dict().items()} == {k: v.tolist() for k, v in before.items()}
