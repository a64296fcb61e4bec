"""`cut_`: whole units leave the model, which stays an ordinary dense one, only smaller."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.cut.absent import Absent
from rarefy.cut.attributes import follow
from rarefy.cut.repair import REPAIRS, make_up, observe, readers, renew_batch_norms
from rarefy.cut.structure import named_tensors, remember
from rarefy.errors import ModelError, RarefyError, unknown
from rarefy.model.axes import Axis, Expr, Sum, kept, leaves, resolve
from rarefy.model.batches import tensors_in
from rarefy.model.graph import Graph, Group, trace
from rarefy.model.mask import masks as attached
from rarefy.model.select import Selector, select, unwrap
from rarefy.model.stats import call, evaluating, on_device
from rarefy.proof.report import Report

KINDS = ("channel", "neuron", "head", "head of a group", "head dimension", "group")
UNEVEN = "a chunk takes as many of it as of something that stays"
NEAR = 1e-4  # how far outputs of the cut model may be from those of the masked one, relative to the largest


def cut_(
    model: nn.Module,
    example: Any,
    units: str | Sequence[str] = ("channel", "neuron", "head"),
    keep: float = 0.5,
    *,
    layers: Selector = None,
    ignore: Selector = None,
    round_to: int = 1,
    data: Iterable[Any] | None = None,
    repair: bool | Sequence[str] = True,
    mask_only: bool = False,
) -> Report:
    """Remove units with the smallest weights, and everything that belongs to them; return what went and what is locked.

    example   what the model can be called with: it is run, to see what belongs together and to prove the result
    units     kinds of units: channel or group of a convolution, neuron of a Linear, head, head dimension
    keep      the fraction of the units of each group that stays
    layers    groups that a parameter of these layers makes; None: all
    round_to  as many units stay as are a multiple of this
    data      batches (something that can be run through twice), from which the units that stay learn to make up for the
              others
    repair    how they do, with `data`: "ridge" (layers that read them get new weights), "bias" (the mean of what is
              lost), "batchnorm" (statistics taken anew); True: all, False: none
    mask_only  units become zero, and nothing leaves
    Outputs are those of the model whose units are zero where they are made (`mask_only`), except where something counts
    the units, such as a LayerNorm: the note of the group says so. Raises ModelError; the model is then as it was.
    O(weights) and three calls.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> cut_(net, torch.randn(1, 4), keep=0.5).rows[0]["units"], net
    ('6 -> 3', Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    ))
    """
    inner = unwrap(model)
    kinds, how = _check(units, keep, round_to), _repairs(repair, data)
    if attached(inner):
        raise ModelError("masks are still attached: fold_ the model first")
    graph = trace(inner, example)
    chosen = _whole(graph, _chosen(inner, graph, kinds, layers, ignore), keep)
    masks = _smallest(graph, chosen, keep, round_to)
    held = {g.axis for g in chosen} - set(masks)
    if not masks:
        raise ModelError(f"nothing would go: {UNEVEN}")
    return apply(inner, example, graph, masks, how, data, mask_only=mask_only, held=held)


def apply(
    model: nn.Module,
    example: Any,
    graph: Graph,
    masks: Mapping[Axis, Tensor],
    how: Sequence[str] = (),
    data: Iterable[Any] | None = None,
    *,
    mask_only: bool = False,
    held: Collection[Axis] = (),
) -> Report:
    """Remove the units that `masks` does not keep, prove it, repair it; what `cut_` ends with."""
    before = sum(p.numel() for p in model.parameters())
    layers_hit = readers(model, graph, masks) if {"ridge", "bias"} & set(how) else {}
    dense = {n: getattr(*graph.owners[n][0]).detach().clone() for n in layers_hit}
    moments = observe(model, layers_hit, data) if data is not None and layers_hit and not mask_only else {}
    undo = mask(graph, masks)
    try:
        with Absent():
            want = _outputs(model, example)
        if not mask_only:
            _remove_exactly(model, example, graph, masks, want, undo)
            make_up(layers_hit, graph, masks, dense, moments, how)
            if "batchnorm" in how and data is not None:
                renew_batch_norms(model, data)
    except BaseException:
        for put_back in reversed(undo):
            put_back()
        raise
    after = sum(p.numel() for p in model.parameters())
    rows = [_row(g, masks.get(g.axis), g.axis in held) for g in graph.groups]
    notes = tuple(f"no rule for {op} in {place}: what it meets is locked" for op, place in graph.unknown)
    return Report("cut", tuple(rows), {"parameters": f"{before:,} -> {after:,}"}, notes)


def _check(units: Any, keep: Any, round_to: Any) -> tuple[str, ...]:
    kinds = (units,) if isinstance(units, str) else tuple(units)
    for kind in kinds:
        if kind not in KINDS:
            raise ModelError(unknown("units", str(kind), KINDS))
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise ModelError(f"keep is a fraction above 0 and at most 1, got {keep!r}")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ModelError(f"round_to is a whole number from 1 up, got {round_to!r}")
    return kinds


def _repairs(repair: Any, data: Any) -> tuple[str, ...]:
    asked = REPAIRS if repair is True else () if repair is False else repair
    for name in asked if not isinstance(asked, str) else [asked]:
        if name not in REPAIRS:
            raise ModelError(unknown("repair", str(name), REPAIRS))
    if isinstance(data, Iterator):
        raise ModelError("data is run through more than once: give a list or a DataLoader, not an iterator")
    if data is None:
        return ()
    return (asked,) if isinstance(asked, str) else tuple(asked)


def _chosen(model: nn.Module, graph: Graph, kinds: Sequence[str], layers: Selector, ignore: Selector) -> list[Group]:
    """The groups to cut."""
    wanted = None
    if layers is not None or ignore is not None:
        wanted = {id(m) for l in select(model, layers, ignore) for _, m, _ in l.owners}
    found = [g for g in graph.groups if g.lock is None and g.kind in kinds]
    if wanted is not None:
        makers = {g: [m for n in g.members if n.role == "out" for m, _ in graph.owners[n.name]] for g in found}
        found = [g for g in found if any(id(m) in wanted for m in makers[g])]
    if not found:
        why = "; ".join(f"{g.name} ({g.kind}): {g.lock}" for g in graph.groups[:4] if g.lock)
        raise ModelError(f"no group of {', '.join(kinds)} can be cut{': ' + why if why else ''}")
    return found


def _whole(graph: Graph, groups: Sequence[Group], keep: float) -> list[Group]:
    """The groups, with the dimensions of heads in place of heads whose number cannot be cut by that fraction: models
    take one as the quotient of their width and the other."""
    inside: dict[Axis, list[Group]] = {}
    by_axis = {g.axis: g for g in graph.groups}
    for group in groups:
        if group.kind == "head" and abs(group.size * keep - round(group.size * keep)) > 1e-6:
            beside = [a for m in group.members for a in leaves(graph.dims[m.name][m.dim])]
            dims = [by_axis[a] for a in dict.fromkeys(beside) if a.kind == "head dimension" and a in by_axis]
            if dims and all(d.lock is None and d.size * keep % 1 == 0 for d in dims):
                inside[group.axis] = dims
    found = [new for g in groups for new in inside.get(g.axis, [g])]
    return list(dict.fromkeys(found))


def _remove_exactly(
    model: nn.Module, example: Any, graph: Graph, masks: Mapping[Axis, Tensor], want: Sequence[Tensor], undo: list[Any]
) -> None:
    """Take the units out; where attention divides by the root of a dimension that shrinks, queries make up for it."""
    removed = remove(model, graph, masks)
    undo += removed
    try:
        return _prove(model, example, want)
    except ModelError:
        scaled = [g for g in graph.groups if g.axis in masks and g.kind == "head dimension"]
        if not scaled:
            raise
    for put_back in reversed(removed):
        put_back()
    del undo[-len(removed) :]
    for group in scaled:
        undo += _scale_queries(graph, group, float(masks[group.axis].float().mean()) ** 0.5)
    undo += remove(model, graph, masks)
    _prove(model, example, want)


def _scale_queries(graph: Graph, group: Group, by: float) -> list[Any]:
    """Multiply what makes queries: of the parameters that make the dimensions of heads the first, of its rows the first
    of each head."""
    heads = [a for m in group.members for a in leaves(graph.dims[m.name][m.dim]) if a.kind == "head"]
    many = group.size * (heads[0].size if heads else 1)
    makers = [m for m in group.members if m.role == "out"]
    weight = next((m for m in makers if getattr(*graph.owners[m.name][0]).dim() > 1), None)
    if weight is None:
        return []
    module = graph.owners[weight.name][0][0]
    undo = []
    for m in makers:
        if graph.owners[m.name][0][0] is module:
            W = getattr(*graph.owners[m.name][0])
            rows = (coordinates(graph.dims[m.name][m.dim], group.axis) >= 0).nonzero()[:many, 0].to(W.device)
            old = W.detach().clone()
            undo.append(lambda W=W, old=old: W.data.copy_(old))
            W.data.index_copy_(m.dim, rows, W.data.index_select(m.dim, rows) * by)
    return undo


def _smallest(graph: Graph, groups: Sequence[Group], keep: float, round_to: int) -> dict[Axis, Tensor]:
    """Which units of each group stay: those with the largest weights; groups that must stay equal lose equally many."""
    masks = {}
    for group in groups:
        n = max(1, round(group.size * keep))
        n = max(round_to, n // round_to * round_to) if group.size >= round_to else group.size
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[unit_norms(graph, group).topk(n).indices] = True
        masks[group.axis] = mask
    return _even(graph, masks)


def _even(graph: Graph, masks: dict[Axis, Tensor]) -> dict[Axis, Tensor]:
    """Without the masks that would make unequal what a chunk takes in equal parts."""
    while True:
        uneven = [e for e in graph.equal if kept(e[0], masks.get).sum() != kept(e[1], masks.get).sum()]
        drop = {axis for pair in uneven for e in pair for axis in leaves(e)} & set(masks)
        if not drop:
            return masks
        masks = {axis: m for axis, m in masks.items() if axis not in drop}


def unit_norms(graph: Graph, group: Group) -> Tensor:
    """Return, of each unit, the sum of its squared weights, each parameter's divided by their mean. fp32 [size]."""
    total = torch.zeros(group.size)
    for member in group.members:
        module, attribute = graph.owners[member.name][0]
        W = getattr(module, attribute)
        if not isinstance(W, nn.Parameter) or W.dim() < 2:
            continue
        square = W.detach().float().square().transpose(0, member.dim).flatten(1).sum(1)
        where = coordinates(graph.dims[member.name][member.dim], group.axis)
        here = where >= 0
        each = torch.zeros(group.size).index_add_(0, where[here], square[here].cpu())
        total += each / each.mean().clamp(min=1e-30)
    return total


