"""`rarefy generate` and `rarefy compile`: text as it comes, models once compiled."""

import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import rarefy
from conftest import Net, text_model, tiny_bert
from helpers.marks import slow_case
from rarefy.cli import inference_commands
from rarefy.common.errors import DataError, ModelError
from rarefy.generation.decoder import Decoder
from rarefy.generation.tokenization import Text, encode_prompt, left_padded, parse_ids
from rarefy.model import hf

PROMPT = [4, 5, 6]  # "w1 w2 w3"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Folders: a language model with its tokenizer, saved and not, its decoder, one without tokenizer; an encoder."""
    from typer.testing import CliRunner

    from rarefy.cli.main import app

    folder = tmp_path_factory.mktemp("given")
    text_model(folder)
    rarefy.save(hf.load_folder(folder / "model").bfloat16(), folder / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / name, folder / "saved" / name)
    ran = CliRunner().invoke(
        app, ["compile", str(folder / "model"), "-o", str(folder / "decoder"), "--precision", "int8"]
    )
    assert ran.exit_code == 0, ran.output
    tiny_bert().save_pretrained(folder / "bert")
    rarefy.save(hf.load_folder(folder / "model"), folder / "wordless")
    rarefy.save(rarefy.compile(torch.nn.Linear(4, 4).eval(), torch.randn(2, 4)), folder / "compiled")
    return folder


def words_of(ids):
    return " ".join(f"w{i - 3}" for i in ids if i > 2)


def written(made, prompt=PROMPT, new=12, **how):
    ids = rarefy.generate(made, torch.tensor([prompt]), max_new_tokens=new, **how)[0, len(prompt) :].tolist()
    return ids[: ids.index(1) + 1] if 1 in ids else ids


@pytest.mark.parametrize("name", [slow_case("model"), slow_case("saved"), "decoder"])
def test_text_of_every_kind_of_folder(run, given, name):
    made = rarefy.load(given / name) if name == "decoder" else hf.load_folder(given / "model").float()
    if name == "saved":
        made = made.bfloat16().float()
    made = made if name == "decoder" else rarefy.decoder(made)
    ran = run("generate", given / name, "--prompt", "w1 w2 w3", "--max-new-tokens", 12)
    ids = written(made)
    assert ran.code == 0 and ran.out.strip() == words_of(ids), ran
    assert (
        ran.err.startswith("prompt: 3 tokens, ")
        and f"generated: {len(ids)} tokens" in ran.err
        and ran.err.count("\n") == 1
    )
    told = json.loads(run("generate", given / name, "-p", "w1 w2 w3", "--max-new-tokens", 12, "--json", "-q").out)
    assert told["ids"] == ids and told["text"].strip() == words_of(ids)
    assert (told["prompt_tokens"], told["new_tokens"]) == (3, len(ids))
    assert told["seconds_prefill"] > 0 and told["seconds_decode"] > 0
    quiet = run("generate", given / name, "-p", "w1 w2 w3", "--max-new-tokens", 12, "--quiet", "--threads", 1)
    assert (quiet.out, quiet.err) == (ran.out, "")


def test_draws_are_repeatable_and_follow_their_options(run, given):
    made = rarefy.load(given / "decoder")
    words = ("generate", given / "decoder", "-p", "w1 w2 w3", "--json", "--max-new-tokens", 12)
    how = {"do_sample": True, "temperature": 0.8, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 5}
    options = [f"--{n.replace('_', '-')}={v}" for n, v in how.items() if n != "do_sample"]
    assert json.loads(run(*words, *options).out)["ids"] == written(made, **how)
    assert json.loads(run(*words, "--seed", 3).out)["ids"] == written(made, do_sample=True, seed=3)


