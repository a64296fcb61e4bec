"""Models of sentence-transformers on the engine against sentence-transformers itself: embeddings, scores, folders."""

import json
import shutil

import numpy as np
import pytest
import torch

from conftest import sample, tree
from rarefy.common.errors import ContainerError, DataError, ModelError, RarefyError, RecipeError
from rarefy.data import builtin

st = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from rarefy.integrations import sentence_transformers as ours
from rarefy.integrations.compiled_transformer import CompiledTransformer, length_groups

WORDS = [
    "a",
    "ship",
    "sails",
    "at",
    "noon",
    "the",
    "cat",
    "sat",
    "on",
    "warm",
    "stones",
    "while",
    "rain",
    "fell",
    "over",
    "quiet",
    "northern",
    "hills",
]
# 3 to 60 words, in no order, one of them empty, one longer than the model reads
TEXTS = [" ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(3 + 13 * i % 58)) for i in range(24)]
TEXTS += ["", " ".join(WORDS * 40)]
TUNE = {"tune": False}


def tiny(folder, kind="BertModel", **config):
    """Write a small transformer with MiniLM's tokenizer."""
    sample("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(builtin.model_folder("minilm"))
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**sizes, num_attention_heads=4, **config))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= 3  # so that outputs depend on the text
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_of(folder, *modules, kind="BertModel", config=(), **options):
    """Write a model of sentence-transformers with these modules after a small transformer."""
    first = Transformer(str(tiny(folder / "transformer", kind, **dict(config))), max_seq_length=128)
    st.SentenceTransformer(modules=[first, *modules], device="cpu", **options).save_pretrained(str(folder / "model"))
    return folder / "model"


def theirs(folder, **options):
    return st.SentenceTransformer(str(folder), device="cpu", local_files_only=True, **options)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """MiniLM of sentence-transformers, in fp32 and in 8 bits on the engine, the latter saved and loaded."""
    sample("minilm")
    name = builtin.model_folder("minilm")
    fast = ours.SentenceTransformer("minilm", **TUNE)
    saved = tmp_path_factory.mktemp("minilm") / "saved"
    fast.save_pretrained(saved)
    return theirs(name), ours.SentenceTransformer(name, "fp32", **TUNE), fast, saved


def test_embeddings_equal_those_of_sentence_transformers(minilm):
    dense, fp32, int8, _ = minilm
    assert np.abs(fp32.encode(TEXTS) - dense.encode(TEXTS)).max() < 1e-5
    sample("wiki")
    texts = [" ".join(text.split()[: 5 + 11 * i % 80]) for i, text in enumerate(builtin.wiki(True)[:48])]
    want = dense.encode(texts)
    assert np.abs(fp32.encode(texts) - want).max() < 1e-5
    cosine = (int8.encode(texts) * want).sum(1)
    assert cosine.mean() >= 0.997 and cosine.min() > 0.994
    assert isinstance(int8, st.SentenceTransformer) and int8.precision == "int8"
    between = ours.SentenceTransformer("minilm", "int16", **TUNE)
    assert (between.encode(texts) * want).sum(1).min() > 0.9999


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 3, "normalize_embeddings": True},
        {"truncate_dim": 96},
        {"prompt": "query: "},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"output_value": "token_embeddings"},
        {"show_progress_bar": True},
        {"processing_kwargs": {"text": {"max_length": 9, "truncation": True}}},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_of_encode(minilm, options):
    dense, fp32, *_ = minilm
    want, got = dense.encode(TEXTS[:7], **options), fp32.encode(TEXTS[:7], **options)
    assert type(got) is type(want) and len(got) == len(want)
    for a, b in zip(want, got):
        assert a.shape == b.shape and np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-5


