"""Compile a model again for sizes at which its code takes another branch, as torch.compile does."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, OtherSizesError, first_line
from rarefy.compiler.other_sizes import MODEL_ERRORS

MAX_BRANCHES = 8  # compiled models beside the first, and attempts that failed

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


class Branches:
    """The compiled models for other branches of a model's code, made when a call needs them.

    The model is not kept alive: once it is deleted, or its weights have changed, calls outside of the first branch are
    errors.

    Attributes:
        compiled: the models so far; they have packed weights of their own.
    """

    def __init__(self, model: nn.Module, compile_call: Callable[..., Any]):
        """Note the state of the weights. O(their bytes).

        Args:
            model: the model.
            compile_call: returns a compiled model for the model, arguments, keywords, and whether sizes stay open.
        """
        self.model, self.compile_call = weakref.ref(model), compile_call
        self.weights = _checksums(model)
        self.compiled: list[Any] = []
        self.failures = 0
        self.lock = Lock()

    def __str__(self) -> str:
        return f"compiled again for other branches of its code: {len(self.compiled)} of at most {MAX_BRANCHES}"

    def find(self, call: Call, error: OtherSizesError) -> Any:
        """Return a compiled model that takes a call's arguments and keywords, made now if there is none.

        Raises:
            OtherSizesError: `error`, with the reason why there is none.
        """
        args, kwargs = call
        with self.lock:
            for compiled in self.compiled:
                if takes(compiled, args, kwargs):
                    return compiled
            model = self.model()
            if model is None or self.weights is None:
                raise error
            for count, done in ((len(self.compiled), "it was compiled"), (self.failures, "compiling it failed")):
                if count == MAX_BRANCHES:
                    raise OtherSizesError(f"{error} ({done} again for {count} other branches already)")
            if _checksums(model) != self.weights:
                raise OtherSizesError(f"{error} (the model's weights have changed, so it is not compiled again)")
            self.compiled.append(self._compile(model, args, kwargs, error))
            return self.compiled[-1]

    def _compile(self, model: nn.Module, args: Any, kwargs: Any, error: OtherSizesError) -> Any:
        try:
            compiled = self.compile_call(model, args, kwargs)
            if not takes(compiled, args, kwargs):  # sizes of 1, which open sizes do not include
                compiled = self.compile_call(model, args, kwargs, dynamic=False)
        except MODEL_ERRORS as reason:
            self.failures += 1
            raise OtherSizesError(f"{error} (compiling it again failed: {first_line(reason)})") from reason
        return compiled


def takes(compiled: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a compiled model takes these arguments."""
    try:
        compiled.leaves(args, dict(kwargs))
    except DataError:
        return False
    return True


def _checksums(model: nn.Module) -> dict[str, int] | None:
    """Return a checksum of each parameter and buffer, None where one is of no plain type."""
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    plain = (Tensor, nn.Parameter, nn.Buffer)
    if any(type(t) not in plain or t.layout != torch.strided or not t.is_cpu for t in tensors.values()):
        return None
    with torch.no_grad():
        return {n: zlib.crc32(_bytes(t)) for n, t in tensors.items()}


def _bytes(t: Tensor) -> Any:
    return t.detach().contiguous().flatten().view(torch.uint8).numpy()
