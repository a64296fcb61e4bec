"""Models compiled as users compile them: every layer is timed, what torch runs faster runs in torch, and zeros too."""

import copy

import pytest
import torch
from torch import nn

import rarefy
import zoo
from conftest import tiny_bert, tiny_llama
from helpers.marks import slow_case, slow_except
from rarefy.compiler import tuning
from rarefy.model.compare import relative_distance
from rarefy.runtime import bindings

pytestmark = [
    pytest.mark.tuned,
    pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing())),
]
LIMITS = {None: 1e-4, "bf16": 0.03, "int16": 1e-3, "int8": 0.1}


class ConvNet(nn.Module):
    """Convolutions with a norm, a gate and a residual sum, so that several native calls are timed."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.deep, self.next = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.fc((x + self.next(self.deep(x).relu())).mean((2, 3)))


def sparse_mlp():
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Softmax(-1)).eval()
    rarefy.prune_(net, sparsity=0.9)
    return net


def words(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (rows, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# a model, its example and inputs of other sizes
MODELS = {
    "zeros": (sparse_mlp, lambda: torch.randn(4, 64), lambda: torch.randn(33, 64)),
    "images": (lambda: ConvNet().eval(), lambda: torch.randn(2, 3, 32, 32), lambda: torch.randn(5, 3, 32, 32)),
    "encoder": (tiny_bert, lambda: words(2, 12), lambda: words(5, 31)),
}
PRECISIONS = {"zeros": (None, "int8", "bf16", "int16"), "images": (None, "int8"), "encoder": (None, "int8")}
ZOO = [
    "distilbert", "opt", "squeezenet1_1", "bert", "vit", "clip", "gpt2", "qwen3", "t5", "resnet18", "mnasnet0_5",
    "mobilenet_v3_small", "swin_t", "densenet121",
]  # fmt: skip


def outputs(model, x) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(**x) if isinstance(x, dict) else model(x)
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


def far(a, b) -> float:
    assert len(a) == len(b) > 0
    return max(relative_distance(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def times(monkeypatch, tmp_path):
    """Count what is timed, with a cache of choices that begins empty."""
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "cache"))
    counts, alternate = [], tuning.alternate
    monkeypatch.setattr(tuning, "alternate", lambda *args, **more: counts.append(1) or alternate(*args, **more))
    return counts


@pytest.mark.parametrize(("name", "precision"), [(n, p) for n in MODELS for p in PRECISIONS[n]])
def test_outputs_after_compiling_saving_and_compiling_again(name, precision, times, tmp_path):
    make, example, others = MODELS[name]
    torch.manual_seed(0)
    model, x, y = make(), example(), others()
    compiled = rarefy.compile(model, x, precision=precision)
    assert times, "nothing was timed"
    assert max(far(outputs(compiled, z), outputs(model, z)) for z in (x, y)) < LIMITS[precision]
    rarefy.save(compiled, tmp_path / "saved")
    again = rarefy.load(tmp_path / "saved")
    for z in (x, y):
        assert all(torch.equal(a, b) for a, b in zip(outputs(again, z), outputs(compiled, z), strict=True))
    times.clear()
    second = rarefy.compile(copy.deepcopy(model), x, precision=precision)
    assert not times, "choices of equal models were not remembered"
    assert len(second.schedule) == len(compiled.schedule)
    assert max(far(outputs(second, z), outputs(compiled, z)) for z in (x, y)) < LIMITS[precision]


def test_calibrated_8_bits(times):
    torch.manual_seed(0)
    model, batches = ConvNet().eval(), [torch.randn(4, 3, 32, 32) for _ in range(4)]
    compiled = rarefy.compile(model, batches[0], precision="int8", calibrate=batches)
    assert times and far(outputs(compiled, batches[1]), outputs(model, batches[1])) < 0.1


@pytest.mark.parametrize("name", slow_except(ZOO, "distilbert", "opt", "squeezenet1_1"))
def test_models_of_the_zoo(name, times):
    make, x = (zoo.transformers_cases() | zoo.torchvision_cases())[name]
    model = zoo.half(make())
    if name in ("gpt2", "opt", "qwen3", "t5"):
        x = {**x, "use_cache": False}
    compiled = rarefy.compile(model, x)
    assert times
    assert far(outputs(compiled, x), outputs(model, x)) < 1e-4


@pytest.mark.parametrize("precision", [None, "int8", slow_case("bf16")])
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_decoders(precision, sparsity, tmp_path):
    """Zeros are skipped where that is faster on this CPU, which is not fixed as in other tests of decoders."""
    model = tiny_llama(tie=False)
    if sparsity:
        rarefy.prune_(model, sparsity=sparsity, layers="*_proj")
    made = rarefy.decoder(model, precision=precision)
    ids = torch.randint(3, 64, (2, 40))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    assert relative_distance(made(ids), want) < LIMITS[precision]
    rarefy.save(made, tmp_path / "saved")
    assert torch.equal(rarefy.load(tmp_path / "saved")(ids), made(ids))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_torch_compile(precision, times):
    torch.manual_seed(0)
    model, x = ConvNet().eval(), torch.randn(2, 3, 32, 32)
    fast = torch.compile(model, backend="rarefy", options={"precision": precision})
    with torch.no_grad():
        assert relative_distance(fast(x), model(x)) < (1e-4 if precision == "fp32" else 0.1)
    torch._dynamo.reset()
