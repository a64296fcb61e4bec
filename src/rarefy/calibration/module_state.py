"""What modules keep on themselves during a forward, such as a U-Net's features, for passes that take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from rarefy.model.batches import tensors_in

LIBRARIES = ("torch", "torchvision", "timm", "transformers")  # their layers pass on what others read
ABSENT = object()

Attribute = tuple[nn.Module, str]


def attributes_set_by(model: nn.Module, forward: Callable[[], Any]) -> list[Attribute]:
    """Return the attributes with tensors that a forward sets, or fills if they are lists or dicts.

    Models whose modules are all those of libraries are not called.
    """
    if all(type(m).__module__.partition(".")[0] in LIBRARIES for m in model.modules()):
        return []
    before = {m: {n: _contents(v) for n, v in vars(m).items()} for m in model.modules()}
    forward()
    return [
        (m, n)
        for m, known in before.items()
        for n, value in vars(m).items()
        if tensors_in([value]) and not _same(known.get(n, ABSENT), _contents(value))
    ]


def values_of(attributes: Sequence[Attribute]) -> list[Any]:
    """Return the values of attributes, lists and dicts as copies."""
    return [_copy(vars(m).get(n, ABSENT)) for m, n in attributes]


def set_values(attributes: Sequence[Attribute], values: Sequence[Any]) -> None:
    """Set attributes to values of `values_of`."""
    for (module, name), value in zip(attributes, values):
        if value is ABSENT:
            vars(module).pop(name, None)
        else:
            vars(module)[name] = _copy(value)


def _contents(value: Any) -> Any:
    """Return what tells whether a value was set or filled."""
    if isinstance(value, list | tuple):
        return [*value]
    return [*value.items()] if type(value) is dict else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and type(a) is type(b) and bool(a == b))


def _copy(value: Any) -> Any:
    return type(value)(value) if type(value) in (list, dict) else value
