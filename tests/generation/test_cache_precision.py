"""The KV cache in 8 bits: against eager attention to keys and values that torch rounds, and against the cache in torch."""

from functools import cache

import pytest
import torch
from typer.testing import CliRunner

import rarefy
from helpers.folders import read_index, write_index
from helpers.language_models import V, eager, far, in_pieces, small
from helpers.marks import slow_except
from rarefy.cli.main import app
from rarefy.common.errors import ContainerError, DataError
from rarefy.generation.request import generate_ids
from rarefy.runtime import bindings

transformers = pytest.importorskip("transformers")
PIECES = [70, 1, 3, 26, 17, 1, 1, 65, 16]
NATIVE = pytest.mark.skipif(bindings.missing() is not None, reason="no kernels")


def rounded(x):
    """Return numbers [.., head_dim] in 8 bits with a scale for each token and head."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def attend_rounded(module, q, k, v, mask, **options):
    return transformers.AttentionInterface()["sdpa"](module, q, rounded(k), rounded(v), mask, **options)


@cache
def pair(family="Llama", **more):
    """Return a model, and its decoder with a cache in 8 bits; neither is changed."""
    model = small(family, **more)
    return model, rarefy.decoder(model, cache_precision="int8")


@pytest.fixture(scope="module", autouse=True)
def _eager_attention():
    transformers.AttentionInterface.register("rounded", attend_rounded)
    transformers.AttentionMaskInterface.register("rounded", transformers.AttentionMaskInterface()["sdpa"])


def rounding(model):
    """Return logits of a model whose attention rounds keys and values."""
    before = model.config._attn_implementation
    model.set_attn_implementation("rounded")
    return lambda *args: (eager(model, *args), model.set_attn_implementation(before))[0]


@pytest.mark.parametrize("family", slow_except(["Llama", "Mistral", "Qwen3", "GPT2"], "Llama", "GPT2"))
def test_logits_are_those_of_rounded_keys_and_values(isa, family):
    """Prompts, single tokens and a few tokens at once; Mistral has a window, Qwen 3 normalizes keys."""
    model, made = pair(family)
    ids = torch.randint(3, V, (2, sum(PIECES)))
    exact, want = eager(model, ids), rounding(model)(ids)
    got = in_pieces(made, ids, PIECES)
    lost = far(exact, got)
    assert far(want, got) < 0.15 * lost  # single codes differ where a number is between two
    assert far(want, made(ids)) < 0.15 * lost
    assert 1e-4 < lost < 0.02
    assert far(exact, made(ids, made.cache(2, 256, cache_precision="fp32"))) < 1e-5


def test_prompts_padded_on_the_left(isa):
    model, made = pair("Mistral")
    ids, mask = torch.randint(3, V, (2, 150)), torch.ones(2, 150, dtype=torch.int64)
    mask[1, :77] = 0
    want = rounding(model)(ids, mask)
    lost = far(eager(model, ids, mask)[mask == 1], want[mask == 1])
    for sizes in ([150], [80, 1, 1, 8, 60], [90] + [1] * 60):
        got = in_pieces(made, ids, sizes, mask)
        assert got.isfinite().all()
        assert far(want[mask == 1], got[mask == 1]) < 0.15 * lost


@NATIVE
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_torch_reads_and_writes_the_same_cache(family, monkeypatch):
    """A cache that kernels wrote and torch goes on with, and the other way round."""
    model, native = pair(family)
    with monkeypatch.context() as without:
        without.setattr(bindings, "missing", lambda: "none")
        in_torch = rarefy.decoder(model, cache_precision="int8")
    ids = torch.randint(3, V, (2, 100))
    want = in_pieces(in_torch, ids, [70, 1, 29])
    lost = far(want, eager(model, ids))
    assert far(want, in_pieces(native, ids, [70, 1, 29])) < 0.15 * lost
    for first, second in ((native, in_torch), (in_torch, native)):
        cache = first.cache(2, 100)
        logits = [first(ids[:, :70], cache), second(ids[:, 70:71], cache), second(ids[:, 71:], cache)]
        assert far(want, torch.cat(logits, 1)) < 0.15 * lost


@NATIVE
@pytest.mark.parametrize("head_dim", [6, 256])
def test_sizes_of_heads(isa, head_dim):
    model, made = pair(head_dim=head_dim, num_hidden_layers=1)
    ids = torch.randint(3, V, (1, 140))
    want = rounding(model)(ids)
    assert far(want, in_pieces(made, ids, [66, 1, 2, 71])) < 0.2 * far(want, eager(model, ids))


def test_texts():
    """Beams reorder the cache, several texts repeat it, wrong guesses cut it back: the text is that of one by one."""
    _, made = pair()
    ids = torch.randint(3, V, (1, 60)).repeat(1, 2)

    def score(text, prompt):
        logits = made(text[None], made.cache(1, text.shape[0])).log_softmax(-1)[0, prompt - 1 : -1]
        return float(logits.gather(1, text[prompt:, None]).sum())

    options = {"max_new_tokens": 30, "eos_token_id": []}
    alone = rarefy.generate(made, ids, **options)
    guessed = rarefy.generate(made, ids, prompt_lookup_num_tokens=5, details=True, **options)
    assert torch.equal(guessed.sequences, alone) and guessed.guessed > guessed.accepted
    found = rarefy.generate(made, ids.repeat(2, 1), num_beams=3, num_return_sequences=2, details=True, **options)
    for text, beam_score in zip(found.sequences, found.scores):
        assert score(text, 120) / 30 == pytest.approx(float(beam_score), abs=1e-3)
    drawn = rarefy.generate(made, ids, do_sample=True, num_return_sequences=2, seed=1, **options)
    assert score(drawn[0], 120) < score(alone[0], 120)
    assert torch.equal(drawn, rarefy.generate(made, ids, do_sample=True, num_return_sequences=2, seed=1, **options))


def test_memory():
    _, made = pair(head_dim=256, num_hidden_layers=1)
    caches = [made.cache(2, 1000, cache_precision=p) for p in ("fp32", "int8")]
    assert [c.nbytes for c in caches] == [0, 0]  # pages take memory once they are needed
    for each in caches:
        made(torch.randint(3, V, (2, 65)), each)
    whole, coded = (c.nbytes for c in caches)
    assert whole == 4 * caches[0].features * 2 * 128
    assert coded / whole == (256 + 4) / (4 * 256)  # a byte each, and a scale for each token and head
    with pytest.raises(MemoryError, match="not enough memory for a cache of 10,000,000,000,000 tokens"):
        made.cache(1, 10**13, cache_precision="int8")


def test_one_option_everywhere(tmp_path):
    """Decoder, cache, generate and saved folders; the decoder's own is used where a call does not say."""
    model, made = pair()
    ids = torch.randint(3, V, (1, 80))
    assert (made.cache(1, 8).precision, made.cache(1, 8, cache_precision="fp32").precision) == ("int8", "fp32")
    rarefy.save(made, tmp_path / "decoder")
    loaded = rarefy.load(tmp_path / "decoder")
    assert loaded.cache_precision == "int8"
    assert torch.equal(loaded(ids), made(ids))
    plain = rarefy.decoder(model)
    assert plain.cache(1, 8).precision == plain.cache_precision == "fp32"
    seen = []
    plain.cache = lambda *args: seen.append(made.cache(*args)) or seen[-1]
    options = {"max_new_tokens": 4, "cache_precision": "int8"}
    assert torch.equal(rarefy.generate(plain, ids, **options), rarefy.generate(made, ids, max_new_tokens=4))
    rarefy.generate(plain, ids, num_beams=2, **options)
    assert [c.precision for c in seen] == ["int8", "int8"]
    run = CliRunner().invoke(
        app, ["generate", str(tmp_path / "decoder"), "--ids", "5 6 7", "--cache-precision", "fp32"]
    )
    assert run.exit_code == 0, run.output


