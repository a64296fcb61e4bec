"""Whole models through `rarefy.compile`: the same numbers as eager, in whatever sizes, by several threads."""

import copy
import gc
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy
import zoo
from conftest import tiny_llama
from helpers.compile_models import Attends, Gated, Residual, pruned
from helpers.marks import slow_except
from rarefy.common.errors import DataError, ModelError
from rarefy.compiler import compile, kernel_selection, ops, verify
from rarefy.compiler.subgraph import MAX_SHAPES, FusedSubgraph, SingleOp
from rarefy.data import builtin
from rarefy.model import hf
from rarefy.model.compare import relative_distance
from rarefy.runtime import autotune, bindings, packing, reference


def native_ops(made):
    return [n.target for s in made.schedule if isinstance(s, FusedSubgraph) for n in s.nodes]


@pytest.mark.parametrize("size", slow_except([(2, 16), (1, 5), (3, 37), (2, 64), (1, 200), (5, 1)], (3, 37)), ids=str)
@pytest.mark.parametrize(
    "how", [{}, {"causal": True}, {"kv_heads": 2}, {"width": 5, "scale": 0.3}, {"heads": 1, "kv_heads": 1}], ids=str
)
def test_attention(how, size, isa):
    torch.manual_seed(0)
    net = pruned(Attends(**how), 0.5)
    x = torch.randn(*size, net.heads * net.width)
    made = rarefy.compile(net, torch.randn(2, 8, net.heads * net.width))
    assert native_ops(made).count(ops.attention) == 1 and len(made.schedule) - len(made.fixed_nodes) == 1
    torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["keys", "queries", "heads", "one for all", "added", "causal too"])
def test_masks(kind, isa):
    torch.manual_seed(1)
    net, B, S = pruned(Attends(), 0.5), 3, 70
    mask = torch.rand(B, 4 if kind == "heads" else 1, 1 if kind == "keys" else S, S) < 0.7
    mask[..., 0] = True
    if kind == "keys":
        mask = mask.expand(B, 1, S, S)
    if kind == "one for all":
        mask = mask[:1, 0]
    if kind == "added":
        mask = torch.randn(B, 1, S, S)
    if kind == "causal too":
        mask = mask & torch.ones(S, S, dtype=torch.bool).tril()
    x = torch.randn(B, S, 32)
    made = rarefy.compile(net, (x, mask))
    assert native_ops(made).count(ops.attention) == 1
    torch.testing.assert_close(made(x, mask), net(x, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [(1,), (64,), (65,), (2, 3), (2, 3, 30)], ids=str)
def test_gates_and_norms(rows, isa):
    torch.manual_seed(2)
    net, x = pruned(Gated()), torch.randn(*rows, 24)
    made = rarefy.compile(net, x)
    assert set(native_ops(made)) == {ops.linear, ops.norm, ops.mul}
    torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()])
def test_activations_go_into_products(act, isa):
    net = pruned(nn.Sequential(nn.Linear(30, 140), act, nn.Linear(140, 7)))
    made = rarefy.compile(net, torch.randn(3, 30))
    assert native_ops(made) == [ops.linear, ops.linear]
    x = torch.randn(90, 30)
    torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", slow_except([(2, 16), (1, 5), (3, 37), (2, 64), (1, 300), (5, 1)], (3, 37)), ids=str)
@pytest.mark.parametrize(
    "how", [{}, {"causal": True}, {"kv_heads": 2}, {"width": 5, "scale": 0.3}, {"heads": 1, "kv_heads": 1}], ids=str
)
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_attention_in_a_precision(precision, how, size, isa):
    net = Attends(**how).eval()
    x = torch.randn(*size, net.heads * net.width)
    made = rarefy.compile(net, torch.randn(2, 8, net.heads * net.width), precision=precision)
    assert native_ops(made).count(ops.attention) == 1
    assert relative_distance(made(x), net(x).detach()) < (0.02 if precision == "bf16" else 0.04)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("kind", ["keys", "trailing keys", "queries", "heads", "added"])
