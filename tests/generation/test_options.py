"""Options of text generation: the text of transformers' own `generate`, stops, log probabilities, beams, guesses."""

import pytest
import torch

import rarefy
from helpers.language_models import V, eager, small
from rarefy.common.errors import DataError
from rarefy.generation.logits import keep_top_p
from rarefy.generation.loop import draw
from rarefy.generation.options import MODEL_DEFAULTS, model_defaults, resolve
from rarefy.generation.speculation import Lookup
from rarefy.generation.tokenization import StopText

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("same_draws")
PROMPTS = torch.randint(3, V, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(PROMPTS)
MASK[0, :5] = 0
LAYERS = 4  # of SmolLM2, of 30


@pytest.fixture(scope="module")
def llama():
    model = small()
    return model, rarefy.compile(model)


def both(llama, **options):
    """Return the text of transformers and ours with the same options and random numbers."""
    model, decoder = llama
    torch.manual_seed(3)
    defaults = {"do_sample": False, "top_k": 0 if options.get("do_sample") else None}
    want = model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=24, **{**defaults, **options})
    torch.manual_seed(3)
    return want, rarefy.generate(decoder, PROMPTS, attention_mask=MASK, max_new_tokens=24, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "min_p": 0.3},
        {"do_sample": True, "top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7, "repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2, "suppress_tokens": [1, 5]},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 4},
        {"num_beams": 3, "early_stopping": True, "length_penalty": 0.4, "num_return_sequences": 2},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 1.4, "repetition_penalty": 1.2},
        {"num_beams": 3, "do_sample": True, "top_k": 30, "top_p": 0.9},
    ],
    ids=str,
)
def test_text_is_that_of_transformers(llama, options):
    assert torch.equal(*both(llama, **options))


def test_prompts_as_tokenizers_return_them(llama):
    _, decoder = llama
    want = rarefy.generate(decoder, PROMPTS, max_new_tokens=8)
    inputs = {"input_ids": PROMPTS, "attention_mask": torch.ones_like(PROMPTS)}
    assert torch.equal(rarefy.generate(decoder, **inputs, max_new_tokens=8), want)
    assert torch.equal(decoder.generate(**inputs, max_new_tokens=8), want)
    streamed = torch.stack(list(decoder.stream(**inputs, max_new_tokens=8)), 1)
    assert torch.equal(streamed, want[:, PROMPTS.shape[1] :])
    assert torch.equal(torch.stack(list(rarefy.stream(decoder, **inputs, max_new_tokens=8)), 1), streamed)
    for call in (decoder.generate, lambda *args, **options: list(decoder.stream(*args, **options))):
        with pytest.raises(DataError, match="expected prompts: ids, or input_ids as a tokenizer returns them"):
            call()
        with pytest.raises(DataError, match="ids and input_ids are two names of the prompts: pass one of them"):
            call(PROMPTS, input_ids=PROMPTS)
        with pytest.raises(DataError, match="token_type_ids has no effect on these models: leave it out"):
            call(**inputs, token_type_ids=torch.zeros_like(PROMPTS))


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("p", [0.05, 0.8, 0.999])
def test_top_p_of_a_large_vocabulary(spread, p):
    """All scores in order are the oracle, where a few tokens add up to p and where nearly all are needed."""
    scores = spread * torch.randn(3, 7000)
    ascending, order = scores.sort()
    unlikely = ascending.double().softmax(-1).cumsum(-1) <= 1 - p
    unlikely[:, -2:] = False
    want = ~unlikely.scatter(1, order, unlikely)
    got = keep_top_p(PROMPTS, scores, p, 2)
    assert ((got > float("-inf")) ^ want).sum() <= 3  # a token on the bound
    assert torch.equal(got.clamp(min=-99), scores.where(got > float("-inf"), torch.tensor(-99.0)))


def test_draws_follow_their_probabilities():
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0]]).expand(20000, 6)
    drawn = draw(probabilities, torch.Generator().manual_seed(0))
    assert (torch.bincount(drawn, minlength=6) / 20000 - probabilities[0]).abs().max() < 0.01
    assert set(drawn.tolist()) == {1, 3, 4}


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_draw_nothing(wrong, llama):
    def spoil(ids, scores):
        return scores.index_fill(1, torch.tensor([5]), wrong)

    with pytest.raises(
        DataError, match="no token can be drawn: scores are NaN or infinite, by the model, a processor or"
    ):
        rarefy.generate(llama[1], PROMPTS, do_sample=True, logits_processor=spoil, max_new_tokens=4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"num_beams": 4, "early_stopping": True}], ids=str)
