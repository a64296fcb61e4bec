"""Values of another tool's recipe, each with its file and line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rarefy.common.yaml_text import Document, Path, read_yaml


@dataclass(frozen=True)
class Node:
    """A value and where it is written."""

    value: Any  # scalar, list of Node, or dict of str -> Node
    where: str
    remarks: tuple[str, ...] = ()  # on the whole text, where this is its root

    @classmethod
    def of(cls, value: Any, where: str) -> Node:
        """Return plain data as nodes; `where` names the whole."""
        if isinstance(value, Mapping):
            return cls({str(k): cls.of(v, f"{where}.{k}") for k, v in value.items()}, where)
        if isinstance(value, list | tuple):
            return cls([cls.of(v, f"{where}[{i}]") for i, v in enumerate(value)], where)
        return cls(value, where)

    @classmethod
    def of_yaml(cls, text: str, name: str) -> Node:
        """Return YAML text as nodes; a tag is the only key of a mapping. RecipeError for invalid YAML."""
        document = read_yaml(text, name, foreign=True)
        root = cls._located(document.data, document, ())
        return cls(root.value, root.where, document.remarks)

    @classmethod
    def _located(cls, value: Any, document: Document, path: Path) -> Node:
        where = document.place(path)
        if isinstance(value, dict):
            return cls({k: cls._located(v, document, (*path, k)) for k, v in value.items()}, where)
        if isinstance(value, list):
            return cls([cls._located(v, document, (*path, i)) for i, v in enumerate(value)], where)
        return cls(value, where)