@pytest.mark.slow
def test_compiled_models_and_decoders_of_files(tmp_path):
    model, made = pair()
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(3, V, (1, 80))
    for other in (
        rarefy.compile(model, cache_precision="int8"),
        rarefy.decoder_from_files(tmp_path / "model", cache_precision="int8"),
        rarefy.decoder_from_files(tmp_path / "model", cache_precision="int8", out=tmp_path / "written"),
        rarefy.load(tmp_path / "written"),
    ):
        assert other.cache_precision == "int8"
        assert torch.equal(other(ids), made(ids))
    with pytest.raises(DataError, match="cache_precision has no effect with an example: leave the example out"):
        rarefy.compile(model, ids, cache_precision="int8")


@pytest.mark.slow
def test_the_command_compile(tmp_path):
    pair()[0].save_pretrained(tmp_path / "model")
    small("GPT2").save_pretrained(tmp_path / "gpt2")  # is loaded as a whole
    for name in ("model", "gpt2"):
        options = [str(tmp_path / name), "--cache-precision", "int8", "-o", str(tmp_path / f"{name}-out")]
        run = CliRunner().invoke(app, ["compile", *options])
        assert run.exit_code == 0, run.output
        assert rarefy.load(tmp_path / f"{name}-out").cache_precision == "int8"