def test_texts_that_end(llama, options):
    """Several tokens end texts, some before `min_new_tokens` would."""
    free = rarefy.generate(llama[1], PROMPTS, attention_mask=MASK, max_new_tokens=24)
    ends = [int(free[0, 18]), int(free[1, 15]), 9]
    model, decoder = llama
    for more in ({}, {"min_new_tokens": 8}):
        call = {"attention_mask": MASK, "max_new_tokens": 24, "eos_token_id": ends, **more, **options}
        want = model.generate(PROMPTS, do_sample=False, pad_token_id=ends[0], **call)
        text = decoder.generate(PROMPTS, **call)
        for a, b in zip(want[:, 12:].tolist(), text[:, 12:].tolist(), strict=True):
            cut = next((i + 1 for i, t in enumerate(a) if t in ends), len(a))
            assert a[:cut] == b[:cut] and set(b[cut:]) <= {decoder.pad_token}


def test_processors_and_criteria_of_transformers(llama):
    from transformers import LogitsProcessorList, StoppingCriteriaList, TypicalLogitsWarper
    from transformers.generation import MaxTimeCriteria

    def ends_with_even(ids, scores):
        return ids[:, -1] % 20 == 0

    processors = LogitsProcessorList([TypicalLogitsWarper(0.5)])
    for processor in (processors, processors[0]):
        want, text = both(
            llama,
            do_sample=True,
            logits_processor=processor if processor is processors else LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([ends_with_even, MaxTimeCriteria(100)]),
        )
        assert torch.equal(want, text)
    with pytest.raises(DataError, match=r"logits_processor <lambda>: expected scores \[1, 101\], got NoneType"):
        rarefy.generate(llama[1], PROMPTS[:1], logits_processor=lambda ids, scores: None)
    with pytest.raises(DataError, match="logits_processor: expected functions of ids and scores, got int"):
        rarefy.generate(llama[1], PROMPTS[:1], logits_processor=[3])
    with pytest.raises(DataError, match=r"stopping_criteria <lambda>: expected a bool for each of 1 texts, got int"):
        rarefy.generate(llama[1], PROMPTS[:1], stopping_criteria=lambda ids, scores: 1)
    assert rarefy.generate(llama[1], PROMPTS, stopping_criteria=[lambda ids, scores: True]).shape == (2, 13)


def test_log_probabilities(llama):
    """They are those of the model's own logits, whatever the processors."""
    model, decoder = llama
    options = {"max_new_tokens": 9, "do_sample": True, "seed": 1, "temperature": 2.0, "repetition_penalty": 1.5}
    result = decoder.generate(PROMPTS, details=True, logprobs=3, num_return_sequences=2, **options)
    assert result.sequences.shape == (4, 21) and result.finish_reasons == ("length",) * 4
    want = eager(model, result.sequences)[:, 11:-1].log_softmax(-1)
    chosen = want.gather(2, result.sequences[:, 12:, None])[..., 0]
    torch.testing.assert_close(result.logprobs, chosen, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.top_logprobs, want.topk(3).values, atol=1e-4, rtol=1e-4)
    assert result.top_tokens.shape == (4, 9, 3) and result.acceptance is None
    assert decoder.generate(PROMPTS, details=True, num_beams=2, max_new_tokens=3).scores.shape == (2,)


def test_penalties_of_new_tokens(llama):
    """What was generated is less likely, by its count; what the prompt holds is not."""
    _, decoder = llama
    for options in ({"presence_penalty": 1e4}, {"frequency_penalty": 1e4}):
        new = decoder.generate(PROMPTS, max_new_tokens=60, eos_token_id=[], **options)[:, 12:]
        assert all(len(set(row)) == 60 for row in new.tolist())
        assert set(new[0].tolist()) & set(PROMPTS[0].tolist())
    negative = decoder.generate(PROMPTS, max_new_tokens=20, frequency_penalty=-1e4, eos_token_id=[])[:, 12:]
    assert all(len(set(row)) == 1 for row in negative.tolist())


class Letters:
    """A tokenizer of letters: id 3 is "a"."""

    def get_added_vocab(self):
        return {"<end>": 1}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(ord("a") + (i - 3) % 26) for i in ids if i > 2)


