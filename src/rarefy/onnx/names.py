"""Names of modules and parameters, from those of a file's nodes and constants.

torch.fx writes names into source code that it executes, so no character of a file gets there but letters, digits, "_",
"-" and the dots between parts.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from rarefy.onnx.layers import LAYERS

SCOPES = "pkg.torch.onnx.name_scopes"
OPERATOR = re.compile(r"[A-Z][A-Za-z]+(_\d+|_quant)*")
WEIGHT = re.compile(r"[._]weight$")
NUMBERED = re.compile(r"[a-z_]+_\d+")
NAME_PART = re.compile(r"[A-Za-z0-9_-]+")
MAX_PARTS = 32  # of a dotted name
FREE = {"input", "type", "id", "filter", "hash", "format", "iter", "next"}  # builtins that torch's code never calls


def input_names(names: Sequence[str]) -> dict[str, str]:
    """Return the names of a function's parameters for those of a graph's inputs."""
    valid_names: dict[str, str] = {}
    for i, name in enumerate(names):
        valid = re.sub(r"\W", "_", name, flags=re.ASCII)
        taken = (hasattr(builtins, valid) and valid not in FREE) or valid in ("self", "torch")
        reserved = keyword.iskeyword(valid) or taken
        valid = f"input_{valid}" if reserved or not valid[:1].isalpha() else valid
        while valid in valid_names.values():
            valid += f"_{i}"
        valid_names[name] = valid
    return valid_names


def module_name(node: Any, is_layer: bool) -> str:
    """Return a module's path for a node: of the module whose weight it reads, of the one it was traced in, or its own.

    Args:
        node: the node.
        is_layer: whether the module is a layer, rather than an operator within one.
    """
    whole = is_layer or node.op_type in LAYERS
    weights = [n for n in node.input if WEIGHT.search(n)]
    if weights and whole:
        return join(WEIGHT.sub("", weights[0]).split("."))
    scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "")
    try:
        scope = ast.literal_eval(scopes) if len(scopes) < 10_000 else []
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        scope = []
    if isinstance(scope, list) and len(scope) > 1 and all(isinstance(s, str) for s in scope) and scope[-2]:
        return join([*scope[-2].split("."), *(() if whole else (node.op_type,))])
    parts: list[str] = []
    for part in (node.name or node.op_type).strip("/").split("/"):
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()  # torch writes "layer1/layer1.0"
        parts.append(part)
    if whole and len(parts) > 1 and OPERATOR.fullmatch(parts[-1]):
        parts.pop()
    return join([p for part in parts for p in part.split(".")])


def join(parts: Sequence[str]) -> str:
    """Return a dotted path of parts, without characters that attributes cannot have."""
    valid = [p for part in parts if (p := "_".join(NAME_PART.findall(part)))][-MAX_PARTS:]
    return ".".join(f"{p}_" if keyword.iskeyword(p) else p for p in valid) or "node"


def place(root: nn.Module, name: str, value: Any) -> str:
    """Put a module, parameter or buffer into a tree of modules at a dotted name, or one near it; return that name."""
    if NUMBERED.fullmatch(name) and not isinstance(value, nn.Module):
        name = f"constants.{name}"  # torch's exporter numbers what it computes in this way, and names must differ
    parent, *parts = root, *name.split(".")
    path = []
    for part in parts[:-1]:
        while not is_free(parent, part) and type(parent._modules.get(part)) is not nn.Module:
            part += "_"
        if is_free(parent, part):
            parent.add_module(part, nn.Module())
        path.append(part)
        parent = parent.get_submodule(part)
    leaf = parts[-1]
    while not is_free(parent, leaf):
        leaf += "_"
    if isinstance(value, nn.Module):
        parent.add_module(leaf, value)
    elif isinstance(value, nn.Parameter):
        parent.register_parameter(leaf, value)
    else:
        parent.register_buffer(leaf, value)
    return ".".join((*path, leaf))


def is_free(parent: nn.Module, name: str) -> bool:
    """Return whether neither a module nor its class has an attribute of that name."""
    return not hasattr(parent, name) and not hasattr(fx.GraphModule, name)
