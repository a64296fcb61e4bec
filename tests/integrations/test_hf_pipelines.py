"""Pipelines of transformers on the engine, against the same pipelines with the dense model."""

import copy
import json
import math
import sys

import numpy as np
import pytest
import torch

import rarefy
from helpers.marks import slow_case, slow_except
from rarefy.common.errors import DataError, ModelError

transformers = pytest.importorskip("transformers")
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from rarefy.integrations.transformers import compile, pipeline
from rarefy.model.hf import load_folder

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = [*SPECIAL, *(f"w{i}" for i in range(59))]
TEXTS = ["w1 w2 w3 w4 w5", "w6", "w7 w8 unknown w9 w10 w11 w12", "w13 w2 w14"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DISTIL = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
LABELS = {0: "entailment", 1: "neutral", 2: "contradiction"}
NAMED = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
LLAMA = {**SIZES, "max_position_embeddings": 128, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}


def tokenizer_of():
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, [("[CLS]", 2), ("[SEP]", 3)])
    names = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names, model_max_length=128)


def make(kind, config, seed=0):
    """A model whose random weights are large enough to tell inputs apart."""
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4)
    return model


def same(a, b, within=1e-4):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], within) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, within) for x, y in zip(a, b))
    if isinstance(a, float | np.floating):
        return math.isclose(a, b, rel_tol=0, abs_tol=within)
    return a == b


BERT = transformers.BertConfig(**SIZES, **NAMED)
CASES = {
    "feature-extraction": ("BertModel", BERT, {}),
    "text-classification": ("BertForSequenceClassification", BERT, {"top_k": None}),
    "token-classification": ("BertForTokenClassification", BERT, {}),
    "ner": ("RobertaForTokenClassification", transformers.RobertaConfig(**SIZES, **NAMED), {"aggregation_strategy": "simple"}),
    "fill-mask": ("BertForMaskedLM", BERT, {}),
    "sentiment-analysis": ("DistilBertForSequenceClassification", transformers.DistilBertConfig(**DISTIL, **NAMED), {}),
    "zero-shot-classification": ("BertForSequenceClassification", BERT, {"candidate_labels": ["w1 w2", "w3", "w40"]}),
}  # fmt: skip


@pytest.mark.parametrize("task", slow_except(CASES, "fill-mask", "ner"))
def test_texts(task):
    kind, config, options = CASES[task]
    model, tokenizer = make(kind, config), tokenizer_of()
    fast = pipeline(task, model, tokenizer=tokenizer)
    dense = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
    texts = [f"{t} [MASK]" for t in TEXTS] if task == "fill-mask" else TEXTS
    assert same(fast(texts[0], **options), dense(texts[0], **options))
    assert same(fast(texts, **options), dense(texts, **options))
    if task != "feature-extraction":  # whose outputs at padding are zeros
        assert same(fast(texts, batch_size=3, **options), dense(texts, batch_size=3, **options))
    assert isinstance(fast.model, type(model)) and type(fast.model).__name__ == kind
    assert model.dtype == fast.model.dtype == torch.float32 and fast.model.device.type == "cpu"
    with torch.no_grad():
        a, b = (m(**tokenizer("w1 w2", return_tensors="pt")) for m in (fast.model, model))
    assert type(a) is type(b) and a.keys() == b.keys()


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_images(name, tmp_path):
    vit = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {
        "ViT": {**vit, "image_size": 32, "patch_size": 8},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    }
    config = getattr(transformers, f"{name}Config")(**sizes[name], **NAMED)
    model = make(f"{name}ForImageClassification", config)
    reader = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)) for i in range(3)]
    dense = transformers.pipeline("image-classification", model=model, image_processor=reader, device="cpu")
    fast = pipeline("image-classification", model, image_processor=reader)
    assert same(fast(images, top_k=3), dense(images, top_k=3)) and same(fast(images[0]), dense(images[0]))
    fast.save_pretrained(tmp_path / "out")
    again = pipeline("image-classification", tmp_path / "out")
    assert same(again(images, batch_size=2), dense(images, batch_size=2))