def test_stop_strings(llama):
    _, decoder = llama
    free = decoder.generate(PROMPTS, max_new_tokens=24, eos_token_id=[])
    text = Letters().decode(free[0, 12:].tolist(), True)
    stop = text[6:9]
    call = {"max_new_tokens": 24, "eos_token_id": [], "tokenizer": Letters(), "details": True}
    result = decoder.generate(PROMPTS[:1], stop_strings=[stop, "<end>"], **call)
    assert result.finish_reasons == ("stop",)
    assert Letters().decode(result.sequences[0, 12:].tolist(), True) == text[: text.index(stop) + 3]
    in_prompt = Letters().decode(PROMPTS[0, 3:6].tolist(), True)
    assert in_prompt not in text
    assert decoder.generate(PROMPTS[:1], stop_strings=in_prompt, **call).finish_reasons == ("length",)
    by_token = decoder.generate(PROMPTS[:1], max_new_tokens=24, stop_tokens=int(free[0, 15]))
    assert by_token.shape[1] <= 16 and by_token[0, -1] == free[0, 15]
    with pytest.raises(DataError, match="stop_strings needs a tokenizer"):
        decoder.generate(PROMPTS, stop_strings="a")


def test_text_before_a_stop_string():
    shown = StopText(["END", "\n\n"])
    pieces = [shown.add(p) for p in ("one E", "N", "d two", "\n", "three\n", "\nfour")]
    assert pieces == ["one ", "", "ENd two", "", "\nthree", ""] and shown.stopped
    assert (shown.add("five"), shown.rest()) == ("", "")
    cut = StopText(["END"])
    assert cut.add("the EN") + cut.rest() == "the EN"


# ---- guesses


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 1}, {"repetition_penalty": 1.1}], ids=str)
def test_guesses_change_no_text(llama, options):
    _, decoder = llama
    ids = PROMPTS[:1].repeat(1, 4)
    call = {"max_new_tokens": 60, **options}
    want = decoder.generate(ids, details=True, logprobs=2, **call)
    for count in (1, 3, 7, 12):
        result = decoder.generate(ids, prompt_lookup_num_tokens=count, details=True, logprobs=2, **call)
        assert torch.equal(result.sequences, want.sequences)
        torch.testing.assert_close(result.logprobs, want.logprobs, atol=1e-4, rtol=1e-4)
        assert options or (result.guessed > 10 and result.acceptance > 0.5)
    result = decoder.generate(ids, assistant_model=decoder, details=True, **call)
    assert torch.equal(result.sequences, want.sequences) and (options or result.acceptance == 1)
    draft = Wrong(decoder)
    result = decoder.generate(ids, assistant_model=draft, num_assistant_tokens=4, details=True, **call)
    assert torch.equal(result.sequences, want.sequences) and 0 < result.acceptance < 1


class Wrong:
    """A decoder of the same model that is wrong at every third place."""

    def __init__(self, decoder):
        self.decoder, self.vocab_size = decoder, decoder.vocab_size
        self.cache, self.max_tokens = decoder.cache, decoder.max_tokens

    def __call__(self, ids, cache, last):
        logits = self.decoder(ids, cache, last=last)
        return -logits if cache.past % 3 == 0 else logits


def test_lookup():
    lookup = Lookup(4, 2)
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 1, 2, 5, 6]])
    assert lookup.propose(ids, 9).tolist() == [[1, 2, 5, 6]]  # behind the latest 5, 6
    assert lookup.propose(ids, 1).tolist() == [[1]] and lookup.propose(ids, 0).numel() == 0
    lookup.accept(4, 1)
    assert lookup.propose(ids, 9).shape == (1, 3)  # guesses one less after a wrong guess
    assert lookup.propose(torch.tensor([[1, 2, 3]]), 9).numel() == 0
    assert lookup.propose(torch.tensor([[3, 1, 7, 8, 1]]), 9).tolist() == [[7, 8, 1]]  # the last token alone
    assert (lookup.guessed, lookup.accepted) == (4, 1)


# ---- what the model says