def test_several_prompts_are_a_batch(run, given, monkeypatch):
    made = rarefy.load(given / "decoder")
    monkeypatch.setattr(sys, "stdin", io.StringIO("w9\n"))
    words = ("generate", given / "decoder", "-p", "w1 w2 w3", "-p", "-", "--max-new-tokens", 6)
    ran = run(*words)
    ids, mask = left_padded([PROMPT, [12]], made.pad_token)
    want = rarefy.generate(made, ids, attention_mask=mask, max_new_tokens=6)[:, 3:].tolist()
    cut = [row[: row.index(1) + 1] if 1 in row else row for row in want]
    assert ran.out.splitlines() == [f"[{i}] {words_of(row)}".strip() for i, row in enumerate(cut, 1)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("w9\n"))
    rows = json.loads(run(*words, "--json").out)
    assert [r["ids"] for r in rows] == cut and [r["prompt_tokens"] for r in rows] == [3, 1]


def test_a_text_that_is_empty(run, given, monkeypatch):
    monkeypatch.setattr(Decoder, "__call__", lambda _, ids, *args, **how: torch.eye(64)[1].expand(len(ids), 1, 64))
    words = ("generate", given / "decoder", "-p", "w1 w2 w3", "--max-new-tokens", 6)
    ran = run(*words)
    note = "no text was generated: the model ended at once; --chat may help\n"
    assert ran.code == 0 and ran.out.strip() == "" and note in ran.err and note not in run(*words, "-q").err
    assert "no text was generated for prompt 1, 2: " in run(*words, "-p", "w9").err


def test_ids_need_no_tokenizer(run, given):
    made = rarefy.decoder(hf.load_folder(given / "model"))
    ran = run("generate", given / "wordless", "--ids", "4 5, 6", "--max-new-tokens", 5)
    assert ran.code == 0 and ran.out.split() == [str(i) for i in written(made, new=5)]


