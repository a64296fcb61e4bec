"""What a hostile reader of the wing of values found."""

from __future__ import annotations

import copy
import hashlib
import lzma
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from conftest import tiny_llama
from helpers.folders import edit_compressed_index
from rarefy.common.errors import ContainerError, ModelError
from rarefy.formats import container
from rarefy.formats.quantized_encodings import check
from rarefy.formats.quantized_encodings import encode as encode_values
from rarefy.formats.sparse_encodings import encode
from rarefy.model.activation_quant import ActivationQuant, activation_quants, get_activation_quant
from rarefy.model.layers import all_layers
from rarefy.model.quant_grid import Grid, get_grid, record_grid_
from rarefy.runtime import autotune, bindings, candidates
from rarefy.runtime.packing import pack_panels
from rarefy.runtime.sparse_layers import PanelEmbedding


def linear(width=64, out=64):
    return nn.Sequential(nn.Linear(width, out))


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.emb = nn.Linear(32, 1000, bias=False), nn.Embedding(1000, 32)
        self.emb.weight = self.head.weight

    def forward(self, ids):
        return self.head(self.emb(ids))


def test_numbers_of_rows_are_not_rounded(tmp_path):
    net = HeadFirst()
    rarefy.quantize_(net, "int8", activations="int8", layers="head")
    ids = torch.tensor([[1, 500, 999]])
    assert torch.equal(net.emb(ids)[0], net.emb.weight[ids[0]]) and set(activation_quants(net)) == {"head"}
    rarefy.save(rarefy.fold_(net), tmp_path / "out")
    assert activation_quants(rarefy.load(tmp_path / "out", HeadFirst())) == activation_quants(net)


@pytest.mark.parametrize("do", [lambda m: rarefy.share_(m, 3), lambda m: rarefy.quantize_(m, "int8")])
def test_solvers_do_not_move_weights_off_their_grid(do):
    net = linear()
    do(net)
    before = net[0].weight.detach().clone()
    with pytest.raises(ModelError, match="0 lies on a grid, which the weights that solver obs moves would leave"):
        rarefy.prune_(net, sparsity=0.7, solver="obs", data=[torch.randn(32, 64)])
    assert torch.equal(net[0].weight, before)


def test_a_group_of_all_inputs():
    net = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8))
    rarefy.quantize_(net, "int4", group=64, solver="obs", data=[torch.randn(32, 128)])
    rarefy.quantize_(linear(), "int4", group=64, symmetric=False, solver="obs", data=[torch.randn(32, 64)])
    assert get_grid(all_layers(net)[1]).scale.shape == (8, 1)


def test_a_bomb_that_says_so_itself_is_not_unpacked(tmp_path):
    folder = tmp_path / "out"
    container.write(folder, [("w", encode(torch.eye(2), "dense"))], compress=True)
    shard, raw = folder / "weights-00001.safetensors.xz", 1 << 26
    shard.write_bytes(lzma.compress(bytes(raw)))

    def vouch_for_the_shard(index):
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        index["shards"][shard.name] = {"raw": raw, "bytes": shard.stat().st_size, "sha256": digest}
        index["tensors"]["w"]["shape"] = [1 << 40]

    edit_compressed_index(folder, vouch_for_the_shard)
    with pytest.raises(ContainerError, match="would become 67108864 bytes, at most"):
        container.read(folder)


def test_what_is_nearly_nothing_is_stored_as_it_is(tmp_path):
    container.write(tmp_path / "out", [("w", encode(torch.zeros(4 << 20), "dense"))], compress=True)
    assert (tmp_path / "out/weights-00001.safetensors").is_file()
    assert not container.read(tmp_path / "out").tensor("w", (4 << 20,)).any()


@pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing()))
def test_a_dense_form_rounds_inputs_too(monkeypatch):
    net = linear(128, 128)
    rarefy.prune_(net, sparsity=0.7)
    rarefy.quantize_(net, "int8", activations="int8")
    rarefy.fold_(net)
    fast = copy.deepcopy(net)
    monkeypatch.setattr(autotune, "fastest", lambda d, l, inputs, c: {n: ("bitmask", 2.0) for n in inputs})
    rarefy.accelerate_(fast, (1,), tuning_cache=False)
    x = torch.randn(128, 128)
    layer: Any = fast[0]
    assert [a for a, _ in layer.formats] == [1, 33]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))
    torch.testing.assert_close(fast(x.clone().requires_grad_()), net(x))