def test_masks_in_a_precision(kind, precision, isa):
    net, B, S = Attends().eval(), 3, 300
    mask = torch.rand(B, 4 if kind == "heads" else 1, 1 if "keys" in kind else S, S) < 0.7
    mask[..., 0] = True
    if kind == "trailing keys":
        mask = (torch.arange(S) < torch.tensor([1, 40, 300])[:, None])[:, None, None]
    mask = torch.randn(B, 1, S, S) if kind == "added" else mask.expand(B, -1, S, S)
    x = torch.randn(B, S, 32)
    made = rarefy.compile(net, (x, mask), precision=precision)
    assert native_ops(made).count(ops.attention) == 1
    assert relative_distance(made(x, mask), net(x, mask).detach()) < (0.02 if precision == "bf16" else 0.04)


@pytest.mark.parametrize("threads", [1, 2])
def test_denormal_numbers_count_as_zero_in_native_calls_alone(threads, isa):
    """They take a hundred times as long as others."""
    net, before = nn.Sequential(nn.Linear(40, 30, bias=False), nn.ReLU()).eval(), torch.get_num_threads()
    made, tiny = rarefy.compile(net, torch.randn(200, 40), tune=False), torch.full((200, 40), 1e-39)
    try:
        torch.set_num_threads(threads)
        assert net(tiny).any() and not made(tiny).any()
        assert (tiny * 0.5).all()  # as before, on the threads that ran native code too
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", [None, "bf16", "int8"])
@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min], ids=["inf", "min"])
def test_queries_that_see_no_key(hidden, precision, isa):
    """A text that is padded on the left under a causal mask: what is read there is of no use, but must not spread."""
    first, second, S = Attends().eval(), Attends().eval(), 40
    seen = torch.ones(S, S, dtype=torch.bool).tril().expand(3, 1, S, S).clone()
    seen[1, ..., :7] = False
    seen[2] = False  # a text without any token
    mask = torch.zeros(seen.shape).masked_fill(~seen, hidden)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x, mask):
            return self.second(self.first(x, mask), mask)

    net, x = Two().eval(), torch.randn(3, S, 32)
    made = rarefy.compile(net, (x, torch.zeros(3, 1, S, S)), precision=precision, tune=False)
    got, want = made(x, mask), net(x, mask).detach()
    assert not got.isnan().any()
    real = torch.ones(3, S, dtype=torch.bool)
    real[1, :7], real[2] = False, False
    assert relative_distance(got[real], want[real]) < (1e-5 if precision is None else 0.05)
    assert relative_distance(got, want) < (1e-5 if precision is None else 0.05)  # of a query that sees nothing too


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("rows", slow_except([(1,), (17,), (64,), (200,), (2, 3, 30)], (17,)), ids=str)
@pytest.mark.parametrize("precision", ["bf16", "int16", "int8"])
def test_matrices_in_a_precision_are_those_of_rounded_numbers(precision, rows, sparsity, isa):
    """Whatever step writes the codes: a norm, a product, or one of its own; widths are no multiples of a block."""
    net = nn.Sequential(
        nn.LayerNorm(50), nn.Linear(50, 333), nn.GELU(), nn.Linear(333, 70), nn.ReLU(), nn.Linear(70, 9)
    )
    net = pruned(net.eval(), sparsity)
    x = torch.randn(*rows, 50)
    made = rarefy.compile(net, x, precision=precision)
    assert native_ops(made).count(ops.linear) == 3
    distance = relative_distance(made(x), net(x).detach())
    assert 1e-6 < distance < {"bf16": 0.02, "int16": 2e-3, "int8": 0.05}[precision]
    y = x.clone()
    y[(0,) * len(rows)] = float("nan")
    wrong = made(y).flatten(0, -2).isnan().any(-1)
    assert bool(wrong[0]) and not bool(wrong[1:].any())


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("blocks", [0.3, 0.9])
def test_a_matrix_is_the_same_in_the_format_of_every_cpu(kind, blocks):
    weight = torch.randn(90, 70) * (torch.rand(90, 35) < blocks).repeat_interleave(2, 1)
    first = kernel_selection.pack_lanes(weight, kind, amx=False)
    other = kernel_selection.repack(first, amx=True)
    assert type(other) is packing.Dense
    assert torch.equal(packing.unpack(other), packing.unpack(first))
    again = kernel_selection.repack(other, amx=False)
    assert type(again) is type(first)
    assert all(
        torch.equal(a, b) for a, b in zip(vars(again).values(), vars(first).values()) if isinstance(a, torch.Tensor)
    )


