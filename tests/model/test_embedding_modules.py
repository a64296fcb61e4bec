"""Folders of sentence-transformers: what follows the transformer is kept by commands, and used by metrics."""

import json
import shutil

import numpy as np
import pytest
import torch

import rarefy
from conftest import sample, tiny_llama, tree
from rarefy.common.errors import ContainerError, DataError, ModelError
from rarefy.data import builtin
from rarefy.data.sources import Take, batches, special_tokens
from rarefy.data.text_pairs import text_pairs
from rarefy.evaluation.quality import metric_of
from rarefy.evaluation.retrieval import recall
from rarefy.model import embedding_modules, hf

st = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

TEXTS = [f"the ship number {i} sails at noon from harbour {i * i} with {i + 3} cats and more" for i in range(12)]
RECIPE = "name: tiny\nstages:\n  - quantize: {weights: int8, layers: encoder.*}\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of one small transformer: pooled by the first token and made smaller, and by the mean."""
    sample("minilm")
    root = tmp_path_factory.mktemp("models")
    tokenizer = transformers.AutoTokenizer.from_pretrained(builtin.model_folder("minilm"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= 3
    model.save_pretrained(root / "bert")
    tokenizer.save_pretrained(root / "bert")
    ends = {"cls": [Pooling(64, "cls"), Dense(64, 24), Normalize()], "mean": [Pooling(64, "mean"), Normalize()]}
    for name, modules in ends.items():
        first = Transformer(str(root / "bert"))
        st.SentenceTransformer(modules=[first, *modules], device="cpu").save_pretrained(str(root / name))
    return root


def theirs(folder):
    return st.SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.mark.slow
def test_compress_and_export_keep_the_modules(folders, tmp_path, run):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    out = tmp_path / "out"
    words = ["compress", folders / "cls", "--recipe", tmp_path / "tiny.yaml", "--out", out, "--quiet"]
    assert run(*words).code == 0
    kept = {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "config_sentence_transformers.json"}
    assert kept <= set(tree(out))
    assert run(*words, "--force").code == 0 and kept <= set(tree(out))
    assert run("export", out, "--out", tmp_path / "hf").code == 0
    want = theirs(tmp_path / "hf").encode(TEXTS)
    assert want.shape == (12, 24)
    from rarefy.integrations.sentence_transformers import SentenceTransformer

    assert np.abs(SentenceTransformer(out, "fp32", tune=False).encode(TEXTS) - want).max() < 1e-5
    (out / "mine").mkdir()
    result = run(*words, "--force")
    assert result.code == 2 and "not only Rarefy's (it contains mine)" in result.err


def test_metrics_use_the_modules_of_the_folder(folders):
    pairs = [(" ".join(t.split()[:7]), " ".join(t.split()[7:])) for t in TEXTS]
    for name in ("cls", "mean"):
        model, tokenizer, plain = (
            hf.load_folder(folders / name),
            hf.load_tokenizer(folders / name),
            theirs(folders / name),
        )
        data = text_pairs(pairs, tokenizer, batch=5)
        asked, answers = (torch.tensor(plain.encode([p[i] for p in pairs])) for i in (0, 1))
        assert metric_of("retrieval", model, data).measure(model) == pytest.approx(recall(asked, answers))
        assert (embedding_modules.head_of_model(model) is None) == (name == "mean")
        assert metric_of("similarity", model, [side for pair in data for side in pair]).measure(model) == 1.0


def test_a_reranker_has_no_modules_for_metrics(folders, tmp_path):
    shutil.copytree(folders / "cls", tmp_path / "alone")
    entries = json.loads((tmp_path / "alone" / "modules.json").read_text())
    (tmp_path / "alone" / "modules.json").write_text(json.dumps(entries[:1]))
    assert embedding_modules.head_of(tmp_path / "alone") is None
    assert embedding_modules.head_of(folders / "cls") is not None


def test_heads_that_cannot_be_loaded(folders, tmp_path, monkeypatch):
    folder = tmp_path / "cls"
    shutil.copytree(folders / "cls", folder)
    head, ones = embedding_modules.FolderHead(folder), torch.ones(1, 2, dtype=torch.long)
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "sentence_transformers.sentence_transformer", None)
        with pytest.raises(ModelError, match=r'need sentence-transformers: pip install "rarefy\[embeddings\]"'):
            head(torch.zeros(1, 2, 64), ones)
    entries = json.loads((folder / "modules.json").read_text())
    entries[2]["type"] = "sentence_transformers.sentence_transformer.modules.WordWeights"
    (folder / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(ModelError, match="metrics cannot use 'WordWeights'; they can use Pooling, Dense"):
        embedding_modules.FolderHead(folder)(torch.zeros(1, 2, 64), ones)
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pytorch_model.bin is a pickle, which is never opened"):
        embedding_modules.module_files(folder)
    for text, kind in (("{}", ContainerError), ('[{"name": "0", "path": "../x", "type": "a"}]', ContainerError)):
        (folder / "modules.json").write_text(text)
        with pytest.raises(kind, match="expected"):
            embedding_modules.check_modules(folder)


def test_windows_of_encoders_have_the_special_tokens(folders, tmp_path):
    tokenizer = hf.load_tokenizer(folders / "cls")
    assert special_tokens(tokenizer) == ([tokenizer.cls_token_id], [tokenizer.sep_token_id])
    text = " ".join(TEXTS)
    (tmp_path / "a.txt").write_text(text)
    (data,) = batches("a.txt", Take(tokens=16, batch=64), tokenizer=tokenizer, base=tmp_path)
    ids = data["input_ids"]
    assert (
        ids.shape[1] == 16
        and (ids[:, 0] == tokenizer.cls_token_id).all()
        and (ids[:, -1] == tokenizer.sep_token_id).all()
    )
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sorted(i for row in ids[:, 1:-1].tolist() for i in row) == sorted(whole[: 14 * len(ids)])
    (short,) = batches("a.txt", Take(tokens=2, batch=999), tokenizer=tokenizer, base=tmp_path)
    assert tokenizer.cls_token_id not in short["input_ids"]
    with pytest.raises(DataError, match="too short"):
        batches("a.txt", Take(tokens=16, samples=900), tokenizer=tokenizer, base=tmp_path)


@pytest.mark.slow
def test_the_recipe_for_embeddings(tmp_path, run):
    for name in ("minilm", "wiki"):
        sample(name)
    settings = ["--set", "samples=8", "--set", "evaluate.samples=60"]
    words = ["compress", "minilm", "--recipe", "embeddings-fast", "--out", tmp_path / "out", "--json", *settings]
    receipt = json.loads(run(*words).out)
    quality = receipt["quality"]
    assert quality["metric"] == "retrieval" and quality["after"] > 0.9 * quality["before"]
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert rarefy.load(tmp_path / "out") is not None


def test_decoders_get_no_special_tokens():
    assert special_tokens(tiny_llama()) == ([], [])
