"""Compiled models called with numpy arrays by the names of their inputs."""

from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

import rarefy
from conftest import tiny_bert
from rarefy.common.errors import DataError

Pair = namedtuple("Pair", ["left", "right"])


class Two(nn.Module):
    """Two inputs, outputs nested in `nest`."""

    def __init__(self, nest):
        super().__init__()
        self.layer, self.nest = nn.Linear(4, 3), nest

    def forward(self, Image, scale=None, *, shift=None):
        y = self.layer(Image)
        return self.nest(y if scale is None else y * scale, y if shift is None else y + shift)


def arrays(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(
    ("nest", "names"),
    [
        (lambda a, b: a + b, ["output_0"]),
        (lambda a, b: (a, b), ["output_0", "output_1"]),
        (lambda a, b: [a, (b, a)], ["output_0", "output_1.0", "output_1.1"]),
        (lambda a, b: {"y": a, "deep": {"z": b}}, ["y", "deep.z"]),
        (lambda a, b: OrderedDict(y=a, z=[b]), ["y", "z.0"]),
        (lambda a, b: Pair(a, b), ["left", "right"]),
        (lambda a, b: (a, None, b), ["output_0", "output_2"]),
    ],
)
def test_names_of_outputs(nest, names, tmp_path):
    net, x = Two(nest).eval(), torch.randn(2, 4)
    fast = rarefy.compile(net, x)
    rarefy.save(fast, tmp_path / "fast")
    for model in (fast, rarefy.load(tmp_path / "fast")):
        assert model.input_names == ["Image"] and model.output_names == names
        out = model.run({"Image": arrays(5, 4)})
        assert list(out) == names and all(isinstance(a, np.ndarray) and a.shape == (5, 3) for a in out.values())
        want = [t for t in torch.utils._pytree.tree_leaves(net(torch.from_numpy(arrays(5, 4)))) if t is not None]
        assert all(np.allclose(a, t.detach(), atol=1e-5) for a, t in zip(out.values(), want))
        by_list = model.run(None, {"Image": arrays(5, 4)})
        assert [a.tolist() for a in by_list] == [a.tolist() for a in out.values()]
        [last] = model.run(output_names=[names[-1]], input_feed={"Image": arrays(5, 4)})
        assert np.array_equal(last, out[names[-1]])
        assert len(model.run([], {"Image": arrays(5, 4)})) == len(names)


@pytest.mark.parametrize(
    ("example", "names"),
    [
        ((torch.randn(2, 4), torch.randn(2, 3)), ["Image", "scale"]),
        ({"shift": torch.randn(2, 3), "Image": torch.randn(2, 4)}, ["Image", "shift"]),
    ],
)
def test_names_of_inputs(example, names):
    net = Two(lambda a, b: a - 2 * b).eval()
    fast = rarefy.compile(net, example)
    assert sorted(fast.input_names) == names
    feed = {"Image": arrays(3, 4), names[1]: arrays(3, 3)}
    want = net(**{n: torch.from_numpy(a) for n, a in feed.items()})
    assert np.allclose(fast.run(feed)["output_0"], want.detach(), atol=1e-5)


def test_tensors_by_the_names_of_arguments_that_the_example_has_by_position():
    fast = rarefy.compile(Two(lambda a, b: a + b).eval(), (torch.randn(2, 4), torch.randn(2, 3)))
    x, scale = torch.randn(5, 4), torch.randn(5, 3)
    expected = fast(x, scale)
    assert torch.equal(fast(Image=x, scale=scale), expected) and torch.equal(fast(x, scale=scale), expected)
    with pytest.raises(DataError, match="compiled for the keywords Image, scale, got Image: scale is missing$"):
        fast(Image=x)
    with pytest.raises(DataError, match="compiled for the keywords scale, got scal: leave out scal, .*; scale is mis"):
        fast(x, scal=scale)


def test_names_of_nested_inputs():
    class Call(nn.Module):
        def forward(self, parts, batch):
            return parts[0] + parts[1] * batch["weight"][0]

    x = torch.randn(2, 4)
    fast = rarefy.compile(Call().eval(), ([x, x], {"weight": [x]}))
    assert fast.input_names == ["parts.0", "parts.1", "batch.weight.0"]
    a = arrays(3, 4)
    out = fast.run({"parts.1": a, "parts.0": a, "batch.weight.0": a})["output_0"]
    assert np.allclose(out, a + a * a, atol=1e-5)


def test_names_of_arguments_without_a_name():
    class Call(nn.Module):
        def forward(self, first, *rest):
            return first + rest[0] * rest[1]

    x = torch.randn(2, 4)
    assert rarefy.compile(Call().eval(), (x, x, x)).input_names == ["first", "rest.0", "rest.1"]


def test_an_encoder_has_the_names_of_its_batch_and_fields(tmp_path):
    net = tiny_bert()
    batch = {"input_ids": torch.randint(60, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    fast = rarefy.compile(net, batch)
    rarefy.save(fast, tmp_path / "fast")
    fast = rarefy.load(tmp_path / "fast")
    assert fast.input_names == ["input_ids", "attention_mask"]
    assert fast.output_names == ["last_hidden_state", "pooler_output"]
    feed = {n: t.numpy() for n, t in batch.items()}
    [pooled] = fast.run(["pooler_output"], feed)
    with torch.no_grad():
        assert np.allclose(pooled, net(**batch).pooler_output, atol=1e-4)
    assert rarefy.inspect(tmp_path / "fast").summary["outputs"] == "last_hidden_state, pooler_output"


def test_a_value_that_is_no_tensor_is_not_asked_for():
    class Call(nn.Module):
        def forward(self, x, double=False):
            return x * 2 if double else x + 1

    fast = rarefy.compile(Call().eval(), {"x": torch.randn(2, 4), "double": True})
    assert fast.input_names == ["x"] and np.allclose(fast.run({"x": arrays(2, 4)})["output_0"], 2 * arrays(2, 4))


def test_folders_of_earlier_versions_have_names(tmp_path):
    from helpers.compiled_folders import edit

    rarefy.save(rarefy.compile(Two(lambda a, b: {"y": a + b}).eval(), torch.randn(2, 4)), tmp_path / "fast")

    def older(graph):
        graph["schema"] = 3
        graph.pop("names")
        graph.pop("guards")

    edit(tmp_path / "fast", older)
    fast = rarefy.load(tmp_path / "fast")
    assert fast.input_names == ["image"] and fast.output_names == ["y"]  # as torch.export names it
    assert fast.run({"image": arrays(2, 4)})["y"].shape == (2, 3)


@pytest.fixture(scope="module")
def fast():
    return rarefy.compile(Two(lambda a, b: (a, b)).eval(), (torch.randn(2, 4), torch.randn(2, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"image": arrays(2, 4), "scale": arrays(2, 3)},), r"unknown input 'image'; choose from Image, scale \(did you mean 'Image'\?\)"),
        (({"Image": arrays(2, 4)},), "missing scale: the model takes Image, scale"),
        (({},), "missing Image, scale: the model takes Image, scale"),
        ((None,), r"expected a dict of numpy arrays by name, \{'Image': array, 'scale': array\}, got NoneType"),
        (([arrays(2, 4), arrays(2, 3)],), "expected a dict of numpy arrays by name, .* got list"),
        ((None, [arrays(2, 4)]), "expected a dict of numpy arrays by name, .* got list"),
        (({"Image": arrays(2, 4, dtype=np.float64), "scale": arrays(2, 3)},), r"Image: expected float32 \[any, 4\] on the CPU, got float64 \[2, 4\]: convert it with .astype\('float32'\)"),
        (({"Image": arrays(4), "scale": arrays(2, 3)},), r"Image: expected float32 \[any, 4\] on the CPU, got float32 \[4\]"),
        (({"Image": arrays(2, 5), "scale": arrays(2, 3)},), r"Image: expected float32 \[any, 4\] on the CPU, got \[2, 5\]: 5 is not 4"),
        (({"Image": arrays(2, 4), "scale": arrays(3, 3)},), "scale: expected a size of 2, as in another input, got 3"),
        (({"Image": [[1.0] * 4], "scale": arrays(1, 3)},), r"Image: expected a numpy array, float32 \[any, 4\] on the CPU, got list"),
        (({"Image": torch.ones(2, 4), "scale": arrays(2, 3)},), "Image: expected a numpy array, .* got Tensor"),
        (({"Image": np.array([["a"] * 4]), "scale": arrays(1, 3)},), "Image: expected float32 .* got str"),
        ((["output_2"], {"Image": arrays(2, 4), "scale": arrays(2, 3)}), "unknown output 'output_2'; choose from output_0, output_1"),
        (("output_0", {"Image": arrays(2, 4), "scale": arrays(2, 3)}), "output names: expected a list of names or None, got str"),
    ],
)  # fmt: skip
def test_wrong_use(fast, arguments, message):
    with pytest.raises(DataError, match=message):
        fast.run(*arguments)


def test_arrays_in_any_layout_are_read(fast):
    image, scale = arrays(2, 4), arrays(2, 3)
    want = fast.run({"Image": image, "scale": scale})["output_0"]
    frozen = image.copy()
    frozen.flags.writeable = False
    for same in (frozen, np.asfortranarray(image), image[::-1].copy()[::-1], image.astype(">f4")):
        assert np.array_equal(fast.run({"Image": same, "scale": scale})["output_0"], want)


def test_outputs_are_the_callers_own():
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.table = nn.Linear(4, 4), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.layer(x), x.view(-1), self.table, torch.arange(x.shape[0])

    x = arrays(2, 4)
    fast = rarefy.compile(Same().eval(), torch.randn(2, 4))
    first = fast.run(None, {"x": x})
    before = [a.copy() for a in first]
    for a in first:
        a[...] = 7
    assert np.array_equal(x, arrays(2, 4))
    assert all(np.array_equal(a, b) for a, b in zip(fast.run(None, {"x": x}, None), before))
    with pytest.raises(DataError, match="run_options: expected None, got int: they are ONNX Runtime's"):
        fast.run(None, {"x": x}, 3)


def test_bfloat16_is_float32_in_numpy():
    net = nn.Linear(64, 3).bfloat16().eval()
    fast = rarefy.compile(net, torch.randn(2, 64, dtype=torch.bfloat16))
    out = fast.run({"input": arrays(2, 64)})["output_0"]
    assert out.dtype == np.float32 and np.allclose(
        out, net(torch.from_numpy(arrays(2, 64)).bfloat16()).float().detach(), atol=0.05
    )
    with pytest.raises(
        DataError, match=r"input: expected bfloat16 .* got float64 .* convert it with .astype\('float32'\)"
    ):
        fast.run({"input": arrays(2, 64, dtype=np.float64)})