def test_what_is_changed_in_place_is_read_as_it_was():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            h = self.a(x)
            y = h * 2
            h.relu_()
            return self.b(h) + y + h

    net, x = Net().eval(), torch.randn(4, 8)
    torch.testing.assert_close(rarefy.compile(net, x)(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_minilm_pruned_equals_eager():
    model, tokenizer = hf.load_folder(builtin.model_folder("minilm")), hf.load_tokenizer(builtin.model_folder("minilm"))
    rarefy.prune_(model, layers="encoder.layer.*", sparsity=0.8)
    model = rarefy.fold_(model).eval()
    texts = ["A short one.", "Sparse matrices have few values, and so on and on, until a line is full of words."]
    some = tokenizer(texts, padding=True, return_tensors="pt")
    made = rarefy.compile(model, some)
    assert native_ops(made).count(ops.attention) == 6
    assert "6 attention" in repr(made) and "embedding" in repr(made)
    for batch in (texts, texts[:1], texts * 9):
        words_ = tokenizer(batch, padding=True, return_tensors="pt")
        with torch.no_grad():
            want, got = model(**words_), made(**words_)
        assert type(got) is type(want)
        real = words_["attention_mask"].bool()
        torch.testing.assert_close(got.last_hidden_state[real], want.last_hidden_state[real], rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(got.pooler_output, want.pooler_output, rtol=1e-3, atol=1e-5)


def test_eight_bits_equal_their_oracle(isa):
    torch.manual_seed(3)
    net = pruned(nn.Sequential(nn.Linear(70, 130), nn.GELU(), nn.Linear(130, 9)))
    x = torch.randn(100, 70)
    got = rarefy.compile(net, x, precision="int8")(x)
    y = x
    for layer in net:
        if isinstance(layer, nn.Linear):
            packed = packing.pack_sell(layer.weight, "int8")
            y = reference.run(packed, y, layer.bias)
        else:
            y = layer(y)
    torch.testing.assert_close(got, y.detach(), rtol=1e-3, atol=1e-3)
    assert 1e-5 < relative_distance(got, net(x).detach()) < 0.05


class Words(nn.Module):
    """An embedding of `rows` words before a linear layer."""

    def __init__(self, rows, features=384):
        super().__init__()
        self.embedding, self.head = nn.Embedding(rows, features), nn.Linear(features, 8)

    def forward(self, ids):
        return self.embedding(ids), self.head(self.embedding(ids))


def test_large_embeddings_are_kept_in_bytes(tmp_path):
    net, ids = Words(3000).eval(), torch.randint(0, 3000, (2, 17))
    with torch.no_grad():
        net.embedding.weight[7] = 0
    made = rarefy.compile(net, ids, precision="int8", tune=False)
    ids[0, 0] = 7
    step = net.embedding.weight.abs().amax(1, keepdim=True) / 127
    want, got = net.embedding(ids), made(ids)[0]
    assert ((got - want).abs() <= step[ids] / 2 * 1.001).all() and not got[0, 0].any()
    rarefy.save(made, tmp_path / "words")
    assert sum(f.stat().st_size for f in (tmp_path / "words").iterdir()) < 0.3 * 4 * net.embedding.weight.numel()
    assert torch.equal(rarefy.load(tmp_path / "words")(ids)[0], got)
    with pytest.raises(Exception, match="3000"):
        made(torch.tensor([[3000]]))


def test_embeddings_that_a_linear_layer_shares_are_kept_in_bytes(tmp_path):
    net, ids = Words(5000, 250).eval(), torch.randint(0, 5000, (2, 17))
    net.head = nn.Linear(250, 5000, bias=False)
    net.head.weight = net.embedding.weight
    made = rarefy.compile(net, ids, precision="int8", tune=False)
    assert relative_distance(made(ids)[0], net(ids)[0]) < 0.02
    rarefy.save(made, tmp_path / "words")
    assert sum(f.stat().st_size for f in (tmp_path / "words").iterdir()) < 0.6 * 4 * net.embedding.weight.numel()
    assert torch.equal(rarefy.load(tmp_path / "words")(ids)[0], made(ids)[0])


def test_small_embeddings_stay():
    net, ids = Words(500).eval(), torch.randint(0, 500, (2, 17))
    assert torch.equal(rarefy.compile(net, ids, precision="int8", tune=False)(ids)[0], net(ids)[0])


def test_layers_that_run_sparse_already(monkeypatch):
    net, x = pruned(Gated(64, 256), 0.9), torch.randn(32, 64)
    want = net(x)
    monkeypatch.setattr(autotune, "fastest", lambda d, w, i, c: {n: ("tiles", 2.0) for n in i})
    rarefy.accelerate_(net, (32,), tuning_cache=False)
    made = rarefy.compile(net, x)
    assert native_ops(made).count(ops.linear) == 3
    torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-5)


def test_without_kernels_torch_runs_the_words(monkeypatch):
    monkeypatch.setattr(bindings, "missing", lambda: "no compiler")
    net, x = pruned(Attends()), torch.randn(2, 9, 32)
    made = rarefy.compile(net, x)
    assert not native_ops(made)
    torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)


def test_what_no_plan_knows_runs_in_torch():
    net, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval(),
        torch.randn(2, 3, 8, 8),
    )
    made = rarefy.compile(net, x)
    assert "in torch: 1 flatten" in repr(made) and "1 native call: 2 conv2d" in repr(made)
    x = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"groups": 2}, {"affine": False}, {"inplace": False}], ids=str)
