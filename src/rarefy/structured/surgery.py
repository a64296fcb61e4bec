"""Units leave a model: made zero, taken out, proved, and put back where the proof fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError, RarefyError
from rarefy.dependency.graph import Graph, Group
from rarefy.dependency.symbolic_dims import Axis, kept, leaves
from rarefy.dependency.tracer import forget, plainly, running
from rarefy.model.batches import tensors_in
from rarefy.model.forward import call, evaluating, hooked, on_device
from rarefy.model.mha import with_own_heads
from rarefy.structured.consumers import Consumer, all_consumers
from rarefy.structured.masked_reference import MaskedReference
from rarefy.structured.size_attributes import update_size_attributes
from rarefy.structured.structure_record import named_tensors, record_attention, record_cut, record_restorer

# how far outputs of the cut model may be from those of the masked one, relative to the largest: sums round otherwise
NEAR = 1e-4
NEAR_OF = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
FLIPS = 0.01  # how many whole numbers may differ: the largest of two that are nearly equal
Undo = list[Callable[[], Any]]


class ForwardFailed(ModelError):
    """The cut model raises; `module` is what was running."""

    def __init__(self, message: str, module: str = ""):
        super().__init__(message)
        self.module = module


class OutputMismatch(ModelError):
    """The cut model returns something else."""


@dataclass(eq=False)
class Removal:
    """What was done.

    undo       how to undo it
    replaced   tensors that were: old, new, indices kept by dimension
    constants  what removed units still said, added to biases, by the weight's name
    scaled     rows of weights that were multiplied: name -> (dimension, rows before the cut, factor)
    unseen     the example's outputs do not depend on what went, so that nothing was proved
    repaired   layers whose weights make up for lost inputs
    """

    model: nn.Module | None = None
    undo: Undo = field(default_factory=list)
    replaced: list[tuple[Tensor, Tensor, dict[int, Tensor]]] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    scaled: dict[str, tuple[int, Tensor, float]] = field(default_factory=dict)
    unseen: bool = False
    repaired: list[str] = field(default_factory=list)

    def put_back(self, first: int = 0) -> None:
        """Undo what was done, from step `first` on."""
        for step in reversed(self.undo[first:]):
            step()
        del self.undo[first:]
        if self.model is not None:
            forget(self.model)


def remove_units(
    model: nn.Module, example: Any, graph: Graph, masks: Mapping[Axis, Tensor], *, stay: bool = False
) -> Removal:
    """Remove the units that `masks` does not keep and prove it; `stay`: put them back, as zeros. Raises ModelError,
    and the model is as it was. Three calls."""
    done = Removal(model)
    dense = outputs(model, example)
    done.undo += zero_units_(graph, masks)
    zeros = len(done.undo)
    try:
        readers = [r for r in all_consumers(graph) if not bool(kept(r.inputs, masks.get).all())]
        with plainly(), MaskedReference(graph, masks), _constants(readers, graph, masks, done.constants):
            want = outputs(model, example)
        done.unseen = all(torch.equal(a, b) for a, b in zip(dense, want))
        _remove_exactly(model, example, graph, masks, want, done)
    except BaseException:
        done.put_back()
        raise
    if stay:
        done.put_back(zeros)
        done.replaced.clear()
    return done


def give_own_heads(model: nn.Module, names: Any = None) -> Removal:
    """Replace torch's attention modules by such as can lose heads and width; the model remembers which."""
    done = Removal(model, [record_restorer(model)])
    replaced = with_own_heads(model, names)
    done.undo += [lambda w=w: setattr(w[0], w[1], w[2]) for w in replaced.values()]
    if replaced:
        record_attention(model, replaced)
    return done


def _remove_exactly(
    model: nn.Module, example: Any, graph: Graph, masks: Mapping[Axis, Tensor], want: Sequence[Tensor], done: Removal
) -> None:
    """Take the units out; where attention divides by the root of a dimension that shrinks, queries make up for it."""
    first = len(done.undo)
    remove_slices(model, graph, masks, done)
    try:
        return verify(model, example, want)
    except OutputMismatch:
        scaled = [g for g in graph.groups if g.axis in masks and g.axis.scores]
        if not scaled:
            raise
    done.put_back(first)
    done.replaced.clear()
    for group in scaled:
        _scale_queries(graph, group, float(masks[group.axis].float().mean()) ** 0.5, done)
    remove_slices(model, graph, masks, done)
    verify(model, example, want)


def _scale_queries(graph: Graph, group: Group, by: float, done: Removal) -> None:
    """Multiply what makes queries: of the parameters that make the dimensions of heads the first, of its rows the first
    of each head."""
    heads = [a for m in group.members for a in leaves(graph.dims[m.name][m.dim]) if a.kind == "head"]
    many = group.size * (heads[0].size if heads else 1)
    makers = [m for m in group.members if m.role == "out"]
    weight = next((m for m in makers if getattr(*graph.owners[m.name][0]).dim() > 1), None)
    if weight is None:
        return
    module = graph.owners[weight.name][0][0]
    for m in makers:
        if graph.owners[m.name][0][0] is module:
            W = getattr(*graph.owners[m.name][0])
            rows = (graph.places(m.name, m.dim)[group.axis] >= 0).nonzero()[:many, 0].to(W.device)
            done.undo.append(value_restorer(W))
            W.data.index_copy_(m.dim, rows, W.data.index_select(m.dim, rows) * by)
            done.scaled[m.name] = m.dim, rows, by


def value_restorer(W: Tensor) -> Callable[[], Any]:
    """Return what gives a tensor the values that it has now."""
    old = W.detach().clone()
    return lambda: W.data.copy_(old)


