"""What a model gives its layers and does with what they return, seen in one run on an example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from rarefy.model.batches import tensors_in
from rarefy.model.stats import call, evaluating, on_device

Conv = nn.Conv1d | nn.Conv2d


@dataclass(frozen=True, eq=False)
class Observed:
    """By the id of a convolution: what it is given (without values), and the BatchNorm that alone reads its outputs."""

    images: dict[int, Tensor]
    norms: dict[int, nn.Module]


class _Uses(TorchDispatchMode):
    """Counts how often operators read the outputs of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.made_by: Any = WeakTensorKeyDictionary()  # output -> layer
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tensors_in([list(args), kwargs or {}]):
            if t in self.made_by:
                self.count[id(self.made_by[t])] += 1
        return func(*args, **(kwargs or {}))


def observe(model: nn.Module, modules: Sequence[nn.Module], example: Any) -> Observed:
    """Run the model in evaluation mode on `example` and return what became of its convolutions among `modules`.

    A BatchNorm counts where each output of the convolution is read by one operator, that BatchNorm's, which reads
    nothing else; where it keeps running statistics, is in evaluation mode, and has no hooks that would see less.
    """
    images: dict[int, Tensor] = {}
    calls: Counter[int] = Counter()
    pairs: dict[int, list[nn.Module]] = {}
    uses = _Uses()

    def see(module: Any, args: tuple) -> None:
        if args and args[0].dim() == len(module.kernel_size) + 2:
            images.setdefault(id(module), torch.empty_like(args[0]))

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        calls[id(module)] += 1
        uses.made_by[output] = module

    def meet(norm: nn.Module, args: tuple) -> None:
        calls[id(norm)] += 1
        if args and args[0] in uses.made_by:
            pairs.setdefault(id(uses.made_by[args[0]]), []).append(norm)

    norms = [m for m in model.modules() if _plain(m)]
    convolutions: list[Any] = [m for m in modules if isinstance(m, Conv)]
    hooks = [m.register_forward_pre_hook(see) for m in convolutions]
    hooks += [m.register_forward_hook(keep) for m in convolutions]
    hooks += [m.register_forward_pre_hook(meet) for m in norms]
    try:
        with evaluating(model), torch.no_grad(), uses:
            output = call(model, on_device(model, example))
    finally:
        for hook in hooks:
            hook.remove()
    returned = {id(uses.made_by[t]) for t in tensors_in(output) if t in uses.made_by}
    alone = {
        conv: met[0]
        for conv, met in pairs.items()
        if conv not in returned
        and len({id(n) for n in met}) == 1
        and len(met) == calls[conv] == uses.count[conv] == calls[id(met[0])]
    }
    return Observed(images, alone)


def _plain(module: nn.Module) -> bool:
    """Whether the module is a BatchNorm that could go into the layer before it."""
    return (
        isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        and type(module).forward is nn.BatchNorm2d.forward
        and not module.training
        and module.running_var is not None
        and not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)
    )
