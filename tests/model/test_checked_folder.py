"""No file of a model's folder decides what a library calls, imports or fetches: real libraries, with functions that
tell when they are called."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from helpers.hub_server import serving
from rarefy.checkpoint.engine_files import engine_files
from rarefy.checkpoint.streamed_decoder import decoder_from_files
from rarefy.common.errors import ContainerError, ModelError, RarefyError
from rarefy.model import hf
from rarefy.model.construction_limit import Stored
from rarefy.model.embedding_modules import head_of

st = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

from rarefy.integrations.sentence_transformers import CrossEncoder, SentenceTransformer
from rarefy.integrations.transformers import load as load_for_task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "ship", "sails", "at", "noon"]
SEED = {"activation_fn": "torch.seed"}
STORED = Stored(100, 1 << 20)  # what the files of a model hold
FLASH = {"_attn_implementation": "flash_attention_2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small reranker, and an embedding model with a dense layer."""
    root = tmp_path_factory.mktemp("models")
    (root / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(WORDS)})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(WORDS), num_labels=1, architectures=["x"], **sizes)
    torch.manual_seed(0)
    for name, kind in (("reranker", "BertForSequenceClassification"), ("bert", "BertModel")):
        getattr(transformers, kind)(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    modules = [Transformer(str(root / "bert")), Pooling(16, "cls"), Dense(16, 8)]
    st.SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(root / "embeddings"))
    return root


@pytest.fixture
def copy(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def told(monkeypatch):
    """Return a function that replaces a function of a library by one that notes its calls; the notes are `calls`."""

    def replace(owner, name, result=None):
        def note(*args, **kwargs):
            replace.calls.append(name)
            return result

        monkeypatch.setattr(owner, name, note)

    replace.calls = []
    return replace


def refused(load, message, told):
    """Check that a call is refused by name, and that no function that is watched was called before."""
    problem = "nothing was refused"
    try:
        load()
    except Exception as error:  # on the way to a refusal, what a replaced function returned may fail
        problem = f"{'' if isinstance(error, RarefyError) else type(error).__name__} {error}"
    assert told.calls == []
    assert re.search(message, problem), problem


def change(file, **values):
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, **values}))


def reranker(folder):
    return CrossEncoder(folder / "reranker", "fp32", tune=False)


def embeddings(folder):
    return SentenceTransformer(folder / "embeddings", "fp32", tune=False)


def tokenizer_of(folder):
    return hf.load_tokenizer(folder / "reranker")


def model_of(folder):
    return hf.load_folder(folder / "reranker")


def test_honest_models_load(copy):
    change(
        copy / "reranker" / "config.json", sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"}
    )
    fast = reranker(copy)
    want = st.CrossEncoder(str(copy / "reranker"), device="cpu").predict([("a ship", "noon")])
    assert abs(fast.predict([("a ship", "noon")]) - want).max() < 1e-5
    assert embeddings(copy).encode(["a ship"]).shape == (1, 8)
    model, tokenizer = model_of(copy), tokenizer_of(copy)
    assert model.config._name_or_path == model.name_or_path == tokenizer.name_or_path == str(copy / "reranker")
    assert "/rarefy-" not in repr(vars(tokenizer)) + repr(tokenizer.init_kwargs) + repr(fast.tokenizer.init_kwargs)
    (copy / "reranker" / "trainer_state.json").write_text(
        '{"loss": NaN}'
    )  # of no use to a library, and not shown to it
    assert model_of(copy) is not None


def with_nan(folder):
    file = folder / "reranker" / "config.json"
    change(file, sentence_transformers=SEED)
    file.write_text(file.read_text().replace("{", '{"x": NaN, ', 1))


def too_long(folder):
    change(folder / "reranker" / "config.json", sentence_transformers=SEED, x="a" * (1 << 20))


def with_deep_lists(folder):
    file = folder / "reranker" / "config.json"
    change(file, sbert_ce_default_activation_function="torch.seed")
    file.write_text(file.read_text().replace("{", '{"x": ' + "[" * 300 + "]" * 300 + ", ", 1))


