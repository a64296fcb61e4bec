"""Models in bf16 and fp16 compile, and are nearer to fp32 than eager torch is; where attention multiplies bf16."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from helpers.compile_models import Attends
from helpers.marks import slow_case
from rarefy.common.errors import DataError, ModelError
from rarefy.compiler import ops
from rarefy.model.compare import relative_distance
from rarefy.runtime import bindings
from rarefy.runtime.packed_formats import DTYPES

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


class Encoder(nn.Module):
    """Embeddings, attention under a mask, norms, GELU; as MiniLM has them."""

    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(60, 32), nn.LayerNorm(32)
        self.layers = nn.ModuleList(Attends() for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(6))
        self.up, self.down = (nn.ModuleList(nn.Linear(*n) for _ in range(3)) for n in ((32, 96), (96, 32)))

    def forward(self, ids, mask):
        x = self.norm(self.words(ids))
        for i, attend in enumerate(self.layers):
            x = self.norms[2 * i](attend(x, mask[:, None, None]))
            x = self.norms[2 * i + 1](x + self.down[i](F.gelu(self.up[i](x))))
        return {"hidden": x, "lengths": mask.sum(1), "pooled": x.float().mean(1)}


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.a(x).relu()
        return self.head((x + self.norm(self.b(x))).relu().mean((2, 3)))


def encoder_inputs(dtype):
    mask = torch.arange(23) < torch.tensor([23, 9, 14])[:, None]
    return torch.randint(60, (3, 23)), mask


def image_inputs(dtype):
    return (torch.randn(3, 3, 24, 20).to(dtype),)


MODELS = {"encoder": (Encoder, encoder_inputs), "convolutions": (Convolutions, image_inputs)}


def outputs(f, inputs):
    with torch.no_grad():
        out = f(*inputs)
    return out if isinstance(out, dict) else {"out": out}


@pytest.mark.parametrize("tune", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_nearer_to_fp32_than_eager(name, dtype, tune, tmp_path):
    make, inputs = MODELS[name]
    net, example, x = make().to(dtype).eval(), inputs(dtype), inputs(dtype)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    made = rarefy.compile(net, example, tune=tune)
    eager, got = outputs(net, x), outputs(made, x)
    fp32 = outputs(_same_in_fp32(make, net), [t.float() if t.is_floating_point() else t for t in x])
    assert got.keys() == eager.keys()
    for key, want in eager.items():
        assert got[key].dtype == want.dtype
        if want.is_floating_point():
            assert relative_distance(got[key], fp32[key]) <= relative_distance(want, fp32[key])
            assert relative_distance(got[key], want) < 0.03
        else:
            assert torch.equal(got[key], want)
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in net.state_dict().items())
    if not tune:
        kinds = {k.held[0].kind for n, k in made.kernels.items() if n.target is ops.linear}
        assert kinds == {"bf16" if dtype == torch.bfloat16 else "fp32"}
    rarefy.save(made, tmp_path / "saved")
    again = outputs(rarefy.load(tmp_path / "saved"), x)
    assert all(torch.equal(again[n], got[n]) and again[n].dtype == got[n].dtype for n in got)


def _same_in_fp32(make, net):
    copy = make().eval()
    copy.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in net.state_dict().items()})
    return copy


def test_weights_in_bf16_are_exact():
    net = nn.Sequential(nn.Linear(64, 48)).bfloat16().eval()
    made = rarefy.compile(net, torch.randn(70, 64).bfloat16(), tune=False)
    x = torch.randn(70, 64).bfloat16()
    want = F.linear(x.double(), net[0].weight.double(), net[0].bias.double())
    assert relative_distance(made(x), want) < 2**-8
    with pytest.raises(DataError, match="expected bfloat16"):
        made(x.float())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_precision_may_be_asked_for(precision):
    net, x = Convolutions().bfloat16().eval(), image_inputs(torch.bfloat16)
    options = {"calibrate": [x, x]} if precision == "int8" else {}
    made = rarefy.compile(net, x, precision=precision, tune=False, **options)
    assert {k.held[0].kind for n, k in made.kernels.items() if n.target is ops.linear} == {precision}
    assert sum(k.input_grid is not None for k in made.kernels.values()) == 3 * (precision == "int8")
    with torch.no_grad():
        assert made(*x).dtype == torch.bfloat16 and relative_distance(made(*x), net(*x)) < 0.05


def test_fp32_may_be_asked_for_by_name():
    net, x = nn.Sequential(nn.Linear(64, 48)).eval(), torch.randn(70, 64)
    made = rarefy.compile(net, x, tune=False)
    assert torch.equal(rarefy.compile(net, x, precision="fp32", tune=False)(x), made(x))


def test_shared_weights_stay_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.words(ids))

    net, ids = Tied().bfloat16().eval(), torch.randint(50, (4, 6))
    made = rarefy.compile(net, ids, tune=False)
    assert relative_distance(made(ids), net(ids).detach()) < 0.01


@pytest.mark.parametrize(
    ("dtypes", "says"),
    [
        ((torch.bfloat16, torch.float32), r"a model of one type, but 1.weight is float32 and 0.weight is bfloat16"),
        ((torch.float64, torch.float64), r"in fp32, bf16 or fp16, but 0.weight is float64: call model.float\(\) first"),
    ],
    ids=str,
)
def test_other_types(dtypes, says):
    class Chain(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = layer(x.to(layer.weight.dtype))
            return x

    net = Chain(nn.Linear(8, 8).to(dtypes[0]), nn.Linear(8, 8).to(dtypes[1])).eval()
    with pytest.raises(ModelError, match=says):
        rarefy.compile(net, torch.randn(2, 8))


def test_a_model_that_cannot_be_copied():
    class Open(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("holds an open file")

    with pytest.raises(ModelError, match=r"Open cannot be copied to fp32: call float\(\) first \(holds an open file\)"):
        rarefy.compile(Open(8, 8).bfloat16().eval(), torch.randn(2, 8).bfloat16())


@pytest.mark.parametrize(
    "dtype, precision",
    [(torch.bfloat16, None), slow_case(torch.bfloat16, "fp32"), slow_case(torch.float16, None)],
    ids=str,
)
def test_language_models(dtype, precision):
    from helpers.language_models import V, small

    model = small().to(dtype)
    made, ids = rarefy.decoder(model, precision=precision), torch.randint(3, V, (2, 40))
    with torch.no_grad():
        eager = model(input_ids=ids, use_cache=False).logits
        fp32 = model.float()(input_ids=ids, use_cache=False).logits
    cache = made.cache(2, 40)
    pieces = torch.cat([made(ids[:, :37], cache), *(made(ids[:, i : i + 1], cache) for i in (37, 38, 39))], 1)
    for logits in (made(ids), pieces):
        assert logits.dtype == torch.float32
        assert relative_distance(logits, fp32) < 0.5 * relative_distance(eager, fp32)
    kinds = {k.held[0].kind for k in made.compiled.kernels.values()}
    assert kinds == {"bf16" if dtype == torch.bfloat16 and precision is None else "fp32"}


# ---- attention ------------------------------------------------------------------------------------------------------


def test_where_bf16_is_multiplied(isa):
    """AMX, and AVX-512 but for Intel's: without AMX its bf16 products are slower than those of fp32."""
    vendor = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    expected = {"amx": True, "avx512": "GenuineIntel" not in vendor, "avx2": False, "portable": False}
    assert bindings.multiplies_bf16() == expected[isa]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_type_of_attention(precision, isa):
    """bf16 where that is faster than fp32; else a model in int8 has int8 where there are fast kernels."""
    net = Attends().eval()
    x = torch.randn(2, 70, 32)
    made = rarefy.compile(net, x, precision=precision, tune=False)
    otherwise = "int8" if precision == "int8" and isa in ("avx512", "avx2") else "fp32"
    want = "bf16" if bindings.multiplies_bf16() else otherwise
    assert sum(r.operator == "attention" for r in made.profile(x, repeats=1, warmup=0).rows) == 1
    (call,) = (s for s in made.schedule if hasattr(s, "programs"))
    made(x)
    ((program,),) = call.programs.values()
    assert [DTYPES[a.dtype] for a, _ in program.attentions] == [want]
