"""The readers under fuzz: for each how a valid sample is made, changed and read."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import rarefy
from fuzz import samples
from fuzz.run import Change, Files, Target
from helpers.gguf_parts import mutate_gguf
from helpers.mutations import (
    VALUES,
    json_bytes,
    mutate_bytes,
    mutate_json,
    mutate_json_file,
    mutate_lines,
    mutate_message,
    mutate_numbers,
    mutate_safetensors,
    mutate_text,
    mutate_zip,
    yaml_bomb,
)
from rarefy.calibration import resume
from rarefy.checkpoint import gguf_tokenizer, legacy_layouts, pt2_load
from rarefy.checkpoint.gguf_load import GgufModel
from rarefy.checkpoint.origin import card_fields, read_origin
from rarefy.checkpoint.packed_store import PackedStore
from rarefy.checkpoint.weight_files import open_weights
from rarefy.cli import report
from rarefy.common.atomic_io import INDEX
from rarefy.common.errors import DataError, FormatError, ModelError, RarefyError, RecipeError
from rarefy.common.json_text import read_bytes
from rarefy.data import sources, text_pairs
from rarefy.formats import container
from rarefy.formats.index import digest
from rarefy.integrations import embedding_folder
from rarefy.model import checked_folder, embedding_modules, hf, weight_files
from rarefy.recipe import parser as recipes
from rarefy.runtime import tuning_cache
from rarefy.search.journal import Journal
from rarefy.train.teacher_cache import TeacherCache

SHARD = "weights-00001.safetensors"
CALLED = (
    DataError,
    ModelError,
    FormatError,
    RuntimeError,
    IndexError,
    TypeError,
)  # of a changed graph: torch's or ours
CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": mutate_json_file,
    ".jsonl": mutate_lines,
    ".safetensors": mutate_safetensors,
    ".pt2": mutate_zip,
    ".pth": mutate_zip,
    ".npz": mutate_zip,
    ".gguf": mutate_gguf,
}


def by_suffix(part: str, files: Files, rng: random.Random) -> Change:
    """Change one file of a part, by what its suffix says that it is."""
    name = rng.choice(sorted(files))
    return Change({name: changed(name, files[name], rng)})


def changed(name: str, data: bytes, rng: random.Random) -> bytes:
    """Return another content of a file."""
    suffix = Path(name).suffix
    if suffix in CHANGES:
        return CHANGES[suffix](data, rng)
    text = mutate_text(data.decode(), rng) if rng.random() < 0.95 else yaml_bomb(rng)
    return text.encode("utf-8", "surrogatepass")


def whole(files: Files) -> list[str]:
    """Return the folder itself as its only part."""
    return [""]


def each_file(files: Files) -> list[str]:
    """Return all files as parts."""
    return sorted(files)


def each_folder(files: Files) -> list[str]:
    """Return the folders of files as parts."""
    return sorted({str(Path(name).parent) for name in files})


# ---- Rarefy's folders ---------------------------------------------------------------------------------------------


def rarefy_folder(part: str, files: Files, rng: random.Random) -> Change:
    """Change a file of a folder of Rarefy; in most cases its hashes agree afterwards."""
    inner = {n.rpartition("/")[2]: d for n, d in files.items()}
    name = rng.choice([n for n in inner if not n.startswith("receipt")])
    covered = rng.random() < 0.3 and name in hashed(inner)
    compressed = name.endswith(".xz") or (covered and name != INDEX)
    data = mutate_bytes(inner[name], rng) if compressed else changed_part(name, inner[name], rng)
    result = {name: data} if covered else with_hashes({**inner, name: data})
    return Change({f"{part}/{n}": d for n, d in result.items() if d != inner[n]}, covered)


def hashed(part: Files) -> set[str]:
    """Return the names of files under a hash: none in schema 1, whose index has no hash of its own."""
    index = json.loads(part[INDEX])
    if "index" in index:  # of a compressed folder
        return {n for n in part if n.endswith(".xz")}
    return {INDEX, *index["shards"], *index["meta"].get("compiled", {})} if "sha256" in index else set()


def changed_part(name: str, data: bytes, rng: random.Random) -> bytes:
    """Return another content of a file of a folder; a graph may read other constants."""
    if name == "graph.json" and rng.random() < 0.9:
        graph = json.loads(data)
        constants = tuple({"node": node[0]} for node in graph["nodes"][:3])
        return json_bytes(mutate_json(graph, rng, (*VALUES, *constants)))
    return changed(name, data, rng)


def with_hashes(part: Files) -> Files:
    """Return the files of a folder with hashes that agree with them, as far as the index can be read."""
    try:
        index = json.loads(part[INDEX])
        known = index.get("shards", {})
        for table in (
            known,
            index["meta"].get("compiled", {}),
            {index["index"]["file"]: index["index"]} if "index" in index else {},
        ):
            for name, entry in table.items():
                if name in part and isinstance(entry, dict):
                    entry |= {"sha256": hashlib.sha256(part[name]).hexdigest(), "bytes": len(part[name])}
        if "sha256" in index:
            index["sha256"] = digest(index)
        return {**part, INDEX: json_bytes(index)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return part


def read_container(path: Path) -> str:
    """Read all tensors of a container."""
    saved = container.read(path)
    return samples.digest([(name, saved.tensor(name)) for name in [*saved.names, *saved.aliases]])


def read_checkpoint(path: Path) -> str:
    """Read the model of a folder, and list its tensors."""
    model = rarefy.load(path, samples.build(path.parent.name))
    rarefy.inspect(path)
    return samples.digest(sorted(model.state_dict().items()))


def read_structure(path: Path) -> str:
    """Read a model of transformers, which is built from the folder's config."""
    model = rarefy.load(path)
    return samples.digest(sorted(model.state_dict().items()))


