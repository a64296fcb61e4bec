"""Small valid files of every kind that Rarefy reads, which the targets change."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import frontier_samples
import rarefy
from fixtures.saved_by_0_1 import models
from helpers.folders import small_container
from helpers.recipes import FULL

TESTS = Path(__file__).parents[1]
OLD = TESTS / "fixtures" / "saved_by_0_1"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
    "at",
    "are",
    "this",
    "have",
    "from",
    "or",
    "had",
]


def build(name: str) -> nn.Module | None:
    """Return the model that a fixture loads into, None where its folder holds the model."""
    return None if "digest" not in EXPECTED[name] else getattr(models, EXPECTED[name]["model"])()


def example(name: str) -> Tensor:
    """Return an input of a fixture's model."""
    return models.inputs(EXPECTED[name]["model"])


def old_and_new(*names: str) -> Callable[[Path], None]:
    """Return a function that writes fixtures as version 0.1 wrote them, and as they are written today."""

    def make(folder: Path) -> None:
        for name in names:
            shutil.copytree(OLD / name, folder / name / "old")
            rarefy.save(rarefy.load(OLD / name, build(name)), folder / name / "new")

    return make


def containers(folder: Path) -> None:
    """Write one tensor of every format, plain and compressed."""
    small_container(folder / "plain")
    small_container(folder / "xz", compress=True)


def compiled_today(folder: Path) -> None:
    """Write compiled models with static scales, 16 bits, open sizes and a padded image."""
    options: dict[str, dict[str, Any]] = {
        "mlp-static": {"precision": "int8", "calibrate": [torch.randn(8, 32)]},
        "conv_net-int16": {"precision": "int16"},
        "conv_net-static": {"precision": "int8", "calibrate": [torch.randn(4, 3, 12, 12)]},
        "self_attention-bf16": {"precision": "bf16"},
    }
    for name, chosen in options.items():
        factory = name.partition("-")[0]
        model = rarefy.compile(getattr(models, factory)(), models.inputs(factory), **chosen)
        rarefy.save(model, folder / name / "new")


def tiny_llama(**more: Any) -> Any:
    """Return a language model of one block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, **more}
    return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1)).eval()


def tokenizer() -> Any:
    """Return a small byte-level tokenizer with a chat template."""
    from checkpoint.test_gguf_export import byte_tokenizer, splits

    made = byte_tokenizer(splits()["qwen2"])
    made.chat_template = "{{ messages }}"
    return made


def gguf(folder: Path) -> None:
    """Write a language model in 8 bits with its tokenizer."""
    from checkpoint.test_gguf_export import build as named

    model = named(
        "Llama", vocab_size=480, hidden_size=32, intermediate_size=32, num_hidden_layers=1, attention_bias=True
    )
    rarefy.export(model, folder / "m.gguf", to="gguf", type="q8_0", tokenizer=tokenizer())


def hf_folder(folder: Path) -> None:
    """Write a language model as transformers does, in two shards."""
    tiny_llama().save_pretrained(folder, max_shard_size="6KB")


def hf_tokenizer(folder: Path) -> None:
    """Write the files of a tokenizer."""
    tokenizer().save_pretrained(folder)


def compressed_tensors(folder: Path) -> None:
    """Write folders of compressed-tensors in several layouts."""
    from checkpoint import test_legacy_layouts as layouts

    for way in ("sparse-bitmask", "sparse-24-bitmask", "4 bits, asymmetric", "zeros and int8"):
        layouts.folder(folder / way.replace(" ", "-").replace(",", ""), way)


class Small(nn.Module):
    """Layers and operators of which ONNX and .pt2 files are written."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.table, self.fc, self.layer_norm = nn.Embedding(10, 8), nn.Linear(4, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Return [batch, tokens, 8]."""
        y = self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))[:, None]
        z = self.layer_norm(self.table(ids) + y)
        return nn.functional.pad(z.transpose(1, 2).reshape(z.shape[0], 2, -1), (0, 2)).softmax(-1)[..., 1:]


def small_inputs() -> tuple[Tensor, Tensor]:
    """Return inputs of `Small`."""
    return torch.randn(2, 3, 6, 6), torch.arange(8).view(2, 4) % 10


def onnx_files(folder: Path) -> None:
    """Write a network with constants for shapes, one with weights outside, and one with subgraphs."""
    import onnx
    from onnx import TensorProto, helper

    from helpers.onnx_files import export

    torch.manual_seed(0)
    export(Small().eval(), small_inputs(), folder / "net.onnx", names=("x", "ids"))
    big = onnx.load(str(export(nn.Linear(24, 24).eval(), torch.randn(1, 24), folder / "outside.onnx")))
    onnx.save(big, str(folder / "outside.onnx"), save_as_external_data=True, location="outside.bin", size_threshold=64)
    of = helper.make_tensor_value_info
    branch = [
        helper.make_graph([helper.make_node(op, ["x"], [f"{op}_out"])], op, [], [of(f"{op}_out", 1, ["n", 4])])
        for op in ("Relu", "Neg")
    ]
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=helper.make_tensor("v", 1, [1], [1.0])),
        helper.make_node("If", ["flag"], ["y"], then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("Expand", ["y", "size"], ["big"]),
        helper.make_node("Tile", ["big", "times"], ["tiled"]),
        helper.make_node("Range", ["zero", "end", "step"], ["steps"]),
        helper.make_node("Add", ["tiled", "ones"], ["out"]),
    ]
    constants = {"size": [2, 4], "times": [1, 1], "zero": 0, "end": 4, "step": 1}
    held = [
        helper.make_tensor(
            n, TensorProto.INT64, [len(v)] if isinstance(v, list) else [], v if isinstance(v, list) else [v]
        )
        for n, v in constants.items()
    ]
    held.append(helper.make_tensor("flag", TensorProto.BOOL, [], [True]))
    graph = helper.make_graph(nodes, "g", [of("x", 1, [2, 4])], [of("out", 1, ["a", "b"]), of("steps", 7, ["c"])], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "sub.onnx")