def twice(folder):
    file = folder / "reranker" / "config.json"
    change(file, sentence_transformers=SEED)
    file.write_text(file.read_text().replace("{", '{"sentence_transformers": {}, ', 1) + " " * (1 << 20))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (with_nan, "config.json: not JSON: NaN is not a number of JSON"),
        (too_long, "activation_fn: expected a class of torch.nn, got 'torch.seed', no activation"),
        (with_deep_lists, "config.json: not JSON: lists and objects are nested deeper than 100 levels"),
        (twice, "config.json: not JSON: the key 'sentence_transformers' is written twice: remove one of the two"),
    ],
)
def test_no_function_of_torch_is_called(prepare, message, copy, told):
    told(torch, "seed", torch.nn.Identity())
    prepare(copy)
    refused(lambda: reranker(copy), message, told)


@pytest.mark.parametrize("file", ["reranker/config.json", "embeddings/2_Dense/config.json"])
def test_classes_of_torch_are_activations_of_the_list(file, copy, told):
    told(torch.nn.Flatten, "__init__")
    message = "expected a class of torch.nn, got 'torch.nn.Flatten', no activation"
    if "reranker" in file:
        change(copy / file, sentence_transformers={"activation_fn": "torch.nn.Flatten"})
        return refused(lambda: reranker(copy), message, told)
    change(copy / file, activation_function="torch.nn.Flatten")
    refused(lambda: embeddings(copy), message, told)
    refused(lambda: head_of(copy / "embeddings")(torch.zeros(1, 2, 16), torch.ones(1, 2)), message, told)  # type: ignore[reportOptionalCall]


@pytest.mark.parametrize(
    "load", [model_of, reranker, lambda f: load_for_task(f / "reranker", task="text-classification")]
)
def test_no_kernel_is_fetched(load, copy, told, monkeypatch):
    from transformers import modeling_utils

    told(modeling_utils, "lazy_import_flash_attention")
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda *_, **__: True)
    change(copy / "reranker" / "config.json", **FLASH)
    refused(lambda: load(copy), "custom attention code .flash_attention_2.; remove attn_implementation, or use", told)


@pytest.mark.parametrize("load", [tokenizer_of, reranker])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_tokenizers_are_of_a_class_of_tokenizers(load, file, copy, told):
    told(transformers.AutoModel, "from_pretrained")
    if file == "config.json":
        change(copy / "reranker" / "tokenizer_config.json", tokenizer_class=None)
    change(copy / "reranker" / file, tokenizer_class="AutoModel")
    refused(lambda: load(copy), "tokenizer_class: expected the class of a tokenizer or processor .* 'AutoModel'", told)


def test_tokenizers_of_other_places_are_not_read(copy, told):
    told(transformers.AutoModel, "from_pretrained")
    change(copy / "bert" / "tokenizer_config.json", tokenizer_class="AutoModel")
    change(copy / "embeddings" / "sentence_bert_config.json", tokenizer_name_or_path=str(copy / "bert"))
    refused(lambda: embeddings(copy), "tokenizer_name_or_path: files of another place are not read .*: remove it", told)


@pytest.mark.parametrize("config", [{"base_model_name_or_path": "a/b"}, {"architectures": ["RagRetriever"]}])
def test_no_class_is_looked_up_for_retrieval(config, copy, told):
    from sentence_transformers.base.modules import transformer

    told(transformer, "_resolve_retrieval_model_class", transformers.BertModel)
    change(copy / "embeddings" / "sentence_bert_config.json", transformer_task="retrieval")
    change(copy / "embeddings" / "config.json", **config)
    refused(lambda: embeddings(copy), "transformer_task: expected feature-extraction.*, got 'retrieval'", told)


def test_no_model_is_loaded_as_an_audio_tokenizer(copy, told):
    told(transformers.AutoModel, "from_pretrained")
    part = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(copy / "bert")}
    folder = copy / "embeddings"
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"processor_class": "CLIPProcessor", "audio_tokenizer": part}))
    refused(lambda: embeddings(copy), "audio_tokenizer: files of another place are not read .*: remove it", told)