def test_convolutions_take_in_their_norms_and_sums(how, isa):
    torch.manual_seed(4)
    net = Residual(**how).eval()
    made = rarefy.compile(net, torch.randn(2, 8, 12, 12))
    calls = [n for i in made.schedule if isinstance(i, FusedSubgraph | SingleOp) for n in i.nodes]
    alone = [n for n in calls if n.target is ops.conv2d]
    assert [n.args[4] for n in alone].count("relu") == 2 and sum(n.args[3] is not None for n in alone) == 1
    assert not any(
        "batch_norm" in str(getattr(i, "target", "")) or "relu" in str(getattr(i, "target", "")) for i in made.schedule
    )
    for size in ((1, 8, 12, 12), (5, 8, 12, 12)):
        x = torch.randn(*size)
        torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-4)


CONVOLUTIONS_OF_TORCH = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "same": (nn.Conv2d(4, 6, 3, padding="same", bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(4, 6, 3, groups=2, bias=False), nn.BatchNorm3d(6, affine=False), (2, 4, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", [*CONVOLUTIONS_OF_TORCH, "transposed in groups"])
def test_norms_fold_into_convolutions_of_torch(name):
    grouped = (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5))
    conv, norm, size = CONVOLUTIONS_OF_TORCH.get(name, grouped)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    net, x = nn.Sequential(conv, norm, nn.ReLU()).eval(), torch.randn(size)
    made = rarefy.compile(net, x)
    stays = any("batch_norm" in str(n.target) for n in made.exported.graph.nodes)
    assert stays == (name == "transposed in groups")
    torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_norm_that_is_not_alone_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.a(x)
            return self.n(y) + y

    net, x = Net().eval(), torch.randn(2, 3, 9, 9)
    made = rarefy.compile(net, x)
    assert "1 channel_affine" in repr(made)
    torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)


def test_weights_that_others_read_too():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.inner, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.inner(self.words(ids)))

    net, ids = Tied().eval(), torch.randint(30, (2, 5))
    torch.testing.assert_close(rarefy.compile(net, ids)(ids), net(ids), rtol=1e-4, atol=1e-5)


def test_views_of_what_was_made_contiguous():
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x).transpose(0, 1).contiguous()
            return y.view(y.shape[0] * y.shape[1], 8)

    net, x = Turns().eval(), torch.randn(3, 4, 8)
    torch.testing.assert_close(rarefy.compile(net, x)(x), net(x), rtol=1e-4, atol=1e-5)


ZOO = ["roberta", "distilbert", "vit", "swin", "clip", "llama", "swin_t", "mobilenet_v2"]


