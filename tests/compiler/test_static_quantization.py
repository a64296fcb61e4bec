"""Models that come quantized: their layers run in 8 bits on their own scales, zero points and codes."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.compile_models import Attends
from helpers.compile_models import steps as step_names
from rarefy.common.errors import ContainerError
from rarefy.compiler import ops
from rarefy.compiler.graph_json import from_json
from rarefy.compiler.subgraph import FusedSubgraph
from rarefy.compiler.weight_grids import int8_grid
from rarefy.model.activation_quant import ActivationQuant, get_activation_quant, set_activation_quant_
from rarefy.model.compare import relative_distance
from rarefy.model.quant_grid import Grid
from rarefy.runtime import bindings
from rarefy.runtime.packed_formats import Sell, Tiles
from rarefy.runtime.packing import unpack

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")

SYMMETRIC, UNSIGNED, BETWEEN = 128, 0, 37  # zero points


class Images(nn.Module):
    """A residual block with a stem and a pool, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 20, 5, 2, 2), nn.Conv2d(20, 33, 1)
        self.middle, self.up = nn.Conv2d(33, 20, 3, 1, 1, bias=False), nn.Conv2d(20, 9, 3, 2, 1, 2)
        self.norm, self.head = nn.BatchNorm2d(20), nn.Linear(9, 5)
        self.norm.running_var.uniform_(0.5, 2)
        self.norm.running_mean.normal_(0, 0.1)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x).relu(), 2)
        x = (self.norm(self.middle(self.down(x).relu())) + x).relu()
        return self.head(self.up(x).mean((2, 3)))


class Block(nn.Module):
    """A transformer block: attention, norms, a residual, GELU."""

    def __init__(self):
        super().__init__()
        self.attention, self.first, self.last = Attends(4, 2), nn.LayerNorm(32), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 70), nn.Linear(70, 32)

    def forward(self, x):
        x = self.first(self.attention(x))
        return self.last(x + self.down(F.gelu(self.up(x))))


MODELS = {"images": (Images, (3, 3, 30, 34)), "block": (Block, (3, 11, 32))}


def quantized(name, **options):
    make, size = MODELS[name]
    net = make().eval()
    data = [torch.randn(size) for _ in range(3)]
    rarefy.quantize_(net, activations="int8-static", data=data, ignore=None, **options)
    return net, torch.randn(size)


def eager(net, x):
    with torch.no_grad():
        return net(x)


def int8_kernels(made):
    return [k for k in made.kernels.values() if k.held[0].kind == "int8"]


@pytest.mark.parametrize("zero", [SYMMETRIC, UNSIGNED, BETWEEN])
def test_codes_of_inputs_are_torchs(isa, zero):
    """A diagonal weight shows the codes; from half a step before the first one to past the last one."""
    scale, rows = 0.0375, 16
    net = nn.Linear(64, 64, bias=False).eval()
    net.weight.data = 127 * torch.eye(64)
    set_activation_quant_(net, ActivationQuant(8, scale, zero))
    codes = torch.linspace(-20.4, 275.4, rows * 64) - zero
    codes += 0.01 * ((codes - codes.floor() - 0.5).abs() < 0.005)  # none between two codes
    x = (codes * scale).view(rows, 64)
    made = rarefy.compile(net, x, tune=False)
    (kernel,) = int8_kernels(made)
    assert kernel.input_grid == ActivationQuant(8, scale, zero)
    got, want = (f(x).detach() / (127 * scale) for f in (made, net))
    assert torch.equal(got.round(), want.round()) and (got - want).abs().max() < 1e-3
    assert want.min().round() == -zero and want.max().round() == 255 - zero


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"group": "tensor"}, {"weights": "int4"}], ids=str)
def test_layers_run_on_their_own_numbers(isa, name, options):
    net, x = quantized(name, **options)
    rarefy.fold_(net)
    made = rarefy.compile(net, x, tune=False)
    assert sum(isinstance(s, FusedSubgraph) for s in made.schedule) == 1
    layers = {n: m for n, m in net.named_modules() if get_activation_quant(m) is not None}
    found = {made.exported.layers[n]: k for n, k in made.kernels.items() if k.input_grid is not None}
    assert layers.keys() == found.keys()
    for layer, kernel in found.items():
        assert kernel.held[0].kind == "int8" and kernel.input_grid == get_activation_quant(layers[layer])
        if layer != "middle":  # BatchNorm is folded into it
            torch.testing.assert_close(unpack(kernel.held[0]), layers[layer].weight.detach(), rtol=1e-6, atol=0)
    assert relative_distance(made(x), eager(net, x)) < 3e-3
    assert relative_distance(made(50 * x), eager(net, 50 * x)) < 3e-3  # saturates alike


