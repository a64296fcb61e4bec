"""Run a compiled graph: native programs for fused subgraphs, one torch call for each other node."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rarefy.common.errors import DataError, OtherSizesError, RarefyError, first_line
from rarefy.compiler import io_names
from rarefy.compiler.branches import Branches
from rarefy.compiler.export import layer_names
from rarefy.compiler.flat_calls import count_flat_arguments, flat_tensors, rebuilder
from rarefy.compiler.fx_utils import ExportedGraph, Node, is_node
from rarefy.compiler.in_place import overwriting
from rarefy.compiler.input_checks import InputSpec, check_inputs, readable_guards
from rarefy.compiler.kernel_selection import compact
from rarefy.compiler.not_finite import are_finite, has_static_scales, with_not_finite
from rarefy.compiler.operators.table import BY_TARGET
from rarefy.compiler.profile import Profile, Recorder, profile_calls
from rarefy.compiler.scheduling import schedule
from rarefy.compiler.shape_guards import parse
from rarefy.compiler.subgraph import MAX_SHAPES, Check, FusedSubgraph, SingleOp
from rarefy.model import nesting
from rarefy.runtime.native_calls import without_modes
from rarefy.runtime.packed_formats import skips_zeros

Native = FusedSubgraph | SingleOp
VALUE_DEPENDENT = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
SHOWN_GUARDS = 4  # conditions on sizes that `print` shows


class Compiled:
    """A compiled model: a callable with the arguments and outputs of the model that it was made from.

    `print(compiled)` shows how many native calls there are, which operators they run, what runs in torch, and notes.
    `run` takes and returns numpy arrays by name. Calls compute no gradients. Several threads may call it at the same
    time; each has its own working memory.

    Attributes:
        exported: the graph and how arguments and outputs are nested.
        kernels: the packed weights of linear layers, convolutions and embeddings, by their nodes.
        constants: all other tensors that the graph reads, by name.
        input_specs: what each tensor of a call must be, in the graph's order.
        schedule: the calls in the order in which they run.
        skip_padding: True: tokens that `attention_mask` hides are left out where no other token depends on them, so
            that a batch takes the time of its real tokens; outputs are zeros there. False: they are computed.
    """

    skip_padding = True
    branches: Branches | None = None  # for other branches of the model's code, where the model is at hand

    def __init__(
        self,
        exported: ExportedGraph,
        kernels: Mapping[Node, Any],
        input_specs: Sequence[Any],
        check: Check | None = None,
    ):
        """Schedule the graph.

        Args:
            exported: the graph.
            kernels: the kernels of nodes with packed weights.
            input_specs: an `InputSpec` for each tensor argument, the argument itself for any other.
            check: called before operators run on new shapes; graphs from files need it.
        """
        self.exported, self.constants, self.kernels = exported, exported.constants, kernels
        self.input_specs = list(input_specs)
        self.check = check
        for n in (n for n in exported.graph.nodes if n.op == "placeholder" and n.name in self.constants):
            if all(u in kernels and n is u.args[1] and u.args.count(n) == 1 for u in n.users):  # packed, or unread
                self.constants.pop(n.name)
        for n in exported.graph.nodes:
            n.meta.clear()  # export's records hold weights
        if check is None:  # made from a model, whose own tensors may change
            self.constants.update({n: t.clone() for n, t in self.constants.items()})
        spec: Any = exported.in_spec
        self.keywords = dict.fromkeys(nesting.children_of(spec)[1].context)  # in the graph's order
        all_tensors = all(isinstance(want, InputSpec) for want in self.input_specs)
        self.flat_arguments = count_flat_arguments(spec) if all_tensors else None
        self.rebuild = rebuilder(exported.out_spec)
        self.reschedule()

    def move_to_torch(self, nodes: Collection[Node], weights: Mapping[str, Tensor]) -> None:
        """Let torch run operators that native calls have run so far, and free their packed weights.

        Args:
            nodes: operators of the graph.
            weights: the dense weights of those with kernels, by the names of their placeholders.
        """
        names = {n.args[1].name for n in nodes if n in self.kernels}
        self.constants.update({n: weights[n].clone() for n in names if n not in self.constants})
        self.exported.torch_nodes.update(nodes)
        self.kernels = compact({n: k for n, k in self.kernels.items() if n not in nodes})
        self.reschedule()

    def with_kernels(self, kernels: Mapping[Node, Any], exported: ExportedGraph | None = None) -> Compiled:
        """Return a compiled model of the same constants, and the same graph or another one, that runs other kernels."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.exported, other.kernels = exported or self.exported, dict(kernels)
        other.reschedule()
        return other

    def reschedule(self) -> None:
        """Schedule the calls, again after the graph or the kernels have changed."""
        self.guards = [parse(text) for text in self.exported.guards]
        self.schedule = schedule(self.exported, self.kernels, self.check)
        self.has_static_scales = has_static_scales(self.exported, self.kernels)
        self.fixed_nodes = _size_only_nodes(self.exported)
        self.fixed: dict[tuple[Any, ...], dict[Node, Any]] = {}  # their values for the last shapes
        self.checked: dict[tuple[Any, ...], None] = {}  # sizes and types of calls that were checked
        self.output = next(n for n in self.exported.graph.nodes if n.op == "output").args[0]
        fresh = {n for call in self.schedule if isinstance(call, Native) for n in call.outputs}
        self.from_torch = [i for i, n in enumerate(self.output) if is_node(n) and n not in fresh]
        self.constant_memory = frozenset(map(_memory, self.constants.values()))
        first, alone = self.schedule[0] if self.schedule else None, len(self.schedule) == 1
        whole = isinstance(first, FusedSubgraph) and list(self.output) == first.outputs
        self.only_call = first if alone and whole else None  # the native call that is all of the model
        self.last_uses = self._last_uses()
        self.in_place = overwriting(self.schedule, self.last_uses)

    def add_guards(self, texts: Iterable[str]) -> None:
        """Add conditions on open sizes; see `shape_guards.py`."""
        self.exported.guards = tuple(dict.fromkeys([*self.exported.guards, *texts]))
        self.guards, self.checked = [parse(text) for text in self.exported.guards], {}

    def named_specs(self) -> list[tuple[str, Any]]:
        """Return each input's name and what it must be."""
        return list(zip(self._leaf_names(), self.input_specs))

    def _last_uses(self) -> list[list[Node]]:
        """Return for each call the values that no later call reads."""
        live = {*self.fixed_nodes, *self.exported.inputs}
        fx.map_arg(self.output, live.add)
        last_uses: list[list[Node]] = []
        for call in reversed(self.schedule):
            read = call.inputs if isinstance(call, FusedSubgraph) else _inputs(call)
            written = call.outputs if isinstance(call, Native) else [call]
            ended = dict.fromkeys(n for n in [*read, *written] if n not in live)
            live |= ended.keys()
            last_uses.append(list(ended))
        return last_uses[::-1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns.

        Raises:
            DataError: if the arguments are not nested like the example, or have other types or sizes.
            OtherSizesError: if the model may take another branch at these sizes, and cannot be compiled again for it.
        """
        try:
            leaves = self.leaves(args, kwargs)
        except OtherSizesError as error:
            return self._other_branch(self._flat(args, kwargs), error)(*args, **kwargs)
        return self.rebuild(self.run_leaves(leaves))

    def _other_branch(self, leaves: Sequence[Any], error: OtherSizesError) -> Compiled:
        """Return the model compiled for a branch that takes other sizes; the error where the model is not at hand."""
        if self.branches is None:
            raise error
        return self.branches.find(pytree.tree_unflatten(leaves, self.exported.in_spec), error)

    def eval(self) -> Compiled:
        """Return the model: it is always in evaluation mode. There is no `train()`, because it cannot be trained."""
        return self

    @property
    def input_names(self) -> list[str]:
        """The names of the arrays that `run` takes: those of the ONNX file, or of keywords and parameters."""
        return [n for n, want in zip(self._leaf_names(), self.input_specs) if isinstance(want, InputSpec)]

    @property
    def output_names(self) -> list[str]:
        """The names of the arrays that `run` returns: those of the ONNX file, of the output's fields, or output_0."""
        return [n for n, value in zip(self._output_leaf_names(), self.output) if value is not None]

    def _leaf_names(self) -> list[str]:
        """Return a name for each leaf of the arguments."""
        return list(self.exported.input_names) or [n.name for n in self.exported.inputs]

    def _output_leaf_names(self) -> list[str]:
        """Return a name for each leaf of the outputs."""
        return list(self.exported.output_names) or nesting.output_names(None, self.exported.out_spec)

    @overload
    def run(self, output_names: Mapping[str, Any], /) -> dict[str, np.ndarray]: ...

    @overload
    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: None = None
    ) -> list[np.ndarray]: ...

    def run(self, output_names: Any, input_feed: Any = None, run_options: Any = None) -> Any:
        """Return numpy arrays for numpy arrays by name.

        `run({"x": array})` returns a dict of all outputs. `run(["y"], {"x": array})` returns a list of those that are
        named, and `run(None, {"x": array})` of all, as `InferenceSession.run` of ONNX Runtime does.

        Args:
            output_names: the inputs by name, or with a second argument the names of outputs, None for all.
            input_feed: the inputs by name: an array for each of `input_names`.
            run_options: None; options of ONNX Runtime have no counterpart.

        Returns:
            The arrays; outputs in bfloat16 as float32. They are the caller's own.

        Raises:
            DataError: for unknown or missing names, arrays of other types or sizes, and run_options.

        Example:
            >>> from torch import nn
            >>> from rarefy.compiler.compile import compile
            >>> fast = compile(nn.Linear(4, 2).eval(), torch.randn(2, 4))
            >>> fast.input_names, fast.output_names
            (['input'], ['output_0'])
            >>> fast.run({"input": np.ones((3, 4), np.float32)})["output_0"].shape
            (3, 2)
        """
        if run_options is not None:
            raise DataError(f"run_options: expected None, got {type(run_options).__name__}: they are ONNX Runtime's")
        by_name = input_feed is None
        wanted = io_names.check_output_names(None if by_name else output_names, self.output_names)
        leaves = self._leaves_by_name(output_names if by_name else input_feed)
        try:
            self._check_sizes(leaves)
        except OtherSizesError as error:
            return self._other_branch(leaves, error).run(output_names, input_feed)
        values = dict(zip(self._output_leaf_names(), self.run_leaves(leaves)))
        arrays = {n: io_names.to_array(values[n]) for n in wanted}
        return arrays if by_name else [arrays[n] for n in wanted]

    def _leaves_by_name(self, feed: Any) -> list[Any]:
        """Return the leaves of a call for numpy arrays by name, their sizes not checked."""
        arrays = iter(io_names.ordered_inputs(feed, self.input_names))
        leaves: list[Any] = []
        for name, want in zip(self._leaf_names(), self.input_specs):
            is_tensor = isinstance(want, InputSpec)
            leaves.append(io_names.to_tensor(name, next(arrays), want.dtype, str(want)) if is_tensor else want)
        return leaves

    @without_modes
    def run_leaves(self, leaves: list[Any], cache: Any = None, recorder: Recorder | None = None) -> list[Any]:
        """Return the output tensors for input tensors in the graph's order.

        A decoder also passes its `Cache`, a profiler what records the time of each call.
        """
        out = self._run_schedule(leaves, cache, recorder)
        if self.has_static_scales and self.kernels and not are_finite(leaves):
            return with_not_finite(self, leaves, out)
        return out

    def _run_schedule(self, leaves: list[Any], cache: Any, recorder: Recorder | None) -> list[Any]:
        values: dict[Node, Any] = dict(zip(self.exported.inputs, leaves))

        def lookup(node: Node) -> Any:
            if node in values:
                return values[node]
            return cache if node.name == "cache" else self.constants[node.name]

        if self.only_call is not None:
            run_call(self.only_call, values, lookup, recorder, self.skip_padding)
            return [values[n] for n in self.output]
        shapes = tuple(t.shape if isinstance(t, Tensor) else t for t in leaves)
        fixed = self.fixed.get(shapes)
        values.update(fixed or {})
        with torch.no_grad():
            for _ in self.walk(values, lookup, recorder):
                pass
            out = [lookup(n) if is_node(n) else n for n in self.output]
            self._own_outputs(out, (*leaves, *(values[n] for n in self.fixed_nodes)) if self.from_torch else ())
        if fixed is None:
            all_fixed = {**self.fixed, shapes: {n: values[n] for n in self.fixed_nodes}}
            self.fixed = dict(list(all_fixed.items())[-MAX_SHAPES:])
        return out

    def _own_outputs(self, out: list[Any], others: Sequence[Any]) -> None:
        """Copy outputs in the memory of constants, inputs or values that calls share: callers may write to outputs."""
        memory = {_memory(t) for t in others if isinstance(t, Tensor)}
        for i in self.from_torch:
            t = out[i]
            if isinstance(t, Tensor) and t.numel() and (_memory(t) in memory or _memory(t) in self.constant_memory):
                out[i] = t.clone()

    def walk(
        self, values: dict[Node, Any], lookup: Callable[[Node], Any], recorder: Recorder | None = None
    ) -> Iterator[Any]:
        """Run all calls in order, and yield each one before it runs, when `lookup` has its inputs.

        Outputs are added to `values`; what no later call reads is removed.
        """
        for call, ended in zip(self.schedule, self.last_uses):
            yield call
            function = self.in_place.get(call) if is_node(call) else None
            run_call(call, values, lookup, recorder, self.skip_padding, function)
            for n in ended:
                values.pop(n, None)

    def profile(self, *args: Any, repeats: int = 20, warmup: int = 3, **kwargs: Any) -> Profile:
        """Return where the time of a call goes: each operator and layer, and what limits it.

        Each step of native programs is timed by the native code itself, each call of torch from outside. Calls without
        a profiler take as long as before.

        Args:
            *args: as for a call.
            repeats: number of timed calls; times are means over the calls in the middle half by their whole time.
            warmup: number of calls before those.
            **kwargs: as for a call.

        Returns:
            A `Profile`, whose rows add up to the time of a call. `print` it.

        Raises:
            DataError: as a call does, or if repeats or warmup are too small.

        Cost: repeats + warmup + 1 calls, and for the first profile in a process 0.6 seconds for the machine's ceilings.

        Example:
            >>> import rarefy
            >>> from torch import nn
            >>> fast = rarefy.compile(nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval(), torch.randn(8, 64))
            >>> profile = fast.profile(torch.randn(8, 64), repeats=5)
            >>> [row.layer for row in profile.rows if row.operator == "linear"]
            ['0']
        """

        def call(recorder: Recorder) -> None:
            out = self.run_leaves(self.leaves(args, kwargs), recorder=recorder)
            pytree.tree_unflatten(out, self.exported.out_spec)

        return self.profile_calls(call, repeats, warmup)

    def profile_calls(self, call: Callable[[Recorder], Any], repeats: int, warmup: int) -> Profile:
        """Return the profile of calls that pass a recorder to `run_leaves`; see `profile`."""
        layers = self.exported.layers or layer_names(self.exported)
        return profile_calls(call, layers, self.weight_bytes(), repeats, warmup)

    def weight_bytes(self) -> int:
        """Return the bytes of all weights and constants in memory; what is shared counts once."""
        tensors = [t for k in self.kernels.values() for t in k.tensors()] + list(self.constants.values())
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    def forget(self) -> None:
        """Free the working memory for the shapes of earlier calls; the next call of each shape is checked, and
        allocates it, again."""
        for s in (i for i in self.schedule if isinstance(i, FusedSubgraph)):
            with s.lock:
                s.programs.clear()
                s.fixed.clear()
        self.fixed, self.checked = {}, {}

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return a call's tensors in the graph's order; DataError unless they are as the graph expects."""
        flat = flat_tensors(args, kwargs, self.keywords) if len(args) == self.flat_arguments else None
        key = () if flat is None else tuple((t.shape, t.dtype, t.is_cpu) for t in flat)
        if flat is not None and key in self.checked:
            return flat
        leaves = self._check_leaves(args, kwargs)
        if flat is not None:
            self.checked = dict.fromkeys([*self.checked, key][-MAX_SHAPES:])
        return leaves

    def _check_leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        leaves = self._flat(args, kwargs)
        self._check_sizes(leaves)
        return leaves

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return a call's tensors in the graph's order; DataError unless they are nested as the graph expects."""
        spec, names = self.exported.in_spec, self.keywords
        args, kwargs = io_names.by_position(args, kwargs, spec, self._leaf_names())
        absent = [n for n in names if n not in kwargs]
        if len(args) == len(absent) == 1 and not nesting.children_of(nesting.children_of(spec)[0]):
            args, kwargs = (), {**kwargs, absent[0]: args[0]}  # the only input that it can be
        if kwargs.keys() != names.keys():
            known = [*io_names.positional_names(spec, self._leaf_names())[len(args) :], *names]
            extra, missing = [n for n in kwargs if n not in known], [n for n in known if n not in kwargs]
            hints = [f"leave out {', '.join(extra)}, or compile with an example that has it"] if extra else []
            hints += [f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"] if missing else []
            if args and missing:
                hints += [f"pass inputs by name, as in the example: {', '.join(f'{n}=...' for n in names)}, or **batch"]
            got = f"compiled for the keywords {', '.join(known) or 'none'}, got {', '.join(kwargs) or 'none'}"
            raise DataError(f"{got}: {'; '.join(hints)}")
        leaves, got = pytree.tree_flatten((args, {n: kwargs[n] for n in names}))
        if got != spec:
            raise DataError(self._other_structure(leaves, got))
        return leaves

    def _check_sizes(self, leaves: Sequence[Any]) -> None:
        check_inputs(zip(self._leaf_names(), self.input_specs, leaves), self.exported.ranges, self.guards)

    def _other_structure(self, leaves: list[Any], got: Any) -> str:
        """Return the message for a call whose arguments are nested differently from the example's."""
        names = [n.name for n in self.exported.inputs]
        if len(leaves) != len(names):
            inputs = ", ".join(f"{name}: {want}" for name, want in zip(names, self.input_specs))
            return f"expected {len(names)} {'input' if len(names) == 1 else 'inputs'} ({inputs}), got {len(leaves)}"
        nestings = (pytree.tree_unflatten(range(len(leaves)), spec)[0] for spec in (self.exported.in_spec, got))
        expected, actual = (re.sub(r"\d+", "*", str(args)) for args in nestings)
        return f"expected arguments nested as {expected}, as in the example, got {actual}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies and pickles: packed weights belong to the kernels of this process."""
        raise TypeError(
            "a compiled model can be neither copied nor pickled: rarefy.save(compiled, folder) keeps it, and "
            "rarefy.load(folder) reads it"
        )

    def counts(self) -> tuple[int, Counter[str], Counter[str]]:
        """Return the number of native calls, of each operator that they run, and of each operator that torch runs."""
        native = [i for i in self.schedule if isinstance(i, Native)]
        rest = (i for i in self.schedule if not isinstance(i, Native) and i not in self.fixed_nodes)
        return len(native), Counter(n.target.__name__ for s in native for n in s.nodes), Counter(map(_op_name, rest))

    def __repr__(self) -> str:
        calls, native, torch_calls = self.counts()
        calls_text = "1 native call" if calls == 1 else f"{calls} native calls"
        lines = [f"{calls_text}: {', '.join(f'{n} {op}' for op, n in native.most_common()) or 'none'}"]
        moved = Counter(_op_name(n) for n in self.exported.graph.nodes if n in self.exported.torch_nodes)
        for label, count in (("in torch", torch_calls - moved), ("in torch, where it was faster", moved)):
            if count:
                lines.append(f"{label}: {', '.join(f'{n} {op}' for op, n in count.most_common())}")
        sparse = Counter(_op_name(n) for n, k in self.kernels.items() if skips_zeros(k.held[0]))
        if sparse:
            lines.append(f"zeros skipped: {', '.join(f'{n} {op}' for op, n in sparse.most_common())}")
        guards = readable_guards(self.exported.guards, self.named_specs())
        if guards:
            more = f", and {len(guards) - SHOWN_GUARDS} more" if len(guards) > SHOWN_GUARDS else ""
            lines.append(f"only for sizes with {', '.join(guards[:SHOWN_GUARDS])}{more}")
        if self.branches is not None and self.branches.compiled:
            lines.append(str(self.branches))
        return "\n".join([*lines, *self.exported.notes])


def run_call(
    call: Any,
    values: dict[Node, Any],
    lookup: Callable[[Node], Any],
    recorder: Recorder | None = None,
    skip_padding: bool = True,
    function: Callable[..., Any] | None = None,
) -> None:
    """Run one call of the schedule and add its outputs to the values. `function`: what torch runs instead of it."""
    try:
        if isinstance(call, FusedSubgraph):
            values.update(zip(call.outputs, call.run(lookup, recorder, skip_padding)))
        elif isinstance(call, SingleOp):
            out = call.run(lookup) if recorder is None else recorder.run_single(call, lookup)
            values.update(zip(call.outputs, out))
        elif call not in values:
            args, kwargs = fx.map_arg((call.args, call.kwargs), lookup)
            run = function or call.target
            values[call] = run(*args, **kwargs) if recorder is None else recorder.run_torch(call, run, args, kwargs)
    except RarefyError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AssertionError) as error:  # raised by torch
        name = _op_name(call.nodes[0] if isinstance(call, Native) else call)
        raise DataError(f"{name} failed on these inputs: {first_line(error)}") from error


