"""The modules of sentence-transformers that follow the transformer in a folder: pooling, dense, normalize.

Metrics of embeddings use them, so that a model that is read by its first token is judged by its first token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.atomic_io import MODULES, PICKLE_SUFFIXES
from rarefy.common.errors import ModelError
from rarefy.common.extras import install
from rarefy.model.checked_folder import check_modules, checked_folder, load_error, read_config
from rarefy.model.construction_limit import ConstructionLimit, stored_in
from rarefy.model.hub import check_link

ROOT_FILES = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
HEADS = ("Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")  # classes of modules that follow a transformer
HEAD = "rarefy_head"  # attribute of a model: the modules that follow it
NEEDS = f"these modules need sentence-transformers: {install('embeddings')}"

Head = Callable[[Tensor, Tensor], Tensor]


def module_files(folder: Path) -> dict[str, bytes]:
    """Return the files that make a transformer a model of sentence-transformers, by name: {} for other folders.

    Args:
        folder: the model's folder.

    Returns:
        modules.json and the configs beside it, and the files in folders of modules, as "1_Pooling/config.json".

    Raises:
        ModelError: for a module whose weights are a pickle.
        ContainerError: one of the files is a link out of the folder.
    """
    entries = check_modules(folder)
    if not entries:
        return {}
    paths = [p for pattern in ROOT_FILES for p in sorted(folder.glob(pattern)) if p.is_file()]
    files = {p.name: check_link(p, folder).read_bytes() for p in paths}
    for part in sorted({e["path"] for e in entries if e["path"]}):
        refuse_pickles(folder / part)
        paths = [p for p in sorted((folder / part).glob("*")) if p.is_file() and p.suffix not in PICKLE_SUFFIXES]
        files |= {f"{part}/{p.name}": check_link(p, folder).read_bytes() for p in paths}
    return files


def refuse_pickles(folder: Path) -> None:
    """Raise ModelError for a folder of weights that are a pickle and nothing else."""
    names = sorted(p.name for p in folder.glob("*") if p.is_file())
    pickled = next((n for n in names if n.endswith(PICKLE_SUFFIXES) and "model" in n), None)
    if pickled is not None and not any(n.endswith(".safetensors") for n in names):
        raise ModelError(
            f"{folder / pickled} is a pickle, which is never opened: save the model again with a current "
            "sentence-transformers, which writes safetensors"
        )


def head_of(folder: Path) -> Head | None:
    """Return what makes an embedding of hidden states in a folder of sentence-transformers.

    Args:
        folder: the model's folder.

    Returns:
        A function of hidden states [batch, tokens, width] and mask [batch, tokens]; it loads its modules when it is
        first called. None where there is no modules.json, and for the mean of all tokens, which is the default.
    """
    entries = check_modules(folder)
    if len(entries) < 2 or _is_mean(folder, entries):  # a reranker has a transformer alone
        return None
    return FolderHead(folder.absolute())


def _is_mean(folder: Path, entries: list[dict[str, Any]]) -> bool:
    """Return whether the modules after the transformer are the mean of all tokens, and a normalization at most."""
    names = [e["type"].rpartition(".")[2] for e in entries]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        return False
    file = folder / entries[1]["path"] / "config.json"
    config = read_config(file) if file.is_file() else {}
    if "pooling_mode" in config:
        return config["pooling_mode"] in ("mean", ["mean"])
    modes = {n for n, value in config.items() if n.startswith("pooling_mode_") and value}
    return modes <= {"pooling_mode_mean_tokens"}


def head_of_model(model: Any) -> Head | None:
    """Return the function that makes embeddings of a model's hidden states, None for the mean of all tokens."""
    return getattr(model, HEAD, None)


class FolderHead:
    """The modules after the transformer of a folder, loaded by sentence-transformers at the first call.

    It is no `nn.Module`, so that a model that has it as an attribute keeps its own parameters alone.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._modules: nn.Module | None = None

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the embeddings [batch, width] of hidden states [batch, tokens, width]."""
        if self._modules is None:
            self._modules = _load_modules(self.folder)
        return apply_modules(self._modules, hidden, mask)

    def __deepcopy__(self, memo: Any) -> FolderHead:
        return self  # nothing of it ever changes


@torch.no_grad()
def apply_modules(modules: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    """Return what modules of sentence-transformers make of hidden states [batch, tokens, width]."""
    features: dict[str, Any] = {"token_embeddings": hidden.float(), "attention_mask": mask.long()}
    for module in modules:
        features = module(features)
    return features["sentence_embedding"]


def _load_modules(folder: Path) -> nn.Module:
    """Return the modules after the transformer, of classes that sentence-transformers has."""
    try:
        from sentence_transformers.sentence_transformer import modules as known
    except ImportError:
        raise ModelError(f"{folder / MODULES}: {NEEDS}") from None
    parts = []
    with checked_folder(folder) as shown, ConstructionLimit(stored_in(shown)):
        for entry in check_modules(shown)[1:]:
            name = entry["type"].rpartition(".")[2]
            if name not in HEADS:
                raise ModelError(f"{folder / MODULES}: metrics cannot use {name!r}; they can use {', '.join(HEADS)}")
            try:
                parts.append(getattr(known, name).load(str(shown), subfolder=entry["path"], local_files_only=True))
            except Exception as error:  # a damaged folder makes it raise anything
                where = folder / entry["path"]
                raise ModelError(f"{where}: {name} does not load: {load_error(error, shown)}") from None
    return nn.Sequential(*parts).eval()
