"""The command report."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli.shared import Json
from rarefy.common.errors import ContainerError, RecipeError
from rarefy.common.plain_file import read_text, usable_path

FILES = ("frontier.json", "receipt.json")  # of a folder, the first that there is
MAX_BYTES = 1 << 26


def report(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="A folder written by `rarefy compress` or `rarefy optimize`, its receipt.json or frontier.json, or a "
            ".jsonl file of a benchmark.",
        ),
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write one self-contained HTML page to this file, instead of printing text.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Show what was measured: a receipt, all models of a search, or a benchmark.

    The page of --html loads nothing: it can be sent by mail or printed.

    rarefy report fast/ --html report.html
    """
    from rarefy.common.atomic_io import write_new_file
    from rarefy.evaluation.html_page import plain_text

    for is_set, option in ((open_, "--open"), (force, "--force")):
        if is_set and html is None:
            raise RecipeError(f"{option} has no effect without --html FILE")
    result, page = read_result(path)
    if html is not None:
        write_new_file(html, page(result), overwrite=force)
        print(f"written to {html}", file=sys.stderr)
    if as_json:
        print(result.to_json())
    elif html is None:
        print(plain_text(result))
    if open_ and html is not None and not webbrowser.open(html.resolve().as_uri()):
        print(f"rarefy: no browser was found: open {html} yourself", file=sys.stderr)


def read_result(path: Path) -> tuple[Any, Callable[[Any], str]]:
    """Return the frontier, receipt or benchmark in a folder or file, and the function that makes its page."""
    from rarefy.common.json_text import parse_json
    from rarefy.evaluation.receipt import receipt_from_dict
    from rarefy.evaluation.receipt_page import receipt_page
    from rarefy.search.bench_report import bench_from_lines, bench_page
    from rarefy.search.frontier import frontier_from_dict
    from rarefy.search.html_report import frontier_page

    file = _file_of(path)
    try:
        text = _text_of(file)
        if file.suffix == ".jsonl":
            return bench_from_lines(text), bench_page
        data = parse_json(text)
        if isinstance(data, dict) and "points" in data:
            return frontier_from_dict(data), frontier_page
        return receipt_from_dict(data), receipt_page
    except ContainerError as error:
        raise ContainerError(f"{file}: {error}") from error


def _file_of(path: Path) -> Path:
    if not usable_path(path).exists():
        raise ContainerError(f"no file or folder {path}")
    if not path.is_dir():
        return path
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise ContainerError(
            f"{path} has neither {FILES[0]} nor {FILES[1]}: expected a folder written by rarefy compress or rarefy "
            "optimize, or a .jsonl file of a benchmark"
        )
    return file


def _text_of(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ContainerError(f"larger than a report can be ({MAX_BYTES >> 20} MiB)")
        return read_text(file, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ContainerError(f"cannot be read as text: {error}") from error
