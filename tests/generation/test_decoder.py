"""Language models on the engine: the logits and the text of eager transformers, whatever the pieces they are read in."""

import copy
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rarefy
from helpers.language_models import FAMILIES, GATED, V, eager, far, in_pieces, pruned_to, small
from helpers.marks import slow_case, slow_except
from rarefy.common.errors import DataError, ModelError
from rarefy.compiler import ops, program
from rarefy.compiler.subgraph import FusedSubgraph
from rarefy.data import builtin
from rarefy.generation import decoder
from rarefy.generation.kv_cache import Cache
from rarefy.generation.logits import process, processors
from rarefy.generation.loop import pick
from rarefy.generation.options import Options
from rarefy.model import hf
from rarefy.model.activation_quant import set_activation_quant_
from rarefy.runtime import bindings
from rarefy.runtime.packed_formats import Bitmask, QuantizedPanels

transformers = pytest.importorskip("transformers")
SIX_BITS = {"weights": "int6", "group": 32}
OWN_POSITIONS = ("OPT",)  # learned positions that left padding shifts in a way of its own
WHOLE = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Olmo2")  # all their layers run as one native call


@pytest.fixture(scope="module")
def llama():
    model = small()
    return model, rarefy.decoder(model)


@pytest.mark.parametrize("family", slow_except(FAMILIES, "Llama", "GPT2"))
def test_families_read_as_eager_does(family):
    model = small(family)
    made = rarefy.decoder(model)
    ids = torch.randint(3, V, (3, 150))
    want = eager(model, ids)
    assert far(want, made(ids)) < 1e-5
    assert far(want, in_pieces(made, ids, [70, 1, 2, 1, 76])) < 1e-5  # 3 to 6 tokens are few, 210 are not
    if family in WHOLE and bindings.missing() is None:
        (first, _) = [s for s in made.compiled.schedule if isinstance(s, FusedSubgraph)]
        assert sum(n.target is ops.cached_attention for n in first.nodes) == 2


@pytest.mark.parametrize(
    "family", slow_except(["Llama", "Phi3", "GPTNeoX", "OPT", "GPT2", "Gemma3Text"], "Llama", "GPT2")
)
def test_single_tokens_of_several_texts(family):
    """Positions enter in many ways: rotated heads or parts of them, learned, with an offset, two tables at once."""
    model = small(family)
    made, ids = rarefy.decoder(model), torch.randint(3, V, (3, 70))
    assert far(eager(model, ids), in_pieces(made, ids, [60, *[1] * 10])) < 1e-5
    assert far(eager(model, ids[:1]), in_pieces(made, ids[:1], [1] * 70)) < 1e-5


@pytest.mark.parametrize(
    "family", slow_except((f for f in FAMILIES if f not in (*OWN_POSITIONS, "Qwen3", "GPT2")), "Llama")
)
def test_prompts_filled_up_on_the_left(family):
    model = small(family)
    made = rarefy.decoder(model)
    ids = torch.randint(3, V, (2, 90))
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    want = eager(model, ids, mask)
    for sizes in ([90], [80, 1, 1, 8], [1] * 90):
        got = in_pieces(made, ids, sizes, mask)
        assert got.isfinite().all()
        assert far(want[mask == 1], got[mask == 1]) < 1e-5


def test_every_instruction_set(isa, llama):
    model, made = llama
    ids = torch.randint(3, V, (2, 100))
    assert far(eager(model, ids), in_pieces(made, ids, [70, 1, 3, 26])) < 1e-5


def test_words_are_their_own_oracle(llama, monkeypatch):
    """Without kernels the same graph runs in torch, cache and all."""
    model, _ = llama
    monkeypatch.setattr(bindings, "missing", lambda: "none")
    made = rarefy.decoder(model)
    assert not any(isinstance(s, FusedSubgraph) for s in made.compiled.schedule)
    ids = torch.randint(3, V, (2, 100))
    assert far(eager(model, ids), in_pieces(made, ids, [70, 1, 3, 26])) < 1e-5


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
def test_a_decoder_says_in_how_many_bits_its_weights_are(llama):
    model = copy.deepcopy(llama[0])
    rarefy.quantize_(model, layers="model.layers.*.mlp.*", weights="int4", group=32)
    text = repr(rarefy.decoder(rarefy.fold_(model), precision="int8"))
    layers = model.config.num_hidden_layers
    assert f"step, {4 * layers + 1} weights in int8, {3 * layers} weights in int4, " in text