def zero_units_(graph: Graph, masks: Mapping[Axis, Tensor]) -> Undo:
    """Make units zero where parameters make them; return what undoes it."""
    undo: Undo = []
    made: dict[str, set[int]] = {}
    for member in (m for g in graph.groups if g.axis in masks for m in g.members if m.role == "out"):
        made.setdefault(member.name, set()).add(member.dim)
    for name, dims in made.items():
        W = getattr(*graph.owners[name][0])
        if not isinstance(W, nn.Parameter):
            continue
        undo.append(value_restorer(W))
        for d in dims:
            gone = ~kept(graph.dims[name][d], masks.get)
            W.data.index_fill_(d, gone.nonzero()[:, 0].to(W.device), 0)
    return undo


def remove_slices(model: nn.Module, graph: Graph, masks: Mapping[Axis, Tensor], done: Removal) -> None:
    """Take units out of parameters, buffers and the numbers of modules, which the model remembers."""
    done.undo.append(record_restorer(model))
    more, numbers = update_size_attributes(model, graph, masks)
    done.undo += more
    names = {(id(m), a): n for n, m, a in named_tensors(dict(model.named_modules()))}
    indices: dict[str, dict[int, Tensor]] = {}
    for name, dims in graph.dims.items():
        old = getattr(*graph.owners[name][0])
        new = old.detach()
        kept_of: dict[int, Tensor] = {}
        for d, e in enumerate(dims):
            left = kept(e, masks.get)
            if not left.all():
                kept_of[d] = left.nonzero()[:, 0]
                new = new.index_select(d, kept_of[d].to(new.device))
        if not kept_of:
            continue
        for module, attribute in graph.owners[name]:
            indices[names[id(module), attribute]] = kept_of
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new.clone(), old.requires_grad)
        done.replaced.append((old, new, kept_of))
        for module, attribute in graph.owners[name]:
            setattr(module, attribute, new)  # not past it: recurrent layers keep a list of their weights
            done.undo.append(lambda m=module, a=attribute, o=old: setattr(m, a, o))
    for name, constant in done.constants.items():
        bias: Any = graph.owners[name][0][0].bias
        done.undo.append(value_restorer(bias))
        bias.data.add_(constant.to(bias))
    record_cut(model, numbers, indices)


@contextmanager
def _constants(
    readers: Sequence[Consumer], graph: Graph, masks: Mapping[Axis, Tensor], found: dict[str, Tensor]
) -> Any:
    """Note what units that are zero where they are made add to outputs all the same, because something between makes a
    constant of zero (a sigmoid, an exponential); `found`: outputs by the weight's name."""

    def see(reader: Consumer) -> Any:
        gone = ~kept(reader.inputs, masks.get)

        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            x = reader.rows((args or tuple(kwargs.values()))[0].detach()).float()
            x = x[:, gone.to(x.device)]
            if len(x) < 2 or not x.any() or module.bias is None or _pads(module):
                return  # of one row nothing tells whether it is always so
            low, high = x.amin(0), x.amax(0)
            constant = torch.where(high - low <= 1e-6 * high.abs().clamp(min=1), x.mean(0), torch.zeros_like(low))
            W = module.weight.detach().float().transpose(0, reader.axis)[gone.to(x.device)]
            W = W.flatten(2).sum(2) if W.dim() > 2 else W
            rows = kept(graph.dims[reader.name][1 - reader.axis], masks.get)
            found[reader.name] = (constant @ W)[rows.to(x.device)]

        return hook

    plain = [r for r in readers if r.plain]
    with hooked([r.module.register_forward_pre_hook(see(r), with_kwargs=True) for r in plain]):
        yield


def _pads(module: Any) -> bool:
    """Whether a convolution reads zeros around its image, where a constant is missing."""
    if not isinstance(module, nn.modules.conv._ConvNd) or module.padding_mode != "zeros":
        return False
    return module.padding == "same" or (module.padding != "valid" and any(module.padding))


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Return all tensors that a call in evaluation mode returns."""
    forget(model)
    with evaluating(model), torch.no_grad():
        return [t.detach().clone() for t in tensors_in(call(model, on_device(model, example)))]


def verify(model: nn.Module, example: Any, want: Sequence[Tensor]) -> None:
    """Raise ModelError unless the cut model runs and returns what the masked one did."""
    stack: list[str] = []
    try:
        with running(model, stack, unwind=False):
            got = outputs(model, example)
    except RarefyError as error:
        raise ForwardFailed(f"the cut model does not run, so it was put back: {error}", (stack or [""])[-1]) from error
    text = output_difference(got, want, "the masked one's")
    if text:
        raise OutputMismatch(f"the cut model {text}, so it was put back")


def output_difference(got: Sequence[Tensor], want: Sequence[Tensor], whose: str, near: float = NEAR) -> str:
    """Return how what a model returns differs from what it should (`whose`), by more than `near` of the largest where
    numbers are in float32; "" where it does not."""
    if len(got) != len(want):
        return f"returns {len(got)} tensors instead of {len(want)}"
    for a, b in zip(got, want):
        if a.shape != b.shape:
            return f"returns {list(a.shape)} instead of {list(b.shape)}"
        if b.is_floating_point() and b.numel():
            apart = float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
            allowed = NEAR_OF.get(b.dtype, near)
            if not apart <= allowed:
                return f"returns numbers {apart:.2g} from {whose} ({allowed:g} is allowed)"
        elif b.numel() and (share := float((a != b).float().mean())) > FLIPS:
            return f"returns whole numbers of which {share:.0%} are not {whose}"
    return ""
