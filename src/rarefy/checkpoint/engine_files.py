"""Files of a model's folder that are written beside a compressed model, a compiled one or a decoder."""

from __future__ import annotations

from pathlib import Path

from rarefy.checkpoint import export, gguf_tokenizer
from rarefy.checkpoint.origin import origin_files
from rarefy.checkpoint.save import name_rarefy
from rarefy.common.errors import ContainerError
from rarefy.common.json_text import read_json_file
from rarefy.formats import gguf_file
from rarefy.model.checked_folder import MAX_CONFIG_BYTES
from rarefy.model.hub import check_link


def model_files(source: Path) -> dict[str, bytes]:
    """Return the files beside a compressed model, by name: of its tokenizer, and where it came from.

    Args:
        source: the folder or file of the model.
    """
    files = gguf_tokenizer.files(source) if gguf_file.is_file(source) else export.side_files(source)
    return files | origin_files(source)


def engine_files(source: Path) -> dict[str, bytes]:
    """Return the files that a compiled model or decoder needs too, by name; see `model_files`."""
    if gguf_file.is_file(source):
        return model_files(source)
    if source.is_file():
        files = model_files(source.parent)
        return engine_files(source.parent) if "tokenizer.json" in files else {}
    config = source / "config.json"  # transformers needs it to find the tokenizer class
    if not config.is_file():
        return model_files(source)
    values = read_json_file(check_link(config, source), MAX_CONFIG_BYTES)
    if not isinstance(values, dict):
        raise ContainerError(f"{config}: expected a JSON object, got a {type(values).__name__}")
    return model_files(source) | {config.name: name_rarefy(values)}