def formats(made):
    packed = [k.held[0] for s in made.compiled.schedule if isinstance(s, FusedSubgraph) for k in s.kernels.values()]
    return {(type(p), p.kind) for p in packed if isinstance(p, Bitmask | QuantizedPanels)}


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.parametrize(
    ("sparsity", "quantize", "precision", "found", "most"),
    [
        (0.6, None, None, {(Bitmask, "fp32")}, 1e-5),
        slow_case(0.0, None, "int8", {(QuantizedPanels, "int8")}, 0.05),
        (0.6, None, "int8", {(Bitmask, "int8"), (QuantizedPanels, "int8")}, 0.05),
        slow_case(0.0, {"weights": "int8"}, None, {(QuantizedPanels, "int8"), (Bitmask, "fp32")}, 1e-5),
        slow_case(0.0, {"weights": "int4", "group": 32}, None, {(QuantizedPanels, "int4"), (Bitmask, "fp32")}, 1e-4),
        (0.0, {"weights": "int4", "group": 32}, "int8", {(QuantizedPanels, "int4"), (QuantizedPanels, "int8")}, 0.05),
        slow_case(0.0, SIX_BITS, "int8", {(QuantizedPanels, "int6"), (QuantizedPanels, "int8")}, 0.05),
        (0.0, {"weights": "int6"}, "int8", {(QuantizedPanels, "int6"), (QuantizedPanels, "int8")}, 0.05),
        slow_case(0.0, {"weights": "int5", "group": 32}, None, {(QuantizedPanels, "int5"), (Bitmask, "fp32")}, 1e-4),
        slow_case(0.6, {"weights": "int8"}, "int8", {(Bitmask, "int8"), (QuantizedPanels, "int8")}, 0.05),
    ],
)
def test_formats(isa, sparsity, quantize, precision, found, most):
    """One packed copy serves one token and many: both against eager, and the same bits of rounding in both."""
    model = pruned_to(small(hidden_size=128, intermediate_size=200), sparsity) if sparsity else small(hidden_size=128)
    if quantize:
        rarefy.quantize_(model, layers="model.layers.*", **quantize)
        rarefy.fold_(model)
    made = rarefy.decoder(model, precision=precision)
    assert formats(made) == found
    ids = torch.randint(3, V, (1, 80))
    want = eager(model, ids)
    many, few = made(ids), in_pieces(made, ids, [1, 4, 8, 5, 8, 8] + [1] * 46)
    assert far(want, many) < most
    assert far(want, few) < most
    assert far(many, few) < (1e-4 if precision is None else 0.02)


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.parametrize("width", [200, slow_case(4200)])
def test_rounding_inputs_to_8_bits_loses_hardly_anything(isa, width, tmp_path):
    """On weights that 8 bits hold exactly, what the decoder loses is what it rounds inputs by."""
    model = small(hidden_size=128, intermediate_size=width)
    for layer in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        layer.weight.data = (layer.weight.detach() / scale).round() * scale
    made = rarefy.decoder(model, precision="int8")
    assert all(k.held[0].two_terms for k in made.compiled.kernels.values() if isinstance(k.held[0], QuantizedPanels))
    ids = torch.randint(3, V, (2, 100))
    want = eager(model, ids)
    limit = 0.02 if bindings.scales_blocks(rows=False) else 1e-3
    assert far(want, in_pieces(made, ids, [70, 1, 3, 26])) < limit
    rarefy.save(made, tmp_path / "saved")
    assert far(want, in_pieces(rarefy.load(tmp_path / "saved"), ids, [70, 1, 3, 26])) < limit


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.isa_if(lambda: bindings.scales_blocks(rows=False))  # elsewhere inputs have two terms
@pytest.mark.parametrize("weights", ["int8", "int4", "int4, one scale for 64"])
def test_prompts_and_many_sequences_read_inputs_with_a_scale_for_each_32(isa, weights):
    """The oracle rounds inputs of layers in eager torch; zeros of values take attention in bf16 out of it."""
    hidden, wide = (96, 200) if weights == "int8" else (128, 192)
    model = small(hidden_size=hidden, intermediate_size=wide)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data.zero_()
    if weights != "int8":
        rarefy.quantize_(model, weights="int4", group=32 if weights == "int4" else 64, layers="*_proj", symmetric=False)
        rarefy.fold_(model)
    made = rarefy.decoder(model, precision="int8")
    packed = {k.held[0] for k in made.compiled.kernels.values() if isinstance(k.held[0], QuantizedPanels)}
    assert all(p.two_terms for p in packed)

    def by_blocks(layer, args):
        blocks = torch.nn.functional.pad(args[0], (0, -args[0].shape[-1] % 32)).unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        return ((blocks / step.clamp(min=1e-30)).round() * step).flatten(-2)[..., : args[0].shape[-1]]

    ids = torch.randint(3, V, (2, 70))
    for layer in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        if weights == "int8" or layer is model.lm_head:
            scale = layer.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
            layer.weight.data = (layer.weight.detach() / scale).round() * scale
    sequences = torch.randint(3, V, (19, 9))

    def distances():
        return far(eager(model, ids), made(ids)), far(eager(model, sequences), in_pieces(made, sequences, [1] * 9))

    exact = distances()
    for name, layer in model.named_modules():
        if name.endswith(("gate_proj", "up_proj", "down_proj", "lm_head")):
            layer.register_forward_pre_hook(by_blocks)
    for rounded, unrounded in zip(distances(), exact):
        assert rounded < 0.3 * unrounded and unrounded < 0.02


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.parametrize("weights", slow_except(["int8", "int7", "int6", "int4"], "int8", "int4"))
@pytest.mark.parametrize("sizes", [(128, 192, 1), slow_case((64, 320, 4))], ids=["few keys", "wide"])
def test_grouped_weights_of_few_outputs(isa, sizes, weights):
    """Weights that read inputs exactly where they have a scale for each row, and by blocks where they have groups."""
    hidden, wide, heads = sizes
    model = small(hidden_size=hidden, intermediate_size=wide, num_attention_heads=4, num_key_value_heads=heads)
    rarefy.quantize_(model, weights=weights, group=32, layers="*_proj")
    rarefy.fold_(model)
    made = rarefy.decoder(model, precision="int8")
    ids = torch.randint(3, V, (13, 40))
    want = eager(model, ids)
    assert far(want, made(ids)) < 0.05 and far(want, in_pieces(made, ids, [30, *[1] * 10])) < 0.05
    assert far(want[:1], in_pieces(made, ids[:1], [30, *[1] * 10])) < 0.05


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.parametrize(
    "how",
    slow_except(
        [None, ("int8", 64, True), ("int6", 32, False), ("int5", None, True), ("int4", 32, False), ("int4", 64, True)],
        ("int8", 64, True),
        ("int4", 32, False),
    ),
    ids=str,
)
def test_any_number_of_sequences(isa, how):
    """12 to 32 sequences share a narrow tile: the same sums of rounded inputs as of 33, which share a wide one."""
    model = small(hidden_size=128, intermediate_size=192, num_key_value_heads=2)
    if how is not None:
        rarefy.quantize_(model, weights=how[0], group=how[1], symmetric=how[2], layers="*_proj")
        rarefy.fold_(model)
    made, ids = rarefy.decoder(model, precision="int8"), torch.randint(3, V, (33, 9))
    want = in_pieces(made, ids, [1] * 9)
    assert far(eager(model, ids), want) < 0.02
    for count in (11, 12, 16, 17, 32):
        same = 4e-3 if count >= 12 or not bindings.scales_blocks(rows=True) else 0.02  # a value between two codes
        assert far(want[:count], in_pieces(made, ids[:count], [1] * 9)) < same


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.parametrize("weights", [None, "int4"])
def test_another_instruction_set_on_the_way(weights):
    """Programs are laid out for one instruction set; a call after `bindings.use` has its own."""
    model = small(hidden_size=64)
    if weights is not None:
        rarefy.quantize_(model, weights=weights, group=32, layers="*_proj")
        rarefy.fold_(model)
    made, ids, best = rarefy.decoder(model, precision="int8"), torch.randint(3, V, (2, 20)), bindings.isa()
    want = in_pieces(made, ids, [10, *[1] * 10])
    try:
        for name in ("portable", best, "portable"):
            bindings.use(name)
            assert far(want, in_pieces(made, ids, [10, *[1] * 10])) < 0.05
    finally:
        bindings.use(best)


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.parametrize("activations", ["int8", slow_case("int8-static")])
def test_layers_whose_inputs_are_rounded_run_in_8_bits(activations):
    """Dynamic rounding is done by the kernels; static rounding is an operator of its own, before kernels in fp32."""
    model, ids = small(), torch.randint(3, V, (2, 40))
    static = activations == "int8-static"
    data = [{"input_ids": ids}] if static else None
    rarefy.quantize_(model, activations=activations, layers="model.layers.*", data=data)
    rarefy.fold_(model)
    made = rarefy.decoder(model)
    assert {p.fp32_inputs for k in made.compiled.kernels.values() if isinstance(p := k.held[0], QuantizedPanels)} == {
        static
    }
    assert ("fake_quantize" in made.compiled.counts()[1]) == static and "round" not in made.compiled.counts()[2]
    rounded = eager(model, ids)
    assert far(rounded, made(ids)) < (5e-3 if static else 0.02)  # the next code where a value is between two
    for module in model.modules():
        set_activation_quant_(module, None)
    assert far(eager(model, ids), rounded) > 1e-3  # the hooks were back on the model


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("shape", [(37, 70), slow_case((128, 256))])
def test_unfolded_weights(isa, monkeypatch, kind, shape):
    """Bitmasks of all numbers, odd sizes, bias, residual and activation: many tokens against the weight unpacked."""
    from rarefy.runtime.packing import pack_bitmask, unpack

    W = torch.randn(shape) * (torch.rand(shape) < 0.4)
    packed = pack_bitmask(W, kind)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(*shape[::-1])

        def forward(self, x, more):
            return torch.relu(self.f(x) + more)

    net = Net().eval()
    net.f.weight.data = unpack(packed)
    monkeypatch.setattr("rarefy.compiler.compile.pack_for_batches", lambda *_: packed)
    x, more = torch.randn(3, 50, shape[1]), torch.randn(3, 50, shape[0])
    made = rarefy.compile(net, {"x": x, "more": more}, precision="int8" if kind == "int8" else None)
    assert [type(k.held[0]) for k in made.kernels.values()] == [type(packed)]
    most = {"fp32": 1e-6, "bf16": 5e-3, "int8": 0.02, "int4": 0.02}[kind]  # inputs are rounded too
    for n in (2, 50):
        with torch.no_grad():
            assert far(net(x[:, :n], more[:, :n]), made(x=x[:, :n], more=more[:, :n])) < most


