"""Sequential calibration: layers are processed in order, each on the inputs it gets from the layers before it.

Each batch runs the model's own forward in a coroutine, which is suspended where the next group of layers is about to be
called. Once all batches have arrived there, the group's inputs are known, its weights can be changed, and the batches
continue with the new weights. Nothing of the model is captured or traced, so any architecture works, and the whole
calibration costs one forward pass. Between two steps the tensors of the suspended frames stay in memory, in the dtype
in which the model computes; above a budget they are moved to a file.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from rarefy.calibration import offload
from rarefy.calibration.gram import (
    Gram,
    all_reduce_gram,
    are_same_tokens,
    identity_gram,
    input_columns,
    input_signature,
    padding_mask,
)
from rarefy.calibration.module_state import Attribute, attributes_set_by, set_values, values_of
from rarefy.calibration.torch_state import set_torch_state, torch_state
from rarefy.calibration.weight_hooks import weight_hooks
from rarefy.common.errors import DataError, ModelError, nearest
from rarefy.model import distributed
from rarefy.model.batches import count_samples, first_samples, first_tensor, tensors_in
from rarefy.model.block_lists import equal_modules, outermost_lists
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import Layer
from rarefy.model.mha import without_mha_fastpath

UNREACHED = "not called on the calibration data (calls in other threads are not seen), so all inputs count the same"
UNREACHABLE = "no layer is called on the calibration data (calls in other threads are not seen): give other data"
HEAP_SLACK = 32 << 20  # bytes; memory that is returned costs a page fault when it is needed again


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Layers that read the same tensor, such as q, k and v: they share a Gram matrix and a step."""

    layers: tuple[Layer, ...]
    calls: int = 1  # of the first layer in one forward pass
    rows: int = 0  # input vectors per sample

    @property
    def has_dense_inputs(self) -> bool:
        """Return whether inputs can be compared with the dense model's: fused experts would get other tokens."""
        return self.calls == 1 and self.layers[0].layout.kind != "experts"


@dataclass(eq=False)
class GroupStep:
    """All batches are suspended before `group`. New weights (as stored) go into `weights` and are then installed.

    `gram` is empty if the step was done in an earlier run.
    """

    group: LayerGroup
    gram: Gram
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Block:
    """A module after which there is a step too, with the layers in it."""

    name: str
    module: nn.Module
    layers: tuple[Layer, ...]


@dataclass(eq=False)
class BlockStep:
    """All batches are suspended at the end of `block`. If its weights change, set `changed`: it is then run again."""

    block: Block
    calls: list[tuple[tuple, dict[str, Any], Tensor]]  # arguments, and the output of the untouched model
    changed: bool = False


def layer_groups(model: nn.Module, batch: Any, layers: Sequence[Layer], *, dense: bool = False) -> list[LayerGroup]:
    """Return the groups of `layers` in the order of their last calls, found in one forward pass of one sample.

    dense: for a calibration with the dense model alongside, whose layers must still be dense when they are called;
    there, only layers without another call between them share a group.
    """
    # (weak references to the input, its signature, layers, rows)
    groups_by_input: list[tuple[Any, Any, list[Layer], int]] = []
    last_members: list[Any] = []  # of the layers of the call before
    calls: dict[int, int] = {}
    order_of: dict[int, int] = {}
    clock = count()

    def before_layer(layer: Layer, module: nn.Module, x: Any) -> None:
        order_of[id(layer)], calls[id(layer)] = next(clock), calls.get(id(layer), 0) + 1
        if calls[id(layer)] > 1:
            last_members[:] = [None]
            return
        tensors = x if isinstance(x, tuple | list) else (x,)
        key = (*input_signature(layer, module), *(t._version for t in tensors))  # changed in place, it is another input
        for references, known, members, _ in groups_by_input:
            same = known == key and len(references) == len(tensors)
            same = same and all(r() is t for r, t in zip(references, tensors))
            if same and (not dense or last_members[0] is members):
                members.append(layer)
                return
        groups_by_input.append(
            ([weakref.ref(t) for t in tensors], key, [layer], input_columns(layer, module, x, None).shape[1])
        )
        last_members[:] = [groups_by_input[-1][2]]

    with evaluating(model), without_mha_fastpath(), torch.no_grad():
        with weight_hooks(model, layers, before_layer):
            call(model, on_device(model, first_samples(batch)))
        if calls and count_samples(batch) > 1:  # a loop over samples calls layers more often
            calls.clear()
            with weight_hooks(model, layers, lambda layer, *_: calls.update({id(layer): calls.get(id(layer), 0) + 1})):
                call(model, on_device(model, batch))
    groups = []
    for _, _, members, rows in groups_by_input:
        members = [l for l in members if id(l) in calls]
        called_once = [l for l in members if calls[id(l)] == 1]
        groups += [LayerGroup(tuple(called_once), rows=rows)] if called_once else []
        groups += [LayerGroup((l,), calls[id(l)], rows) for l in members if calls[id(l)] > 1]
    groups.sort(key=lambda g: order_of[id(g.layers[0])])
    grouped = {id(l) for g in groups for l in g.layers}
    for layer in layers:  # an unused expert goes after the layer before it in the model
        if id(layer) not in grouped:
            earlier = layers[: list(layers).index(layer)]
            position = next((i + 1 for l in reversed(earlier) for i, g in enumerate(groups) if l in g.layers), 0)
            groups.insert(position, LayerGroup((layer,), calls.get(id(layer), 1)))
    return groups


