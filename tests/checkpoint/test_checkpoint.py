"""Models to folders and back, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rarefy
from conftest import Net, Tied, tiny_llama
from rarefy.common.errors import ContainerError, ModelError
from rarefy.formats import container
from rarefy.formats.sparse_encodings import encode
from rarefy.model.activation_quant import activation_quants
from rarefy.model.construction_limit import Stored
from rarefy.runtime import autotune, bindings
from rarefy.runtime.sparse_layers import SparseLinear

needs_kernels = pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing()))


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return set(x) == set(y) and all(
        x[k].dtype == y[k].dtype
        and torch.equal(x[k].contiguous().view(torch.uint8), y[k].contiguous().view(torch.uint8))
        if x[k].dim()
        else torch.equal(x[k], y[k])
        for k in x
    )


@pytest.mark.parametrize(
    "make", [Net, Tied, lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), lambda: nn.Linear(8, 8)]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "row"])
def test_round_trip(tmp_path, make, dtype, pattern):
    model = make()
    rarefy.prune_(model, pattern, sparsity=0.5, layers="*")
    rarefy.cast_(model, dtype)
    rarefy.save(model, tmp_path / "out")  # masked or folded, the same is stored
    rarefy.fold_(model)
    fresh = rarefy.load(tmp_path / "out", make())
    assert same(model, fresh)
    if make is Tied:
        assert fresh.lm_head.weight is fresh.embed.weight


@pytest.mark.parametrize("format", ["dense", "dense+mask", "bitmask", "csr", "csc", "bsr"])
def test_a_format_can_be_asked_for(tmp_path, format):
    model = Net()
    rarefy.prune_(model, sparsity=0.5)
    rarefy.save(model, tmp_path / "out", format=format)
    found = {r["tensor"]: r["format"] for r in rarefy.inspect(tmp_path / "out").rows}
    assert found["hidden.weight"] == format and found["hidden.bias"] == "dense"
    assert same(rarefy.fold_(model), rarefy.load(tmp_path / "out", Net()))


def test_a_hugging_face_model_comes_back_without_its_class(tmp_path):
    pytest.importorskip("transformers")
    model, ids = tiny_llama(), torch.randint(0, 64, (2, 9))
    rarefy.compress_(model, {"stages": [{"prune": {"pattern": "2:4"}}, {"cast": {"dtype": "bf16"}}]})
    rarefy.save(model, tmp_path / "out")
    fresh = rarefy.load(tmp_path / "out")
    assert same(model, fresh) and torch.equal(model(ids).logits, fresh(ids).logits)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight and not fresh.training


@pytest.mark.parametrize(
    ("pattern", "sparsity", "dtype", "most"),
    [
        ("unstructured", 0.5, "fp32", 0.54),
        ("2:4", None, "bf16", 0.57),
        ("unstructured", 0.9, "fp32", 0.14),
        ("1:4", None, "fp32", 0.27),
    ],
)
def test_sizes_on_disk(tmp_path, pattern, sparsity, dtype, most):
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    rarefy.prune_(model, pattern, sparsity=sparsity)
    rarefy.cast_(model, dtype)
    size = rarefy.save(model, tmp_path / "out")
    assert size <= most * 1024 * 1024 * {"fp32": 4, "bf16": 2}[dtype] + 2048  # the index


def test_receipt_and_recipe_travel(tmp_path):
    model = Net()
    receipt = rarefy.compress_(model, {"name": "mine", "stages": [{"prune": {"sparsity": 0.5}}]})
    rarefy.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "receipt.json").read_text()) == receipt.to_dict()
    assert (tmp_path / "out" / "receipt.txt").read_text() == str(receipt)
    fresh = rarefy.load(tmp_path / "out", Net())
    assert fresh.rarefy_receipt.to_dict() == receipt.to_dict() and fresh.rarefy_recipe["name"] == "mine"
    rarefy.save(fresh, tmp_path / "again")
    assert str(fresh.rarefy_receipt) == str(receipt)
    # a damaged receipt is no reason not to load
    (tmp_path / "out" / "receipt.json").write_text("{")
    rarefy.load(tmp_path / "out", Net())


def test_export_is_plain_and_exact(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, ids = tiny_llama(), torch.randint(0, 64, (2, 9))
    rarefy.compress_(model, {"stages": [{"prune": {"sparsity": 0.5}}]})
    rarefy.save(model, tmp_path / "out", files={"vocab.txt": b"x"})
    rarefy.export(tmp_path / "out", tmp_path / "hf")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(plain(ids).logits, model(ids).logits) and (tmp_path / "hf" / "vocab.txt").read_bytes() == b"x"
    rarefy.export(tmp_path / "out", tmp_path / "st", to="safetensors")
    loaded = load_file(tmp_path / "st" / "model.safetensors")
    assert torch.equal(loaded["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(ContainerError, match="choose from .*hf.*safetensors"):
        rarefy.export(tmp_path / "out", tmp_path / "x", to="onnx")
    with pytest.raises(ContainerError, match="exists"):
        rarefy.export(tmp_path / "out", tmp_path / "st", to="safetensors")


def test_inspect_tells_patterns(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    for name, pattern in (("0", "2:4"), ("1", "4x1"), ("2", "1:4")):
        rarefy.prune_(model, pattern, sparsity=0.5 if pattern == "4x1" else None, layers=name)
    rows = {r["tensor"]: r for r in rarefy.inspect(model).rows}
    assert [rows[f"{i}.weight"]["pattern"] for i in range(4)] == ["2:4", "4x1", "1:4", ""]
    rarefy.save(model, tmp_path / "out")
    stored = {r["tensor"]: r for r in rarefy.inspect(tmp_path / "out").rows}
    assert stored["2.weight"]["bytes"] < stored["0.weight"]["bytes"] < stored["3.weight"]["bytes"] == 1024
    with pytest.raises(ContainerError, match="expected a saved folder"):
        rarefy.inspect(tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ContainerError, match="not a valid safetensors file"):
        rarefy.inspect(tmp_path / "bad.safetensors")


def test_an_all_zero_layer_can_be_inspected_and_loaded(tmp_path):
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    rarefy.prune_(model, sparsity=1.0)
    rarefy.save(model, tmp_path / "out")
    assert rarefy.inspect(tmp_path / "out").rows[0]["sparsity"] == 1
    assert not rarefy.load(tmp_path / "out", nn.Sequential(nn.Linear(1024, 1024, bias=False)))[0].weight.any()


class Longer(Net):
    def __init__(self):
        super().__init__()
        self.hiden2 = nn.Linear(8, 8)


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(8, 17)


def test_load_errors(tmp_path):
    rarefy.save(Net(), tmp_path / "net")
    cases = [
        (None, ModelError, r"holds a Net, which is built in Python: rarefy.load\('.*', model=Net\(...\)\)"),
        (Longer(), ContainerError, "lacks tensor 'hiden2.bias' .2 in all. for a Longer; nearest is 'hidden.bias'"),
        (nn.Linear(2, 2), ContainerError, "lacks tensor 'bias'"),
        (Wider(), ContainerError, r"hidden.weight'?.*\[?16, 8.*17, 8"),
    ]
    for model, error, message in cases:
        with pytest.raises(error, match=message):
            rarefy.load(tmp_path / "net", model)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"library": "transformers", "class": "LlamaForCausalLM"}, "not a dict with a model_type"),
        (
            {"library": "transformers", "class": "X", "config": {"model_type": "llama"}, "dtype": "float32"},
            "X is not a class that transformers makes of a llama config",
        ),
        (
            {"library": "transformers", "class": "", "config": {"model_type": "llama"}, "dtype": "float32"},
            r'config.json names no architecture: add "architectures": \[one of .*LlamaForCausalLM',
        ),
        (
            {"library": "transformers", "class": "X", "config": {"model_type": "os.system"}, "dtype": "float32"},
            "does not make a os.system model",
        ),
        (
            {
                "library": "transformers",
                "class": "X",
                "config": {"model_type": "llama", "auto_map": {"AutoModel": "evil.py"}},
                "dtype": "float32",
            },
            "requests custom code",
        ),
        (
            {"library": "transformers", "class": "X", "config": {"model_type": "llama"}, "dtype": "int8"},
            "saved dtype: expected one of .*got 'int8'",
        ),
        ({"library": "os", "class": "system"}, "built in Python.*model=system"),
        ("llama", "built in Python.*model="),
    ],
)
def test_hostile_structures(tmp_path, structure, message):
    pytest.importorskip("transformers")
    container.write(tmp_path / "out", [], meta={"structure": structure})
    with pytest.raises(ModelError, match=message):
        rarefy.load(tmp_path / "out")


@needs_kernels
@pytest.mark.parametrize("tied", [False, True])
def test_load_and_accelerate(tied, tmp_path, monkeypatch):
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "fastest", lambda dense, layers, inputs, clock: {b: ("tiles", 2.0) for b in inputs})
    model = tiny_llama(tie=tied)
    rarefy.prune_(model, sparsity=0.6)
    rarefy.save(model, tmp_path / "m")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        want = rarefy.load(tmp_path / "m")(ids).logits
        for how in (
            True,
            {"batch": (1, 12)},
            {"example": {"input_ids": ids}},
            {"layers": "*.mlp.*"},
            {"layers": "lm_head"},
        ):
            fast = rarefy.load(tmp_path / "m", accelerate=how)
            torch.testing.assert_close(fast(ids).logits, want, rtol=1e-4, atol=1e-4)
            sparse = {n for n, m in fast.named_modules() if isinstance(m, SparseLinear)}
            assert len(sparse) == int(fast.rarefy_accelerated.summary["layers that run sparse"].split()[0])
            assert len(sparse) == (0 if "head" in str(how) else 6 if "mlp" in str(how) else 14)
            assert not any(t.is_meta for t in [*fast.parameters(), *fast.buffers()])
        given = rarefy.load(tmp_path / "m", tiny_llama(tie=tied), accelerate=True)
        torch.testing.assert_close(given.eval()(ids).logits, want, rtol=1e-4, atol=1e-4)
    for wrong, message in [
        (3, "accelerate: expected True, False or a dict"),
        ({"bach": (1,)}, "unknown argument of .*'batch'"),
    ]:
        with pytest.raises(ModelError, match=message):
            rarefy.load(tmp_path / "m", accelerate=wrong)


@needs_kernels
@pytest.mark.slow
def test_peak_memory_of_load_and_accelerate(tmp_path):
    """The dense model is never in memory."""
    code = """