@pytest.mark.parametrize("name", slow_except(ZOO, "distilbert", "vit", "clip"))
def test_models_of_the_zoo(name):
    cases = zoo.transformers_cases() if "_" not in name else zoo.torchvision_cases()
    make, example = cases[name]
    model = pruned(make(), 0.5)
    if name == "llama":
        with pytest.raises(ModelError, match="put use_cache=False into the example"):
            rarefy.compile(model, example)
        example = {**example, "use_cache": False}
    made = rarefy.compile(model, example)
    assert native_ops(made).count(ops.linear) > 0
    args, kwargs = compile.split_example(example)
    assert verify.distance(model, made, *torch.utils._pytree.tree_flatten((args, kwargs))) < 1e-4


def test_threads_at_once():
    net = pruned(Attends(), 0.5)
    made = rarefy.compile(net, torch.randn(2, 8, 32))
    wrong = []

    def work(seed):
        g = torch.Generator().manual_seed(seed)
        for _ in range(30):
            x = torch.randn(2, 33 + seed, 32, generator=g)
            if not torch.allclose(made(x), net(x), atol=1e-4):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(s % 2,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_plans_are_few():
    net = pruned(nn.Sequential(nn.Linear(8, 8)))
    made = rarefy.compile(net, torch.randn(2, 8))
    for n in range(2, 60):
        made(torch.randn(n, 8))
    assert len(next(i for i in made.schedule if isinstance(i, FusedSubgraph)).programs) == MAX_SHAPES
    assert len(made.fixed) <= MAX_SHAPES


def test_weights_are_its_own():
    net, x = pruned(nn.Sequential(nn.Linear(8, 8))), torch.randn(2, 8)
    made, want = rarefy.compile(net, x), net(x)
    net[0].weight.data.zero_()
    torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m(torch.randn(2, 9, 31)), r"x: expected float32 \[any, any, 32\] on the CPU, got \[2, 9, 31\]: 31 is not 32"),
        (lambda m: m(torch.randn(2, 32)), r"x: expected float32 \[any, any, 32\] on the CPU, got float32 \[2, 32\]"),
        (lambda m: m(torch.ones(2, 9, 32, dtype=torch.int64)), "got int64"),
        (lambda m: m(3.5), "expected .*, got float"),
        (lambda m: m(), r"expected 1 input \(x: float32 \[any, any, 32\] on the CPU\), got 0$"),
        (lambda m: m(torch.randn(2, 9, 32), torch.ones(9, 9)), r"expected 1 input \(x: .*\), got 2$"),
        (lambda m: m([torch.randn(2, 9, 32)]), r"expected arguments nested as \(\*,\), as in the example, got \(\[\*\],\)$"),
        (lambda m: m(y=torch.randn(2, 9, 32)), "compiled for the keywords x, got y: leave out y, or compile with an .*; x is missing$"),
    ],
)  # fmt: skip
def test_calls_that_do_not_fit(call, says):
    made = rarefy.compile(pruned(Attends()), torch.randn(2, 9, 32))
    with pytest.raises(DataError, match=says):
        call(made)


