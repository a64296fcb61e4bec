"""Scores and the statistics beneath them, against sums written out by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from conftest import Attention, Net, Tied, image_batches
from rarefy.calibration.statistics import LayerStats, collect_stats
from rarefy.common.errors import DataError, ModelError, PatternError
from rarefy.model.layers import all_layers, select_layers
from rarefy.prune.scores import SCORES

INPUT, OUTPUT, GRADIENT = frozenset({"input"}), frozenset({"input", "output"}), frozenset({"gradient"})


def stats_of(model, data, needs=OUTPUT, layers="*", **kwargs):
    return collect_stats(model, data, select_layers(model, layers), needs, **kwargs)


def test_linear_norms():
    model = nn.Sequential(nn.Linear(5, 3))
    data = [torch.randn(4, 5), torch.randn(2, 7, 5)]
    s = stats_of(model, data)["0"]
    rows = torch.cat([x.reshape(-1, 5) for x in data])
    torch.testing.assert_close(s.in_norm.flatten(), rows.square().mean(0).sqrt())
    torch.testing.assert_close(s.out_norm.flatten(), model(rows).square().mean(0).sqrt().detach())
    assert s.tokens == 18


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 2), padding=(2, 0), dilation=(2, 1), groups=2),
        nn.Conv2d(4, 4, 3, groups=4, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, 2, stride=3, padding_mode="circular", padding=1),
    ],
)
def test_convolution_norms_are_those_of_the_unfolded_input(conv):
    x = torch.randn(2, 4, 9, 8)
    s = stats_of(nn.Sequential(conv), [x])["0"]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)  # [n, c*k, pixels]
    k = conv.kernel_size[0] * conv.kernel_size[1]
    want = columns.square().sum((0, 2)).reshape(conv.groups, 4 // conv.groups, k).transpose(1, 2)
    torch.testing.assert_close(s.in_square.squeeze(2), want)
    torch.testing.assert_close(s.out_square.flatten(), conv(x).square().sum((0, 2, 3)).detach())
    assert s.tokens == columns.shape[0] * columns.shape[2]


@pytest.mark.parametrize(
    ("conv", "shape"), [(nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9)), (nn.Conv3d(2, 4, 2), (2, 2, 4, 5, 6))]
)
def test_one_and_three_dimensions(conv, shape):
    x = torch.randn(shape)
    s = stats_of(nn.Sequential(conv), [x])["0"]
    # the gradient of sum(y^2)/2 with x^2 as weights: an independent route through autograd
    ones = torch.ones_like(conv.weight, requires_grad=True)
    stride, padding = conv.stride, conv.padding
    op = F.conv1d if isinstance(conv, nn.Conv1d) else F.conv3d
    op(x.square(), ones, stride=stride, padding=padding).sum().backward()
    assert ones.grad is not None
    want = ones.grad[0].flatten(1).T  # [K, I]
    torch.testing.assert_close(s.in_square[0, :, 0, :], want)


def test_a_subclass_that_pads_by_itself():
    class Same(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.pad(x, (0, 1, 0, 1)))  # TensorFlow's "same" for stride 2 on even sizes

    conv = Same(3, 4, 3, stride=2)
    x = torch.randn(2, 3, 8, 8)
    s = stats_of(nn.Sequential(conv), [x])["0"]
    columns = F.unfold(F.pad(x, (0, 1, 0, 1)), 3, stride=2).square().sum((0, 2)).reshape(3, 9).T
    torch.testing.assert_close(s.in_square[0, :, 0], columns)


def test_padding_tokens_do_not_count():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, attention_mask):
            return self.fc(x)

    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    s = stats_of(Model(), [{"x": x, "attention_mask": mask}], layers="fc")["fc"]
    assert s.tokens == 8
    torch.testing.assert_close(s.in_square.flatten(), x[mask.bool()].square().sum(0))


def test_batches_count_by_their_tokens():
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(12, 3)
    whole = stats_of(model, [x])["0"].in_norm
    parts = stats_of(model, list(x.split([1, 4, 7])))["0"].in_norm
    torch.testing.assert_close(whole, parts)


def test_attention_projections():
    model, q, kv = Attention().eval(), torch.randn(2, 3, 8), torch.randn(2, 6, 8)

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, batch):
            return self.inner(batch, kv)

    s = stats_of(Cross(), [q])
    inputs = s["inner.attn.in_proj_weight"].in_square
    torch.testing.assert_close(inputs[0].flatten(), q.square().sum((0, 1)))
    torch.testing.assert_close(inputs[1].flatten(), kv.square().sum((0, 1)))
    got = s["inner.attn.out_proj"]
    with torch.no_grad():
        e = 8
        Q, K, V = (
            F.linear(t, w, b)
            for t, w, b in zip((q, kv, kv), model.attn.in_proj_weight.split(e), model.attn.in_proj_bias.split(e))
        )
        heads = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (Q, K, V)]
        x = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got.in_square.flatten(), x.square().sum((0, 1)))


def test_embedding_counts_tokens():
    model = Tied()
    ids = torch.tensor([[1, 1, 2], [3, 1, 2]])
    s = stats_of(model, [ids], layers="embed")["embed"]
    assert s.in_square is not None


def test_gradients_against_autograd():
    model, data = Net(), image_batches()
    s = stats_of(model, data, GRADIENT, layers="hidden")["hidden"]
    model.eval()
    total_abs, total_square = 0, 0
    for x, y in data:
        (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model.hidden.weight])
        total_abs, total_square = total_abs + g.abs(), total_square + g.square()
    torch.testing.assert_close(s.gradient[0, 0], total_abs / 3)
    torch.testing.assert_close(s.fisher[0, 0], total_square / 3)


def test_collect_leaves_the_model_as_it_was():
    model = Net()
    model.conv.weight.requires_grad_(False)
    model.train()
    model.deep.eval()
    stats_of(model, image_batches(), GRADIENT | OUTPUT)
    assert model.training and not model.deep.training and not model.conv.weight.requires_grad
    assert all(not m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


W = torch.randn(2, 3, 4, 5)
S = LayerStats(
    in_square=torch.rand(2, 3, 1, 5),
    out_square=torch.rand(2, 1, 4, 1),
    tokens=7.0,
    grad_abs=torch.rand(2, 3, 4, 5),
    grad_square=torch.rand(2, 3, 4, 5),
    weight=3.0,
)
FORMULAS = {
    "magnitude": lambda g, k, o, i: abs(W[g, k, o, i]),
    "l2": lambda g, k, o, i: W[g, k, o, i] ** 2,
    "lamp": lambda g, k, o, i: W[g, k, o, i] ** 2 / (W**2)[abs(W) >= abs(W[g, k, o, i])].sum(),
    "gradient": lambda g, k, o, i: S.grad_abs[g, k, o, i] / 3,
    "taylor": lambda g, k, o, i: abs(W[g, k, o, i]) * S.grad_abs[g, k, o, i] / 3,
    "fisher": lambda g, k, o, i: W[g, k, o, i] ** 2 * S.grad_square[g, k, o, i] / 3,
    "activation": lambda g, k, o, i: (S.in_square[g, k, 0, i] / 7).sqrt() * (S.out_square[g, 0, o, 0] / 7).sqrt(),
    "wanda": lambda g, k, o, i: abs(W[g, k, o, i]) * (S.in_square[g, k, 0, i] / 7).sqrt(),
    "ria": lambda g, k, o, i: (
        (abs(W[g, k, o, i]) / W[g, :, o, :].abs().sum() + abs(W[g, k, o, i]) / W[g, k, :, i].abs().sum())
        * (S.in_square[g, k, 0, i] / 7).sqrt().sqrt()
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_scores_against_their_formulas(name):
    score = SCORES[name].of(W, S)
    want = torch.stack([FORMULAS[name](*index) for index in torch.cartesian_prod(*map(torch.arange, W.shape)).tolist()])
    torch.testing.assert_close(score.flatten(), want)


def test_every_score_has_a_formula_or_is_noise():
    assert set(SCORES) - set(FORMULAS) == {"random"}


def test_lamp_compares_layers_of_any_scale():
    """Global pruning by magnitude empties the layer whose weights are small for being written so."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight.mul_(1000)
    plain, layered = copy.deepcopy(model), copy.deepcopy(model)
    rarefy.prune_(plain, sparsity=0.5, scope="global")
    rarefy.prune_(layered, sparsity=0.5, score="lamp")
    assert int(rarefy.masks(plain)["1"].sum()) < 5
    assert 0.4 < rarefy.masks(layered)["1"].float().mean() < 0.6
    assert sum(int(m.sum()) for m in rarefy.masks(layered).values()) == 1024


