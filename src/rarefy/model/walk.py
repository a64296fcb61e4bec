"""Through a model layer by layer, with every batch held in the middle of its own forward pass.

Each batch runs the model's real forward in a coroutine that stops where the next group of layers is about to be
called. When all batches have arrived there the group's inputs are known, its weights can be changed, and the batches go
on with the new weights to the next stop. So nothing of a model is captured, replayed or guessed, any architecture
will do, and the whole walk costs one forward pass. What is held between stops are the tensors of the suspended frames.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from rarefy.errors import DataError, ModelError
from rarefy.model.gram import Gram, columns, same_columns
from rarefy.model.select import Layer
from rarefy.model.stats import call, evaluating, on_device

Arrive = Callable[[Layer, nn.Module, Any], None]


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that are fed by one tensor, such as q, k and v: one Gram matrix, one stop."""

    layers: tuple[Layer, ...]
    calls: int = 1  # of the first layer in one forward pass


@dataclass(eq=False)
class Stop:
    """All batches stand before `group`. Put new weights (as stored) into `weights`; they are in place afterwards."""

    group: Group
    gram: Gram
    weights: dict[str, Tensor] = field(default_factory=dict)


def order(model: nn.Module, batch: Any, layers: Sequence[Layer]) -> list[Group]:
    """Return the groups of `layers` in the order of their last calls, from one forward pass of a single sample."""
    made: list[tuple[Any, Any, list[Layer]]] = []  # (weak references to the input, columns, layers)
    calls: dict[int, int] = {}
    place: dict[int, int] = {}
    clock = iter(range(1 << 62))

    def arrive(layer: Layer, module: nn.Module, x: Any) -> None:
        place[id(layer)], calls[id(layer)] = next(clock), calls.get(id(layer), 0) + 1
        if calls[id(layer)] > 1:
            return
        key = same_columns(layer, module)
        tensors = x if isinstance(x, tuple) else (x,)
        for refs, known, members in made:
            if known == key and len(refs) == len(tensors) and all(r() is t for r, t in zip(refs, tensors)):
                members.append(layer)
                return
        made.append(([weakref.ref(t) for t in tensors], key, [layer]))

    with evaluating(model), torch.no_grad(), taps(model, layers, arrive):
        call(model, on_device(model, _first_sample(batch)))
    groups = []
    for _, _, members in made:
        once = [l for l in members if calls[id(l)] == 1]
        groups += [Group(tuple(once))] if once else []
        groups += [Group((l,), calls[id(l)]) for l in members if calls[id(l)] > 1]
    groups.sort(key=lambda g: place[id(g.layers[0])])
    for layer in layers:  # an expert that this sample did not need: after the layer that stands before it in the model
        if id(layer) not in calls:
            before = layers[: list(layers).index(layer)]
            at = next((i + 1 for l in reversed(before) for i, g in enumerate(groups) if l in g.layers), 0)
            groups.insert(at, Group((layer,)))
    return groups


def walk(model: nn.Module, data: Iterable[Any], groups: Sequence[Group], *, dense: bool = False) -> Iterator[Stop]:
    """Yield a `Stop` before each group of layers, in order, with the Gram matrix of its inputs in the model as it is.

    dense: run the untouched model alongside and fill `Gram.cross`; twice the time and memory.
    Raises DataError where no batch reaches a layer, ModelError for NaN or inf in its input.
    Time: one forward pass, and one more for each layer that is called several times.
    Memory: the suspended frames, about three activations a token, and one Gram matrix.
    """
    first = {id(g.layers[0]): i for i, g in enumerate(groups)}
    grams = [Gram() for _ in groups]
    untouched: dict[tuple[int, int], Tensor] = {}  # (batch, gate) -> input in the dense model
    calls: dict[tuple[Any, int], int] = {}
    done = -1  # the last gate that all have passed

    def arrive(layer: Layer, module: nn.Module, x: Any) -> None:
        here: Any = getcurrent()
        gate = first[id(layer)]
        if gate <= done or getattr(here, "grams", None) is not grams:  # passed, or a call that is not of this walk
            return
        calls[here, gate] = calls.get((here, gate), 0) + 1
        rows = columns(layer, module, x, here.kept)
        if here.dense:
            if groups[gate].calls == 1:
                untouched[here.batch, gate] = rows
        else:
            grams[gate].add(rows, untouched.get((here.batch, gate)))
            if not torch.isfinite(grams[gate].diagonal).all():
                raise ModelError(f"{layer.full_name}: NaN or inf in its inputs on calibration batch {here.batch}")
        if calls[here, gate] == groups[gate].calls:
            del rows, x
            here.parent.switch(gate)

    def run(batch: Any) -> None:
        call(model, batch)

    with evaluating(model), torch.no_grad(), taps(model, [g.layers[0] for g in groups], arrive), ExitStack() as stack:
        streams: tuple[dict[Any, int], ...] = ({}, {})  # dense, compressed: coroutine -> the gate it stands at

        def start(index: int, batch: Any, side: int) -> None:
            fibre: Any = greenlet(run)
            fibre.grams, fibre.batch, fibre.dense, fibre.data = grams, index, side == 0, batch
            fibre.kept = batch.get("attention_mask") if hasattr(batch, "keys") else None
            stack.callback(fibre.throw)
            _advance(fibre, streams[side], batch)

        for index, batch in enumerate(data):
            batch = on_device(model, batch)
            for side in (0, 1) if dense else (1,):
                start(index, batch, side)
        for gate, group in enumerate(groups):
            if not grams[gate].tokens:
                names = ", ".join(l.full_name for l in group.layers)
                raise DataError(
                    f"{names} was never called on the calibration data: ignore it, or prune it by magnitude"
                )
            stop = Stop(group, grams[gate].finish())
            grams[gate] = Gram()
            yield stop
            done = gate
            if gate == len(groups) - 1:  # what comes after the last layer is nobody's concern
                return _install(group, stop.weights)
            for fibre in [f for f, at in streams[0].items() if at == gate]:
                untouched.pop((fibre.batch, gate), None)
                _advance(fibre, streams[0])
            _install(group, stop.weights)
            for fibre in [f for f, at in streams[1].items() if at == gate]:
                if group.calls > 1 and stop.weights:  # earlier calls of this pass used the old weights: begin again
                    fibre.throw()
                    del streams[1][fibre]
                    start(fibre.batch, fibre.data, 1)
                else:
                    _advance(fibre, streams[1])


