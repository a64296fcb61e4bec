"""Codebooks against brute force; training, compressed folders, and the checks of files."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import lzma

import pytest
import torch
from torch import nn

import rarefy
from conftest import Net, Tied
from helpers.folders import edit_compressed_index
from rarefy.common.errors import ContainerError, DataError, ModelError, PatternError, RecipeError
from rarefy.formats import container
from rarefy.formats.sparse_encodings import encode
from rarefy.model.layers import all_layers
from rarefy.model.quant_grid import Codebook, get_grid
from rarefy.quantization.codebook import best_values, codebook
from rarefy.recipe import parser as recipes


def mlp():
    return nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16))


def batches(n=4):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(64, 32, generator=rng) * torch.logspace(0, -2, 32) for _ in range(n)]


def cost(x, w, values):
    return float((w * (x[:, None] - values).abs().amin(1).square()).sum())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [2, 3, 4])
def test_values_are_optimal(seed, count):
    """Try every way to split seven sorted weights into runs, each of which may become the zeros."""
    rng = torch.Generator().manual_seed(seed)
    x = (torch.randn(7, generator=rng) + (seed % 3 - 1)).sort().values
    w = torch.rand(7, generator=rng) + 0.1
    least = float("inf")
    for inner in itertools.combinations_with_replacement(range(8), count - 1):
        ends = [0, *inner, 7]
        for zero in range(count):
            runs = [(a, b) for i, (a, b) in enumerate(itertools.pairwise(ends)) if i != zero and a < b]
            means = [float((w * x)[a:b].sum() / w[a:b].sum()) for a, b in runs]
            least = min(least, cost(x, w, torch.tensor([0.0, *means])))
    values = best_values(x, w, count)
    assert len(values) <= count and 0.0 in values.tolist()
    assert cost(x, w, values) <= least + 1e-6


def test_large_weights_reach_the_lloyd_max_error():
    """The best 16 values of a Gaussian leave 0.009497 of its variance (Max 1960); one of ours must be zero."""
    torch.manual_seed(0)
    x = torch.randn(400, 500)
    book = codebook(x, (1, 1), 4)
    assert float((book.snap(x) - x).square().mean()) < 1.02 * 0.009497
    assert book.table[0, 0, 0] == 0 and len(book.table[0, 0].unique()) == 16


def test_errors_are_weighted_by_inputs():
    torch.manual_seed(0)
    x, w = torch.randn(20, 60), torch.rand(1, 60) ** 8 + 1e-6
    even, weighed = codebook(x, (1, 1), 3), codebook(x, (1, 1), 3, w)
    off = [float((w * (b.snap(x) - x).square()).sum()) for b in (even, weighed)]
    assert off[1] < 0.95 * off[0]


@pytest.mark.parametrize(("bits", "group"), [(2, "tensor"), (4, "tensor"), (8, "tensor"), (2, None), (4, None)])
def test_zeros_stay_and_values_are_few(bits, group, tmp_path):
    net = mlp()
    rarefy.prune_(net, sparsity=0.6)
    masks = rarefy.masks(net)
    report = rarefy.share_(net, bits, group=group)
    for layer, row in zip(all_layers(net), report.rows):
        W = layer.weight.detach()
        assert bool((W[~masks[layer.name]] == 0).all())
        rows = W[None] if group == "tensor" else W
        assert all(len(r.unique()) <= 1 << bits for r in rows)
        assert row["values"] == 1 << bits and row["bytes"] < row["dense bytes"]
    rarefy.save(net, tmp_path / "out")
    again = rarefy.load(tmp_path / "out", mlp())
    for a, b in zip(all_layers(net), all_layers(again)):
        assert torch.equal(a.weight, b.weight) and isinstance(get_grid(b), Codebook)
    formats = {r["format"] for r in rarefy.inspect(tmp_path / "out").rows if "x" in r["shape"]}
    assert all(f.startswith(f"codebook{bits}:") for f in formats)
    assert rarefy.save(again, tmp_path / "again") == rarefy.save(rarefy.fold_(net), tmp_path / "folded")


def test_training_changes_the_table_and_not_the_codes():
    torch.manual_seed(0)
    net, goal, data = mlp(), nn.Linear(32, 16), batches()
    rarefy.prune_(net, "2:4")
    rarefy.share_(net, 3)
    places = [l.weight.detach().unique(return_inverse=True)[1] for l in all_layers(net)]
    masks = rarefy.masks(net)

    def off():
        with torch.no_grad():
            return float(sum((net(x) - goal(x)).square().sum() for x in data))

    before = off()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(30):
        for x in data:
            optimizer.zero_grad()
            (net(x) - goal(x).detach()).square().mean().backward()
            optimizer.step()
    assert off() < 0.6 * before
    for layer, was in zip(all_layers(net), places):
        W = layer.weight.detach()
        assert bool((W[~masks[layer.name]] == 0).all()) and len(W.unique()) <= 8
        for place in range(int(was.max()) + 1):
            assert len(W[was == place].unique()) == 1
        assert get_grid(layer).contains(W)


def test_every_layer_type_and_tied_weights(tmp_path):
    net = Net()
    rarefy.share_(net, 2, layers=["conv", "up", "hidden", "fc", "deep"], data=[torch.randn(4, 3, 8, 8)])
    rarefy.save(net, tmp_path / "net")
    again = rarefy.load(tmp_path / "net", Net())
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(all_layers(net), all_layers(again)))
    tied = Tied()
    rarefy.share_(tied, 4, layers=["embed", "body"])
    tied(torch.tensor([[1, 2]])).sum().backward()
    rarefy.save(tied, tmp_path / "tied")
    back = rarefy.load(tmp_path / "tied", Tied())
    assert back.embed.weight is back.lm_head.weight and torch.equal(back.embed.weight, tied.embed.weight)


def test_few_distinct_weights_are_exact():
    net = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([-0.5, 0.0, 0.25, 1.0]).repeat(16).reshape(8, 8))
    before = net[0].weight.detach().clone()
    rarefy.share_(net, 2)
    assert torch.equal(net[0].weight, before)
    blank = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        blank[0].weight.zero_()
    rarefy.share_(blank, 4)
    assert bool((blank[0].weight == 0).all())


# through LZMA


def test_a_compressed_folder_loads_bit_for_bit(tmp_path):
    net = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256))
    rarefy.prune_(net, sparsity=0.9, layers="0")
    rarefy.share_(net, 4, layers="0")
    plain = rarefy.save(net, tmp_path / "plain")
    small = rarefy.save(net, tmp_path / "small", compress=True)
    files = sorted(p.name for p in (tmp_path / "small").iterdir())
    assert files == ["rarefy-index.json.xz", "rarefy.json", "weights-00001.safetensors.xz"]
    assert small == sum((tmp_path / "small" / f).stat().st_size for f in files) < 0.7 * plain
    again = rarefy.load(tmp_path / "small", nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256)))
    want = rarefy.fold_(copy.deepcopy(net)).state_dict()
    assert all(torch.equal(v, want[k]) for k, v in again.state_dict().items())
    assert rarefy.inspect(tmp_path / "small").summary["bytes"] == rarefy.inspect(tmp_path / "plain").summary["bytes"]
    rarefy.save(net, tmp_path / "small", compress=False, overwrite=True)
    assert (tmp_path / "small/weights-00001.safetensors").is_file()


def compressed(folder):
    container.write(folder, [("w", encode(torch.eye(64), "bitmask"))], compress=True)
    return folder


def set_raw(index, value):
    index["shards"]["weights-00001.safetensors.xz"]["raw"] = value


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i: set_raw(i, 10), "does not hold the 10 bytes"),
        (lambda i: set_raw(i, 1 << 50), "decompresses to 1125899906842624 bytes, at most"),
        (lambda i: set_raw(i, -1), "decompresses to -1 bytes"),
        (lambda i: set_raw(i, "9"), "raw is '9', must be int"),
        (lambda i: i["shards"]["weights-00001.safetensors.xz"].pop("raw"), "must be an object with sha256, bytes, raw"),
    ],
)
def test_damaged_compressed_shards_are_refused(tmp_path, change, says):
    folder = compressed(tmp_path / "out")
    edit_compressed_index(folder, change)
    with pytest.raises(ContainerError, match=says):
        container.read(folder)


def test_a_decompression_bomb_is_refused(tmp_path):
    """A megabyte of LZMA expands to gigabytes, and the index says that of a tensor of sixteen bytes."""
    folder = tmp_path / "out"
    container.write(folder, [("w", encode(torch.eye(2), "dense"))], compress=True)
    shard = folder / "weights-00001.safetensors.xz"
    shard.write_bytes(lzma.compress(bytes(1 << 26)))

    def lie(index):
        about = index["shards"][shard.name]
        about |= {
            "raw": 1 << 26,
            "bytes": shard.stat().st_size,
            "sha256": hashlib.sha256(shard.read_bytes()).hexdigest(),
        }

    edit_compressed_index(folder, lie)
    with pytest.raises(ContainerError, match="decompresses to 67108864 bytes, at most"):
        container.read(folder)


def test_damage_to_a_compressed_folder_is_named(tmp_path):
    folder = compressed(tmp_path / "a")
    shard = folder / "weights-00001.safetensors.xz"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ContainerError, match="its sha256 is not the one in the index"):
        container.read(folder)
    with pytest.raises(ContainerError, match="damaged LZMA data|does not hold"):
        container.read(folder, verify=False)
    folder = compressed(tmp_path / "b")
    (folder / "rarefy-index.json.xz").unlink()
    with pytest.raises(ContainerError, match="rarefy-index.json.xz: missing"):
        container.read(folder)
    folder = compressed(tmp_path / "c")
    outer = json.loads((folder / "rarefy.json").read_text())
    outer["index"]["file"] = "../rarefy-index.json.xz"
    (folder / "rarefy.json").write_text(json.dumps(outer))
    with pytest.raises(ContainerError, match="must be rarefy-index.json.xz"):
        container.read(folder)
    outer["index"] = {"file": 3}
    (folder / "rarefy.json").write_text(json.dumps(outer))
    with pytest.raises(ContainerError, match="must be an object with file, sha256, bytes, raw"):
        container.read(folder)


def test_side_files_cannot_replace_the_index(tmp_path):
    with pytest.raises(ContainerError, match="not one of Rarefy's own"):
        container.write(tmp_path / "out", [], files={"rarefy-index.json.xz": b""})


# recipes, and what cannot be


def test_deep_compression_in_a_recipe(tmp_path):
    plan = recipes.from_yaml(
        "stages:\n- prune: {sparsity: 0.8}\n- share: {bits: 4}\n- train: {epochs: 1}\nsave: {compress: true}"
    )
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    data = [(x, torch.randint(0, 10, (64,))) for x in batches()]
    receipt = rarefy.compress_(net, plan, data)
    assert [s["title"] for s in receipt.stages] == ["shared", "trained"]
    assert {r["format"].split(":")[0] for r in receipt.sparsity["layers"]} == {"codebook4"}
    assert receipt.sparsity["achieved"] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"bits": 9}, PatternError, "bits: expected a whole number between 2 and 8, got 9"),
        ({"bits": True}, PatternError, "bits: expected a whole number"),
        ({"bits": "4"}, PatternError, "got '4'"),
        ({"group": 32}, PatternError, "group: expected 'tensor', got 32"),
        ({"data": "wiki"}, DataError, "data: expected an iterable of batches"),
        ({"data": []}, DataError, "empty"),
        ({"layers": "9"}, rarefy.RarefyError, "'9' matches no layer"),
    ],
)
def test_messages_for_wrong_arguments(options, error, says):
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=says):
        rarefy.share_(net, **options)
    assert list(net.state_dict()) == list(before)


def test_embeddings_with_data_and_quantized_layers_are_refused():
    with pytest.raises(DataError, match="an embedding has no input statistics: ignore embed"):
        rarefy.share_(Tied(), layers="embed", data=[torch.tensor([[1, 2]])])
    net = mlp()
    rarefy.quantize_(net, "int8")
    with pytest.raises(ModelError, match="0 is already quantized"):
        rarefy.share_(net)
    other = mlp()
    rarefy.share_(other)
    with pytest.raises(ModelError, match="0 is already quantized"):
        rarefy.quantize_(other, "int8")


def test_tables_larger_than_their_savings_are_refused():
    net = mlp()
    with pytest.raises(ModelError, match="0: 6,144 shared values need more memory than they save on 768 weights"):
        rarefy.share_(net, 8, group=None)
    assert get_grid(all_layers(net)[0]) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- share:\n    bits: 12", r"r.yaml line 3: .*bits: expected a whole number between 2 and 8, got 12"),
        ("- share:\n    group: row", r"r.yaml line 3: .*group: expected 'tensor'"),
        ("- share: {}\n- cut: {keep: 0.5}", "a cut must come before share"),
    ],
)
def test_recipe_errors_name_the_line(text, says):
    with pytest.raises(RecipeError, match=says):
        recipes.from_yaml(f"stages:\n{text}", "r.yaml")


def test_a_dry_run_predicts_tables_and_factors():
    from rarefy.pipeline.dry_run import forecast

    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    for text, dense in (("- share: {bits: 4, layers: '0'}", False), ("- factorize: {keep: 0.5, layers: '0'}", True)):
        plan = recipes.from_yaml(f"stages:\n{text}\nsave: {{format: dense}}")
        one = copy.deepcopy(net)
        expected = forecast(one, plan)
        receipt = rarefy.compress_(one, plan)
        got, want = receipt.disk["after"], expected.summary["bytes expected"]
        assert got == want if not dense else got <= want <= got + 64 * 4 * 2
        assert "weights left" in expected.rows[0] if dense else expected.rows[0]["grid"] == "16 values"


def linear(width=64, out=64):
    return nn.Sequential(nn.Linear(width, out))


def test_loaded_weights_are_contiguous(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=4))
    rarefy.share_(model, 3, group=None)
    rarefy.save(rarefy.fold_(model), tmp_path / "out")
    rarefy.export(tmp_path / "out", tmp_path / "plain", to="safetensors")
    assert all(p.is_contiguous() for p in rarefy.load(tmp_path / "out").parameters())


def test_only_the_table_is_trainable():
    net = linear()
    rarefy.share_(net, 3)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"0.bias", "0.parametrizations.weight.0.table"}
    net(torch.randn(2, 64)).sum().backward()
    rarefy.fold_(net)
    assert net[0].weight.requires_grad