def test_single_texts_empty_lists_and_embeddings_in_8_bits(minilm):
    dense, fp32, *_ = minilm
    assert fp32.encode(TEXTS[3]).shape == (384,)
    assert np.abs(fp32.encode(TEXTS[3]) - dense.encode(TEXTS[3])).max() < 1e-5
    assert fp32.encode([]).shape == dense.encode([]).shape == (0,)
    assert np.array_equal(fp32.encode(TEXTS, precision="binary"), dense.encode(TEXTS, precision="binary"))


def test_a_saved_folder_loads_in_both(minilm):
    dense, _, int8, saved = minilm
    again = ours.SentenceTransformer(saved)
    assert again.precision == "int8" and type(again[0]) is Transformer
    assert isinstance(again[0].model, CompiledTransformer) and not list(again.parameters())
    assert np.array_equal(again.encode(TEXTS), int8.encode(TEXTS))
    assert np.array_equal(theirs(saved).encode(TEXTS), dense.encode(TEXTS))
    files = set(tree(saved))
    assert {
        f for f in tree(builtin.model_folder("minilm")) if f[0] != "."
    } <= files and "rarefy/embedding.json" in files
    assert not [f for f in files if f.endswith((".bin", ".pt", ".pkl"))]
    with pytest.raises(ContainerError, match="exists and is a Rarefy folder; pass overwrite=True"):
        again.save_pretrained(saved)
    before = tree(saved)
    again.save_pretrained(saved, overwrite=True)
    assert tree(saved) == before


@pytest.mark.slow
def test_several_processes(minilm):
    *_, int8, saved = minilm
    again = ours.SentenceTransformer(saved)
    pool = again.start_multi_process_pool(["cpu", "cpu"])
    try:
        assert np.allclose(again.encode(TEXTS, pool=pool, chunk_size=7), int8.encode(TEXTS), atol=1e-6)
    finally:
        again.stop_multi_process_pool(pool)


# other modules: each equal to sentence-transformers, and after a round trip


def round_trip(folder, tmp_path, **options):
    """Return both models of a folder, after checks that embeddings are equal before and after saving."""
    dense, fast = theirs(folder, **options), ours.SentenceTransformer(folder, "fp32", **TUNE, **options)
    want = dense.encode(TEXTS)
    assert np.abs(fast.encode(TEXTS) - want).max() < 1e-5
    fast.save_pretrained(tmp_path / "out")
    assert np.array_equal(ours.SentenceTransformer(tmp_path / "out").encode(TEXTS), fast.encode(TEXTS))
    assert np.array_equal(theirs(tmp_path / "out").encode(TEXTS), want)
    return dense, fast


def test_pooling_by_the_first_token(tmp_path):
    folder = model_of(tmp_path, Pooling(64, "cls"), prompts={"query": "search: "}, similarity_fn_name="dot")
    dense, fast = round_trip(folder, tmp_path)
    want = dense.encode_query(TEXTS)
    assert np.abs(fast.encode_query(TEXTS) - want).max() < 1e-5 and np.abs(want - dense.encode(TEXTS)).max() > 1e-3
    again = ours.SentenceTransformer(tmp_path / "out")
    assert again.prompts["query"] == "search: " and again.similarity_fn_name == "dot"


