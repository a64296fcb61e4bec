"""The precision of single layers, where it differs from that of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from rarefy.common.errors import ModelError, unknown
from rarefy.compiler import ops
from rarefy.compiler.fx_utils import ExportedGraph, Node
from rarefy.model.layers import Selector, all_layers, ignored_modules, match_layers, module_names

PRECISIONS = ("fp32", "bf16", "int16", "int8")
SHOWN = 4  # names in a note


def layer_precisions(model: nn.Module, ignore: Selector, per_layer: Any) -> dict[str, str | None]:
    """Return the precision of each module that `ignore` or `per_layer` of `compile` selects, None for fp32.

    Raises:
        ModelError: for a `per_layer` that is no dict of precisions, or names a layer of `ignore`.
        SelectorError: for a selector that matches no layer.

    Example:
        >>> layer_precisions(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), "0", {"1": "int16"})
        {'0': None, '1': 'int16'}
    """
    ignored = ignored_modules(model, ignore)
    own: dict[str, str | None] = dict.fromkeys(ignored)
    if per_layer is None:
        return _by_all_names(model, own)
    if not isinstance(per_layer, Mapping):
        raise ModelError(f'per_layer: expected precisions by layer, such as {{"head": "bf16"}}, got {per_layer!r}')
    for selector, precision in per_layer.items():
        if precision not in PRECISIONS:
            raise ModelError(unknown("precision", str(precision), PRECISIONS, f"per_layer of {selector!r}"))
        for name in module_names(match_layers(all_layers(model), selector, "per_layer")):
            if name in ignored:
                raise ModelError(
                    f"per_layer: {name!r} is also in ignore, which keeps it in fp32: remove it from one of the two"
                )
            own[name] = None if precision == "fp32" else precision
    return _by_all_names(model, own)


def _by_all_names(model: nn.Module, own: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return precisions by each name of their modules: torch.export may name another one of a module that is
    registered twice."""
    named = [*model.named_modules(remove_duplicate=False)]
    chosen = {id(m): own[n] for n, m in named if n in own}
    return {n: chosen[id(m)] for n, m in named if id(m) in chosen}


def kinds_of_layers(exported: ExportedGraph, kernels: Mapping[Node, Any]) -> dict[str, str]:
    """Return the kind of weight with which the engine runs each linear layer and convolution that has a kernel."""
    nodes = [n for n in kernels if n.target in (ops.linear, ops.conv2d) and n in exported.layers]
    return {exported.layers[n]: kernels[n].held[0].kind for n in nodes}


def without_kernels(
    exported: ExportedGraph, kernels: Mapping[Node, Any], wanted: Mapping[str, str | None]
) -> tuple[str, ...]:
    """Return a note about layers that have no kernel in the 16 bits that are wanted of them, if there are any."""
    kinds, known = kinds_of_layers(exported, kernels), {*exported.layers.values()}
    names = sorted(n for n, precision in wanted.items() if n in known and kinds.get(n, "fp32") == "fp32")
    if not names:
        return ()
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (f"per_layer: these layers have no kernel in 16 bits and run in fp32: {', '.join(names[:SHOWN])}{more}",)
