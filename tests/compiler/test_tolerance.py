"""How far outputs may be from the model's, and NaN and infinities in models with static scales."""

import math

import pytest
import torch
from torch import nn

import rarefy
from helpers.language_models import small
from rarefy.common.errors import DataError, OutputsDifferError
from rarefy.compiler.compile import compile
from rarefy.model.compare import relative_distance

NOT_FINITE = (math.nan, math.inf, -math.inf)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=16)
        self.head = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x):
        return self.head(self.down(self.conv(x).relu()).relu().mean((2, 3)))


class Rows(nn.Module):
    """Two layers on rows, whose inputs are cleaned, and scores under an additive mask."""

    def __init__(self, clean=False):
        super().__init__()
        self.one, self.two, self.clean = nn.Linear(32, 64), nn.Linear(64, 32), clean

    def forward(self, x, mask):
        x = x.nan_to_num(0.0, 1.0, -1.0) if self.clean else x
        y = self.two(torch.nn.functional.gelu(self.one(x)))
        return (y + mask).softmax(-1)


@pytest.mark.parametrize("tune", [False, True])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_images_that_are_not_finite(value, tune):
    net, x = Images().eval(), torch.randn(3, 3, 16, 16)
    made = rarefy.compile(net, x, precision="int8", calibrate=[x], tune=tune)
    wrong = x.clone()
    wrong[1, 2, 3, 4] = value
    got, usual = made(wrong), made(x)
    with torch.no_grad():
        assert torch.equal(got.isfinite(), net(wrong).isfinite())
    assert not got[1].isfinite().any()
    assert torch.equal(got[[0, 2]], usual[[0, 2]])
    assert torch.equal(made(x), usual)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_saved_model_keeps_what_is_not_finite(value, tmp_path):
    net, x = Images().eval(), torch.randn(2, 3, 16, 16)
    rarefy.save(rarefy.compile(net, x, precision="int8", calibrate=[x], tune=False), tmp_path / "net")
    x[0, 0, 0, 0] = value
    got = rarefy.load(tmp_path / "net")(x)
    assert not got[0].isfinite().any() and got[1].isfinite().all()


def test_infinities_that_a_model_takes_stay_without_effect():
    """A mask of -inf, and values that the model itself replaces, are no reason for NaN."""
    x, mask = torch.randn(4, 32), torch.zeros(4, 32)
    for clean in (False, True):
        net = Rows(clean).eval()
        made = rarefy.compile(net, (x, mask), precision="int8", calibrate=[(x, mask)], tune=False)
        hidden = mask.masked_fill(torch.arange(32) % 3 == 0, -math.inf)
        values = x.clone()
        values[2, 5] = math.nan
        for inputs in ((x, hidden), (values, mask), (values, hidden)):
            want = net(*inputs).detach()
            got = made(*inputs)
            assert torch.equal(got.isfinite(), want.isfinite())
            fine = want.isfinite()
            assert (got[fine] - want[fine]).abs().max() < 0.02


def test_large_finite_values_are_no_infinities():
    net, x = Rows().eval(), torch.full((4, 32), 3e37)
    made = rarefy.compile(net, (x / 1e37, x * 0), precision="int8", calibrate=[(x / 1e37, x * 0)], tune=False)
    assert made(x, x * 0).isfinite().all()


class Cancels(nn.Module):
    """A difference of two nearly equal layers, of which 8 bits leave nothing, and a layer of it."""

    def __init__(self, apart):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.second.load_state_dict({n: t + apart * torch.randn_like(t) for n, t in self.first.state_dict().items()})

    def forward(self, x):
        return self.third(self.first(x) - self.second(x))


def test_far_outputs_are_refused_with_what_helps():
    net, x = Cancels(1e-3).eval(), torch.randn(16, 64)
    with pytest.raises(OutputsDifferError) as error:
        rarefy.compile(net, x, precision="int8")
    for part in ("at most 0.2 is allowed", "Layers that lose most: ", "per_layer={'", "calibrate=", "max_error="):
        assert part in str(error.value)
    accepted = rarefy.compile(net, x, precision="int8", max_error=math.inf, tune=False)  # warnings are errors
    assert accepted(x).shape == (16, 64)
    exact = rarefy.compile(net, x, precision="int8", ignore=["first", "second"])
    assert relative_distance(exact(x), net(x).detach()) < 0.05


def test_a_lower_limit_is_kept_too():
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval(), torch.randn(16, 64)
    rarefy.compile(net, x, precision="int8", tune=False)
    with pytest.raises(OutputsDifferError, match=r"at most 0.001 is allowed"):
        rarefy.compile(net, x, precision="int8", max_error=1e-3)


@pytest.mark.parametrize("wrong", [0, -1, math.nan, True])
def test_limits_that_are_no_limits(wrong):
    with pytest.raises(DataError, match=r"max_error: expected a number above 0, such as 0.3, got"):
        compile(nn.Linear(4, 4).eval(), torch.ones(2, 4), max_error=wrong)
    with pytest.raises(DataError, match=r"max_error: expected a number above 0"):
        rarefy.decoder(small(), max_error=wrong)


def test_decoders_have_the_limit_too(monkeypatch):
    with pytest.raises(OutputsDifferError, match=r"logits .* at most 1e-06 is allowed: choose .* max_error="):
        rarefy.decoder(small(), precision="int8", max_error=1e-6)
    monkeypatch.setattr("rarefy.generation.decoder.FAR", 1e-6)
    with pytest.warns(UserWarning, match="outputs differ by .* measure the quality on data. What helps: precision='bf"):
        rarefy.decoder(small(), precision="int8")
    rarefy.decoder(small(), precision="int8", max_error=0.5)  # warnings are errors


def test_numbers_at_padding_are_no_difference_in_8_bits():
    """No one reads them: a layer norm of tokens near 0 makes much of what rounding loses there."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = Cancels(0.0)

        def forward(self, x, attention_mask):
            return self.layers(x) * (1 - attention_mask[..., None]) + x * attention_mask[..., None]

    net, mask = Padded().eval(), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    net.layers.second.weight.data += 1e-4
    for max_error in (None, 0.1):
        example = {"x": torch.randn(2, 4, 64), "attention_mask": mask}
        rarefy.compile(net, example, precision="int8", tune=False, max_error=max_error)
