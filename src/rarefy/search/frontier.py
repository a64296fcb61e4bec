"""What a search has measured: every point it tried, which are on the Pareto front, and which is the best."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from rarefy.common.atomic_io import write_new_file
from rarefy.common.data_frame import data_frame
from rarefy.common.report import table
from rarefy.search.frontier_checks import check_frontier
from rarefy.search.html_report import frontier_page
from rarefy.search.report_text import size_text

SCHEMA = 1


@dataclass(frozen=True)
class Point:
    """One model that was made and measured as it is deployed.

    Attributes:
        name: short text, such as "int8, 25 % fewer neurons".
        quality: the metric of this very model; None where it could not be made.
        loss: how much worse than the dense model, in the unit of the limit: a fraction, or points. Negative: better.
        milliseconds: batch (of language models "decode", a token, and "prompt") -> {"median", "low", "high"}: quartiles
            of a call, in turns with the dense model in the same precision. The best point of a search of 2.5 minutes
            or more is timed once more at the end.
        speedup: batch -> times as fast as the dense model compiled in fp32: as the dense model in its precision is,
            times how much faster than that it is.
        disk_bytes: of the saved compiled model.
        memory_bytes: of its weights in memory.
        predicted: what the search expected before: {"loss": ..., "milliseconds": {batch: ...}}, at the speed of the
            machine when the point was timed; empty for the first points.
        recipe: the stages, as a recipe's dict.
        precision: of the engine: None for fp32, "bf16", "int16" or "int8".
        ignore: layers that stay in fp32 whatever the precision, as for `compile`.
        per_layer: layers with a precision of their own, as for `compile`.
        calibrated: whether scales in 8 bits are static, found on the calibration data.
        cache_precision: of a language model's KV cache, "fp32" or "int8".
        checked_loss: the loss on evaluation data that the search has not used, in the unit of `loss`; None for points
            that were not measured there.
        layers: one row per layer or group: layer, choice, sparsity, pattern, bits, kept, milliseconds, loss, why.
        seconds: what making and measuring it took.
        error: why it could not be made; "" where it was.
    """

    name: str
    quality: float | None
    loss: float | None
    milliseconds: Mapping[str, Mapping[str, float]]
    speedup: Mapping[str, float]
    disk_bytes: int
    memory_bytes: int
    recipe: Mapping[str, Any]
    precision: str | None = None
    predicted: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0
    error: str = ""
    ignore: tuple[str, ...] = ()
    per_layer: Mapping[str, str] = field(default_factory=dict)
    calibrated: bool = False
    cache_precision: str = "fp32"
    checked_loss: float | None = None

    @property
    def slowest(self) -> float:
        """Return the smallest speed-up of all batches; 0 for a point that could not be built."""
        return min(self.speedup.values(), default=0.0)


@dataclass(frozen=True)
class Best:
    """The best model itself.

    Attributes:
        model: as it is deployed and was measured: compiled, or a decoder for a language model.
        compressed: the torch model that it was made from. `rarefy.compress_(model, best.point.recipe, best.data)` makes
            it again of the dense model, with the same weights.
        point: what was measured of it.
        data: the batches that its recipe reads, by purpose: "calibrate" and "train".
    """

    model: Any
    compressed: nn.Module
    point: Point
    data: Mapping[str, Sequence[Any]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Frontier:
    """The result of `rarefy.optimize`: all points, and the best one for the targets.

    Attributes:
        metric: {"name", "higher_is_better", "scale"}.
        targets: what was asked for, by name: max_loss, speedup and objective as text, latency_ms, size_mb and memory_mb
            as numbers.
        dense: the model before, compiled in fp32: quality, milliseconds and bytes.
        points: all that was tried, in this order.
        best_index: the point that meets the targets best, or else comes nearest; None where none could be made.
        met: whether it meets all of them.
        verdict: a sentence that says so, and what blocks it where not.
        machine: CPU, instruction sets, threads, load, versions.
        seconds: of the whole search.
        finished: why the search ended: "done", "time", "interrupted".
        batches: what was timed: batch sizes such as "1" and "16", or "decode" and "prompt".
        peers: other engines that were measured beside, rows of name, quality, milliseconds and speedup (as those of
            points).
        notes: sentences about the search.
        model: the model as the user named it, such as "minilm"; "" where it has no name.
        limits: the targets as numbers, for plots: "quality" (of the metric), "milliseconds" (batch -> number).
        best: the best model itself; None in a frontier that was read from a file, or where no model could be made.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 8)).eval()
        >>> from rarefy.search.optimize import optimize
        >>> frontier = optimize(net, torch.randn(2, 64), max_loss="50%", minutes=0.05)
        >>> frontier.met, len(frontier.points) >= 1
        (True, True)
    """

    metric: Mapping[str, Any]
    targets: Mapping[str, Any]
    dense: Point
    points: tuple[Point, ...]
    best_index: int | None
    met: bool
    verdict: str
    machine: Mapping[str, Any]
    seconds: float
    finished: str
    batches: tuple[str, ...]
    peers: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    model: str = ""
    limits: Mapping[str, Any] = field(default_factory=dict)
    best: Best | None = field(default=None, repr=False, compare=False)

    @property
    def best_point(self) -> Point | None:
        """Return the best point, or None."""
        return None if self.best_index is None else self.points[self.best_index]

    def front(self) -> tuple[Point, ...]:
        """Return the points that no other one beats in both loss and speed, the fastest last."""
        return pareto(self.points)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and text."""
        values = {name: getattr(self, name) for name in SAVED}
        values |= {"dense": asdict(self.dense), "points": [asdict(p) for p in self.points]}
        return {"schema": SCHEMA, **json.loads(json.dumps(values, allow_nan=False))}

    def to_json(self) -> str:
        """Return the frontier as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def report(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write the frontier as one self-contained HTML page, atomically.

        Args:
            path: the file to write, such as "report.html".
            overwrite: replace a file that exists.

        Returns:
            The path.

        Raises:
            ContainerError: the file exists, or cannot be written.
        """
        return write_new_file(path, frontier_page(self), overwrite)

    def to_pandas(self) -> Any:
        """Return a data frame of pandas with a row for the dense model and one for each point, in the order tried.

        Columns: model, quality, loss, checked_loss; for each batch the median of milliseconds and the speed-up;
        disk_bytes, memory_bytes, precision (of most layers), on_front, best, error.

        Raises:
            DataError: pandas is not installed.
        """
        front, best = self.front(), self.best_point
        return data_frame(
            {
                "model": "dense" if p is self.dense else p.name,
                "quality": p.quality,
                "loss": p.loss,
                "checked_loss": p.checked_loss,
                **{f"batch {b}, ms": p.milliseconds.get(b, {}).get("median") for b in self.batches},
                **{f"batch {b}, speedup": p.speedup.get(b) for b in self.batches},
                "disk_bytes": p.disk_bytes,
                "memory_bytes": p.memory_bytes,
                "precision": p.precision or "fp32",
                "on_front": any(p is f for f in front),
                "best": p is best,
                "error": p.error,
            }
            for p in (self.dense, *self.points)
        )

    def __str__(self) -> str:
        best, points = self.best_point, [self.dense, *(p for p in self.front() if p != self.dense)]
        if best is not None and best not in points:  # it is faster over all batches, but not in the slowest
            points.append(best)
        rows = [self._row(p, "dense" if p is self.dense else "") for p in points]
        rows = [{**row, "best": "*" if p == best else ""} for row, p in zip(rows, points)]
        rows += [self._engine_row(p) for p in self.peers]
        tried = f"{len(self.points)} models tried in {self.seconds / 60:.1f} minutes"
        return "\n".join([f"{self.metric['name']}: {tried}", "", table(rows), "", self.verdict, *self.notes])

    def _row(self, point: Point, name: str) -> dict[str, Any]:
        quality = "-" if point.quality is None else f"{point.quality:.4g}{self.metric.get('scale', '')}"
        times = {
            f"batch {b}, ms": f"{t['median']:.3g} ({point.speedup.get(b, 1.0):.2f}x)"
            for b, t in point.milliseconds.items()
        }
        return {"model": name or point.name, "quality": quality, **times, "MB": size_text(point.disk_bytes)}

    def _engine_row(self, peer: Mapping[str, Any]) -> dict[str, Any]:
        times, speedup = peer.get("milliseconds", {}), peer.get("speedup", {})
        point = Point(peer["name"], peer.get("quality"), None, times, speedup, 0, 0, {}, None)
        return {**self._row(point, ""), "MB": "", "best": ""}


SAVED = tuple(f.name for f in fields(Frontier) if f.name != "best")


def pareto(points: Sequence[Point]) -> tuple[Point, ...]:
    """Return the points that no other one beats in both loss and the smallest speed-up, the fastest last."""
    measured = [p for p in points if p.loss is not None]
    best: list[Point] = []
    for point in sorted(measured, key=lambda p: (-p.slowest, p.loss)):
        if not best or point.loss < best[-1].loss:  # type: ignore[operator]
            best.append(point)
    return tuple(reversed(best))


def _point(data: Mapping[str, Any]) -> Point:
    return Point(**{**data, **{name: tuple(data.get(name, ())) for name in ("layers", "ignore")}})


def frontier_from_dict(data: Any) -> Frontier:
    """Return a frontier from what `Frontier.to_dict` wrote; ContainerError for anything else."""
    check_frontier(data, SCHEMA)
    values = {name: data[name] for name in SAVED if name in data}
    points = tuple(map(_point, data["points"]))
    dense = _point(data["dense"])
    lists = {n: tuple(values[n]) for n in ("batches", "peers", "notes") if n in values}
    return Frontier(**{**values, **lists, "dense": dense, "points": points})