def test_rounding_errors_are_a_part_of_those_of_the_model():
    net, x = quantized("block")
    plain = Block().eval()
    plain.load_state_dict({k.replace("parametrizations.", "").replace(".original", ""): v
                           for k, v in net.state_dict().items() if not k.endswith((".scale", ".zero"))})  # fmt: skip
    made = rarefy.compile(net, x, tune=False)
    assert relative_distance(made(x), eager(net, x)) < 0.2 * relative_distance(eager(net, x), eager(plain, x))


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_zeros(isa, name):
    make, size = MODELS[name]
    net, data = make().eval(), [torch.randn(size)]
    rarefy.prune_(net, sparsity=0.98, ignore=None)
    rarefy.quantize_(net, activations="int8-static", data=data)
    made = rarefy.compile(net, data[0], tune=False)
    assert any(isinstance(getattr(k.held[0], "matrix", k.held[0]), Sell | Tiles) for k in int8_kernels(made))
    assert relative_distance(made(data[0]), eager(net, data[0])) < 3e-3


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_precision_is_for_the_other_layers(precision):
    net, x = quantized("images", layers=["stem", "middle"])
    made = rarefy.compile(net, x, precision=precision, tune=False)
    kinds = {made.exported.layers[n]: (k.held[0].kind, k.input_grid) for n, k in made.kernels.items()}
    for layer in ("stem", "middle"):
        assert kinds[layer] == ("int8", get_activation_quant(net.get_submodule(layer)))
    assert kinds["head"] == (precision, None)
    if precision == "int8":
        calibrated = rarefy.compile(net, x, precision="int8", calibrate=[x], tune=False)
        by_layer = {calibrated.exported.layers[n]: k.input_grid for n, k in calibrated.kernels.items()}
        assert by_layer["stem"] == kinds["stem"][1] and by_layer["down"] is not None


@pytest.mark.parametrize("options", [{"symmetric": False}, {"weights": "int4", "group": 2}], ids=str)
def test_weights_off_an_int8_grid_run_on_rounded_inputs(options):
    net, x = quantized("block", layers=["up", "down", "attention.q"], **options)
    made = rarefy.compile(net, x, tune=False)
    assert not int8_kernels(made)
    assert sum(n.target is ops.fake_quantize for s in made.schedule for n in s.nodes) == 3
    assert relative_distance(made(x), eager(net, x)) < 1e-3


def steps(made, x, op):
    return sum(row.count for row in made.profile(x, repeats=1, warmup=0).by_operator() if row.operator == op)


def test_codes_are_made_once():
    """One conversion for q, k and v; the others are written by the layer before, or follow attention and a norm."""
    net, x = quantized("block")
    made = rarefy.compile(net, x, tune=False)
    assert (steps(made, x, "convert"), steps(made, x, "fake_quantize")) == (3, 0)


def test_a_pool_is_rounded_behind_it():
    net, x = quantized("images")
    made = rarefy.compile(net, x, tune=False)
    (pool,) = [n for n in made.exported.graph.nodes if n.target is ops.max_pool2d]
    assert pool.args[0].target is ops.conv2d and pool.args[0].args[4] == "relu"


