"""Operators that move whole tokens between layers, against eager torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.compile_models import equal
from helpers.compiled_folders import edit, set_arg
from helpers.marks import slow_case
from rarefy.common.errors import ContainerError, ModelError
from rarefy.compiler import ops
from rarefy.compiler.operators.spec import Call
from rarefy.compiler.operators.table import BY_NAME
from rarefy.compiler.subgraph import FusedSubgraph
from rarefy.runtime import bindings

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
WIDTH, HEIGHT = 12, 8


class Between(nn.Module):
    """A function between two layers, on rows or on images."""

    def __init__(self, function, inner, outer, from_image, to_image):
        super().__init__()
        self.function = function
        self.before = nn.Conv2d(inner, inner, 1) if from_image else nn.Linear(inner, inner)
        self.after = nn.Conv2d(outer, 9, 3, padding=1) if to_image else nn.Linear(outer, 9)

    def forward(self, x):
        return self.after(self.function(self.before(x)))


def windows(x, size=4):
    batch, height, width, features = x.shape
    x = x.view(batch, height // size, size, width // size, size, features)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, features)


def image_of_windows(y, size=4):
    y = y.view(-1, HEIGHT // size, WIDTH // size, size, size, y.shape[-1])
    return y.permute(0, 1, 3, 2, 4, 5).reshape(-1, HEIGHT, WIDTH, y.shape[-1])


def merged(x):
    batch, height, width, features = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, features).permute(0, 1, 3, 4, 2, 5).flatten(3)


def merged_slices(x):
    return torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)


def as_image(x):
    return x.transpose(1, 2).reshape(x.shape[0], -1, HEIGHT, WIDTH)


# function, features behind it over those before it, whether it reads and gives images, the operator
MOVES = {
    "windows": (windows, 1, False, False, "gather_tokens"),
    "windows and back": (lambda x: image_of_windows(windows(x)), 1, False, False, "gather_tokens"),
    "padded windows": (lambda x: windows(F.pad(x, (0, 0, 0, 4, 0, 4))), 1, False, False, "gather_tokens"),
    "roll": (lambda x: torch.roll(x, (-2, 3), (1, 2)), 1, False, False, "gather_tokens"),
    "merged patches": (merged, 4, False, False, "gather_tokens"),
    "merged slices": (merged_slices, 4, False, False, "gather_tokens"),
    "rows of an image": (lambda x: x.flatten(2).transpose(1, 2), 1, True, False, "pixels_to_tokens"),
    "windows of an image": (lambda x: windows(x.permute(0, 2, 3, 1)), 1, True, False, "pixels_to_tokens"),
    "image of rows": (lambda x: as_image(x.flatten(1, 2)), 1, False, True, "tokens_to_pixels"),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), 1, True, True, "gather_pixels"),
    "padding": (lambda x: F.pad(x, (1, 2, 3, 0)), 1, True, True, "gather_pixels"),
    "slice": (lambda x: x[:, :, 1:-1:2, 3:], 1, True, True, "gather_pixels"),
}


@pytest.mark.parametrize("features", [5, slow_case(24)])
@pytest.mark.parametrize("name", MOVES)
def test_moves_between_layers(isa, name, features):
    function, groups, from_image, to_image, operator = MOVES[name]
    net = Between(function, features, groups * features, from_image, to_image).eval()
    sizes = (features, HEIGHT, WIDTH) if from_image else (HEIGHT, WIDTH, features)
    compiled = equal(net, torch.randn(2, *sizes))
    (call,) = compiled.schedule
    assert isinstance(call, FusedSubgraph) and operator in {n.target.__name__ for n in call.nodes}
    for batch in (1, 3, 70):
        x = torch.randn(batch, *sizes)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


def test_tokens_in_their_places_are_not_copied():
    net = Between(lambda x: x.flatten(2).transpose(1, 2), 24, 24, True, False).eval()
    compiled = equal(net, torch.randn(2, 24, HEIGHT, WIDTH))
    profile = compiled.profile(torch.randn(2, 24, HEIGHT, WIDTH), repeats=4)
    assert not [r for r in profile.rows if r.operator == "rearrange"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flatten(1, 2).transpose(1, 2).reshape(x.shape),  # features become tokens
        lambda x: x.roll(1, 3),  # features move
        lambda x: x.roll(1, 0),  # samples move
        lambda x: F.pad(x, (0, 0, 1, 1), value=1.0),  # not zeros
    ],
)
def test_other_moves_stay_in_torch(function):
    compiled = equal(Between(function, 24, 24, False, False).eval(), torch.randn(2, HEIGHT, WIDTH, 24))
    assert not {"gather_tokens"} & {n.target.__name__ for n in compiled.exported.graph.nodes if n.op == "call_function"}


class WindowAttention(nn.Module):
    """A block of Swin: attention in shifted windows, with a bias for each head and masks at the borders."""

    def __init__(self, features=24, heads=3, biased=True):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(features, 3 * features), nn.Linear(features, features), heads
        self.bias = nn.Parameter(torch.randn(heads, 16, 16)) if biased else None
        self.register_buffer("masks", torch.where(torch.rand(6, 16, 16) < 0.5, -100.0, 0.0))

    def forward(self, x):
        y = windows(torch.roll(x, (-2, -2), (1, 2)))
        qkv = self.qkv(y).reshape(y.shape[0], 16, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (qkv[0] * 8**-0.5) @ qkv[1].transpose(-2, -1)
        if self.bias is not None:
            scores = scores + self.bias.unsqueeze(0)
        scores = scores.view(-1, 6, self.heads, 16, 16) + self.masks.unsqueeze(1).unsqueeze(0)
        scores = scores.view(-1, self.heads, 16, 16).softmax(-1)
        y = self.out((scores @ qkv[2]).transpose(1, 2).reshape(y.shape[0], 16, -1))
        return x + torch.roll(image_of_windows(y), (2, 2), (1, 2))


class Pyramid(nn.Module):
    """A convolution, blocks on rows, and a convolution."""

    def __init__(self, block, features=24):
        super().__init__()
        self.before, self.after = nn.Conv2d(3, features, 1), nn.Conv2d(features, 5, 3)
        self.block = block

    def forward(self, x):
        return self.after(self.block(self.before(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("biased", [True, False])
def test_attention_in_shifted_windows(isa, biased):
    net = Pyramid(WindowAttention(biased=biased)).eval()
    compiled = equal(net, torch.randn(2, 3, HEIGHT, WIDTH))
    assert compiled.counts()[0] == 1 and compiled.counts()[1]["attention"] == 1
    for batch in (1, 6, 17):  # 6 is also the number of windows
        x = torch.randn(batch, 3, HEIGHT, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


class FromWindows(nn.Module):
    """Reads windows, of which several make an image."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(24, 24), nn.Conv2d(24, 5, 3)

    def forward(self, x):
        return self.after(image_of_windows(self.before(x.flatten(1, 2))).permute(0, 3, 1, 2))


