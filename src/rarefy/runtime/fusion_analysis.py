"""What a model gives its layers and does with what they return, seen in one run on an example."""

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

from rarefy.model.activation_quant import is_ours
from rarefy.model.batches import tensors_in
from rarefy.model.forward import call, evaluating, on_device
from rarefy.runtime.reference import ACTIVATIONS

TRANSFORMERS = ("GELUActivation", "NewGELUActivation", "PytorchGELUTanh", "GELUTanh", "SiLUActivation")


@dataclass(frozen=True, eq=False)
class Observed:
    """By the id of a module: what a convolution is given (without values), and the module that alone reads what a layer
    or a BatchNorm returns: a BatchNorm or an activation. Linear layers that are always given the same tensor, one
    right after the other, such as those of queries, keys and values. And the tensors that the model returned."""

    images: dict[int, Tensor]
    readers: dict[int, nn.Module]
    groups: tuple[tuple[nn.Module, ...], ...] = ()
    outputs: tuple[Tensor, ...] = ()


class _Uses(TorchDispatchMode):
    """Counts how often the outputs of each module are read: by operators, a reader's all together being one."""

    def __init__(self) -> None:
        super().__init__()
        self.made_by: Any = WeakTensorKeyDictionary()  # output -> module
        self.count: Counter[int] = Counter()
        self.reading: Tensor | None = None  # what a reader was given that runs now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tensors_in([list(args), kwargs or {}]):
            if t in self.made_by and t is not self.reading:
                self.count[id(self.made_by[t])] += 1
        return func(*args, **(kwargs or {}))


class _Given:
    """Which Linear layers are called with one and the same tensor, one after the other."""

    def __init__(self) -> None:
        self.runs: list[list[nn.Module]] = []
        self.last: tuple[Any, int] = (lambda: None, 0)

    def see(self, module: nn.Module, args: tuple) -> None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.is_inference():  # nothing tells whether it is edited
            self.last = (lambda: None, 0)
            self.runs.append([module])
        elif self.last[0]() is x and self.last[1] == x._version and module not in self.runs[-1]:
            self.runs[-1].append(module)
        else:
            self.last = weakref.ref(x), x._version
            self.runs.append([module])

    def groups(self) -> tuple[tuple[nn.Module, ...], ...]:
        """Return the runs of two and more whose modules are called in no other."""
        kinds = dict.fromkeys(tuple(run) for run in self.runs)
        often = Counter(m for run in kinds for m in run)
        return tuple(run for run in kinds if len(run) > 1 and all(often[m] == 1 for m in run))


def observe(model: nn.Module, layers: Collection[nn.Module], example: Any) -> Observed:
    """Run the model in evaluation mode on `example` and return what becomes of what `layers` return.

    A reader counts where it alone reads each output of a layer, nobody holds that output later, and it has no hooks
    that would see less; a BatchNorm, where it keeps running statistics and is in evaluation mode. What the example does
    not take, such as a branch that depends on the data, is not seen.
    """
    images: dict[int, Tensor] = {}
    calls: Counter[int] = Counter()
    pairs: dict[int, list[nn.Module]] = {}
    uses, given = _Uses(), _Given()

    def see(module: Any, args: tuple) -> None:
        if args and args[0].dim() == len(module.kernel_size) + 2:
            images.setdefault(id(module), torch.empty_like(args[0]))

    def meet(reader: nn.Module, args: tuple) -> None:
        calls[id(reader)] += 1
        if args and isinstance(args[0], Tensor) and args[0] in uses.made_by:
            maker = id(uses.made_by[args[0]])
            pairs.setdefault(maker, []).append(reader)
            uses.count[maker] += 1
            uses.reading = args[0]

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        uses.reading = None
        calls[id(module)] += module not in readers
        if isinstance(output, Tensor):
            uses.made_by[output] = module  # an activation in place takes over what it was given

    readers = {m for m in model.modules() if plain(m) and (_is_norm(m) or activation(m) is not None)}
    convolutions = [m for m in layers if isinstance(m, nn.Conv1d | nn.Conv2d)]
    hooks = [m.register_forward_pre_hook(see) for m in convolutions]
    hooks += [m.register_forward_pre_hook(given.see, prepend=True) for m in layers if isinstance(m, nn.Linear)]
    hooks += [m.register_forward_pre_hook(meet) for m in readers]
    hooks += [m.register_forward_hook(keep) for m in {*layers, *readers}]
    try:
        with evaluating(model), torch.no_grad(), uses:
            output = call(model, on_device(model, example))
    finally:
        for hook in hooks:
            hook.remove()
    held = {id(maker) for maker in uses.made_by.values()}  # outputs that are alive: returned, or kept somewhere
    alone = {
        maker: met[0]
        for maker, met in pairs.items()
        if maker not in held
        and len({id(n) for n in met}) == 1
        and len(met) == calls[maker] == uses.count[maker] == calls[id(met[0])]
    }
    return Observed(images, alone, given.groups(), tuple(t.detach().clone() for t in tensors_in(output)))


def activation(module: nn.Module) -> str | None:
    """Return the name of the activation that a module is and kernels have, or None.

    >>> activation(nn.GELU("tanh")), activation(nn.Tanh())
    ('gelu_tanh', None)
    """
    known = type(module).__module__ == "transformers.activations" and type(module).__name__ in TRANSFORMERS
    if type(module) in (nn.ReLU, nn.GELU, nn.SiLU) or known:
        x = torch.cat([torch.linspace(-6, 6, 121), torch.tensor([-1e4, -100, 100, 1e4])])
        with torch.no_grad():
            y = module(x.clone())
        return next((n for n, of in ACTIVATIONS.items() if n and torch.allclose(y, of(x), 1e-6, 1e-6)), None)
    return None


def plain(module: nn.Module) -> bool:
    """Return whether a module is called as its class says: with no hooks but those that round its inputs, and no
    forward of its own."""
    strange = any(not is_ours(h) for h in module._forward_pre_hooks.values())
    return not ("forward" in vars(module) or module._forward_hooks or strange)


def _is_norm(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        and type(module).forward is nn.BatchNorm2d.forward
        and not module.training
        and module.running_var is not None
    )
