"""What was fastest for a layer, kept in a file: timings hold for one CPU, instruction set, number of threads and torch.

The file is `choices.json` in `$RAREFY_CACHE`, or in `rarefy` where the user's caches are (`$XDG_CACHE_HOME`, ~/.cache).
It may be deleted at any time; what cannot be read in it is measured anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from rarefy.common.atomic_io import write_whole
from rarefy.evaluation.profiling import machine
from rarefy.runtime import bindings

MOST_BYTES = 16 << 20  # of a file that is read
Choice = dict[int, tuple[str, float]]  # number of inputs -> (way, times as fast as dense)


def usual_file() -> Path:
    """Return where choices are kept unless another file is named."""
    own = os.environ.get("RAREFY_CACHE")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(own) if own else caches / "rarefy") / "choices.json"


def this_machine() -> str:
    """Return what choices depend on besides the layer."""
    here = machine()
    told = (
        here["cpu"],
        " ".join(here["extensions"]),
        bindings.isa(),
        here["threads"],
        torch.__version__,
        bindings.digest(),
    )
    return " | ".join(map(str, told))


def read(file: Path) -> dict[str, Choice]:
    """Return the choices made on this machine, by layer; none where the file is missing or not what it should be."""
    held = _held(file).get(this_machine())
    found = {}
    for layer, choice in held.items() if isinstance(held, dict) else ():
        with suppress(ValueError, TypeError, AttributeError):
            found[layer] = {int(n): (str(way), float(gain)) for n, (way, gain) in choice.items()}
    return found


def write(file: Path, known: Mapping[str, Choice]) -> None:
    """Add choices to the file, for this machine; a file that cannot be written costs the next run its time."""
    held = _held(file)
    old = held.get(this_machine())
    held[this_machine()] = {**(old if isinstance(old, dict) else {}), **known}
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(held, indent=0))


def _held(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        if file.stat().st_size <= MOST_BYTES:
            held = json.loads(file.read_text(encoding="utf-8"))
            return held if isinstance(held, dict) else {}
    return {}
