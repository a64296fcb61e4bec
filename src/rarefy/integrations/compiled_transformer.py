"""A compiled transformer in the place of the dense one inside a model of sentence-transformers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.checkpoint.export import check_exportable
from rarefy.checkpoint.load import load
from rarefy.checkpoint.save import save
from rarefy.common.errors import ContainerError
from rarefy.compiler.executor import Compiled
from rarefy.compiler.subgraph import FusedSubgraph

DENSE_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
FORM_OF_OUTPUTS = ("return_dict", "output_hidden_states")  # arguments that are settled when a model is compiled
MIN_FILLED = 0.75  # real tokens of the longest text's, from which texts are computed together


class CompiledTransformer(nn.Module):
    """The compiled transformer, called as the dense one.

    It has no parameters: weights are packed inside the compiled model. A copy for another process reads them from a
    folder.

    Attributes:
        compiled: what `rarefy.compile` returned.
        config: the config of transformers.
        dense: the dense model where no folder holds its weights, else None.
        dense_folder: the folder of its weights.
    """

    def __init__(
        self,
        compiled: Compiled,
        config: Any,
        *,
        dense: nn.Module | None = None,
        dense_folder: Path | None = None,
        folder: Path | None = None,
    ):
        """Wrap a compiled model.

        Args:
            compiled: the compiled transformer.
            config: the config of transformers.
            dense: the dense model, to save its weights.
            dense_folder: or the folder that has them.
            folder: where the compiled model was loaded from.
        """
        super().__init__()
        self.compiled, self.config = compiled, config
        self.dense_folder, self._folder = dense_folder, folder
        self.__dict__["dense"] = dense  # not a submodule: its parameters are not those of this one
        self._temporary: TemporaryDirectory[str] | None = None
        self.ignored = {"token_type_ids"} - set(compiled.keywords)  # some tokenizers return it for any model
        subgraphs = [call for call in compiled.schedule if isinstance(call, FusedSubgraph)]
        self.leaves_out_padding = any(call.padding is not None for call in subgraphs)

    @property
    def device(self) -> torch.device:
        """Return the device of inputs and outputs."""
        return torch.device("cpu")

    def forward(self, **inputs: Any) -> Any:
        """Return what the dense model returns.

        Raises:
            DataError: for other inputs than those that the model was compiled for, such as images.
        """
        inputs = {n: value for n, value in tensor_inputs(inputs).items() if n not in self.ignored}
        groups = [] if self.leaves_out_padding else length_groups(inputs)
        if len(groups) < 2:
            return self.compiled(**inputs)
        return _by_groups(lambda part: self.compiled(**part), inputs, groups)

    def folder(self) -> Path:
        """Return a folder that holds the compiled model; a temporary one is written where there is none."""
        if self._folder is None or not self._folder.is_dir():
            self._temporary = TemporaryDirectory(prefix="rarefy-")
            self._folder = Path(self._temporary.name) / "compiled"
            save(self.compiled, self._folder)
        return self._folder

    def save_pretrained(self, folder: str | os.PathLike[str], **_: Any) -> None:
        """Write the dense model: its config, and its weights as safetensors. Raises ContainerError if they are gone."""
        if self.dense is not None:
            check_exportable(self.dense, Path(folder), "hf")
            return self.dense.save_pretrained(folder)  # type: ignore[operator]
        files = [f for pattern in DENSE_FILES for f in sorted(Path(str(self.dense_folder)).glob(pattern))]
        if not any(f.suffix == ".safetensors" for f in files):
            raise ContainerError(f"{self.dense_folder} has no weights any more: they cannot be saved with the model")
        for file in files:
            copy = Path(folder) / file.name
            shutil.copyfile(file, copy)
            os.utime(copy, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))  # as in `dense_stamps`

    def __reduce__(self) -> Any:
        """Return how another process makes this module: from its folder, without the dense model."""
        return _restored, (str(self.folder()), self.config, self.dense_folder)


def _restored(folder: str, config: Any, dense_folder: Path | None) -> CompiledTransformer:
    return CompiledTransformer(load(folder), config, dense_folder=dense_folder, folder=Path(folder))


def tensor_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments without those that say what the outputs are."""
    return {n: value for n, value in inputs.items() if n not in FORM_OF_OUTPUTS}


def length_groups(inputs: dict[str, Any]) -> list[tuple[list[int], int]]:
    """Return which texts of a batch are computed together, and the length of each group, the longest first.

    A text joins a group if it has at least three quarters of the group's length. Texts that are padded on the left,
    or inputs that are no tensors [batch, tokens], are not divided: then there is one group or none.

    Args:
        inputs: the model's inputs, with attention_mask.

    Example:
        >>> mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
        >>> length_groups({"input_ids": torch.zeros(3, 4), "attention_mask": mask})
        [([1, 2], 4), ([0], 1)]
    """
    mask = inputs.get("attention_mask")
    tensors = [t for t in inputs.values() if isinstance(t, Tensor)]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or any(t.shape != mask.shape for t in tensors):
        return []
    lengths = mask.ne(0).sum(1)
    right = torch.arange(mask.shape[1]) < lengths[:, None]
    if not torch.equal(mask.ne(0), right) or not bool(lengths.all()):
        return []
    groups: list[tuple[list[int], int]] = []
    for row in lengths.argsort(descending=True, stable=True).tolist():
        length = int(lengths[row])
        if not groups or length < MIN_FILLED * groups[-1][1]:
            groups.append(([], length))
        groups[-1][0].append(row)
    return groups


def _by_groups(
    call: Callable[[dict[str, Any]], Any], inputs: dict[str, Any], groups: Sequence[tuple[list[int], int]]
) -> Any:
    """Return a model's outputs for a batch, computed group by group; zeros at padding.

    Where outputs have no row for each text, or other dimensions that depend on the length, the batch is computed as
    one.
    """
    parts, spec = [], None
    for rows, length in groups:
        part = {n: t[rows, :length] if isinstance(t, Tensor) else t for n, t in inputs.items()}
        leaves, spec = pytree.tree_flatten(call(part))
        parts.append(leaves)
    batch, tokens = inputs["attention_mask"].shape
    outputs = []
    for leaves in zip(*parts):
        if not isinstance(leaves[0], Tensor):
            outputs.append(leaves[0])
            continue
        merged = _merged(leaves, groups, batch, tokens)
        if merged is None:
            return call(inputs)
        outputs.append(merged)
    assert spec is not None
    return pytree.tree_unflatten(outputs, spec)


def _merged(
    leaves: Sequence[Tensor], groups: Sequence[tuple[list[int], int]], batch: int, tokens: int
) -> Tensor | None:
    """Return one output of all texts [batch, ...] or [batch, tokens, ...]; None if its groups do not fit together."""
    if any(t.dim() < 1 or len(t) != len(rows) for t, (rows, _) in zip(leaves, groups)):
        return None
    by_token = all(t.dim() > 1 and t.shape[1] == length for t, (_, length) in zip(leaves, groups))
    same = {t.shape[2 if by_token else 1 :] for t in leaves}
    if len(same) > 1:
        return None
    whole = leaves[0].new_zeros((batch, *([tokens] if by_token else []), *same.pop()))
    for leaf, (rows, length) in zip(leaves, groups):
        if by_token:
            whole[rows, :length] = leaf
        else:
            whole[rows] = leaf
    return whole