@pytest.mark.parametrize(
    "values", [{"model_type": "dpt"}, {"model_type": "detr", "use_timm_backbone": False}, {"model_type": "upernet"}]
)
def test_backbones_are_not_looked_up_on_the_hub(values, copy, told):
    hub = pytest.importorskip("huggingface_hub")
    told(hub.HfApi, "repo_exists", False)
    file = copy / "reranker" / "config.json"
    file.write_text(json.dumps({**values, "backbone": "gpt2"}))
    refused(
        lambda: hf.load_config(copy / "reranker"), "backbone: 'gpt2' would be looked up on the hub: state its", told
    )
    file.write_text(json.dumps({"model_type": "detr", "backbone": "resnet50", "use_timm_backbone": True}))
    assert hf.load_config(copy / "reranker").backbone_config.backbone == "resnet50"
    assert told.calls == []


@pytest.mark.parametrize("kind", ["TokenizersBackend", "GPT2Tokenizer", "BertTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "key", ["fast_tokenizer_files", "tokenizer_file", "vocab", "vocab_file", "merges", "merges_file", "gguf_file"]
)
def test_tokenizers_open_files_of_their_folder_alone(kind, file, key, copy):
    folder, other = copy / "reranker", copy / "tokenizer.1.json"
    other.write_text((folder / "tokenizer.json").read_text().replace('"ship"', '"secret"'))
    change(folder / "tokenizer_config.json", tokenizer_class=kind)
    (folder / "special_tokens_map.json").write_text("{}")
    change(folder / file, **{key: [str(other)] if key.endswith("files") else str(other)})
    opened = opened_files(lambda: tokenizer_of(copy))
    assert str(other) not in opened
    assert "secret" not in tokenizer_of(copy).get_vocab()
    (folder / "tokenizer.json").unlink()
    with suppress(ModelError):  # some classes need the file
        assert str(other) not in opened_files(lambda: tokenizer_of(copy))


def opened_files(call):
    """Return the files that Python opens during a call."""
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and not done else None)
    done = False
    try:
        call()
    finally:
        done = True
    return opened


@pytest.mark.parametrize("shard", ["part.bin", "../other.safetensors"])
def test_weights_are_those_of_the_folder_in_safetensors(shard, copy, told):
    folder = copy / "reranker"
    (folder / "model.safetensors").rename(folder / shard)
    told(torch, "load", {})
    names = dict.fromkeys(["classifier.weight", "classifier.bias"], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    refused(lambda: model_of(copy), "expected weight_map: names of .safetensors files in this folder", told)


def test_a_checkpoint_of_timm_is_no_argument(tmp_path, told):
    pytest.importorskip("timm")
    (tmp_path / "x.pth").write_bytes(b"")
    told(torch, "load", {})
    config = {"model_type": "timm_wrapper", "architecture": "resnet10t", "num_labels": 2}
    arguments = {"checkpoint_path": str(tmp_path / "x.pth")}
    saved = {"class": "TimmWrapperForImageClassification", "dtype": "float32"}
    refused(
        lambda: hf.build({**saved, "config": {**config, "model_args": arguments}}, STORED),
        "model_args: the argument 'checkpoint_path' is not accepted from a file",
        told,
    )
    with pytest.raises(
        ModelError, match="architecture: expected the name of an architecture of timm, got 'hf-hub:a/b'"
    ):
        hf.build({**saved, "config": {**config, "architecture": "hf-hub:a/b"}}, STORED)


def test_a_file_that_is_replaced_after_its_check(copy, told, monkeypatch):
    told(torch, "seed", torch.nn.Identity())
    read = transformers.AutoConfig.from_pretrained

    def replaced(*args, **kwargs):
        change(copy / "reranker" / "config.json", sentence_transformers=SEED)
        return read(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", replaced)
    assert reranker(copy).predict([("a ship", "noon")]).shape == (1,)
    assert told.calls == []


def test_links_are_followed_before_the_check(copy, told):
    told(torch, "seed", torch.nn.Identity())
    folder = copy / "reranker"
    change(folder / "config.json", sentence_transformers=SEED)
    (folder / "config.json").rename(copy / "elsewhere")
    (folder / "config.json").symlink_to(copy / "elsewhere")
    refused(lambda: reranker(copy), "expected a class of torch.nn", told)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"dtype": "seed"}, "dtype: expected a type such as float32 or bfloat16, got 'seed'"),
        ("config.json", {"experts_implementation": "sonicmoe"}, "custom attention code .sonicmoe.; remove experts_im"),
        (
            "config.json",
            {"quantization_config": {"quant_method": "torchao"}},
            "expected quant_method to be one of rarefy,",
        ),
        ("sentence_bert_config.json", {"model_args": {"use_kernels": True}}, "argument 'use_kernels' is not accepted"),
        ("sentence_bert_config.json", {"processor_kwargs": {"gguf_file": "x"}}, "argument 'gguf_file' is not accepted"),
        (
            "sentence_bert_config.json",
            {"modality_config": {"image": {"method": "push_to_hub"}}},
            "expected a method out of",
        ),
        ("1_Pooling/router_config.json", {"types": {"a": "os.system"}}, "'os.system' is no module of sentence-tr"),
        ("1_Pooling/router_config.json", {"types": {"../a": ""}}, "expected the name of a folder as path, got '../a'"),
        ("adapter_config.json", {}, "adapters are not read: merge it into the model, and save that"),
        (
            "tokenizer_config.json",
            {"processor_class": "pipeline"},
            "processor_class: expected the class of a tokenizer",
        ),
        ("1_Pooling/adapter_config.json", {}, "adapters are not read: merge it into the model, and save that"),
        ("2_Dense/config.json", {"path": "a/b.json"}, "path: files of another place are not read .'a/b.json'.: remove"),
        ("sentence_bert_config.json", {"processor_name": "a/b"}, "processor_name: files of another place are not read"),
        ("tokenizer_config.json", {"init_inputs": ["/a"]}, "init_inputs: files of another place are not read"),
        ("tokenizer_config.json", {"mecab_kwargs": {"mecab_option": "-d /a"}}, "mecab_option: files of another place"),
        (
            "tokenizer_config.json",
            {"mecab_kwargs": {"mecab_dic": "os"}},
            "mecab_dic: expected unidic_lite.unidic.ipadic",
        ),
        ("preprocessor_config.json", {"tesseract_config": "--x"}, "tesseract_config: files of another place are not"),
        ("preprocessor_config.json", {"ocr_lang": "../x"}, "ocr_lang: expected .*, got '../x'"),
        ("config.json", {"bnb_4bit_compute_dtype": "seed"}, "bnb_4bit_compute_dtype: expected a type such as float32"),
        (
            "processor_config.json",
            {"audio_tokenizer_class": "AutoModel"},
            "audio_tokenizer_class: expected the class of",
        ),
    ],
)
def test_names_that_are_refused(file, values, message, copy):
    path = copy / "embeddings" / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))
    with pytest.raises(RarefyError, match=message):
        embeddings(copy)


