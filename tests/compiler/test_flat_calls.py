"""Short ways through a call: they check and return what the long ones do."""

import threading

import pytest
import torch
from torch import nn

import rarefy
from rarefy.common.errors import DataError
from rarefy.runtime import bindings

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x, y):
        return self.layer(x) + self.layer(y)


class Nested(Net):
    def forward(self, x, y):
        return {"sum": super().forward(x, y), "each": [self.layer(x), (self.layer(y),)]}


class Several(Net):
    def forward(self, x, y):
        return self.layer(x), self.layer(y)


@pytest.fixture
def pair():
    net = Net().eval()
    return net, rarefy.compile(net, (torch.randn(3, 6), torch.randn(3, 6)), tune=False)


def test_wrong_sizes_after_right_ones(pair):
    _, compiled = pair
    x = torch.randn(4, 6)
    compiled(x, x)
    for wrong in (torch.randn(4, 7), torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, 1), 3.0):
        with pytest.raises(DataError):
            compiled(x, wrong)
    with pytest.raises(DataError, match="as in another input"):
        compiled(x, torch.randn(5, 6))
    with pytest.raises(DataError):
        compiled(x)
    compiled(x, x)


def test_keywords_in_any_order():
    net = Net().eval()
    x, y = torch.randn(3, 6), torch.randn(3, 6)
    compiled = rarefy.compile(net, {"x": x, "y": y}, tune=False)
    want = net(x, y).detach()
    for kwargs in ({"x": x, "y": y}, {"y": y, "x": x}):
        assert torch.equal(compiled(**kwargs), compiled(x=x, y=y))
        torch.testing.assert_close(compiled(**kwargs), want)
    for wrong in ({"x": x}, {"x": x, "z": y}, {"x": x, "y": y, "z": y}):
        with pytest.raises(DataError, match="keywords"):
            compiled(**wrong)


@pytest.mark.parametrize("kind", [Nested, Several])
def test_outputs_are_nested_as_the_model_does(kind):
    net = kind().eval()
    x, y = torch.randn(3, 6), torch.randn(3, 6)
    compiled = rarefy.compile(net, (x, y), tune=False)
    got, want = compiled(x, y), net(x, y)
    assert type(got) is type(want)
    torch.testing.assert_close(got, want)


def test_parameters_and_tensors_with_gradients(pair):
    net, compiled = pair
    x, y = nn.Parameter(torch.randn(6, 3).T), torch.randn(3, 6, requires_grad=True)
    out = compiled(x, y)
    assert not out.requires_grad
    torch.testing.assert_close(out, net(x, y).detach())


def test_a_value_that_is_no_tensor_is_compared_each_time():
    class Power(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x, n):
            return self.layer(x) ** n

    x = torch.randn(3, 6)
    compiled = rarefy.compile(Power().eval(), (x, 2), tune=False)
    compiled(x, 2)
    compiled(x, torch.tensor(2))
    with pytest.raises(DataError, match="compiled for 2"):
        compiled(x, torch.tensor(3))


def test_after_forgetting_and_in_threads(pair):
    net, compiled = pair
    inputs = [(torch.randn(n, 6), torch.randn(n, 6)) for n in (1, 2, 3, 7)]
    want = [net(*i).detach() for i in inputs]
    wrong = []

    def call(i):
        for _ in range(50):
            if not torch.allclose(compiled(*inputs[i]), want[i], atol=1e-5):
                wrong.append(i)

    compiled.forget()
    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
