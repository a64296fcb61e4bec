"""What transformers and sentence-transformers get to see of a model's folder: copies of checked files.

A library reads a folder again, by a parser of its own, and more of it than its caller knows. So it gets a temporary
folder instead: configuration that was read strictly, whose names are checked, and that nobody can replace meanwhile;
files of tokenizers; links to weights in safetensors. Code, pickles, adapters and files of other kinds are not in it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rarefy.common.atomic_io import MODULES
from rarefy.common.errors import ContainerError, ModelError, first_line
from rarefy.common.json_text import parse_json, read_bytes, read_json_file
from rarefy.model.config_names import check_module_class, check_names, without_places
from rarefy.model.tokenizer_limits import check_tokenizer

CONFIG = "config.json"
ROUTER = "router_config.json"
GENERATION = "generation_config.json"
INDEX_SUFFIX = ".safetensors.index.json"
MAX_CONFIG_BYTES = 16 << 20
MAX_DATA_BYTES = 1 << 28  # of vocabularies and of the files of a tokenizer
TEXT_SUFFIXES = (".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".md")  # of tokenizers, and the model card
# JSON that a library needs if it is there; GENERATION is left out if it is damaged, and further files always are
NEEDED = re.compile(
    r"((tokenizer|(video_)?preprocessor|processor|router|cnn|lstm|\w*embedding|\w*tokenizer|quantize|sentence_.*)_)?"
    r"config\.json|config_sentence_transformers\.json|(tokenizer|special_tokens_map|added_tokens|vocab|chat_template)"
    r"\.json|.*\.safetensors\.index\.json"
)
DATA = (  # JSON of tokenizers, without names of classes or functions
    *("tokenizer.json", "vocab.json", "added_tokens.json", "tekken.json", "normalizer.json", "entity_vocab.json"),
    *("emoji.json", "target_vocab.json", "vocab-src.json", "vocab-tgt.json", "byte_maps.json", "word_shape.json"),
    "word_pronunciation.json",
)
ADAPTER = "adapter_config.json"
TEMPLATES = "additional_chat_templates"  # folder of further templates
MODULE_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
MAX_NESTING = 4  # of routers in routers
FIELDS = ("path", "type", "name")  # of an entry of modules.json
_sources: dict[str, Path] = {}  # the folders of which temporary ones show the files, while they are in use


@contextmanager
def checked_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that holds what a library may read of a model's folder.

    Args:
        folder: the model's folder.

    Raises:
        ContainerError: configuration is no strict JSON, or is too large.
        ModelError: configuration names functions, classes or files that are not in the lists of `config_names`; or the
            folder holds an adapter.

    Cost: O(bytes of configuration and tokenizer); weights are not read.
    """
    source = Path(folder).absolute()
    with tempfile.TemporaryDirectory(prefix="rarefy-") as temporary:
        _sources[temporary] = source
        try:
            _show(source, Path(temporary))
            yield Path(temporary)
        finally:
            del _sources[temporary]


def source_of(folder: Path) -> Path:
    """Return the folder of a model of which a temporary one shows the files; any other folder itself."""
    return _sources.get(str(folder), folder)


def load_error(error: BaseException, shown: Path) -> str:
    """Return the first line of what a library raised for a temporary folder, with the name of the model's own."""
    line = first_line(error, 1000).replace(str(shown), str(source_of(shown)))
    return line[:300]


def name_source_(loaded: Any, shown: Path) -> None:
    """Replace the path of a temporary folder in a model, config, tokenizer or processor that was loaded from it.

    Libraries remember the path to show it, and to copy vocabularies when they save.
    """
    source = str(source_of(shown))
    for part in (loaded, *(getattr(loaded, name, None) for name in ("config", "generation_config", "tokenizer"))):
        for values in (getattr(part, "__dict__", None) or {}, getattr(part, "init_kwargs", None) or {}):
            for name, value in list(values.items()):
                if isinstance(value, str | Path) and str(value).startswith(str(shown)):
                    values[name] = type(value)(str(value).replace(str(shown), source, 1))


def read_config(file: Path) -> dict[str, Any]:
    """Return the data of a configuration file with checked names.

    Raises:
        ContainerError: it is no strict JSON, or is too large.
        ModelError: it is no object, or has names that are not allowed.
    """
    values = read_json_file(file, MAX_CONFIG_BYTES)
    _check_object(file, values)
    check_names(values, str(file))
    return values


