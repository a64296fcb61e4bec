"""One graph of Dynamo: compile it at its first call, and run it on the engine or in eager torch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.common.errors import DataError, ModelError, RarefyError, first_line
from rarefy.compiler import tuning
from rarefy.compiler.compile import compile
from rarefy.compiler.executor import Compiled
from rarefy.compiler.tolerance import TOLERANCE, tolerance
from rarefy.integrations.dynamo.graph import GraphInputs, freeze
from rarefy.integrations.dynamo.outputs import Repair, clones, repairs
from rarefy.integrations.dynamo.weights import WeightGuard, find_sampled, find_unsafe
from rarefy.model.compare import relative_distance

MAX_WEIGHT_SETS = 64  # modules of the same code, such as equal blocks, that each have an engine
MAX_REBUILDS = 4  # of one engine after its weights have changed
MAX_CHANGES = 32  # of weights that never stay, after which they are no longer watched
CALLS_BEFORE_REBUILD = 16  # with the same weights
MAX_FAILURES = 3  # on inputs such as those with NaN, after which a graph is not compiled
MAX_SECONDS = 1.0  # of timing a graph against eager torch
CLEARLY_FASTER = 0.97  # time over eager's, up to which the engine runs a graph
MAX_SIZES = 64  # groups of similar sizes that are timed
HALF = (torch.bfloat16, torch.float16)

_building = Lock()  # torch.export is for one thread at a time


@dataclass
class Engine:
    """A graph compiled with the weights of one call.

    Attributes:
        compiled: the compiled graph; it takes the tensors that are no weights.
        guard: the state of the weights.
        repairs: what happens to outputs so that they are as eager torch's, by position.
        rebuilds: how many times these weights have been compiled again.
        faster: whether the engine is faster, by sizes of inputs.
    """

    compiled: Compiled
    guard: WeightGuard
    repairs: dict[int, Repair]
    rebuilds: int = 0
    faster: dict[Any, bool] = field(default_factory=dict)

    def run(self, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Return the outputs; DataError where the engine does not take these sizes."""
        outputs = self.compiled.run_leaves(self.compiled.leaves(tensors, {}))
        for i, repair in self.repairs.items():
            outputs[i] = repair(outputs[i])
        return tuple(outputs)


@dataclass
class Changed:
    """Weights that have changed since they were compiled.

    Attributes:
        guard: their state at the last change.
        rebuilds: how many times they have been compiled again.
        calls: how many calls have met them in this state.
        changes: how many times they have changed without being compiled.
    """

    guard: WeightGuard
    rebuilds: int
    calls: int = 0
    changes: int = 0


