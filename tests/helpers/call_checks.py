"""Check that a compiled model answers as eager does, or refuses by name, at sizes that its example did not have."""

from __future__ import annotations

import copy
import random
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rarefy
from helpers.generated_models import Description, Sizes, build, describe, example_sizes, make_inputs, other_sizes
from rarefy.common.errors import DataError, ModelError, OtherSizesError, OutputsDifferError
from rarefy.model.compare import relative_distance

CALLS = 20
TOLERANCE = {None: 1e-3, "bf16": 0.1, "int8": 0.25}
ROUNDING = {None: 2e-5, "bf16": 1e-2, "int8": 3e-2}  # relative changes of values, as a precision's rounding may make


@dataclass(frozen=True)
class Options:
    """How the model of a seed is compiled."""

    precision: str | None = None
    tune: bool = False
    saved: bool = False
    skip_padding: bool = False


@dataclass(frozen=True)
class Failure:
    """What a compiled model did that it must not do."""

    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.where}: {self.detail}"


class _Failed(Exception):
    pass


def options_of(seed: int) -> Options:
    """Return the options of a seed: most models are compiled by default options, without timing."""
    rng = random.Random(f"options {seed}")
    precision = rng.choices([None, "int8", "bf16"], [17, 2, 1])[0]
    return Options(precision, rng.random() < 0.05, rng.random() < 0.15, rng.random() < 0.5)


def check_seed(seed: int, counts: Counter[str] | None = None, calls: int = CALLS) -> Failure | None:
    """Compile the model of a seed and call it at other sizes.

    Args:
        seed: of the model, its inputs and options.
        counts: how many calls agreed, were refused, and failed in eager too; added to.
        calls: number of sizes.

    Returns:
        The first thing that is wrong, None where nothing is.
    """
    return check_description(describe(seed), options_of(seed), example_sizes(seed), other_sizes(seed, calls), counts)


def check_description(
    description: Description, options: Options, example: Sizes, calls: list[Sizes], counts: Counter[str] | None = None
) -> Failure | None:
    """Compile a model at one size, and call it at others; see `check_seed`."""
    counts = Counter() if counts is None else counts
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        check = _Check(description, options, counts)
        try:
            if check.compile([example, *calls]):
                for i, sizes in enumerate(calls):
                    check.call(sizes, i)
                check.weights()
        except _Failed:
            pass
    return check.failure