def test_generation_config_gives_the_defaults(tmp_path):
    model = small()
    values = {"do_sample": True, "temperature": 0.6, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.1}
    model.generation_config.update(**values, eos_token_id=[1, 7], typical_p=0.5, max_new_tokens=9, suppress_tokens=[4])
    decoder = rarefy.compile(model)
    assert "typical_p is not supported and has no effect" in repr(decoder)
    rarefy.save(decoder, tmp_path / "saved")
    model.generation_config.typical_p = None
    for made in (decoder, rarefy.load(tmp_path / "saved")):
        assert made.generation_defaults == {**values, "max_new_tokens": 9, "suppress_tokens": (4,)}
        assert made.eos_tokens == (1, 7)
        torch.manual_seed(2)
        want = model.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS))
        torch.manual_seed(2)
        assert torch.equal(made.generate(PROMPTS), want)
        greedy = made.generate(PROMPTS, do_sample=False, repetition_penalty=1.0, max_new_tokens=5)
        assert torch.equal(greedy, model.generate(PROMPTS, do_sample=False, repetition_penalty=1.0, max_new_tokens=5))
    other = transformers.GenerationConfig(max_new_tokens=3)
    assert made.generate(PROMPTS, generation_config=other).shape == (2, 15)


def test_a_generation_config_of_a_call_sets_ends_and_beams(llama):
    Config = transformers.GenerationConfig
    model, decoder = llama
    free = decoder.generate(PROMPTS, max_new_tokens=9, eos_token_id=[])
    for options in (
        {"eos_token_id": int(free[0, 14])},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    ):
        torch.manual_seed(3)
        want = decoder.generate(PROMPTS, max_new_tokens=9, **options)
        torch.manual_seed(3)
        assert torch.equal(decoder.generate(PROMPTS, generation_config=Config(max_new_tokens=9, **options)), want)
    for config, message in (
        ({"max_new_tokens": 9}, "generation_config: expected one of transformers, got dict"),
        (Config(do_sample=True, typical_p=0.5), "generation_config: typical_p is not supported"),
        (Config(max_length=30), "generation_config: max_length is not supported .*: set max_new_tokens"),
    ):
        for each in (decoder, model):  # also before a model becomes a decoder
            with pytest.raises(DataError, match=message):
                rarefy.generate(each, PROMPTS, generation_config=config)


def test_a_text_that_has_ended_needs_no_token_to_choose_from(llama):
    decoder = llama[1]
    free = decoder.generate(PROMPTS, max_new_tokens=6, eos_token_id=[])
    end = next(int(t) for t in free[0, 12:17] if t not in free[1, 12:])
    last = free[0].tolist().index(end, 12)

    def nothing_after(ids, scores):
        return scores.masked_fill((ids[:, 12:] == end).any(1, keepdim=True), float("-inf"))

    text = decoder.generate(PROMPTS, max_new_tokens=6, eos_token_id=end, logits_processor=nothing_after)
    assert torch.equal(text[1], free[1]) and text[0, last + 1 :].tolist() == [0] * (17 - last)


def test_a_draft_model_with_fewer_positions(llama):
    draft = rarefy.compile(small("GPT2", n_positions=32))
    call = {"max_new_tokens": 30, "eos_token_id": []}
    for prompt in (PROMPTS[:1], PROMPTS.repeat(1, 2).reshape(1, -1)):  # shorter and longer than its positions
        want = llama[1].generate(prompt, **call)
        assert torch.equal(llama[1].generate(prompt, assistant_model=draft, **call), want)


def test_texts_of_a_beam_search_end_before_the_padding(llama):
    """On the command line texts are cut where the search ended them, also by a stop string."""
    from rarefy.cli.generate_output import Text, run_steps

    free = llama[1].generate(PROMPTS, num_beams=3, num_return_sequences=3, max_new_tokens=12, eos_token_id=[])
    stop = Letters().decode([int(free[0, 15])], True)
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12, "stop_strings": (stop,)}
    texts = [Text(p, Letters(), [stop]) for p in PROMPTS.tolist() for _ in range(3)]
    run_steps(llama[1], PROMPTS, {**options, "tokenizer": Letters()}, texts, False)
    ended = [t for t in texts if t.ended]
    assert ended and len({len(t.ids) for t in texts}) > 1
    for text in texts:
        assert not text.ended or Letters().decode(text.ids[-1:], True) == stop
        assert stop not in "".join(text.pieces)


