"""Through a model layer by layer, with every batch held in the middle of its own forward pass.

Each batch runs the model's real forward in a coroutine that stops where the next group of layers is about to be
called. When all batches have arrived there the group's inputs are known, its weights can be changed, and the batches go
on with the new weights to the next stop. So nothing of a model is captured, replayed or guessed, any architecture
will do, and the whole walk costs one forward pass. What is held between stops are the tensors of the suspended frames,
in the type that the model computes; over a budget they go to a file.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from rarefy.calibration import offload
from rarefy.calibration.gram import Gram, all_reduce_gram, input_columns, input_signature
from rarefy.calibration.weight_hooks import weight_hooks
from rarefy.common.errors import DataError, ModelError, nearest
from rarefy.model import distributed
from rarefy.model.batches import first_samples, tensors_in
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import Layer

HEAP_SLACK = 32 << 20  # bytes; giving memory back costs a fault a page when it is taken again


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Layers that are fed by one tensor, such as q, k and v: one Gram matrix, one stop."""

    layers: tuple[Layer, ...]
    calls: int = 1  # of the first layer in one forward pass
    rows: int = 0  # input vectors of a sample


@dataclass(eq=False)
class GroupStep:
    """All batches stand before `group`. Put new weights (as stored) into `weights`; they are in place afterwards.
    `gram` is empty at a stop that is only passed."""

    group: LayerGroup
    gram: Gram
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Block:
    """A module at whose end the walk stops too, with the layers in it."""

    name: str
    module: nn.Module
    layers: tuple[Layer, ...]


@dataclass(eq=False)
class BlockStep:
    """All batches stand at the end of `block`. Where its weights are changed, say so in `changed`: it is run again."""

    block: Block
    calls: list[tuple[tuple, dict[str, Any], Tensor]]  # arguments, and the output of the untouched model
    changed: bool = False


def layer_groups(model: nn.Module, batch: Any, layers: Sequence[Layer], *, dense: bool = False) -> list[LayerGroup]:
    """Return the groups of `layers` in the order of their last calls, from one forward pass of a single sample.

    dense: for a walk with the untouched model alongside, whose layers must still be untouched when they are called:
    only layers between which no other is called go together.
    """
    made: list[tuple[Any, Any, list[Layer], int]] = []  # (weak references to the input, columns, layers, rows)
    last: list[Any] = []  # of the layers of the call before
    calls: dict[int, int] = {}
    place: dict[int, int] = {}
    clock = count()

    def arrive(layer: Layer, module: nn.Module, x: Any) -> None:
        place[id(layer)], calls[id(layer)] = next(clock), calls.get(id(layer), 0) + 1
        if calls[id(layer)] > 1:
            last[:] = [None]
            return
        tensors = x if isinstance(x, tuple | list) else (x,)
        key = (*input_signature(layer, module), *(t._version for t in tensors))  # a change in place makes another input
        for refs, known, members, _ in made:
            same = known == key and len(refs) == len(tensors) and all(r() is t for r, t in zip(refs, tensors))
            if same and (not dense or last[0] is members):
                members.append(layer)
                return
        made.append(([weakref.ref(t) for t in tensors], key, [layer], input_columns(layer, module, x, None).shape[1]))
        last[:] = [made[-1][2]]

    with evaluating(model), torch.no_grad(), weight_hooks(model, layers, arrive):
        call(model, on_device(model, first_samples(batch)))
    groups = []
    for _, _, members, rows in made:
        once = [l for l in members if calls[id(l)] == 1]
        groups += [LayerGroup(tuple(once), rows=rows)] if once else []
        groups += [LayerGroup((l,), calls[id(l)], rows) for l in members if calls[id(l)] > 1]
    groups.sort(key=lambda g: place[id(g.layers[0])])
    for layer in layers:  # an expert that this sample did not need: after the layer that stands before it in the model
        if id(layer) not in calls:
            before = layers[: list(layers).index(layer)]
            at = next((i + 1 for l in reversed(before) for i, g in enumerate(groups) if l in g.layers), 0)
            groups.insert(at, LayerGroup((layer,)))
    return groups


def find_blocks(model: nn.Module, layers: Sequence[Layer], names: str | None = None) -> list[Block]:
    """Return the blocks of a model that hold `layers`: the members of its outermost lists of equal modules, or the
    modules whose names one of the globs in `names` (with | between) matches.

    A layer with owners in several blocks, or in none, belongs to no block. Raises ModelError where there is no block.
    """
    if names is not None:
        return _named_blocks(model, layers, names)
    found: list[Block] = []
    within: tuple[str, ...] = ()
    for name, module in model.named_modules():
        many = isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
        if not many or f"{name}.".startswith(within or ("\0",)) or len({type(m) for m in module}) > 1:  # type: ignore[arg-type]
            continue
        if isinstance(module[0], nn.Linear | nn.modules.conv._ConvNd):  # type: ignore[index]
            continue  # layers, not blocks
        within += (f"{name}." if name else "",)
        for key, member in module.named_children():
            path = f"{name}.{key}" if name else key
            inside = [l for l in layers if all(o.startswith(f"{path}.") for o, _, _ in l.owners)]
            if inside:
                found.append(Block(path, member, tuple(inside)))
    if not found:
        raise ModelError(f"{type(model).__name__} has no list of equal blocks to reconstruct: leave reconstruct out")
    return found


