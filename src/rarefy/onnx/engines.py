"""Exported models in ONNX Runtime and OpenVINO, called as the model that they were exported from."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError
from rarefy.model.forward import call, evaluating
from rarefy.onnx.example_calls import example_call
from rarefy.onnx.runtimes import THREADS, session_for_timing

Feed = Mapping[str, np.ndarray]
Outputs = Sequence[Any]  # arrays
Call = Callable[[], Any]
ATTENTION = ("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention")
FURTHEST = 4  # operators from a softmax to the product of matrices in attention


@dataclass(frozen=True)
class Started:
    """An engine that runs the model.

    Attributes:
        run: returns the outputs for inputs of any batch size.
        fixed: returns calls on inputs whose sizes may be fixed, by the engine's setting; "" where there is one alone.
    """

    run: Callable[[Feed], Outputs]
    fixed: Callable[[Feed], Mapping[str, Call]]


@dataclass(frozen=True)
class Callee:
    """An engine that is called as the dense model is, and returns what it returns.

    Attributes:
        dense: the model, which names its inputs.
        run: the engine.
        spec: how the dense model's outputs are nested.
    """

    dense: nn.Module
    run: Callable[[Feed], Outputs]
    spec: Any

    def eval(self) -> Callee:
        """Return the engine: it is always in evaluation mode."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.run(feed_of(self.dense, kwargs or args))
        return pytree.tree_unflatten([torch.from_numpy(np.array(y)) for y in outputs], self.spec)


def nesting_of(dense: nn.Module, example: Any) -> Any:
    """Return how the model's outputs are nested; ModelError for outputs that are no tensors."""
    with evaluating(dense), torch.no_grad():
        leaves, spec = pytree.tree_flatten(call(dense, example))
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise ModelError("the model returns more than tensors")
    return spec


def feed_of(dense: nn.Module, inputs: Any) -> dict[str, np.ndarray]:
    """Return inputs as arrays by the names that the file has for them."""
    return {n: t.numpy() for n, t in example_call(dense, inputs).inputs.items()}


def onnx_runtime(file: Path) -> Started:
    """Return ONNX Runtime with a file: with threads that sleep, and where sizes are fixed also with those that spin."""
    session = cache(partial(session_for_timing, file, torch.get_num_threads(), True))
    return Started(
        partial(session(False).run, None),
        lambda feed: {setting: partial(session(spins).run, None, feed) for setting, spins in THREADS.items()},
    )


def openvino(file: Path, precision: str = "f32", change: Callable[[Any], Any] = lambda network: network) -> Started:
    """Return OpenVINO with a file, of which `change` returns another network."""
    from openvino import Core  # pyright: ignore[reportMissingImports]

    core: Any = Core()
    network = change(core.read_model(str(file)))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = core.compile_model(network, "CPU", settings)

    def fixed(feed: Feed) -> Mapping[str, Call]:
        copy = network.clone()
        copy.reshape({n: list(a.shape) for n, a in feed.items()})
        return {"": partial(core.compile_model(copy, "CPU", settings), feed, share_outputs=True)}

    return Started(lambda feed: [np.array(y) for y in compiled(feed).values()], fixed)


def settings_note(name: str, settings: Mapping[str, str]) -> list[str]:
    """Return a note on the fastest setting of an engine at each batch size; none where it has one setting alone.

    >>> settings_note("ONNX Runtime", {"1": "threads spin", "8": "threads sleep", "16": "threads spin"})
    ['ONNX Runtime was timed with its fastest setting: threads spin at batch 1, 16; threads sleep at batch 8']
    """
    sizes = {s: ", ".join(b for b, other in settings.items() if other == s) for s in settings.values() if s}
    text = "; ".join(f"{setting} at batch {where}" for setting, where in sizes.items())
    return [f"{name} was timed with its fastest setting: {text}"] if text else []


def has_attention(file: Path) -> bool:
    """Return whether a file has an operator for attention, or multiplies matrices with a softmax.

    Operators between the two, such as the choice that removes NaN, may be FURTHEST.
    """
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    return any(_attends(nodes) for nodes in (model.graph.node, *(f.node for f in model.functions)))


def _attends(nodes: Iterable[Any]) -> bool:
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def reaches_product(node: Any, steps: int) -> bool:
        following = [r for name in node.output for r in readers.get(name, [])]
        return any(r.op_type == "MatMul" or (steps > 1 and reaches_product(r, steps - 1)) for r in following)

    return any(n.op_type in ATTENTION or (n.op_type == "Softmax" and reaches_product(n, FURTHEST)) for n in nodes)


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings and messages of other packages."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # NNCF prints progress bars
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