def pt2_files(folder: Path) -> None:
    """Write two exported programs, one with open sizes, keywords, constants and nested outputs."""
    from checkpoint.test_pt2 import D, Texts, saved, texts

    torch.manual_seed(0)
    saved(Small(), small_inputs(), place=folder / "net.pt2", dynamic=({0: D.AUTO}, {0: D.AUTO}))
    args, kwargs = texts()
    open_sizes = {0: D.AUTO, 1: D.AUTO}
    saved(Texts(), args, kwargs, folder / "texts.pt2", {"ids": open_sizes, "scale": None, "mask": open_sizes})


def recipes(folder: Path) -> None:
    """Write recipes as users do."""
    (folder / "full.yaml").write_text(FULL)
    for path in sorted((TESTS.parent / "recipes").glob("*.yaml")):
        shutil.copy(path, folder / path.name)


NNCF = {
    "input_info": {"sample_size": [1, 3, 8, 8]},
    "compression": [
        {
            "algorithm": "magnitude_sparsity",
            "sparsity_init": 0.1,
            "params": {"sparsity_target": 0.5, "schedule": "polynomial"},
        },
        {"algorithm": "quantization", "weights": {"bits": 4}, "ignored_scopes": ["a/b"]},
    ],
}
INC = {
    "pruning_configs": [{"pruning_type": "snip_momentum", "pattern": "4x1", "target_sparsity": 0.8, "op_names": ["a"]}]
}
AO = [{"tensor_fqn": "fc1.weight", "sparse_block_shape": [1, 4], "zeros_per_block": 2}]


def other_recipes(folder: Path) -> None:
    """Write recipes of other tools."""
    for path in sorted((TESTS / "migration" / "recipes").iterdir()):
        if path.name != "README.md":
            (folder / path.stem).mkdir(exist_ok=True)
            shutil.copy(path, folder / path.stem / path.name)
            try:
                rarefy.migrate(path, skip=True)
            except rarefy.RarefyError:  # a recipe for the tests of refusals
                shutil.rmtree(folder / path.stem)
    for name, config in (("nncf", NNCF), ("inc", INC), ("ao", AO)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))


def weights(folder: Path) -> None:
    """Write weights as .safetensors and as torch does."""
    from safetensors.torch import save_file

    tensors = {f"module.{n}": t for n, t in Small().state_dict().items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "w.safetensors")
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "w.pth")


def embedding_folder(folder: Path) -> None:
    """Write the JSON files of a sentence-transformers model, and the note of its compiled model."""
    kind = "sentence_transformers.models."
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
    values = {
        "modules.json": [{"idx": i, "name": str(i), "path": p, "type": kind + t} for i, (p, t) in enumerate(modules)],
        "config.json": {
            "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32, "id2label": {"0": "a", "1": "b"},
            "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"},
        },
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
        "config_sentence_transformers.json": {"__version__": {"torch": "2"}, "prompts": {}, "similarity_fn_name": None},
        "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_cls_token": True},
        "2_Dense/config.json": {
            "in_features": 32, "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"
        },
        "rarefy/embedding.json": {"schema": 1, "rarefy": "1", "precision": "int8", "dense": {"config.json": "0" * 64}},
        "tokenizer.json": {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
    }  # fmt: skip
    for name, value in values.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(json.dumps(value))
    (folder / "3_Normalize").mkdir()


def model_card(folder: Path) -> None:
    """Write a model card, and where a model came from."""
    (folder / "source.json").write_text(json.dumps({"model": "a/b", "revision": "0" * 40, "licence": "mit"}))
    (folder / "README.md").write_text(
        "---\nlicense: mit\nlanguage: [en, de]\npipeline_tag: feature-extraction\n---\nx\n"
    )


def reports(folder: Path) -> None:
    """Write a frontier, a receipt and a benchmark."""
    (folder / "frontier.json").write_text(frontier_samples.small(2).to_json())
    shutil.copy(OLD / "receipt-llama" / "receipt.json", folder / "receipt.json")
    times = {"1": {"rarefy": [1.0, 1.1, 1.2], "torch": [2.0, 2.1, 2.2]}, "16": {"rarefy": [9.0, 9.1, 9.2]}}
    quality = {"rarefy": {"top1": 0.9}, "torch": {"top1": 0.91}}
    rows = [{"run": r, "quality": quality, "milliseconds": times, "machine": {"cpu": "x"}} for r in "ab"]
    (folder / "bench.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n")


def texts(folder: Path) -> None:
    """Write data as text, lines of JSON, arrays and tensors."""
    import numpy as np
    from safetensors.torch import save_file

    sentences = [" ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(20)) for i in range(6)]
    (folder / "a.txt").write_text("\n\n".join(sentences))
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": s}) for s in sentences))
    (folder / "c.jsonl").write_text("\n".join(json.dumps({"query": s[:20], "text": s}) for s in sentences))
    np.savez(folder / "d.npz", input_ids=np.arange(64).reshape(8, 8) % 30)
    save_file({"input_ids": torch.arange(64).view(8, 8) % 30}, folder / "e.safetensors")


def digest(values: Any) -> str:
    """Return a hash of nested tensors and plain data."""
    total = hashlib.sha256()
    todo = [values]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            total.update(f"{tuple(value.shape)} {value.dtype}".encode())
            total.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            todo += [x for item in value.items() for x in item]
        elif isinstance(value, list | tuple):
            todo += value
        else:
            total.update(repr(value).encode())
    return total.hexdigest()