def test_defaults_that_are_not_usable():
    config = transformers.GenerationConfig(do_sample=True, top_p=0.9)
    config.temperature, config.num_beams = 0.0, 4
    defaults, notes = model_defaults(config)
    assert defaults == {"top_p": 0.9} and len(notes) == 2
    assert "temperature: expected a number above 0" in notes[0] and "num_beams is not supported" in notes[1]
    assert model_defaults(None) == ({}, ())
    assert resolve({}, {"max_new_tokens": 7}).max_new_tokens == 7 and set(defaults) <= set(MODEL_DEFAULTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 0.1}, "min_p has no effect on the most likely token"),
        (
            {"min_new_tokens": 9, "max_new_tokens": 8},
            "min_new_tokens: expected at most max_new_tokens, which is 8, got 9",
        ),
        ({"min_new_tokens": 129}, "min_new_tokens: expected at most max_new_tokens, which is 128, got 129"),
        ({"do_sample": "yes"}, "do_sample: expected True or False, got 'yes'"),
        ({"do_sample": True, "min_p": 1.5}, "min_p: expected a probability from 0 to 1, got 1.5"),
        ({"do_sample": True, "seed": 2**64}, "seed: expected at most 2^63 - 1, got 18446744073709551616"),
        ({"presence_penalty": float("nan")}, "presence_penalty: expected a number, got nan"),
        ({"temperature": "hot"}, "temperature: expected a number above 0, got hot"),
        ({"early_stopping": True}, "early_stopping has no effect without a beam search"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping: expected True, False or 'never', got 'soon'"),
        ({"num_beams": 2, "num_return_sequences": 3}, "returns at most 2 texts, got 3"),
        ({"num_return_sequences": 2}, "would return the same text 2 times"),
        ({"num_beams": 2, "logprobs": 1, "details": True}, "logprobs has no effect on a beam search"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 1}, "prompt_lookup_num_tokens has no effect on a beam search"),
        ({"logprobs": 2}, "logprobs has no effect on ids alone: pass details=True"),
        ({"num_beams": 2, "streamer": 1}, "streamer: a beam search has no text before it ends"),
        ({"stop_strings": [""]}, "stop_strings: expected strings that are not empty"),
        ({"stop_tokens": "a"}, "stop_tokens: expected a token id or a list of them, got 'a'"),
        ({"stop_tokens": [V]}, f"expected ids in 0..{V - 1}, got {V}"),
        ({"suppress_tokens": list(range(V))}, "no token is left to choose from"),
        ({"assistant_model": 3}, "assistant_model: expected a decoder, from rarefy.compile, got int"),
    ],
)
def test_options_that_are_wrong(llama, options, message):
    with pytest.raises(DataError) as error:
        rarefy.generate(llama[1], PROMPTS[:1], **options)
    assert message in str(error.value)


def test_what_takes_one_text(llama):
    with pytest.raises(DataError, match="prompt_lookup_num_tokens works for one text at a time, got 2"):
        rarefy.generate(llama[1], PROMPTS, prompt_lookup_num_tokens=2)
    with pytest.raises(DataError, match="assistant_model works for one text at a time, got 2"):
        rarefy.generate(llama[1], PROMPTS, assistant_model=llama[1])
    other = Wrong(llama[1])
    other.vocab_size = 7
    with pytest.raises(DataError, match="expected a vocabulary of 101 tokens, as the model has, got one of 7"):
        rarefy.generate(llama[1], PROMPTS[:1], assistant_model=other)
    with pytest.raises(DataError, match="num_beams: a beam search has no text before it ends; call generate"):
        next(rarefy.stream(llama[1], PROMPTS, num_beams=2))


# ---- one front door


def test_compile_without_an_example(llama):
    from rarefy.compiler.executor import Compiled
    from rarefy.generation.decoder import Decoder

    model, decoder = llama
    assert type(decoder) is Decoder and torch.equal(
        decoder.generate(PROMPTS, max_new_tokens=5), rarefy.generate(decoder, PROMPTS, max_new_tokens=5)
    )
    assert len(list(decoder.stream(PROMPTS, max_new_tokens=5))) == 5
    plain = rarefy.compile(model, {"input_ids": PROMPTS, "use_cache": False})
    assert type(plain) is Compiled
    assert plain(input_ids=PROMPTS, use_cache=False).logits.shape == (2, 12, V)
    with pytest.raises(DataError, match="tune has no effect on a decoder of a language model: leave it out, or pass"):
        rarefy.compile(model, tune=False)
    with pytest.raises(DataError, match=r"compile needs an example input of Linear: compile\(model, example\)"):
        rarefy.compile(torch.nn.Linear(2, 2).eval())


# ---- constraints