@pytest.mark.parametrize("value", ["int4", "INT8", "", 8, True, ["int8"]])
def test_unknown_precisions(value, tmp_path):
    model, made = pair()
    for call in (
        lambda: rarefy.decoder(model, cache_precision=value),
        lambda: rarefy.compile(model, cache_precision=value),
        lambda: rarefy.decoder_from_files(tmp_path, cache_precision=value),
        lambda: rarefy.generate(model, torch.ones(1, 3, dtype=torch.int64), cache_precision=value),
        lambda: made.cache(1, 8, cache_precision=value),
    ):
        with pytest.raises(DataError, match="unknown cache_precision .*; choose from fp32, int8"):
            call()


def test_heads_of_odd_sizes_are_refused():
    model = small("GPT2", n_embd=60, n_head=4)
    with pytest.raises(DataError, match="cache_precision: int8 needs heads of an even size, got 15"):
        rarefy.decoder(model, cache_precision="int8")
    made = rarefy.decoder(model)
    with pytest.raises(DataError, match="int8 needs heads of an even size, got 15: leave it out for fp32"):
        rarefy.generate(made, torch.ones(1, 3, dtype=torch.int64), cache_precision="int8")


def test_caches_of_other_heads_are_refused():
    """As many features, but fewer scales than kernels would read."""
    made, other = pair(num_key_value_heads=4)[1], pair(num_key_value_heads=2, head_dim=32)[1]
    with pytest.raises(DataError, match="the cache is of another model"):
        made(torch.ones(1, 3, dtype=torch.int64), other.cache(1, 8, cache_precision="int8"))


@pytest.mark.parametrize("value", ["int4", 8, None, ["int8"]])
def test_files_with_other_precisions_are_refused(value, tmp_path):
    rarefy.save(pair()[1], tmp_path / "decoder")
    index = read_index(tmp_path / "decoder")
    assert index["meta"]["decoder"]["cache_precision"] == "int8"
    index["meta"]["decoder"]["cache_precision"] = value
    write_index(tmp_path / "decoder", index)
    with pytest.raises(ContainerError, match="unknown cache_precision"):
        rarefy.load(tmp_path / "decoder")


@pytest.mark.parametrize("command", [["generate", "nowhere", "--ids", "5"], ["compile", "nowhere", "-o", "out"]])
def test_the_command_line_checks_before_it_loads(command):
    run = CliRunner().invoke(app, [*command, "--cache-precision", "int4"])
    name = "--cache-precision" if command[0] == "generate" else "cache_precision"
    assert run.exit_code != 0 and f"unknown {name} 'int4'" in str(run.exception or run.output) + run.output


