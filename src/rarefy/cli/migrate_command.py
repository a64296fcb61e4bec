"""`rarefy migrate`: translate a recipe of another tool, or all recipes in a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli import shared
from rarefy.cli.shared import Json
from rarefy.common.errors import RecipeError, shell_text


def migrate(
    source: Annotated[
        Path,
        typer.Argument(help="A recipe (.yaml, .md) or config (.json) of another tool, or a folder of such files."),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Output file, or folder for a folder; by default the recipe is printed."),
    ] = None,
    variables: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="name=value: a variable of the recipe, in place of its own or for eval(name) without a value, such as "
            "num_epochs=10. Missing ones are also looked up in YAML and JSON files of the same folder.",
        ),
    ] = None,
    block: Annotated[
        int | None, typer.Option(min=1, help="Which recipe of a Markdown file with several, counted from 1.")
    ] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out what has no counterpart, with a comment.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    as_json: Json = False,
) -> None:
    """Translate a recipe of another tool, with a comment wherever the meaning differs.

    Reads SparseML's recipes (legacy tags, stages, Markdown), llm-compressor's, NNCF configs before version 3, and, as
    JSON or YAML, a WeightPruningConfig of Neural Compressor and configs of torch.ao.pruning. No code in a file is run.

    A folder prints a table of its recipes: the tool, and whether it was translated or why not. The exit code is then 1
    if one was not.

    Examples:

        rarefy migrate recipe.md --out recipe.yaml

        rarefy migrate recipe.yaml --set num_epochs=10 --set mask_type=unstructured

        rarefy migrate README.md --block 2

        rarefy migrate recipes/ --out new/ --skip
    """
    from rarefy.migration.translate import Request

    request = Request(skip, _values(variables or ()), block)
    place = None if out is None else Path(out)
    if source.is_dir():
        if block is not None:
            raise RecipeError(f"--block names a recipe of one file: leave it out, {source} is a folder")
        _folder(source, request, place, force, as_json)
    else:
        inside = place is not None and (place.is_dir() or str(out).endswith("/"))
        _file(source, request, place / f"{source.stem}.yaml" if place and inside else place, force, as_json)


def _values(pairs: Sequence[str]) -> Mapping[str, Any]:
    """Return the variables of `--set name=value`."""
    from rarefy.migration.variables import given_value

    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise RecipeError(f"--set {pair!r}: expected name=value, such as num_epochs=10")
        if name in values:
            raise RecipeError(f"--set {name} is given twice")
        values[name] = given_value(text, name)
    return values


def _file(source: Path, request: Any, out: Path | None, force: bool, as_json: bool) -> None:
    from rarefy.common.atomic_io import container_errors, write_new_file
    from rarefy.migration.migrate import checked
    from rarefy.migration.translate import translate

    if out is not None and out.exists() and source.exists() and out.samefile(source):
        raise RecipeError(f"{out} is the recipe that is read: give another name")
    migrated = checked(source, translate(source, request))
    if out is not None:
        with container_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        write_new_file(out, migrated.text, force)
        print(f"written to {out}", file=sys.stderr)
    if as_json:
        print(json.dumps({"tool": migrated.tool, "recipe": migrated.recipe.to_dict(), "yaml": migrated.text}, indent=1))
    elif out is None:
        print(migrated.text, end="")


def _folder(source: Path, request: Any, out: Path | None, force: bool, as_json: bool) -> None:
    from rarefy.common.report import Report
    from rarefy.migration.folder import migrate_folder, write_entries

    entries = migrate_folder(source, request)
    if out is not None:
        write_entries(entries, out, force)
    rows = tuple(
        {
            "recipe": e.name,
            "tool": e.migrated.tool if e.migrated else None,
            "result": "migrated" if e.migrated else shell_text(e.why_not),
        }
        for e in entries
    )
    count = sum(e.migrated is not None for e in entries)
    title = "migrated" if out is None else f"migrated to {out}"
    shared.show(Report(title, rows, {"migrated": f"{count} of {len(entries)}"}), as_json, False)
    if count < len(entries):
        raise typer.Exit(1)
