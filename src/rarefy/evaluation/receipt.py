"""The receipt: measurements before and after a compression, from one run, as text and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from rarefy.common.data_frame import data_frame
from rarefy.common.errors import ContainerError, first_line
from rarefy.common.report import table

SIDES = ("before", "after")
LISTS = ("speed", "stages", "notes", "samples", "runtimes")  # fields that hold one entry per measurement


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The measurements of one compression. Sizes are in bytes, sparsity is a fraction; each speed names its unit.

    Args:
        name: name of the recipe.
        quality: metric, before, after, change (relative), allowed (largest relative loss, or None), passed; more:
            before and after of what was measured beside it, by name.
        disk: before, after, same_precision (dense bytes at the precision of the result).
        memory: before, after (parameters and buffers), peak_rss of the process.
        sparsity: asked, achieved, weights, zeros, model_before and model_after (fractions of zeros of the whole model),
            and layers with one row per layer; empty where nothing was pruned.
        speed: one row per measurement: what, before, after (accelerated), unit, with quartiles.
        flops: what, before, after.
        stages: the reports of all stages but `prune`, whose rows are those of the sparsity.
        settings: seed, seconds, machine, and with an engine what ran.
        notes: remarks for the user.
        samples: prompt, before, after: the continuations of a prompt by both models.
        runtimes: one row for each engine that the result was measured in: runtime, quality, milliseconds (batch ->
            quartiles), all timed in turns.

    Example:
        >>> print(Receipt(name="half", disk={"before": 100, "after": 50}))
        Receipt: half
        <BLANKLINE>
        measured       before  after  change
        bytes on disk  100     50     0.500x
    """

    name: str
    quality: Mapping[str, Any] = field(default_factory=dict)
    disk: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    sparsity: Mapping[str, Any] = field(default_factory=dict)
    speed: tuple[Mapping[str, Any], ...] = ()
    flops: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Mapping[str, Any], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    runtimes: tuple[Mapping[str, Any], ...] = ()

    @property
    def passed(self) -> bool:
        """Return whether the quality is within the limit of the recipe; True if it has none."""
        return self.quality.get("passed") is not False

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return json.loads(self.to_json())

    def files(self) -> dict[str, bytes]:
        """Return the receipt files that are saved with a model."""
        return {"receipt.json": self.to_json().encode(), "receipt.txt": str(self).encode()}

    def to_json(self) -> str:
        """Return the receipt as JSON text."""
        return json.dumps(self.__dict__, indent=1, allow_nan=False)

    def __str__(self) -> str:
        return self._text(layers=True)

    def summary(self) -> str:
        """Return the receipt as text without the table of layers: what the command line prints."""
        return self._text(layers=False)

    def rows(self) -> list[dict[str, str]]:
        """Return what was measured as rows of text: measured, before, after, change."""
        return [*self._quality(), *self._units(), *self._bytes(), *self._speed(), *self._runtimes()]

    def to_pandas(self, layers: bool = False) -> Any:
        """Return what was measured as a data frame of pandas: measured, unit, before, after, as plain numbers.

        Times and rates are medians. With `layers` the frame has a row for each pruned layer.

        Raises:
            DataError: pandas is not installed.
        """
        return data_frame(self.sparsity.get("layers", ()), first="layer") if layers else data_frame(self.numbers())

    def numbers(self) -> list[dict[str, Any]]:
        """Return what was measured as numbers, in the order of `rows`."""
        q, rows = self.quality, list[dict[str, Any]]()

        def add(what: str, unit: str, before: Any, after: Any) -> None:
            rows.append({"measured": what, "unit": unit, "before": before, "after": after})

        if q:
            for name, values in {q["metric"]: q, **q.get("more", {})}.items():
                add(name, "", values["before"], values["after"])
        for name, pair in (("bytes on disk", self.disk), ("bytes in memory", self.memory)):
            if pair:
                add(name, "bytes", pair["before"], pair["after"])
        if self.sparsity:
            add("sparsity of the model", "", self.sparsity["model_before"], self.sparsity["model_after"])
        if self.flops:
            add(f"FLOPs, {self.flops['what']}", "FLOPs", self.flops["before"], self.flops["after"])
        for s in self.speed:
            for side, what in (("after", s["what"]), ("accelerated", f"{s['what']}, skipping zeros")):
                if side in s:
                    add(what, s["unit"], s["before"]["median"], s[side]["median"])
        for r in self.runtimes:
            add(f"{q['metric']}, {r['runtime']}", "", None, r["quality"])
            for batch, t in r["milliseconds"].items():
                add(f"forward, batch {batch}, {r['runtime']}", "ms", None, t["median"])
        return rows

    def _text(self, layers: bool) -> str:
        lines = [f"Receipt: {self.name}", ""]
        if layers and self.sparsity.get("layers"):
            lines += [table(_grouped(self.sparsity["layers"])), ""]
        rows = self.rows()
        if rows:
            lines += [table(rows), ""]
        settings = self.settings
        for sample in self.samples:
            lines += [f"{sample['prompt']} ...", *(f"  {s}: {sample[s]}" for s in SIDES if s in sample), ""]
        if settings.get("runs"):
            lines.append("; ".join(f"{side}: {settings['runs'][side]}" for side in SIDES))
        if settings:
            machine = settings.get("machine", {})
            where = (
                f"{machine.get('cpu', '?')}, {machine.get('threads', '?')} threads, torch {machine.get('torch', '?')}"
            )
            state = f"seed {settings.get('seed', '?')}, load {machine.get('load', '?')}"
            lines.append(f"{settings.get('seconds', 0):.0f} s on {where}, {state}")
        lines += [
            f"{s['title']}: {_stage_summary(s)}" for s in self.stages if s["title"] not in SHOWN and _stage_summary(s)
        ]
        lines += [f"note: {n}" for n in self.notes]
        return "\n".join(lines).rstrip()

    def _quality(self) -> list[dict[str, str]]:
        q = self.quality
        if not q:
            return []
        verdict = "" if q.get("allowed") is None else f" ({'within' if q['passed'] else 'OVER'} {q['allowed']:.0%})"
        change = f"{q['change']:+.1%}{verdict}"
        more = [_row(n, f"{v['before']:.4g}", f"{v['after']:.4g}", "") for n, v in q.get("more", {}).items()]
        return [_row(q["metric"], f"{q['before']:.4g}", f"{q['after']:.4g}", change), *more]

    def _units(self) -> list[dict[str, str]]:
        """Return what cuts left, by kind of unit."""
        rows = []
        for stage in self.stages:
            if stage["title"] == "layers":
                before, after = stage["summary"]["blocks"].split(" -> ")
                rows.append(_row("blocks", before, after, ""))
            kinds: dict[str, list[tuple[int, int]]] = {}
            for r in stage["rows"] if stage["title"] == "cut" else ():
                before, after = map(int, r["units"].split(" -> "))
                if after < before:
                    kinds.setdefault(r["kind"], []).append((before, after))
            for kind, pairs in kinds.items():
                before, after = (sum(p[i] for p in pairs) for i in (0, 1))
                rows.append(
                    _row(f"{kind}s of {len(pairs)} groups", f"{before:,}", f"{after:,}", f"{after / before:.3f}x")
                )
        return rows

    def _bytes(self) -> list[dict[str, str]]:
        rows = []
        if self.disk:
            rows.append(_row("bytes on disk", f"{self.disk['before']:,}", f"{self.disk['after']:,}", _times(self.disk)))
            if self.disk.get("same_precision") not in (None, self.disk["before"]):
                same = self.disk["same_precision"]
                rows.append(_row("  dense, same precision", f"{same:,}", "", f"{self.disk['after'] / same:.3f}x"))
        if self.memory:
            before, after = f"{self.memory['before']:,}", f"{self.memory['after']:,}"
            rows.append(_row("bytes in memory", before, after, _times(self.memory)))
            if self.memory.get("peak_rss"):
                rows.append(_row("peak RSS of the run", "", f"{self.memory['peak_rss']:,}", ""))
        if self.sparsity:
            s = self.sparsity
            rows.append(_row("sparsity of pruned layers", "asked " + f"{s['asked']:.2%}", f"{s['achieved']:.2%}", ""))
            rows.append(_row("sparsity of the model", f"{s['model_before']:.2%}", f"{s['model_after']:.2%}", ""))
        if self.flops:
            name = f"FLOPs, {self.flops['what']}"
            rows.append(_row(name, f"{self.flops['before']:,}", f"{self.flops['after']:,}", _times(self.flops)))
        return rows

    def _speed(self) -> list[dict[str, str]]:
        rows = []
        for s in self.speed:
            for side, what in (("after", f"{s['what']}, {s['unit']}"), ("accelerated", "  skipping zeros")):
                if side not in s:
                    continue
                before, after = (
                    f"{s[k]['median']:,.4g} ({s[k]['low']:,.4g}-{s[k]['high']:,.4g})" for k in (SIDES[0], side)
                )
                ratio = s[side]["median"] / s["before"]["median"]
                faster = ratio if s["unit"].endswith("/s") else 1 / ratio
                rows.append(_row(what, before, after, f"{faster:.2f}x as fast"))
        return rows

    def _runtimes(self) -> list[dict[str, str]]:
        """Quality and times of the result in each engine."""
        rows = []
        for r in self.runtimes:
            rows.append(_row(f"{self.quality['metric']}, {r['runtime']}", "", f"{r['quality']:.4g}", ""))
            for batch, t in r["milliseconds"].items():
                text = f"{t['median']:,.4g} ({t['low']:,.4g}-{t['high']:,.4g})"
                rows.append(_row(f"  forward, batch {batch}, ms", "", text, ""))
        return rows