def test_values_that_are_read_rounded_and_as_they_are():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 40), nn.Linear(40, 40)

        def forward(self, x):
            y = ActivationQuant(8, 0.02, 125)(self.first(x))
            return self.second(y) + y, y

    net, x = Both().eval(), torch.randn(20, 32)
    net.second.weight.data = Grid(8, net.second.weight.data.abs().amax(1, keepdim=True) / 127).snap(
        net.second.weight.data
    )
    made = rarefy.compile(net, x, tune=False)
    assert [k.input_grid for k in int8_kernels(made)] == [ActivationQuant(8, 0.02, 125)]
    for got, want in zip(made(x), eager(net, x)):
        assert relative_distance(got, want) < 1e-5


def test_layers_that_torch_runs_round_too():
    net, x = quantized("block")
    made = rarefy.compile(net, x, tune=False)
    weights = {n.args[1].name: unpack(k.held[0]) for n, k in made.kernels.items()}
    first = next(n for n in made.kernels if made.exported.layers[n] == "up")
    made.move_to_torch({first, first.args[0]}, weights)
    assert relative_distance(made(x), eager(net, x)) < 3e-3
    assert sum(k.input_grid is not None for k in made.kernels.values()) == 5


@pytest.mark.parametrize("name", MODELS)
def test_folders(name, tmp_path):
    """A quantized folder compiles as the model does; a compiled folder keeps its codes and scales."""
    net, x = quantized(name)
    rarefy.save(net, tmp_path / "quantized")
    again = MODELS[name][0]().eval()
    rarefy.load(tmp_path / "quantized", model=again)
    made, from_file = (rarefy.compile(m, x, tune=False) for m in (net, again))
    assert len(int8_kernels(from_file)) == len(int8_kernels(made)) > 3
    assert torch.equal(from_file(x), made(x))
    rarefy.save(made, tmp_path / "compiled")
    loaded = rarefy.load(tmp_path / "compiled")
    assert [k.input_grid for k in loaded.kernels.values()] == [k.input_grid for k in made.kernels.values()]
    assert torch.equal(loaded(x), made(x))


@pytest.mark.parametrize(
    ("position", "value", "says"),
    [
        (1, 0.0, "argument 2: expected a scale above zero, got 0.0"),
        (1, 3, "argument 2: expected a scale above zero, got 3"),
        (2, 256, "argument 3: expected a whole number from 0 to 255, got 256"),
        (2, 1.0, "argument 3: expected a whole number from 0 to 255, got 1.0"),
    ],
)
def test_files_with_other_numbers(position, value, says, tmp_path):
    net, x = quantized("block")
    rarefy.save(rarefy.compile(net, x, tune=False), tmp_path / "out")
    graph = json.loads((tmp_path / "out" / "graph.json").read_text())
    node = next(n for n in graph["nodes"] if n[2] == "rarefy.fake_quantize")
    node[3][position] = value
    with pytest.raises(ContainerError, match=says):
        from_json(graph, "graph.json")


def test_decoder_of_a_quantized_language_model():
    from helpers.language_models import V, small

    model, ids = small(), torch.randint(3, 90, (2, 40)) % V
    rarefy.quantize_(model, activations="int8-static", data=[{"input_ids": ids}])
    want = eager(lambda ids: model(input_ids=ids, use_cache=False).logits, ids)
    made = rarefy.decoder(model)
    cache = made.cache(2, 40)
    pieces = torch.cat([made(ids[:, :38], cache), made(ids[:, 38:39], cache), made(ids[:, 39:], cache)], 1)
    assert relative_distance(made(ids), want) < 5e-3 and relative_distance(pieces, want) < 5e-3


# ---- weights on a grid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [127, 100, 7, 1])
def test_grids_are_found(most):
    scale = torch.rand(9, 1) + 0.1
    codes = torch.randint(-most, most + 1, (9, 200)).float()
    codes[0] = 0
    codes[1:, 0] = most
    for weight in (codes * scale, codes * scale * 1.7 * torch.rand(9, 1)):
        grid = int8_grid(weight.view(9, 8, 5, 5))
        assert grid is not None
        torch.testing.assert_close(grid.snap(weight), weight, rtol=1e-5, atol=0)