def read_compiled(path: Path) -> str:
    """Read a compiled model, and call it: a changed graph may raise what torch raises."""
    name = path.parent.name
    model = rarefy.load(path)
    factory = name.partition("-")[0] if name not in samples.EXPECTED else samples.EXPECTED[name]["model"]
    try:
        return samples.digest(model(samples.models.inputs(factory)))
    except CALLED as error:
        return type(error).__name__


# ---- other programs' files ----------------------------------------------------------------------------------------


def read_gguf(path: Path) -> None:
    """Read the weights and the tokenizer of a GGUF file."""
    source = GgufModel(path)
    for name in source.names:
        source.weight(name)
    gguf_tokenizer.load(path)


def read_weight_files(path: Path) -> None:
    """Read the weights of a folder of transformers one by one."""
    legacy_layouts.is_compressed(path)
    source = open_weights(path)
    for name in source.model.state_dict():
        source.weight(name)
    _ = source.dtype


def read_compressed(path: Path) -> None:
    """Read all weights of a folder of compressed-tensors."""
    if legacy_layouts.is_compressed(path):
        for _ in legacy_layouts.tensors(path):
            pass


def read_hf_tokenizer(path: Path) -> None:
    """Read a tokenizer, split a text, and write it as GGUF has it."""
    tokenizer = hf.load_tokenizer(path)
    if tokenizer is not None:
        gguf_tokenizer.metadata(tokenizer, 512)


def mutate_onnx(part: str, files: Files, rng: random.Random) -> Change:
    """Change fields of a model, or of the places of its outer weights; sometimes bytes, or a bomb."""
    import onnx

    data, action = files[part], rng.random()
    if action < 0.08:
        return Change({part: mutate_bytes(data, rng)})
    model = onnx.load_model_from_string(data)
    if action < 0.12:
        _nest(model, rng.choice((3, 10, 25)))
    for _ in range(rng.choice((1, 1, 2, 3))):
        mutate_message(model.graph if rng.random() < 0.9 else model, rng)
    tensors = list(model.graph.initializer)
    if tensors and rng.random() < 0.15:  # numbers of shapes
        tensor = rng.choice(tensors)
        if tensor.HasField("raw_data"):
            tensor.raw_data = mutate_numbers(tensor.raw_data, rng)
        if rng.random() < 0.3:
            tensor.dims[:] = [rng.choice((0, 1, 2, 1 << 20, 1 << 40, -1)) for _ in range(rng.randrange(1, 4))]
    return Change({part: model.SerializeToString()})


def _nest(model: Any, depth: int) -> None:
    """Put the first node into subgraphs of subgraphs."""
    from onnx import helper

    first = model.graph.node[0]
    outputs = [helper.make_tensor_value_info(first.output[0], 1, ["n"])]
    leaf = helper.make_graph([helper.make_node("Identity", ["x"], [first.output[0]])], "leaf", [], outputs)
    node = first
    for i in range(depth):
        graph = helper.make_graph([node], f"inner{i}", [], outputs)
        node = helper.make_node("If", ["flag"], [first.output[0]], then_branch=graph, else_branch=leaf)
    first.CopyFrom(node)


def onnx_parts(files: Files) -> list[str]:
    """Return the models, without the file of weights."""
    return [name for name in sorted(files) if name.endswith(".onnx")]


def rarefy_from_onnx(path: Path) -> None:
    """Read an ONNX file as users do."""
    rarefy.from_onnx(path)


def convert_onnx(path: Path) -> None:
    """Read an ONNX file and make a module of it, without ONNX Runtime's comparison."""
    from rarefy.onnx.convert import convert
    from rarefy.onnx.load import to_graph
    from rarefy.onnx.read import read
    from rarefy.onnx.signature import signature_of

    model = read(path)
    signature_of(model)
    convert(to_graph(model), None)


