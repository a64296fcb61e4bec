"""ASP's two lines: zeros that an optimizer keeps, in a script that knows nothing of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from conftest import tiny_llama
from helpers.structured_models import Attends
from helpers.vision_models import Everything, spread_
from rarefy.common.errors import ModelError, PatternError, RarefyError
from rarefy.compat import asp
from rarefy.model.layers import select_layers
from rarefy.model.sparsity_pattern import make_mask

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
}


def groups_of(layer, m):
    """How many of every m neighbouring inputs are not zero."""
    W = layer.layout.view(layer.weight.detach())
    return (F.pad(W, (0, -W.shape[-1] % m)).unflatten(-1, (-1, m)) != 0).sum(-1)


def train(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def images(n=4):
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=rng), torch.randint(0, 5, (8,), generator=rng)) for _ in range(n)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_zeros_stay_in_weights_state_and_checkpoints(name, pattern, tmp_path):
    torch.manual_seed(0)
    n, m = map(int, pattern.split(":"))
    model = Everything()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, images(2))  # with a state that is there already
    names = list(model.state_dict())
    report = asp.prune_trained_model(model, optimizer, pattern=pattern)
    assert list(model.state_dict()) == names and not rarefy.masks(model)
    layers = [r["layer"] for r in report.rows]
    assert "one" in layers and "deep" not in layers and "stem" not in layers and "fc" not in layers
    assert any("left dense" in t and "stem" in t and "deep" in t for t in report.notes)
    zeros = {l.full_name: l.weight.detach() == 0 for l in select_layers(model, layers)}
    train(model, optimizer, images())
    for layer in select_layers(model, layers):
        gone = zeros[layer.full_name]
        assert int(groups_of(layer, m).max()) <= n and torch.equal(layer.weight.detach() == 0, gone)
        moments = [v for v in optimizer.state[layer.original].values() if torch.is_tensor(v) and v.shape == gone.shape]
        assert moments and not any(v[gone].any() for v in moments)
    again = Everything()
    again.load_state_dict(model.state_dict())
    other = OPTIMIZERS[name](again.parameters())
    asp.prune_trained_model(again, other, pattern=pattern)  # the same zeros are found again
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_the_masks_are_those_of_the_pattern():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    want = [make_mask(m.weight.detach().abs(), "2:4") for m in (model[0], model[2])]
    asp.prune_trained_model(model, torch.optim.SGD(model.parameters(), 0.1))
    assert [torch.equal(m.weight != 0, w) for m, w in zip((model[0], model[2]), want)] == [True, True]


@pytest.mark.parametrize(
    ("make", "example"),
    [(Everything, lambda: torch.randn(2, 3, 8, 8)), (Attends, lambda: torch.randint(0, 20, (2, 5)))],
)
def test_with_an_example_more_is_kept(make, example):
    torch.manual_seed(0)
    plain, x = spread_(make()), example()
    ordered, sums = copy.deepcopy(plain), []
    for model, options in ((plain, {}), (ordered, {"example": x, "seconds": 1})):
        before = model(x).detach()
        report = asp.prune_trained_model(model, torch.optim.SGD(model.parameters(), 0.1), **options)
        assert not torch.equal(model(x), before)
        sums.append(
            sum(float(select_layers(model, r["layer"] or None)[0].weight.detach().abs().sum()) for r in report.rows)
        )
    assert sums[1] > sums[0] and "input channels permuted" in report.notes[-1 if make is Attends else -2]


def test_attention_and_language_models():
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    asp.prune_trained_model(model, optimizer)
    ids = torch.randint(0, 64, (2, 8))
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(int(groups_of(l, 4).max()) <= 2 for l in select_layers(model))


def test_scores_of_data():
    model, batches = Everything().eval(), images(1)
    asp.prune_trained_model(
        model, torch.optim.SGD(model.parameters(), 0.1), score="wanda", data=[b[0] for b in batches]
    )
    assert int((model.one.weight == 0).sum()) == model.one.weight.numel() // 2


def test_later_stages_know_the_zeros(tmp_path):
    model = Everything()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    asp.prune_trained_model(model, optimizer)
    train(model, optimizer, images(1))
    assert "one" in rarefy.adopt_(model.eval())
    rarefy.save(rarefy.fold_(model), tmp_path / "out")
    one = next(r for r in rarefy.inspect(tmp_path / "out").rows if r["tensor"] == "one.weight")
    assert one["pattern"] == "2:4"


def test_to_cuda_sparse():
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    if not torch.cuda.is_available():
        with pytest.raises(
            ModelError, match="need an NVIDIA GPU of compute capability 8.0 or higher, and none was found"
        ):
            asp.to_cuda_sparse(model)
        pytest.skip("semi-structured weights need an NVIDIA GPU")
    model.cuda().half()
    asp.prune_trained_model(model, torch.optim.SGD(model.parameters(), 0.1), layers="Linear")
    x = torch.randn(64, 128, device="cuda", dtype=torch.half)
    want = model(x)
    assert asp.to_cuda_sparse(model, layers="Linear").summary["layers"] == "2 of 2"
    torch.testing.assert_close(model(x), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"pattern": "unstructured"}, PatternError, "expected an N:M pattern such as 2:4, got 'unstructured'"),
        ({"optimizer": "sgd"}, ModelError, "optimizer: expected a torch.optim.Optimizer, got str"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)}, ModelError, "holds no parameter of this"),
        ({"score": "wanda"}, RarefyError, "give data=batches"),
        ({"pattern": "2:7"}, ModelError, "no layer has an input count divisible by 7: 0 has 8"),
        ({"seconds": -1, "example": torch.ones(1, 8)}, PatternError, "seconds: expected a number above 0, got -1"),
        ({"example": torch.ones(1, 3)}, RarefyError, "cannot be called with a batch of float32 1x3"),
    ],
)
def test_mistakes_change_nothing(options, error, says):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    before = copy.deepcopy(model.state_dict())
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(error, match=says):
        asp.prune_trained_model(model, optimizer, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not getattr(optimizer, "_optimizer_step_post_hooks", None)


def test_batches_that_can_be_read_once():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    data = (torch.randn(4, 8) for _ in range(2))
    moves = torch.optim.SGD(model.parameters(), lr=0.1)
    asp.prune_trained_model(
        model, moves, layers="Linear", score="wanda", data=data, example=torch.randn(4, 8), seconds=0.5
    )
    assert all(int((l.weight.view(-1, 4) != 0).sum(1).max()) <= 2 for l in (model[0], model[2]))


def test_no_model():
    with pytest.raises(ModelError, match="model: expected a torch.nn.Module, got NoneType"):
        asp.prune_trained_model(None, None)
