"""Decoders in folders: the same bits without the model's class, and nothing believed on the way in."""

import json
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

import rarefy
from helpers.compiled_folders import call, edit, needs_kernels, set_arg, shard
from helpers.folders import SHARD, read_index, seal, write_index
from helpers.language_models import V, eager, far, in_pieces, pruned_to, small
from helpers.marks import slow_case, slow_except
from rarefy.checkpoint import compiled_model
from rarefy.cli import shared
from rarefy.common.errors import ContainerError, FormatError, ModelError
from rarefy.compiler.subgraph import SingleOp
from rarefy.generation.decoder import Decoder
from rarefy.pipeline import train_stage
from rarefy.runtime import bindings
from rarefy.runtime.packed_formats import Bitmask, QuantizedPanels

HOW = {
    "fp32": ({}, 0.6, None, None),
    "int8": ({}, 0.0, None, "int8"),
    "int8 pruned": ({}, 0.6, None, "int8"),
    "int8 tied": ({"tie_word_embeddings": True}, 0.0, None, "int8"),
    "int8 pruned, tied": ({"tie_word_embeddings": True}, 0.6, None, "int8"),
    "int8 grid": ({}, 0.0, {"weights": "int8"}, None),
    "int4 grid": ({"hidden_size": 128}, 0.0, {"weights": "int4", "group": 32}, None),
    "int4 asymmetric": ({"hidden_size": 128}, 0.0, {"weights": "int4", "group": 32, "symmetric": False}, None),
    "int4 and int8": ({"hidden_size": 128}, 0.0, {"weights": "int4", "group": 32}, "int8"),
    "int6 and int8": ({"hidden_size": 128}, 0.0, {"weights": "int6", "group": 32}, "int8"),
    "int5 grid": ({"hidden_size": 128}, 0.0, {"weights": "int5", "group": 32}, None),
}


@cache
def made_of(how):
    config, sparsity, quantize, precision = HOW[how]
    model = small(**config)
    if sparsity:
        pruned_to(model, sparsity)
    if quantize:
        rarefy.quantize_(model, layers="model.layers.*", **quantize)
        rarefy.fold_(model)
    return rarefy.decoder(model, precision=precision)


def same_logits(a, b):
    mask = torch.ones(2, 90, dtype=torch.int64)
    mask[1, :17] = 0
    ids = torch.randint(3, V, (2, 90))
    for sizes in ([90], [70, 1, 2, 1, 16]):
        assert torch.equal(in_pieces(a, ids, sizes, mask), in_pieces(b, ids, sizes, mask))
    assert torch.equal(a(ids[:1, :3], last=True), b(ids[:1, :3], last=True))


@pytest.mark.parametrize("how", slow_except(HOW, "int4 asymmetric", "int6 and int8"))
def test_the_same_bits_of_all_numbers(tmp_path, how):
    made = made_of(how)
    size = rarefy.save(made, tmp_path / "out", files={"tokenizer.json": b"{}"})
    assert size == sum(f.stat().st_size for f in (tmp_path / "out").iterdir() if f.name != "tokenizer.json")
    back = rarefy.load(tmp_path / "out")
    assert type(back) is Decoder and repr(back) == repr(made)
    names = ("vocab_size", "max_tokens", "eos_tokens", "pad_token")
    assert [getattr(back, n) for n in names] == [getattr(made, n) for n in names] == [V, 512, (1,), 0]
    same_logits(made, back)
    ids = torch.randint(3, V, (1, 9))
    assert torch.equal(*(rarefy.generate(d, ids, max_new_tokens=9, do_sample=True, seed=1) for d in (made, back)))
    rarefy.save(back, tmp_path / "out", overwrite=True, compress=True)  # what was loaded can be saved
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    same_logits(made, rarefy.load(tmp_path / "out"))
    held = [k.held[0] for k in made.compiled.kernels.values()]
    assert bindings.missing() is not None or {type(p) for p in held} <= {Bitmask, QuantizedPanels}
    tied = [i for i in back.compiled.schedule if isinstance(i, SingleOp)]
    assert len(tied) == ("tied" in how and bindings.missing() is None)