import sys, torch, rarefy
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

if sys.argv[2] == "save":
    config = LlamaConfig(vocab_size=64, hidden_size=768, intermediate_size=3072, num_hidden_layers=8)
    model = LlamaForCausalLM(config)
    rarefy.prune_(model, sparsity=0.95)
    rarefy.save(model, sys.argv[1])
    print(sum(p.numel() * 4 for p in model.parameters()))
else:
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1))
    tiny(torch.zeros(1, 2, dtype=torch.long))
    rarefy.prune_(tiny, sparsity=0.9), rarefy.fold_(tiny), rarefy.accelerate_(tiny, (1,), repeats=1, tuning_cache=False)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = rarefy.load(sys.argv[1], accelerate={"batch": (1, 64), "repeats": 5, "tuning_cache": False})
    print(status("VmHWM") - before, model.rarefy_accelerated.summary["layers that run sparse"].split()[0])
"""
    ran = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "m"), what], capture_output=True, text=True, check=True
        )
        for what in ("save", "load")
    ]
    dense, (peak, sparse) = int(ran[0].stdout), map(int, ran[1].stdout.split())
    # two forms of a layer may be kept, as timing has it: 0.62 to 0.72 were seen
    assert sparse == 56 and peak < 0.8 * dense, peak / dense


@pytest.mark.slow
def test_peak_memory_of_load(tmp_path):
    """Building and filling a model takes less than 1.2 of its bytes."""
    code = """
