"""How far a model's outputs move where its inputs change by a rounding error, as sums in another order do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rarefy.model.compare import relative_distance

CHANGE, TRIES = 4e-6, 3  # of inputs: as sums of some hundred products in another order; how often
NOISES, MOST = 2.0, 1.0  # times its effect that a difference may be; a difference that nothing excuses


def rounding_noise(
    run: Callable[[Any], Sequence[Tensor]],
    inputs: Any,
    outputs: Sequence[Tensor],
    *,
    change: float = torch.finfo(torch.float32).eps,
    norm: float = 2,
    floor: float = 1e-12,
    tries: int = 1,
) -> float:
    """Return how far outputs move, relative to their norm, where inputs change by a rounding error. A call a try.

    Some models magnify such errors by a thousand, and models with rounded activations by a million, where many values
    lie near the middle of two codes. Then no other order of sums gives the same outputs.

    Args:
        run: returns all tensors that the model returns for inputs.
        inputs: tensors, however nested; those of fp32 change.
        outputs: what `run` returned for them.
        change: of each value, relative; up and down in turns, and in later tries at random.
        norm: 2 for the Euclidean norm, `math.inf` for the largest entry.
        floor: smallest divisor.
        tries: how often other values go up; the largest distance counts.

    Returns:
        The largest distance of all floating-point outputs; 0 where that is not known, as for inputs without fp32.

    Example:
        >>> step = lambda x: [torch.round(1e6 * x)]
        >>> rounding_noise(step, torch.full((4,), 0.5), step(torch.full((4,), 0.5))) > 0
        False
        >>> rounding_noise(step, torch.full((4,), 0.5), step(torch.full((4,), 0.5)), change=4e-6) > 0
        True
    """
    random = torch.Generator().manual_seed(0)

    def moved(t: Any, nth: int) -> Any:
        if not isinstance(t, Tensor) or t.dtype != torch.float32:
            return t
        order = torch.randint(2, (t.numel(),), generator=random) if nth else torch.arange(t.numel())
        signs = torch.where(order.view(t.shape).to(t.device) % 2 == 0, 1.0, -1.0)
        return t * (1 + change * signs)

    largest = 0.0
    for nth in range(tries):
        try:
            other = run(pytree.tree_map(partial(moved, nth=nth), inputs))
        except Exception:  # a model that checks its inputs
            return 0.0
        pairs = [(a, b) for a, b in zip(other, outputs) if b.is_floating_point() and a.shape == b.shape]
        noise = max((relative_distance(a, b, norm=norm, floor=floor) for a, b in pairs), default=0.0)
        largest = max(largest, noise if math.isfinite(noise) else 0.0)
    return largest


def noise_of_sums(run: Callable[[Any], Sequence[Tensor]], inputs: Any, outputs: Sequence[Tensor]) -> float:
    """Return how far sums in another order may move outputs, see `rounding_noise`. Three calls."""
    return rounding_noise(run, inputs, outputs, change=CHANGE, tries=TRIES)


def is_excused(difference: float, noise: float) -> bool:
    """Return whether outputs that differ so much do so no more than rounding errors move the model's own.

    >>> is_excused(0.3, 0.2), is_excused(0.3, 0.1)
    (True, False)
    """
    return difference <= min(NOISES * noise, MOST)
