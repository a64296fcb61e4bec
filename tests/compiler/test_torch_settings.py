"""Calls of compiled models while torch has other defaults, under autocast, and with tensors that are stored otherwise."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rarefy
from conftest import tiny_llama
from helpers.marks import slow_case
from rarefy.common.errors import DataError, ModelError
from rarefy.runtime.kernel import Kernel
from rarefy.runtime.packing import pack_tiles


class Attention(nn.Module):
    """Attention with a mask, and operators that torch runs."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True)
        self.last = nn.Linear(32, 16)

    def forward(self, x, mask):
        y, _ = self.inner(x, x, x, key_padding_mask=mask, need_weights=False)
        return self.last(y.cumsum(1).sort(-1).values)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": lambda: torch.device("meta"),
}
MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)),
    "images": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, groups=16), nn.AvgPool2d(2)
    ),
    "attention": Attention,
}


def call_of(name, batch):
    """Return arguments of a call with values of a seed that depends on the batch."""
    torch.manual_seed(batch)
    if name == "images":
        return (torch.randn(batch, 3, 16, 16),)
    if name == "linear":
        return (torch.randn(batch, 32),)
    return torch.randn(batch, 6, 32), torch.arange(6).expand(batch, 6) > torch.arange(batch)[:, None] % 5


def distance(got, want):
    assert got.dtype == want.dtype == torch.float32 and got.device.type == "cpu"
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("precision", [None, slow_case("int8")])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_calls_do_not_depend_on_settings_of_torch(name, setting, precision):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    fast = rarefy.compile(model, call_of(name, 4), precision=precision)
    calls = {batch: call_of(name, batch) for batch in (4, 7)}  # one that has run, and one that programs are made for
    with torch.no_grad():
        wants = {batch: model(*call) for batch, call in calls.items()}
    with SETTINGS[setting]():
        inside = {batch: fast(*call) for batch, call in calls.items()}
    limit = 0.05 if precision else 1e-5
    for batch, call in calls.items():
        assert distance(inside[batch], wants[batch]) < limit
        assert torch.equal(fast(*call), inside[batch])  # nothing that was made inside stays wrong


@pytest.mark.parametrize("precision", [slow_case(None), "int8"])
@pytest.mark.parametrize("setting", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_compiled_and_loaded_under_other_defaults(name, setting, precision, tmp_path):
    """Another thread sets them for the whole process: transformers does so while it loads a model in bf16."""
    torch.manual_seed(0)
    model, call = MODELS[name]().eval(), call_of(name, 4)
    with torch.no_grad():
        want = model(*call)
    options = {} if precision is None else {"precision": precision, "calibrate": [call]}
    with SETTINGS[setting]():
        fast = rarefy.compile(model, call, **options)
        rarefy.save(fast, tmp_path / "model")
        again = rarefy.load(tmp_path / "model")
        got = fast(*call), again(*call)
    assert all(distance(y, want) < (0.05 if precision else 1e-5) for y in got)


@pytest.mark.parametrize(
    "setting, message", [("autocast", "outside of torch.autocast"), ("device", "default device is meta")]
)
def test_compiling_under_settings_that_change_the_model_is_refused(setting, message):
    with SETTINGS[setting](), pytest.raises(ModelError, match=message):
        rarefy.compile(MODELS["linear"]().eval(), call_of("linear", 4))


@pytest.mark.parametrize("setting", SETTINGS)
def test_later_branches_do_not_depend_on_settings_of_torch(setting):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return self.inner(x) * (3 if x.shape[0] % 4 == 0 else 1)

    torch.manual_seed(0)
    model, x = Branch().eval(), torch.randn(6, 8)
    fast = rarefy.compile(model, torch.randn(4, 8))
    with torch.no_grad():
        want = model(x)
    with SETTINGS[setting]():
        got = fast(x)
    assert distance(got, want) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_negated_views_are_read_as_their_values(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    x, *rest = call_of(name, 4)
    negated = torch.complex(torch.zeros_like(x), x).conj().imag
    assert negated.is_neg()
    with torch.no_grad():
        assert distance(rarefy.compile(model, (x, *rest))(negated, *rest), model(-x, *rest)) < 1e-5


def test_kernels_read_negated_views():
    torch.manual_seed(0)
    run, x = Kernel(pack_tiles(torch.randn(8, 16))).run, torch.randn(3, 16)
    negated = torch.complex(torch.zeros_like(x), x).conj().imag
    assert torch.equal(run(negated), run(-x))


@pytest.mark.parametrize("setting", SETTINGS)
def test_texts_do_not_depend_on_settings_of_torch(setting):
    torch.manual_seed(0)
    model, ids = tiny_llama().eval(), torch.arange(8).view(2, 4)
    decoder = rarefy.decoder(model, precision="int8")
    want = decoder.generate(ids, max_new_tokens=6)
    with SETTINGS[setting]():
        assert torch.equal(decoder.generate(ids, max_new_tokens=6), want)
    assert torch.equal(decoder.generate(ids, max_new_tokens=6), want)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_tensors_without_memory_are_refused():
    fast = rarefy.compile(MODELS["linear"]().eval(), call_of("linear", 4))
    with FakeTensorMode():
        fake = torch.empty(4, 32)
        with pytest.raises(DataError, match="without memory"):
            fast(torch.empty(4, 32))
    with pytest.raises(DataError, match="expected tensors with values in memory, got a FakeTensor"):
        fast(fake)
    with pytest.raises(DataError, match="linear failed on these inputs"):
        torch.vmap(fast)(torch.randn(2, 4, 32))
