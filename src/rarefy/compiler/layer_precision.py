"""The precision of single layers, where it differs from that of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from rarefy.common.errors import ModelError, unknown
from rarefy.model.layers import Selector, all_layers, ignored_modules, match_layers, module_names

PRECISIONS = ("fp32", "bf16", "int16", "int8")


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
        return own
    if not isinstance(per_layer, Mapping) or not per_layer:
        raise ModelError(f'per_layer: expected precisions by layer, such as {{"head": "bf16"}}, got {per_layer!r}')
    for selector, precision in per_layer.items():
        if precision not in PRECISIONS:
            raise ModelError(f"per_layer: {unknown('precision', str(precision), PRECISIONS)}")
        for name in module_names(match_layers(all_layers(model), selector, "per_layer")):
            if name in ignored:
                raise ModelError(f"per_layer: {name!r} is in ignore too, which keeps it in fp32: name it once")
            own[name] = None if precision == "fp32" else precision
    return own