@pytest.mark.parametrize(
    "family", ["Mistral", *(pytest.param(f, marks=pytest.mark.slow) for f in ("Phi3", "GPT2", "OPT"))]
)
def test_families(tmp_path, family):
    made = rarefy.decoder(small(family))
    rarefy.save(made, tmp_path / "out")
    ids = torch.randint(3, V, (2, 90))
    back = rarefy.load(tmp_path / "out")
    assert torch.equal(in_pieces(made, ids, [80, 1, 9]), in_pieces(back, ids, [80, 1, 9]))


def test_in_a_fresh_process_without_transformers(tmp_path):
    made = made_of("int8 tied")
    rarefy.save(made, tmp_path / "out")
    ids = torch.randint(3, V, (2, 70))
    code = f"""
import sys
import rarefy, torch
from safetensors.torch import load_file, save_file
made, ids = rarefy.load({str(tmp_path / "out")!r}), load_file({str(tmp_path / "ids")!r})["ids"]
cache = made.cache(2, 70)
logits = torch.cat([made(ids[:, :66], cache), made(ids[:, 66:], cache)], 1)
text = rarefy.generate(made, ids, max_new_tokens=5)
assert "transformers" not in sys.modules
save_file({{"logits": logits, "text": text}}, {str(tmp_path / "got")!r})
"""
    save_file({"ids": ids}, tmp_path / "ids")
    subprocess.run([sys.executable, "-c", code], check=True)
    got = load_file(tmp_path / "got")
    assert torch.equal(got["logits"], in_pieces(made, ids, [66, 4]))
    assert torch.equal(got["text"], rarefy.generate(made, ids, max_new_tokens=5))


@pytest.mark.parametrize("how", [slow_case("fp32"), "int8 tied", "int4 asymmetric"])
def test_without_kernels_torch_runs_the_words(tmp_path, monkeypatch, how):
    made = made_of(how)
    rarefy.save(made, tmp_path / "out")
    ids = torch.randint(3, V, (2, 70))
    want = in_pieces(made, ids, [66, 4])
    monkeypatch.setattr(bindings, "missing", lambda: "no compiler")
    back = rarefy.load(tmp_path / "out")
    assert not back.compiled.kernels
    assert far(want, in_pieces(back, ids, [66, 4])) < (0.05 if how == "int8 tied" else 1e-4)
    rarefy.save(back, tmp_path / "again")
    assert torch.equal(rarefy.load(tmp_path / "again")(ids), back(ids))


def test_inspect(tmp_path):
    made = made_of("int8 tied")
    rarefy.save(made, tmp_path / "out")
    report = rarefy.inspect(tmp_path / "out")
    rows = {r["tensor"]: r for r in report.rows}
    assert str(report).startswith(f"{tmp_path / 'out'}: a decoder") and "vocab_size 101, max_tokens 512" in str(report)
    if bindings.missing() is None:
        assert {r["format"] for r in rows.values()} == {"int8:panels", "dense"}
    with pytest.raises(ModelError, match="print it"):
        rarefy.inspect(made)


def test_numbers_of_configs_that_no_logit_is_for():
    model = small()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = -1, [V + 5, 7]
    made = rarefy.decoder(model)
    assert (made.eos_tokens, made.pad_token) == ((7,), 7)
    assert far(eager(model, torch.tensor([[3, 4]])), made(torch.tensor([[3, 4]]))) < 1e-5


@pytest.mark.slow
def test_options_without_effect_and_where_modules_are_asked_for(tmp_path):
    made = made_of("int8")
    with pytest.raises(FormatError, match="has no effect on a compiled model"):
        rarefy.save(made, tmp_path / "out", format="csr")
    rarefy.save(made, tmp_path / "out")
    with pytest.raises(ContainerError, match="model= has no effect: .*leave it out"):
        rarefy.load(tmp_path / "out", small())
    with pytest.raises(ContainerError, match="accelerate= has no effect: .*leave it out"):
        rarefy.load(tmp_path / "out", accelerate=True)
    for to in ("hf", "safetensors"):
        with pytest.raises(ModelError, match="Decoder|compiled from"):
            rarefy.export(tmp_path / "out", tmp_path / "dense", to=to)
    with pytest.raises(ModelError, match="holds a decoder: give the folder of what it was compiled from"):
        shared.load(tmp_path / "out")
    with pytest.raises(ModelError, match="teacher 'out' is a compiled model"):
        train_stage.load_teacher("out", tmp_path, small())


