"""`prune_heads_`: attention heads by their numbers, as transformers models once had it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError, nearest
from rarefy.common.report import Report
from rarefy.dependency.graph import Graph, Group, trace, unsupported_notes
from rarefy.dependency.symbolic_dims import Axis, leaves
from rarefy.model.layers import unwrap
from rarefy.structured.budget import size_changes
from rarefy.structured.cut import row
from rarefy.structured.hf_config import update_config
from rarefy.structured.optimizer_state import check_optimizer, replace_parameters
from rarefy.structured.options import check_unmasked
from rarefy.structured.surgery import give_own_heads, remove_units


def prune_heads_(
    model: nn.Module,
    heads: Mapping[str, Sequence[int]],
    example: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Report:
    """Remove attention heads by their numbers; return what went.

    heads    {name of an attention module: numbers of its query heads}, counted from 0 as they are now
    example  what the model can be called with
    optimizer  one that trains the model: it goes on with what is left
    Where queries share keys (GQA, MQA), heads go in whole groups: the numbers must name all queries of a group. For any
    model whose attention `cut_` can read. `nn.MultiheadAttention` divides its width by the number of heads: it becomes
    a subclass with heads of a size of their own, with the same names and call. Proved as in `cut_`. Raises ModelError;
    the model is then as it was.

    >>> prune_heads_(nn.Sequential(nn.Linear(2, 2)), {"0": [0]}, torch.randn(1, 2))
    Traceback (most recent call last):
    rarefy.common.errors.ModelError: '0' has no heads; attention modules: none
    """
    inner = unwrap(model)
    check_unmasked(inner)
    if not isinstance(heads, Mapping) or not heads:
        raise ModelError(f"heads is {{name of an attention module: [numbers]}}, got {heads!r}")
    check_optimizer(optimizer, inner)
    before = sum(p.numel() for p in inner.parameters())
    own = give_own_heads(inner, set(heads))
    try:
        graph = trace(inner, example)
        masks: dict[Axis, Tensor] = {}
        for name, numbers in heads.items():
            group = _group(graph, name)
            masks[group.axis] = _kept(graph, group, name, numbers)
        removal = remove_units(inner, example, graph, masks)
        own.undo += removal.undo
        update_config(inner, example, size_changes(graph, masks))
    except BaseException:
        own.put_back()
        raise
    if optimizer is not None:
        replace_parameters(optimizer, removal.replaced)
    after = sum(p.numel() for p in inner.parameters())
    rows = [row(g, g.size, int(masks[g.axis].sum()), "") for g in graph.groups if g.axis in masks]
    return Report("heads", tuple(rows), {"parameters": f"{before:,} -> {after:,}"}, unsupported_notes(graph))


def _group(graph: Graph, name: str) -> Group:
    """The heads that parameters of that module make."""
    known = [g for g in graph.groups if g.kind == "head"]
    found = [g for g in known if any(m.name.startswith(f"{name}.") for m in g.members)]
    if len(found) != 1:
        places = list(dict.fromkeys(g.members[0].name.rsplit(".", 2)[0] for g in known))
        near = nearest(str(name), places, many=3) or places[:3]
        what = "no heads" if not found else f"{len(found)} kinds of heads"
        raise ModelError(f"{name!r} has {what}; attention modules: {', '.join(near) or 'none'}")
    if found[0].lock:
        raise ModelError(f"the heads of {name} stay: {found[0].lock}")
    return found[0]


def _kept(graph: Graph, group: Group, name: str, numbers: Any) -> Tensor:
    """Which of the heads (groups of them, where queries share keys) stay."""
    shared = 1  # queries of a key
    for m in group.members:
        for axis in leaves(graph.dims[m.name][m.dim]):
            shared = max(shared, axis.size if axis.kind == "query_head" else 1)
    total = group.size * shared
    wrong = not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) == 0
    if wrong or any(type(h) is not int or not 0 <= h < total for h in numbers):
        raise ModelError(f"{name} has heads 0 to {total - 1}: give a list of such numbers, got {numbers!r}")
    gone = torch.zeros(total, dtype=torch.bool)
    gone[torch.tensor(list(numbers))] = True
    rows = gone.view(group.size, shared)
    if bool((rows.any(1) != rows.all(1)).any()):
        raise ModelError(f"{name}: every {shared} heads share a key, so they go together: 0 to {shared - 1}, and so on")
    if bool(gone.all()):
        raise ModelError(f"{name}: all of its {total} heads would go")
    return ~rows.all(1)