def test_chat_goes_through_the_template(run, given, tmp_path):
    shutil.copytree(given / "decoder", tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(
        "{% for m in messages %}w7 {{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w8{% endif %}"
    )
    told = json.loads(run("generate", tmp_path / "m", "--chat", "-p", "w1", "--json", "--max-new-tokens", 4).out)
    assert told["prompt_tokens"] == 4
    assert told["ids"] == written(rarefy.load(given / "decoder"), [10, 2, 4, 11], 4)


@pytest.mark.parametrize("json_", [False, True])
def test_what_was_written_stays_when_it_is_stopped(run, given, monkeypatch, json_):
    ids = written(rarefy.load(given / "decoder"))
    assert len(ids) > 4
    calls, step = [], Decoder.__call__

    def stopping(self, *args, **how):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return step(self, *args, **how)

    monkeypatch.setattr(Decoder, "__call__", stopping)
    ran = run("generate", given / "decoder", "-p", "w1 w2 w3", *(["--json"] if json_ else []))
    text = json.loads(ran.out)["text"] if json_ else ran.out
    assert ran.code == 130 and text.strip() == words_of(ids[:4])
    assert "was not written" not in ran.err and (json_ or "generated: 4 tokens" in ran.err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{decoder}", "generate needs --prompt TEXT"),
        ("{decoder} --prompt a --ids 1", "give --prompt or --ids, not both"),
        ("{decoder} --ids 1 --chat", "--chat has no effect on --ids"),
        ("{decoder} --prompt - --prompt -", "standard input can be read only once"),
        ("{decoder} --ids one", "expected ids as whole numbers from 0 on, such as '1 2 3', got 'one'"),
        (
            "{none} --ids -1",
            "expected ids as whole numbers from 0 on, such as '1 2 3', got '-1'",
        ),  # before it is loaded
        ("{decoder} --ids 64", "expected ids in 0..63, got 64"),
        ("{decoder} --prompt w1 --chat", "the tokenizer has no chat template"),
        ("{decoder} --prompt w1 --precision int8", "--precision has no effect: "),
        ("{decoder} --prompt w1 --temperature 0", "--temperature: expected a number above 0"),
        ("{decoder} --prompt w1 --temperature -1", "temperature: expected a number above 0"),
        ("{decoder} --prompt w1 --top-p 1.5", "--top-p: expected a probability"),
        ("{decoder} --prompt w1 --min-p 2", "--min-p: expected a probability from 0 to 1"),
        ("{decoder} --prompt w1 --greedy --top-p 0.5", "--top-p has no effect on the most likely token: drop --greedy"),
        ("{decoder} --prompt w1 --greedy --n 2", "--n would return the same text several times"),
        ("{decoder} --prompt w1 --beams 2 --n 3", "a search of 2 beams returns at most 2 texts, got 3"),
        (
            "{decoder} --prompt w1 --length-penalty 2",
            "--length-penalty has no effect without a beam search: pass --beams=4",
        ),
        ("{decoder} --prompt w1 --system w2", "--system has no effect without --chat"),
        ("{decoder} --prompt w1 --logprobs 2", "--logprobs has no effect without --json"),
        ("{decoder} --prompt w1 --json-schema no.json", "--json-schema: no.json cannot be read"),
        ("{decoder} --prompt w1 --grammar no.lark", "--grammar: no.lark cannot be read"),
        (
            "{decoder} --prompt w1 --regex a --json-schema {{}}",
            "a text follows one constraint: got --json-schema and --regex",
        ),
        ("{decoder} --prompt w1 --regex a --beams 2", "--regex has no effect on a beam search"),
        ("{decoder} --prompt w1 --seed 9223372036854775808", "--seed: expected at most 2^63 - 1"),
        (
            "{decoder} --prompt w1 --lookup 2 --draft {decoder}",
            "tokens are guessed one way: pass --draft or --lookup, not both",
        ),
        ("{none} --prompt w1 --prompt w2 --lookup 2", "--lookup works for one text at a time, got 2"),
        ("{none} --prompt w1 --n 3 --draft {decoder}", "--draft works for one text at a time, got 3"),
        ("{decoder} --prompt w1 --beams 2 --draft {decoder}", "--draft has no effect on a beam search"),
        ("{decoder} --prompt w1 --repetition-penalty 0", "--repetition-penalty: expected a number above 0"),
        ("{decoder} --prompt w1 --max-new-tokens 128", "the model has 128 positions"),
        ("{wordless} --ids 1 --stop a", "--stop needs a tokenizer"),
        ("{wordless} --prompt w1", "has no tokenizer: add its files, such as tokenizer.json, or give --ids"),
        ("{model} --prompt w1 --precision int3", "unknown precision 'int3'"),
        ("{bert} --ids 1", "expected a language model of transformers, got BertModel"),
        ("{compiled} --ids 1", "holds a compiled model, which has no KV cache"),
        ("{none} --ids 1", "no model folder"),
    ],
)
def test_mistakes_are_one_line(run, given, words, message):
    names = ("decoder", "wordless", "model", "bert", "none", "compiled")
    ran = run("generate", *words.format(**{n: given / n for n in names}).split())
    assert ran.code == 2 and ran.out == "" and message in ran.err and ran.err.count("\n") == 1, ran


