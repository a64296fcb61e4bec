"""Checkpoints in layouts that their own library no longer reads, made here with numpy as they were documented."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import rarefy
from conftest import tiny_llama
from helpers.marks import slow_except
from rarefy.checkpoint import legacy_layouts
from rarefy.common.errors import ContainerError, ModelError, RarefyError
from rarefy.model.layers import all_layers, select_layers
from rarefy.model.quant_grid import get_grid

transformers = pytest.importorskip("transformers")


def bitmask(weight):
    mask = (weight != 0).numpy()
    counts = mask.sum(1)
    return {
        "compressed": weight[weight != 0],
        "bitmask": torch.from_numpy(np.packbits(mask, axis=-1, bitorder="little")),
        "row_offsets": torch.from_numpy(np.cumsum(counts) - counts),
        "shape": torch.tensor(weight.shape),
    }


def two_of_four(weight):
    groups = weight.float().abs().reshape(-1, 4)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, 1).indices, True).view(weight.shape)
    return {
        "compressed": weight[mask].view(len(weight), -1),
        "bitmask": torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little")),
        "shape": torch.tensor(weight.shape).reshape(-1, 1),
    }


def pack(codes, bits, axis=1):
    """Whole numbers with a sign as int32 words, 32 / bits in each."""
    many = 32 // bits
    u = np.moveaxis((codes.numpy().astype(np.int64) + (1 << (bits - 1))).astype(np.uint32), axis, -1)
    u = np.pad(u, [(0, 0), (0, -u.shape[-1] % many)])
    words = np.zeros((u.shape[0], u.shape[1] // many), np.uint32)
    for i in range(many):
        words |= u[:, i::many] << np.uint32(bits * i)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32))


def quantized(weight, bits, group, symmetric=True, order=None):
    """(codes, scale, zero or None, what they mean) with a scale for each `group` of inputs; `order`: of each column."""
    rows, columns = weight.shape
    of = np.arange(columns) // group if order is None else order.numpy()
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scale, zero = torch.zeros(rows, columns // group), torch.zeros(rows, columns // group, dtype=torch.int8)
    codes, means = torch.zeros(rows, columns, dtype=torch.int8), torch.zeros_like(weight)
    for g in range(columns // group):
        part = weight[:, of == g].float()
        if symmetric:
            scale[:, g] = part.abs().amax(1) / high
        else:
            scale[:, g] = (part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)) / (high - low)
            zero[:, g] = (low - part.amin(1).clamp(max=0) / scale[:, g]).round().clamp(low, high).to(torch.int8)
        c = (part / scale[:, g, None] + zero[:, g, None]).round().clamp(low + symmetric * (bits == 8), high)
        codes[:, of == g] = c.to(torch.int8)
        means[:, of == g] = (c - zero[:, g, None].float()) * scale[:, g, None]
    return codes, scale, None if symmetric else zero, means


def packed(weight, bits=4, group=16, symmetric=True, order=None):
    codes, scale, zero, means = quantized(weight, bits, group, symmetric, order)
    parts = {"weight_packed": pack(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    if zero is not None:
        parts["weight_zero_point"] = pack(zero, bits, 0)
    if order is not None:
        parts["weight_g_idx"] = order.int()
    return parts, means


def plain8(weight):
    codes, scale, _, means = quantized(weight, 8, weight.shape[1])
    return {"weight": codes, "weight_scale": scale}, means


def stacked(weight):
    parts, means = plain8(weight)
    return {**bitmask(parts["weight"]), "weight_scale": parts["weight_scale"]}, means


def spread_order(columns):
    return torch.arange(columns) % (columns // 16)  # groups whose columns are no neighbours


WAYS = {
    "sparse-bitmask": lambda w: (bitmask(w), w),
    "sparse-24-bitmask": lambda w: (two_of_four(w), w),
    "4 bits": packed,
    "8 bits": lambda w: packed(w, 8),
    "4 bits, asymmetric": lambda w: packed(w, symmetric=False),
    "8 bits, asymmetric": lambda w: packed(w, 8, symmetric=False),
    "4 bits in another order": lambda w: packed(w, order=spread_order(w.shape[1])),
    "4 bits, one group": lambda w: packed(w, group=w.shape[1]),
    "int8": plain8,
    "zeros and int8": stacked,
}
NAMES = {
    "sparse-bitmask": {"sparsity_config": {"format": "sparse-bitmask"}, "quant_method": "compressed-tensors"},
    "sparse-24-bitmask": {"sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}},
}


def folder(path, way, change=lambda parts: None):
    """A checkpoint of a tiny Llama in a layout; return what its weights mean."""
    torch.manual_seed(0)
    model = tiny_llama()
    rarefy.prune_(model, "2:4")
    rarefy.fold_(model)
    tensors, want = {}, {}
    chosen = {f"{l.name}.weight" for l in select_layers(model)}
    for name, tensor in model.state_dict().items():
        want[name] = tensor
        if name not in chosen:
            tensors[name] = tensor.clone()
            continue
        parts, want[name] = WAYS[way](tensor)
        change(parts)
        tensors |= {f"{name.removesuffix('.weight')}.{k}": v.contiguous() for k, v in parts.items()}
    path.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    told = NAMES.get(way, {"quant_method": "compressed-tensors", "format": "pack-quantized"})
    (path / "config.json").write_text(
        json.dumps({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": told})
    )
    return want


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_what_they_mean(way, tmp_path):
    want = folder(tmp_path / "in", way)
    model = rarefy.load(tmp_path / "in")
    got = model.state_dict()
    assert got.keys() == want.keys()
    for name, weight in want.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-6, atol=1e-6)
    if way.startswith("sparse"):
        assert all(torch.equal(got[n], w) for n, w in want.items())
        assert not any(get_grid(l) for l in all_layers(model))
    elif way != "4 bits in another order":
        assert all(get_grid(l) is not None for l in select_layers(model))
    rarefy.save(model, tmp_path / "out")  # codes again, in the smallest format
    again = rarefy.load(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[n], w) for n, w in got.items())
    ids = torch.randint(0, 64, (1, 6))
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize("way", slow_except(["sparse-bitmask", "4 bits", "zeros and int8"], "sparse-bitmask"))
def test_inspect_and_the_shell(way, tmp_path, run):
    folder(tmp_path / "in", way)
    label = {"4 bits": "pack-quantized", "zeros and int8": "sparse-bitmask, int-quantized"}.get(way, way)
    rows = [r for r in rarefy.inspect(tmp_path / "in").rows if r["format"] == label]
    assert len(rows) == len(select_layers(tiny_llama())) and all(r["bytes"] < r["dense_bytes"] for r in rows)
    assert all(r["pattern"] == "2:4" for r in rows)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stages:\n- cast: {dtype: bf16}\n")
    ran = run("compress", tmp_path / "in", "--recipe", recipe, "--out", tmp_path / "out", "-q")
    assert ran.code == 0, ran.err
    assert next(iter(rarefy.load(tmp_path / "out").parameters())).dtype == torch.bfloat16


def test_older_names_of_the_config_and_other_methods(tmp_path):
    want = folder(tmp_path / "in", "sparse-bitmask")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    told = config.pop("quantization_config")
    for key in ("compression_config", "sparsity_config"):
        (tmp_path / "in" / "config.json").write_text(json.dumps({**config, key: told["sparsity_config"]}))
        assert torch.equal(rarefy.load(tmp_path / "in").state_dict()["lm_head.weight"], want["lm_head.weight"])
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    assert not legacy_layouts.is_compressed(tmp_path / "in")


def test_zeros_that_sparseml_left_in_dense_files_are_adopted():
    model = tiny_llama()
    rarefy.prune_(model, sparsity=0.6)
    state = rarefy.fold_(model).state_dict()
    again = tiny_llama()
    again.load_state_dict(state)
    assert len(rarefy.adopt_(again)) == len(select_layers(again))


def put(name, value):
    def change(parts):
        if value is None:
            parts.pop(name)
        else:
            parts[name] = value(parts[name])

    return change


DAMAGE = [
    ("sparse-bitmask", put("bitmask", None), "bitmask: expected uint8 with two dimensions, got none"),
    ("sparse-bitmask", put("bitmask", lambda t: t[:-1]), r"bitmask of shape \[\d+, \d+\] does not fit a weight \[\d+, \d+\]"),
    ("sparse-bitmask", put("bitmask", lambda t: t.int()), "bitmask: expected uint8 with two dimensions, got torch.int32"),
    ("sparse-bitmask", put("compressed", lambda t: t[:-1]), r"expected \d+ values, one per set bit of the bitmask, got \d+"),
    ("sparse-bitmask", put("shape", lambda t: t * 0), r"shape: expected the numbers of rows and columns, got \[0, 0\]"),
    ("sparse-bitmask", put("shape", lambda t: t.double()), "shape: expected the numbers of rows and columns, got"),
    ("sparse-bitmask", put("shape", lambda t: t * 2**33), "shape: expected the numbers of rows and columns, got"),
    ("sparse-bitmask", put("shape", None), "shape: expected the numbers of rows and columns, got"),
    ("sparse-24-bitmask", put("compressed", lambda t: t[:, :-1]), r"expected \d+ values, one per set bit of the bitmask, got \d+"),
    ("4 bits", put("weight_scale", None), "expected a floating-point weight_scale"),
    ("4 bits", put("weight_scale", lambda t: t[:-1]), r"scales of shape \[\d+, \d+\] do not fit a weight"),
    ("4 bits", put("weight_packed", lambda t: t[:, :-1]), "do not fit a weight .* of 4 or 8 bits"),
    ("4 bits", put("weight_packed", lambda t: t.long()), "weight_packed: expected int32 with two dimensions, got torch.int64"),
    ("4 bits", put("weight_shape", lambda t: t + 1), "do not fit a weight"),
    ("4 bits, asymmetric", put("weight_zero_point", lambda t: t[:, :1]), "zero points of"),
    ("4 bits in another order", put("weight_g_idx", lambda t: t + 100), "expected g_idx .* with groups below"),
    ("4 bits in another order", put("weight_g_idx", lambda t: t[:-1]), "expected g_idx"),
    ("int8", put("weight", lambda t: t.float()), "expected a two-dimensional int8 weight"),
]  # fmt: skip


@pytest.mark.parametrize(("way", "change", "says"), DAMAGE)
def test_damage_is_named(way, change, says, tmp_path):
    folder(tmp_path / "in", way, change)
    with pytest.raises(ContainerError, match=rf"in: model.layers.*: .*{says}"):
        rarefy.load(tmp_path / "in")


def test_files_that_are_none(tmp_path):
    folder(tmp_path / "in", "4 bits")
    (tmp_path / "in" / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ContainerError, match="not a valid safetensors file"):
        rarefy.load(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    with pytest.raises(ContainerError, match="no .safetensors in this folder"):
        rarefy.load(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text("[")
    with pytest.raises(ModelError, match="not JSON"):
        rarefy.load(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text("3")
    with pytest.raises(RarefyError, match="expected a JSON object"):
        rarefy.load(tmp_path / "in")