def _named_blocks(model: nn.Module, layers: Sequence[Layer], names: str) -> list[Block]:
    found: list[Block] = []
    for name, module in model.named_modules():
        if not any(fnmatchcase(name, word.strip()) for word in names.split("|")):
            continue
        inside = tuple(l for l in layers if all(f"{o}.".startswith(f"{name}.") for o, _, _ in l.owners))
        nested = any(name.startswith(f"{b.name}.") for b in found)  # * goes across dots: the outermost are meant
        found += [Block(name, module, inside)] if inside and not nested else []
    if not found:
        words = [n for n, m in model.named_modules() if n and list(m.children())]
        near = nearest(names, words)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ModelError(f"blocks {names!r} match no module of {type(model).__name__} with layers to prune{hint}")
    return found


def with_block_steps(groups: Sequence[LayerGroup], blocks: Sequence[Block]) -> list[LayerGroup | Block]:
    """Return the stops of a walk: the groups in order, each block after the last group that it holds."""
    stops: list[LayerGroup | Block] = list(groups)
    for block in blocks:
        inside = {id(l) for l in block.layers}
        again = [l.full_name for s in groups if s.calls > 1 for l in s.layers if id(l) in inside]
        if again:
            raise ModelError(
                f"{', '.join(again)}: called several times in a pass, {block.name} cannot learn: leave reconstruct out"
            )
        last = max(
            i for i, s in enumerate(stops) if isinstance(s, LayerGroup) and any(id(l) in inside for l in s.layers)
        )
        stops.insert(last + 1, block)
    return stops


def calibrate_sequentially(
    model: nn.Module,
    data: Iterable[Any],
    stops: Sequence[LayerGroup | Block],
    *,
    dense: bool = False,
    passed: int = 0,
    assign: bool = False,
    most: int | None = None,
    folder: Path | None = None,
) -> Generator[GroupStep | BlockStep, None, None]:
    """Yield a `GroupStep` before each group of layers, in order, with the Gram matrix of its inputs in the current
    model, and a `BlockStep` at the end of each block.

    dense   run the untouched model alongside, for `Gram.cross` and blocks; twice the time and memory
    passed  the first stops of a walk that goes on: their weights are known, their Gram matrices not wanted
    assign  put new weights in the place of the old ones instead of writing over them
    most    bytes of suspended activations in memory; by default half of what is available. What is over goes to a
            file in `folder` (by default where temporary files go).
    Raises DataError where no batch reaches a layer, ModelError for NaN or inf in its input.
    Time: one forward pass, and one more for each layer that is called several times.
    Memory: the suspended frames, about three activations a token, and one Gram matrix.
    """
    if most is None:
        free = offload.available_bytes()
        most = None if free is None else free // 2
    return _SequentialCalibration(model, stops, dense, passed, assign, most, folder).run(data)


