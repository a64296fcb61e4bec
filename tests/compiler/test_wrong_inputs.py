"""What `compile` and what it returns say about wrong inputs."""

import copy
import math
import pickle

import pytest
import torch
from torch import fx, nn

import rarefy
from rarefy.common.errors import DataError, ModelError, OutputsDifferError
from rarefy.compiler.executor import run_call

x = torch.randn(4, 8)
images = torch.randn(2, 3, 8, 8)


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def with_nan():
    net = mlp()
    net[0].weight.data[0, 0] = math.nan
    return net


def partly_training():
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    net[1].train()
    return net


WRONG = {
    "no numbers": (mlp, torch.randn(0, 8), {}, DataError, "empty tensor, .*0x8: give at least one sample"),
    "NaN": (mlp, torch.full((2, 8), math.nan), {}, DataError, "the example has NaN"),
    "NaN weights": (with_nan, x, {}, ModelError, "0.weight has NaN"),
    "partly training": (partly_training, x, {}, ModelError, r"1 is in training mode: call eval\(\) on the whole model"),
    "wrapped": (lambda: nn.DataParallel(mlp()).eval(), x, {}, ModelError, "compile the model itself, model.module"),
    "compiled by torch": (lambda: torch.compile(mlp()), x, {}, ModelError, "compile the model itself, model._orig_mod"),
    "nothing in 8 bits": (lambda: nn.LayerNorm(8).eval(), x, {"precision": "int8"}, ModelError, "has no effect: LayerNorm has no linear layer"),
    "a number": (mlp, x, {"precision": "int8", "calibrate": 3}, DataError, "calibrate: expected batches, .*got int"),
    "one tensor": (mlp, x, {"precision": "int8", "calibrate": x}, DataError, "calibrate: expected batches, .*got Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_of_compile(case):
    make, example, how, kind, says = WRONG[case]
    with pytest.raises(kind, match=says):
        rarefy.compile(make(), example, **how)


def test_calibration_on_smaller_values_warns_and_on_much_smaller_ones_is_refused():
    torch.manual_seed(0)
    images = torch.rand(8, 3, 12, 12) * 2 - 1
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with pytest.warns(
        UserWarning, match=r"outputs differ by 1\d% on the example.*: measure the quality on data"
    ) as seen:
        rarefy.compile(net, images, precision="int8", calibrate=[images * 0.75])
    told = str(seen[0].message)
    assert seen[0].filename == __file__
    assert "Layers that lose most: " in told and "an example like the batches of calibrate=" in told
    with pytest.raises(OutputsDifferError, match=r"at most 0.2 is allowed.*Layers that lose most: .*max_error="):
        rarefy.compile(net, images, precision="int8", calibrate=[images * 0.3])
    rarefy.compile(net, images, precision="int8", calibrate=[images * 0.3], max_error=0.9)  # warnings are errors
    rarefy.compile(net, images, precision="int8", calibrate=[images])


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, ids, mask):
        return self.a(ids) * mask


def test_inputs_by_position_where_the_example_named_them():
    made = rarefy.compile(ByName().eval(), {"ids": x, "mask": x})
    for args in ((x, x), ({"ids": x, "mask": x},)):
        with pytest.raises(
            DataError, match=r"ids, mask are missing; pass inputs by name.*: ids=..., mask=..., or \*\*"
        ):
            made(*args)
    with pytest.raises(DataError, match="mask is missing"):
        made(ids=x)


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps], ids=["copy", "pickle"])
def test_compiled_models_are_saved_not_copied(way):
    with pytest.raises(TypeError, match="can be neither copied nor pickled: rarefy.save"):
        way(rarefy.compile(mlp(), x))


class Difference(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, p, q):
        return self.a(p) - 2 * self.a(q)


def test_one_tensor_as_several_inputs():
    """Such as queries, keys and values: each input of a later call counts."""
    net, y = Difference().eval(), torch.randn(3, 8)
    for made in (rarefy.compile(net, (x, x)), rarefy.compile(net, {"p": x, "q": x})):
        args = (y, 3 * y) if not made.keywords else ()
        kwargs = {"p": y, "q": 3 * y} if made.keywords else {}
        torch.testing.assert_close(made(*args, **kwargs), net(y, 3 * y), rtol=1e-4, atol=1e-5)


class Several(nn.Module):
    """A model that takes any number of inputs."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, *xs):
        return sum(self.a(x) for x in xs)


def test_any_number_of_arguments():
    net = Several().eval()
    made = rarefy.compile(net, (x, x))
    y = torch.randn(3, 8)
    torch.testing.assert_close(made(y, 2 * y), net(y, 2 * y))


@pytest.mark.parametrize("precision", [None, "int8"])
def test_one_image_without_a_batch(precision):
    class Picture(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.pool, self.head = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.pool(self.a(x)).mean((1, 2)))

    net = Picture().eval()
    made = rarefy.compile(net, images[0], precision=precision)
    torch.testing.assert_close(made(images[1]), net(images[1]), rtol=0.05, atol=0.02)


def test_a_layer_that_torch_runs_faster_is_told(monkeypatch):
    from rarefy.compiler import tuning

    monkeypatch.setenv("RAREFY_TUNE", "1")
    monkeypatch.setattr(tuning, "slow_nodes", lambda compiled, *_: list(compiled.kernels))
    made = rarefy.compile(mlp(), x, precision="int8")
    assert "nothing runs in 8 bits: torch is faster in fp32 on the example" in repr(made)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, NotImplementedError, AssertionError, KeyError, TypeError])
def test_what_torch_raises_in_a_call_names_the_operator(error):
    def operator():
        raise error("sizes do not fit")

    with pytest.raises(DataError, match="operator failed on these inputs: .*sizes do not fit"):
        run_call(fx.Graph().call_function(operator), {}, lambda node: node)


def test_errors_of_rarefy_in_a_call_stay_as_they_are():
    def operator():
        raise ModelError("the saved graph is inconsistent")

    with pytest.raises(ModelError, match="^the saved graph is inconsistent$"):
        run_call(fx.Graph().call_function(operator), {}, lambda node: node)
