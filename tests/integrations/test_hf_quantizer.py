"""Folders of `rarefy.save` in transformers' own from_pretrained, against `rarefy.load`."""

import json
import subprocess
import sys

import pytest
import torch

import rarefy
from conftest import tiny_llama
from helpers.folders import SHARD, edit_index, seal
from helpers.marks import slow_case
from rarefy.common.errors import ContainerError, ModelError
from rarefy.model.quant_grid import recorded_grids

transformers = pytest.importorskip("transformers")
IDS = {"input_ids": torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))}
LAYERS = "*layer.*"


def bert(kind="Model", **more):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    config = transformers.BertConfig(**sizes, num_hidden_layers=3, num_attention_heads=4, **more)
    return getattr(transformers, f"Bert{kind}")(config).eval()


def results(model):
    with torch.no_grad():
        return [v for v in model(**IDS).to_tuple() if isinstance(v, torch.Tensor)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(results(a), results(b), strict=True))


CHANGES = {
    "dense": lambda m: None,
    "2:4": lambda m: rarefy.prune_(m, "2:4", layers=LAYERS),
    "unstructured": lambda m: rarefy.prune_(m, sparsity=0.7, layers=LAYERS),
    "int8": lambda m: rarefy.quantize_(m, "int8", layers=LAYERS),
    "int4": lambda m: rarefy.quantize_(m, "int4", layers=LAYERS),
    "2:4 and int8": lambda m: (rarefy.prune_(m, "2:4", layers=LAYERS), rarefy.quantize_(m, "int8", layers=LAYERS)),
    "codebook": lambda m: rarefy.share_(m, 4, layers=LAYERS),
    "low rank": lambda m: rarefy.factorize_(m, rank=8, layers=LAYERS),
    "shared layers": lambda m: rarefy.tie_layers_(m, 2),
    "rounded inputs": lambda m: rarefy.quantize_(m, "int8", activations="int8", layers=LAYERS),
    "cut evenly": lambda m: rarefy.cut_(m, IDS, units="neuron", keep=0.5),
    "cut unevenly": lambda m: rarefy.cut_(m, IDS, units="neuron", scope="global", keep=0.6),
    "fewer layers": lambda m: rarefy.drop_layers_(m, IDS, layers=["encoder.layer.1"]),
}
OWN_STRUCTURE = ("low rank", "shared layers", "rounded inputs", "cut unevenly")


@pytest.mark.parametrize("change", [c if c != "codebook" else slow_case(c) for c in CHANGES])
def test_auto_model_loads_what_save_wrote(change, tmp_path):
    model = bert()
    CHANGES[change](model)
    rarefy.save(model, tmp_path / "out", compress=change == "int4")
    loaded, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is transformers.BertModel and not loaded.training and not any(info.values())
    assert equal(loaded, rarefy.load(tmp_path / "out")) and equal(loaded, model)
    assert not hasattr(loaded.config, "transformers_weights")
    again = tmp_path / "again"
    if change in OWN_STRUCTURE:  # transformers could not load what it would write
        with pytest.raises(ValueError, match="not serializable"):
            loaded.save_pretrained(again)
        rarefy.save(loaded, again)
    else:
        loaded.save_pretrained(again)
        assert not hasattr(loaded.config, "quantization_config")
    assert equal(transformers.AutoModel.from_pretrained(again), model)


def test_grids_and_receipts_are_kept(tmp_path):
    model = bert()
    rarefy.compress_(model, {"stages": [{"quantize": {"weights": "int8", "layers": LAYERS}}]})
    rarefy.save(model, tmp_path / "out")
    loaded, ours = transformers.AutoModel.from_pretrained(tmp_path / "out"), rarefy.load(tmp_path / "out")
    quantized = [n for n, m in ours.named_modules() if recorded_grids(m)]
    assert quantized and quantized == [n for n, m in loaded.named_modules() if recorded_grids(m)]
    assert loaded.rarefy_receipt.to_dict() == ours.rarefy_receipt.to_dict()