@pytest.mark.parametrize(
    "kind", [slow_case("BertForQuestionAnswering"), "BertForMultipleChoice", "LlamaForSequenceClassification"]
)
def test_heads_without_a_pipeline(kind):
    config = transformers.LlamaConfig(**LLAMA) if kind.startswith("Llama") else transformers.BertConfig(**SIZES)
    model, tokenizer = make(kind, config), tokenizer_of()
    batch = dict(tokenizer(["w1 w2 w3", "w4"], padding=True, return_tensors="pt"))
    other = dict(tokenizer(["w5 w6 w7 w8 w9"] * 3, return_tensors="pt"))
    batch, other = ({k: v for k, v in b.items() if kind[0] == "B" or k != "token_type_ids"} for b in (batch, other))
    if kind == "BertForMultipleChoice":
        batch, other = ({k: v[:, None].repeat(1, 2, 1) for k, v in b.items()} for b in (batch, other))
    use_cache = model.config.use_cache if hasattr(model.config, "use_cache") else None
    fast = compile(model, batch)
    assert getattr(model.config, "use_cache", None) == use_cache
    for b in (batch, other):
        with torch.no_grad():
            a, b = fast(**b), model(**b)
        shared = [n for n in a if isinstance(a[n], torch.Tensor)]
        assert type(a) is type(b) and shared
        assert all(torch.allclose(a[n], b[n], atol=1e-4, rtol=1e-4) for n in shared)


def test_calls_are_those_of_the_model():
    model, tokenizer = make("BertForSequenceClassification", BERT), tokenizer_of()
    fast = compile(model, tokenizer=tokenizer)
    ids = torch.tensor([[2, 7, 8, 3]])
    with torch.no_grad():
        want = model(ids).logits
    assert torch.allclose(fast(ids).logits, want, atol=1e-4)  # the mask and token types are filled in
    assert torch.allclose(fast(input_ids=ids, return_dict=False)[0], want, atol=1e-4)
    assert fast.eval() is fast and fast.to("cpu") is fast and fast.num_parameters() == model.num_parameters()
    for call, message in (
        (lambda: fast(ids, labels=torch.tensor([0])), "computes no loss"),
        (lambda: fast(ids, output_attentions=True), "compiled without output_attentions"),
        (lambda: fast(ids, position_ids=ids), "compiled without position_ids: pass an example="),
        (lambda: fast.train(), "cannot be trained"),
        (lambda: fast.half(), "stays on the CPU in its precision"),
        (lambda: fast.to("cuda"), "stays on the CPU"),
        (lambda: fast.to(torch.float16), "stays on the CPU"),
        (lambda: fast.state_dict(), "has no state_dict"),
        (lambda: fast.generate(ids), "generates no text"),
        (lambda: compile(fast), "is compiled already"),
        (lambda: compile(torch.nn.Linear(2, 2)), "use rarefy.compile"),
    ):
        with pytest.raises((ModelError, DataError), match=message):
            call()
    only_ids = compile(model, {"input_ids": torch.tensor([[2, 7, 8, 3], [2, 9, 3, 4]])})
    assert torch.allclose(only_ids(ids, attention_mask=torch.ones_like(ids)).logits, want, atol=1e-4)
    with pytest.raises(DataError, match="compiled without attention_mask"):
        only_ids(ids, attention_mask=torch.tensor([[1, 1, 1, 0]]))
    deep = copy.deepcopy(model)
    deep.config.output_hidden_states = True
    out = compile(deep, tokenizer=tokenizer)(ids, output_hidden_states=True)
    with torch.no_grad():
        assert torch.allclose(out.hidden_states[1], deep(ids).hidden_states[1], atol=1e-4)


def test_precision_and_compiled_folders(tmp_path):
    model, tokenizer = make("BertForSequenceClassification", BERT), tokenizer_of()
    fast = pipeline("text-classification", model, tokenizer=tokenizer, precision="int8")
    dense = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    assert [r["label"] for r in fast(TEXTS)] == [r["label"] for r in dense(TEXTS)]
    fast.save_pretrained(tmp_path / "out")
    again = pipeline("text-classification", tmp_path / "out")
    plain = transformers.pipeline("text-classification", str(tmp_path / "out"), device="cpu")  # transformers' own
    assert again(TEXTS) == plain(TEXTS) == fast(TEXTS)
    assert again.model.config.id2label == LABELS and next(again.model.parameters()).is_meta
    with pytest.raises(ModelError, match="is compiled already: leave out precision"):
        pipeline("text-classification", tmp_path / "out", precision="int8")
    with pytest.raises(ModelError, match="holds a compiled BertForSequenceClassification: load it as that class"):
        pipeline("feature-extraction", tmp_path / "out")