class _Check:
    def __init__(self, description: Description, options: Options, counts: Counter[str]):
        self.description, self.options, self.counts = description, options, counts
        self.model = build(description)
        self.eager = copy.deepcopy(self.model)  # whose state changes as that of a model that nobody compiled
        self.before = state(self.model)
        self.reads_strides = any(name in description.source for name in (".stride(", ".is_contiguous("))
        self.where, self.other_values = "compile", "other values"
        self.failure: Failure | None = None
        self.layouts = random.Random(f"layouts {description.seed}")

    def fail(self, kind: str, detail: str = "") -> None:
        self.note(kind, detail)
        raise _Failed

    def note(self, kind: str, detail: str = "") -> None:
        """Record a failure after which the search goes on: another one, if there is one, says more."""
        self.failure = Failure(kind, self.where, f"{detail[:300]} {self.options}")

    def inputs(self, sizes: Sizes, seed: int) -> list[Any]:
        return make_inputs(self.description, sizes, 1000 * self.description.seed + seed)

    def arguments(self, inputs: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments, as the model is compiled and called."""
        names = [n for n, _ in self.description.inputs]
        if not self.description.keyword:
            return tuple(inputs), {}
        by_position = 0 if names[0] == "input_ids" else 1
        return tuple(inputs[:by_position]), dict(list(zip(names, inputs))[by_position:])

    def compile(self, candidates: list[Sizes]) -> bool:
        """Compile the model at the first sizes that eager takes; return whether it was not refused."""
        for sizes in candidates:
            inputs = self.inputs(sizes, 999)
            try:
                self.eager_call(inputs)
            except Exception:
                continue
            break
        else:
            self.counts["models that eager refuses"] += 1
            return False
        self.where = f"compile with {sizes}"
        self.eager = copy.deepcopy(self.model)
        args, kwargs = self.arguments([copy_of(t) for t in inputs])
        example = args if not kwargs else kwargs if not args else (args, kwargs)
        if isinstance(example, tuple) and kwargs:
            example = dict(zip([n for n, _ in self.description.inputs], inputs))
        precision = self.options.precision
        try:
            compiled = rarefy.compile(self.model, example, precision=precision, tune=self.options.tune)
        except (ModelError, DataError) as error:
            if "has no effect" in str(error):
                self.options = replace(self.options, precision=None)
                return self.compile([sizes])
            differ = isinstance(error, OutputsDifferError)
            self.counts["models refused because outputs differ" if differ else "models refused by compile"] += 1
            return False
        except Exception as error:
            self.fail("compile raises " + type(error).__name__, str(error))
        if self.options.saved:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    rarefy.save(compiled, f"{folder}/saved")
                    compiled = rarefy.load(f"{folder}/saved")
                except (ModelError, DataError):
                    self.counts["models refused by save"] += 1
                except Exception as error:
                    self.fail("save or load raises " + type(error).__name__, str(error))
        self.by_name = isinstance(example, dict)
        self.compiled = compiled
        self.compiled.skip_padding = self.options.skip_padding
        if changed(self.before, state(self.model)):
            self.fail("compile changes weights")
        self.counts["models compiled"] += 1
        return True

    def eager_call(self, inputs: list[Any]) -> Any:
        args, kwargs = self.arguments(inputs)
        return self.eager(*args, **kwargs)

    def compiled_call(self, inputs: list[Any]) -> Any:
        if self.by_name:
            return self.compiled(**dict(zip([n for n, _ in self.description.inputs], inputs)))
        return self.compiled(*inputs)

    def call(self, sizes: Sizes, i: int) -> None:
        """Compare a call with eager's; then change what it returned and was given, and compare again."""
        self.where = f"call {i} with {sizes}"
        layout = self.layouts.choice(("contiguous", "contiguous", "contiguous", *LAYOUTS)) if i else "contiguous"
        first, second = (self.inputs(sizes, 2 * i + n) for n in (0, 1))
        laid_out = [LAYOUTS.get(layout, copy_of)(t) for t in first]
        self.where += f" {layout}" * (layout != "contiguous")
        result = self.compare(laid_out, relaxed=layout != "contiguous")
        if result is None:
            return
        outputs, leaves = result
        snapshot = [copy_of(t) for t in outputs]
        other_inputs = [copy_of(t) for t in second]
        other = self.compare(other_inputs)
        if any(not same(a, b) for a, b in zip(outputs, snapshot)):
            self.fail("a call changes the outputs of the call before")
        for tensors in (outputs, [] if other is None else other[0], leaves, other_inputs):
            for t in tensors:
                overwrite(t)
        self.where += " again after writing to outputs and inputs"
        self.other_values = "a call changes the answer of a later one"
        self.compare([copy_of(t) for t in first])
        self.other_values = "other values"

    def compare(self, inputs: list[Any], relaxed: bool = False) -> tuple[list[Any], list[Any]] | None:
        """Return the output leaves and inputs of a compiled call that equals eager's, None where both raise.

        A model that asks for strides is compiled for contiguous inputs. It may answer others as if they were
        contiguous, which is not compared; but calls after that count.
        """
        eager_inputs = [like(t) for t in inputs]
        try:
            expected = self.eager_call(eager_inputs)
        except Exception as error:
            expected = error
            if relaxed:  # layouts may be refused by eager alone
                return None
        given = list(inputs)
        try:
            got = self.compiled_call(given)
        except (DataError, ModelError) as error:
            if isinstance(expected, Exception):
                self.counts["calls that both refuse"] += 1
            elif "failed on these inputs" in str(error) and not isinstance(error, OtherSizesError):
                self.fail("refused by a torch operator, no size is named", str(error))
            elif not re.search(r"\d", str(error)):
                self.fail("refused without a size", str(error))
            else:
                self.counts["calls refused"] += 1
            return None
        except Exception as error:
            if isinstance(expected, Exception):
                self.fail("eager raises, compiled raises an error that is not Rarefy's", f"{type(error)} {error}")
            self.fail(f"raises {type(error).__name__}", str(error))
        if self.reads_strides and not all(t.is_contiguous() for t in inputs if isinstance(t, Tensor)):
            self.counts["calls with strides that the model reads"] += 1
            return None
        if isinstance(expected, Exception):
            self.fail("eager raises, compiled answers", f"{type(expected).__name__}: {expected}")
        self.same_outputs(got, expected, inputs, eager_inputs, given)
        self.counts["calls that agree"] += 1
        weights = [*state_tensors(self.eager).values()]
        own = [
            x
            for x, y in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected))
            if isinstance(y, Tensor)
            and not any(overlap(y, w) for w in weights)  # others may be written to by no caller
        ]
        return own, given

    def same_outputs(
        self, got: Any, expected: Any, inputs: list[Any], eager_inputs: list[Any], given: list[Any]
    ) -> None:
        a, b = pytree.tree_flatten(got), pytree.tree_flatten(expected)
        if a[1] != b[1]:
            self.fail("other structure", f"{a[1]} instead of {b[1]}")
        tolerance = TOLERANCE[self.options.precision]
        mask = next((t for (n, _), t in zip(self.description.inputs, inputs) if n == "attention_mask"), None)
        for position, (x, y) in enumerate(zip(a[0], b[0])):
            x = without_padding(x, y, mask) if self.options.skip_padding else x
            if not isinstance(y, Tensor):
                if type(x) is not type(y) or x != y:
                    self.fail("other value of a leaf that is no tensor", f"{x!r} instead of {y!r}")
            elif not isinstance(x, Tensor):
                self.fail("a leaf is no tensor", f"{x!r}")
            elif x.shape != y.shape:
                self.fail("other shape", f"{list(x.shape)} instead of {list(y.shape)}")
            elif x.dtype != y.dtype:
                self.fail("other dtype", f"{x.dtype} instead of {y.dtype}")
            elif not relative_distance(x, y) <= (tolerance if y.is_floating_point() else loose(self.options.precision)):
                distance = relative_distance(x, y)
                if distance <= 2 * self.noise(position, inputs, y):
                    self.counts["calls that rounding errors move as far"] += 1
                    continue
                self.fail(self.other_values, f"relative distance {distance:.3g}, {list(x.shape)}")
        for x, y in zip(given, eager_inputs):
            if isinstance(y, Tensor) and not same(x, y):
                self.fail("inputs are not changed as eager changes them")
        self.no_new_aliases(a[0], b[0], given, eager_inputs)

    def noise(self, position: int, inputs: list[Any], expected: Tensor) -> float:
        """Return how far eager's own output moves where weights and inputs change by rounding errors of sums."""
        g = torch.Generator().manual_seed(0)

        def moved(t: Any) -> Any:
            if not isinstance(t, Tensor) or not t.is_floating_point():
                return t
            return t * (1 + ROUNDING[self.options.precision] * (torch.randint(2, t.shape, generator=g) * 2 - 1))

        largest = 0.0
        for _ in range(4):
            model = copy.deepcopy(self.eager)
            for p in model.parameters():
                p.copy_(moved(p))
            args, kwargs = self.arguments([moved(t) for t in inputs])
            output = pytree.tree_leaves(model(*args, **kwargs))[position]
            largest = max(largest, relative_distance(output, expected))
        return largest

    def no_new_aliases(self, got: list[Any], expected: list[Any], given: list[Any], eager_inputs: list[Any]) -> None:
        """Fail where outputs share memory with each other or with inputs although eager's do not."""
        pairs = [(got[i], got[j], expected[i], expected[j]) for i in range(len(got)) for j in range(i)]
        strided = any(isinstance(t, Tensor) and not t.is_contiguous() for t in given)
        if strided or ".contiguous(" in self.description.source:
            pairs = []  # it returns its tensor or a copy, as the layout that has passed through is contiguous or not
        pairs += [(got[i], given[j], expected[i], eager_inputs[j]) for i in range(len(got)) for j in range(len(given))]
        for x, y, x_eager, y_eager in pairs:
            if isinstance(x, Tensor) and isinstance(y, Tensor) and overlap(x, y) and not overlap(x_eager, y_eager):
                self.note("outputs share memory with each other or with inputs")

    def weights(self) -> None:
        """Fail where the calls changed the model's weights as eager's calls did not."""
        self.where = "the end"
        if changed(self.before, state(self.model)):
            self.fail("calls change weights")