def test_steps_wait_for_what_they_touch(llama):
    """No step runs before what it reads is written, nor writes what an earlier one still reads."""
    _, made = llama
    made(torch.randint(3, V, (1, 70)))
    (first, *_) = [s for s in made.compiled.schedule if isinstance(s, FusedSubgraph)]
    for plans in first.programs.values():
        p = plans[0]
        for k, s in enumerate(p.array):
            for j in range(k):
                clash = any((w or v) and a < d and c < b for a, b, w in p._spans(j) for c, d, v in p._spans(k))
                assert not clash or j < s.depends_on <= k
        assert any(s.depends_on < k for k, s in enumerate(p.array))  # queries, keys and values wait for the same


def test_two_threads_have_a_cache_each(llama):
    model, made = llama
    ids = [torch.randint(3, V, (1, 60)) for _ in range(2)]
    got = [None, None]

    def read(i):
        got[i] = in_pieces(made, ids[i], [40] + [1] * 20)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(2):
        assert far(eager(model, ids[i]), got[i]) < 1e-5


# ---- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 9},
        {"do_sample": True, "top_p": 0.8},
        {"repetition_penalty": 1.7},
    ],
)
def test_text_as_transformers_writes_it(llama, how, same_draws):
    model, made = llama
    ids = torch.randint(3, V, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    torch.manual_seed(3)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=30, **{"do_sample": False, "top_k": 0, **how})
    torch.manual_seed(3)
    assert torch.equal(rarefy.generate(made, ids, attention_mask=mask, max_new_tokens=30, **how), want)