def test_folders_of_each_kind_run_in_pipelines(tmp_path):
    tokenizer = tokenizer_of()
    for name, change in {
        "sparse": lambda m: rarefy.prune_(m, "2:4", layers="*layer.*"),
        "low rank": lambda m: rarefy.factorize_(m, rank=8, layers="*layer.*"),
    }.items():
        model = make("BertForTokenClassification", BERT)
        change(model)
        rarefy.save(model, tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        dense = transformers.pipeline("ner", str(tmp_path / name), device="cpu")
        assert same(pipeline("ner", tmp_path / name)(TEXTS), dense(TEXTS))


@pytest.fixture(scope="module")
def writers():
    model, tokenizer = make("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA)), tokenizer_of()
    tokenizer.padding_side = "left"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast = pipeline("text-generation", model, tokenizer=tokenizer)
    return fast, transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "max_new_tokens": 9},
        {"do_sample": False, "max_new_tokens": 9, "return_full_text": False, "batch_size": 2},
        {"do_sample": False, "max_length": 15},
        {"do_sample": False, "max_new_tokens": 6, "repetition_penalty": 1.5},
        {"do_sample": True, "max_new_tokens": 9, "temperature": 0.7, "top_k": 5},
        {"do_sample": True, "max_new_tokens": 9, "top_p": 0.6, "num_return_sequences": 3},
        {"do_sample": False, "max_new_tokens": 5, "eos_token_id": 9, "return_tensors": True},
        {
            "do_sample": False,
            "max_new_tokens": 8,
            "batch_size": 3,
            "stopping_criteria": [lambda ids, _: ids[:, -1] > 40],
        },
        {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "suppress_tokens": [9, 20]},
        {"generation_config": transformers.GenerationConfig(max_new_tokens=4, do_sample=False)},
        {"do_sample": False, "max_new_tokens": 9, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "max_new_tokens": 9, "min_p": 0.1, "no_repeat_ngram_size": 2},
        {"do_sample": False, "max_new_tokens": 20, "prompt_lookup_num_tokens": 4},
    ],
    ids=lambda options: ", ".join(options),
)
def test_text_generation(writers, options, same_draws):
    texts = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
    results = []
    if "stopping_criteria" in options:
        criteria = transformers.StoppingCriteriaList(options["stopping_criteria"])
        options = {**options, "stopping_criteria": criteria}
    for write in writers:
        torch.manual_seed(1)
        results.append(write(texts, **options))
    assert results[0] == results[1]


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456"


def letters():
    """A tokenizer of letters, in which transformers finds strings: it cannot in whole words."""
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate((*SPECIAL, *LETTERS))}, [], unk_token="[UNK]"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def test_strings_that_end_a_text(writers):
    fast, dense = writers
    tokenizer, ids = letters(), torch.tensor([[2, 7, 8], [2, 9, 10]])
    options = {"max_new_tokens": 20, "do_sample": False, "tokenizer": tokenizer}
    whole = dense.model.generate(ids, **options)
    first, second = (tokenizer.decode(row[3:], skip_special_tokens=True) for row in whole)
    for strings in (first[3:6], [second[2:4], first[2:5]], "zzz"):
        for more in ({}, {"num_beams": 2}):
            want = dense.model.generate(ids, stop_strings=strings, **options, **more)
            assert torch.equal(fast.model.generate(ids, stop_strings=strings, **options, **more), want)
            assert bool(more) or (want.shape[1] < 23 or bool((want == 0).any())) == (strings != "zzz")
    with pytest.raises(DataError, match="stop_strings needs a tokenizer to find strings in tokens: pass tokenizer="):
        fast.model.generate(ids, stop_strings="a", max_new_tokens=2)


