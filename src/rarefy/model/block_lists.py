"""TODO."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

LIST_CLASSES = (nn.ModuleList, nn.Sequential)


def block_lists(model: nn.Module) -> dict[str, Any]:
    """Return the lists that have several blocks of a class, none within a block, by name. O(modules).

    >>> net = nn.Sequential(nn.Sequential(*[nn.TransformerEncoderLayer(4, 2) for _ in range(3)]), nn.ReLU())
    >>> list(block_lists(net))
    ['0']
    """
    found: dict[str, Any] = {}
    within: tuple[str, ...] = ()  # blocks, in which no others are looked for
    for name, module in model.named_modules():
        if isinstance(module, LIST_CLASSES) and not f"{name}.".startswith(within or ("\0",)) and block_indices(module):
            found[name] = module
            within += tuple(f"{name}.{i}.".removeprefix(".") for i in block_indices(module))
    return found


def block_indices(parts: Any) -> list[int]:
    """The numbers of the blocks in a list: modules that are no single layers and no lists, at least two of a class."""
    whole = [i for i, m in enumerate(parts) if not isinstance(m, LIST_CLASSES) and next(m.children(), None) is not None]
    classes = Counter(type(parts[i]) for i in whole)
    return [i for i in whole if classes[type(parts[i])] > 1]
