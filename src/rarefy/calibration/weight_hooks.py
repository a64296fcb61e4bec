"""Hooks that run before a layer's weight is used: one for each way in which modules use their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from rarefy.model.layers import Layer
from rarefy.model.moe import Rows, observing_experts

OnInput = Callable[[Layer, nn.Module, Any], None]


@contextmanager
def weight_hooks(model: nn.Module, layers: Sequence[Layer], on_input: OnInput) -> Iterator[None]:
    """Call `on_input(layer, module, input)` each time a layer's weight is about to be used."""
    parents = {id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    experts: dict[nn.Module, dict[str, Layer]] = {}
    with ExitStack() as stack:
        for layer in layers:
            for _, module, param in layer.owners:
                parent = parents.get(id(module))
                if layer.layout.kind == "experts":
                    experts.setdefault(module, {})[param] = layer
                elif parent is not None:
                    stack.enter_context(_before_out_proj(parent, layer, on_input))
                elif isinstance(module, nn.MultiheadAttention):
                    _on_call(stack, module, _attention_hook(layer, on_input))
                else:
                    _on_call(stack, module, _plain_hook(layer, on_input))
        for module, params in experts.items():
            stack.enter_context(observing_experts(module, partial(_before_experts, module, params, on_input)))
        yield


def _before_experts(
    module: nn.Module, params: dict[str, Layer], on_input: OnInput, param: str, rows: Rows, out: Rows | None
) -> None:
    if out is None and param in params:
        on_input(params[param], module, rows)


def _on_call(stack: ExitStack, module: nn.Module, hook: Any) -> None:
    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _plain_hook(layer: Layer, on_input: OnInput) -> Any:
    return lambda m, args, kwargs: on_input(layer, m, args[0] if args else next(iter(kwargs.values())))


def _attention_hook(layer: Layer, on_input: OnInput) -> Any:
    names = ("query", "key", "value")

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        q, k, v = ({**dict(zip(names, args)), **kwargs}[n] for n in names)
        separate = {"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}
        on_input(layer, module, separate.get(layer.param, (q, k, v)))

    return hook


def identity_like(real: Any) -> Any:
    """Return a square layer of the same class that returns its input."""
    eye = torch.eye(real.in_features, dtype=real.weight.dtype, device=real.weight.device)
    same = type(real)(real.in_features, real.in_features, dtype=eye.dtype, device=eye.device)
    same.weight, same.bias = nn.Parameter(eye, False), nn.Parameter(torch.zeros_like(eye[0]), False)
    return same


@contextmanager
def _before_out_proj(parent: nn.MultiheadAttention, layer: Layer, on_input: OnInput) -> Iterator[None]:
    """Hook the output projection of MultiheadAttention: the attention runs with the identity, then it is applied."""
    real = parent.out_proj

    def enter(*_: Any) -> None:
        parent.out_proj = identity_like(real)

    def leave(_: Any, args: Any, out: Any) -> Any:
        parent.out_proj = real
        on_input(layer, parent, out[0])
        return (nn.functional.linear(out[0], real.weight, real.bias), *out[1:])

    handles = [parent.register_forward_pre_hook(enter), parent.register_forward_hook(leave)]
    try:
        yield
    finally:
        parent.out_proj = real
        for handle in handles:
            handle.remove()