def without_padding(x: Any, y: Any, mask: Tensor | None) -> Any:
    """Return an output with eager's numbers in place of zeros at tokens that a mask hides."""
    if mask is None or not isinstance(x, Tensor) or x.shape != y.shape or x.shape[:2] != mask.shape:
        return x
    hidden = (mask == 0).view(*mask.shape, *[1] * (x.dim() - 2))
    return torch.where(hidden & (x == 0), y, x)


def loose(precision: str | None) -> float:
    """Return the share of integers and booleans that may differ."""
    return 0.0 if precision is None else 0.3


def copy_of(t: Any) -> Any:
    return t.clone(memory_format=torch.contiguous_format) if isinstance(t, Tensor) else t


def like(t: Any) -> Any:
    """Return a copy of a tensor with its strides."""
    if not isinstance(t, Tensor):
        return t
    if any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape)):
        base = t[tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())]
        return like(base).expand(t.shape)
    copied = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    return copied.copy_(t)


def transposed(t: Any) -> Any:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(t, Tensor) and t.dim() > 1 else copy_of(t)


def strided(t: Any) -> Any:
    """Return a tensor of the same values in every second place of memory."""
    if not isinstance(t, Tensor) or not t.dim():
        return copy_of(t)
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def expanded(t: Any) -> Any:
    """Return a tensor of the first sample's values for all samples, which lie in memory once."""
    return copy_of(t[:1]).expand(t.shape) if isinstance(t, Tensor) and t.dim() else copy_of(t)