@pytest.fixture(scope="module")
def smollm():
    from conftest import sample
    from rarefy.model import hf

    sample("smollm2-135m")
    folder = rarefy.data.builtin.model_folder("smollm2-135m")
    model = hf.load_folder(folder).float()
    model.model.layers = model.model.layers[:LAYERS]  # what constraints and guesses do does not depend on the depth
    model.config.num_hidden_layers = LAYERS
    return rarefy.compile(model, precision="int8"), hf.load_tokenizer(folder)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.slow
@pytest.mark.real
def test_constraints(smollm):
    """Texts follow a JSON schema, a regular expression, a grammar, drawn or not, guessed or not."""
    import json
    import re

    pytest.importorskip("llguidance")
    decoder, tokenizer = smollm
    ids = tokenizer("A person: ", return_tensors="pt")["input_ids"]

    def texts(**options):
        result = decoder.generate(ids, tokenizer=tokenizer, max_new_tokens=70, details=True, **options)
        assert set(result.finish_reasons) == {"stop"}
        return [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in result.sequences]

    greedy = texts(json_schema=SCHEMA)
    drawn = texts(json_schema=json.dumps(SCHEMA), do_sample=True, seed=1, num_return_sequences=4)
    for text in greedy + drawn:
        value = json.loads(text)
        assert set(value) == {"name", "age", "tags"} and 0 <= value["age"] <= 120 and set(value["tags"]) <= {"a", "b"}
    assert texts(json_schema=SCHEMA, prompt_lookup_num_tokens=5) == greedy
    stopped = texts(regex="[a-z]{9}", stop_strings=["e"], do_sample=True, seed=1, num_return_sequences=4)
    assert len({len(t) for t in stopped}) > 1  # padding follows texts that a stop string ended
    assert all(re.fullmatch("[a-df-z]{9}|[a-z]*e[a-z]*", t) for t in stopped)
    assert re.fullmatch("[A-Z][a-z]+ is [0-9]{2}", *texts(regex="[A-Z][a-z]{1,9} is [0-9]{2}"))
    assert texts(grammar='start: "yes" | "no" " "? "way"')[0] in ("yes", "noway", "no way")
    for options, message in (
        ({"json_schema": {"type": "foo"}}, "json_schema: Invalid type: foo"),
        ({"json_schema": "{"}, "json_schema: Expecting property name"),
        ({"json_schema": 3}, "json_schema: expected a JSON schema as a dict or text, got int"),
        ({"regex": "(a"}, "regex: .*invalid regex"),
        ({"regex": 3}, "regex: expected a text, got int"),
        ({"grammar": "start: b"}, "grammar: .*unknown name"),
        ({"grammar": "start: b", "regex": "b"}, "a text follows one constraint: got regex and grammar"),
        ({"regex": "b", "tokenizer": None}, "regex: it needs a tokenizer"),
        ({"regex": "b", "num_beams": 2}, "regex has no effect on a beam search"),
    ):
        with pytest.raises(DataError, match=message):
            decoder.generate(ids, **{"tokenizer": tokenizer, **options})


def test_constraints_need_a_library(llama, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(DataError, match=r'regex needs llguidance: pip install "rarefy\[json\]"'):
        rarefy.generate(llama[1], PROMPTS, regex="a", tokenizer=Letters())


def test_a_tokenizer_that_the_library_cannot_read_is_not_the_fault_of_the_pattern(llama):
    pytest.importorskip("llguidance")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(DataError, match="regex: llguidance cannot read this tokenizer .*: it needs a fast one"):
        rarefy.generate(llama[1], PROMPTS[:1], regex="a", tokenizer=words)


@pytest.mark.slow
@pytest.mark.real
def test_real_text(smollm):
    """A real model in 8 bits: guesses change nothing, transformers' own stop strings and processors agree."""
    decoder, tokenizer = smollm
    lines = "".join(f'{{"id": {i}, "name": "row {i}"}}\n' for i in range(6))
    ids = tokenizer(lines, return_tensors="pt")["input_ids"]
    want = decoder.generate(ids, max_new_tokens=40)
    result = decoder.generate(ids, max_new_tokens=40, prompt_lookup_num_tokens=7, details=True)
    assert torch.equal(result.sequences, want) and result.acceptance > 0.5
    text = tokenizer.decode(want[0, ids.shape[1] :])
    stop = text[5:9]
    line = decoder.generate(ids, max_new_tokens=40, stop_strings=stop, tokenizer=tokenizer)
    ended = tokenizer.decode(line[0, ids.shape[1] :])
    assert text.startswith(ended) and stop in ended and stop not in tokenizer.decode(line[0, ids.shape[1] : -1])
