"""What an example shows of a model: the inputs of its layers, and which module alone reads what a layer returns."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from rarefy.model.activation_quant import is_quant_hook
from rarefy.model.batches import tensors_in
from rarefy.model.forward import call, evaluating, on_device
from rarefy.runtime.reference import ACTIVATIONS

TRANSFORMERS = ("GELUActivation", "NewGELUActivation", "PytorchGELUTanh", "GELUTanh", "SiLUActivation")


@dataclass(frozen=True, eq=False)
class Observed:
    """What one run on an example showed.

    Attributes:
        images: by the id of a convolution, an empty tensor like its input.
        consumers: by the id of a layer or BatchNorm, the BatchNorm or activation that alone reads its output.
        groups: Linear layers that are always called with the same tensor, right after each other, such as those of
            queries, keys and values.
        outputs: the tensors that the model returned.
    """

    images: dict[int, Tensor]
    consumers: dict[int, nn.Module]
    groups: tuple[tuple[nn.Module, ...], ...] = ()
    outputs: tuple[Tensor, ...] = ()


class _ReadCounter(TorchDispatchMode):
    """Counts how often the outputs of each module are read by operators; a consumer's operators count as one."""

    def __init__(self) -> None:
        super().__init__()
        self.producer: Any = WeakTensorKeyDictionary()  # output -> module
        self.count: Counter[int] = Counter()
        self.reading: Tensor | None = None  # the input of the consumer that runs now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tensors_in([list(args), kwargs or {}]):
            if t in self.producer and t is not self.reading:
                self.count[id(self.producer[t])] += 1
        return func(*args, **(kwargs or {}))


class _InputGroups:
    """Finds Linear layers that are called with the same tensor, right after each other."""

    def __init__(self) -> None:
        self.runs: list[list[nn.Module]] = []
        self.last: tuple[Any, int] = (lambda: None, 0)

    def observe(self, module: nn.Module, args: tuple) -> None:
        """Observe a call of a Linear layer: its forward hook."""
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.is_inference():  # torch does not count edits of inference tensors
            self.last = (lambda: None, 0)
            self.runs.append([module])
        elif self.last[0]() is x and self.last[1] == x._version and module not in self.runs[-1]:
            self.runs[-1].append(module)
        else:
            self.last = weakref.ref(x), x._version
            self.runs.append([module])

    def groups(self) -> tuple[tuple[nn.Module, ...], ...]:
        """Return the runs of two and more whose modules are called in no other run."""
        runs = dict.fromkeys(tuple(run) for run in self.runs)
        count = Counter(m for run in runs for m in run)
        return tuple(run for run in runs if len(run) > 1 and all(count[m] == 1 for m in run))


class _Observer:
    """The hooks of `observe` and what they note."""

    def __init__(self, model: nn.Module):
        self.images: dict[int, Tensor] = {}
        self.calls: Counter[int] = Counter()
        self.reads, self.inputs = _ReadCounter(), _InputGroups()
        self.readers: dict[int, list[nn.Module]] = {}  # by the id of a producer: consumers that read its outputs
        self.consumers = {m for m in model.modules() if is_plain(m) and (_is_norm(m) or activation(m) is not None)}

    def register(self, layers: Collection[nn.Module]) -> list[Any]:
        """Register the hooks; return their handles."""
        convolutions = [m for m in layers if isinstance(m, nn.Conv1d | nn.Conv2d)]
        linears = [m for m in layers if isinstance(m, nn.Linear)]
        handles = [m.register_forward_pre_hook(self._note_image) for m in convolutions]
        handles += [m.register_forward_pre_hook(self.inputs.observe, prepend=True) for m in linears]
        handles += [m.register_forward_pre_hook(self._note_consumer) for m in self.consumers]
        return handles + [m.register_forward_hook(self._note_output) for m in {*layers, *self.consumers}]

    def _note_image(self, module: Any, args: tuple) -> None:
        if args and args[0].dim() == len(module.kernel_size) + 2:
            self.images.setdefault(id(module), torch.empty_like(args[0]))

    def _note_consumer(self, consumer: nn.Module, args: tuple) -> None:
        self.calls[id(consumer)] += 1
        if args and isinstance(args[0], Tensor) and args[0] in self.reads.producer:
            producer = id(self.reads.producer[args[0]])
            self.readers.setdefault(producer, []).append(consumer)
            self.reads.count[producer] += 1
            self.reads.reading = args[0]

    def _note_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.reads.reading = None
        self.calls[id(module)] += module not in self.consumers
        if isinstance(output, Tensor):
            self.reads.producer[output] = module  # an activation in place becomes the producer of its input

    def only_consumers(self) -> dict[int, nn.Module]:
        """Return, by the id of a producer, the consumer that alone reads each of its outputs."""
        alive = {id(producer) for producer in self.reads.producer.values()}  # outputs that are returned or kept
        return {
            producer: readers[0]
            for producer, readers in self.readers.items()
            if producer not in alive
            and len({id(n) for n in readers}) == 1
            and len(readers) == self.calls[producer] == self.reads.count[producer] == self.calls[id(readers[0])]
        }


def observe(model: nn.Module, layers: Collection[nn.Module], example: Any) -> Observed:
    """Run the model in evaluation mode on `example` and return what it shows of `layers`.

    A consumer counts if it alone reads each output of a layer, nobody holds that output afterwards, and it has no hooks
    that would see less; a BatchNorm, if it keeps running statistics and is in evaluation mode. Branches that the
    example does not take are not seen.
    """
    observer = _Observer(model)
    handles = observer.register(layers)
    try:
        with evaluating(model), torch.no_grad(), observer.reads:
            output = call(model, on_device(model, example))
    finally:
        for handle in handles:
            handle.remove()
    consumers = observer.only_consumers()
    outputs = tuple(t.detach().clone() for t in tensors_in(output))
    return Observed(observer.images, consumers, observer.inputs.groups(), outputs)


def activation(module: nn.Module) -> str | None:
    """Return the name of the activation that a module is and kernels have, or None.

    >>> activation(nn.GELU("tanh")), activation(nn.Tanh())
    ('gelu_tanh', None)
    """
    known = type(module).__module__ == "transformers.activations" and type(module).__name__ in TRANSFORMERS
    if type(module) in (nn.ReLU, nn.GELU, nn.SiLU) or known:
        far = torch.tensor([-1e4, -100, 100, 1e4], dtype=torch.float32)
        x = torch.cat([torch.linspace(-6, 6, 121, dtype=torch.float32), far])
        with torch.no_grad():
            y = module(x.clone())
        return next((n for n, f in ACTIVATIONS.items() if n and torch.allclose(y, f(x), 1e-6, 1e-6)), None)
    return None


def is_plain(module: nn.Module) -> bool:
    """Return whether a module is called as its class says: without hooks, except those that quantize its inputs, and
    without a forward of its own."""
    foreign = any(not is_quant_hook(h) for h in module._forward_pre_hooks.values())
    return not ("forward" in vars(module) or module._forward_hooks or foreign)


def _is_norm(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        and type(module).forward is nn.BatchNorm2d.forward
        and not module.training
        and module.running_var is not None
    )
