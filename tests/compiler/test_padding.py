"""Batches of texts of unequal lengths: compiled models leave padding out, and return eager's numbers at real tokens."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from conftest import tiny_bert
from helpers.compile_models import Attends, packed_programs
from helpers.marks import slow_case, slow_except
from rarefy.compiler.padding import pack, real_tokens
from rarefy.compiler.subgraph import FIXED_SHAPES, MAX_SHAPES, FusedSubgraph
from rarefy.model.compare import relative_distance

TOLERANCES = {None: 1e-5, "bf16": 0.02, "int16": 2e-3, "int8": 0.06}


def padded(lengths, side="right", tokens=None):
    """Return random token ids and their mask, padded on one side, or with holes."""
    tokens = tokens or max(lengths)
    place = torch.arange(tokens)
    n = torch.tensor(lengths)[:, None]
    mask = place < n if side == "right" else place >= tokens - n
    if side == "holes":
        mask = torch.stack([torch.randperm(tokens) < l for l in lengths])
    return {"input_ids": torch.randint(0, 64, mask.shape), "attention_mask": mask.long()}


class Encoder(nn.Module):
    """Attention with a mask of real tokens, and what reads its output."""

    def __init__(self, read="hidden", kv_heads=4):
        super().__init__()
        self.one, self.two = Attends(kv_heads=kv_heads), Attends(kv_heads=kv_heads)
        self.read = read

    def forward(self, x, attention_mask):
        mask = attention_mask.bool()[:, None, None].expand(-1, 1, x.shape[1], -1)
        y = self.two(torch.exp(self.one(x, mask)), mask)
        real = attention_mask.unsqueeze(-1).expand(y.size()).to(y.dtype)
        if self.read == "mean of real tokens":
            return (y * real).sum(1) / real.sum(1)
        readers = {
            "first": lambda: y[:, 0],
            "last": lambda: y[:, -1],
            "mean": lambda: y.mean(1),
            "padding": lambda: (y * (1 - real)).sum(1),
            "softmax over tokens": lambda: y.softmax(1),
            "shifted": lambda: y[:, 1:] * 2,
        }
        return readers[self.read]() if self.read in readers else y


@pytest.mark.parametrize("precision", [None, "bf16", "int16", "int8"])
@pytest.mark.parametrize(
    "lengths",
    slow_except([[1, 9, 40, 16, 17, 33], [50, 3], [64, 64, 1], [5] * 20 + [63]], [1, 9, 40, 16, 17, 33]),
    ids=lambda n: f"{len(n)} texts",
)
def test_real_tokens_equal_eager(lengths, precision, isa):
    pytest.importorskip("transformers")
    model, batch = tiny_bert(), padded(lengths)
    made = rarefy.compile(model, padded([8, 8]), precision=precision, tune=False)
    with torch.no_grad():
        want = model(**batch)
    got, real = made(**batch), batch["attention_mask"].bool()
    assert packed_programs(made)
    assert relative_distance(got.last_hidden_state[real], want.last_hidden_state[real]) < TOLERANCES[precision]
    assert relative_distance(got.pooler_output, want.pooler_output) < TOLERANCES[precision]
    assert not got.last_hidden_state[~real].any()


def test_padding_is_computed_when_asked_for():
    pytest.importorskip("transformers")
    model, batch = tiny_bert(), padded([1, 9, 40, 16])
    made = rarefy.compile(model, batch, tune=False)  # padding in the example itself
    made.skip_padding = False
    with torch.no_grad():
        torch.testing.assert_close(made(**batch)[0], model(**batch)[0], rtol=1e-4, atol=1e-5)
    assert not packed_programs(made)


def test_padding_on_the_left_where_the_first_token_is_read():
    pytest.importorskip("transformers")
    model, batch = tiny_bert(), padded([1, 9, 40, 16], "left")
    made = rarefy.compile(model, batch, tune=False)
    with torch.no_grad():
        want = model(**batch)
    for got, expected in zip(made(**batch).to_tuple(), want.to_tuple()):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not packed_programs(made)


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("how", [{}, slow_case({"kv_heads": 2})], ids=str)
def test_sides(how, side, precision, isa):
    net, mask = Encoder(**how).eval(), padded([1, 70, 3, 20, 19], side)["attention_mask"]
    x = torch.randn(*mask.shape, 32) / 2
    example = {"x": x, "attention_mask": torch.ones_like(mask)}
    made = rarefy.compile(net, example, precision=precision, tune=False)
    want, got, real = net(x, mask).detach(), made(x=x, attention_mask=mask), mask.bool()
    assert packed_programs(made)
    assert relative_distance(got[real], want[real]) < TOLERANCES[precision]


@pytest.mark.parametrize("read", ["mean of real tokens", "first"])
def test_readers_of_real_tokens(read):
    net, mask = Encoder(read).eval(), padded([1, 70, 3, 20, 19])["attention_mask"]
    x = torch.randn(*mask.shape, 32) / 2
    made = rarefy.compile(net, {"x": x, "attention_mask": mask}, tune=False)
    torch.testing.assert_close(made(x=x, attention_mask=mask), net(x, mask), rtol=1e-4, atol=1e-4)
    assert packed_programs(made)


@pytest.mark.parametrize("read", ["last", "mean", "padding", "softmax over tokens", "shifted"])
def test_readers_of_padding(read):
    net, mask = Encoder(read).eval(), padded([1, 70, 3, 20, 19])["attention_mask"]
    x = torch.randn(*mask.shape, 32) / 2
    made = rarefy.compile(net, {"x": x, "attention_mask": mask}, tune=False)
    torch.testing.assert_close(made(x=x, attention_mask=mask), net(x, mask), rtol=1e-4, atol=1e-4)
    assert not packed_programs(made)


@pytest.mark.parametrize("kind", ["an empty text", "no padding", "little padding"])
def test_batches_that_are_not_packed(kind):
    pytest.importorskip("transformers")
    lengths = {"an empty text": [0, 9, 48, 16], "no padding": [48] * 4, "little padding": [47, 48, 48, 48]}[kind]
    model, batch = tiny_bert(), padded(lengths, tokens=48)
    made = rarefy.compile(model, padded([8, 8]), tune=False)
    with torch.no_grad():
        want = model(**batch).last_hidden_state
    got = made(**batch).last_hidden_state
    real = batch["attention_mask"].any(1)  # eager's numbers for an empty text mean nothing
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
    assert not packed_programs(made)


def test_a_mask_that_is_no_padding_hides_keys_alone():
    class Hides(Encoder):
        def forward(self, x, hidden):
            return super().forward(x, hidden)

    net, hidden = Hides().eval(), padded([1, 70, 3, 20, 19])["attention_mask"]
    x = torch.randn(*hidden.shape, 32) / 2
    made = rarefy.compile(net, {"x": x, "hidden": hidden}, tune=False)
    torch.testing.assert_close(made(x=x, hidden=hidden), net(x, hidden), rtol=1e-4, atol=1e-4)


def test_cross_attention_computes_all_queries():
    class Crosses(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x, y, attention_mask):
            q, k, v = (f(t).unflatten(-1, (4, 8)).transpose(1, 2) for f, t in ((self.q, x), (self.k, y), (self.v, y)))
            mask = attention_mask.bool()[:, None, None].expand(-1, 1, x.shape[1], -1)
            return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    net, mask = Crosses().eval(), padded([1, 70, 3, 20, 19])["attention_mask"]
    example = {"x": torch.randn(*mask.shape, 32), "y": torch.randn(*mask.shape, 32), "attention_mask": mask}
    made = rarefy.compile(net, example, tune=False)
    torch.testing.assert_close(made(**example), net(**example), rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow_with_random_lengths():
    pytest.importorskip("transformers")
    made = rarefy.compile(tiny_bert(), padded([8, 8]), tune=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        n = int(torch.randint(2, 9, (), generator=generator))
        made(**padded(torch.randint(1, 65, (n,), generator=generator).tolist()))
    (subgraph, _) = [s for s in made.schedule if isinstance(s, FusedSubgraph)]  # the other one is the pooler
    assert len(subgraph.programs) <= MAX_SHAPES
    sizes = [p.columns for p in packed_programs(made)]
    assert len(sizes) == len(set(sizes)) > 2  # one program for each capacity


@pytest.mark.parametrize("precision", [None, "int8"])
def test_texts_of_ever_new_lengths_share_programs(precision):
    """The first lengths without padding have programs of their own, further ones those of batches with padding."""
    model = tiny_bert()
    made = rarefy.compile(model, padded([8, 8]), precision=precision, tune=False)
    (subgraph, _) = [s for s in made.schedule if isinstance(s, FusedSubgraph)]
    lengths = [*range(30, 30 + FIXED_SHAPES), 17, 18, 20, 31, 25, 9, 1]
    for n in lengths:
        batch = padded([n])
        with torch.no_grad():
            want = model(**batch)
        got = made(**batch)
        assert relative_distance(got.last_hidden_state, want.last_hidden_state) < TOLERANCES[precision]
        assert relative_distance(got.pooler_output, want.pooler_output) < TOLERANCES[precision]
        again = made(**batch)
        assert torch.equal(got.last_hidden_state, again.last_hidden_state)
    assert len(subgraph.fixed) == FIXED_SHAPES
    assert [p.columns for p in packed_programs(made)] == [64]
    assert len(subgraph.programs) == FIXED_SHAPES + 1
    made(**padded([40, 40]))  # no padding, but two sequences
    assert sorted(p.columns for p in packed_programs(made)) == [64, 128]


def test_threads_with_batches_of_their_own():
    pytest.importorskip("transformers")
    model, made = tiny_bert(), rarefy.compile(tiny_bert(), padded([8, 8]), tune=False)
    batches = [padded([1 + i, 60, 5 * i + 2, 30]) for i in range(4)]
    with torch.no_grad():
        want = [model(**b).pooler_output for b in batches]
    wrong = []

    def call(i):
        for _ in range(10):
            if float((made(**batches[i]).pooler_output - want[i]).abs().max()) > 1e-4:
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_profile_counts_real_tokens():
    pytest.importorskip("transformers")
    made = rarefy.compile(tiny_bert(), padded([8, 8]), tune=False)
    lengths = [1, 9, 60, 16]
    rows = made.profile(**padded(lengths), repeats=2).rows
    assert any(r.operator == "linear" and r.sizes.startswith(f"{sum(lengths)} x ") for r in rows)
    attention = next(r for r in rows if r.operator == "attention")
    assert attention.executed == 4 * 32 * sum(n * n for n in lengths) < attention.operations == 4 * 32 * 4 * 60 * 60


def test_saved_models_leave_padding_out(tmp_path):
    pytest.importorskip("transformers")
    batch = padded([1, 9, 60, 16])
    made = rarefy.compile(tiny_bert(), batch, tune=False)
    rarefy.save(made, tmp_path / "out")
    loaded = rarefy.load(tmp_path / "out")
    assert torch.equal(loaded(**batch).last_hidden_state, made(**batch).last_hidden_state)
    assert packed_programs(loaded)


def test_real_tokens_of_masks():
    real = torch.tensor([[True, True, False], [True, False, False]])
    mask = torch.zeros(2, 1, 1, 3).masked_fill(~real[:, None, None], float("-inf"))
    assert torch.equal(real_tokens(mask, 2, 3), real)
    assert torch.equal(real_tokens(mask.clamp(min=torch.finfo(torch.float32).min).expand(2, 4, 3, 3), 2, 3), real)
    assert real_tokens(mask.repeat(1, 1, 3, 1), 2, 3) is None  # may differ between queries
    assert real_tokens(mask.clamp(min=-5.0), 2, 3) is None  # hides nothing for certain
    assert real_tokens(mask, 1, 3) is None
    assert real_tokens(F.pad(mask, (0, 1)), 2, 3) is None
    packing = pack(real)
    assert (packing.batch, packing.tokens, packing.longest, packing.columns, packing.tiles) == (2, 3, 2, 3, 1)