def test_random_is_seeded_by_layer():
    one, two, other = Net(), Net(), Net()
    for model, seed in ((one, 0), (two, 0), (other, 1)):
        rarefy.prune_(model, score="random", sparsity=0.5, seed=seed)
    same = [torch.equal(a, b) for a, b in zip(rarefy.masks(one).values(), rarefy.masks(two).values())]
    assert all(same) and not torch.equal(rarefy.masks(one)["hidden"], rarefy.masks(other)["hidden"])


def nan_weights(model):
    model.hidden.weight.data[0, 0] = float("nan")


def nan_bias(model):
    model.conv.bias.data[0] = float("inf")


@pytest.mark.parametrize(
    ("spoil", "settings", "error", "message"),
    [
        (None, {"score": "wandda"}, PatternError, "unknown score 'wandda'.*did you mean 'wanda'"),
        (None, {"score": "wanda"}, DataError, "score 'wanda' reads input statistics: give data=batches"),
        (None, {"score": "wanda", "data": []}, DataError, "the calibration data is empty"),
        (nan_weights, {}, ModelError, "hidden: NaN or inf in its weights"),
        (
            nan_bias,
            {"score": "wanda", "data": image_batches()},
            ModelError,
            "conv: NaN or inf in its activations on calibration batch 0",
        ),
        (nan_bias, {"score": "taylor", "data": image_batches()}, ModelError, "the loss of calibration batch 0 is"),
        (
            None,
            {"score": "taylor", "data": [b[0] for b in image_batches()]},
            DataError,
            "no loss: the model's output has no .loss",
        ),
        (None, {"score": "taylor", "data": [()]}, DataError, "a batch is an empty tuple"),
        (None, {"pattern": "2:4"}, PatternError, r"2:4 cannot prune deep \(1 inputs a group\)"),
    ],
)
def test_prune_errors_leave_the_model_unchanged(spoil, settings, error, message):
    model = Net()
    if spoil:
        spoil(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=message):
        rarefy.prune_(model, **({"sparsity": 0.5} if "pattern" not in settings else {}), **settings)
    assert all(torch.equal(v, model.state_dict()[k]) or v.isnan().any() for k, v in before.items())
    assert list(before) == list(model.state_dict())