def test_encoders_have_no_cache(tmp_path):
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    command = ["compile", str(tmp_path / "bert"), "-o", str(tmp_path / "out"), "--tokens", "8"]
    run = CliRunner().invoke(app, [*command, "--cache-precision", "int8"])
    message = str(run.exception or "") + run.output
    assert run.exit_code != 0 and "--cache-precision has no effect: " in message and not (tmp_path / "out").exists()


class Counted:
    """A decoder that counts the tokens that it reads."""

    def __init__(self, made):
        self.made, self.read = made, 0

    def __getattr__(self, name):
        return getattr(self.made, name)

    def __call__(self, ids, cache=None, *, last=False):
        self.read += ids.numel()
        return self.made(ids, cache, last=last)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_sequences_share_the_pages_with_which_they_begin(precision):
    """Caches whose rows were repeated and chosen again, against caches that read the same tokens by themselves."""
    made = rarefy.decoder(pair()[0], cache_precision=precision)
    ids = torch.randint(3, V, (2, 150))
    cache = made.cache(2, 400)
    made(ids, cache)
    page = cache.nbytes / 6
    many = cache.repeated(4)
    assert many.nbytes == cache.nbytes and many.past == 150
    rows = ids.repeat_interleave(4, 0)
    new = torch.randint(3, V, (8, 30))
    for i in range(30):
        made(new[:, i : i + 1], many)
    assert many.nbytes == page * (2 * 2 + 8)  # two whole pages of each prompt, and one of each text
    chosen = torch.tensor([0, 0, 3, 3, 5, 6, 6, 6])
    many.select_(chosen)
    assert many.nbytes == page * (2 * 2 + 4)  # of four texts that went on
    rows, more = torch.cat([rows, new], 1)[chosen], torch.randint(3, V, (8, 40))
    got = torch.cat([made(more[:, i : i + 1], many) for i in range(40)], 1)
    fresh = made.cache(8, 400)
    made(rows, fresh)
    want = torch.cat([made(more[:, i : i + 1], fresh) for i in range(40)], 1)
    assert far(want, got) < (1e-5 if precision == "fp32" else 0.02)
    many.past -= 100  # back into pages that texts share
    made(torch.full((8, 20), 7), many)
    fresh.past -= 100
    assert far(made(more[:, :1], many), _reread(made, fresh, more[:, :1])) < (1e-5 if precision == "fp32" else 0.02)


def _reread(made, cache, ids):
    made(torch.full((8, 20), 7), cache)
    return made(ids, cache)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_prompts_that_begin_alike_are_read_once(precision):
    plain, kept = rarefy.decoder(pair()[0], cache_precision=precision), rarefy.PromptCache()
    counted = Counted(plain)
    system, options = torch.randint(3, V, (1, 100)), {"max_new_tokens": 20, "eos_token_id": []}
    texts, read = [], []
    for _ in range(3):
        prompt = torch.cat([texts[-1] if texts else system, torch.randint(3, V, (1, 9))], 1)
        before = counted.read
        texts.append(generate_ids(counted, prompt, prompt_cache=kept, **options))
        read.append(counted.read - before)
        assert torch.equal(texts[-1], plain.generate(prompt, **options))
        assert kept.ids == texts[-1][0, :-1].tolist()
    assert read == [109 + 19, 138 - 128 + 19, 167 - 128 + 19] and kept.reused == 128
    other = torch.cat([system, torch.randint(3, V, (1, 5))], 1).repeat(3, 1)
    before = counted.read
    several = generate_ids(counted, other, prompt_cache=kept, **options)
    assert torch.equal(several, plain.generate(other, **options)) and counted.read - before == 3 * (105 - 64 + 19)
    beams = generate_ids(counted, other[:1], num_beams=3, prompt_cache=kept, **options)
    assert torch.equal(beams, plain.generate(other[:1], num_beams=3, **options)) and kept.reused == 64
    drawn = {"num_return_sequences": 2, "do_sample": True, "seed": 1, **options}
    assert torch.equal(generate_ids(counted, other[:1], prompt_cache=kept, **drawn), plain.generate(other[:1], **drawn))
    guessed = generate_ids(counted, other[:1], prompt_lookup_num_tokens=4, prompt_cache=kept, **options)
    assert torch.equal(guessed, several[:1])