def test_windows_are_not_split():
    net = FromWindows().eval()
    for batch in (1, 3):
        compiled = equal(net, torch.randn(6 * batch, 4, 4, 24))
        assert compiled.counts()[0] >= 1


def test_moved_tokens_are_saved(tmp_path):
    net, x = Pyramid(WindowAttention()).eval(), torch.randn(3, 3, HEIGHT, WIDTH)
    compiled = rarefy.compile(net, x, tune=False)
    rarefy.save(compiled, tmp_path / "m")
    loaded = rarefy.load(tmp_path / "m")
    assert torch.equal(loaded(x), compiled(x)) and loaded.counts()[0] == 1


@pytest.mark.parametrize(
    ("place", "value", "error", "says"),
    [
        (3, {"tuple": [0, 12]}, ContainerError, "a tuple of whole numbers from 1 to 2"),
        (3, {"tuple": [7, 12]}, ModelError, "the saved graph is inconsistent"),
        (2, 5, ModelError, "the saved graph is inconsistent"),
    ],
)
def test_changed_files(tmp_path, place, value, error, says):
    net, x = Between(*MOVES["roll"][:1], 24, 24, False, False).eval(), torch.randn(3, HEIGHT, WIDTH, 24)
    rarefy.save(rarefy.compile(net, x, tune=False), tmp_path / "m")
    edit(tmp_path / "m", set_arg("rarefy.gather_tokens", place, value))
    with pytest.raises(error, match=says):
        rarefy.load(tmp_path / "m")(x)


