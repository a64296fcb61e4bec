"""Write models as .pt2 files, which `torch.export.load` reads without Rarefy."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.common.atomic_io import container_errors, folder_beside, sync
from rarefy.common.errors import ContainerError, DataError, ModelError
from rarefy.common.plain_file import usable_path
from rarefy.compiler.export import export_program
from rarefy.compiler.model_checks import check_example, check_module, check_ready, fold_copy
from rarefy.evaluation.example_inputs import example_of
from rarefy.model import hf
from rarefy.model.compare import relative_distance
from rarefy.model.forward import calling, describe_batch, split_example

TOLERANCE = 1e-4  # largest distance of outputs, relative to the largest
TOKENS, BATCH = 128, 2  # of examples, where none is given


def write(model: Any, out: str | Path, example: Any = None, overwrite: bool = False) -> Path:
    """Write a model as a .pt2 file, and compare what `torch.export.load` makes of it with the model.

    Sizes stay open where the model's code allows it. Masks and grids are folded into the weights, in a copy; static
    activation scales become a division, rounding and multiplication. Weights are stored in the model's own type.

    Args:
        model: a model in evaluation mode on the CPU.
        out: the file.
        example: what it is called with; random for models whose inputs are known.
        overwrite: replace an existing file.

    Returns:
        The file.

    Raises:
        ContainerError: the file exists, has another ending than .pt2, or cannot be written.
        DataError: the model cannot be called with the example.
        ModelError: torch cannot export the model, or outputs of the file differ.
    """
    target = usable_path(out)
    if target.suffix != ".pt2":
        raise ContainerError(f"{target}: the name of an exported program ends in .pt2")
    if target.is_dir() or (target.exists() and not overwrite):
        raise ContainerError(f"{target} exists: pass overwrite=True (shell: pass --force), or give another name")
    check_module(model)
    model, _ = fold_copy(model)
    check_ready(model)
    args, kwargs = _call(model, example)
    with calling(model, f"an example of {describe_batch(kwargs or args)}"), torch.no_grad():
        expected = _tensors(model(*args, **kwargs))
    program, _ = export_program(model, args, kwargs, _round)
    with container_errors(target), folder_beside(target) as place:
        file = place / target.name
        torch.export.save(program, file)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            outputs = _tensors(torch.export.load(file).module()(*args, **kwargs))  # the file was written just now
        _compare(outputs, expected)
        sync(file)
        os.replace(file, target)
    return target


def _round(x: Tensor, scale: float, zero: int) -> Tensor:
    """Round to a static grid of 8 bits by operators that every reader of exported programs has; see `pt2_graph`."""
    values = x if x.dtype == torch.float32 else x.float()
    codes = torch.clamp(torch.round(values / scale) + zero, 0, 255)
    return ((codes - zero) * scale).to(x.dtype) if x.dtype != torch.float32 else (codes - zero) * scale


def _call(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments and keywords; without a cache for language models."""
    if example is None:
        try:
            example = example_of(model, TOKENS, BATCH)
        except ModelError as error:
            raise DataError(f"{error}; pass example=, what the model is called with") from None
    args, kwargs = split_example(example)
    check_example(pytree.tree_leaves((args, kwargs)))
    return args, {**({"use_cache": False} if hf.is_causal_lm(model) and not args else {}), **kwargs}


def _tensors(outputs: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def _compare(outputs: list[Tensor], expected: list[Tensor]) -> None:
    """Raise ModelError for outputs of the file that differ from the model's."""
    if len(outputs) != len(expected):
        raise ModelError(f"the exported program has {len(outputs)} outputs, the model {len(expected)}")
    worst = max((relative_distance(a, b, norm=math.inf) for a, b in zip(outputs, expected)), default=0.0)
    if not worst <= TOLERANCE:
        raise ModelError(f"outputs of the exported program differ from the model's by {worst:.2g}, at most {TOLERANCE}")