@pytest.mark.parametrize("activations", ["int8", "int8-static"])
def test_attention_reads_the_weight_of_its_last_layer_itself(activations):
    net, x = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)), torch.randn(2, 5, 32)
    report = rarefy.quantize_(net, "int8", activations=activations, data=[x] if "static" in activations else None)
    assert "0.self_attn.out_proj" in report.notes[0] and get_activation_quant(net[0].self_attn.out_proj) is None


class Behind(nn.Module):
    def __init__(self):
        super().__init__()
        self.n, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.a(input=self.n(x))


def test_a_refused_call_does_not_smooth():
    net = Behind()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="does not reach b"):
        rarefy.quantize_(net, "int8", activations="int8-static", smooth=0.5, data=[torch.randn(8, 16)])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    rarefy.quantize_(net, "int8", activations="int8", smooth=0.5, layers="a", data=[torch.randn(8, 16)])
    assert not torch.equal(net.n.weight, before["n.weight"])


def test_smoothing_leaves_a_grid_alone():
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    rarefy.quantize_(net, "int4", layers="0")
    rarefy.fold_(net)
    rarefy.quantize_(net, "int8", activations="int8", smooth=0.5, layers="2", data=[torch.randn(8, 16)])
    assert get_grid(all_layers(net)[0]) is not None


def test_a_folder_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
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


def test_what_stands_beside_a_layer_leaves_its_outputs_alone():
    dense, net = linear(), None
    net = copy.deepcopy(dense)
    rarefy.quantize_(net, "int2")
    rarefy.factorize_(net, rank=4, of=dense)
    x, seen = torch.randn(2, 64), []
    net[0].base.register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        y = net(x)
        assert not torch.equal(seen[0], y)
        with torch.autocast("cpu", torch.bfloat16):
            net(x)


def test_factors_keep_hooks_and_what_is_frozen():
    net = linear()
    net[0].register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    with pytest.raises(ModelError, match="its hooks would be lost"):
        rarefy.factorize_(net, keep=0.5)
    frozen = linear().requires_grad_(False)
    rarefy.factorize_(frozen, keep=0.5)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_an_embedding_of_panels_moves_with_its_model():
    net = nn.Sequential(nn.Linear(64, 6, bias=False))
    rarefy.quantize_(net, "int4")
    rarefy.fold_(net)
    made = PanelEmbedding(pack_panels(net[0].weight.detach(), get_grid(all_layers(net)[0])), torch.float32)
    assert torch.equal(made(torch.tensor([5, 0])), net[0].weight[[5, 0]])
    for wrong in (-1, 6):
        with pytest.raises(IndexError, match="an embedding of 6 rows has no row"):
            made(torch.tensor([wrong]))
    half = made.bfloat16()
    assert half(torch.tensor([1])).dtype == torch.bfloat16 and half.whole.dtype == torch.float32


