"""How reports write the numbers of a frontier."""

from __future__ import annotations

import math
from typing import Any

from rarefy.common.report import three_digits
from rarefy.evaluation.svg_plot import shortened

RELATIVE_ERROR = 1e-3  # qualities that differ by less than this fraction do not show the unit of losses


def metric_name(frontier: Any) -> str:
    """Return the name of the metric, shortened."""
    return shortened(frontier.metric["name"], 40)


def unit(frontier: Any) -> str:
    """Return what follows a quality, such as " %", shortened."""
    return shortened(frontier.metric.get("scale", ""), 8)


def quality_text(frontier: Any, value: float | None) -> str:
    """Return a quality with as many decimals as give that of the dense model four digits."""
    size = math.floor(math.log10(abs(frontier.dense.quality))) if frontier.dense.quality else 0
    return "-" if value is None else f"{value:,.{min(max(3 - size, 0), 6)}f}{unit(frontier)}"


def loss_text(frontier: Any, value: float | None) -> str:
    """Return a loss without its unit: percent of the dense quality, or points."""
    return "-" if value is None else f"{100 * value if loss_is_relative(frontier) else value:+.2f}"


def compile_options(runs: Any, calibrated: bool) -> str:
    """Return the options of `rarefy.compile` for a variant or a point, as Python writes them.

    >>> from rarefy.search.deploy import Variant
    >>> compile_options(Variant("int8", "int8", ignore=("stem",)), calibrated=True)
    "precision='int8', ignore=['stem'], calibrate=data"
    """
    options = f"precision={runs.precision!r}"
    options += f", ignore={list(runs.ignore)!r}" if runs.ignore else ""
    options += f", per_layer={dict(runs.per_layer)!r}" if runs.per_layer else ""
    options += ", calibrate=data" if calibrated else ""
    return options + (f", cache_precision={runs.cache_precision!r}" if runs.cache_precision != "fp32" else "")


def loss_unit(frontier: Any) -> str:
    """Return the unit of `loss_text`."""
    return "%" if loss_is_relative(frontier) else "points"


def loss_is_relative(frontier: Any) -> bool:
    """Return whether losses are fractions of the dense quality, as the limit says or the points show; else they are
    differences."""
    limit = str(frontier.targets.get("max_loss", "")).split()
    if limit and limit[-1] in ("%", "point", "points"):
        return limit[-1] == "%"
    dense = frontier.dense.quality
    if not dense:
        return False
    for point in frontier.points:
        if point.quality is not None and point.loss is not None:
            difference = abs(point.quality - dense)
            if difference > RELATIVE_ERROR * abs(dense):
                return abs(abs(point.loss) - difference / abs(dense)) <= abs(abs(point.loss) - difference)
    return True


def batch_name(batch: str) -> str:
    """Return what a timed batch is called: "batch 16", or "decode" as it is."""
    return f"batch {batch}" if batch.isdigit() else shortened(batch, 20)


def time_text(point: Any, batch: str) -> str:
    """Return the median milliseconds of a batch."""
    time = point.milliseconds.get(batch)
    return "-" if time is None else three_digits(time["median"])


def size_text(count: int) -> str:
    """Return a number of bytes in MB, without the unit; 0 is unknown.

    >>> size_text(12_345), size_text(89_652_897), size_text(0)
    ('0.0123', '89.7', '-')
    """
    if not count:
        return "-"
    return three_digits(count / 1e6) if count < 1e6 else f"{count / 1e6:,.1f}"


def kind_of(frontier: Any, point: Any) -> str:
    """Return the kind of mark of a point: "best", "on-front" or "tried"."""
    if point is frontier.best_point:
        return "best"
    return "on-front" if any(point is other for other in frontier.front()) else "tried"
