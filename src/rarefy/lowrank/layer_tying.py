"""`tie_layers_`: neighbouring blocks share one set of weights (ALBERT, Lan 2020), to be trained on.

Parameters are shared, not modules: what a block knows of its place (its number in a cache) stays its own, and so do the
running statistics of norms. Where is noted in `model.rarefy_tied`, by which `load` shares them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from rarefy.common.errors import ContainerError, ModelError, PatternError, unknown
from rarefy.common.report import Report
from rarefy.model.activation_quant import activation_quants as rounded
from rarefy.model.block_lists import block_lists
from rarefy.model.layers import unwrap
from rarefy.model.lowrank_modules import factor_records as factorized
from rarefy.model.quant_grid import recorded_grids

NOTE = "rarefy_tied"


def tie_layers_(model: nn.Module, every: int = 2, *, blocks: str | None = None, average: bool = True) -> Report:
    """Let each `every` neighbouring blocks of a list share their weights, in place; return a row a list.

    blocks    name of the list of blocks, such as "model.layers"; by default all lists of equal blocks
    average   shared weights are the mean of those before; False: those of the first block of each group

    Outputs change until the model is trained on. `save` stores shared weights once. Raises ModelError for a model
    without such blocks, of which fewer than two would share, or that was pruned, quantized or factorized already.
    O(parameters).

    >>> net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 4, enable_nested_tensor=False)
    >>> tie_layers_(net, 2).rows[0]["groups"], net.layers[1].linear1.weight is net.layers[0].linear1.weight
    ('0+1 2+3', True)
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 2:
        raise PatternError(f"every is a whole number from 2 up, got {every!r}")
    if not isinstance(average, bool):
        raise PatternError(f"average is True or False, got {average!r}")
    model = unwrap(model)
    busy = next((n for n, m in model.named_modules() if parametrize.is_parametrized(m)), None)
    busy = busy or next((n for n, m in model.named_modules() if recorded_grids(m)), None)
    busy = next(iter([*factorized(model), *rounded(model)]), None) if busy is None else busy
    if busy is not None:
        raise ModelError(f"{busy} is pruned, quantized or factorized already: tie first")
    if noted(model):
        raise ModelError(f"blocks of {next(iter(noted(model))) or 'the model'} share weights already")
    known = block_lists(model)
    if blocks is not None and blocks not in known:
        raise ModelError(unknown("list of blocks", blocks, known) if known else f"{type(model).__name__} has no blocks")
    groups = {n: _groups(s, every) for n, s in known.items() if blocks in (None, n)}
    groups = {n: g for n, g in groups.items() if g}
    if not groups:
        raise ModelError(f"{type(model).__name__} has no list of equal blocks of which {every} could share weights")
    before = sum(p.numel() for p in model.parameters())
    rows = []
    for name, group in groups.items():
        for members in group:
            _share(known[name], members, average)
        rows.append(
            {"blocks": name, "many": len(known[name]), "groups": " ".join("+".join(map(str, g)) for g in group)}
        )
    model.__dict__[NOTE] = {**noted(model), **groups}
    model.__dict__.pop("rarefy_receipt", None)  # what it measured is no longer so
    after = sum(p.numel() for p in model.parameters())
    summary = {"parameters": f"{before:,} -> {after:,}", "ratio": after / before}
    return Report("tied", tuple(rows), summary, ("outputs have changed: train on",))


def noted(model: nn.Module) -> dict[str, list[list[int]]]:
    """Return {list of blocks: groups that share weights}."""
    return model.__dict__.get(NOTE, {})


def restore_(model: nn.Module, told: Any, path: Any) -> None:
    """Share weights as a file says, before they are read; ContainerError for what does not fit."""
    if told == noted(model):
        return
    if not isinstance(told, Mapping) or noted(model):
        raise ContainerError(
            f"{path}: blocks that share weights must be told as an object, of a model that shares none"
        )
    known = block_lists(model)
    for name, groups in told.items():
        size = len(known[name]) if name in known else 0
        sound = isinstance(groups, list) and all(isinstance(g, list) and len(g) > 1 for g in groups)
        flat = [i for g in groups for i in g] if sound else [-1]
        if not all(type(i) is int and 0 <= i < size for i in flat) or any(b <= a for a, b in pairwise(flat)):
            raise ContainerError(f"{path}: {type(model).__name__} has no blocks {str(name)[:80]} that could share so")
        if any(_shapes(known[name][i]) != _shapes(known[name][g[0]]) for g in groups for i in g):
            raise ContainerError(f"{path}: blocks of {str(name)[:80]} are not alike, and cannot share weights")
    for name, groups in told.items():
        for members in groups:
            _share(known[name], members, False)
    model.__dict__[NOTE] = {n: [list(g) for g in groups] for n, groups in told.items()}


def _groups(parts: Any, every: int) -> list[list[int]]:
    """Runs of `every` neighbours that are alike; what is left over at the end shares too if it is two or more."""
    found: list[list[int]] = []
    for i, part in enumerate(parts):
        last = found[-1] if found else []
        alike = last and type(part) is type(parts[last[0]]) and _shapes(part) == _shapes(parts[last[0]])
        if alike and len(last) < every and _shapes(part):
            last.append(i)
        else:
            found.append([i])
    return [g for g in found if len(g) > 1]


def _shapes(module: nn.Module) -> dict[str, Any]:
    return {n: (tuple(p.shape), p.dtype) for n, p in module.named_parameters(remove_duplicate=False)}


@torch.no_grad()
def _share(parts: Any, members: list[int], average: bool) -> None:
    first, seen = parts[members[0]], set()
    for name, p in list(first.named_parameters(remove_duplicate=False)):
        if average and id(p) not in seen:  # what is tied within a block has one mean
            p.copy_(torch.stack([parts[i].get_parameter(name).float() for i in members]).mean(0))
        seen.add(id(p))
        owner, _, leaf = name.rpartition(".")
        for i in members[1:]:
            parts[i].get_submodule(owner)._parameters[leaf] = p