def test_a_layer_that_is_never_called_is_named():
    model = Net()
    model.extra = nn.Linear(4, 4)
    with pytest.raises(DataError, match="extra was never called"):
        rarefy.prune_(model, score="wanda", sparsity=0.5, data=image_batches())
    with pytest.raises(DataError, match="the loss does not depend on extra"):
        rarefy.prune_(model, score="taylor", sparsity=0.5, data=image_batches())


def test_pruning_again_only_adds_zeros():
    model = Net()
    rarefy.prune_(model, score="random", sparsity=0.4)
    first = rarefy.masks(model)["hidden"].clone()
    rarefy.prune_(model, sparsity=0.6)
    second = rarefy.masks(model)["hidden"]
    assert not bool((second & ~first).any()) and int((~second).sum()) == round(0.6 * second.numel())
    with pytest.raises(PatternError, match="already has 60"):
        rarefy.prune_(model, sparsity=0.2)


def test_padded_groups_are_reported():
    report = rarefy.prune_(nn.Sequential(nn.Linear(6, 4)), "2:4")
    assert report.notes == ("2:4 does not divide the inputs of 0: their last group is padded",)
    assert report.rows[0]["kept"] == 4 * 4


def test_layers_can_be_told_apart():
    assert len(all_layers(Net())) == 5


def test_flattened_and_attention_inputs_leave_padding_out():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.attn = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, attention_mask):
            return self.fc(x.flatten(0, 1)), self.attn(x, x, x)[0]

    x, mask = torch.randn(2, 3, 8), torch.tensor([[1, 0, 0], [1, 0, 0]])
    s = stats_of(Flat(), [{"x": x, "attention_mask": mask}])
    want = x[:, 0].square().sum(0)
    assert s["fc"].tokens == s["attn.in_proj_weight"].tokens == 2
    torch.testing.assert_close(s["fc"].in_square.flatten(), want)
    torch.testing.assert_close(s["attn.in_proj_weight"].in_square[1].flatten(), want)
