"""The lists of equal blocks in a model, such as the layers of a transformer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

LIST_CLASSES = (nn.ModuleList, nn.Sequential)
TIED = "rarefy_tied"  # attribute of a model: by list of blocks, the groups that share weights


def outermost_lists(model: nn.Module, blocks_of: Callable[[Any], list[int]]) -> dict[str, Any]:
    """Return, by name, the lists in which `blocks_of` finds blocks, without those inside such a block. O(modules)."""
    lists: dict[str, Any] = {}
    blocks: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, LIST_CLASSES) or f"{name}.".startswith(blocks or ("\0",)):
            continue
        indices = blocks_of(module)
        if indices:
            lists[name] = module
            keys = list(module._modules)
            blocks += tuple(f"{name}.{keys[i]}.".removeprefix(".") for i in indices)
    return lists


def block_lists(model: nn.Module) -> dict[str, Any]:
    """Return, by name, the lists with several blocks of the same class. Lists within a block are left out. O(modules).

    >>> net = nn.Sequential(nn.Sequential(*[nn.TransformerEncoderLayer(4, 2) for _ in range(3)]), nn.ReLU())
    >>> list(block_lists(net))
    ['0']
    """
    return outermost_lists(model, block_indices)


def block_indices(modules: Any) -> list[int]:
    """Return the indices of the blocks in a list.

    A block is a module with children that is not itself a list, and of whose class the list has at least two.
    """
    indices = [
        i for i, m in enumerate(modules) if not isinstance(m, LIST_CLASSES) and next(m.children(), None) is not None
    ]
    classes = Counter(type(modules[i]) for i in indices)
    return [i for i in indices if classes[type(modules[i])] > 1]


def equal_modules(modules: Any) -> list[int]:
    """Return all indices of a list whose modules are of one class and not single layers, otherwise none."""
    equal = len(modules) > 1 and len({type(m) for m in modules}) == 1
    if not equal or isinstance(modules[0], nn.Linear | nn.modules.conv._ConvNd):
        return []
    return list(range(len(modules)))