@pytest.mark.slow
def test_dense_and_normalize_after_several_poolings(tmp_path):
    dense = Dense(128, 48, activation_function=torch.nn.Tanh())
    folder = model_of(tmp_path, Pooling(64, ["mean", "max"]), dense, Normalize())
    _, fast = round_trip(folder, tmp_path)
    assert np.allclose(np.linalg.norm(fast.encode(TEXTS), axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_matryoshka_and_a_model_that_cannot_leave_out_padding(tmp_path):
    folder = model_of(tmp_path, Pooling(64, "mean"), kind="MPNetModel", truncate_dim=16)
    dense, fast = round_trip(folder, tmp_path)
    assert not fast[0].model.leaves_out_padding and fast.encode(TEXTS).shape == (len(TEXTS), 16)
    with fast.truncate_embeddings(8):
        assert fast.encode(TEXTS).shape == (len(TEXTS), 8)
    assert fast.get_embedding_dimension() == dense.get_embedding_dimension()


@pytest.mark.slow
def test_a_decoder_that_reads_the_last_token(tmp_path):
    config = {"num_key_value_heads": 2, "head_dim": 16}
    folder = model_of(tmp_path, Pooling(64, "lasttoken"), Normalize(), kind="Qwen3Model", config=config)
    round_trip(folder, tmp_path)


def test_groups_of_lengths():
    mask = (torch.arange(40) < torch.tensor([[40], [3], [31], [8], [29], [7]])).long()
    inputs = {"input_ids": torch.zeros(6, 40), "attention_mask": mask}
    assert length_groups(inputs) == [([0, 2], 40), ([4], 29), ([3, 5], 8), ([1], 3)]
    assert len(length_groups({"attention_mask": torch.ones(3, 5)})) == 1
    for other in ({"attention_mask": mask.flip(1)}, {"attention_mask": mask * 0}, {}):
        assert length_groups(other) == []
    assert length_groups({**inputs, "pixel_values": torch.zeros(6, 3)}) == []


@pytest.fixture(scope="module")
def rerankers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reranker")
    tiny(folder / "bert", "BertForSequenceClassification", num_labels=1)
    st.CrossEncoder(str(folder / "bert"), device="cpu").save_pretrained(str(folder / "model"))
    return folder, ours.CrossEncoder(folder / "model", "fp32", **TUNE)


def test_scores_of_pairs(rerankers):
    folder, fast = rerankers
    dense = st.CrossEncoder(str(folder / "model"), device="cpu", local_files_only=True)
    pairs = list(zip(TEXTS, TEXTS[::-1]))
    want = dense.predict(pairs)
    assert np.abs(fast.predict(pairs) - want).max() < 1e-5 and want.std() > 1e-3
    ranked, expected = fast.rank(TEXTS[0], TEXTS[1:], top_k=3), dense.rank(TEXTS[0], TEXTS[1:], top_k=3)
    assert [r["corpus_id"] for r in ranked] == [r["corpus_id"] for r in expected]
    fast.save_pretrained(folder / "out")
    again = ours.CrossEncoder(folder / "out")
    assert np.array_equal(again.predict(pairs), fast.predict(pairs)) and again.precision == "fp32"
    plain = st.CrossEncoder(str(folder / "out"), device="cpu", local_files_only=True)
    assert np.array_equal(plain.predict(pairs), want)
    with pytest.raises(ModelError, match="the engine runs on the CPU, got the device 'cuda': leave it out"):
        fast.rank(TEXTS[0], TEXTS[1:], device="cuda")
    int8 = ours.CrossEncoder(folder / "model", **TUNE).predict(pairs)
    assert np.corrcoef(int8, want)[0, 1] > 0.99


def test_evaluators_run_unchanged(minilm, tmp_path):
    from sentence_transformers.sentence_transformer import evaluation

    dense, fp32, *_ = minilm
    texts = TEXTS[:12]
    ir = evaluation.InformationRetrievalEvaluator(
        {str(i): " ".join(t.split()[:3]) for i, t in enumerate(texts)},
        {str(i): t for i, t in enumerate(texts)},
        {str(i): {str(i)} for i in range(len(texts))},
    )
    similar = evaluation.EmbeddingSimilarityEvaluator(texts, texts[::-1], [i / 12 for i in range(12)])
    for evaluator in (ir, similar):
        want, got = dense.evaluate(evaluator), fp32.evaluate(evaluator)
        assert want.keys() == got.keys() and all(got[n] == pytest.approx(want[n], abs=1e-4) for n in want)


@pytest.mark.slow
def test_changed_weights_are_compiled_again(tmp_path):
    folder = model_of(tmp_path, Pooling(64, "mean"))
    ours.SentenceTransformer(folder, "fp32", **TUNE).save_pretrained(tmp_path / "out")
    other = model_of(tmp_path / "other", Pooling(64, "mean"), config={"initializer_range": 0.1})
    shutil.copy(other / "model.safetensors", tmp_path / "out")
    with pytest.warns(UserWarning, match="have changed since the model was compiled: it is compiled again"):
        again = ours.SentenceTransformer(tmp_path / "out", **TUNE)
    want = theirs(tmp_path / "out").encode(TEXTS)
    assert again.precision == "int8" and (again.encode(TEXTS) - want).std() < 0.1 * want.std()


# what is refused, in one line


def refused(match, name, *args, kind=RarefyError, cls=ours.SentenceTransformer, **options):
    with pytest.raises(kind, match=match) as caught:
        cls(name, *args, **options)
    assert "\n" not in str(caught.value)


def test_wrong_names_and_options(tmp_path, monkeypatch):
    (tmp_path / "minilm-fast").mkdir()
    monkeypatch.chdir(tmp_path)
    refused("no model folder './minilm-fst' .*did you mean 'minilm-fast'", "./minilm-fst", kind=ModelError)
    refused("did you mean 'minilm'.; sentence-transformers/minlm is not in the cache, and the run is offline", "minlm")
    refused("revision='v2' contradicts 'a/b@v1': give one of the two", "a/b@v1", revision="v2")
    refused("no model folder 'minilm-fast/none'", "minilm-fast/none", kind=ModelError)  # a path, no name of the hub
    refused("has neither modules.json nor config.json", "minilm-fast")
    refused("expected the folder or the name of a model, got None", None)
    (tmp_path / "file.json").write_text("{}")
    refused("is a file: give the folder", "file.json")
    refused("unknown precision 'int4'; choose from bf16, fp32, int16, int8", "minilm", "int4")
    refused("data has no effect without recipe", "minilm", data=["a text"], kind=RecipeError)
    refused("backend: the engine is the backend", "minilm", backend="onnx")
    refused("trust_remote_code: code of a model's folder is never run", "minilm", trust_remote_code=True)
    refused("device: the engine runs on the CPU", "minilm", device="cuda")
    refused("leave device_map out", "minilm", model_kwargs={"device_map": "auto"})
    with pytest.raises(TypeError, match="presicion"):
        ours.SentenceTransformer(tiny(tmp_path / "tiny"), presicion="int8")


def test_folders_that_are_damaged_or_not_trusted(tmp_path):
    folder = model_of(tmp_path, Pooling(64, "mean"), Dense(64, 8))
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)

    def broken(match, change, kind=RarefyError):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        change()
        refused(match, folder, kind=kind, **TUNE)

    text = (folder / "modules.json").read_text()
    for name, match in (("evil.Module", "'evil.Module' is no module of"), ("os.system", "'os.system' is no module")):
        changed = text.replace("sentence_transformers.sentence_transformer.modules.pooling.Pooling", name)
        broken(f"{match}.*never run", lambda changed=changed: (folder / "modules.json").write_text(changed))
    escaping = text.replace("1_Pooling", "../1_Pooling")
    broken("expected the name of a folder as path", lambda: (folder / "modules.json").write_text(escaping))
    broken("not JSON", lambda: (folder / "modules.json").write_text(text[:-9]), ContainerError)
    broken("has no tokenizer, such as", lambda: [f.unlink() for f in folder.glob("tokenizer*")])
    pickled = folder / "2_Dense" / "pytorch_model.bin"
    broken("pytorch_model.bin is a pickle", lambda: (folder / "2_Dense" / "model.safetensors").rename(pickled))
    broken("pytorch_model.bin is a pickle", lambda: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"))
    broken("does not load", lambda: (folder / "model.safetensors").write_bytes(b"damaged"))
    broken("does not load", lambda: (folder / "model.safetensors").unlink())
    pooling = folder / "1_Pooling"
    broken("does not load: .*; .*1_Pooling is missing: copy it again", lambda: shutil.rmtree(pooling))
    broken("does not load: .*; .*config.json is missing: copy it", lambda: (pooling / "config.json").unlink())
    tokenizer = folder / "tokenizer.json"
    broken("tokenizer.json is damaged", lambda: tokenizer.write_bytes(tokenizer.read_bytes()[:-9]))


def test_compiled_models_that_are_damaged(minilm, tmp_path):
    *_, saved = minilm
    folder = tmp_path / "out"
    shutil.copytree(saved, folder)
    shard = next((folder / "rarefy").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-3])
    refused("was it truncated", folder, kind=ContainerError)
    note = folder / "rarefy" / "embedding.json"
    note.write_text('{"schema": 99}')
    refused("expected schema 1.*delete .* to compile the model again", folder, kind=ContainerError)
    note.unlink()
    shutil.rmtree(folder / "rarefy")
    assert not (folder / "rarefy").exists() and (folder / "model.safetensors").exists()


def test_wrong_texts_and_devices(minilm):
    _, fp32, *_ = minilm
    for wrong in ({"batch_size": 0}, {"prompt_name": "question"}, {"unknown": 1}, {"precision": "int4"}):
        with pytest.raises(ValueError):
            fp32.encode(TEXTS[:2], **wrong)
    with pytest.raises((ValueError, TypeError)):
        fp32.encode([None])
    for device in ("meta", "cuda", "cuda:0", "mps", "gpu", torch.device("cuda"), 0):
        for call in (fp32.to, fp32.cuda, lambda d: fp32.encode(TEXTS[:2], device=d)):
            with pytest.raises(
                ModelError, match=f"the engine runs on the CPU, got the device '{device}': leave it out"
            ):
                call(device)
    with pytest.raises(ModelError, match="got the device 'cuda': leave it out"):
        fp32.cuda()
    for devices in (["cuda:0"], ["cpu", "gpu"]):
        for call in (fp32.start_multi_process_pool, lambda d: fp32.encode(TEXTS[:2], device=d)):
            with pytest.raises(ModelError, match="pass 'cpu' for each process"):
                call(devices)
    assert np.array_equal(fp32.encode(TEXTS[:2], device="cpu"), fp32.encode(TEXTS[:2], device=torch.device("cpu")))
    assert fp32.to("cpu") is fp32


def test_models_without_a_transformer_are_refused(tmp_path):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    sample("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(builtin.model_folder("minilm"))
    static = StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=16)
    st.SentenceTransformer(modules=[static], device="cpu").save_pretrained(str(tmp_path / "static"))
    refused("has no transformer to compile", tmp_path / "static")


def test_without_sentence_transformers_one_line_says_what_to_install(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.delitem(sys.modules, "rarefy.integrations.sentence_transformers")
    with pytest.raises(
        ModelError, match=r"need sentence-transformers 6 or later: pip install \"rarefy\[embeddings\]\""
    ):
        importlib.import_module("rarefy.integrations.sentence_transformers")


def test_a_recipe_compresses_first_and_its_weights_are_saved(tmp_path):
    folder = model_of(tmp_path, Pooling(64, "cls"))
    recipe = {"stages": [{"prune": {"sparsity": 0.5, "score": "wanda", "layers": "encoder.*"}}]}
    fast = ours.SentenceTransformer(folder, "fp32", recipe=recipe, data=TEXTS[:5], **TUNE)
    assert fast.receipt.sparsity["achieved"] == pytest.approx(0.5, abs=0.01)
    fast.save_pretrained(tmp_path / "out")
    dense = theirs(tmp_path / "out")
    assert np.abs(dense.encode(TEXTS) - fast.encode(TEXTS)).max() < 1e-5
    assert (dense[0].model.encoder.layer[0].output.dense.weight == 0).float().mean() > 0.45
    refused("got one text", folder, recipe=recipe, data="a text", kind=DataError)
    refused("expected texts or batches, got int among them", folder, recipe=recipe, data=[1, 2], kind=DataError)


def test_the_compiled_model_is_never_saved_beside_other_weights(tmp_path, monkeypatch):
    folder = model_of(tmp_path, Pooling(64, "mean"))
    monkeypatch.chdir(folder.parent)
    fast = ours.SentenceTransformer(folder.name, "fp32", **TUNE)
    monkeypatch.chdir("/")  # the folder was named by a relative path
    (tmp_path / "out").mkdir()
    fast.save(tmp_path / "out")  # an empty folder, as push_to_hub passes
    assert (tmp_path / "out" / "rarefy" / "embedding.json").is_file()
    again = ours.SentenceTransformer(tmp_path / "out")
    for _ in range(2):  # into the folder that it was loaded from
        again.save(tmp_path / "out", overwrite=True)
    other = model_of(tmp_path / "other", Pooling(64, "mean"), config={"initializer_range": 0.1})
    shutil.copy(other / "model.safetensors", folder)
    with pytest.raises(ContainerError, match="the weights have changed since the model was loaded: load it again"):
        fast.save_pretrained(tmp_path / "late")
    assert not (tmp_path / "late").exists()
    with pytest.raises(ContainerError, match="expected the path of a folder, got None"):
        fast.save(None)


def test_overwriting_spares_folders_that_are_not_ours(tmp_path):
    fast = ours.SentenceTransformer(model_of(tmp_path, Pooling(64, "mean")), "fp32", **TUNE)
    fast.save(tmp_path / "out")
    (tmp_path / "out" / "2026_results").mkdir()
    (tmp_path / "out" / "2026_results" / "table.csv").write_text("1,2")
    with pytest.raises(ContainerError, match=r"not only Rarefy's \(it contains 2026_results\)"):
        fast.save(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "2026_results" / "table.csv").read_text() == "1,2"


def test_options_that_make_another_model_count_in_compiled_folders(rerankers):
    folder, fast = rerankers
    shutil.rmtree(folder / "labels", ignore_errors=True)
    fast.save(folder / "labels")
    pairs = list(zip(TEXTS[:4], TEXTS[4:8]))
    want = fast.predict(pairs)
    assert np.array_equal(ours.CrossEncoder(folder / "labels", num_labels=1).predict(pairs), want)
    shallow = {"config_kwargs": {"num_hidden_layers": 1}}
    dense = st.CrossEncoder(str(folder / "labels"), device="cpu", local_files_only=True, **shallow).predict(pairs)
    assert np.abs(ours.CrossEncoder(folder / "labels", "fp32", **TUNE, **shallow).predict(pairs) - dense).max() < 1e-5
    assert np.abs(dense - want).max() > 1e-4
    refused("the model does not load", folder / "labels", num_labels=3, cls=ours.CrossEncoder, **TUNE)


def test_configs_by_which_libraries_would_run_code_are_refused(minilm, tmp_path):
    folder = model_of(tmp_path, Pooling(64, "mean"), Dense(64, 8))

    def changed(part, **values):
        file, text = folder / part, (folder / part).read_text()
        file.write_text(json.dumps({**json.loads(text), **values}))
        refused("requests custom attention code|expected a class of torch.nn, got", folder, kind=ModelError)
        file.write_text(text)

    changed("config.json", attn_implementation="evil/kernel")
    changed("config.json", text_config={"_attn_implementation": {"": "evil/kernel"}})
    changed("config.json", sentence_transformers={"activation_fn": "torch.hub.list"})
    changed("2_Dense/config.json", activation_function="torch._C._crash_if_csrc_asan")
    (folder / "modules.json").write_bytes(b"\xff\xfe")
    refused("modules.json: not JSON: expected text in UTF-8", folder, kind=ContainerError)
    refused("unknown precision", folder, ["int8"], kind=ModelError)
