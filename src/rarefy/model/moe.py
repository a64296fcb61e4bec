"""Mixtures of experts in transformers: one tensor [experts, out, in] for all experts, used within one forward.

Recognized by the attributes that transformers' decorator sets on such a module, so that transformers is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

EXPERT_ATTRIBUTES = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "down_proj")
EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")

Rows = list[Tensor]  # [tokens, width] of each expert
ExpertObserver = Callable[[str, Rows, Rows | None], None]  # (parameter, inputs, outputs or None before the product)


def is_experts(module: nn.Module) -> bool:
    """Return whether a module holds the weights of several experts as single tensors."""
    if not all(hasattr(module, m) for m in EXPERT_ATTRIBUTES):
        return False
    down = module.down_proj
    return isinstance(down, Tensor) and down.dim() == 3


def expert_weights(module: Any) -> list[str]:
    """Return the names of a module's expert weights, in the order of their use."""
    return ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"] if is_experts(module) else []


@contextmanager
def observing_experts(module: nn.Module, observe: ExpertObserver) -> Iterator[None]:
    """Run the module expert by expert; call `observe` before and after each matrix product."""
    patched = module.__dict__.get("forward")  # another library may have patched it
    module.forward = lambda hidden_states, top_k_index, top_k_weights: _forward(  # type: ignore[method-assign]
        module, observe, hidden_states, top_k_index, top_k_weights
    )
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if patched is not None:
            module.forward = patched  # type: ignore[method-assign]


def _forward(m: Any, observe: ExpertObserver, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    routes = [torch.where(index == e) for e in range(m.num_experts)]
    up, down = expert_weights(m)
    inner = _expert_linear(m, up, [x[tokens] for tokens, _ in routes], observe)
    inner = [m._apply_gate(h) if m.has_gate else m.act_fn(h) for h in inner]
    outer = _expert_linear(m, down, inner, observe)
    out = torch.zeros_like(x)
    for (tokens, slot), y in zip(routes, outer):
        y = m.post_expert_norm(y) if getattr(m, "has_post_expert_norm", False) else y
        out.index_add_(0, tokens, (y * weights[tokens, slot, None]).to(out.dtype))
    return out


def _expert_linear(m: Any, name: str, rows: Rows, observe: ExpertObserver) -> Rows:
    observe(name, rows, None)
    weight = getattr(m, name)  # after `see`, which may have changed it
    weight = weight if m.is_transposed else weight.transpose(1, 2)
    out = [r @ w.to(r.dtype) for r, w in zip(rows, weight)]
    if m.has_bias:
        out = [y + b.to(y.dtype) for y, b in zip(out, getattr(m, f"{name}_bias"))]
    observe(name, rows, out)
    return out