import sys, torch, rarefy
from pathlib import Path
from torch import nn
torch.set_num_threads(1)
load, save = rarefy.load, rarefy.save  # imported before memory is measured

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

def make():
    return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16)))

if sys.argv[2] == "save":
    model = make()
    rarefy.prune_(model, sparsity=0.5)
    rarefy.save(model, sys.argv[1])
else:
    nn.Linear(8, 8)(torch.ones(8))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    model = rarefy.load(sys.argv[1], make())
    size = sum(p.numel() * 4 for p in model.parameters())
    print((status("VmHWM") - before) / size)
"""
    ran = ""
    for what in ("save", "load"):
        ran = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "m"), what], capture_output=True, text=True, check=True
        ).stdout
    assert 0.9 < float(ran) < 1.2


class Pair(nn.Module):
    def __init__(self, tied: bool):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        if tied:
            self.b.weight = self.a.weight


def test_ties_that_differ_from_the_file(tmp_path):
    rarefy.save(Pair(False), tmp_path / "apart")
    with pytest.raises(
        ContainerError, match=r"b.weight is tied to a.weight in this Pair, but stored as another tensor"
    ):
        rarefy.load(tmp_path / "apart", Pair(True))
    rarefy.save(Pair(True), tmp_path / "tied")
    fresh = rarefy.load(tmp_path / "tied", Pair(False))
    assert torch.equal(fresh.a.weight, fresh.b.weight) and fresh.a.weight.data_ptr() != fresh.b.weight.data_ptr()
    assert rarefy.load(tmp_path / "tied", Pair(True)).b.weight.requires_grad


def test_a_load_that_fails_changes_nothing(tmp_path):
    rarefy.save(Net(), tmp_path / "net")
    model = Wider()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ContainerError):
        rarefy.load(tmp_path / "net", model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_a_skeleton_is_filled(tmp_path):
    model = Tied()
    rarefy.save(model, tmp_path / "out")
    with torch.device("meta"):
        skeleton = Tied()
    fresh = rarefy.load(tmp_path / "out", skeleton)
    assert same(model, fresh) and fresh.lm_head.weight is fresh.embed.weight


def test_wrong_kinds_are_refused(tmp_path):
    container.write(tmp_path / "ints", [("weight", encode(torch.ones(2, 2, dtype=torch.int64), "dense"))])
    with pytest.raises(ContainerError, match="weight is int64 in the folder"):
        rarefy.load(tmp_path / "ints", nn.Linear(2, 2, bias=False))
    with pytest.raises(rarefy.RarefyError, match="unknown format 'bitmsk'.*did you mean 'bitmask'"):
        rarefy.save(Net(), tmp_path / "x", format="bitmsk")
    rarefy.save(Net(), tmp_path / "net")
    with pytest.raises(ContainerError, match="is the folder to export from"):
        rarefy.export(tmp_path / "net", tmp_path / "net", to="safetensors", overwrite=True)
    with pytest.raises(ModelError, match="holds a Net"):
        rarefy.export(tmp_path / "net", tmp_path / "y")


def test_a_stale_receipt_does_not_travel(tmp_path):
    model = Net()
    rarefy.compress_(model, {"stages": [{"prune": {"sparsity": 0.3}}]})
    rarefy.prune_(model, sparsity=0.9)
    rarefy.save(model, tmp_path / "out")
    assert not (tmp_path / "out" / "receipt.json").exists()


@pytest.mark.parametrize(
    "receipt",
    ['{"sparsity": "y", "name": "n"}', '{"name": "n", "sparsity": {"layers": [{"layer": "0"}]}}', "[" * 100000],
)
def test_a_hostile_receipt_is_left_aside(tmp_path, receipt):
    rarefy.save(Net(), tmp_path / "out")
    (tmp_path / "out" / "receipt.json").write_text(receipt)
    rarefy.save(rarefy.load(tmp_path / "out", Net()), tmp_path / "again")
    assert not (tmp_path / "again" / "receipt.json").exists()


def test_a_folder_with_lost_weights_or_a_pickle_is_refused(tmp_path):
    pytest.importorskip("transformers")
    from safetensors.torch import save_file

    from rarefy.model import hf

    tiny_llama().save_pretrained(tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if ".layers.1." not in k},
        tmp_path / "m" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match="weights are missing or of another shape, such as model.layers.1"):
        hf.load_folder(tmp_path / "m")
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="does not load"):
        hf.load_folder(tmp_path / "m")


def test_a_config_that_asks_for_foreign_code(tmp_path):
    pytest.importorskip("transformers")
    from rarefy.model import hf

    model = tiny_llama()
    structure = hf.structure(model)
    structure["config"]["attn_implementation"] = structure["config"]["_attn_implementation"] = "evil/kernel"
    assert type(hf.build(structure, Stored(100, 1 << 20))).__name__ == "LlamaForCausalLM"  # the word is not heard
    model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(
        json.dumps({**config, "attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"})
    )
    with pytest.raises(ModelError, match="custom|not usable"):
        hf.load_folder(tmp_path / "m")


def test_a_folder_that_does_not_fit_leaves_the_model_unchanged(tmp_path):
    def net(out=4):
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, out))

    made = net()
    rarefy.factorize_(made, keep=0.5, layers="0")
    rarefy.quantize_(made, "int8", activations="int8", layers="2")
    rarefy.save(rarefy.fold_(made), tmp_path / "out")
    other, x = net(5), torch.randn(2, 64)
    want = other(x)
    with pytest.raises(ContainerError, match=r"2.weight is \[4, 64\] in the folder, and \[5, 64\] in the model"):
        rarefy.load(tmp_path / "out", other)
    assert type(other[0]) is nn.Linear and torch.equal(other(x), want) and not activation_quants(other)