class Argument:
    name = "index"


def call(index, shape=(2, 6, 4)):
    class Node:
        target, args = ops.gather_tokens, (None, Argument, 1, (6,))

    return Call(Node, (shape,), None, None, {"index": index}, {})


def test_indexes_from_files_are_checked():
    spec = BY_NAME["gather_tokens"]
    assert spec.fits(call(torch.arange(6)[None])) and spec.fits(call(torch.arange(6)[None] - 1))
    assert not spec.fits(call(torch.arange(6)[None] + 1)) and not spec.fits(call(torch.arange(6)[None] - 2))
    assert not spec.fits(call(torch.arange(6)[None], (0, 6, 4))) and not spec.fits(call(torch.arange(5)[None]))
    with pytest.raises(ValueError, match=r"expected an index of int64 \[groups, tokens\], got float32 \[6\]"):
        spec.check_weights(call(torch.zeros(6)))  # type: ignore[misc]


def test_rows_that_are_concatenated_as_if_they_were_channels():
    """The linear layer behind cannot join the call of an operator on images; it is one of its own."""

    class Longer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.first(x)
            x = torch.cat([x, x[:, :1]], 1)
            return self.last(x), x

    net, x = Longer().eval(), torch.randn(3, 4, 5, 8)
    made = rarefy.compile(net, x, tune=False)
    for got, want in zip(made(x), net(x)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class FixedBatch(nn.Module):
    """Images as rows and back, with a batch size that the code fixes, as files exported without open sizes have it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.layer = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))

    def forward(self, x):
        rows = self.first(x).permute(0, 2, 3, 1).reshape(2, 36, 8)
        return self.second(self.layer(rows).reshape(2, 6, 6, 8).permute(0, 3, 1, 2))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_batch_of_a_fixed_size_is_not_split(precision):
    net, x = FixedBatch().eval(), torch.randn(2, 3, 6, 6)
    fast = rarefy.compile(net, x, precision=precision)
    assert {"pixels_to_tokens", "tokens_to_pixels"} <= set(fast.counts()[1])
    assert (fast(x) - net(x)).norm() < 0.03 * net(x).norm()


class Mixer(nn.Module):
    """A layer across tokens (Tolstikhin et al. 2021), written with transpose or permute."""

    def __init__(self, swap, tokens=7, features=20):
        super().__init__()
        self.norm, self.across = nn.LayerNorm(features), nn.Linear(tokens, tokens)
        self.along, self.swap = nn.Linear(features, features), swap

    def forward(self, x):
        x = x + self.swap(self.across(self.swap(self.norm(x))))
        return x + self.along(x)


@pytest.mark.parametrize("swap", [lambda x: x.transpose(1, 2), lambda x: x.permute(0, 2, 1), lambda x: x.mT])
def test_layers_across_tokens_run_in_one_call(isa, swap):
    net = nn.Sequential(nn.Linear(9, 20), Mixer(swap), Mixer(swap)).eval()
    compiled = equal(net, torch.randn(2, 7, 9))
    assert compiled.counts()[0] == 1 and compiled.counts()[1]["swap_features"] == 4
    for batch in (1, 3, 70):
        x = torch.randn(batch, 7, 9)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


def test_layers_across_tokens_beside_attention(isa):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.TransformerEncoderLayer(20, 4, 40, batch_first=True)
            self.mixer = Mixer(lambda x: x.transpose(1, 2))

        def forward(self, x):
            return self.mixer(self.block(x))

    net = Net().eval()
    compiled = rarefy.compile(net, torch.randn(2, 7, 20), tune=False)
    for batch in (1, 3, 9):
        x = torch.randn(batch, 7, 20)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    assert "swap_features" in compiled.counts()[1]