def test_modules_are_of_the_list(copy):
    file = copy / "embeddings" / "modules.json"
    text = file.read_text()
    for name in ("sentence_transformers.util.misc.Module", "sentence_transformers.models.SentenceTransformer"):
        entries = json.loads(text)
        entries[1]["type"] = name
        file.write_text(json.dumps(entries))
        with pytest.raises(ModelError, match=f"'{name}' is no module of sentence-transformers"):
            embeddings(copy)
    router = {"types": {"a": "sentence_transformers.models.Router"}}
    file.write_text(text)
    (copy / "embeddings" / "1_Pooling" / "router_config.json").write_text(json.dumps(router))
    (copy / "embeddings" / "1_Pooling" / "a").symlink_to(copy / "embeddings" / "1_Pooling")
    with pytest.raises(ContainerError, match="modules are nested deeper than 4 folders"):
        embeddings(copy)


def test_code_pickles_and_other_files_are_not_shown(copy):
    from rarefy.model.checked_folder import checked_folder

    folder = copy / "embeddings"
    others = {"modeling.py", "pytorch_model.bin", "vocab.pkl", "model.onnx", ".hidden.json", "2_Dense/x.pt"}
    others |= {"tokenizer.1.json", "config.1.0.json", "speaker_embeddings_path.json", "1_Pooling/idf.json"}
    for name in others:
        (folder / name).write_bytes(b"{}")
    with checked_folder(folder) as shown:
        names = {p.relative_to(shown).as_posix() for p in shown.rglob("*") if p.is_file()}
        assert {"modules.json", "model.safetensors", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= names
        assert not names & others
        kept = shown
    assert not kept.exists()


def test_text_in_another_encoding_is_refused(copy):
    folder = copy / "reranker"
    text = (folder / "config.json").read_text()
    for data, message in ((text.encode("utf-16"), "expected text in UTF-8"), (text.encode("utf-8-sig"), "BOM")):
        (folder / "config.json").write_bytes(data)
        for read in (engine_files, hf.load_config):
            with pytest.raises(RarefyError, match=message):
                read(folder)


@pytest.mark.parametrize("merges", [["a Ġb"], [["a", "Ġb"]], [["a", 1]], ["a"], [1]])
def test_merges_begin_with_the_prefix_of_parts_inside_a_word(merges, copy):
    """tokenizers cuts the prefix's bytes from them: half of a character ended the process."""
    file = copy / "reranker" / "tokenizer.json"
    model = {"type": "BPE", "continuing_subword_prefix": "e", "vocab": {"a": 0, "Ġb": 1}}
    file.write_text(json.dumps({**json.loads(file.read_text()), "model": {**model, "merges": merges}}))
    with pytest.raises(
        ContainerError, match="expected second parts that begin with continuing_subword_prefix, 'e', got"
    ):
        tokenizer_of(copy)


def replace(text, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: text}, "content": content}