def test_empty_prompts(run, given, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    ran = run("generate", given / "decoder", "-p", "-")
    assert ran.code == 2 and "the prompt is empty" in ran.err


# ---- compile


def test_a_language_model_becomes_a_decoder(run, given):
    made = rarefy.load(given / "decoder")
    assert type(made) is Decoder
    want = rarefy.decoder(hf.load_folder(given / "model"), precision="int8")
    ids = torch.randint(3, 60, (2, 20))
    assert torch.equal(made(ids), want(ids))
    ran = run("inspect", given / "decoder")
    assert ran.code == 0 and "a decoder" in ran.out.splitlines()[0]
    assert {"tokenizer.json", "config.json", "generation_config.json"} <= {
        f.name for f in (given / "decoder").iterdir()
    }


@pytest.mark.slow
def test_an_encoder_is_compiled_for_other_batches(run, given, tmp_path):
    ran = run("compile", given / "bert", "-o", tmp_path / "out", "--json", "--tokens", 9, "--threads", 1)
    told = json.loads(ran.out)["summary"]
    assert ran.code == 0 and told["contains"] == "a compiled model" and "attention" in told["operators"]
    made, model = rarefy.load(tmp_path / "out"), hf.load_folder(given / "bert")
    ids, mask = torch.randint(0, 64, (3, 20)), torch.ones(3, 20, dtype=torch.int64)
    mask[1, 12:] = 0
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).last_hidden_state
    got = made(input_ids=ids, attention_mask=mask).last_hidden_state
    assert float((got - want)[mask == 1].abs().max()) < 1e-4
    ran = run("compile", given / "bert", "-o", tmp_path / "out")
    assert ran.code == 2 and "exists" in ran.err
    assert run("compile", given / "bert", "-o", tmp_path / "out", "--force", "--quiet").out == ""


def test_an_encoder_takes_what_its_tokenizer_gives():
    tokenizer = SimpleNamespace(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    example = inference_commands.example_input(tiny_bert(), 9, 2, tokenizer)
    made = rarefy.compile(tiny_bert(), example)
    given = {n: torch.zeros(3, 5, dtype=torch.int64) for n in tokenizer.model_input_names}
    assert made(**given | {"attention_mask": torch.ones(3, 5, dtype=torch.int64)}).last_hidden_state.shape[:2] == (3, 5)
    assert "token_type_ids" not in inference_commands.example_input(tiny_bert(), 9, 2, None)


def test_a_built_in_model_is_no_folder_to_export(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = run("export", "minilm", "-o", tmp_path / "out")
    assert (
        ran.code == 2
        and "minilm is a built-in model, and export converts folders written by Rarefy: rarefy compress" in ran.err
    )


def test_compile_errors(run, given, tmp_path):
    rarefy.save(Net(), tmp_path / "net")
    for words, message in (
        ((given / "model", "--tokens", 9), "--batch and --tokens have no effect"),
        ((given / "model", "--precision", "int3"), "unknown precision 'int3'"),
        (
            (given / "bert", "--tokens", 5000),
            "--tokens: expected at most 64, the model's number of positions, got 5000",
        ),
        ((given / "decoder",), "holds a decoder: give the folder of what it was compiled from"),
        ((tmp_path / "net",), "holds a Net, which is built in Python"),
    ):
        ran = run("compile", *words, "-o", tmp_path / "out")
        assert ran.code == 2 and ran.out == "" and message in ran.err and not (tmp_path / "out").exists(), ran


# ---- text


class Bytes:
    """A tokenizer of bytes, as some models have: letters may be in several tokens."""

    def decode(self, ids, skip_special_tokens):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def test_letters_come_whole():
    text = Text(Bytes(), list(b"Gr"))
    pieces = [text.add(i) for i in [*"öße 🙂".encode(), 300, ord("!")]]
    assert "".join(pieces) == "öße 🙂!" and text.rest() == ""
    assert pieces[0] == "" and pieces[1] == "ö" and not any("\ufffd" in p for p in pieces)
    cut = Text(Bytes())
    assert [cut.add(i) for i in "🙂".encode()[:2]] == ["", ""] and cut.rest() == "\ufffd"


def test_prompts_as_ids():
    assert parse_ids(" 1,2 3 ") == [1, 2, 3]
    for wrong in ("", "a", "-1", "1.5", "²"):
        with pytest.raises(DataError, match="whole numbers"):
            parse_ids(wrong)
    assert left_padded([[5, 6]], 0)[1] is None
    ids, mask = left_padded([[5, 6], [7]], 9)
    assert ids.tolist() == [[5, 6], [9, 7]] and mask.tolist() == [[1, 1], [0, 1]]
    with pytest.raises(ModelError, match="the tokenizer cannot encode the prompt"):
        encode_prompt(lambda *_, **__: 1 / 0, "a")