class Looks(nn.Module):
    """An operator that torch runs, and that not all numbers suit."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x, at):
        return self.a(x)[at]


def test_what_torch_refuses_in_a_call_is_told_with_the_operator():
    made = rarefy.compile(Looks().eval(), {"x": torch.randn(4, 8), "at": torch.tensor([0, 3])})
    with pytest.raises(DataError, match="index.Tensor failed on these inputs: index 9 is out of bounds"):
        made(x=torch.randn(4, 8), at=torch.tensor([0, 9]))
    with pytest.raises(DataError, match="compiled for the keywords x, at, got x, to: leave out to, .*; at is missing"):
        made(x=torch.randn(4, 8), to=torch.tensor([0]))


def test_what_is_no_model():
    x = torch.randn(2, 8)
    net = nn.Linear(8, 8).eval()
    for model, told in (
        ("out/", r"got str: rarefy.load"),
        (rarefy.compile(net, x), "got Compiled: it is compiled already"),
    ):
        with pytest.raises(ModelError, match=told):
            rarefy.compile(model, x)


def test_sizes_that_belong_together():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x, y):
            return self.a(x) + self.a(y)

    made = rarefy.compile(Sum().eval(), {"x": torch.randn(3, 8), "y": torch.randn(3, 8)})
    with pytest.raises(DataError, match="y: "):
        made(x=torch.randn(4, 8), y=torch.randn(5, 8))


class Asks(nn.Module):
    def forward(self, x):
        return x * 2 if float(x.sum()) > 0 else x


class Truth(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Items(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return x + self.calls


def masked():
    net = nn.Sequential(nn.Linear(8, 8))
    rarefy.prune_(net, sparsity=0.5)
    return net.eval()


@pytest.mark.parametrize(
    ("make", "example", "how", "says"),
    [
        (lambda: nn.Linear(2, 2), torch.randn(2, 2), {}, "training mode: call eval"),
        (lambda: Asks().eval(), torch.randn(2, 2), {}, "Asks cannot be exported: "),
        (lambda: Counts().eval(), torch.randn(2, 2), {}, "changes its buffers or its inputs"),
        (lambda: nn.Linear(2, 2).eval(), torch.randn(2, 2), {"precision": "int7"}, "unknown precision 'int7'"),
        (lambda: nn.Linear(2, 2, device="meta").eval(), torch.randn(2, 2), {}, "meta"),
    ],
)
def test_models_that_cannot_be_compiled(make, example, how, says):
    with pytest.raises(ModelError, match=says):
        rarefy.compile(make(), example, **how)


def test_masks_are_folded_in_a_copy():
    x = torch.randn(5, 8)
    net = masked()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    made = rarefy.compile(net, x)
    assert "masks or quantization grids of 1 weight were folded in first, in a copy of the model" in repr(made)
    assert list(before) == list(net.state_dict()) and all(
        torch.equal(t, before[n]) for n, t in net.state_dict().items()
    )
    folded = rarefy.fold_(copy.deepcopy(net))
    assert torch.equal(made(x), rarefy.compile(folded, x)(x))
    assert "folded" not in repr(rarefy.compile(folded, x))


def test_the_copy_shares_all_tensors_without_masks():
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)).eval()
    rarefy.prune_(net, layers="0", sparsity=0.5)
    copied, notes = compile.fold_copy(net)
    assert notes and copied[2].weight is net[2].weight and copied[1].running_mean is net[1].running_mean
    assert copied[0].weight.data_ptr() != net[0].weight.data_ptr()


def test_other_parametrizations_are_computed_once():
    net, x = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    made = rarefy.compile(net, x)
    assert repr(made) == "1 native call: 1 linear"
    torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)


class Locked(nn.Module):
    """A model that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.a, self.lock = nn.Linear(8, 8), threading.Lock()

    def forward(self, x):
        return self.a(x)


def test_masks_of_a_model_that_cannot_be_copied():
    net = Locked().eval()
    rarefy.prune_(net, sparsity=0.5)
    with pytest.raises(ModelError, match="Locked has masks and cannot be copied: fold_ it first"):
        rarefy.compile(net, torch.randn(2, 8))


