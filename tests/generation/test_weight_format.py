"""Which format a decoder's weight is packed in, by its grid and zeros and by what is faster."""

from __future__ import annotations

import pytest
import torch

from rarefy.generation import weight_format
from rarefy.generation.weight_format import BITMASK, PANELS, pack_weight
from rarefy.model.quant_grid import Grid
from rarefy.runtime import bindings, tuning_cache
from rarefy.runtime.packed_formats import Bitmask, QuantizedPanels
from rarefy.runtime.packing import unpack


def weight_of(zeros: float, bits: int = 8, groups: int = 1, zero: bool = False) -> tuple[torch.Tensor, Grid]:
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    weight[torch.rand(64, 128) < zeros] = 0
    scale = weight.view(64, groups, -1).abs().amax(2) / (2 ** (bits - 1) - 1)
    scale = scale.bfloat16().float() if groups > 1 else scale  # as kernels hold them
    grid = Grid(bits, scale, torch.full_like(scale, 2 ** (bits - 1)).byte() if zero else None)
    return grid.snap(weight), grid


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("precision", ["int8", None])
@pytest.mark.parametrize(
    ("zeros", "bits", "groups", "zero"),
    [(0.0, 8, 1, False), (0.6, 8, 1, False), (0.6, 4, 1, False), (0.6, 4, 4, False), (0.6, 4, 1, True)],
)
def test_a_bitmask_only_where_it_is_faster(monkeypatch, faster, precision, zeros, bits, groups, zero):
    monkeypatch.setattr(weight_format, "skipping_zeros_is_faster", lambda *_: faster)
    weight, grid = weight_of(zeros, bits, groups, zero)
    packed = pack_weight(weight, precision, grid, False)
    leaves_out = faster and zeros > 0 and groups == 1 and not zero
    assert isinstance(packed, Bitmask if leaves_out else QuantizedPanels)
    assert torch.allclose(unpack(packed), weight, atol=1e-6)


def test_what_is_not_quantized_is_in_8_bits_or_as_it_is(monkeypatch):
    weight = weight_of(0.6)[0]
    monkeypatch.setattr(weight_format, "skipping_zeros_is_faster", lambda *_: False)
    assert isinstance(pack_weight(weight, "int8", None, False), QuantizedPanels)
    assert (pack_weight(weight, None, None, False).kind, pack_weight(weight, "bf16", None, False).kind) == (
        "fp32",
        "bf16",
    )


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.tuned
def test_what_is_faster_is_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    asked: list[tuple[object, ...]] = []

    def seconds(*case):
        asked.append(case)
        return {BITMASK: 1.0, PANELS: case[2] * 2}  # faster from 60 % zeros on

    monkeypatch.setattr(weight_format, "_seconds", seconds)
    measured = weight_format.skipping_zeros_is_faster
    for _ in range(2):
        assert [measured("int8", 8, z, True) for z in (0.25, 0.49, 0.61, 0.69)] == [False, False, True, True]
    assert asked == [("int8", 8, 0.2, True), ("int8", 8, 0.4, True), ("int8", 8, 0.6, True)]
    key = "zeros of a decoder int8 8 6 True"
    for wrong in ({1: ("another", 2.0)}, {2: (BITMASK, 2.0)}, {1: (PANELS, 1.0), 2: (PANELS, 1.0)}):
        tuning_cache.write(tuning_cache.default_file(), {key: wrong})
        assert measured("int8", 8, 0.61, True)
    assert len(asked) == 6


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.parametrize(("precision", "two_terms"), [("int8", True), ("int8", False), (None, False), ("bf16", False)])
def test_both_formats_are_timed(monkeypatch, precision, two_terms):
    monkeypatch.setattr(weight_format, "TIMED_SHAPE", (64, 64))
    monkeypatch.setattr(weight_format, "REPEATS", 2)
    seconds = weight_format._seconds(precision, 8, 0.5, two_terms)
    assert seconds.keys() == {BITMASK, PANELS} and min(seconds.values()) > 0