@pytest.mark.slow
def test_real_text():
    model = hf.load_folder(str(builtin.model_folder("smollm2-135m"))).float().eval()
    made = rarefy.decoder(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(builtin.model_folder("smollm2-135m"), padding_side="left")
    batch = tokenizer(["The capital of France is", "Bread is made of"], return_tensors="pt", padding=True)
    want = model.generate(**batch, max_new_tokens=16, do_sample=False)
    got = rarefy.generate(made, batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=16)
    assert torch.equal(got, want)
    assert "Paris" in tokenizer.decode(got[0])


@pytest.mark.slow
def test_seeds_streams_and_ends(llama):
    model, made = llama
    ids = torch.randint(3, V, (1, 5))
    a, b, c = (rarefy.generate(made, ids, max_new_tokens=20, do_sample=True, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    tokens = list(rarefy.stream(made, ids, max_new_tokens=6))
    assert torch.equal(torch.stack(tokens, 1), rarefy.generate(made, ids, max_new_tokens=6)[:, 5:])
    seen = []

    class Streamer:
        def put(self, ids):
            seen.append(ids)

        def end(self):
            seen.append("end")

    out = rarefy.generate(model, ids, max_new_tokens=3, streamer=Streamer())  # a model, which is made a decoder
    assert seen[-1] == "end"
    assert torch.equal(torch.cat([s.flatten() for s in seen[:-1]]), out[0])


def test_sequences_end(llama, monkeypatch):
    _, made = llama
    ids = torch.randint(3, V, (2, 5))
    free = rarefy.generate(made, ids, max_new_tokens=10)
    monkeypatch.setattr(made, "eos_tokens", (int(free[0, 7]),))
    out = rarefy.generate(made, ids, max_new_tokens=10)
    end = int((out[0, 5:] == free[0, 7]).nonzero()[0]) + 5
    assert torch.equal(out[0, : end + 1], free[0, : end + 1])
    assert (out[0, end + 1 :] == made.pad_token).all()
    single = rarefy.generate(made, ids[:1], max_new_tokens=10)
    assert single.shape[1] == end + 1  # all have ended: nothing more is written


def test_choice_by_probability():
    """Draws follow softmax of what top_k and top_p leave."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    none = torch.zeros(20000, 0, dtype=torch.int64)
    p = logits[0].softmax(-1)
    for how, kept in (
        ({}, 4),
        ({"top_k": 2}, 2),
        ({"min_p": 0.2}, 2),
        ({"top_p": float(p[0]) + 0.01}, 2),
        ({"top_p": 0.3}, 1),
    ):
        scores = process(processors(Options(do_sample=True, **how), (), 0, None), none, logits)
        drawn = pick(scores, True, torch.Generator().manual_seed(0))
        share = torch.bincount(drawn, minlength=4) / len(drawn)
        want = torch.where(torch.arange(4) < kept, p, 0.0)
        assert (share - want / want.sum()).abs().max() < 0.02


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "temperature has no effect"),
        ({"seed": 1}, "seed has no effect"),
        ({"do_sample": True, "temperature": 0.0}, "above 0, got 0.0"),
        ({"do_sample": True, "top_k": -1}, "top_k: expected a whole number of at least 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p: expected a probability"),
        ({"repetition_penalty": -1.0}, "repetition_penalty: expected a number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number of at least 1"),
        ({"max_new_tokens": 509}, "has 512 positions: a prompt of 4 tokens and 509 new ones exceed that"),
        ({"num_beam": 4}, "unknown option 'num_beam'; choose from assistant_model, attention_mask, cache_precision"),
        ({"max_new_token": 4}, "(did you mean 'max_new_tokens'?)"),
        ({"precision": "int8"}, "precision is fixed when the decoder is built"),
        ({"attention_mask": torch.ones(1, 3)}, "expected attention_mask of the shape of ids, [1, 4], got [1, 3]"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "padded on the left"),
        (
            {"attention_mask": torch.full((1, 4), 0.5)},
            "expected attention_mask with 0 for padding and 1 for tokens",
        ),
        ({"attention_mask": torch.zeros(1, 4)}, "a prompt is empty"),
    ],
)
def test_wrong_options(llama, options, message):
    with pytest.raises(DataError) as error:
        rarefy.generate(llama[1], torch.randint(3, V, (1, 4)), **options)
    assert message in str(error.value)


def test_wrong_ids(llama):
    _, made = llama
    for ids, message in (
        (torch.zeros(4, dtype=torch.int64), "int64 [batch, tokens], got torch.int64 [4]"),
        (torch.zeros(1, 4), "got torch.float32"),
        (torch.zeros(1, 0, dtype=torch.int64), "[1, 0]"),
        (torch.tensor([[V]]), f"0..{V - 1}, got {V}"),
        (torch.tensor([[-1]]), "got -1"),
    ):
        with pytest.raises(DataError) as error:
            made(ids)
        assert message in str(error.value)
    cache = made.cache(1, 64)
    made(torch.randint(3, V, (1, 60)), cache)
    with pytest.raises(DataError, match="room for 64 tokens; it holds 60, so 5 more are too"):
        made(torch.randint(3, V, (1, 5)), cache)
    assert cache.past == 60
    made(torch.randint(3, V, (1, 4)), cache)  # nothing was lost
    for other in (made.cache(2, 64), Cache(8, 1, 64)):
        with pytest.raises(DataError, match="the cache is of another model|sequences, got"):
            made(torch.randint(3, V, (1, 5)), other)


def test_the_past_may_only_be_set_back():
    made = rarefy.decoder(small())
    cache, ids = made.cache(1, 400), torch.randint(3, V, (1, 100))
    want = made(ids, cache)
    cache.past = 300
    with pytest.raises(DataError, match="the cache has read 128 tokens at most, so its past cannot be 300"):
        made(ids[:, :1], cache)
    cache.past = 40
    assert far(want[:, 40:], made(ids[:, 40:], cache)) < 1e-5


@pytest.mark.parametrize("tokens", [17, 33, 63, 65, 129, 200, 257])
def test_prompts_of_any_length(isa, llama, tokens):
    """They are padded to whole vectors, long ones to whole tiles."""
    model, made = llama
    for batch in (1, 3):
        ids = torch.randint(3, V, (batch, tokens + 20))
        cache = made.cache(batch, tokens + 20)
        got = torch.cat([made(ids[:, :tokens], cache), made(ids[:, tokens:], cache)], 1)
        assert far(eager(model, ids), got) < 1e-4


def test_caches_hold_what_was_asked_for():
    made = rarefy.decoder(small())
    cache = made.cache(1, 4)
    made(torch.ones(1, 3, dtype=torch.int64), cache)
    with pytest.raises(DataError, match="the cache has room for 4 tokens; it holds 3, so 2 more are too"):
        made(torch.ones(1, 2, dtype=torch.int64), cache)
    assert made(torch.ones(1, 1, dtype=torch.int64), cache).shape == (1, 1, V)
    for batch, capacity, told in ((1, 0, "capacity"), (0, 4, "batch"), (1, 8.5, "capacity"), (True, 4, "batch")):
        with pytest.raises(DataError, match=f"{told}: expected a whole number of at least 1, got"):
            made.cache(batch, capacity)
    with pytest.raises(MemoryError, match="not enough memory for a cache of 10,000,000,000,000 tokens of 1 sequences"):
        made.cache(1, 10**13)


def test_what_are_no_ids():
    made = rarefy.decoder(small())
    for ids, told in (
        ([5, 6], "got list"),
        ("hello", "got str"),
        (torch.ones(1, 0, dtype=torch.int64), "the prompt is empty"),
    ):
        for model in (made, small()):
            with pytest.raises(DataError, match=told):
                rarefy.generate(model, ids)
    for model, told in (("decoder/", r"got str: rarefy.load\(folder\) reads one"), (3, "got int")):
        with pytest.raises(ModelError, match=told):
            rarefy.generate(model, torch.ones(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("cache_precision", ["fp32", "int8"])
@pytest.mark.parametrize("family", ["Bloom", slow_case("Mpt")])
def test_position_biases(isa, family, cache_precision, tmp_path):
    """Linear position biases (ALiBi) in prompts, few and single tokens, for a number of heads that is no power of two."""
    sizes = {"n_head": 6, "hidden_size": 96} if family == "Bloom" else {"n_heads": 6, "d_model": 96}
    model = small(family, **sizes)
    step, ids = rarefy.decoder(model, cache_precision=cache_precision), torch.randint(3, V, (3, 150))
    rarefy.save(step, tmp_path / "saved")
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    tolerance = 1e-5 if cache_precision == "fp32" else 0.02
    for engine in (step, rarefy.load(tmp_path / "saved")):
        assert far(eager(model, ids), in_pieces(engine, ids, [70, 1, 2, 1, 76])) < tolerance
        assert far(eager(model, ids[:1]), in_pieces(engine, ids[:1], [140, *[1] * 10])) < tolerance
        got, want = in_pieces(engine, ids, [80, 1, 1, 68], mask), eager(model, ids, mask)
        assert far(want[mask == 1], got[mask == 1]) < tolerance


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("Bloom", {"n_head": 1, "hidden_size": 32}),
        ("Bloom", {"n_head": 7, "hidden_size": 56}),
        ("Mpt", {"n_heads": 3, "d_model": 48, "attn_config": {"clip_qkv": 0.01, "softmax_scale": 0.5}}),
    ],
    ids=["one head", "seven heads", "clipped"],
)
def test_position_biases_of_other_shapes(family, sizes):
    model, ids = small(family, **sizes), torch.randint(3, V, (2, 80))
    assert far(eager(model, ids), in_pieces(rarefy.decoder(model), ids, [60, 1, 19])) < 1e-5


def test_wrong_position_biases_are_noticed(monkeypatch):
    model, ids = small("Bloom"), torch.randint(3, V, (2, 60))
    monkeypatch.setattr("rarefy.model.own_attention.MAX_BIAS", 4.0)
    with pytest.raises(ModelError, match="logits of the decoder of BloomForCausalLM differ"):
        rarefy.decoder(model)
    monkeypatch.setattr(decoder, "verify_decoder", lambda *_: None)
    assert far(eager(model, ids), in_pieces(rarefy.decoder(model), ids, [40, 1, 19])) > 1e-3


def test_modules_of_models_with_position_biases(tmp_path):
    """Forwards of their own stay, subclasses and models cut in width run, and files may leave the prefix out."""
    model, ids, calls = small("Bloom"), torch.randint(3, V, (1, 30)), []
    attention = model.transformer.h[0].self_attention
    inner = attention.forward
    attention.forward = lambda *args, **options: (calls.append(1), inner(*args, **options))[1]
    rarefy.decoder(model)
    calls.clear()
    eager(model, ids)
    assert calls == [1]
    attention.__class__ = type("Mine", (type(attention),), {})
    del attention.forward
    assert far(eager(model, ids), rarefy.decoder(model)(ids)) < 1e-5

    for family, width in (("Bloom", "word_embeddings"), ("Mpt", "wte")):
        narrow = small(family)
        rarefy.cut_(narrow, {"input_ids": ids}, counts={f"transformer.{width}.weight:1": 48}, units="neuron")
        assert far(eager(narrow, ids), rarefy.decoder(narrow)(ids)) < 1e-5

    model = small("Bloom")
    model.save_pretrained(tmp_path / "short")
    file = tmp_path / "short" / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert far(eager(model, ids), rarefy.decoder_from_files(tmp_path / "short")(ids)) < 1e-5


def test_position_biases_of_falcon_are_refused():
    """They are rounded to bf16 there."""
    sizes = {"vocab_size": V, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True}
    model = transformers.AutoModelForCausalLM.from_config(transformers.FalconConfig(**sizes)).eval()
    with pytest.raises(ModelError, match=r"FalconForCausalLM adds position biases \(ALiBi\) in attention of its own"):
        rarefy.decoder(model)


def test_wrong_models():
    with pytest.raises(ModelError, match="expected a language model of transformers, got"):
        rarefy.decoder(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="training mode"):
        rarefy.decoder(small().train())
    with pytest.raises(ModelError, match=r"of one type.*model.float\(\)"):
        mixed = small()
        mixed.lm_head.bfloat16()
        rarefy.decoder(mixed)
    with pytest.raises(ModelError, match="unknown precision 'int3'; choose from bf16, fp32, int8"):
        rarefy.decoder(small(), precision="int3")
    for name in ("eos_token_id", "pad_token_id"):
        model = small(num_hidden_layers=1)
        setattr(model.generation_config, name, "x")
        with pytest.raises(ModelError, match="expected token ids as eos_token_id and pad_token_id, got 'x'"):
            rarefy.decoder(model)
    sinks = transformers.GptOssConfig(
        **GATED, head_dim=16, num_local_experts=2, num_experts_per_tok=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"has attention sinks \(s_aux\), which decoders do not support"):
        rarefy.decoder(transformers.AutoModelForCausalLM.from_config(sinks).eval())


def test_caps_of_logits_change_what_gemma_2_says(tmp_path):
    """A cap that is left out is noticed, in the attention and behind the head, before and after a file."""
    ids = torch.randint(3, V, (2, 40))
    caps = {"attn_logit_softcapping": 0.02, "final_logit_softcapping": 0.1, "num_hidden_layers": 1}
    model = small("Gemma2", **caps)
    step, want = rarefy.decoder(model), eager(model, ids)
    rarefy.save(step, tmp_path / "saved")
    assert "1 capped_cached_attention" in repr(step).partition("in torch")[0]
    for made in (step, rarefy.load(tmp_path / "saved")):
        assert far(want, in_pieces(made, ids, [20, 1, 19])) < 1e-5
    assert all(far(want, eager(small("Gemma2", **caps | {name: None}), ids)) > 1e-4 for name in list(caps)[:2])


@pytest.mark.parametrize(("family", "tokens"), [("GPT2", 2), slow_case("Llama", 20), ("Mpt", 16)])
def test_models_of_few_positions(family, tokens):
    name = {"GPT2": "n_positions", "Mpt": "max_seq_len"}.get(family, "max_position_embeddings")
    model = small(family, **{name: tokens})
    step = rarefy.decoder(model)
    ids = torch.randint(3, V, (2, tokens))
    assert step.max_tokens == tokens and far(eager(model, ids), step(ids)) < 1e-5
    assert in_pieces(step, ids, [1] * tokens).shape == (2, tokens, V)
    if tokens > 1:
        assert rarefy.generate(step, ids[:, :1]).shape == (2, tokens)
    with pytest.raises(DataError, match=f"the model has {tokens} positions: a prompt of {tokens} tokens"):
        rarefy.generate(step, ids)


def test_branches_on_the_number_of_tokens_are_refused_by_name():
    from conftest import tiny_llama

    model = tiny_llama()
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x) * (2 if x.shape[1] % 3 == 0 else 1)
    with pytest.raises(
        ModelError, match=r"other branches for other numbers of tokens or texts \(input_ids.shape\[1\] % 3 "
    ):
        rarefy.decoder(model)


@pytest.mark.slow
def test_recurrent_layers_are_refused_by_name():
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8}
    with pytest.raises(ModelError, match="MambaForCausalLM has recurrent layers in place of attention"):
        rarefy.decoder(transformers.AutoModelForCausalLM.from_config(transformers.MambaConfig(**sizes)).eval())


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        slow_case("Qwen3Moe", {**EXPERTS, "head_dim": 16}),
        ("Mixtral", {"num_local_experts": 4}),
        slow_case("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
        slow_case("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_mixtures_of_experts(family, sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**GATED, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    made, ids = rarefy.compile(model), torch.randint(3, V, (2, 30))
    assert far(eager(model, ids), made(ids)) < 1e-5
    assert far(eager(model, ids), in_pieces(made, ids, [20, 1, 4, 5])) < 1e-5


def test_many_sequences_of_one_token(llama):
    """They are read row by row: the logits of each alone, with padding too."""
    model, made = llama
    ids = torch.randint(3, V, (20, 12))
    mask = torch.ones_like(ids)
    mask[3, :5] = 0
    got = in_pieces(made, ids, [9, 1, 1, 1], mask)
    assert far(eager(model, ids, mask)[mask == 1], got[mask == 1]) < 1e-5
    if bindings.missing() is None:
        (first, *_) = [s for s in made.compiled.schedule if isinstance(s, FusedSubgraph)]
        assert any(p.decode for programs in first.programs.values() for p in programs)


@pytest.mark.slow
def test_attention_is_given_back():
    model = small()
    before = model.config._attn_implementation
    rarefy.decoder(model)
    assert model.config._attn_implementation == before


def test_a_decoder_is_proved(monkeypatch):
    monkeypatch.setattr(program, "OPS", {**program.OPS, "mul": program.OPS["add"]})
    if bindings.missing() is None:
        with pytest.raises(ModelError, match="logits of the decoder of .* differ"):
            decoder.decoder(small())


def tiny_gpt2(positions=40):
    """GPT-2 has a table of positions, and layers that store their weights [inputs, outputs]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=positions, **sizes)).eval()


@pytest.mark.parametrize("positions", [21, 40, 70])
def test_padding_needs_no_positions_of_its_own(positions):
    model, ids = tiny_gpt2(positions), torch.randint(2, 64, (2, positions))
    with torch.no_grad():
        torch.testing.assert_close(rarefy.decoder(model)(ids), model(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"weights": "int8"}, {"weights": "int4", "group": 32}, slow_case({"activations": "int8"})]
)
@pytest.mark.parametrize("precision", [None, "int8"])
def test_grids_of_weights_that_are_stored_the_other_way_round(options, precision):
    model, ids = tiny_gpt2(), torch.randint(2, 64, (2, 24))
    rarefy.quantize_(model, **{"weights": "int8", **options})
    with torch.no_grad():
        want = model(ids).logits
    assert far(want, rarefy.decoder(model, precision=precision)(ids)) < (1e-5 if precision is None else 0.01)


@pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")
@pytest.mark.parametrize("width", [576, 1024, slow_case(4160)])
def test_sums_of_the_largest_codes_and_inputs(isa, width):
    """All inputs of the head are equal, and so are its weights: no product cancels another."""
    model = small(
        hidden_size=width, intermediate_size=64, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.copy_(torch.arange(1, V + 1)[:, None].expand(V, width))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    ids = torch.randint(3, V, (1, 80))
    want = eager(model, ids)
    assert float(want.min()) > 0.99 * width
    assert far(want, in_pieces(rarefy.decoder(model, precision="int8"), ids, [70, 1, 3, 6])) < 1e-4