def test_tied_weights_stay_tied(tmp_path, caplog):
    model = tiny_llama()
    rarefy.prune_(model, "2:4")
    rarefy.save(model, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and equal(loaded, model)
    assert "corrupted" not in caplog.text
    tokens = loaded.generate(**IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, model.generate(**IDS, max_new_tokens=4, do_sample=False))


def test_other_heads_and_base_models(tmp_path):
    for change in ("2:4", "low rank", "shared layers", "rounded inputs"):
        model = bert("ForMaskedLM")
        CHANGES[change](model)
        rarefy.save(model, tmp_path / change)
        base = transformers.AutoModel.from_pretrained(tmp_path / change, add_pooling_layer=False)
        with torch.no_grad():
            assert torch.equal(base(**IDS).last_hidden_state, model.bert(**IDS).last_hidden_state)
    # a new head on a base model, reported as missing
    model = bert(add_cross_attention=False)
    CHANGES["low rank"](model)
    rarefy.save(model, tmp_path / "base")
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, output_loading_info=True
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"} and loaded.config.num_labels == 5
    with torch.no_grad():
        assert torch.equal(loaded.bert(**IDS).pooler_output, model(**IDS).pooler_output)
    model = bert("ForMaskedLM")
    CHANGES["cut unevenly"](model)
    rarefy.save(model, tmp_path / "cut")
    assert equal(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "cut"), model)
    with pytest.raises(ModelError, match="cut to sizes that no config expresses: load it as that class"):
        transformers.AutoModel.from_pretrained(tmp_path / "cut")


def test_arguments_of_from_pretrained(tmp_path):
    model = bert()
    CHANGES["int8"](model)
    rarefy.save(model, tmp_path / "out")
    load = transformers.AutoModel.from_pretrained
    half = load(tmp_path / "out", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and not any(recorded_grids(m) for m in half.modules())
    assert torch.equal(half.pooler.dense.weight, model.pooler.dense.weight.to(torch.bfloat16))
    assert load(tmp_path / "out", attn_implementation="eager").config._attn_implementation == "eager"
    assert len(load(tmp_path / "out", output_hidden_states=True)(**IDS).hidden_states) == 4
    assert equal(load(tmp_path / "out", device_map="cpu"), model)
    assert equal(transformers.BertModel.from_pretrained(tmp_path / "out"), model)
    rarefy.cast_(model, "bf16")
    rarefy.save(model, tmp_path / "bf16")
    assert load(tmp_path / "bf16").dtype == torch.bfloat16 and equal(load(tmp_path / "bf16"), model)


def test_damaged_and_hostile_folders(tmp_path):
    model = bert()
    CHANGES["unstructured"](model)
    load = transformers.AutoModel.from_pretrained

    def saved(name):
        rarefy.save(model, tmp_path / name)
        return tmp_path / name

    folder = saved("altered")
    data = bytearray((folder / SHARD).read_bytes())
    data[-1] ^= 1
    (folder / SHARD).write_bytes(data)
    with pytest.raises(ContainerError, match="sha256 is not the one in the index"):
        load(folder)
    folder = saved("index")
    edit_index(
        folder,
        lambda index: (
            index["tensors"]["pooler.dense.weight"]["shape"].reverse() or index["tensors"].pop("pooler.dense.bias")
        ),
    )
    with pytest.raises(ContainerError, match=r"lacks tensor 'pooler.dense.bias'"):
        load(folder)
    folder = saved("factors")
    edit_index(folder, lambda index: index["meta"].update(factors={"os.system": {"kind": "lowrank", "ranks": [1]}}))
    with pytest.raises(ContainerError, match="has no layer 'os.system' to factorize"):
        load(folder)
    folder = saved("lost")
    (folder / "rarefy.json").unlink()
    with pytest.raises(ContainerError, match="is not a Rarefy folder"):
        load(folder)
    folder = saved("link")
    (folder / SHARD).rename(tmp_path / "elsewhere")
    (folder / SHARD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ContainerError, match="a link or no plain file"):
        load(folder)
    for key, value, message in (
        ("transformers_weights", "../../elsewhere.safetensors", None),  # replaced by our own
        ("attn_implementation", "evil/kernel", "requests attention code of the hub"),
        ("auto_map", {"AutoModel": "evil--code.Model"}, None),  # transformers knows the class, and uses it
    ):
        folder = saved(key)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        if message is None:
            assert type(load(folder)) is transformers.BertModel and equal(load(folder), model)
        else:
            with pytest.raises(ValueError, match=message):
                load(folder)


def test_damaged_values_are_refused(tmp_path):
    model = bert()
    CHANGES["unstructured"](model)
    rarefy.save(model, tmp_path / "out", format="csr")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "out" / SHARD)
    name = next(n for n in tensors if n == "encoder.layer.0.output.dense.weight.col")
    tensors[name].view(torch.int16).fill_(30_000)
    save_file(tensors, tmp_path / "out" / SHARD)
    seal(tmp_path / "out")
    with pytest.raises((ContainerError, RuntimeError)):
        transformers.AutoModel.from_pretrained(tmp_path / "out")