class AlwaysRight:
    """A decoder that guesses a text, and one wrong token behind it."""

    def __init__(self, made, text):
        self.made, self.text, self.vocab_size, self.max_tokens = made, text, made.vocab_size, made.max_tokens
        self.cache = made.cache

    def __call__(self, ids, cache, last=False):
        logits = self.made(ids, cache, last=last).clone()
        logits[0, -1, int(self.text[cache.past]) if cache.past < len(self.text) else 9] = 99.0
        return logits


def test_guesses_that_nobody_read_are_not_kept():
    """A text that ends, or is closed, inside a block of guesses."""
    made = rarefy.decoder(pair()[0])
    ids = torch.randint(3, V, (1, 60))
    free = made.generate(ids, max_new_tokens=12, eos_token_id=[])
    end, more = int(free[0, 65]), torch.randint(3, V, (1, 6))
    text = free[0].clone()
    text[66:] = 7  # wrong guesses behind the end
    for stop in ({"eos_token_id": [end]}, {"eos_token_id": []}):
        kept = rarefy.PromptCache()
        call = {"assistant_model": AlwaysRight(made, text), "num_assistant_tokens": 9, "prompt_cache": kept}
        stream = made.stream(ids, max_new_tokens=12, **call, **stop)
        read = [int(next(stream)) for _ in range(free[0, 60:66].tolist().index(end) + 1)]
        stream.close()
        assert kept.ids == free[0, : len(kept.ids)].tolist() and len(kept.ids) <= 60 + len(read)
        prompt = torch.cat([ids, torch.tensor([read]), more], 1)
        got = made.generate(prompt, max_new_tokens=12, eos_token_id=[], prompt_cache=kept)
        assert kept.reused in (0, 64) and torch.equal(got, made.generate(prompt, max_new_tokens=12, eos_token_id=[]))


def test_what_a_prompt_cache_does_not_keep():
    model, made = pair()
    kept, ids, options = rarefy.PromptCache(), torch.randint(3, V, (2, 129)), {"max_new_tokens": 5, "eos_token_id": []}
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    made.generate(ids, attention_mask=mask, prompt_cache=kept, **options)
    assert kept.ids == []  # prompts with padding
    with pytest.raises(
        DataError, match="expected attention_mask with 0 for padding and 1 for tokens, got other numbers"
    ):
        made.generate(ids, attention_mask=mask + 1, prompt_cache=kept, **options)
    made.generate(ids[:1], prompt_cache=kept, **options)
    other = rarefy.decoder(model)
    other.generate(ids[:1], prompt_cache=kept, **options)
    assert kept.reused == 0  # of another decoder
    same = other.generate(ids[:1], prompt_cache=kept, **options)
    assert kept.reused == 128 and torch.equal(
        same, other.generate(ids[:1], **options)
    )  # a token is read for its logits
    stream = other.stream(ids[:1], prompt_cache=kept, **options)
    next(stream)
    with pytest.raises(DataError, match="prompt_cache is in use by a text that has not ended"):
        other.generate(ids[:1], prompt_cache=kept, **options)
    stream.close()
    other.generate(ids[:1], prompt_cache=kept, **options)

    def no_memory(*args):
        raise MemoryError

    third = rarefy.decoder(model)
    third.cache = no_memory
    with pytest.raises(MemoryError):
        third.generate(ids[:1], prompt_cache=kept, **options)
    del third.cache
    assert torch.equal(third.generate(ids[:1], prompt_cache=kept, **options), third.generate(ids[:1], **options))
    with pytest.raises(DataError, match="prompt_cache: expected a rarefy.PromptCache, got dict"):
        other.generate(ids[:1], prompt_cache={}, **options)
