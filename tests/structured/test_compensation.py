"""Compensation for removed units, and corrected statistics of BatchNorms."""

import copy

import pytest
import torch
from torch import nn

import rarefy
from rarefy.common.errors import DataError, ModelError, RarefyError


def copies(first, last):
    """A network whose units 3 to 5 repeat units 0 to 2, weakly."""
    net = nn.Sequential(first, nn.ReLU(), last)
    with torch.no_grad():
        first.weight[3:] = first.weight[:3] * 0.5
        first.bias[3:] = first.bias[:3] * 0.5
        last.weight[:, 3:] *= 0.1
    return net


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_consumers_are_compensated(kind):
    if kind == "linear":
        net, data = copies(nn.Linear(4, 6), nn.Linear(6, 2)), [torch.randn(64, 4) for _ in range(3)]
    else:
        net = copies(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 3, bias=False))
        data = [torch.randn(8, 4, 6, 6) for _ in range(3)]
    dense, plain, repaired = net, copy.deepcopy(net), copy.deepcopy(net)
    rarefy.cut_(plain, data[0])
    rarefy.cut_(repaired, data[0], data=data)
    x = data[0] * 1.5 + 0.1  # not what was seen
    with torch.no_grad():
        lost = (plain(x) - dense(x)).norm() / dense(x).norm()
        left = (repaired(x) - dense(x)).norm() / dense(x).norm()
    assert left < 1e-2 < lost


