"""Read and check ONNX files: nothing outside the file's folder is read, and sizes are limited."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rarefy.common.errors import ContainerError, ModelError, first_line, unknown

MAX_NODES = 200_000  # with functions expanded
MAX_ELEMENTS = 1 << 27  # of one value whose shape is known
DOMAINS = ("", "ai.onnx", "com.microsoft")


def read(path: Any) -> Any:
    """Return the checked ONNX model of a file, with its weights."""
    try:
        import onnx
        import onnx2torch  # noqa: F401
        import onnxruntime  # noqa: F401
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ModelError(
            f"reading ONNX needs more packages: pip install '.[onnx]' in Rarefy's folder ({error})"
        ) from None
    if not isinstance(path, str | os.PathLike):
        raise ModelError(f"path: expected the path of an ONNX file, got {type(path).__name__}")
    path = Path(path)
    if not path.is_file():
        raise ContainerError(f"{path}: no such file" if not path.exists() else f"{path} is not a file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ContainerError(f"{path}: not an ONNX file: {error}") from None
    if not model.graph.node:
        raise ContainerError(f"{path}: not an ONNX file, or one without operators")
    folder = os.path.realpath(path.parent)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            location = os.path.realpath(os.path.join(folder, entry.value))
            if entry.key == "location" and not location.startswith(folder + os.sep):
                raise ContainerError(f"{path}: {tensor.name} is stored outside the file's folder: {entry.value!r}")
    try:
        onnx.load_external_data_for_model(model, folder)
        onnx.checker.check_model(model)
    except Exception as error:  # the checker's own class, and whatever reading weights raises
        raise ContainerError(f"{path}: not a sound ONNX file: {first_line(error)}") from None
    _check_sizes(model, path)
    return model


def _check_sizes(model: Any, path: Path) -> None:
    """Raise ModelError for functions that expand to too many nodes, and for values of too many elements."""
    import onnx

    strange = sorted({n.domain for n in model.graph.node} - {*DOMAINS, *(f.domain for f in model.functions)})
    if strange:
        raise ModelError(f"{path}: operators of {', '.join(map(repr, strange))}, which is not known")
    bodies = {(f.domain, f.name): f.node for f in model.functions}
    sizes: dict[Any, int] = {}

    def size(nodes: Any, depth: int = 0) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            if key in bodies and key not in sizes and depth < len(bodies):
                sizes[key] = size(bodies[key], depth + 1)
            total += sizes.get(key, 1)
        return total

    if (count := size(model.graph.node)) > MAX_NODES:
        raise ModelError(f"{path}: {count:,} operators with its functions expanded; at most {MAX_NODES:,} are read")
    try:
        known = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info
    except Exception:  # of more than 2 GiB, for one
        return
    for value in known:
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim if d.HasField("dim_value")]
        if math.prod(dims) > MAX_ELEMENTS:
            raise ModelError(
                f"{path}: {value.name} has {math.prod(dims):,} elements; at most {MAX_ELEMENTS:,} are read"
            )


def set_input_shapes_(model: Any, path: Any, shapes: Any) -> None:
    """Set the shapes of inputs that the caller names; ModelError for those that do not fit."""
    if shapes is None:
        return
    if not isinstance(shapes, Mapping):
        raise ModelError(f"shapes: expected a dict of input names and shapes, got {type(shapes).__name__}")
    held = {i.name for i in model.graph.initializer}
    inputs = {i.name: i for i in model.graph.input if i.name not in held}
    for name, shape in shapes.items():
        if name not in inputs:
            raise ModelError(f"{path}: {unknown('input', name, inputs)}")
        dims = inputs[name].type.tensor_type.shape.dim
        sizes = list(shape) if isinstance(shape, list | tuple) else [shape]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 31 for n in sizes)
        if (
            not whole
            or len(sizes) != len(dims)
            or any(d.HasField("dim_value") and d.dim_value != n for d, n in zip(dims, sizes))
        ):
            expected = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims]
            raise ModelError(f"{path}: input {name} has the shape {expected}, which {sizes} does not fit")
        for dim, n in zip(dims, sizes):
            dim.dim_value = n


def simplify(model: Any) -> Any:
    """Return the model with functions inlined and constants folded."""
    from onnxscript import ir, optimizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            simplified = ir.from_proto(model)
            optimizer.inline(simplified)
            optimizer.fold_constants(simplified)
            return ir.to_proto(simplified)
    except Exception:  # the original graph is right too, with more operators
        return model
