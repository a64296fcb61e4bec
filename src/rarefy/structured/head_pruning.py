"""`prune_heads_`: remove attention heads by their numbers, as transformers models used to offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError, nearest
from rarefy.common.report import Report
from rarefy.dependency.graph import Graph, Group, trace, unsupported_notes
from rarefy.dependency.symbolic_dims import Axis, leaves
from rarefy.model.attached_receipt import forget_receipt
from rarefy.model.layers import unwrap
from rarefy.structured.cut_report import row
from rarefy.structured.hf_config import update_config
from rarefy.structured.optimizer_state import check_optimizer, replace_parameters
from rarefy.structured.options import check_unmasked
from rarefy.structured.surgery import give_own_heads, remove_units
from rarefy.structured.unit_selection import size_changes


def prune_heads_(
    model: nn.Module,
    heads: Mapping[str, Sequence[int]],
    example: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Report:
    """Remove attention heads by their numbers, in place.

    For any model whose attention `cut_` supports. Outputs are verified as in `cut_`. `nn.MultiheadAttention`, which
    divides its width by the number of heads, is replaced by a subclass with the same names and the same call whose
    heads keep their size.

    Args:
        model: the model to change.
        heads: {name of an attention module: numbers of its query heads}, counted from 0. Where queries share keys (GQA,
            MQA), heads are removed in whole groups: the numbers must name all queries of a group.
        example: a batch, as for `rarefy.cut_`.
        optimizer: an optimizer of the model; it continues with the parameters that remain.

    Returns:
        A report with a row for each attention module.

    Raises:
        ModelError: a name or number is wrong, or the cut model does not return what the masked one does. The model is
            then unchanged.

    Example:
        >>> net = nn.Sequential(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)).eval()
        >>> report = prune_heads_(net, {"0.self_attn": [0, 3]}, torch.randn(1, 5, 8))
        >>> report.rows[0]["units"]
        '4 -> 2'
    """
    inner = unwrap(model)
    check_unmasked(inner)
    if not isinstance(heads, Mapping) or not heads:
        raise ModelError(f"heads: expected {{name of an attention module: [numbers]}}, got {heads!r}")
    check_optimizer(optimizer, inner)
    before = sum(p.numel() for p in inner.parameters())
    replacement = give_own_heads(inner, set(heads))
    try:
        graph = trace(inner, example)
        masks: dict[Axis, Tensor] = {}
        for name, numbers in heads.items():
            group = _head_group(graph, name)
            mask = _keep_mask(graph, group, name, numbers)
            if not torch.equal(masks.setdefault(group.axis, mask), mask):
                raise ModelError(f"{name} shares its heads with another module: name the same numbers for both")
        removal = remove_units(inner, example, graph, masks)
        replacement.undo += removal.undo
        update_config(inner, example, size_changes(graph, masks))
    except BaseException:
        replacement.put_back()
        raise
    if optimizer is not None:
        replace_parameters(optimizer, removal.replaced)
    forget_receipt(inner)
    after = sum(p.numel() for p in inner.parameters())
    rows = [row(g, g.size, int(masks[g.axis].sum()), "") for g in graph.groups if g.axis in masks]
    return Report("heads", tuple(rows), {"parameters": f"{before:,} -> {after:,}"}, unsupported_notes(graph))


def _head_group(graph: Graph, name: str) -> Group:
    """Return the group of heads that a module's parameters produce. Raises ModelError unless there is one."""
    head_groups = [g for g in graph.groups if g.kind == "head"]
    matches = [g for g in head_groups if any(m.name.startswith(f"{name}.") for m in g.members)]
    if len(matches) != 1:
        names = list(dict.fromkeys(g.members[0].name.rsplit(".", 2)[0] for g in head_groups))
        nearest_names = nearest(str(name), names, count=3) or names[:3]
        problem = "no heads" if not matches else f"{len(matches)} kinds of heads"
        raise ModelError(f"{name!r} has {problem}; attention modules: {', '.join(nearest_names) or 'none'}")
    if matches[0].lock:
        raise ModelError(f"the heads of {name} cannot be removed: {matches[0].lock}")
    return matches[0]


def _keep_mask(graph: Graph, group: Group, name: str, numbers: Any) -> Tensor:
    """Return which heads stay, bool [heads]; of key groups where queries share keys."""
    queries_per_key = 1
    for m in group.members:
        for axis in leaves(graph.dims[m.name][m.dim]):
            queries_per_key = max(queries_per_key, axis.size if axis.kind == "query_head" else 1)
    total = group.size * queries_per_key
    invalid = not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) == 0
    if invalid or any(type(h) is not int or not 0 <= h < total for h in numbers):
        raise ModelError(f"{name} has heads 0 to {total - 1}: give a list of such numbers, got {numbers!r}")
    removed = torch.zeros(total, dtype=torch.bool)
    removed[torch.tensor(list(numbers))] = True
    by_key = removed.view(group.size, queries_per_key)
    if bool((by_key.any(1) != by_key.all(1)).any()):
        raise ModelError(
            f"{name}: every {queries_per_key} heads share a key and must be removed together: "
            f"0 to {queries_per_key - 1}, and so on"
        )
    if bool(removed.all()):
        raise ModelError(f"{name}: all of its {total} heads would be removed; keep at least one")
    return ~by_key.all(1)