class Branches(nn.Module):
    """Control flow that depends on data, after forty layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(40)])

    def forward(self, x):
        x = self.layers(x)
        rows = x.nonzero()
        return x + 1 if rows.shape[0] > 4 else x[rows[:, 0]]


def test_a_failed_export_prints_nothing(capfd):
    with pytest.raises(ModelError) as caught:
        rarefy.compile(Branches().eval(), torch.randn(4, 8))
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    message = str(caught.value)
    assert "Branches cannot be exported: its code depends on the values of tensors (data-dependent)" in message
    assert "accelerate_ needs no export" in message and "\n" not in message and "symbol" not in message


def test_the_line_that_depends_on_values_is_named(capfd):
    with pytest.raises(ModelError, match=r"\(test_compile.py, line \d+: return x \* 2 if "):
        rarefy.compile(Truth().eval(), torch.randn(2, 2))
    with pytest.raises(ModelError, match=r"\(test_compile.py, line \d+: .*\); rarefy"):
        rarefy.compile(Items().eval(), torch.randn(2, 2))
    assert capfd.readouterr().err == ""  # torch logs to a logger of its own here


@pytest.mark.parametrize(
    ("example", "says"),
    [
        (torch.randn(2, 3), "Linear cannot be called with an example of float32 2x3: .* (it takes input)"),
        (torch.ones(2, 2, dtype=torch.int64), "an example of int64 2x2: "),
        ((torch.randn(2, 2), torch.ones(1)), "an example of float32 2x2 and float32 1: "),
        ({"inputs": torch.randn(2, 2)}, "an example of inputs: float32 2x2: "),
    ],
)
def test_examples_that_the_model_cannot_be_called_with(example, says, capfd):
    with pytest.raises(DataError, match=says.replace("(", r"\(").replace(")", r"\)")) as caught:
        rarefy.compile(nn.Linear(2, 2).eval(), example)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


class Prints(nn.Module):
    def forward(self, x):
        print("seen", file=sys.stderr)
        return x * 2


def test_what_a_model_prints_is_shown(capsys):
    rarefy.compile(Prints().eval(), torch.randn(4, 8))
    assert "seen" in capsys.readouterr().err


@pytest.mark.parametrize("call", [rarefy.compile, rarefy.decoder, rarefy.generate, rarefy.stream])
def test_the_old_name_of_precision(call):
    with pytest.raises(TypeError, match="has no parameter 'values': it is called 'precision' now"):
        call(nn.Linear(8, 8), torch.randn(2, 8), values="int8")


def test_an_example_without_tensors():
    with pytest.raises(DataError, match=r"no tensor: .*, as tensors: torch.from_numpy\(array\)"):
        rarefy.compile(nn.Linear(4, 2).eval(), torch.randn(3, 4).numpy(), tune=False)
    with pytest.raises(ModelError, match=r"got str: rarefy.from_onnx\(file\) reads one"):
        rarefy.compile("net.onnx", torch.randn(3, 4))
    with pytest.raises(DataError, match="the example has no tensor"):
        rarefy.compile(nn.Linear(2, 2).eval(), {})


def test_other_numbers_are_refused(monkeypatch):
    monkeypatch.setattr(kernel_selection, "pack_sell", lambda w: packing.pack_sell(w * 1.01))
    with pytest.raises(ModelError, match="differ: relative distance 0.01"):
        rarefy.compile(pruned(nn.Sequential(nn.Linear(8, 8, bias=False))), torch.randn(2, 8))


def test_in_bytes_the_graph_is_proved_without_them(monkeypatch):
    monkeypatch.setitem(reference.ACTIVATIONS, "relu", lambda t: t.relu() * 1.01)  # less than bytes may move
    with pytest.raises(ModelError, match="differ: relative distance 0.01"):
        rarefy.compile(pruned(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), torch.randn(2, 8), precision="int8")


def test_in_bytes_a_size_of_one_must_be_exact_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x) * (1.3 if x.shape[0] == 1 else 1.0)

    model = Net().eval()
    made = rarefy.compile(model, torch.randn(4, 8), precision="int8")
    x = torch.randn(1, 8)
    assert relative_distance(made(x), model(x).detach()) < 0.05  # of a branch of its own
    made = rarefy.compile(Net().eval(), torch.randn(4, 8), precision="int8")
    gc.collect()  # the model is deleted
    with pytest.raises(DataError, match="1 is not 2 or more"):
        made(x)


def test_sizes_of_one_where_the_model_does_something_else():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x) if x.shape[0] > 1 else -self.a(x)

    model, x = Net().eval(), torch.randn(1, 8)
    made = rarefy.compile(model, torch.randn(4, 8))
    torch.testing.assert_close(made(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    made = rarefy.compile(Net().eval(), torch.randn(4, 8))
    gc.collect()  # the model is deleted
    with pytest.raises(DataError, match="1 is not 2 or more"):
        made(x)


def test_example_of_one_sample_serves_more():
    net = pruned(copy.deepcopy(Gated()))
    made, x = rarefy.compile(net, torch.randn(1, 24)), torch.randn(70, 24)
    torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def grown(call, threads=1, times=10_000, warm=3000):
    """Bytes by which the process grows in so many calls behind the first ones, by several threads."""

    def work(n):
        for i in range(n):
            call(i)

    def all_of(n):
        running = [threading.Thread(target=work, args=(n // threads,)) for _ in range(threads)]
        for t in running:
            t.start()
        for t in running:
            t.join()

    all_of(warm)
    before = resident()
    all_of(times)
    return resident() - before


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_does_not_grow(threads):
    net = pruned(Attends())
    made = rarefy.compile(net, torch.randn(2, 64, 32))
    x = torch.randn(3, 96, 32)
    sizes = [(1 + i % 3, 8 + 4 * (i % 23)) for i in range(69)]  # more than plans are kept for
    assert grown(lambda i: made(x[: sizes[i % 69][0], : sizes[i % 69][1]]), threads) < 4 << 20


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_of_a_decoder_does_not_grow(threads):
    made = rarefy.decoder(tiny_llama())
    caches = threading.local()

    def step(i):
        cache = getattr(caches, "now", None)
        if cache is None or cache.past + 9 > cache.capacity:
            cache = caches.now = made.cache(1 + i % 3, 64 * (1 + i % 2))
            made(torch.arange(cache.batch * (3 + i % 5)).view(cache.batch, -1) % 60, cache)
        made(torch.full((cache.batch, 1), i % 60), cache)

    assert grown(step, threads) < 4 << 20


def test_what_nobody_reads_any_more_goes():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x)
            for _ in range(30):
                y = torch.sin(y)
            return y, x

    net = Deep().eval()
    made, alive = rarefy.compile(net, torch.randn(4, 8)), []
    sines = [i for i in made.schedule if not isinstance(i, FusedSubgraph)]
    made.schedule[-1].target = lambda x: alive.append(len(gone)) or torch.sin(x)
    gone = []
    first = sines[0].target
    sines[0].target = lambda x: (y := first(x), weakref.finalize(y, gone.append, 1))[0]
    want, got = net(x := torch.randn(5, 8)), made(x)
    assert alive == [1] and torch.equal(got[1], x)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)


def test_only_what_is_needed_is_kept():
    class Threes(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.o = nn.Linear(32, 96), nn.Linear(96, 8)

        def forward(self, x):
            return self.o(torch.cat(self.qkv(x).chunk(3, -1), -1))

    made = rarefy.compile(Threes().eval(), torch.randn(2, 32))
    assert {n: t.shape for n, t in made.constants.items() if t.dim() > 1} == {}
    assert not any(s.programs for s in made.schedule if isinstance(s, FusedSubgraph)) and not made.fixed
    assert not any(n.meta for n in made.exported.graph.nodes)


def test_later_changes_of_the_model_are_not_seen():
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Embedding(3, 8)).eval()
    net.forward = lambda x, ids: net[1](net[0](x)) + net[2](ids)
    x, ids = torch.randn(5, 8), torch.tensor([0, 2, 1, 1, 0])
    made = rarefy.compile(net, {"x": x, "ids": ids})
    before = made(x=x, ids=ids)
    for p in net.parameters():
        p.data.add_(1)
    assert torch.equal(made(x=x, ids=ids), before)


def test_threads_of_torch_that_disagree():
    """After `set_num_threads`, threads that torch starts later see another number than a thread that began before."""
    net = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256)).eval()
    x = torch.randn(60, 256)
    made, want, before = rarefy.compile(net, x, tune=False), net(x).detach(), torch.get_num_threads()
    wrong = []

    def call(begun, go):
        torch.get_num_threads()  # from here on this thread keeps the number
        begun.set()
        go.wait()
        wrong.extend(d for _ in range(3) if not (d := relative_distance(made(x), want)) < 1e-5)

    try:
        for _ in range(10):
            torch.set_num_threads(2)
            begun, go = threading.Event(), threading.Event()
            thread = threading.Thread(target=call, args=(begun, go))
            thread.start()
            begun.wait()
            torch.set_num_threads(1)
            go.set()
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong


def test_fixed_sizes():
    net, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval(), torch.randn(3, 8)
    fast = rarefy.compile(net, x, dynamic=False)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match=r"expected float32 \[3, 8\] on the CPU, got \[4, 8\]"):
        fast(torch.randn(4, 8))
    one = rarefy.compile(net, x[:1], dynamic=False)
    torch.testing.assert_close(one(x[:1]), net(x[:1]), rtol=1e-4, atol=1e-5)