def _memory(t: Tensor) -> int:
    """Return the address of a tensor's memory, which views of it share."""
    return t.untyped_storage().data_ptr()


def _inputs(call: Any) -> list[Node]:
    """Return the values that a call reads."""
    nodes = call.nodes if isinstance(call, Native) else [call]
    return [a for n in nodes for a in n.all_input_nodes]


def _op_name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).removesuffix(".default")


def _size_only_nodes(exported: ExportedGraph) -> list[Node]:
    """Return the nodes whose values follow from sizes of inputs and constants alone, so that calls of one shape
    share them."""
    nodes: dict[Node, None] = {}
    other_sizes: set[Node] = set()  # nodes whose sizes depend on values
    for n in exported.graph.nodes:
        tags = n.target.tags if isinstance(n.target, torch._ops.OpOverload) else ()
        if any(t in tags for t in VALUE_DEPENDENT) or not other_sizes.isdisjoint(n.all_input_nodes):
            other_sizes.add(n)
            continue
        spec = BY_TARGET.get(n.target)
        if n.op != "call_function" or (spec is not None and spec.lower is not None):
            continue
        fixed_inputs = all(a in nodes or a.name in exported.constants for a in n.all_input_nodes)
        if n.target is torch.ops.aten.sym_size.int or (fixed_inputs and torch.Tag.nondeterministic_seeded not in tags):
            nodes[n] = None
    return list(nodes)