def _row(what: str, before: str, after: str, change: str) -> dict[str, str]:
    return {"measured": what, "before": before, "after": after, "change": change}


def _times(pair: Mapping[str, Any]) -> str:
    return f"{pair['after'] / max(pair['before'], 1):.3f}x"


def _grouped(layers: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for layers that differ only in numbers of their names: `model.layers.*.mlp.up_proj (30)`."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in layers:
        name = ".".join("*" if part.isdigit() else part for part in row["layer"].split("."))
        groups.setdefault(name, []).append(row)
    out = []
    for name, rows in groups.items():
        sparsities = [r["sparsity"] for r in rows]
        label = f"{name} ({len(rows)})" if len(rows) > 1 else rows[0]["layer"]
        formats = sorted({r["format"] for r in rows})
        out.append(
            {
                "layer": label,
                "shape": " ".join(sorted({r["shape"] for r in rows})[:3]),
                "pattern": rows[0]["pattern"],
                "asked": f"{rows[0]['asked']:.2%}",
                "sparsity": f"{sparsities[0]:.3%}"
                if len(set(sparsities)) == 1
                else f"{min(sparsities):.3%}..{max(sparsities):.3%}",
                "stored as": ", ".join(formats),
                "bytes": f"{sum(r['dense_bytes'] for r in rows):,} -> {sum(r['bytes'] for r in rows):,}",
            }
        )
    return out


@contextmanager
def damaged_receipts() -> Iterator[None]:
    """Raise ContainerError for what a receipt with missing or wrong fields raises when it is used."""
    try:
        yield
    except ContainerError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise ContainerError(f"receipt: not written by Rarefy ({first_line(error)!r})") from error


def receipt_from_dict(data: Any) -> Receipt:
    """Return a receipt from what `Receipt.to_dict` returned; ContainerError for anything else.

    Every receipt that is returned can be printed, and written as JSON.
    """
    known = {f.name for f in fields(Receipt)}
    with damaged_receipts():
        if unknown := sorted(set(data) - known):
            raise ContainerError(f"receipt: unknown field {unknown[0]!r}: not a receipt, or of a newer Rarefy")
        receipt = Receipt(**{**data, **{name: tuple(data.get(name, ())) for name in LISTS}})
        _ = str(receipt) + receipt.to_json()
        named = [r[key] for r in receipt.sparsity.get("layers", ()) for key in ("layer", "pattern")]
    if not all(isinstance(name, str) for name in named):
        raise ContainerError("receipt: not written by Rarefy (a layer's name or pattern is not text)")
    return receipt


SHOWN = ("pruned", "cut", "layers", "accelerated")  # stages whose rows are in the tables


def _stage_summary(stage: Mapping[str, Any]) -> str:
    """Return a stage in a line: what its report sums up, of training its first and last loss."""
    parts = [f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in stage["summary"].items()]
    losses = [r["loss"] for r in stage["rows"] if "loss" in r]
    return ", ".join([*parts, *([f"loss {losses[0]:.4g} -> {losses[-1]:.4g}"] if losses else [])])