# ---- what is no saved decoder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of bitmasks, panels, a packed embedding and two layers that keep 128 numbers of a token."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    rarefy.save(made_of("int8 pruned, tied"), folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it."""
    (tmp_path / "m").mkdir()
    for file in whole.iterdir():
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "m"


def renumber(folder, **changed):
    index = read_index(folder)
    index["meta"]["decoder"].update(changed)
    write_index(folder, index)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"vocab_size": 0}, "expected eos_tokens and pad_token below vocab_size"),
        ({"vocab_size": 1.5}, "expected eos_tokens and pad_token below vocab_size"),
        ({"vocab_size": True}, "expected eos_tokens and pad_token below vocab_size"),
        ({"vocab_size": 1 << 40}, "expected eos_tokens and pad_token below vocab_size"),
        ({"eos_tokens": [V]}, "expected eos_tokens and pad_token below vocab_size"),
        ({"eos_tokens": ["1"]}, "expected eos_tokens and pad_token below vocab_size"),
        ({"eos_tokens": 1}, "expected eos_tokens and pad_token below vocab_size"),
        ({"eos_tokens": [1] * 2000}, "expected eos_tokens and pad_token below vocab_size"),
        ({"pad_token": -1}, "expected eos_tokens and pad_token below vocab_size"),
        ({"pad_token": None}, "expected eos_tokens and pad_token below vocab_size"),
        ({"max_tokens": 0}, "expected max_tokens as a number of tokens or null"),
        ({"max_tokens": "512"}, "expected max_tokens as a number of tokens or null"),
        ({"cache_features": 64}, "cache_features is 64, but its graph stores 128"),
        ({"cache_features": 1 << 40}, "but its graph stores 128"),
        ({"cache_features": 128.0}, "but its graph stores 128"),
        ({"generation_defaults": [1]}, "generation_defaults: expected options by name"),
        ({"generation_defaults": {"seed": 1}}, "unknown default of text generation 'seed'"),
        ({"generation_defaults": {"temperature": -1.0}}, "temperature: expected a number above 0, got -1.0"),
        ({"generation_defaults": {"top_k": True}}, "top_k: expected a whole number"),
        ({"generation_defaults": {"suppress_tokens": [V]}}, f"suppress_tokens: expected ids below {V}"),
        ({"generation_defaults": {"suppress_tokens": [-1]}}, "suppress_tokens: expected a token id"),
        ({"code": 1}, "decoder: expected vocab_size, max_tokens, eos_tokens, pad_token, cache_features"),
    ],
    ids=str,
)
def test_numbers_that_no_decoder_has(folder, changed, says):
    renumber(folder, **changed)
    with pytest.raises(ContainerError, match=says) as caught:
        rarefy.load(folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(ContainerError):
        rarefy.inspect(folder)


@pytest.mark.parametrize("about", [None, 7, {}, []], ids=str)
def test_graphs_with_a_cache_and_no_decoder(folder, about):
    index = read_index(folder)
    index["meta"]["decoder"] = about
    write_index(folder, index)
    with pytest.raises(ContainerError, match="the index has no decoder|decoder: expected vocab_size"):
        rarefy.load(folder)


def test_a_decoder_without_a_cache_is_none(folder, tmp_path):
    rarefy.save(rarefy.compile(torch.nn.Linear(4, 4).eval(), torch.randn(2, 4)), tmp_path / "plain")
    index = read_index(tmp_path / "plain")
    index["meta"]["decoder"] = read_index(folder)["meta"]["decoder"]
    for kept in (128, 0):
        index["meta"]["decoder"]["cache_features"] = kept
        write_index(tmp_path / "plain", index)
        with pytest.raises(ContainerError, match=f"cache_features is {kept}, but its graph stores 0"):
            rarefy.load(tmp_path / "plain")


def another_recall(told):
    """The second layer's words once more, in the place of the first's in the cache."""
    first, second = [n for n in told["nodes"] if n[2] == "rarefy.cached_attention"]
    second[3][4] = first[3][4]


def weight(told):
    """The name of a weight of a layer."""
    return next(n for n, about in told["packed"].items() if about["format"] == "bitmask")


def odd_panels(**about):
    return lambda told: next(p for p in told["packed"].values() if p["format"] == "panels").update(about)


def embedding_as(name):
    def change(told):
        node = call(told, "rarefy.embedding")
        told["kernels"][node[0]] = weight(told) if name == "a bitmask" else name

    return change


@needs_kernels
@pytest.mark.parametrize("bias", [-1e9, 0.0, 65.0, 8, True, "steep", None])
def test_wrong_position_biases_in_a_file(tmp_path, bias):
    rarefy.save(rarefy.decoder(small("Bloom", n_layer=1)), tmp_path / "saved")
    edit(tmp_path / "saved", set_arg("rarefy.alibi_cached_attention", 9, bias))
    with pytest.raises(ContainerError, match="argument 10: expected a number above 0 and at most 64, got"):
        rarefy.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_arg("rarefy.cached_attention", 4, {"tuple": [32, 64]}), "cannot begin at 32 and 64, after 0 features"),
        (set_arg("rarefy.cached_attention", 4, {"tuple": [0, 0]}), "cannot begin at 0 and 0"),
        (set_arg("rarefy.cached_attention", 4, {"tuple": [32, 0]}), "cannot begin at 32 and 0"),
        (set_arg("rarefy.cached_attention", 4, {"tuple": [0, 48]}), "cannot begin at 64 and 96, after 96 features"),
        (set_arg("rarefy.cached_attention", 4, {"tuple": [0, 1 << 30]}), "cannot begin|but its graph stores"),
        (set_arg("rarefy.cached_attention", 4, {"tuple": [0, 1 << 60]}), "argument 5: expected a pair of whole numbers"),
        (set_arg("rarefy.cached_attention", 4, {"tuple": [-32, 0]}), "argument 5: expected a pair of whole numbers from 0 to"),
        (set_arg("rarefy.cached_attention", 4, [0, 32]), "expected a pair of whole numbers from 0"),
        (another_recall, "cannot begin at 0 and 32, after 64 features"),
        (set_arg("rarefy.cached_attention", 5, 3), "3 heads and 2 heads of keys and values cannot begin"),
        (set_arg("rarefy.cached_attention", 6, 3), "4 heads and 3 heads of keys and values cannot begin"),
        (set_arg("rarefy.cached_attention", 6, 0), "expected a whole number from 1 to 2"),
        (set_arg("rarefy.cached_attention", 7, "wide"), "expected a number"),
        (set_arg("rarefy.cached_attention", 8, -1), "expected a whole number of at least 0"),
        (set_arg("rarefy.cached_attention", 8, 0.5), "expected a whole number of at least 0"),
        (set_arg("rarefy.cached_attention", 3, {"node": "ids"}), "expected the cache"),
        (set_arg("rarefy.cached_attention", 0, {"node": "cache"}), "expected an earlier tensor"),
        (set_arg("aten.unsqueeze.default", 0, {"node": "cache"}), "expected Tensor"),
        (lambda t: call(t, "rarefy.cached_attention")[3].pop(), "expected 9 arguments, got 8"),
        (lambda t: t["nodes"][-1].__setitem__(3, [[{"node": "cache"}]]), "outputs, got cache"),
        (lambda t: t["nodes"][-1].__setitem__(3, [[7]]), "expected a step from ids, positions and keep to logits"),
        (lambda t: t["inputs"][0][1].update(dtype="int32"), "expected a step from ids, positions and keep"),
        (lambda t: t["inputs"][2][1].update(sizes=["s0", "s1"]), "expected a step from ids, positions and keep"),
        (lambda t: t["packed"][weight(t)].update(kind="fp8"), "expected the fields of a packed weight"),
        (lambda t: t["packed"][weight(t)].update(kind="fp32"), "packed 'p_"),
        (lambda t: t["packed"][weight(t)].update(shape=[1 << 20, 1 << 20]), "packed 'p_"),
        (odd_panels(kind="fp32"), "expected the fields of a packed weight"),
        (odd_panels(kind="int4"), "packed 'p_"),
        (odd_panels(kind="int6"), "its codes of 5 and 6 bits lie in another order; compile the model again"),
        (odd_panels(order="pairs"), "unexpected order 'pairs' of the codes"),
        (odd_panels(kind="int6", order="halves"), "unexpected order 'halves' of the codes"),
        (odd_panels(kind="int6", order="pairs"), "packed 'p_"),
        (odd_panels(exact=1), "expected fp32_inputs True or False"),
        (odd_panels(parts=1), "packed 'p_"),
        (odd_panels(parts=False), "expected panels with scales for rows"),
        (odd_panels(more=1), "expected the fields of a packed weight"),
        (embedding_as("a bitmask"), "expected a weight packed as panels, got bitmask|are not the weights"),
        (embedding_as("nobody"), "are not the weights that kernels name"),
        (lambda t: t["grids"].update({call(t, "rarefy.embedding")[0]: [0.5, 9]}), "does not read int8 codes with one"),
        (lambda t: t["kernels"].pop(call(t, "rarefy.embedding")[0]), "is missing: it is neither"),
    ],
)  # fmt: skip
@needs_kernels
def test_graphs_that_no_decoder_has(folder, change, says):
    edit(folder, change)
    with pytest.raises(ContainerError, match=says) as caught:
        rarefy.load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("masks", lambda t: t | 1 << 40),
        ("masks", torch.zeros_like),
        ("starts", lambda t: t + 1),
        ("starts", lambda t: t - 1),
    ],
)
@needs_kernels
def test_bitmasks_that_lead_outside(folder, part, change):
    name = weight(json.loads((folder / compiled_model.GRAPH).read_text()))
    key = f"packed.{name}.{part}.values"
    shard(folder, **{key: change(load_file(folder / SHARD)[key])})
    with pytest.raises(ContainerError, match="is damaged"):
        rarefy.load(folder)