class Subgraph:
    """A graph of Dynamo that runs on the engine where that is faster.

    Attributes:
        engines: an `Engine` for each set of weights, by their identities; `Changed` where they changed.
        gave_up: why all calls run in eager torch, None if they do not.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: GraphInputs,
        precision: str | None,
        tune: bool,
        report: Callable[[str], None],
    ):
        """Compile nothing yet.

        Args:
            graph: Dynamo's graph.
            inputs: the positions of its inputs.
            precision: as in `rarefy.compile`.
            tune: time the engine against eager torch.
            report: called with a sentence for each decision.
        """
        self.graph, self.eager, self.inputs = graph, graph.forward, inputs
        self.precision, self.report = precision, report
        self.tune = tune and tuning.is_enabled()
        self.engines: dict[tuple[int, ...], Engine | Changed] = {}
        self.gave_up: str | None = None
        self.failures = self.weight_sets = 0

    def run(self, *args: Any) -> Any:
        """Return the graph's outputs for its inputs."""
        if self.gave_up is not None or torch._C._len_torch_dispatch_stack():  # a mode that wants to see operators
            return self.eager(*args)
        outputs = self._on_engine(args)
        return self.eager(*args) if outputs is None else outputs

    def _on_engine(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return the engine's outputs, None where eager torch is to compute them."""
        weights = [args[i] for i in self.inputs.weights]
        key = tuple(map(id, weights))
        engine = self.engines.get(key)
        if not isinstance(engine, Engine) or not engine.guard.is_unchanged(weights):
            engine = self._renew(key, weights, args)
        if engine is None:
            return None
        tensors = tuple([args[i] for i in self.inputs.tensors])
        sizes = _similar_sizes(tensors) if self.inputs.dynamic else None
        faster = engine.faster.get(sizes)
        if faster is None:
            faster = self._measure(engine, sizes, args)
        if not faster:
            return None
        try:
            return engine.run(tensors)
        except RarefyError:  # sizes that the engine does not take, or what eager torch refuses too
            return None

    # ---- compiling --------------------------------------------------------------------------------------------------

    def _renew(self, key: tuple[int, ...], weights: list[Tensor], args: tuple[Any, ...]) -> Engine | None:
        """Return an engine for weights that have none or have changed, None where eager torch is to run."""
        if (key not in self.engines and self.weight_sets >= MAX_WEIGHT_SETS) or not _building.acquire(blocking=False):
            return None
        try:
            current = self.engines.get(key)
            if isinstance(current, Engine) and current.guard.is_unchanged(weights):
                return current  # another thread was faster
            if current is None and any(t.is_inference() for t in weights):
                self._give_up("its weights were made in inference mode, so changes of them cannot be seen")
                return None
            if not self._has_settled(key, current, weights):
                return None
            with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
                return self._try_to_build(key, weights, args)
        finally:
            _building.release()

    def _has_settled(self, key: tuple[int, ...], current: Engine | Changed | None, weights: list[Tensor]) -> bool:
        """Return whether weights are to be compiled: the first ones, others that are met again, and changed ones after
        some calls in which they stayed the same. Tensors that are new in each call are not worth it."""
        if current is None:
            self.weight_sets += 1
            if 1 < self.weight_sets <= MAX_WEIGHT_SETS:
                self.engines[key] = Changed(self._guard(key, weights), -1, CALLS_BEFORE_REBUILD - 1)
            return self.weight_sets == 1
        if current.rebuilds >= MAX_REBUILDS and isinstance(current, Changed):
            return False
        if isinstance(current, Changed) and current.guard.is_unchanged(weights):
            current.calls += 1
            return current.calls >= CALLS_BEFORE_REBUILD
        if isinstance(current, Engine):
            last = current.rebuilds >= MAX_REBUILDS
            after = (
                f"for the {MAX_REBUILDS + 1}th time" if last else f"compiled again after {CALLS_BEFORE_REBUILD} calls"
            )
            self.report(f"eager torch: the weights have changed; {after}")
        changes = current.changes + 1 if isinstance(current, Changed) else 0
        rebuilds = current.rebuilds if changes < MAX_CHANGES else MAX_REBUILDS
        self.engines[key] = Changed(self._guard(key, weights), rebuilds, changes=changes)
        return False

    def _guard(self, key: tuple[int, ...], weights: list[Tensor]) -> WeightGuard:
        this = weakref.ref(self)

        def forget() -> None:
            subgraph = this()
            if subgraph is not None:
                subgraph.engines.pop(key, None)

        return WeightGuard(weights, forget)

    def _give_up(self, reason: str) -> None:
        self.gave_up = reason
        self.engines.clear()
        self.report(f"eager torch: {reason}")

    def _try_to_build(self, key: tuple[int, ...], weights: list[Tensor], args: tuple[Any, ...]) -> Engine | None:
        """Return an engine, None where there cannot be one."""
        sampled = find_sampled(weights)
        guard = self._guard(key, weights)
        read, random_state = clones(args), torch.get_rng_state()
        copies = [read[i] for i in self.inputs.weights]
        versions = [t._version for t in read if isinstance(t, Tensor)]
        try:
            wanted = self.eager(*read)
        except Exception:  # of the model on these inputs: eager torch raises it again
            return None
        try:
            same_weights = all(map(torch.equal, copies, weights))  # torch does not count changes of running means
            if not same_weights or versions != [t._version for t in read if isinstance(t, Tensor)]:
                raise ModelError("it changes its inputs, parameters or buffers")
            if not torch.equal(random_state, torch.get_rng_state()):
                raise ModelError("it draws random numbers")
            engine = self._build(guard, weights, read, wanted)
        except Exception as error:  # ours, or of torch.export: eager torch runs the graph as before
            own = isinstance(error, RarefyError)
            reason = first_line(error) if own else f"{type(error).__name__}: {first_line(error)}"
            self.failures += 1
            if not isinstance(error, DataError) or self.failures >= MAX_FAILURES:
                self._give_up(reason)
            return None
        current = self.engines.get(key)
        engine.rebuilds = 0 if current is None else current.rebuilds + 1
        sampled |= find_unsafe(lambda: self.eager(*read), copies)
        if not guard.watch(weights, copies, sampled):  # another thread has changed them
            self.engines[key] = Changed(self._guard(key, weights), engine.rebuilds)
            return None
        self.engines[key] = engine
        if not self.tune:
            self.report(f"engine: {_summary(engine.compiled)}")
        return engine

    def _build(self, guard: WeightGuard, weights: list[Tensor], read: list[Any], wanted: Sequence[Any]) -> Engine:
        """Return an engine for a call; RarefyError where there is none that returns what eager torch returns.

        Args:
            guard: the state of the weights.
            weights: parameters and buffers.
            read: copies of the call's inputs.
            wanted: what eager torch has returned for them.
        """
        module = freeze(self.graph, self.inputs, weights)
        tensors = [read[i] for i in self.inputs.tensors]
        dynamic = self.inputs.dynamic
        compiled = compile(module, tuple(clones(tensors)), precision=self.precision, tune=self.tune, dynamic=dynamic)
        compiled.skip_padding = False
        engine = Engine(compiled, guard, {})
        copies = [read[i] for i in self.inputs.weights]
        engine.repairs = repairs(lambda values: engine.run(tuple(values)), wanted, tensors, copies)
        compiled.forget()
        return engine

    # ---- timing -----------------------------------------------------------------------------------------------------

    def _measure(self, engine: Engine, sizes: Any, args: tuple[Any, ...]) -> bool:
        """Return whether the engine is faster than eager torch on inputs of these sizes, and remember it."""
        if not self.tune:
            engine.faster[sizes] = True
            return True
        if len(engine.faster) >= MAX_SIZES or not _building.acquire(blocking=False):
            return False
        try:
            with torch.inference_mode(False), torch.no_grad():
                values = [t.clone() if i in self.inputs.tensors else t for i, t in enumerate(args)]
                faster = self._is_faster(engine, sizes, tuple(values))
        except RarefyError:  # sizes that the engine does not take
            faster = False
        finally:
            _building.release()
        engine.faster[sizes] = faster
        return faster

    def _is_faster(self, engine: Engine, sizes: Any, args: tuple[Any, ...]) -> bool:
        allowed = tolerance(engine.compiled.exported, self.precision)
        tensors = tuple(args[i] for i in self.inputs.tensors)
        pairs = [(a, b) for a, b in zip(engine.run(tensors), self.eager(*args)) if isinstance(b, Tensor)]
        if not all(relative_distance(a, b) <= (TOLERANCE["bf16"] if b.dtype in HALF else allowed) for a, b in pairs):
            return False
        engine.faster[sizes] = True
        ours, eager = tuning.alternate(lambda: self._on_engine(args), lambda: self.eager(*args), MAX_SECONDS)
        faster = ours <= CLEARLY_FASTER * eager
        seconds = {"engine": ours, "eager torch": eager} if faster else {"eager torch": eager, "engine": ours}
        (first, shorter), (second, longer) = seconds.items()
        times = f"{1e3 * shorter:.3g} ms, {second} {1e3 * longer:.3g} ms"
        self.report(f"{first}: {times}; {_summary(engine.compiled)}")
        if not faster and not self.inputs.dynamic:
            self.gave_up = "eager torch is faster"
            self.engines.clear()
        return faster


def _similar_sizes(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return a key that tensors of similar sizes share: the power of two of the number of entries of each."""
    return tuple([t.numel().bit_length() for t in tensors])


def _summary(compiled: Compiled) -> str:
    return str(compiled).replace("\n", "; ")
