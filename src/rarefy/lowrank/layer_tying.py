"""`tie_layers_`: neighbouring blocks share one set of weights (ALBERT; Lan 2020), to be trained further.

Parameters are shared, not modules: a block keeps its index in a cache and the running statistics of its norms. The
groups are recorded in `model.rarefy_tied`, from which `load` shares the weights again.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.nn.utils import parametrize

from rarefy.common.errors import ContainerError, ModelError, PatternError, unknown
from rarefy.common.options import Options
from rarefy.common.report import Report
from rarefy.model.activation_quant import activation_quants as rounded
from rarefy.model.attached_receipt import forget_receipt
from rarefy.model.block_lists import TIED, block_lists
from rarefy.model.layers import check_is_module, unwrap
from rarefy.model.lowrank_modules import factor_records as factorized
from rarefy.model.quant_grid import recorded_grids


class TieOptions(Options):
    """Share the weights of neighbouring blocks. See `rarefy.tie_layers_`."""

    error = PatternError

    every: int = Field(default=2, ge=2, description="how many neighbouring blocks share one set of weights")
    blocks: str | None = Field(
        default=None, description="name of the list of blocks; by default all lists of equal blocks"
    )
    average: bool = Field(
        default=True, description="shared weights are the mean of those before; false: the first block's"
    )


def tie_layers_(model: nn.Module, every: int = 2, *, blocks: str | None = None, average: bool = True) -> Report:
    """Let each `every` neighbouring blocks of a list share their weights, in place (ALBERT, Lan 2020).

    Outputs change until the model is trained further. `save` stores shared weights once. Costs O(parameters).

    Args:
        model: a model with a list of equal blocks, not yet pruned, quantized or factorized.
        every: how many neighbours share one set of weights, at least 2.
        blocks: name of the list of blocks, such as "model.layers"; by default all lists of equal blocks.
        average: shared weights are the mean of those before. False: those of the first block of each group.

    Returns:
        A row a list of blocks: which of them share.

    Raises:
        RarefyError: for options that do not fit, for a model without such blocks, and for one that was pruned,
            quantized or factorized; the model is then unchanged.

    Example:
        >>> net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 4, enable_nested_tensor=False)
        >>> tie_layers_(net, 2).rows[0]["groups"], net.layers[1].linear1.weight is net.layers[0].linear1.weight
        ('0+1 2+3', True)
    """
    return run_tie(model, TieOptions(every=every, blocks=blocks, average=average))


def run_tie(model: nn.Module, options: TieOptions) -> Report:
    """Tie layers by checked options. See `tie_layers_`."""
    model = unwrap(model)
    _check_untouched(model)
    known = block_lists(model)
    if options.blocks is not None and options.blocks not in known:
        missing = f"{type(model).__name__} has no blocks"
        raise ModelError(unknown("list of blocks", options.blocks, known) if known else missing)
    groups = {n: _groups(s, options.every) for n, s in known.items() if options.blocks in (None, n)}
    groups = {n: g for n, g in groups.items() if g}
    if not groups:
        name = type(model).__name__
        raise ModelError(f"{name} has no list with {options.every} or more equal blocks that could share weights")
    before = sum(p.numel() for p in model.parameters())
    rows = []
    for name, group in groups.items():
        for members in group:
            _share(known[name], members, options.average)
        shared = " ".join("+".join(map(str, g)) for g in group)
        rows.append({"blocks": name, "many": len(known[name]), "groups": shared})
    model.__dict__[TIED] = {**noted(model), **groups}
    forget_receipt(model)
    after = sum(p.numel() for p in model.parameters())
    summary = {"parameters": f"{before:,} -> {after:,}", "ratio": after / before}
    return Report("tied", tuple(rows), summary, ("outputs have changed: train on",))


def _check_untouched(model: nn.Module) -> None:
    """Raise ModelError for a model that was pruned, quantized, factorized or tied."""
    check_is_module(model)
    changed = next((n for n, m in model.named_modules() if parametrize.is_parametrized(m)), None)
    changed = changed or next((n for n, m in model.named_modules() if recorded_grids(m)), None)
    changed = next(iter([*factorized(model), *rounded(model)]), None) if changed is None else changed
    if changed is not None:
        raise ModelError(f"{changed} is pruned, quantized or factorized already: tie first")
    if noted(model):
        raise ModelError(f"blocks of {next(iter(noted(model))) or 'the model'} already share weights")


def noted(model: nn.Module) -> dict[str, list[list[int]]]:
    """Return {list of blocks: groups that share weights}."""
    return model.__dict__.get(TIED, {})


def restore_(model: nn.Module, record: Any, path: Any) -> None:
    """Share weights as a file records, before they are loaded. Raises ContainerError for a record that does not fit."""
    if record == noted(model):
        return
    if not isinstance(record, Mapping) or noted(model):
        raise ContainerError(f"{path}: the record of shared weights is damaged, or the model already shares weights")
    known = block_lists(model)
    for name, groups in record.items():
        size = len(known[name]) if name in known else 0
        valid = isinstance(groups, list) and all(isinstance(g, list) and len(g) > 1 for g in groups)
        indices = [i for g in groups for i in g] if valid else [-1]
        if not all(type(i) is int and 0 <= i < size for i in indices) or any(b <= a for a, b in pairwise(indices)):
            raise ContainerError(
                f"{path}: {type(model).__name__} has no blocks {str(name)[:80]} that could share weights like this"
            )
        if any(_shapes(known[name][i]) != _shapes(known[name][g[0]]) for g in groups for i in g):
            raise ContainerError(f"{path}: blocks of {str(name)[:80]} have different shapes and cannot share weights")
    for name, groups in record.items():
        for members in groups:
            _share(known[name], members, False)
    model.__dict__[TIED] = {n: [list(g) for g in groups] for n, groups in record.items()}


def forget_(model: nn.Module) -> None:
    """Drop the note of which blocks share weights; the weights stay as they are."""
    model.__dict__.pop(TIED, None)


def _groups(blocks: Any, every: int) -> list[list[int]]:
    """Return runs of `every` equal neighbours; a rest of two or more at the end is a group too."""
    groups: list[list[int]] = []
    for i, part in enumerate(blocks):
        run = groups[-1] if groups else []
        alike = run and type(part) is type(blocks[run[0]]) and _shapes(part) == _shapes(blocks[run[0]])
        if alike and len(run) < every and _shapes(part):
            run.append(i)
        else:
            groups.append([i])
    return [g for g in groups if len(g) > 1]


def _shapes(module: nn.Module) -> dict[str, Any]:
    """Return the shape and dtype of each parameter of a module."""
    return {n: (tuple(p.shape), p.dtype) for n, p in module.named_parameters(remove_duplicate=False)}


@torch.no_grad()
def _share(blocks: Any, members: list[int], average: bool) -> None:
    """Make blocks share the parameters of the first, or their mean."""
    first, averaged = blocks[members[0]], set()
    for name, p in list(first.named_parameters(remove_duplicate=False)):
        if average and id(p) not in averaged:  # parameters that are tied within a block are averaged once
            p.copy_(torch.stack([blocks[i].get_parameter(name).float() for i in members]).mean(0))
        averaged.add(id(p))
        owner, _, leaf = name.rpartition(".")
        for i in members[1:]:
            blocks[i].get_submodule(owner)._parameters[leaf] = p
