"""Weights that are read one at a time: of a Hugging Face folder, a folder that Rarefy wrote, or a GGUF file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rarefy.checkpoint.fit_structure import restore_structure_, structure_to_build
from rarefy.checkpoint.gguf_load import GgufModel
from rarefy.checkpoint.load import attach_receipt_, check_current
from rarefy.checkpoint.tensor_slots import aliases
from rarefy.common.atomic_io import INDEX
from rarefy.common.errors import ContainerError, ModelError, first_line
from rarefy.common.json_text import read_json_file
from rarefy.common.machine_errors import raise_memory_error
from rarefy.common.plain_file import plain_file, usable_path
from rarefy.formats import container, gguf_file
from rarefy.model import hf
from rarefy.model.construction_limit import Stored
from rarefy.model.hub import MAX_INDEX_BYTES, SHARDS
from rarefy.model.quant_grid import Grid, OffsetGrid

END_BYTES = 1 << 20  # of a file's beginning and end that identify it
UNSUPPORTED = {"factors": "is factorized", "tied": "has blocks that share weights", "inputs": "rounds inputs"}


class WeightFiles(Protocol):
    """A model without weights, and its weights by name.

    Attributes:
        model: of transformers; its parameters are on the meta device.
        dtype: of the weights in the files; fp32 where there are several.
    """

    model: Any

    @property
    def dtype(self) -> torch.dtype: ...

    def weight(self, name: str) -> tuple[Tensor, Grid | OffsetGrid | None]:
        """Return a weight and the quantization grid that it is on."""
        ...


def open_weights(path: str | Path) -> WeightFiles:
    """Return the weights of a folder or GGUF file without reading them; ContainerError or ModelError where there are
    none that can be read one at a time."""
    if not usable_path(path).exists():
        raise ModelError(f"no file or folder {str(path)!r}")
    if gguf_file.is_file(path):
        return GgufModel(path)
    if (Path(path) / INDEX).is_file():
        return RarefyFolder(path)
    if hf.is_folder(path):
        return HuggingFaceFolder(path)
    raise ModelError(f"{path} is no folder of a model (no config.json or {INDEX}), and no .gguf file")


def fingerprint(path: str | Path) -> dict[str, list[Any]]:
    """Return what identifies the files of a model, by name: bytes, time of change, SHA-256 of both ends.

    Args:
        path: a folder, of which JSON and safetensors files count, or a file. O(files).

    Raises:
        ContainerError: a file cannot be read.
    """
    source = Path(path)
    names = ("*.json", "*.safetensors", "*.safetensors.xz")
    files = [source] if source.is_file() else sorted({f for n in names for f in source.glob(n) if f.is_file()})
    try:
        return {f.name: [f.stat().st_size, f.stat().st_mtime_ns, _ends(f)] for f in files}
    except OSError as error:
        raise ContainerError(f"{path} cannot be read: {first_line(error)}") from None


def _ends(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(END_BYTES))
        stream.seek(max(0, file.stat().st_size - END_BYTES))
        digest.update(stream.read(END_BYTES))
    return digest.hexdigest()


class HuggingFaceFolder:
    """The safetensors files of a Hugging Face folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        config = _json_file(self.path / "config.json")
        if config.get("quantization_config"):
            raise ModelError(f"{path} is quantized by another tool: load it with rarefy.load, and pass the model")
        names = config.get("architectures")
        name = names[0] if isinstance(names, list) and names else ""
        self.files = self._files()
        stored = Stored(len(self.files), sum(f.stat().st_size for f in set(self.files.values())))
        self.model: Any = hf.build({"config": config, "class": name, "dtype": "float32"}, stored, empty=True)
        hf.load_generation_config_(self.model, self.path)
        prefix, names = f"{self.model.base_model_prefix}.", self.model.state_dict()
        short = {n: n.removeprefix(prefix) for n in names if n not in self.files}  # as in files of BLOOM and GPT-2
        self.stored = {n: s for n, s in short.items() if s in self.files}
        self.files |= {n: self.files[s] for n, s in self.stored.items()}
        self._check_shapes()
        other_names = aliases(self.model)
        absent = [n for n in names if n not in self.files and n not in other_names]
        tied = bool(self.model.config.tie_word_embeddings) and absent == ["lm_head.weight"]
        if absent and not tied:
            raise ModelError(
                f"{path} has no tensor {absent[0]!r} ({len(absent)} are missing): load it with transformers, and pass "
                "the model"
            )

    def _check_shapes(self) -> None:
        """Raise ModelError for a tensor of another shape than the config describes. O(tensors)."""
        shapes = {n: list(p.shape) for n, p in self.model.state_dict().items() if n in self.files}
        for file in {self.files[n] for n in shapes}:
            with _opened(file) as opened:
                stored = {
                    n: opened.get_slice(self.stored.get(n, n)).get_shape() for n in shapes if self.files[n] == file
                }
            wrong = next((n for n, shape in stored.items() if shape != shapes[n]), None)
            if wrong is not None:
                raise ModelError(
                    f"{self.path}: {wrong} has the shape {stored[wrong]}, config.json describes {shapes[wrong]}: the "
                    "config is damaged, or of another model"
                )

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the first matrix; fp32 where matrices differ in type."""
        names = [n for n, p in self.model.named_parameters() if p.dim() > 1 and n in self.files]
        dtypes = {self._dtype(n) for n in (names[0], names[-1])}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def weight(self, name: str) -> tuple[Tensor, Grid | None]:
        """Return a weight of the files."""
        with _opened(self.files[name]) as file:
            return file.get_tensor(self.stored.get(name, name)), None

    def _dtype(self, name: str) -> torch.dtype:
        with _opened(self.files[name]) as file:
            return file.get_slice(self.stored.get(name, name))[:0].dtype

    def _files(self) -> dict[str, Path]:
        """Return {tensor name: file}."""
        index = self.path / SHARDS
        if index.is_file():
            value = _json_file(index).get("weight_map")
            if not isinstance(value, dict) or not all(isinstance(f, str) and Path(f).name == f for f in value.values()):
                raise ContainerError(f"{index}: expected weight_map as names of files by names of tensors")
            names = sorted(set(value.values()))
        elif (self.path / "model.safetensors").is_file():
            names = ["model.safetensors"]
        else:
            raise ModelError(f"{self.path} has no model.safetensors and no {SHARDS}: save the model as safetensors")
        files: dict[str, Path] = {}
        for name in names:
            with _opened(self.path / name) as file:
                files |= dict.fromkeys(file.keys(), self.path / name)
        return files


class RarefyFolder:
    """A folder that `save` wrote."""

    def __init__(self, path: str | Path):
        self.saved = container.read(path, verify=False)
        structure = self.saved.meta.get("structure")
        structure = structure if isinstance(structure, dict) else {}
        if structure.get("library") != "transformers":
            raise ModelError(f"{path} holds no language model of transformers")
        for record, what in UNSUPPORTED.items():
            if self.saved.meta.get(record):
                raise ModelError(f"{path}: the model {what}: load it with rarefy.load, and pass the model")
        structure_now = {**structure_to_build(self.saved, structure, path), "dtype": "float32"}
        self.model: Any = hf.build(structure_now, self.saved.stored, empty=True)
        restore_structure_(self.saved, self.model, structure, path)
        hf.load_generation_config_(self.model, Path(path))
        check_current(self.saved)
        attach_receipt_(self.model, self.saved)
        self.stated = str(structure.get("dtype"))

    @property
    def dtype(self) -> torch.dtype:
        """Return the type that the folder states."""
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.stated, torch.float32)

    @cached_property
    def verified(self) -> container.Container:
        """Return the folder after a pass over its files for their hashes, which only those who read weights need."""
        container.verify(self.saved)
        return self.saved

    def weight(self, name: str) -> tuple[Tensor, Grid | None]:
        """Return a weight and its grid."""
        shape = tuple(self.model.state_dict()[name].shape)
        weight, grid = self.verified.weight(self.saved.aliases.get(name, name), shape)
        return weight, grid if isinstance(grid, Grid) else None


def parameter_names(model: nn.Module) -> Mapping[int, list[str]]:
    """Return the names of each parameter and buffer of a model's state by its id."""
    names: dict[int, list[str]] = {}
    for name, t in model.state_dict(keep_vars=True).items():
        names.setdefault(id(t), []).append(name)
    return names


def _opened(file: Path) -> Any:
    try:
        return safe_open(plain_file(file), "pt")
    except ContainerError:
        raise
    except Exception as error:  # safetensors raises several kinds
        raise_memory_error(error)
        raise ContainerError(f"{file}: not a valid safetensors file: {first_line(error)}") from None


def _json_file(file: Path) -> dict[str, Any]:
    value = read_json_file(file, MAX_INDEX_BYTES)
    if not isinstance(value, dict):
        raise ContainerError(f"{file}: expected a JSON object")
    return value