class _SequentialCalibration:
    """Where a walk stands: `done` is the last stop that all batches have passed."""

    def __init__(
        self,
        model: nn.Module,
        stops: Sequence[LayerGroup | Block],
        dense: bool,
        passed: int,
        assign: bool,
        most: int | None,
        folder: Path | None,
    ):
        self.model, self.stops, self.dense, self.done = model, stops, dense, -1
        self.passed, self.assign, self.most, self.folder = passed, assign, most, folder
        self.parked = 0  # bytes of suspended activations in memory
        self.high = 0  # most bytes that were held once holes in the heap were given back
        self.gates = {id(s.layers[0]): i for i, s in enumerate(stops) if isinstance(s, LayerGroup)}
        self.grams: dict[int, Gram] = {}
        self.ends: dict[int, list[tuple[tuple, dict[str, Any], Tensor]]] = {}
        self.rerun = False  # the block that ends here has new weights
        self.untouched: dict[tuple[int, int], Tensor] = {}  # (batch, stop) -> input or output in the untouched model
        self.calls: dict[tuple[Any, int], int] = {}
        self.streams: tuple[dict[Any, int], ...] = ({}, {})  # untouched, compressed: coroutine -> where it stands

    def run(self, data: Iterable[Any]) -> Generator[GroupStep | BlockStep, None, None]:
        groups = [s for s in self.stops if isinstance(s, LayerGroup)]
        with (
            evaluating(self.model),
            torch.no_grad(),
            ExitStack() as self.stack,
            weight_hooks(self.model, [g.layers[0] for g in groups], self.arrive),
        ):
            for i, block in enumerate(self.stops):
                if isinstance(block, Block):
                    hook = block.module.register_forward_hook(partial(self.leave, i), with_kwargs=True)
                    self.stack.callback(hook.remove)
                    hook = block.module.register_forward_pre_hook(partial(self.enter, i), with_kwargs=True)
                    self.stack.callback(hook.remove)
            self.own()
            for index, batch in distributed.local_batches(data):
                batch = on_device(self.model, batch)
                for side in (0, 1) if self.dense else (1,):
                    self.start(index, batch, side)
            inside = set() if self.assign else {id(l.original) for g in groups for l in g.layers}
            read = [p.data for p in self.model.parameters() if id(p) not in inside]  # embeddings above all
            offload.page_out(offload.file_backed(read))
            for gate, place in enumerate(self.stops):
                self.own()
                stop = self.stop(gate)
                yield stop
                self.done = gate
                last = gate == len(self.stops) - 1  # what comes after the last stop is nobody's concern
                for fibre in [] if last else self.standing(0, gate):
                    self.untouched.pop((fibre.batch, gate), None)
                    self.advance(fibre)
                if isinstance(stop, GroupStep):
                    _install(stop.group, stop.weights, self.assign)
                again = isinstance(stop, GroupStep) and stop.group.calls > 1 and bool(stop.weights)
                if again:  # what later gates have seen came through the old weights
                    self.grams, self.ends = {}, {}
                self.rerun = isinstance(stop, BlockStep) and stop.changed
                for fibre in [] if last else self.standing(1, gate):
                    if again:  # earlier calls of this pass used the old weights
                        fibre.throw()
                        del self.streams[1][fibre]
                        self.start(fibre.batch, fibre.data, 1)
                    else:
                        self.advance(fibre)
                if isinstance(stop, GroupStep) and self.assign:  # not needed before they are saved
                    offload.page_out(offload.file_backed(stop.weights.values()))
                del place, stop

    def start(self, index: int, batch: Any, side: int) -> None:
        fibre: Any = greenlet(lambda batch: _discard(call(self.model, batch)))
        fibre.walk, fibre.batch, fibre.side, fibre.data = self, index, side, batch
        fibre.state, fibre.seen, fibre.rerun = _torch_state(), {}, False
        fibre.kept = batch.get("attention_mask") if hasattr(batch, "keys") else None
        self.stack.callback(fibre.throw)
        self.advance(fibre, batch)

    def advance(self, fibre: Any, *batch: Any) -> None:
        self.streams[fibre.side].pop(fibre, None)
        self.parked -= fibre.__dict__.pop("parked", 0)
        mine = _torch_state()
        _set_torch_state(fibre.state)  # a pass may stand inside a context of its own, such as autocast
        try:
            gate = fibre.switch(*batch)
        finally:
            fibre.state = _torch_state()
            _set_torch_state(mine)
        if not fibre.dead:
            self.streams[fibre.side][fibre] = gate
            self.park(fibre)
        if (
            offload.resident_bytes()[0] > self.high + HEAP_SLACK
        ):  # more than was ever held between two passes: holes in the heap
            self.trim()

    def trim(self) -> None:
        """Give the holes in the heap back to the system."""
        offload.trim_heap()
        self.high = max(self.high, offload.resident_bytes()[0])

    def own(self) -> None:
        """Note what belongs to the model; new weights may have taken the place of old ones."""
        self.owned = offload.storage_pointers([*self.model.parameters(), *self.model.buffers()])

    def park(self, fibre: Any) -> None:
        """Count what a suspended pass holds, and move it to a file where it is too much."""
        if self.most is None:
            return
        rows = [t for (index, _), t in self.untouched.items() if index == fibre.batch] if fibre.side == 0 else []
        tensors = {id(t): t for t in [*offload.tensors_in_frames(fibre.gr_frame), *rows]}.values()
        groups = offload.movable(tensors, self.owned | offload.storage_pointers(tensors_in(fibre.data)))
        size = offload.nbytes(groups)
        if self.parked + size > self.most:
            unchanged = [(seen, i) for seen in fibre.seen.values() for i, (t, v) in enumerate(seen) if t._version == v]
            offload.to_file(groups, self.folder)
            for seen, i in unchanged:  # moving counts as a change
                seen[i] = (seen[i][0], seen[i][0]._version)
        else:
            fibre.parked = size
            self.parked += size

    def standing(self, side: int, gate: int) -> list[Any]:
        return [f for f, at in self.streams[side].items() if at == gate]

    def stop(self, gate: int) -> GroupStep | BlockStep:
        self.trim()  # what is done at a stop is the peak of a walk
        place = self.stops[gate]
        if isinstance(place, Block):
            return BlockStep(place, self.ends.pop(gate, []))
        if gate < self.passed:
            return GroupStep(place, Gram())
        gram = self.grams.pop(gate, None)
        if distributed.num_data_shards() > 1:
            gram = all_reduce_gram(gram, place.layers[0], self.dense)
        if gram is None:
            names = ", ".join(l.full_name for l in place.layers)
            raise DataError(
                f"{names} was never called on the calibration data (nor in a thread of its own): "
                "ignore it, or prune it by magnitude"
            )
        return GroupStep(place, gram.finalize())

    def arrive(self, layer: Layer, module: nn.Module, x: Any) -> None:
        """A layer is about to be called: count its inputs, and wait at its last call."""
        here: Any = getcurrent()
        gate = self.gates[id(layer)]
        if gate <= self.done or getattr(here, "walk", None) is not self or here.rerun:  # passed, or from elsewhere
            return
        group = self.stops[gate]
        assert isinstance(group, LayerGroup)
        self.calls[here, gate] = self.calls.get((here, gate), 0) + 1
        if gate >= self.passed:
            self.note(here, gate, layer, input_columns(layer, module, x, here.kept))
        if self.calls[here, gate] == group.calls:
            del x
            here.parent.switch(gate)

    def note(self, here: Any, gate: int, layer: Layer, rows: Tensor) -> None:
        """Take a layer's inputs into its Gram matrix, or keep those of the untouched model for it."""
        group = self.stops[gate]
        assert isinstance(group, LayerGroup)
        if here.side == 0:
            if group.calls == 1 and layer.layout.kind != "experts":  # another router, other tokens
                self.untouched[here.batch, gate] = rows
        else:
            gram, dense = self.grams.setdefault(gate, Gram()), self.untouched.get((here.batch, gate))
            alone = not gram.tokens
            gram.add(rows, dense)
            if dense is not None and here.batch == 0:
                gram.held_out = gram.copy() if alone else Gram()
                if not alone:  # others, which skipped a layer, were here before
                    gram.held_out.add(rows, dense)
            if not torch.isfinite(gram.diagonal).all():
                raise ModelError(f"{layer.full_name}: NaN or inf in its inputs on calibration batch {here.batch}")

    def enter(self, gate: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note the state of a block's inputs: it is to be run again on them."""
        here: Any = getcurrent()
        if gate > self.done and getattr(here, "walk", None) is self:
            here.seen[gate] = [(t, t._version) for t in tensors_in([*args, kwargs])]

    def leave(self, gate: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        """A block has ended: note its call, and run it again where its weights have changed meanwhile."""
        here: Any = getcurrent()
        if gate <= self.done or getattr(here, "walk", None) is not self:
            return None
        place = self.stops[gate]
        assert isinstance(place, Block)
        if any(t._version != version for t, version in here.seen.pop(gate, ())):
            raise ModelError(f"{place.name} changes its input in place and cannot be run again: leave reconstruct out")
        if here.side == 0:
            self.untouched[here.batch, gate] = first_tensor(out).clone()  # what follows may change it in place
            return None
        want = self.untouched.pop((here.batch, gate), None)
        self.ends.setdefault(gate, []).append((args, kwargs, first_tensor(out) if want is None else want))
        here.parent.switch(gate)
        if not self.rerun:
            return None
        here.rerun = True
        try:
            return module.forward(*args, **kwargs)
        finally:
            here.rerun = False


def first_tensor(out: Any) -> Tensor:
    """Return a module's output, or the first of several; ModelError where there is none."""
    found = tensors_in(out)
    if not found:
        raise ModelError(f"a block returns {type(out).__name__} without a tensor: leave reconstruct out")
    return found[0]


def _torch_state() -> tuple[Any, ...]:
    """What torch keeps a thread for contexts: gradients, autocast."""
    cast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), cast


def _set_torch_state(state: tuple[Any, ...]) -> None:
    grad, cache, cast = state
    torch.set_grad_enabled(grad)
    torch.set_autocast_cache_enabled(cache)
    for device, (on, dtype) in zip(("cpu", "cuda"), cast):
        torch.set_autocast_enabled(device, on)
        torch.set_autocast_dtype(device, dtype)


def _discard(_: Any) -> None:
    return None


def _install(group: LayerGroup, weights: dict[str, Tensor], assign: bool) -> None:
    for layer in group.layers:
        if layer.full_name in weights:
            if assign:
                offload.page_out(offload.file_backed([layer.original.data]))
                layer.original.data = weights[layer.full_name]
            else:
                layer.original.data.copy_(weights[layer.full_name])