def test_no_grid_is_found():
    codes = torch.randint(-127, 128, (9, 200)).float()
    codes[3, 150] += 0.1
    assert int8_grid(codes) is None and int8_grid(torch.randn(4, 30)) is None
    assert int8_grid(torch.tensor([[200.0, 1.0]])) is None


def on_grids(net):
    """Round the weights of a model's layers, which are its children, to grids of 8 bits."""
    for layer in net.children():
        weight = layer.weight.data.flatten(1)
        layer.weight.data = Grid(8, weight.abs().amax(1, keepdim=True) / 127).snap(weight).view_as(layer.weight)


class Pools(nn.Module):
    """Convolutions behind a rounded max pool: its codes are all that is read of it."""

    def __init__(self, read, pool):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(12, 12, 3, 1, 1), nn.Conv2d(12, 7, 1)
        self.read, self.pool = read, pool
        on_grids(self)

    def forward(self, x):
        rounds = ActivationQuant(8, 0.02, 40)
        y = rounds(F.max_pool2d(self.first(rounds(x)).relu(), *self.pool))
        y = {"once": lambda: self.second(y), "residual": lambda: (self.second(y) + y).relu()}[self.read]()
        return self.last(rounds(y))


@pytest.mark.parametrize("pool", [(2,), (3, 2, 1), (2, 1, 1, 20)], ids=str)
@pytest.mark.parametrize("read", ["once", "residual"])
def test_pools_whose_codes_alone_are_read(isa, read, pool):
    """Windows of the last pool lie in the padding alone, where eager's minus infinity saturates."""
    net, x = Pools(read, pool).eval(), torch.randn(2, 3, 19, 20)
    made = rarefy.compile(net, x, tune=False)
    assert "max_pool" not in {row.operator for row in made.profile(x, repeats=1, warmup=0).by_operator()}
    assert relative_distance(made(x), eager(net, x)) < 0.01


@pytest.mark.parametrize("groups", [1, 12])
def test_values_that_another_native_call_rounds(groups):
    """Torch runs the sums between two native calls; the second one reads what the first one rounds."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(12, 12, 3, 1, 1)
            self.last = nn.Conv2d(12, 12, 3, 1, 1, groups=groups)
            on_grids(self)

        def forward(self, x):
            rounds = ActivationQuant(8, 0.02, 128)
            y = rounds(self.first(rounds(x)))
            return self.last(y) + self.second(y).cumsum(1)

    net, x = Parts().eval(), torch.randn(2, 3, 9, 9)
    made = rarefy.compile(net, x, tune=False)
    assert sum(isinstance(s, FusedSubgraph) for s in made.schedule) == 2
    assert relative_distance(made(x), eager(net, x)) < 0.01


class Inception(nn.Module):
    """Branches side by side, a pool among them, twice; and a pool between."""

    def __init__(self, outputs=(7, 9, 16)):
        super().__init__()
        a, b, c = outputs
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.one, self.two, self.three = nn.Conv2d(12, a, 1), nn.Conv2d(12, b, 3, padding=1), nn.Conv2d(12, c, 1)
        self.last, self.more = nn.Conv2d(a + b + c, 10, 3, padding=1), nn.Conv2d(a + b + c, 6, 1)
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.cat([F.relu(self.one(x)), F.relu6(self.two(x)), F.relu(self.three(self.pool(x)))], 1)
        x = F.max_pool2d(x, 2, ceil_mode=True)
        return torch.cat([self.last(x), self.more(self.pool(x))], 1)


@pytest.mark.parametrize("outputs", [(7, 9, 16), (8, 16, 64), (1, 70, 3)], ids=str)
def test_branches_write_their_codes_side_by_side(isa, outputs):
    net, x = Inception(outputs).eval(), torch.randn(3, 3, 13, 11)
    made = rarefy.compile(net, x, precision="int8", calibrate=list(torch.randn(16, 3, 13, 11).split(4)), tune=False)
    want = net(x).detach()
    assert relative_distance(made(x), want) < 0.05
    names = step_names(made)
    assert names.count("nhwc_quantize") == 1 and "nhwc_copy" not in names  # the picture alone is converted
