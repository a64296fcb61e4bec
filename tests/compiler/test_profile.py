"""Profiles: rows that add up to the calls that were timed, counts that torch confirms, names of layers."""

import json
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from conftest import tiny_bert, tiny_llama
from helpers.compile_models import Attends, Gated, Residual, pruned
from helpers.marks import slow_case
from rarefy.common.errors import DataError
from rarefy.compiler import executor, subgraph
from rarefy.compiler import profile as profile_module
from rarefy.compiler.profile import PYTHON, STARTING, WAITING
from rarefy.evaluation.profiling import flops
from rarefy.runtime import bindings, ceilings
from rarefy.runtime.ceilings import Ceilings

REST = {PYTHON, STARTING, WAITING}
LEVEL = Ceilings("any", 1, 1e12, 2e12, 4e12, 2e12, ((1 << 20, 1e11), (1 << 30, 1e10)))


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    """Ceilings without half a second of measuring for each instruction set."""
    monkeypatch.setattr(profile_module, "ceilings", lambda: LEVEL)


class Mixed(nn.Module):
    """Native programs with torch in between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(self.second(torch.sort(F.gelu(self.first(x)), -1).values))


def rows_of(profile, operator):
    return [r for r in profile.rows if r.operator == operator]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["torch in between", "images", "bert"])
def test_rows_add_up_to_the_calls(kind, threads, monkeypatch):
    nets = {"torch in between": (Mixed(), torch.randn(200, 64)), "images": (Residual(), torch.randn(6, 8, 20, 20))}
    ids = {"input_ids": torch.ones(2, 40, dtype=torch.int64)}
    net, x = nets.get(kind) or (tiny_bert(), ids)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = rarefy.compile(net.eval(), x)
        seconds: list[float] = []

        def timed_calls(call, *rest):
            def timed(recorder):
                began = time.perf_counter()
                call(recorder)
                seconds.append(time.perf_counter() - began)

            return profile_module.profile_calls(timed, *rest)

        monkeypatch.setattr(executor, "profile_calls", timed_calls)
        profile = made.profile(**x, repeats=8) if isinstance(x, dict) else made.profile(x, repeats=8)
    finally:
        torch.set_num_threads(before)
    middle = sorted(seconds[-8:])[2:6]
    total = sum(r.milliseconds for r in profile.rows)
    assert len(seconds) == 12 and profile.threads == threads
    assert total == pytest.approx(profile.milliseconds) and sum(r.share for r in profile.rows) == pytest.approx(1)
    assert total == pytest.approx(1000 * sum(middle) / 4, rel=0.03)
    # nothing is counted twice: what is left for Python and for starting threads is not negative
    assert all(r.milliseconds >= 0 for r in profile.rows)
    assert {r.operator for r in profile.rows} > REST


@pytest.mark.parametrize("precision", [None, slow_case("int8")])
def test_operations_are_those_that_torch_counts(precision):
    ids = {"input_ids": torch.ones(2, 16, dtype=torch.int64)}
    cases = [(tiny_bert(), ids), (Residual().eval(), torch.randn(3, 8, 20, 20)), (Gated().eval(), torch.randn(40, 24))]
    for net, x in cases:
        call = (lambda net=net, x=x: net(**x)) if isinstance(x, dict) else (lambda net=net, x=x: net(x))
        made = rarefy.compile(net, x, precision=precision)
        profile = made.profile(**x, repeats=1) if isinstance(x, dict) else made.profile(x, repeats=1)
        assert sum(r.operations for r in profile.rows) == flops(net, call)
        assert all(0 <= r.executed <= r.operations for r in profile.rows)


@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
def test_zeros_are_not_executed(pattern):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256)).eval()
    rarefy.prune_(net, pattern, "magnitude", 0.75)
    rarefy.fold_(net)
    x = torch.randn(100, 256)
    [row] = rows_of(rarefy.compile(net, x).profile(x, repeats=1), "linear")
    nonzero = int((net[0].weight != 0).sum())
    assert row.operations == 2 * 100 * 256 * 256
    # two rows with different numbers of values are padded to the larger one
    assert 2 * 100 * nonzero <= row.executed <= 1.2 * 2 * 100 * nonzero
    assert row.weights == ("fp32 tiles" if pattern == "4x1" else "fp32 sell") and row.sizes == "100 x 256 -> 256"


def test_causal_attention_hides_keys():
    net, x = Attends(causal=True).eval(), torch.randn(2, 30, 32)
    [row] = rows_of(rarefy.compile(net, x).profile(x, repeats=1), "attention")
    assert row.operations == 2 * 2 * 2 * 30 * 30 * 32 and row.executed == 2 * 2 * 2 * (30 * 31 // 2) * 32


def test_bytes_of_a_linear_layer():
    net, x = nn.Linear(48, 96).eval(), torch.randn(40, 48)
    [row] = rows_of(rarefy.compile(net, x).profile(x, repeats=1), "linear")
    assert row.bytes_moved == 4 * (48 * 96 + 96 + 40 * 48 + 40 * 96)
    assert row.gbytes == pytest.approx(row.bytes_moved / row.milliseconds / 1e6)
    assert row.gops == pytest.approx(row.executed / row.milliseconds / 1e6)


def test_the_nearest_ceiling():
    net, x = nn.Linear(512, 512).eval(), torch.randn(64, 512)
    made = rarefy.compile(net, x)
    [row] = rows_of(made.profile(x, repeats=1), "linear")
    compute, weights = 2 * 64 * 512 * 512 / LEVEL.fp32, 4 * (512 * 512 + 512) / LEVEL.cache
    assert compute > weights and row.limit == "fp32" and row.min_milliseconds == pytest.approx(1000 * compute)
    [row] = rows_of(made.profile(x[:1], repeats=1), "linear")
    activations = 4 * 1024 / LEVEL.cache
    assert row.limit == "cache" and row.min_milliseconds == pytest.approx(1000 * max(weights, activations))
    assert row.ceiling_percent == pytest.approx(100 * row.min_milliseconds / row.milliseconds)


@pytest.mark.parametrize("precision", [None, "int8"])
def test_layers_have_the_names_of_the_model(precision):
    ids = {"input_ids": torch.ones(2, 16, dtype=torch.int64)}
    net = tiny_bert()
    profile = rarefy.compile(net, ids, precision=precision).profile(**ids, repeats=1)
    linear = {n for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    assert {r.layer for r in rows_of(profile, "linear")} == linear
    assert {r.layer for r in rows_of(profile, "norm")} == {n for n in dict(net.named_modules()) if "LayerNorm" in n}
    attention = [f"encoder.layer.{i}.attention.self" for i in (0, 1)]
    assert [r.layer for r in rows_of(profile, "attention")] == attention
    x = torch.randn(2, 8, 20, 20)
    rows = rarefy.compile(Residual().eval(), x, precision=precision).profile(x, repeats=1).rows
    assert {"a", "b", "c", "head"} <= {r.layer for r in rows if r.operator in ("conv", "linear")}


def test_a_saved_model(tmp_path):
    x = torch.randn(10, 64)
    made = rarefy.compile(Mixed().eval(), x)
    rarefy.save(made, tmp_path / "out")
    profile = rarefy.load(tmp_path / "out").profile(x, repeats=1)
    assert [r.layer for r in rows_of(profile, "linear")] == ["first", "second"]
    assert [r.operations for r in profile.rows] == [r.operations for r in made.profile(x, repeats=1).rows]


def test_a_depthwise_convolution_and_one_with_groups():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1)).eval()
    net[1].weight.data[:, :3] = 0
    x = torch.randn(2, 8, 12, 12)
    profile = rarefy.compile(net, x).profile(x, repeats=1)
    counts = {r.layer: (r.operator, r.operations) for r in profile.rows if r.operations}
    assert counts["0"] == ("nhwc_depthwise", 2 * 2 * 8 * 100 * 9)
    assert counts["1"][1] == 2 * 2 * 8 * 64 * 4 * 9 and counts["2"][1] == 2 * 2 * 4 * 64 * 8


def test_images_that_do_not_all_go_together(monkeypatch):
    """Each shape has a program of its own; a call's runs of one program are summed."""
    monkeypatch.setattr(subgraph, "images_together", lambda *_: 2)
    net, x = Residual().eval(), torch.randn(5, 8, 20, 20)
    profile = rarefy.compile(net, torch.randn(2, 8, 20, 20)).profile(x, repeats=1)
    assert sum(r.operations for r in profile.rows) == flops(net, lambda: net(x))
    whole, rest = (r for r in profile.rows if r.layer == "b" and r.operations)
    assert whole.operations == 4 * rest.operations and whole.sizes.startswith("2 x ") and rest.sizes.startswith("1 x ")