def read_pt2(path: Path) -> None:
    """Read an exported program, and call it: a changed graph may raise what torch raises."""
    model = pt2_load.load_pt2(path)
    inputs = (
        samples.small_inputs() if path.name == "net.pt2" else (torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6))
    )
    try:
        with torch.no_grad():
            model(*inputs)
    except (*CALLED, ValueError):  # ValueError from torch's layers, for another number of dimensions
        pass


def read_weights(path: Path) -> None:
    """Read a file of weights."""
    weight_files.read_weights(path)
    if path.suffix == ".safetensors":
        rarefy.inspect(path)


def read_embedding_folder(path: Path) -> None:
    """Read the JSON files of a sentence-transformers folder as far as Rarefy parses them."""
    for read in (
        embedding_folder.check_folder,
        embedding_modules.head_of,
        embedding_modules.module_files,
        embedding_folder.missing_file,
        checked_folder.check_modules,
        embedding_folder.read_note,
        embedding_folder.config_labels,
    ):
        try:
            read(path)
        except RarefyError:
            continue


def read_card(path: Path) -> None:
    """Read where a model came from."""
    read_origin(path)
    card_fields(path)


# ---- recipes and data ---------------------------------------------------------------------------------------------


def mutate_recipe(part: str, files: Files, rng: random.Random) -> Change:
    """Change the text of a recipe, or its values: JSON is YAML too."""
    if rng.random() < 0.5 or Path(part).suffix not in (".yaml", ".yml"):
        return by_suffix(part, files, rng)
    from rarefy.common.yaml_text import read_yaml

    try:
        data = read_yaml(files[part].decode(), part, foreign=True).data
    except RarefyError:
        return by_suffix(part, files, rng)
    return Change({part: json_bytes(mutate_json(data, rng))})


def read_recipe(path: Path) -> None:
    """Read a recipe; what it was read as can be written and read again, and an error says where."""
    try:
        recipe = recipes.from_yaml(read_bytes(path, 1 << 20).decode("utf-8", "replace"))
    except RecipeError as error:
        assert "recipe" in str(error) or "line" in str(error)
        raise
    assert "nan" in repr(recipe) or recipes.from_dict(recipe.to_dict()) == recipe


def migrate(path: Path) -> None:
    """Translate a recipe of another tool, whole and with parts left out."""
    with suppress(RarefyError):
        rarefy.migrate(path)
    rarefy.migrate(path, skip=True)


def read_data(path: Path) -> None:
    """Read texts, pairs and arrays."""
    sources.batches(path.name, sources.Take(tokens=4), tokenizer=_words, base=path.parent)
    if path.suffix in (".txt", ".jsonl"):
        text_pairs.pair_batches(path.name, sources.Take(tokens=4), tokenizer=_words, base=path.parent)


def _words(text: Any, **options: Any) -> dict[str, Any]:
    """Stand for a tokenizer: a number for each word."""
    if isinstance(text, str):
        return {"input_ids": [len(w) for w in text.split()]}
    rows = [([len(w) for w in t.split()] + [0] * 4)[:4] for t in text]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.ones(len(rows), 4, dtype=torch.long)}


# ---- state --------------------------------------------------------------------------------------------------------

KEY = {"epochs": 2, "plan": {"n": 2, "m": 4}, "rarefy": "1", "solver": {"name": "obs", "damping": 0.01}}


def make_state(folder: Path) -> None:
    """Write the files of a tuning cache, a search, a calibration, packed weights and a cache of outputs."""
    tuning_cache.write(folder / "tuning_cache.json", {"linear 8x8": {1: ("csr", 1.5), 16: ("dense", 1.0)}})
    journal = Journal(folder / "search", {"model": "x", "seed": 0})
    journal.get("point 1", lambda: {"loss": 0.5, "milliseconds": {"1": 2.0}})
    journal.get("time", lambda: [1, 2.0, None])
    journal.close()
    state = resume.open_state(folder / "stage", KEY)
    tensors = {"fc.weight": torch.arange(12.0).view(3, 4)}
    state.write(
        0, resume.StepState(tensors, {"fc": torch.zeros(2, dtype=torch.uint8)}, [{"layer": "fc", "sparsity": 0.5}])
    )
    state.write_tensors("training.safetensors", tensors, "numbers", {"epoch": 3, "lr": 0.1})
    state.compute_once("each", lambda: {"a": [1, 2]})
    state.close()
    (folder / "packed").mkdir()
    PackedStore(folder / "packed").hold("fc", _packed)
    TeacherCache(folder / "teacher", "0").outputs({"x": torch.ones(2, 3)}, lambda batch: {"logits": torch.ones(2, 5)})


def _packed() -> Any:
    from rarefy.runtime.packing import pack_bitmask

    return pack_bitmask(torch.randn(8, 16))


