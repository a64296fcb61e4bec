"""Inputs of sizes that an example did not have, and whether a compiled model answers at them as eager does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rarefy.common.errors import RarefyError
from rarefy.model.compare import relative_distance
from rarefy.model.forward import split_example

# batch size, what is added to the length of texts and sounds, and to height and width of images
FOREIGN = ((1, 0, (0, 0)), (3, 7, (0, 0)), (5, -3, (32, 64)), (4, 23, (0, 32)))
NEAR = 1e-3  # largest distance, relative to the norm of an output


def with_sizes(x: Mapping[str, Any] | Tensor, batch: int, longer: int, larger: tuple[int, int]) -> Any:
    """Return an example with other sizes, of other random numbers in the range of its own."""
    generator = torch.Generator().manual_seed(batch)

    def change(t: Tensor) -> Tensor:
        sizes = [batch, *t.shape[1:]]
        if t.dim() == 2 and not t.is_floating_point():
            sizes[1] = max(1, sizes[1] + longer)
        elif t.dim() == 4:
            sizes[2:] = [sizes[2] + larger[0], sizes[3] + larger[1]]
        elif t.dim() == 5:  # videos
            sizes[3:] = [sizes[3] + larger[0], sizes[4] + larger[1]]
        numbers = torch.randint(t.numel(), sizes, generator=generator)
        return t.flatten()[numbers]

    return pytree.tree_map_only(Tensor, change, dict(x) if isinstance(x, Mapping) else x)


def wrong_answers(model: Any, made: Any, x: Any) -> tuple[list[str], list[str]]:
    """Return at which foreign sizes a compiled model answers otherwise than eager, and at which it refuses.

    Sizes that the model itself does not take are left out.
    """
    wrong: list[str] = []
    refused: list[str] = []
    for sizes in FOREIGN:
        args, kwargs = split_example(with_sizes(x, *sizes))
        with torch.no_grad():
            try:
                want = model(*args, **kwargs)
            except Exception:  # its own limits, in whatever form
                continue
        try:
            got = made(*args, **kwargs)
        except RarefyError as error:
            refused.append(f"{sizes}: {error}")
            continue
        pairs = zip(
            *([t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)] for out in (got, want)), strict=True
        )
        far = max(relative_distance(a, b) for a, b in pairs)
        if not far <= NEAR:
            wrong.append(f"{sizes}: distance {far:.2g}")
    return wrong, refused