PIECE = {"Sequence": {"id": "A", "type_id": 0}}
LOWER = {"type": "Lowercase"}
WORDY = [replace(c, f" {word} ") for c, word in (("&", "and"), ("%", "percent"), ("+", "plus"), ("=", "equals"))]


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [replace("a", "aa")] * 26},
            "normalizer and pre_tokenizer: rep",
        ),
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [replace("a", "AA"), LOWER] * 26},
            "up to 67,108,864 times as",
        ),
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [replace("", "a", "Regex")] * 13},
            "up to 8,192 times as long",
        ),
        ("normalizer", replace("a", "b" * 5000), "up to 5,000 times as long, expected at most 4,096"),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 13},
            "up to 8,192 times as lo",
        ),
        (
            "decoder",
            {"type": "Sequence", "decoders": [replace("a", "aa")] * 13},
            "decoder: replacements make a text up",
        ),
        (
            "post_processor",
            {"type": "TemplateProcessing", "single": [PIECE] * 65},
            "templates of at most 64 parts, got 65",
        ),
        ("post_processor", {"processors": [{"single": [PIECE] * 33}] * 2}, "templates of at most 64 parts, got 66"),
        ("padding", {"strategy": {"Fixed": 10**9}}, "padding: expected at most 1,048,576 tokens, got 1,000,000,000"),
        (
            "padding",
            {"strategy": "BatchLongest", "pad_to_multiple_of": 10**8},
            "padding: expected at most 1,048,576 tok",
        ),
    ],
)
def test_tokenizers_that_would_fill_the_memory(part, value, message, copy):
    change(copy / "reranker" / "tokenizer.json", **{part: value})
    with pytest.raises(ContainerError, match=message):
        tokenizer_of(copy)