def coordinates(e: Expr, axis: Axis) -> Tensor:
    """Return which unit of `axis` each index of a dimension belongs to, -1 for none. int64 [size]."""
    e = resolve(e)
    if isinstance(e, Axis):
        return torch.arange(e.size) if e is axis else torch.full((e.size,), -1)
    if isinstance(e, Sum):
        return torch.cat([coordinates(t, axis) for t in e.of])
    out = torch.full((1,), -1)
    for f in e.of:
        out = torch.maximum(out[:, None], coordinates(f, axis)[None]).flatten()
    return out


def mask(graph: Graph, masks: Mapping[Axis, Tensor]) -> list[Any]:
    """Make units zero where parameters make them; return what undoes it."""
    undo = []
    made: dict[str, set[int]] = {}
    for member in (m for g in graph.groups if g.axis in masks for m in g.members if m.role == "out"):
        made.setdefault(member.name, set()).add(member.dim)
    for name, dims in made.items():
        W = getattr(*graph.owners[name][0])
        if not isinstance(W, nn.Parameter):
            continue
        old = W.detach().clone()
        undo.append(lambda W=W, old=old: W.data.copy_(old))
        for d in dims:
            gone = ~kept(graph.dims[name][d], masks.get)
            W.data.index_fill_(d, gone.nonzero()[:, 0].to(W.device), 0)
    return undo