@needs_kernels
def test_panels_without_scales(folder):
    graph = json.loads((folder / compiled_model.GRAPH).read_text())
    name = next(n for n, p in graph["packed"].items() if p["format"] == "panels")
    tensors = load_file(folder / SHARD)
    del tensors[f"packed.{name}.whole.values"]
    save_file(tensors, folder / SHARD)
    index = read_index(folder)
    del index["tensors"][f"packed.{name}.whole"]
    write_index(folder, index)
    seal(folder)
    with pytest.raises(ContainerError, match="expected panels with scales for rows"):
        rarefy.load(folder)


def doubled(dim):
    """A change that gives the first layer's queries, keys and values more sequences, tokens or features."""

    def change(told):
        node = call(told, "rarefy.cached_attention")
        at = told["nodes"].index(node)
        for i in range(3):
            x = node[3][i]
            told["nodes"].insert(at, [f"wide{i}", "call_function", "aten.cat.default", [[x, x], dim], {}])
            node[3][i] = {"node": f"wide{i}"}

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (doubled(0), "room for 3 more tokens of 2 sequences|is inconsistent"),
        (doubled(1), r"room for \d+ more tokens of 1 sequences|is inconsistent"),
        (doubled(2), r"cached_attention\w* cannot run on shapes"),
        (set_arg("rarefy.cached_attention", 5, 8), r"cached_attention\w* cannot run on shapes"),
        (
            set_arg("rarefy.cached_attention", 0, {"node": "linear_1"}),
            r"cached_attention\w* cannot run on shapes|which is not an earlier node",
        ),
    ],
)
@needs_kernels
def test_sizes_that_do_not_fit_the_cache_are_not_run(folder, change, says):
    try:
        edit(folder, change)
        made = rarefy.load(folder)
    except ContainerError as error:
        assert "not an earlier node" in str(error) and "not an earlier node" in says
        return
    for tokens in (3, 40):
        with pytest.raises(ModelError, match=says.replace("for 3", r"for \d+")):
            made(torch.randint(3, V, (1, tokens)), made.cache(1, 64) if tokens == 40 else None)


@needs_kernels
def test_steps_are_for_decoders_alone(folder):
    made = rarefy.load(folder)
    ids, places = torch.randint(3, V, (2, 4)), torch.arange(4)
    with pytest.raises(ModelError, match=r"room for 4 more tokens of 2 sequences: use decoder.cache\(\)"):
        made.compiled(ids, places.repeat(2, 1), places)
    full = made.cache(2, 64)
    full.past = 61
    for other in (made.cache(1, 64), full):
        with pytest.raises(ModelError, match="more tokens of 2 sequences"):
            made.compiled.run_leaves([ids, places.repeat(2, 1), places], other)