def find_blocks(model: nn.Module, layers: Sequence[Layer], names: str | None = None) -> list[Block]:
    """Return the blocks of a model that hold `layers`.

    These are the members of its outermost lists of equal modules, or the modules that match one of the globs in `names`
    (separated by |). A layer with owners in several blocks or in none belongs to no block. Raises ModelError if there
    is no block.
    """
    if names is not None:
        return _named_blocks(model, layers, names)
    blocks: list[Block] = []
    for name, module in outermost_lists(model, equal_modules).items():
        for path, member in _called_members(module, name):
            inside = [l for l in layers if all(o.startswith(f"{path}.") for o, _, _ in l.owners)]
            if inside:
                blocks.append(Block(path, member, tuple(inside)))
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no list of equal blocks to reconstruct: leave reconstruct out")
    return blocks


def _called_members(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in a list that are called, with their names: of a list in it, its own members."""
    for key, member in module.named_children():
        path = f"{name}.{key}" if name else key
        if type(member).forward is nn.Module.forward and "forward" not in vars(member):
            yield from _called_members(member, path)
        else:
            yield path, member


def _named_blocks(model: nn.Module, layers: Sequence[Layer], names: str) -> list[Block]:
    blocks: list[Block] = []
    for name, module in model.named_modules():
        if not any(fnmatchcase(name, pattern.strip()) for pattern in names.split("|")):
            continue
        block_layers = tuple(l for l in layers if all(f"{o}.".startswith(f"{name}.") for o, _, _ in l.owners))
        nested = any(name.startswith(f"{b.name}.") for b in blocks)  # * also matches dots: only the outermost count
        blocks += [Block(name, module, block_layers)] if block_layers and not nested else []
    if not blocks:
        candidates = [n for n, m in model.named_modules() if n and list(m.children())]
        similar = nearest(names, candidates)
        hint = f"; did you mean {similar[0]!r}?" if similar else ""
        raise ModelError(f"blocks {names!r} match no module of {type(model).__name__} with layers to prune{hint}")
    return blocks


def with_block_steps(groups: Sequence[LayerGroup], blocks: Sequence[Block]) -> list[LayerGroup | Block]:
    """Return the groups in order, with each block after the last group that it holds."""
    steps: list[LayerGroup | Block] = list(groups)
    for block in blocks:
        ids = {id(l) for l in block.layers}
        repeated = [l.full_name for s in groups if s.calls > 1 for l in s.layers if id(l) in ids]
        if repeated:
            raise ModelError(
                f"{', '.join(repeated)}: called several times in a pass, so {block.name} cannot be reconstructed: "
                "leave reconstruct out"
            )
        index = max(i for i, s in enumerate(steps) if isinstance(s, LayerGroup) and any(id(l) in ids for l in s.layers))
        steps.insert(index + 1, block)
    return steps


def calibrate_sequentially(
    model: nn.Module,
    data: Iterable[Any],
    steps: Sequence[LayerGroup | Block],
    *,
    dense: bool = False,
    num_done: int = 0,
    assign: bool = False,
    max_suspended_bytes: int | None = None,
    folder: Path | None = None,
) -> Generator[GroupStep | BlockStep, None, None]:
    """Yield a `GroupStep` before each group of layers, and a `BlockStep` at the end of each block.

    dense                also run the dense model, for `Gram.cross` and blocks; twice the time and memory
    num_done             steps that an earlier run has done: their weights are known, their Gram matrices are not
                         computed
    assign               replace weights instead of writing into them
    max_suspended_bytes  limit for suspended activations in memory, by default half of the available memory; the rest
                         goes to a file in `folder` (by default the folder for temporary files)

    A layer that no batch reaches gets the identity as its Gram matrix, and a warning at the end. Raises DataError if no
    layer is reached, ModelError for NaN or inf in a layer's input. Time: one forward pass, and one more for each layer
    that is called several times. Memory: the suspended frames, about three activations per token, and a Gram matrix.
    """
    if max_suspended_bytes is None:
        free = offload.available_bytes()
        max_suspended_bytes = None if free is None else free // 2
    return _SequentialCalibration(model, steps, dense, num_done, assign, max_suspended_bytes, folder).run(data)


class _SequentialCalibration:
    """The state of a calibration; `done` is the last step that all batches have passed."""

    def __init__(
        self,
        model: nn.Module,
        steps: Sequence[LayerGroup | Block],
        dense: bool,
        num_done: int,
        assign: bool,
        max_suspended_bytes: int | None,
        folder: Path | None,
    ):
        self.model, self.steps, self.dense, self.done = model, steps, dense, -1
        self.num_done, self.assign = num_done, assign
        self.max_suspended_bytes, self.folder = max_suspended_bytes, folder
        self.suspended_bytes = 0  # bytes of suspended activations in memory
        self.resident_peak = 0  # resident bytes after the heap was last trimmed, at most
        self.index_of = {id(s.layers[0]): i for i, s in enumerate(steps) if isinstance(s, LayerGroup)}
        self.grams: dict[int, Gram] = {}
        self.block_calls: dict[int, list[tuple[tuple, dict[str, Any], Tensor]]] = {}
        self.called, self.unreached = set[int](), list[str]()  # steps of which a layer was called; layers that were not
        self.rerun = False  # whether the block of this step has new weights
        self.dense_values: dict[tuple[int, int], Any] = {}  # (batch, step) -> input or output in the dense model
        self.calls: dict[tuple[Any, int], int] = {}
        self.attributes: list[Attribute] | None = None  # that a forward sets; each pass has its own values
        self.streams: tuple[dict[Any, int], ...] = ({}, {})  # dense and compressed: coroutine -> step

    def run(self, data: Iterable[Any]) -> Generator[GroupStep | BlockStep, None, None]:
        groups = [s for s in self.steps if isinstance(s, LayerGroup)]
        with (
            evaluating(self.model),
            without_mha_fastpath(),
            torch.no_grad(),
            ExitStack() as self.stack,
            weight_hooks(self.model, [g.layers[0] for g in groups], self.before_layer),
        ):
            for i, block in enumerate(self.steps):
                if isinstance(block, Block):
                    hook = block.module.register_forward_hook(partial(self.after_block, i), with_kwargs=True)
                    self.stack.callback(hook.remove)
                    hook = block.module.register_forward_pre_hook(partial(self.before_block, i), with_kwargs=True)
                    self.stack.callback(hook.remove)
            self.note_owned()
            # a model that draws numbers draws others for each batch, but the same in both streams and in other passes
            numbers = torch.Generator().set_state(torch.get_rng_state())
            for index, batch in distributed.local_batches(data):
                batch = on_device(self.model, batch)
                if self.attributes is None:
                    probe = partial(call, self.model, first_samples(batch))
                    self.attributes = attributes_set_by(self.model, probe)
                torch.rand((), generator=numbers, dtype=torch.float32)
                for side in (0, 1) if self.dense else (1,):
                    self.start(index, batch, side, numbers.get_state())
            replaced = set() if self.assign else {id(l.original) for g in groups for l in g.layers}
            if not distributed.all_reduce_number(len(self.streams[1])):
                raise DataError(UNREACHABLE)
            tensors = [p.data for p in self.model.parameters() if id(p) not in replaced]  # mainly embeddings
            offload.page_out(offload.file_backed(tensors))
            for index, _step in enumerate(self.steps):
                self.note_owned()
                step = self.step_at(index)
                yield step
                self.done = index
                is_last = index == len(self.steps) - 1  # nothing after it is needed, unless a layer is called again
                repeated = isinstance(step, GroupStep) and step.group.calls > 1
                for run in [] if is_last else self.waiting_at(0, index):
                    self.dense_values.pop((run.batch, index), None)
                    self.advance(run)
                if isinstance(step, GroupStep):
                    _install_weights(step.group, step.weights, self.assign)
                restart = isinstance(step, GroupStep) and repeated and bool(step.weights) and not is_last
                if restart:  # inputs of later steps came from the old weights
                    self.grams, self.block_calls = {}, {}
                self.rerun = isinstance(step, BlockStep) and step.changed
                going_on = list(self.streams[1]) if restart else self.waiting_at(1, index)
                for run in [] if is_last and not repeated else going_on:
                    if restart:  # earlier calls used the old weights
                        run.throw()
                        del self.streams[1][run]
                        self.start(run.batch, run.data, 1, run.first_numbers)
                    else:
                        self.advance(run)
                if isinstance(step, GroupStep) and self.assign:  # not needed before they are saved
                    offload.page_out(offload.file_backed(step.weights.values()))
                del _step, step
        if self.unreached:
            warnings.warn(f"{UNREACHED}: {', '.join(self.unreached)}", stacklevel=3)

    def start(self, index: int, batch: Any, stream: int, numbers: Tensor) -> None:
        """Begin a pass; `numbers` is the state of torch's random numbers."""
        run: Any = greenlet(lambda batch: _discard_output(call(self.model, batch)))
        run.owner, run.batch, run.stream, run.data = self, index, stream, batch
        run.first_numbers, run.state = numbers, replace(torch_state(), random=numbers)
        run.input_versions, run.rerun = {}, False
        run.attention_mask, run.attributes = padding_mask(batch), values_of(self.attributes or ())
        self.stack.callback(run.throw)
        self.advance(run, batch)

    def advance(self, run: Any, *batch: Any) -> None:
        self.streams[run.stream].pop(run, None)
        self.suspended_bytes -= run.__dict__.pop("suspended_bytes", 0)
        outer_state = torch_state()
        set_torch_state(run.state)  # the pass may be inside a context such as autocast
        set_values(self.attributes or (), run.attributes)
        try:
            index = run.switch(*batch)
        finally:
            run.state, run.attributes = torch_state(), values_of(self.attributes or ())
            set_torch_state(outer_state)
        if not run.dead:
            self.streams[run.stream][run] = index
            self.limit_memory(run)
        if offload.resident_bytes()[0] > self.resident_peak + HEAP_SLACK:  # more than between passes before: holes
            self.trim()

    def trim(self) -> None:
        """Return the holes in the heap to the system."""
        offload.trim_heap()
        self.resident_peak = max(self.resident_peak, offload.resident_bytes()[0])

    def note_owned(self) -> None:
        """Record the storages that belong to the model; new weights may have replaced old ones."""
        self.owned = offload.storage_pointers([*self.model.parameters(), *self.model.buffers()])

    def limit_memory(self, run: Any) -> None:
        """Count what a suspended pass holds; move it to a file if it exceeds the limit."""
        if self.max_suspended_bytes is None:
            return
        values = [x for (index, _), x in self.dense_values.items() if index == run.batch] if run.stream == 0 else []
        tensors = {id(t): t for t in [*offload.tensors_in_frames(run.gr_frame), *tensors_in(values)]}.values()
        groups = offload.movable(tensors, self.owned | offload.storage_pointers(tensors_in(run.data)))
        size = offload.nbytes(groups)
        if self.suspended_bytes + size > self.max_suspended_bytes:
            unchanged = [
                (versions, i)
                for versions in run.input_versions.values()
                for i, (t, v) in enumerate(versions)
                if t._version == v
            ]
            offload.to_file(groups, self.folder)
            for versions, i in unchanged:  # moving them increased their version
                versions[i] = (versions[i][0], versions[i][0]._version)
        else:
            run.suspended_bytes = size
            self.suspended_bytes += size

    def waiting_at(self, stream: int, index: int) -> list[Any]:
        return [run for run, position in self.streams[stream].items() if position == index]

    def step_at(self, index: int) -> GroupStep | BlockStep:
        self.trim()  # memory peaks during a step
        step = self.steps[index]
        if isinstance(step, Block):
            return BlockStep(step, self.block_calls.pop(index, []))
        if index < self.num_done:
            if not distributed.all_reduce_number(float(index in self.called)):
                self.unreached += [l.full_name for l in step.layers]
            return GroupStep(step, Gram())
        gram = self.grams.pop(index, None)
        if distributed.num_data_shards() > 1:
            gram = all_reduce_gram(gram, step.layers[0], self.dense)
        if gram is None:
            self.unreached += [l.full_name for l in step.layers]
            return GroupStep(step, identity_gram(step.layers[0]))
        return GroupStep(step, gram.finalize())

    def before_layer(self, layer: Layer, module: nn.Module, x: Any) -> None:
        """Add the inputs of a layer before it is called, and suspend the pass at its last call."""
        run: Any = getcurrent()
        index = self.index_of[id(layer)]
        if getattr(run, "owner", None) is not self or run.rerun:  # another caller
            return
        group = self.steps[index]
        assert isinstance(group, LayerGroup)
        self.calls[run, index] = self.calls.get((run, index), 0) + 1
        self.called.add(index)
        if self.calls[run, index] > group.calls:
            raise ModelError(
                f"{layer.full_name} is called more often on calibration batch {run.batch} than on the first "
                f"({group.calls} times): put the batch with the most calls first, or ignore the layer"
            )
        if index <= self.done:
            return
        if index >= self.num_done:
            self.add_inputs(run, index, layer, module, x)
        if self.calls[run, index] == group.calls:
            del x
            run.parent.switch(index)

    def add_inputs(self, run: Any, index: int, layer: Layer, module: nn.Module, x: Any) -> None:
        """Add a layer's inputs to its Gram matrix, or keep those of the dense model for it."""
        group = self.steps[index]
        assert isinstance(group, LayerGroup)
        if run.stream == 0:
            if group.has_dense_inputs:
                self.dense_values[run.batch, index] = x  # the pass waits before the layer, so that nothing changes it
        else:
            rows = input_columns(layer, module, x, run.attention_mask)
            gram, dense = self.grams.setdefault(index, Gram()), self.dense_values.get((run.batch, index))
            dense = None if dense is None else input_columns(layer, module, dense, run.attention_mask)
            dense = dense if dense is not None and are_same_tokens(rows, dense) else None
            first = not gram.tokens
            gram.add(rows, dense)
            if dense is not None and run.batch == 0:
                gram.held_out = gram.copy() if first else Gram()
                if not first:  # batches that skipped a layer came first
                    gram.held_out.add(rows, dense)
            if not torch.isfinite(gram.diagonal).all():
                raise ModelError(f"{layer.full_name}: NaN or inf in its inputs on calibration batch {run.batch}")

    def before_block(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Record the versions of a block's inputs, on which it may be run again."""
        run: Any = getcurrent()
        if index > self.done and getattr(run, "owner", None) is self:
            run.input_versions[index] = [(t, t._version) for t in tensors_in([*args, kwargs])]

    def after_block(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        """Record the call of a block after it, and run the block again if its weights have changed meanwhile."""
        run: Any = getcurrent()
        if index <= self.done or getattr(run, "owner", None) is not self:
            return None
        step = self.steps[index]
        assert isinstance(step, Block)
        if any(t._version != version for t, version in run.input_versions.pop(index, ())):
            raise ModelError(f"{step.name} changes its input in place and cannot be run again: leave reconstruct out")
        if run.stream == 0:
            self.dense_values[run.batch, index] = first_tensor(out).clone()  # what follows may change it in place
            return None
        dense_out = self.dense_values.pop((run.batch, index), None)
        self.block_calls.setdefault(index, []).append(
            (args, kwargs, first_tensor(out) if dense_out is None else dense_out)
        )
        run.parent.switch(index)
        if not self.rerun:
            return None
        run.rerun = True
        try:
            return module.forward(*args, **kwargs)
        finally:
            run.rerun = False


def _discard_output(_: Any) -> None:
    return None


def _install_weights(group: LayerGroup, weights: dict[str, Tensor], assign: bool) -> None:
    for layer in group.layers:
        if layer.full_name in weights:
            if assign:
                offload.page_out(offload.file_backed([layer.original.data]))
                layer.original.data = weights[layer.full_name]
            else:
                layer.original.data.copy_(weights[layer.full_name])