def read_search(path: Path) -> None:
    """Read the results of a search."""
    journal = Journal(path, {"model": "x", "seed": 0})
    _ = journal.seconds, journal.seconds_of("point", "time")
    journal.close()


def read_stage(path: Path) -> None:
    """Read the state of a calibration or training."""
    state = resume.open_state(path, KEY)
    try:
        state.compute_once("each", dict)
        for stop in range(state.num_done):
            state.read(stop)
        state.read_tensors("training.safetensors", "numbers")
    finally:
        state.close()


def read_packed(path: Path) -> None:
    """Read packed weights of a decoder that is being made."""
    PackedStore(path).hold("fc", _packed)


def read_teacher(path: Path) -> None:
    """Read a cached output."""
    TeacherCache(path, "0").outputs({"x": torch.ones(2, 3)}, lambda batch: {"logits": torch.ones(2, 5)})


STATE = {
    "tuning_cache.json": tuning_cache.read,
    "search": read_search,
    "stage": read_stage,
    "packed": read_packed,
    "teacher": read_teacher,
}


def read_state(path: Path) -> None:
    """Read what the name says."""
    STATE[path.name](path)


def read_report(path: Path) -> None:
    """Read a result and make its page."""
    result, page = report.read_result(path)
    page(result)
    _ = str(result), result.to_json()


DENSE = (
    "sparse-bitmask",
    "sparse-csr",
    "sparse-csc",
    "sparse-bsr",
    "sparse-dense-mask",
    "nm",
    "blocks",
    "masked",
    "tied",
)
QUANTIZED = ("int8", "int8-conv", "int4-groups", "int4-asymmetric", "sparse-int8", "int8-static", "codebook")
STRUCTURED = ("lowrank", "cut", "tied-blocks", "sparse-compressed")
COMPILED = tuple(
    f"compiled-{n}" for n in ("mlp", "conv_net", "self_attention", "mlp-int8", "conv_net-int8", "self_attention-int8")
)
DECODERS = ("decoder", "decoder-int4", "decoder-int8")

TARGETS = (
    Target("container", samples.containers, each_folder, rarefy_folder, read_container),
    Target("checkpoint-sparse", samples.old_and_new(*DENSE), each_folder, rarefy_folder, read_checkpoint),
    Target("checkpoint-quantized", samples.old_and_new(*QUANTIZED), each_folder, rarefy_folder, read_checkpoint),
    Target("checkpoint-structured", samples.old_and_new(*STRUCTURED), each_folder, rarefy_folder, read_checkpoint),
    Target("compiled", samples.old_and_new(*COMPILED), each_folder, rarefy_folder, read_compiled),
    Target("compiled-today", samples.compiled_today, each_folder, rarefy_folder, read_compiled),
    Target("decoder", samples.old_and_new(*DECODERS), each_folder, rarefy_folder, read_compiled, ("transformers",)),
    Target(
        "hf-structure",
        samples.old_and_new("receipt-llama"),
        each_folder,
        rarefy_folder,
        read_structure,
        ("transformers",),
    ),
    Target("hf-folder", samples.hf_folder, whole, by_suffix, read_weight_files, ("transformers", "accelerate")),
    Target("hf-tokenizer", samples.hf_tokenizer, whole, by_suffix, read_hf_tokenizer, ("transformers",)),
    Target(
        "compressed-tensors", samples.compressed_tensors, each_folder, by_suffix, read_compressed, ("transformers",)
    ),
    Target("gguf", samples.gguf, each_file, by_suffix, read_gguf, ("gguf", "transformers", "accelerate")),
    Target("onnx", samples.onnx_files, onnx_parts, mutate_onnx, convert_onnx, ("onnx", "onnxruntime")),
    Target("onnx-verified", samples.onnx_files, onnx_parts, mutate_onnx, rarefy_from_onnx, ("onnx", "onnxruntime")),
    Target("pt2", samples.pt2_files, each_file, by_suffix, read_pt2),
    Target("recipe", samples.recipes, each_file, mutate_recipe, read_recipe),
    Target("migration", samples.other_recipes, each_file, mutate_recipe, migrate),
    Target("weights", samples.weights, each_file, by_suffix, read_weights),
    Target("embedding-folder", samples.embedding_folder, whole, by_suffix, read_embedding_folder),
    Target("model-card", samples.model_card, whole, by_suffix, read_card),
    Target("data", samples.texts, each_file, by_suffix, read_data),
    Target("state", make_state, lambda files: list(STATE), by_suffix, read_state),
    Target("reports", samples.reports, each_file, by_suffix, read_report),
)


def available() -> list[Target]:
    """Return the targets whose packages are installed."""
    return [t for t in TARGETS if all(importlib.util.find_spec(name) for name in t.needs)]
