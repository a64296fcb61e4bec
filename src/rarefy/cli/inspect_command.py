"""The command inspect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli import shared
from rarefy.cli.shared import Checkpoint, Json, Offline, RandomWeights


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="A folder of Rarefy, a Hugging Face folder, a .safetensors, .gguf, .onnx or .pt2 file, a built-in "
            "name, timm/NAME, torchvision/NAME, or a model of the hub, ORG/NAME."
        ),
    ],
    groups: Annotated[
        bool,
        typer.Option("--groups", help="Show the groups of units that can only be removed together."),
    ] = False,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Show every tensor of a checkpoint: shape, type, format, sparsity, pattern, bytes."""
    from rarefy.checkpoint import pt2_load
    from rarefy.checkpoint.inspect import inspect
    from rarefy.cli import onnx_files

    source = shared.source(path, checkpoint, random_weights, offline)
    if not groups:
        if isinstance(source, Path) and not (onnx_files.is_file(source) or pt2_load.is_file(source)):
            report = inspect(source)
        else:
            report = replace(inspect(shared.load(source)[0]), title=str(source))
        shared.show(report, as_json, False)
        return
    from rarefy.dependency import graph
    from rarefy.evaluation.example_inputs import example_of

    model, _ = shared.load(source)
    shared.show(graph.groups(model, example_of(model, 32, 2)), as_json, False)
