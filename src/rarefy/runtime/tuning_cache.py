"""The tuning cache: which kernel was fastest for a layer, kept in a file so that it is measured once.

Timings hold for one CPU, instruction set, number of threads, build of the kernels and version of torch. The file is
`tuning_cache.json` in `$RAREFY_CACHE`, else in the folder `rarefy` of the user's caches (`$XDG_CACHE_HOME` or
~/.cache). It may be deleted at any time; entries that cannot be read are measured again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from rarefy.common.atomic_io import write_text_atomic
from rarefy.common.plain_file import plain_file
from rarefy.evaluation.profiling import machine
from rarefy.runtime import bindings

MAX_BYTES = 16 << 20  # a larger file is not read
Choice = dict[int, tuple[str, float]]  # batch -> (name of the fastest kernel, speedup over dense)


def default_file() -> Path:
    """Return the file of the tuning cache where the user names no other."""
    folder = os.environ.get("RAREFY_CACHE")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(folder) if folder else caches / "rarefy") / "tuning_cache.json"


def machine_key() -> str:
    """Return a text of all that timings depend on besides the layer."""
    cpu = machine()
    software = bindings.isa(), cpu["threads"], torch.__version__, bindings.digest()
    return " | ".join(map(str, (cpu["cpu"], " ".join(cpu["extensions"]), *software)))


def read(file: Path) -> dict[str, Choice]:
    """Return the choices made on this machine by layer; empty where the file is missing or not readable."""
    entries = _entries(file).get(machine_key())
    choices = {}
    for layer, choice in entries.items() if isinstance(entries, dict) else ():
        with suppress(ValueError, TypeError, AttributeError):
            choices[layer] = {int(n): (str(name), float(speedup)) for n, (name, speedup) in choice.items()}
    return choices


def write(file: Path, choices: Mapping[str, Choice]) -> None:
    """Add choices of this machine to the file. A file that cannot be written is no error: the next run measures."""
    entries = _entries(file)
    old = entries.get(machine_key())
    entries[machine_key()] = {**(old if isinstance(old, dict) else {}), **choices}
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, json.dumps(entries, indent=0))


def _entries(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        if file.stat().st_size <= MAX_BYTES:
            entries = json.loads(plain_file(file).read_text(encoding="utf-8"))
            return entries if isinstance(entries, dict) else {}
    return {}