def test_encoders_and_blocks_that_share_export_or_say_why(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = BertModel(config)
    rarefy.quantize_(model, "int8")
    rarefy.save(model, tmp_path / "bert")
    rarefy.export(tmp_path / "bert", tmp_path / "theirs", to="compressed-tensors")
    assert (tmp_path / "theirs/model.safetensors").is_file()
    tied = tiny_llama()
    rarefy.tie_layers_(tied, 2)
    rarefy.save(tied, tmp_path / "tied")
    for to in ("hf", "compressed-tensors"):
        with pytest.raises(ContainerError, match="blocks share their weights, which LlamaForCausalLM knows nothing of"):
            rarefy.export(tmp_path / "tied", tmp_path / to, to=to)


def test_half_models_are_cast_before_onnx(tmp_path):
    net = linear().half()
    rarefy.quantize_(net, "int8")
    with pytest.raises(ModelError, match="is float16: cast to fp32 first"):
        rarefy.export_onnx(net, torch.randn(2, 64).half(), tmp_path / "net.onnx")


def test_rounding_at_the_ends_of_numbers():
    assert ActivationQuant()(torch.tensor([[1e-37, 0.0]])).tolist() == [[0.0, 0.0]]
    grid, x = ActivationQuant(8, 0.1, 128), torch.tensor([1e8, 300.0])
    assert torch.equal(grid(x), grid(x.clone().requires_grad_()).detach())
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    rarefy.quantize_(conv, "int8", activations="int8")
    image = torch.randn(3, 8, 8) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    torch.testing.assert_close(conv(image), conv(image[None])[0])


def test_ties_within_blocks_and_calls_in_turn(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    net = nn.Module()
    net.layers = nn.ModuleList(Block() for _ in range(4))
    rarefy.tie_layers_(net, 2)
    first, second = net.layers[0], net.layers[1]
    assert first.a.weight is first.b.weight is second.a.weight is second.b.weight
    with pytest.raises(ModelError, match="blocks of layers share weights already"):
        rarefy.tie_layers_(net, 4)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    rarefy.fold_(rarefy.quantize_(encoder, "int8") and encoder)
    with pytest.raises(ModelError, match="is pruned, quantized or factorized already: tie first"):
        rarefy.tie_layers_(encoder)


def test_shared_values_come_back_in_one_piece(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=4))
    rarefy.share_(model, 3, group=None)
    rarefy.save(rarefy.fold_(model), tmp_path / "out")
    rarefy.export(tmp_path / "out", tmp_path / "plain", to="safetensors")
    assert all(p.is_contiguous() for p in rarefy.load(tmp_path / "out").parameters())


def test_grids_that_are_sound_but_strange(tmp_path):
    net, grid = linear(64, 8), Grid(4, torch.full((4, 1), 0.1))
    net[0].weight.data = grid.snap(net[0].weight.data)
    record_grid_(net[0], "weight", grid)
    rarefy.save(net, tmp_path / "out")
    again = rarefy.load(tmp_path / "out", linear(64, 8))
    rarefy.accelerate_(again, (1,), tuning_cache=False)
    assert candidates.why_not_quantized(net[0].weight, grid) == "no kernel for scales of 2 outputs"
    with pytest.raises(ValueError, match="no kernel for scales of 2 outputs"):
        pack_panels(net[0].weight.detach(), grid)
    p = encode_values(torch.ones(1, 4), Grid(8, torch.ones(1, 1)), "dense")
    for part, tensor, says in (
        ("values", torch.full((4,), 128, dtype=torch.uint8), "holds -128"),
        ("scale", torch.zeros(1, 1), "must be above zero"),
    ):
        with pytest.raises(ValueError, match=says):
            check(type(p)(p.format, p.shape, p.dtype, p.parts | {part: tensor}, p.extra))


def test_zeros_of_rounding_are_not_taken_for_a_mask():
    net = linear()
    rarefy.quantize_(net, "int4")
    rarefy.fold_(net)
    rarefy.adopt_(net)
    assert rarefy.masks(net) == {} and get_grid(all_layers(net)[0]) is not None
    pruned = linear()
    rarefy.prune_(pruned, "2:4")
    rarefy.quantize_(pruned, "int8")
    rarefy.fold_(pruned)
    rarefy.adopt_(pruned)
    assert list(rarefy.masks(pruned)) == ["0"]


def test_weights_beyond_their_numbers():
    wide = nn.Sequential(nn.Linear(4, 1, bias=False))
    wide[0].weight.data = torch.tensor([[3e38, -3e38, 1, 2]])
    half = nn.Sequential(nn.Linear(4, 1, bias=False)).half()
    half[0].weight.data = torch.tensor([[-65504, 1, 1, 2.0]]).half()
    for net, options in ((wide, {"symmetric": False}), (half, {"group": 4})):
        before = net[0].weight.detach().clone()
        with pytest.raises(ModelError, match="0 has weights of .*: their grid overflows"):
            rarefy.quantize_(net, "int4", **options)
        assert torch.equal(net[0].weight, before)
    with pytest.raises(ModelError, match=r"0 has no weights \(\[8, 0\]\): ignore it"):
        empty = linear(1, 8)
        empty[0].weight = nn.Parameter(torch.empty(8, 0))
        rarefy.quantize_(empty, "int4")
    with pytest.raises(ValueError, match="unknown weights"):
        rarefy.quantize_(linear(), ["int8"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown fit 0"):
        rarefy.quantize_(linear(), fit=0)  # type: ignore[arg-type]


def test_a_weight_beneath_a_codebook_waits_for_no_gradient():
    net = linear()
    rarefy.share_(net, 3)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"0.bias", "0.parametrizations.weight.0.table"}
    net(torch.randn(2, 64)).sum().backward()
    rarefy.fold_(net)
    assert net[0].weight.requires_grad