def test_a_smaller_model_guesses_tokens(writers):
    fast, dense = writers
    small = make("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 1}))
    draft, ids = compile(small), torch.tensor([[2, 7, 8]])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    want = dense.model.generate(ids, assistant_model=small, **options)
    assert torch.equal(fast.model.generate(ids, assistant_model=draft, **options), want)
    assert torch.equal(fast.model.generate(ids, assistant_model=draft.engine, **options), want)
    tokenizer = letters()
    limited = {**options, "stop_strings": tokenizer.decode(want[0, 6:9]), "tokenizer": tokenizer}
    want = dense.model.generate(ids, **limited)
    assert torch.equal(fast.model.generate(ids, assistant_model=draft, **limited), want) and want.shape[1] < 23
    with pytest.raises(DataError, match="expected a model on the engine, got LlamaForCausalLM: pass it to rarefy"):
        fast.model.generate(ids, assistant_model=small, **options)


def test_text_generation_of_chats_and_streams(writers):
    fast, dense = writers
    chat = [{"role": "user", "content": "w1 w2"}]
    assert fast(chat, max_new_tokens=4, do_sample=False) == dense(chat, max_new_tokens=4, do_sample=False)

    class Collect:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    ids, streams = torch.tensor([[2, 7, 8]]), []
    for write in writers:
        streams.append(Collect())
        write.model.generate(ids, max_new_tokens=4, do_sample=False, streamer=streams[-1])
    assert streams[0].tokens == streams[1].tokens
    with torch.no_grad():
        assert torch.allclose(fast.model(ids).logits, dense.model(ids).logits, atol=1e-4)
        ids, mask = torch.tensor([[0, 0, 7, 8], [2, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        a, b = (
            m(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits
            for m in (fast.model, dense.model)
        )
        assert torch.allclose(a[mask.bool()], b[mask.bool()], atol=1e-4)
        assert torch.equal(fast.model(ids, logits_to_keep=2).logits, fast.model(ids).logits[:, -2:])
    for options, message in (
        ({"typical_p": 0.5, "do_sample": True}, "generate on the engine has no typical_p"),
        ({"num_return_sequences": 2, "do_sample": False}, "do not support `num_return_sequences`"),
        ({"prefix_allowed_tokens_fn": print}, "has no prefix_allowed_tokens_fn"),
        ({"max_length": 2}, "pass max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            fast.model.generate(torch.tensor([[2, 7, 8]]), **options)
    with pytest.raises(DataError, match="needs a prompt"):
        fast.model.generate()


def test_language_models_in_folders(writers, tmp_path):
    fast, dense = writers
    fast.save_pretrained(tmp_path / "decoder")
    (tmp_path / "decoder" / "README.md").write_text("my notes")
    fast.save_pretrained(tmp_path / "decoder")
    assert (tmp_path / "decoder" / "README.md").read_text() == "my notes"
    again = transformers.pipeline("text-generation", str(tmp_path / "decoder"), device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False}
    assert again("w1 w2", **options) == dense("w1 w2", **options)
    assert again.model.generation_config.eos_token_id == 3
    with pytest.raises(ModelError, match="example= has no effect on a language model"):
        compile(dense.model, {"input_ids": torch.ones(1, 2, dtype=torch.int64)})


def test_calls_of_a_decoder_never_ignore_what_changes_the_result(writers):
    fast, dense = writers
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        want = dense.model(ids).logits
    counted = torch.arange(4).expand(2, 4)
    right = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    left = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    for mask, positions in ((None, counted), (right, counted), (left, (left.cumsum(1) - 1).clamp(min=0))):
        got = fast.model(ids, attention_mask=mask, position_ids=positions, use_cache=True, output_attentions=False)
        with torch.no_grad():
            want = dense.model(ids, attention_mask=mask, position_ids=positions).logits
        real = torch.ones_like(ids).bool() if mask is None else mask.bool()
        assert torch.allclose(got.logits[real], want[real], atol=1e-3)
    for options, message in (
        ({"past_key_values": transformers.DynamicCache()}, "takes no past_key_values"),
        ({"output_hidden_states": True}, "takes no output_hidden_states"),
        ({"position_ids": counted + 3}, "counts the tokens from 0 itself"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}, "padded on the left"),
        ({"attention_mask": torch.zeros(2, 4)}, "a prompt is empty"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, "expected the shape of input_ids"),
    ):
        with pytest.raises(DataError, match=message):
            fast.model(ids, **options)
    for wrong in (torch.tensor([5, 6]), [[5, 6]]):
        with pytest.raises(DataError, match=r"input_ids: expected int64 \[batch, tokens\], got"):
            fast.model.generate(wrong, max_new_tokens=2)
    assert fast.model.to("cpu", non_blocking=True) is fast.model.cpu() is fast.model


def test_wrong_arguments(tmp_path):
    model, tokenizer = make("BertModel", BERT), tokenizer_of()
    for call, message in (
        (
            lambda: pipeline("text-clasification", model),
            "no task 'text-clasification': did you mean 'text-classification'?",
        ),
        (lambda: pipeline("question-answering", model), "has no task 'question-answering'"),
        (lambda: pipeline("fill-mask", tmp_path / "none"), "none does not exist: expected a model folder, or one of"),
        (lambda: pipeline("fill-mask", tmp_path), "has no config.json"),
        (lambda: pipeline("fill-mask", "minlm"), r"minlm does not exist: .* \(did you mean 'minilm'\?\)"),
        (lambda: pipeline("fill-mask", "org/model"), "does not exist: .*rarefy.model.hub.download"),
        (lambda: pipeline("fill-mask", model, compile_options={"tun": 1}), "unknown compile option 'tun'.*'tune'"),
        (lambda: pipeline("fill-mask", model, compile_options=[1]), "compile_options: expected a dict .*, got list"),
        (lambda: pipeline("fill-mask", 3), "expected a folder or a model of transformers, got int"),
        (lambda: pipeline("feature-extraction", model), "needs a tokenizer or an image processor"),
        (lambda: pipeline("feature-extraction", model, device="cuda:0"), "runs on the CPU, got the device 'cuda:0'"),
    ):
        with pytest.raises(ModelError, match=message):
            call()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(
        ModelError, match="has no weights for text-classification: classifier.bias, classifier.weight are missing"
    ):
        pipeline("text-classification", tmp_path / "base")
    with pytest.raises(ModelError, match="image-classification: transformers has no such model for a bert config"):
        pipeline("image-classification", tmp_path / "base")
    settings = tmp_path / "base" / "generation_config.json"
    settings.write_text("[1, 2]")
    with pytest.raises(ModelError, match=r"generation_config.json: expected a JSON object, got list: correct the file"):
        load_folder(tmp_path / "base")
    settings.unlink()
    config = tmp_path / "base" / "config.json"
    values = json.loads(config.read_text())
    for changes, message in (
        ({"attn_implementation": "evil/kernel"}, "requests custom attention code .evil/kernel.; remove attn"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the model does not load"),
        ({"model_type": "none"}, "the config is not usable"),
    ):
        config.write_text(json.dumps({**values, **changes}))
        with pytest.raises(ModelError, match=message):
            pipeline("feature-extraction", tmp_path / "base")


@pytest.mark.slow
def test_labels_of_a_probe_in_8_bits():
    """Topics of articles by MiniLM and a linear probe, whose margins are small: 200 articles it was not trained on."""
    import json

    from conftest import sample
    from rarefy.data import builtin

    sample("wiki"), sample("minilm")
    rows = list(json.loads(builtin.find("wiki").read_text(encoding="utf-8")).values())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [r for i in order if (r := rows[i])["topic"] and r["topic"] != "Uncategorized"][:800]
    names = sorted({r["topic"] for r in rows})
    folder = builtin.model_folder("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, model_max_length=64)
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(names), **labels
    ).eval()
    texts, truth = [r["extract"] for r in rows], torch.tensor([labels["label2id"][r["topic"]] for r in rows])
    with torch.no_grad():
        parts = [
            tokenizer(texts[i : i + 20], padding=True, truncation=True, return_tensors="pt") for i in range(0, 600, 20)
        ]
        features = torch.cat([model.bert(**p).pooler_output for p in parts])
    head = model.classifier
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features.detach()), truth[:600]).backward()
        optimizer.step()
    options = {"truncation": True, "batch_size": 20}
    dense = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(
        texts[600:], **options
    )
    fast = pipeline("text-classification", model, tokenizer=tokenizer, precision="int8")(texts[600:], **options)
    exact = pipeline("text-classification", model, tokenizer=tokenizer)(texts[600:], **options)
    assert same(exact, dense)
    accuracy = sum(d["label"] == names[t] for d, t in zip(dense, truth[600:].tolist())) / 200
    agreement = sum(a["label"] == b["label"] for a, b in zip(fast, dense)) / 200
    print(f"accuracy {accuracy:.3f}, agreement in 8 bits {agreement:.3f}")
    assert accuracy > 0.6 and agreement >= 0.9


def test_a_missing_harness_is_named(monkeypatch):
    from rarefy.integrations.lm_eval import lm

    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ModelError, match=r'pip install "rarefy\[lm-eval\]"'):
        lm("smollm2-135m")