def check_modules(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of a folder's modules.json, [] where there is none.

    Raises:
        ContainerError: if it is no list of modules.
        ModelError: for a module whose class is not one of sentence-transformers.
    """
    file = folder / MODULES
    return _entries(file, read_bytes(file, MAX_CONFIG_BYTES)) if file.is_file() else []


def _show(source: Path, target: Path) -> None:
    modules: list[dict[str, Any]] = []
    if (source / MODULES).is_file():
        data = read_bytes(source / MODULES, MAX_CONFIG_BYTES)
        modules = _entries(source / MODULES, data)
        (target / MODULES).write_bytes(data)
    waiting = ["", *sorted({e["path"] for e in modules if e["path"]})]
    if (source / TEMPLATES).is_dir():
        waiting.append(TEMPLATES)
    while waiting:
        part = waiting.pop()
        if part.count("/") > MAX_NESTING:
            raise ContainerError(f"{source / part}: modules are nested deeper than {MAX_NESTING} folders")
        if (source / part).is_dir():
            (target / part).mkdir(exist_ok=True)
        for file in sorted((source / part).glob("*")):
            if file.is_file() and file.name != MODULES:
                types = _show_file(file, target / part / file.name).get("types")
                if file.name in (ROUTER, CONFIG) and isinstance(types, dict):
                    waiting += [f"{part}/{_module_folder(file, name)}".lstrip("/") for name in types]


def _show_file(file: Path, copy: Path) -> Mapping[str, Any]:
    """Copy a file if a library may read it, or link it if it holds weights; return its data if it is a config."""
    if file.name[0] == ".":
        return {}
    if file.name == ADAPTER:
        raise ModelError(f"{file}: adapters are not read: merge it into the model, and save that")
    if file.suffix == ".safetensors":
        copy.symlink_to(file.resolve())
    elif file.suffix in TEXT_SUFFIXES:
        copy.write_bytes(read_bytes(file, MAX_DATA_BYTES))
    elif NEEDED.fullmatch(file.name) or file.name in (*DATA, GENERATION):
        try:
            data, values = _read_json(file)
        except (ContainerError, ModelError) as error:
            if file.name == GENERATION:
                return {}
            if isinstance(error, ModelError):
                raise
            raise ContainerError(f"{error}; {file.name} is damaged: copy it again") from None
        if file.name == GENERATION:
            _check_object(file, values)
        copy.write_bytes(data)
        return values if isinstance(values, dict) else {}
    return {}


def _read_json(file: Path) -> tuple[bytes, Any]:
    """Return the content of a JSON file, without names of other places, and its checked data."""
    is_index = file.name.endswith(INDEX_SUFFIX)
    data = read_bytes(file, MAX_DATA_BYTES if file.name in DATA or is_index else MAX_CONFIG_BYTES)
    values = parse_json(data, str(file))
    if is_index:
        _check_index(file, values)
    elif file.name == "tokenizer.json":
        check_tokenizer(values, str(file))
    elif file.name not in DATA:
        if file.name != GENERATION:
            _check_object(file, values)
        check_names(values, str(file))
        shown = without_places(values)
        data = data if shown == values else json.dumps(shown).encode()
    return data, values


def _check_object(file: Path, values: Any) -> None:
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ModelError(f"{file}: expected a JSON object, got {kind}: correct the file, or delete it")


def _entries(file: Path, data: bytes) -> list[dict[str, Any]]:
    entries = parse_json(data, str(file))
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and all(isinstance(e.get(f), str) for f in FIELDS) for e in entries
    ):
        raise ContainerError(f"{file}: expected a list of modules with name, path and type")
    for entry in entries:
        if entry["path"]:
            _module_folder(file, entry["path"])
        check_module_class(entry["type"], str(file))
    return entries


def _module_folder(file: Path, name: str) -> str:
    if not MODULE_FOLDER.fullmatch(name):
        raise ContainerError(f"{file}: expected the name of a folder as path, got {name[:80]!r}")
    return name


def _check_index(file: Path, values: Any) -> None:
    """Raise ContainerError unless an index names files in safetensors beside it."""
    files = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(f, str) and Path(f).name == f and f.endswith(".safetensors") for f in files.values()
    ):
        raise ContainerError(
            f"{file}: expected weight_map: names of .safetensors files in this folder, by names of tensors"
        )
