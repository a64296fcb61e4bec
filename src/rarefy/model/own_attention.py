"""Modules of transformers whose attention is code of their own, with linear position biases (ALiBi): BLOOM and MPT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

MAX_BIAS = 8.0  # of both models, whatever their settings say


def is_known(model: nn.Module) -> bool:
    """Return whether attention of a model is one of these."""
    return any(original(m) in ATTENTION for m in model.modules())


def original(module: nn.Module) -> str:
    """Return the name of the class of transformers whose forward a module has, "" for others."""
    kind = next((c for c in type(module).__mro__ if "forward" in vars(c)), type(module))
    return kind.__name__ if kind.__module__.partition(".")[0] == "transformers" else ""


@contextmanager
def replaced(model: nn.Module, attend: Any) -> Iterator[None]:
    """Have `attend(module, q, k, v, mask, scaling=, max_bias=)` run the attention of known modules for a while.

    Queries, keys and values are [batch, heads, tokens, head_dim]; it returns [batch, tokens, heads, head_dim] first.
    """
    known = [(m, FORWARDS[original(m)]) for m in model.modules() if original(m) in FORWARDS]
    before = [vars(m).get("forward") for m, _ in known]  # such as hooks
    try:
        for module, forward in known:
            module.forward = partial(forward, module, attend)
        yield
    finally:
        for (module, _), own in zip(known, before):
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


def _bloom(module: Any, attend: Any, hidden_states: Tensor, residual: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Return BloomAttention's outputs."""
    heads = module.query_key_value(hidden_states).unflatten(2, (module.num_heads, -1)).transpose(1, 2)
    y = attend(module, *heads.chunk(3, -1), None, scaling=module.inv_norm_factor, max_bias=MAX_BIAS)[0]
    return module.dense(y.flatten(2)) + residual, None


def _bloom_gelu(module: Any, attend: Any, x: Tensor) -> Tensor:
    """Return BloomGelu's outputs, which an autograd function of its own computes."""
    return F.gelu(x, approximate="tanh")


def _mpt(module: Any, attend: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Return MptAttention's outputs."""
    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(-module.clip_qkv, module.clip_qkv)
    q, k, v = (t.unflatten(2, (module.n_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, 2))
    y = attend(module, q, k, v, None, scaling=module.softmax_scale, max_bias=MAX_BIAS)[0]
    return module.out_proj(y.flatten(2)), None


ATTENTION: dict[str, Callable[..., Any]] = {"BloomAttention": _bloom, "MptAttention": _mpt}
FORWARDS = {**ATTENTION, "BloomGelu": _bloom_gelu}  # of all modules that are replaced