def _advance(fibre: Any, standing: dict[Any, int], *batch: Any) -> None:
    standing.pop(fibre, None)
    gate = fibre.switch(*batch)
    if not fibre.dead:
        standing[fibre] = gate


def _install(group: Group, weights: dict[str, Tensor]) -> None:
    for layer in group.layers:
        if layer.full_name in weights:
            layer.original.data.copy_(weights[layer.full_name])


@contextmanager
def taps(model: nn.Module, layers: Sequence[Layer], arrive: Arrive) -> Iterator[None]:
    """Call `arrive(layer, module, input)` each time a layer's weight is about to be used."""
    parents = {id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    with ExitStack() as stack:
        for layer in layers:
            for _, module, _ in layer.owners:
                parent = parents.get(id(module))
                if parent is not None:
                    stack.enter_context(_before_out_proj(parent, layer, arrive))
                elif isinstance(module, nn.MultiheadAttention):
                    _on_call(stack, module, _attention_hook(layer, arrive))
                else:
                    _on_call(stack, module, _plain_hook(layer, arrive))
        yield


def _on_call(stack: ExitStack, module: nn.Module, hook: Any) -> None:
    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _plain_hook(layer: Layer, arrive: Arrive) -> Any:
    return lambda m, args, kwargs: arrive(layer, m, args[0] if args else next(iter(kwargs.values())))


def _attention_hook(layer: Layer, arrive: Arrive) -> Any:
    names = ("query", "key", "value")

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        q, k, v = ({**dict(zip(names, args)), **kwargs}[n] for n in names)
        one = {"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}
        arrive(layer, module, one.get(layer.param, (q, k, v)))

    return hook


@contextmanager
def _before_out_proj(parent: nn.MultiheadAttention, layer: Layer, arrive: Arrive) -> Iterator[None]:
    """MultiheadAttention never calls its `out_proj`: it runs with the identity there, the real product comes after."""
    real = parent.out_proj

    def enter(*_: Any) -> None:
        eye = torch.eye(parent.embed_dim, dtype=real.weight.dtype, device=real.weight.device)
        same = type(real)(parent.embed_dim, parent.embed_dim, dtype=eye.dtype, device=eye.device)
        same.weight, same.bias = nn.Parameter(eye, False), nn.Parameter(torch.zeros_like(eye[0]), False)
        parent.out_proj = same

    def leave(_: Any, args: Any, out: Any) -> Any:
        parent.out_proj = real
        arrive(layer, parent, out[0])
        return (nn.functional.linear(out[0], real.weight, real.bias), *out[1:])

    handles = [parent.register_forward_pre_hook(enter), parent.register_forward_hook(leave)]
    try:
        yield
    finally:
        parent.out_proj = real
        for handle in handles:
            handle.remove()


def _first_sample(batch: Any) -> Any:
    """One sample of a batch whose tensors agree on their first dimension, else the batch."""
    if isinstance(batch, Tensor):
        return batch[:1] if batch.dim() else batch
    tensors = list(batch.values()) if hasattr(batch, "keys") else list(batch) if isinstance(batch, tuple | list) else []
    sizes = {len(t) if isinstance(t, Tensor) and t.dim() else None for t in tensors}
    if len(sizes) != 1 or None in sizes:
        return batch
    if hasattr(batch, "keys"):
        return {k: batch[k][:1] for k in batch}
    return tuple(t[:1] for t in batch)