def test_compiled_and_foreign_folders(tmp_path):
    rarefy.save(torch.nn.Linear(2, 2), tmp_path / "linear")
    (tmp_path / "linear" / "config.json").write_text(
        '{"model_type": "bert", "quantization_config": {"quant_method": "rarefy"}}'
    )
    with pytest.raises(ModelError, match="holds no model of transformers"):
        transformers.AutoModel.from_pretrained(tmp_path / "linear")
    bert().save_pretrained(tmp_path / "plain")
    from rarefy.integrations.hf_quantizer import RarefyConfig

    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        transformers.AutoModel.from_pretrained(tmp_path / "plain", quantization_config=RarefyConfig())


@pytest.mark.slow
def test_importing_rarefy_is_enough(tmp_path):
    rarefy.save(bert(), tmp_path / "out")
    script = f"""
import sys
if sys.argv[1:]:
    import rarefy
    assert not {{"torch", "transformers"}} & set(sys.modules)
from transformers import AutoModel
print(type(AutoModel.from_pretrained({str(tmp_path / "out")!r})).__name__)
"""
    ran = [subprocess.run([sys.executable, "-c", script, *a], capture_output=True, text=True) for a in (["rarefy"], [])]
    assert ran[0].stdout == "BertModel\n", ran[0].stderr
    # without Rarefy it is an error: weights are never drawn at random
    assert ran[1].returncode and "got rarefy" in ran[1].stderr and "no file named" in ran[1].stderr


def test_compiled_folders_are_checked_too(tmp_path):
    from rarefy.cli.shared import files_beside_engine

    model = bert()
    model.save_pretrained(tmp_path / "model")
    fast = rarefy.compile(model, {**IDS, "attention_mask": torch.ones_like(IDS["input_ids"])})
    out = tmp_path / "fast"
    rarefy.save(fast, out, files=files_beside_engine(tmp_path / "model"))  # as `rarefy compile` does
    loaded = transformers.AutoModel.from_pretrained(out)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(results(loaded), results(model), strict=True))
    assert all(p.is_meta for p in loaded.parameters()) and isinstance(loaded, transformers.BertModel)
    graph = json.loads((out / "graph.json").read_text())
    (out / "graph.json").write_text(json.dumps(graph).replace("aten", "os.system"))
    with pytest.raises(ContainerError):
        transformers.AutoModel.from_pretrained(out)
    seal(out)
    with pytest.raises(ContainerError):
        transformers.AutoModel.from_pretrained(out)


def test_a_missing_library_is_named(monkeypatch):
    import importlib

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "rarefy.integrations.transformers", raising=False)
    with pytest.raises(ModelError, match=r'pip install "rarefy\[hf\]"'):
        importlib.import_module("rarefy.integrations.transformers")
