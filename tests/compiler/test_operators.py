"""The table of operators: every entry is complete, and an `OpSpec` is all that a new operator needs."""

import inspect

import pytest
import torch
from torch import nn

import rarefy
from rarefy.compiler import compile, ops
from rarefy.compiler.fx_utils import aten, replace_node
from rarefy.compiler.op_registry import ARGUMENTS, find, name_of
from rarefy.compiler.operators import spec as specs
from rarefy.compiler.operators.spec import ELEMENTWISE, OpSpec
from rarefy.compiler.operators.table import BY_NAME, BY_TARGET, FILES
from rarefy.runtime import bindings

needs_kernels = pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing()))
LAYOUTS = (
    specs.ROWS,
    specs.IMAGES,
    specs.PIXELS,
    specs.IMAGES_TO_ROWS,
    specs.ROWS_TO_IMAGES,
    specs.ELEMENTWISE,
)


@pytest.mark.parametrize("spec", BY_NAME.values(), ids=BY_NAME)
def test_every_entry_is_complete(spec):
    kinds = [k.removesuffix("?") for k in spec.arguments]
    assert set(kinds) <= ARGUMENTS.keys() and kinds[0] == "tensor"
    assert len(kinds) == len(inspect.signature(spec.reference).parameters)
    assert spec.reference.__doc__ and spec.layout in LAYOUTS
    assert getattr(ops, spec.name) is spec.reference is find(f"rarefy.{spec.name}")
    assert name_of(spec.reference) == f"rarefy.{spec.name}" and BY_TARGET[spec.reference] is spec
    if spec.heavy or spec.epilogue or spec.whole_sequences:
        assert spec.lower is not None
    if spec.epilogue:  # passes rely on their places
        assert spec.arguments[3:5] == ("tensor?", "act")
    if spec.packed_formats:
        assert kinds[1] == "weight"
    assert spec.own_call <= bool(spec.packed_formats)


def test_names_are_unique():
    assert len(BY_NAME) == len(BY_TARGET) == sum(len(file.OPERATORS) for file in FILES)
    with pytest.raises(AttributeError, match="the engine has no operator 'conv3d'; it has linear, conv2d"):
        ops.conv3d  # noqa: B018


def double(x):
    """Return 2 x."""
    return x + x


def lower_double(p, node):
    x = p.use(p.values[node.args[0]])
    out = p.make(node)
    p.step("add", out, x=x, other=x, out=p.use(out), act=bindings.ACTIVATIONS.index(None))


def fuse_double(exported, node):
    """The pass of the new operator."""
    if node.target is aten.mul.Tensor and node.args[1] == 2:
        replace_node(exported, node, double, node.args[0])


class Doubles(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 40), nn.Linear(40, 8)

    def forward(self, x):
        return self.b(self.a(x) * 2)


@needs_kernels
def test_a_new_operator_needs_its_entry_and_its_pass_alone(monkeypatch, tmp_path):
    spec = OpSpec(reference=double, arguments=("tensor",), lower=lower_double, layout=ELEMENTWISE, per_row=True)
    monkeypatch.setitem(BY_NAME, "double", spec)
    monkeypatch.setitem(BY_TARGET, double, spec)
    monkeypatch.setattr(compile, "PASSES", (*compile.PASSES, fuse_double))
    net, x = Doubles().eval(), torch.randn(5, 24)
    made = rarefy.compile(net, torch.randn(3, 24))
    assert repr(made) == "1 native call: 2 linear, 1 double"
    torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)
    rarefy.save(made, tmp_path / "out")
    loaded = rarefy.load(tmp_path / "out")
    assert (
        torch.equal(loaded(x), made(x))
        and rarefy.inspect(tmp_path / "out").summary["operators"] == "2 linear, 1 double"
    )
    monkeypatch.delitem(BY_NAME, "double")
    with pytest.raises(rarefy.common.errors.ContainerError, match="'rarefy.double' is not allowed in a saved graph"):
        rarefy.load(tmp_path / "out")
