"""What a model's answers depend on beside its inputs: checksums of its tensors, and of its other attributes."""

from __future__ import annotations

import sys
import zlib
from collections import deque
from collections.abc import Iterable
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.compiler.traced_graph import HEAP_TYPE, LITERALS

MAX_VALUES = 200_000  # that are looked at: of others, the type alone counts
MAX_DEPTH = 40  # of values inside each other
SEQUENCES = (tuple, list, deque)
PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
TENSORS_OF_MODULES = ("_parameters", "_buffers", "_modules")  # which have checksums, or notes, of their own


def checksums(model: nn.Module) -> dict[str, int] | None:
    """Return a checksum of each parameter and buffer, None where one is of no plain type. O(their bytes)."""
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    if not all(map(_is_plain, tensors.values())):
        return None
    return {n: _of_bytes(t) for n, t in tensors.items()}


def attributes(model: nn.Module) -> dict[str, int]:
    """Return a checksum of each other attribute of a model and of its modules, by name.

    Lists, dicts, tensors and objects count by what they contain; functions, and objects that do not show what they
    contain, by their identity. So do hooks. The class of a module has a checksum too, under its name and ".class".
    """
    modules, tensors = model.named_modules(remove_duplicate=False), (*model.parameters(), *model.buffers())
    note = _Note((*model.modules(), *tensors))
    notes: dict[str, int] = {}
    for name, module in modules:
        own = {k: v for k, v in vars(module).items() if k not in TENSORS_OF_MODULES}
        prefix = f"{name}." if name else ""
        notes |= {f"{prefix}{k}": note.value(v) for k, v in own.items()}
        notes[f"{prefix}class"] = note.kind(type(module))
    return notes


class _Note:
    """Returns a number for each value, which another value has by chance alone. `known` count by their identity."""

    def __init__(self, known: Iterable[Any]) -> None:
        self.notes = {id(k): id(k) for k in known}  # of containers and objects, which may contain themselves
        self.depth = self.values = 0

    def value(self, value: Any) -> int:
        kind = type(value)
        self.values += 1
        if kind in LITERALS:
            return hash((kind.__name__, repr(value)))
        if self.values > MAX_VALUES or self.depth > MAX_DEPTH:
            return id(kind)
        if id(value) not in self.notes:
            self.notes[id(value)] = id(kind)
            self.depth += 1
            self.notes[id(value)] = hash((id(kind), self.contents(value)))
            self.depth -= 1
        return self.notes[id(value)]

    def contents(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return (value.dtype, value.shape, _of_bytes(value)) if _is_plain(value) else id(value)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return value.dtype.str, value.shape, zlib.crc32(value.tobytes())
        if isinstance(value, SEQUENCES):
            return self.each(value)
        if isinstance(value, set | frozenset):
            return frozenset(self.each(value))
        if isinstance(value, dict):
            return self.each(dict.keys(value)), self.each(dict.values(value))
        if isinstance(value, MethodType):
            return self.each((value.__func__, value.__self__))
        if isinstance(value, FunctionType):
            cells = (c.cell_contents for c in value.__closure__ or () if not _is_empty(c))
            return id(value.__code__), self.each(cells), self.each((value.__defaults__, value.__kwdefaults__))
        if isinstance(value, partial):
            return self.each((value.func, value.args, value.keywords))
        kind = type(value)
        if not kind.__flags__ & HEAP_TYPE:
            return id(value), repr(value)
        if isinstance(value, type) or (kind.__module__ in sys.stdlib_module_names and kind is not SimpleNamespace):
            return id(value)
        return self.fields(value)

    def each(self, values: Iterable[Any]) -> tuple[int, ...]:
        return tuple(map(self.value, values))

    def fields(self, value: Any) -> Any:
        slots = [s for c in type(value).__mro__ for s in vars(c).get("__slots__", ()) if hasattr(value, s)]
        named = {**{s: getattr(value, s) for s in slots if s != "__dict__"}, **getattr(value, "__dict__", {})}
        return tuple(named), self.each(named.values())

    def kind(self, kind: type) -> int:
        """Return a number for a class and what its users may set in it."""
        own = [c for c in kind.__mro__ if c.__module__.partition(".")[0] not in ("torch", "builtins")]
        numbers = [(k, repr(v)) for c in own for k, v in vars(c).items() if type(v) in LITERALS and k != "__doc__"]
        return hash((id(kind), tuple(numbers), *(id(vars(c).get("forward")) for c in own)))


def _is_empty(cell: Any) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


def _is_plain(t: Tensor) -> bool:
    return type(t) in PLAIN_TENSORS and t.layout == torch.strided and t.is_cpu and not t.is_quantized


def _of_bytes(t: Tensor) -> int:
    with torch.no_grad():
        values = t.detach().resolve_conj().resolve_neg().contiguous().flatten()
        return zlib.crc32(values.view(torch.uint8).numpy().data) if values.numel() else 0
