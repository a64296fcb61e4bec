"""A frontier as a self-contained HTML page: the verdict, plots, all points, the best one's layers and its recipe."""

from __future__ import annotations

import shlex
from typing import Any

from rarefy.common.yaml_text import plain, write_yaml
from rarefy.evaluation.html_page import Html, document, element, facts, section, tiles
from rarefy.evaluation.receipt_page import machine_facts, notes, verdict
from rarefy.search.report_plots import plots
from rarefy.search.report_tables import layers_table, peers_table, points_table
from rarefy.search.report_text import (
    batch_name,
    compile_options,
    loss_text,
    loss_unit,
    metric_name,
    quality_text,
    size_text,
    time_text,
)

ENDS = {
    "done": "The search ended by itself.",
    "time": "The search ended at its time limit.",
    "interrupted": "The search was interrupted.",
}


def frontier_page(frontier: Any) -> str:
    """Return a page of a frontier.

    Args:
        frontier: a `rarefy.search.frontier.Frontier`. All of its text is escaped.

    Returns:
        The text of an HTML file that loads nothing.
    """
    best = frontier.best_point
    state = ("good", "Targets met.") if frontier.met else ("bad", "Targets not met.")
    return document(
        f"Search for a faster model: {frontier.model}" if frontier.model else "Search for a faster model",
        verdict(*state, frontier.verdict),
        tiles(_key_figures(frontier)),
        section("Targets", facts(frontier.targets)) if frontier.targets else "",
        section("Quality against time", *plots(frontier)),
        section("All models", points_table(frontier), peers_table(frontier) if frontier.peers else ""),
        *([] if best is None else _best_sections(frontier, best)),
        notes(frontier.notes),
        section("Machine", machine_facts(frontier.machine)) if frontier.machine else "",
    )


def _key_figures(frontier: Any) -> list[tuple[str, object, object]]:
    best, dense, minutes = frontier.best_point, frontier.dense, f"{frontier.seconds / 60:,.1f} minutes"
    search = ("models tried", len(frontier.points), f"{minutes}. {ENDS.get(frontier.finished, frontier.finished)}")
    if best is None:
        return [search]
    lost = "" if best.loss is None else f", loss {loss_text(frontier, best.loss)} {loss_unit(frontier)}"
    quality = (
        f"{metric_name(frontier)} of the best",
        quality_text(frontier, best.quality),
        f"dense {quality_text(frontier, dense.quality)}{lost}",
    )
    times = [
        (batch_name(b), f"{best.speedup[b]:.2f}x as fast", f"{time_text(best, b)} ms, dense {time_text(dense, b)} ms")
        for b in frontier.batches
        if b in best.speedup
    ]
    size = (
        "on disk",
        f"{size_text(best.disk_bytes)} MB",
        f"dense {size_text(dense.disk_bytes)} MB; in memory {size_text(best.memory_bytes)} MB",
    )
    return [quality, *times, size, search]


def _best_sections(frontier: Any, best: Any) -> list[Html]:
    """Return the layers of the best model, its recipe as YAML, and the commands that run it."""
    recipe = [
        element("p", "Save this as recipe.yaml:"),
        element("div", element("pre", write_yaml(plain(best.recipe))), class_="copyable"),
        element("p", "Then run:" if frontier.model else "Then run in Python:"),
        element("div", element("pre", _commands(frontier.model, best, set(best.milliseconds))), class_="copyable"),
    ]
    layers = [section(f"Layers of the best model: {best.name}", layers_table(best.layers))] if best.layers else []
    return [*layers, section("Make the best model again", *recipe)]


def _commands(model: str, best: Any, timed: set[str]) -> str:
    """Return what makes a model by its recipe, and compiles it in its precision; a decoder takes no example."""
    if not model:
        example = "example, " if all(name.isdigit() for name in timed) else ""
        compiled = f"fast = rarefy.compile(model, {example}{compile_options(best, best.calibrated)})"
        return f'rarefy.compress_(model, "recipe.yaml", data)\n{compiled}'
    option = "" if best.precision is None else f" --precision {shlex.quote(best.precision)}"
    option += "".join(f" --ignore {shlex.quote(layer)}" for layer in best.ignore)
    option += "".join(f" --per-layer {shlex.quote(f'{layer}={p}')}" for layer, p in best.per_layer.items())
    option += " --data DATA" if best.calibrated else ""
    option += f" --cache-precision {shlex.quote(best.cache_precision)}" if best.cache_precision != "fp32" else ""
    return (
        f"rarefy compress {shlex.quote(model)} --recipe recipe.yaml --out torch/\n"
        f"rarefy compile torch/{option} --out fast/"
    )
