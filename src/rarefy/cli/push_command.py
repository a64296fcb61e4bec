"""The command push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rarefy.cli import shared
from rarefy.cli.shared import Json, Quiet
from rarefy.common.errors import RecipeError


def push(
    folder: Annotated[Path, typer.Argument(help="A folder written by Rarefy.")],
    name: Annotated[str, typer.Argument(help="ORG/NAME on the Hugging Face hub.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the model card into the folder, and publish nothing.")
    ] = False,
    licence: Annotated[
        str | None, typer.Option(help="Licence, such as apache-2.0. Default: that of the model it was made from.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that is in the folder.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a folder on the Hugging Face hub with a model card.

    The card has the licence, what was measured and on which machine, the recipe, and how to run the model. It is
    written into the folder as README.md. Edit it after --dry-run; the next push takes it as it is.

    rarefy push out/ ORG/NAME --dry-run
    """
    from rarefy.checkpoint.push import push as publish
    from rarefy.checkpoint.push import write_card
    from rarefy.common.report import Report

    if dry_run and private:
        raise RecipeError("--private has no effect with --dry-run: leave it out")
    if dry_run:
        file = write_card(folder, name, licence, force)
        report = Report(f"card of {name}", (), {"written to": str(file)})
    else:
        options = {"licence": licence, "overwrite": force, "private": private}
        address = publish(folder, name, **options, progress=not quiet)
        report = Report(f"pushed {folder}", (), {"commit": address})
    shared.show(report, as_json, quiet)
