"""Frontiers as a search writes them, for tests: a realistic one, small ones, and one with hostile text."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from rarefy.search.frontier import Frontier, Point

DENSE_TIMES = {"1": 14.54, "16": 189.8}
METHODS = (  # name, loss in points, times as fast at both batches, bytes
    ("8 bits", -0.1, 2.7, 4.15, 23e6),
    ("bf16", 0.1, 2.2, 3.2, 45e6),
    ("8 bits, 10 % fewer neurons", 0.2, 2.8, 4.3, 22e6),
    ("8 bits, 25 % fewer neurons", 0.6, 3.12, 4.57, 20e6),
    ("8 bits, 25 % fewer neurons and heads", 1.3, 3.36, 4.86, 19e6),
    ("8 bits, 40 % fewer neurons", 2.2, 3.4, 5.0, 18.5e6),
    ("50 % zeros in 1x4 blocks", 3.4, 3.0, 4.4, 21e6),
    ("60 % zeros in 1x4 blocks, 8 bits", 5.1, 3.3, 4.9, 18e6),
    ("80 % zeros in 1x4 blocks, 8 bits", 14.0, 3.9, 5.6, 14e6),
    ("low rank 96", 6.5, 2.4, 3.6, 25e6),
)
HOSTILE = '<script>alert("1")</script>\'"&\x00\ud800 \u202e \N{SNOWMAN} 层 ' + "long " * 60


def quartiles(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.96 * median, "high": 1.07 * median}


def layers(count: int = 6) -> tuple[dict[str, Any], ...]:
    rows = []
    for i in range(count):
        for name, bits, share in (("query", 8, 0.3), ("output.dense", 8, 0.5), ("intermediate.dense", 8, 1.0)):
            cut = name == "intermediate.dense"
            rows.append(
                {
                    "layer": f"encoder.layer.{i}.{'' if cut else 'attention.'}{name}",
                    "choice": "8 bits, fewer neurons" if cut else "8 bits",
                    "sparsity": 0.25 + 0.05 * i if cut else 0.0,
                    "pattern": "neuron" if cut else "dense",
                    "bits": bits,
                    "kept": 1536 - 96 * i if cut else None,
                    "milliseconds": round(share * (1.9 - 0.1 * i), 3),
                    "loss": round(0.02 * share * (1 + i % 3), 4),
                    "why": "the next cut would lose more than its time is worth"
                    if cut
                    else "faster than fp32 at no loss",
                }
            )
    return tuple(rows)


def point(name: str, loss: float | None, speedups: tuple[float, float], size: float, number: int = 0) -> Point:
    speedup = dict(zip(DENSE_TIMES, speedups)) if loss is not None else {}
    predicted = {
        "loss": 0.0 if loss is None else loss * (0.8 + 0.02 * number),
        "milliseconds": {b: DENSE_TIMES[b] / s * 1.04 for b, s in zip(DENSE_TIMES, speedups)},
    }
    return Point(
        name=name,
        quality=None if loss is None else 61.8 - loss,
        loss=loss,
        milliseconds={b: quartiles(DENSE_TIMES[b] / s) for b, s in speedup.items()},
        speedup=speedup,
        disk_bytes=int(size) if loss is not None else 0,
        memory_bytes=int(1.1 * size) if loss is not None else 0,
        recipe={
            "name": "fast",
            "stages": [{"cut": {"units": "neuron", "keep": 0.75}}, {"quantize": {"weights": "int8"}}],
        },
        predicted=predicted if number >= 4 else {},
        layers=layers() if loss is not None else (),
        seconds=11.0 + 3 * number,
        error="" if loss is not None else "ModelError: encoder.layer.2 has no channels left",
    )


def dense() -> Point:
    times = {b: quartiles(t) for b, t in DENSE_TIMES.items()}
    return Point("dense", 61.8, 0.0, times, dict.fromkeys(times, 1.0), 90_900_000, 90_900_000, {"stages": []})


def realistic() -> Frontier:
    """Return 25 points in two batches, of which one failed, beside another engine."""
    points = []
    for i in range(24):
        name, loss, one, sixteen, size = METHODS[i % len(METHODS)]
        step = i // len(METHODS)
        wobble = 0.15 * step * math.sin(7.0 * i)
        mixed = f"{name}, {(3, 5)[step - 1]} layers in 4 bits" if step else name
        points.append(point(mixed, loss + wobble + 0.3 * step, (one + 0.1 * step, sixteen + 0.1 * step), size, i))
    points.insert(9, point("8 bits, all neurons cut", None, (3.0, 4.0), 1, 9))
    return Frontier(
        metric={"name": "R@1", "higher_is_better": True, "scale": " %"},
        targets={"max_loss": "1 point of R@1", "speedup": "4.5x", "maximize": "speed"},
        dense=dense(),
        points=tuple(points),
        best_index=3,
        met=True,
        verdict="The model is 4.57 times as fast at batch 16 and loses 0.6 points of R@1; the limit is 1 point.",
        machine={
            "cpu": "Intel(R) Xeon(R) Processor",
            "extensions": ["avx2", "avx512f", "avx512_vnni", "amx_bf16"],
            "cores": 2,
            "threads": 2,
            "load": 0.41,
            "versions": {"rarefy": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7"},
        },
        seconds=1794.0,
        finished="time",
        batches=("1", "16"),
        peers=(
            {"name": "OpenVINO int8", "quality": 62.3, "milliseconds": {"1": quartiles(8.48), "16": quartiles(86.2)}},
        ),
        notes=("Times were measured beside a load of 0.4.",),
        model="minilm",
        limits={"quality": 60.8, "milliseconds": {"1": 14.54 / 3, "16": 189.8 / 4.5}},
    )


def hostile() -> Frontier:
    """Return a frontier in which every text tries to be markup."""
    frontier = realistic()
    bad = [
        replace(
            p,
            name=f"{HOSTILE}{i}",
            error=HOSTILE if p.error else "",
            recipe={HOSTILE: [HOSTILE]},
            layers=tuple({**row, "layer": HOSTILE, "why": HOSTILE, HOSTILE: HOSTILE} for row in p.layers[:3]),
        )
        for i, p in enumerate(frontier.points)
    ]
    return replace(
        frontier,
        metric={"name": HOSTILE, "higher_is_better": False, "scale": HOSTILE},
        targets={HOSTILE: HOSTILE},
        points=tuple(bad),
        verdict=HOSTILE,
        machine={HOSTILE: {HOSTILE: [HOSTILE]}},
        finished=HOSTILE,
        peers=({**frontier.peers[0], "name": HOSTILE},),
        notes=(HOSTILE,),
        model=HOSTILE,
    )


def small(count: int) -> Frontier:
    """Return a frontier of so many points: 0, 1 or some."""
    points = realistic().points[:count]
    return replace(
        realistic(),
        points=points,
        best_index=0 if count else None,
        met=False,
        verdict="No model could be made." if not count else "Nothing is 9 times as fast: the products limit it.",
        peers=(),
    )
