"""The lists of equal blocks in a model, such as the layers of a transformer."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

LIST_CLASSES = (nn.ModuleList, nn.Sequential)


def block_lists(model: nn.Module) -> dict[str, Any]:
    """Return, by name, the lists with several blocks of the same class. Lists within a block are left out. O(modules).

    >>> net = nn.Sequential(nn.Sequential(*[nn.TransformerEncoderLayer(4, 2) for _ in range(3)]), nn.ReLU())
    >>> list(block_lists(net))
    ['0']
    """
    lists: dict[str, Any] = {}
    blocks: tuple[str, ...] = ()  # blocks, in which no others are looked for
    for name, module in model.named_modules():
        if isinstance(module, LIST_CLASSES) and not f"{name}.".startswith(blocks or ("\0",)) and block_indices(module):
            lists[name] = module
            blocks += tuple(f"{name}.{i}.".removeprefix(".") for i in block_indices(module))
    return lists


def block_indices(modules: Any) -> list[int]:
    """Return the indices of the blocks in a list.

    A block is a module with children that is not itself a list, and of whose class the list has at least two.
    """
    indices = [
        i for i, m in enumerate(modules) if not isinstance(m, LIST_CLASSES) and next(m.children(), None) is not None
    ]
    classes = Counter(type(modules[i]) for i in indices)
    return [i for i in indices if classes[type(modules[i])] > 1]