def test_replacements_that_do_not_meet_each_other_are_accepted(copy):
    steps = [*WORDY * 4, replace(" {2,}", " ", "Regex"), LOWER, {"type": "NFKC"}]
    change(copy / "reranker" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    change(copy / "reranker" / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    assert tokenizer_of(copy)("A & noon")["input_ids"]


def test_tokenizers_with_a_prefix_of_parts_inside_a_word_load(copy):
    model = tokenizers.models.BPE(
        {"a": 0, "##b": 1, "ab": 2, "[UNK]": 3}, [("a", "##b")], continuing_subword_prefix="##", unk_token="[UNK]"
    )
    tokenizers.Tokenizer(model).save(str(copy / "reranker" / "tokenizer.json"))
    assert tokenizer_of(copy).tokenize("ab") == ["ab"]


def module_of(name, **config):
    def prepare(folder):
        file = folder / "embeddings" / "modules.json"
        (folder / "embeddings" / f"3_{name}").mkdir()
        for part in ("config.json", f"{name.lower()}_config.json"):
            (folder / "embeddings" / f"3_{name}" / part).write_text(json.dumps(config))
        entry = {"idx": 3, "name": "3", "path": f"3_{name}", "type": f"sentence_transformers.models.{name}"}
        file.write_text(json.dumps([*json.loads(file.read_text()), entry]))

    return prepare


LSTM = {"word_embedding_dimension": 8, "hidden_dim": 10**5, "num_layers": 1, "dropout": 0, "bidirectional": True}
CNN = {"in_word_embedding_dimension": 20000, "out_channels": 20000, "kernel_sizes": [1, 3]}


@pytest.mark.parametrize(
    ("prepare", "load", "what"),
    [
        (lambda f: change(f / "embeddings/config.json", num_hidden_layers=10**5), embeddings, "tensors"),
        (lambda f: change(f / "reranker/config.json", num_hidden_layers=10**5), reranker, "tensors"),
        (
            lambda f: change(f / "reranker/config.json", num_hidden_layers=10**5),
            lambda f: load_for_task(f / "reranker", task="text-classification"),
            "tensors",
        ),
        (
            lambda f: change(f / "reranker/config.json", num_hidden_layers=10**5),
            lambda f: hf.load_folder(f / "reranker", meta=True),
            "tensors",
        ),
        (lambda f: change(f / "embeddings/2_Dense/config.json", out_features=10**10), embeddings, "elements"),
        (
            lambda f: change(f / "embeddings/2_Dense/config.json", out_features=10**10),
            lambda f: head_of(f / "embeddings")(torch.zeros(1, 2, 16), torch.ones(1, 2)),  # type: ignore[reportOptionalCall]
            "elements",
        ),
        (module_of("LSTM", **LSTM), embeddings, "elements"),
        (module_of("CNN", **CNN), embeddings, "elements"),
    ],
)
def test_models_are_as_large_as_their_files_explain(prepare, load, what, copy):
    prepare(copy)
    with pytest.raises(ModelError, match=f"its config describes a model of far more {what} than its files explain"):
        load(copy)


def test_numbers_of_labels_are_limited(copy):
    change(copy / "reranker" / "config.json", num_labels=1 << 18)
    with pytest.raises(ModelError, match="num_labels: expected at most 131,072, got 262,144: the file is damaged"):
        hf.load_config(copy / "reranker")


def test_settings_with_which_a_model_does_not_run(copy):
    change(copy / "embeddings" / "sentence_bert_config.json", max_seq_length="inf")
    with pytest.raises(ModelError, match="the model does not run on a text: '>' not supported between"):
        embeddings(copy)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_have_the_shapes_that_the_config_describes(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path)
    for values in ({"hidden_size": 0}, {"hidden_size": 32}, {"intermediate_size": 16}, {"vocab_size": 0}):
        config = (tmp_path / "config.json").read_text()
        change(tmp_path / "config.json", **values)
        with pytest.raises(ModelError, match=r"has the shape \[\d+, 16\], config.json describes \[\d+, \d+\]: the con"):
            decoder_from_files(tmp_path)
        (tmp_path / "config.json").write_text(config)


DOWNLOADS = """
import sys
from rarefy.model.hub import download
for offline in (False, True, False, True):
    folder = download("org/saved", offline=offline, progress=False)
    print(folder.name, sorted((f.name, f.read_text()) for f in folder.iterdir() if f.is_file()))
    (folder / "stale.json").write_text("{}")
"""


def test_the_commit_that_was_listed_is_downloaded(tmp_path):
    pytest.importorskip("huggingface_hub")
    first = {"rarefy.json": b"1", "weights-00001.safetensors": b"1", "old[1].json": b"1"}
    second = {"rarefy.json": b"2", "weights-00001.safetensors": b"2", "new.json": b"2"}

    class Requests(list):
        def append(self, item):
            if len(self.commits) == 1 and "GET /api/models/org/saved" in self:  # files are listed; now somebody pushes
                self.commits.append(hub.add("org/saved", second))
            super().append(item)

    with serving() as hub:
        hub.requests = Requests()
        hub.requests.commits = [hub.add("org/saved", first)]
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        env |= {"RAREFY_CACHE": str(tmp_path / "rarefy"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
        ran = subprocess.run([sys.executable, "-c", DOWNLOADS], env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    want = [
        f"org--saved@{commit} {sorted((n, c.decode()) for n, c in files.items())}"
        for commit, files in zip(hub.requests.commits, (first, second))
    ]
    lines = ran.stdout.splitlines()
    assert [lines[0], lines[2]] == want
    assert [line.split()[0] for line in lines[1::2]] == [line.split()[0] for line in lines[::2]]
