"""Every ordered pair of what can be done to a model: it works and both promises hold, or it is refused with the reason."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import rarefy
from helpers.vision_models import Small, data
from rarefy.common.errors import ModelError
from rarefy.model.layers import all_layers
from rarefy.model.lowrank_modules import factor_records
from rarefy.model.quant_grid import get_grid


def train(model):
    return rarefy.fit_(model, data(), epochs=2, optimizer=lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1))


DO = {
    "prune": lambda m: rarefy.prune_(m, sparsity=0.5, layers=["hidden*", "more*"]),
    "quantize": lambda m: rarefy.quantize_(m, "int4", symmetric=False),
    "factorize": lambda m: rarefy.factorize_(m, keep=0.5, layers=["hidden*", "more*"]),
    "share": lambda m: rarefy.share_(m, 3, layers=["hidden*", "more*"]),
    "cut": lambda m: rarefy.cut_(m, data()[0][0], keep=0.5),
    "train": train,
}
REFUSED = {
    ("prune", "factorize"): "pruned or quantized: factorize first, or give of= the model before",
    ("prune", "cut"): "masks are still attached",
    ("quantize", "quantize"): "is already quantized: start from the weights before quantization",
    ("quantize", "factorize"): "pruned or quantized: factorize first",
    ("quantize", "share"): "is already quantized: ignore it",
    ("quantize", "cut"): "is already quantized: cut first, then quantize",
    ("factorize", "factorize"): "it is a factor itself",
    ("factorize", "cut"): "hidden is already factorized: cut first, then factorize",
    ("share", "quantize"): "is already quantized",
    ("share", "factorize"): "pruned or quantized: factorize first",
    ("share", "share"): "is already quantized: ignore it",
    ("share", "cut"): "is already quantized: cut first, then quantize",
}


@pytest.mark.parametrize(("first", "second"), [*itertools.product(DO, DO)])
@pytest.mark.parametrize("folded", [False, True])
def test_one_after_the_other(first, second, folded, tmp_path):
    torch.manual_seed(0)
    model = Small().eval()
    dense = sum(p.numel() for p in model.parameters())
    DO[first](model)
    before, zeros = kept(model), rarefy.masks(model)
    if folded:
        rarefy.fold_(model)
    why = REFUSED.get((first, second))
    if folded and (first, second) in (("prune", "cut"), ("prune", "factorize")):
        why = None  # zeros that nobody holds are ordinary weights
    if why is not None:
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ModelError, match=why):
            DO[second](model)
        now = model.state_dict()
        assert list(now) == list(state) and all(torch.equal(now[k], state[k]) for k in state)
        return
    DO[second](model)
    promises(model, first, second, before, zeros, folded, dense)
    x = data()[0][0]
    with torch.no_grad():
        want = model.eval()(x)
    rarefy.save(model, tmp_path / "out")
    again = rarefy.load(tmp_path / "out", Small()).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x), want, rtol=1e-5, atol=1e-5)
    assert rarefy.save(again, tmp_path / "again") == rarefy.save(model, tmp_path / "more")


def kept(model):
    """What lies on a grid or in a codebook, and how many values it has."""
    return {l.full_name: len(l.weight.unique()) for l in all_layers(model) if get_grid(l) is not None}


def promises(model, first, second, before, zeros, folded, dense):
    done = {first, second}
    layers = {l.full_name: l for l in all_layers(model)}
    if "prune" in done and not (folded and first == "prune" and second in ("train", "cut", "factorize")):
        for name, mask in zeros.items():  # a zero stays a zero
            assert bool((layers[name].weight[~mask] == 0).all())
        pruned = [n for n in layers if n.startswith(("hidden", "more"))]
        assert all(float((layers[n].weight == 0).float().mean()) > 0.45 for n in pruned)
    if done & {"quantize", "share"} and not (folded and second == "train"):
        on = [l for l in layers.values() if get_grid(l) is not None]
        assert on and all(get_grid(l).contains(l.weight.detach()) for l in on)
        assert set(before) <= {l.full_name for l in on}
    if "factorize" in done:
        assert set(factor_records(model)) == {"hidden", "more"}
    if "cut" in done:
        assert sum(p.numel() for p in model.parameters()) < 0.7 * dense


def test_three_and_four_in_a_row(tmp_path):
    """The long way: cut, factorize, prune, quantize, train, save, load, run on kernels."""
    torch.manual_seed(0)
    model = Small().eval()
    rarefy.cut_(model, data()[0][0], keep=0.75)
    rarefy.factorize_(model, keep=0.6, layers=["hidden", "more"])
    rarefy.prune_(model, "2:4", layers=["*.up"])
    rarefy.quantize_(model, "int8", activations="int8", layers=["*.up", "*.down"])
    masks = rarefy.masks(model)
    train(model)
    assert all(bool((model.get_submodule(n).weight[~m] == 0).all()) for n, m in masks.items())
    rarefy.save(model, tmp_path / "out", compress=True)
    again = rarefy.load(tmp_path / "out", Small()).eval()
    x = data()[0][0]
    with torch.no_grad():
        want = model.eval()(x)
        torch.testing.assert_close(again(x), want)
        rarefy.accelerate_(again, (16,), tuning_cache=False)
        assert float((again(x) - want).norm() / want.norm()) < 0.05
