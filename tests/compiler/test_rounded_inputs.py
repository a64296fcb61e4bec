"""Models that round the inputs of layers in each call, as `quantize_(activations="int8")` leaves them: kernels do it."""

import copy

import pytest
import torch
from torch import nn

import rarefy
from conftest import sample
from rarefy.common.errors import ModelError
from rarefy.compiler import ops
from rarefy.model.activation_quant import get_activation_quant
from rarefy.model.compare import relative_distance
from rarefy.runtime import bindings

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


def images():
    """Return a small CNN, and images."""
    torch.manual_seed(0)
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), *head).eval(), torch.randn(4, 3, 20, 20)


def rows():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(9, 64)  # fmt: skip


def eager(net, x):
    with torch.no_grad():
        return net(x)


def kinds(made, op=ops.linear):
    return [k.held[0].kind for n, k in made.kernels.items() if n.target is op]


def far(a, b):
    return float(relative_distance(a, b))


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("make", [rows, images])
def test_kernels_round_as_the_model_does(make, weights):
    net, x = make()
    exact = eager(net, x)
    rarefy.quantize_(net, weights, activations="int8", ignore=None)
    want = eager(net, x)
    made = rarefy.compile(net, x, tune=False)
    layers = sum(isinstance(m, nn.Linear | nn.Conv2d) for m in net)
    assert kinds(made) + kinds(made, ops.conv2d) == ["int8"] * layers
    assert not made.exported.torch_nodes
    got = made(x)
    assert far(got, want) < 0.3 * far(want, exact) if weights == "int4" else far(got, want) < 0.01
    assert all(get_activation_quant(m) is not None for m in net if isinstance(m, nn.Linear | nn.Conv2d))  # as before
    assert torch.equal(eager(net, x), want)


def test_layers_that_do_not_round_stay_as_they_are():
    net, x = rows()
    rarefy.quantize_(net, "int8", activations="int8", layers="2")
    assert kinds(rarefy.compile(net, x, tune=False)) == ["fp32", "int8", "fp32"]
    assert kinds(rarefy.compile(net, x, precision="bf16", tune=False)) == ["bf16", "int8", "bf16"]
    assert kinds(rarefy.compile(net, x, ignore="2", tune=False)) == ["fp32"] * 3
    assert kinds(rarefy.compile(copy.deepcopy(net).bfloat16(), x.bfloat16(), tune=False)) == ["bf16", "int8", "bf16"]


def test_without_rounded_inputs_ignored_layers_are_refused():
    net, x = rows()
    with pytest.raises(ModelError, match="ignore= and per_layer= name layers that stay in fp32"):
        rarefy.compile(net, x, ignore="2")


def test_the_rounding_comes_back_after_an_error():
    net, x = rows()
    rarefy.quantize_(net, "int8", activations="int8", layers="2")
    with pytest.raises(ModelError, match="unknown solver"):
        rarefy.compile(net, x, solver="none")
    net[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError):
        rarefy.compile(net, x)
    assert get_activation_quant(net[2]) is not None


def test_an_encoder():
    """MiniLM, whose rounding errors are much larger than those of a few layers."""
    transformers = pytest.importorskip("transformers")
    from rarefy.data import builtin

    sample("minilm")
    folder = builtin.model_folder("minilm")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = tokenizer(
        ["The ship sails at noon.", "Boats leave at midday, some say."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        exact = model(**texts).pooler_output
    rarefy.quantize_(model, "int8", activations="int8")
    with torch.no_grad():
        want = model(**texts).pooler_output
    made = rarefy.compile(model, texts, tune=False)
    assert set(kinds(made)) == {"int8"}
    got = made(**texts).pooler_output
    assert far(got, exact) < 1.5 * far(want, exact)


@pytest.mark.parametrize(
    ("options", "idle"),
    [({}, 2), ({"weights": "int4", "group": 32}, 2), ({"layers": ["0"]}, 1), ({"activations": "int8"}, 0)],
)
def test_quantized_weights_that_make_no_difference_have_a_note(options, idle):
    """Kernels in 8 bits round the inputs too: a model whose weights alone are quantized runs in fp32 until it is told."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), torch.randn(4, 64)
    rarefy.quantize_(net, **{"weights": "int8", **options})
    found = [n for n in rarefy.compile(net, x, tune=False).exported.notes if "weights alone" in n]
    layers = {1: "1 layer, which run", 2: "2 layers, which run"}
    assert len(found) == bool(idle) and all(layers[idle] in n and "precision='int8'" in n for n in found)
    assert not any("weights alone" in n for n in rarefy.compile(net, x, precision="int8", tune=False).exported.notes)
