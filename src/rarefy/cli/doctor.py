"""`rarefy doctor`: installed versions, CPU features, and what is missing."""

from __future__ import annotations

import importlib.metadata as metadata

import torch

from rarefy.common.errors import DataError
from rarefy.common.extras import install
from rarefy.common.report import Report
from rarefy.data import builtin
from rarefy.evaluation.profiling import machine, native_bf16
from rarefy.runtime import bindings

CORE = ("torch", "safetensors", "numpy", "pydantic", "ruamel.yaml", "rich", "typer", "greenlet")
EXTRAS = {
    "transformers": "hf",
    "tokenizers": "hf",
    "gguf": "hf",
    "accelerate": "hf",
    "llguidance": "json",
    "sentence-transformers": "embeddings",
    "torchvision": "vision",
    "timm": "vision",
    "pillow": "vision",
    "huggingface_hub": "hub",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
}


def examine() -> Report:
    """Return versions and CPU features, with the install command of each optional package that is missing."""
    rows = [{"what": name, "is": version(name) or "MISSING", "get it with": ""} for name in CORE]
    for name, extra in EXTRAS.items():
        status = version(name)
        rows.append(
            {
                "what": name,
                "is": status or "missing",
                "get it with": "" if status else install(extra),
            }
        )
    for name, source in builtin.SOURCES.items():
        try:
            builtin.find(name)
            status = "installed"
        except DataError:
            status = "missing"
        rows.append(
            {"what": f"sample {name}", "is": status, "get it with": "" if status == "installed" else source.install}
        )
    this_machine = machine()
    summary = {
        "rarefy": version("rarefy") or "not installed as a package",
        "cpu": this_machine["cpu"],
        "extensions": " ".join(this_machine["extensions"]) or "none known",
        "cores": this_machine["cores"],
        "threads": this_machine["threads"],
        "python": this_machine["python"],
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