def offset(t: Any) -> Any:
    """Return a tensor of the same values that begins inside a larger one."""
    return torch.cat([t[:1], t])[1:] if isinstance(t, Tensor) and t.dim() and len(t) else copy_of(t)


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "transposed": transposed,
    "strided": strided,
    "expanded": expanded,
    "offset": offset,
}


def same(a: Any, b: Any) -> bool:
    return not isinstance(a, Tensor) or (a.shape == b.shape and relative_distance(a, b) <= 1e-6)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether writing to one tensor may change the other: bytes from the first to the last element overlap."""
    if not a.numel() or not b.numel() or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    return bytes_of(a).start < bytes_of(b).stop and bytes_of(b).start < bytes_of(a).stop


def bytes_of(t: Tensor) -> range:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return range(t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size())


def overwrite(t: Any) -> None:
    """Write NaN or large numbers into a tensor."""
    if not isinstance(t, Tensor) or not t.numel():
        return
    t = t[tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())] if t.dim() else t
    t.fill_(float("nan") if t.is_floating_point() else True if t.dtype == torch.bool else 77)


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return weights, buffers, and tensors that are plain attributes."""
    return {**model.state_dict(), **{n: t for n, t in vars(model).items() if isinstance(t, Tensor)}}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in state_tensors(model).items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(t, after[n]) for n, t in before.items())