def test_a_decoder_skips_zeros_for_single_tokens():
    model = tiny_llama(tie=False)
    rarefy.prune_(model, "unstructured", "magnitude", 0.75, layers="model.layers.*")
    rarefy.fold_(model)
    decoder = rarefy.decoder(model)
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for tokens in (1, 40):
        for row in rows_of(decoder.profile(torch.ones(1, tokens, dtype=torch.int64), repeats=1), "linear"):
            w = weights[row.layer]
            multiplied = int((w != 0).sum()) if tokens == 1 else w.numel()  # unpacked for many tokens
            assert row.weights == "fp32 bitmask" and row.executed == 2 * multiplied * (row.operations // 2 // w.numel())


def test_sums_by_operator():
    x = torch.randn(40, 24)
    profile = rarefy.compile(Gated().eval(), x).profile(x, repeats=2)
    sums = {r.operator: r for r in profile.by_operator()}
    linear = rows_of(profile, "linear")
    assert sums["linear"].count == len(linear) == 3
    for name in ("milliseconds", "operations", "executed", "bytes_moved", "min_milliseconds"):
        assert getattr(sums["linear"], name) == pytest.approx(sum(getattr(r, name) for r in linear))
    times = [r.milliseconds for r in profile.by_operator()]
    assert times == sorted(times, reverse=True) and sum(times) == pytest.approx(profile.milliseconds)


def test_what_is_printed_and_written_as_json():
    x = torch.randn(40, 24)
    profile = rarefy.compile(pruned(Gated()), x).profile(x, repeats=2, warmup=0)
    text = str(profile)
    assert "ms a call" in text and "measured ceilings (any, 1 threads)" in text
    assert all(r.layer in text for r in rows_of(profile, "linear"))
    value = json.loads(profile.to_json())
    assert value == profile.to_dict() and len(value["rows"]) == len(profile.rows)
    assert value["ceilings"]["int8"] == 4e12 and value["ceilings"]["reads"][0] == [1 << 20, 1e11]
    assert {"operator", "layer", "milliseconds", "gops", "gbytes", "ceiling_percent"} <= value["rows"][0].keys()


def test_a_decoder():
    decoder = rarefy.decoder(tiny_llama())
    ids = torch.randint(0, 64, (2, 12))
    prompt = decoder.profile(ids, repeats=1)
    assert {"model.layers.0.mlp.up_proj", "lm_head"} <= {r.layer for r in rows_of(prompt, "linear")}
    cache = decoder.cache(2, 20)
    want = decoder(ids, cache)
    token = decoder.profile(ids[:, :1], cache, repeats=2)
    assert cache.past == 12  # the cache stays as it is
    [row, _] = rows_of(token, "attention")
    assert row.sizes == "2 x 4 heads x 1 x 13 x 8" and row.operations == 2 * 2 * 2 * 13 * 32 == row.executed
    torch.testing.assert_close(decoder(ids)[:, -1], want[:, -1])


def test_torch_alone(monkeypatch):
    """Without kernels, torch runs all operators; there are no ceilings."""
    monkeypatch.setattr(bindings, "_open", lambda: (None, "no compiled kernels"))
    x = torch.randn(10, 64)
    profile = rarefy.compile(Mixed().eval(), x).profile(x, repeats=2)
    assert profile.ceilings is None and all(r.ceiling_percent is None for r in profile.rows)
    assert [r.layer for r in rows_of(profile, "linear (torch)")] == ["first", "second"]
    assert sum(r.operations for r in profile.rows) == 2 * 2 * 10 * 64 * 256
    assert "ceilings" not in str(profile)


def test_outputs_do_not_change():
    x = torch.randn(40, 24)
    made = rarefy.compile(Gated().eval(), x)
    want = made(x)
    made.profile(x, repeats=2)
    assert torch.equal(made(x), want)


def test_errors():
    x = torch.randn(4, 24)
    made = rarefy.compile(Gated().eval(), x)
    with pytest.raises(DataError, match="repeats: expected a whole number of at least 1, got 0"):
        made.profile(x, repeats=0)
    with pytest.raises(DataError, match="warmup: expected a whole number of at least 0, got -1"):
        made.profile(x, warmup=-1)
    with pytest.raises(DataError, match="got \\[4, 23\\]"):
        made.profile(x[:, :23])


def test_ceilings_of_this_machine(isa):
    """Plausible numbers: no kernel is faster, and smaller numbers are multiplied faster where the CPU can."""
    c = ceilings.ceilings()
    assert c is ceilings.ceilings() and c.isa == isa and c.threads == torch.get_num_threads()
    assert 1e9 < c.fp32 < 1e14 and min(c.bf16, c.int8) > 1e9 and 1e8 < c.memory < 1e13
    if isa == "amx":
        assert c.int8 > c.bf16 > 2 * c.fp32
    assert [n for n, _ in c.reads] == sorted({n for n, _ in c.reads})
    assert c.read_rate(0) == c.cache and c.read_rate(1 << 40) == c.memory


def test_ceilings_that_cannot_be_measured():
    measure = bindings.library().rarefy_measure_ceiling
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    assert measure(4, 0.01, None, 0) == 0 and measure(-1, 0.01, None, 0) == 0
    assert measure(3, 0.01, None, 1 << 20) == 0 and measure(3, 0.01, memory.data_ptr(), 100) == 0
    assert measure(3, 0.01, memory.data_ptr(), memory.nbytes) > 0
