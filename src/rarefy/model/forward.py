"""Calling a model: with any batch, on its device, in evaluation mode, with hooks or gradients for a while."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from rarefy.common.errors import DataError, RarefyError, first_line
from rarefy.model.layers import unwrap

Model = nn.Module | Callable[..., Any]  # a callable: a compiled model, or a function that calls another engine


def call(model: Model, batch: Any) -> Any:
    """Return the model's output for one batch.

    A dict is passed as keyword arguments, of a tuple (inputs, target) the inputs, anything else as it is. Raises
    DataError if the model cannot be called with the batch; the message says what the batch holds and what the model
    takes.
    """
    with calling(model, f"a batch of {describe_batch(batch)}{_which_is_called(batch)}"):
        if hasattr(batch, "keys"):
            return model(**batch)
        if isinstance(batch, tuple | list):
            if len(batch) == 0:
                raise DataError("a batch is an empty tuple: give (inputs, target), a tensor or a dict")
            return model(batch[0])
        return model(batch)


def _which_is_called(batch: Any) -> str:
    several = isinstance(batch, tuple | list) and len(batch) > 1
    return ", of which the first is the input (give several inputs as a dict)" if several else ""


@contextmanager
def calling(model: Model, inputs: str) -> Iterator[None]:
    """Raise DataError for what a call of the model raises: it names the inputs, as `inputs` describes them."""
    try:
        yield
    except RarefyError:
        raise
    except (
        RuntimeError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        NotImplementedError,
        AssertionError,
    ) as error:
        inner = unwrap(model) if isinstance(model, nn.Module) else model
        takes = ", ".join(list(inspect.signature(getattr(inner, "forward", inner)).parameters)[:4])
        hint = "; give tensors: torch.from_numpy(array)" if "ndarray" in inputs else f" (it takes {takes})"
        raise DataError(f"{type(inner).__name__} cannot be called with {inputs}: {first_line(error)}{hint}") from error


def split_example(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return an example as arguments and keywords."""
    if hasattr(example, "keys"):
        return (), {k: example[k] for k in example.keys()}  # noqa: SIM118 (a batch of transformers is no dict)
    return tuple(example) if isinstance(example, tuple | list) else (example,), {}


def named_arguments(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names; those that `*args` takes are one tuple.

    >>> named_arguments(nn.Linear(2, 2), (1,), {})
    {'input': 1}
    """
    arguments = dict(kwargs)
    for i, (name, parameter) in enumerate(inspect.signature(model.forward).parameters.items()):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            arguments[name] = tuple(args[i:])
        elif i < len(args) and parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            arguments[name] = args[i]
    return arguments


def describe_batch(batch: Any) -> str:
    """Return a short text that says what a batch holds.

    >>> describe_batch((torch.zeros(8, 3), torch.zeros(8).long()))
    'float32 8x3 and int64 8'
    """
    if isinstance(batch, Tensor):
        shape = "x".join(map(str, batch.shape)) or "of no dimension"
        return f"{str(batch.dtype).removeprefix('torch.')} {shape}"
    if hasattr(batch, "keys"):
        return ", ".join(f"{k}: {describe_batch(batch[k])}" for k in batch) or "an empty dict"
    if isinstance(batch, tuple | list):
        return " and ".join(describe_batch(b) for b in batch[:4])
    return type(batch).__name__


def check_batches(data: Any, what: str = "data") -> None:
    """Raise DataError if `data` is not an iterable of batches but a path, one tensor, a Dataset or the like."""
    if isinstance(data, str | bytes | Path):
        raise DataError(
            f"{what}: expected an iterable of batches, got the text {str(data)[:60]!r}: name files and built-in data "
            "in a recipe's `data:`"
        )
    if isinstance(data, Tensor):
        raise DataError(
            f"{what}: expected an iterable of batches, got one tensor ({describe_batch(data)}): give a list, [tensor]"
        )
    if isinstance(data, Mapping):
        raise DataError(
            f"{what}: expected an iterable of batches, got one batch ({describe_batch(data)}): give a list, [batch]"
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise DataError(
            f"{what}: expected an iterable of batches, got a {type(data).__name__}: wrap it in a DataLoader"
        )
    if type(data).__module__.startswith("datasets."):  # of Hugging Face: its rows are no batches
        raise DataError(
            f"{what}: expected an iterable of batches, got the rows of a {type(data).__name__}: "
            "rarefy.data.datasets.batches(dataset, tokenizer) makes batches"
        )
    if not hasattr(data, "__iter__"):
        raise DataError(f"{what}: expected an iterable of batches, got {type(data).__name__}")


def without_targets(batch: Any) -> Any:
    """Return the part of a batch that a model is called with: no labels of a dict, of a tuple the inputs."""
    if hasattr(batch, "keys"):
        return {k: v for k, v in batch.items() if k != "labels"}
    return batch[0] if isinstance(batch, tuple | list) and batch else batch


def on_device(model: Model, batch: Any) -> Any:
    """Return the batch on the model's device. fp32 inputs are cast to bf16 or fp16 if the weights are."""
    if not isinstance(model, nn.Module):
        return batch
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if isinstance(batch, Tensor):
        half = batch.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16)
        return batch.to(weight.device, weight.dtype if half else batch.dtype)
    if hasattr(batch, "keys"):
        return {k: on_device(model, batch[k]) for k in batch}
    if isinstance(batch, tuple | list):  # inputs first; targets keep their precision
        return tuple(on_device(model, b) if i == 0 else _move(b, weight.device) for i, b in enumerate(batch))
    return batch


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def temporary_hooks(handles: Sequence[Any]) -> Iterator[None]:
    """Remove the hooks with these handles at the end of the context."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Put the model into evaluation mode without key-value caches; restore each module's mode afterwards.

    A cache would only cost memory here, and a block that is run again would read its own earlier keys. A callable that
    is no module has no modes.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(m, m.training) for m in model.modules()]
    configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    caching = {id(c): c for c in configs if getattr(c, "use_cache", None) is True}.values()
    try:
        model.eval()
        for config in caching:
            with suppress(AttributeError, TypeError):  # an immutable config
                config.use_cache = False
        yield
    finally:
        for config in caching:
            with suppress(AttributeError, TypeError):
                config.use_cache = True
        for module, mode in modes:
            module.training = mode


@contextmanager
def trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Enable gradients for these parameters; frozen ones are frozen again afterwards."""
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