def test_ridge_regression_matches_a_solver():
    from rarefy.structured.compensation import RIDGE, compensation
    from rarefy.structured.consumers import Moments

    x = torch.randn(500, 7) @ torch.randn(7, 7) + torch.randn(7)
    left = torch.tensor([True, False, True, True, False, True, False])
    moments = Moments.of(7)
    for part in x.split(100):
        moments.add(part)
    B, shift = compensation(moments, left, intercept=True)
    centred = (x - x.mean(0)).double()
    S = centred[:, left]
    ridge = (RIDGE + (4 / 500) ** 2) * (S.square().sum(0) / len(x)).mean()
    stacked = torch.cat([S, (len(x) * ridge).sqrt() * torch.eye(4, dtype=torch.float64)])
    target = torch.cat([centred, torch.zeros(4, 7, dtype=torch.float64)])
    want = torch.linalg.lstsq(stacked, target).solution.T
    torch.testing.assert_close(B[~left], want[~left], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(B[left], torch.eye(7, dtype=torch.float64)[left][:, left])
    torch.testing.assert_close(shift, x.mean(0).double() - B @ x.mean(0).double()[left], rtol=1e-3, atol=1e-4)


def norms_net():
    """A network whose running statistics are of other data than the tests give."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)).eval()
    for norm in (net[1], net[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    return net


def norm_outputs(net, data):
    """Return all outputs of the two norms in evaluation mode, [pixels, channels] each."""
    with torch.no_grad():
        first = [net[1](net[0](x)) for x in data]
        return [torch.cat([y.movedim(1, -1).flatten(0, -2) for y in ys]) for ys in (first, [net[2:](y) for y in first])]


@pytest.mark.parametrize("shuffled", [False, True])
def test_norms_return_what_they_did(shuffled):
    """The remaining channels have the dense model's mean and standard deviation, on data unlike the statistics."""
    net = norms_net()
    data = [torch.randn(4, 3, 8, 8) * scale + 1 for scale in (0.5, 2.0, 3.0)]
    dense, loader = copy.deepcopy(net), data
    if shuffled:
        pictures = torch.cat(data)
        loader = torch.utils.data.DataLoader(pictures, batch_size=4, shuffle=True)
    rarefy.cut_(net, data[0], data=loader, repair="batchnorm", layers="0")
    assert net[1].num_features == 4 and net[1].momentum == 0.1 and not net[1].training
    stays = [next(i for i in range(8) if torch.equal(w, dense[0].weight[i])) for w in net[0].get_parameter("weight")]
    first, want = norm_outputs(net, data)[0], norm_outputs(dense, data)[0][:, stays]
    torch.testing.assert_close(first, want, rtol=1e-3, atol=1e-3)  # its inputs have not changed
    second, want = norm_outputs(net, data)[1], norm_outputs(dense, data)[1]
    torch.testing.assert_close(second.mean(0), want.mean(0), rtol=0.02, atol=0.02)
    torch.testing.assert_close(second.std(0), want.std(0), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("size", [1, 4])
def test_norms_behind_corrected_norms(size):
    """A chain of three norms, also in batches of one sample: later ones get inputs as they will be."""
    torch.manual_seed(3)
    parts = [m for _ in range(3) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    net = nn.Sequential(nn.Conv2d(3, 8, 1), *parts, nn.Conv2d(8, 2, 1)).eval()
    x = torch.randn(32, 3, 8, 8) + 0.5
    with torch.no_grad():
        for norm in (net[2], net[5], net[8]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    dense, plain = copy.deepcopy(net), copy.deepcopy(net)
    rarefy.cut_(net, x, data=list(x.split(size)), repair="batchnorm", keep=0.75)
    rarefy.cut_(plain, x, keep=0.75)
    with torch.no_grad():
        stays = [next(i for i in range(8) if torch.equal(b, dense[7].bias[i])) for b in net[7].get_parameter("bias")]
        want, got = dense[:9](x)[:, stays], net[:9](x)
        worse = plain[:9](x)
    for moment in (lambda y: y.mean((0, 2, 3)), lambda y: y.std((0, 2, 3))):
        error, before = ((moment(y) - moment(want)).norm() / moment(want).norm() for y in (got, worse))
        assert error < 0.2 and error < 0.5 * before


def test_norms_whose_inputs_stay_keep_their_statistics():
    """Averages over the data alone would replace what was collected in training."""
    net = nn.Sequential(norms_net(), nn.Flatten(), nn.Linear(4 * 36, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    before = copy.deepcopy(net[0].state_dict())
    data = [torch.randn(4, 3, 8, 8) * 2 + 1 for _ in range(3)]
    rarefy.cut_(net, data[0], data=data, layers="2")
    assert net[2].out_features == 4
    for name, value in net[0].state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-5)


def test_channels_that_hardly_vary_keep_their_scale():
    """A channel is nearly constant on the data, and gets noise from the cut: it must not vanish on other data."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        net[0].weight[:4, 2] = 0  # only the others read the third input, which is constant here
        net[2].weight[0, :4] = 0
    data = [torch.cat([torch.randn(4, 2, 8, 8), torch.ones(4, 1, 8, 8)], 1) for _ in range(2)]
    dense = copy.deepcopy(net)
    rarefy.cut_(net, data[0], data=data, repair="batchnorm", layers="0")
    ratio = (net[3].running_var + net[3].eps) / (dense[3].running_var + dense[3].eps)
    assert torch.isfinite(ratio).all() and float(ratio.min()) > 0.005 and float(ratio.max()) < 200


def test_norms_called_by_keyword_and_batches_without_rows():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.norm(input=self.a(x)).relu())

    net = Net().eval()
    x = torch.randn(32, 6)
    rarefy.cut_(net, x, data=[x, x[:0], x * 2], repair="batchnorm")
    assert net.norm.num_features == 4 and torch.isfinite(net(x)).all()
    torch.testing.assert_close(net.norm.running_mean, torch.zeros(4), rtol=0, atol=1e-4)  # its inputs are as before


def test_norms_with_shared_statistics():
    first, second = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
    second.running_mean, second.running_var = first.running_mean, first.running_var
    net = nn.Sequential(nn.Linear(6, 8), first, nn.ReLU(), nn.Linear(8, 8), second, nn.Linear(8, 2)).eval()
    x = torch.randn(32, 6)
    rarefy.cut_(net, x, data=[x], layers=["0", "3"])
    assert net[1].num_features == net[4].num_features == 4 and torch.isfinite(net(x)).all()


def test_a_norm_of_vectors_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b, self.c = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(self.norm(self.b(self.norm(self.a(x)).relu())).relu())

    net = Twice().eval()
    data = [torch.randn(32, 6) for _ in range(4)]
    dense, plain = copy.deepcopy(net), copy.deepcopy(net)
    rarefy.cut_(net, data[0], data=data, keep=0.75, repair="batchnorm")
    rarefy.cut_(plain, data[0], keep=0.75)
    assert net.norm.num_features == 6
    x = torch.cat(data)
    with torch.no_grad():
        assert (net(x) - dense(x)).norm() < (plain(x) - dense(x)).norm()


def test_a_model_that_cannot_be_copied_is_named():
    class Own(nn.Sequential):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    net = Own(*norms_net())
    data = [torch.randn(4, 3, 8, 8)]
    with pytest.raises(ModelError, match=r"Own cannot be copied, .* give repair=\['ridge', 'bias'\] \(no copies\)"):
        rarefy.cut_(net, data[0], data=data)
    rarefy.cut_(net, data[0], data=data, repair=["ridge", "bias"])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"repair": "rigde"}, "unknown repair 'rigde'.*did you mean 'ridge'"),
        ({"repair": ["bias", "x"]}, "unknown repair 'x'"),
        ({"data": iter([torch.randn(1, 4)])}, "data is read more than once: give a list or a DataLoader"),
        ({"data": [torch.randn(1, 5)]}, "cannot be called with a batch of float32 1x5"),
    ],
)
def test_messages_for_wrong_repairs(how, message):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RarefyError, match=message):
        rarefy.cut_(net, torch.randn(1, 4), **how)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_batch_norms_are_restored_when_data_fails():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    net[1].running_mean.normal_()
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(2, 3, 6, 6)

    class Once:
        def __init__(self):
            self.it = iter([x])

        def __iter__(self):
            return self.it

    nan = [x, x * float("nan")]
    cases = [([], True), ([], "batchnorm"), (nan, True), (nan, "batchnorm"), (Once(), True)]
    for given, repair in cases:
        with pytest.raises((DataError, ModelError), match="not finite" if given is nan else "gave no batch"):
            rarefy.cut_(net, x, data=given, repair=repair)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def constant_net(last, between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), between, last)


def test_repair_and_constants_are_not_counted_twice():
    net = constant_net(nn.Linear(8, 3), nn.Sigmoid())
    batches = [torch.randn(64, 5) for _ in range(4)]
    dense, plain = copy.deepcopy(net), copy.deepcopy(net)
    rarefy.cut_(plain, batches[0])
    x = torch.cat(batches)
    lost = []
    for how in (["ridge"], ["bias"], ["ridge", "bias"]):
        cut = copy.deepcopy(net)
        rarefy.cut_(cut, batches[0], data=batches, repair=how)
        lost.append(float((cut(x) - dense(x)).detach().norm()))
    assert max(lost) < float((plain(x) - dense(x)).detach().norm())
    assert lost[2] == min(lost)