def remove(model: nn.Module, graph: Graph, masks: Mapping[Axis, Tensor]) -> list[Any]:
    """Take units out of parameters, buffers and the numbers of modules, which the model remembers; return what undoes
    it."""
    before = getattr(model, "rarefy_cut", None)
    undo: list[Any] = [lambda: setattr(model, "rarefy_cut", before)]
    more, numbers = follow(model, graph, masks)
    undo += more
    names = {(id(m), a): n for n, m, a in named_tensors(dict(model.named_modules()))}
    indices: dict[str, dict[int, Tensor]] = {}
    for name, dims in graph.dims.items():
        old = getattr(*graph.owners[name][0])
        new = old.detach()
        for d, e in enumerate(dims):
            left = kept(e, masks.get)
            if not left.all():
                new = new.index_select(d, left.nonzero()[:, 0].to(new.device))
                for module, attribute in graph.owners[name]:
                    indices.setdefault(names[id(module), attribute], {})[d] = left.nonzero()[:, 0]
        if new.shape == old.shape:
            continue
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new.clone(), old.requires_grad)
        for module, attribute in graph.owners[name]:
            table = module._parameters if isinstance(old, nn.Parameter) else module._buffers
            table[attribute] = new
            undo.append(lambda t=table, a=attribute, o=old: t.__setitem__(a, o))
    remember(model, numbers, indices)
    return undo


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return [t.detach().clone() for t in tensors_in(call(model, on_device(model, example)))]


def _prove(model: nn.Module, example: Any, want: Sequence[Tensor]) -> None:
    """Raise ModelError unless the cut model runs and returns what the masked one did."""
    try:
        got = _outputs(model, example)
    except RarefyError as error:
        raise ModelError(f"the cut model does not run, so it was put back: {error}") from error
    for a, b in zip(got, want):
        if a.shape != b.shape:
            raise ModelError(f"the cut model returns {list(a.shape)} instead of {list(b.shape)}, so it was put back")
        if b.is_floating_point():
            apart = float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) if b.numel() else 0.0
            if not apart <= NEAR:
                raise ModelError(f"the cut model's outputs are {apart:.2g} from the masked one's, so it was put back")


def _row(group: Group, mask: Tensor | None, held: bool) -> dict[str, Any]:
    now = group.size if mask is None else int(mask.sum())
    why = group.lock or ("" if mask is not None else UNEVEN if held else "not asked for")
    return {
        "group": group.name, "kind": group.kind, "units": f"{group.size} -> {now}", "parameters": len(group.members),
        "stays because": why, "note": "; ".join(group.notes),
    }  # fmt: skip
