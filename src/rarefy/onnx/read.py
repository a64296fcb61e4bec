"""Read and check ONNX files: nothing outside the file's folder is read, and sizes are limited."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rarefy.common.errors import ContainerError, ModelError, first_line, unknown
from rarefy.common.extras import install
from rarefy.common.plain_file import usable_path
from rarefy.onnx.binding import function_of
from rarefy.onnx.runtime_operators import split_fused_
from rarefy.onnx.shape_inference import check_sizes, infer_kinds, without_weights

MAX_NODES = 200_000  # with functions expanded
MAX_REPEATS = 4  # bytes that tensors may have together, for each byte of the files they are stored in
DOMAINS = ("", "ai.onnx", "com.microsoft")


def read(path: Any) -> Any:
    """Return the checked ONNX model of a file, with its weights."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ModelError(f"reading ONNX needs more packages: {install('onnx')} ({error})") from None
    if not isinstance(path, str | os.PathLike):
        raise ModelError(f"path: expected the path of an ONNX file, got {type(path).__name__}")
    path = usable_path(path)
    if not path.is_file():
        raise ContainerError(f"{path}: no such file" if not path.exists() else f"{path} is not a file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ContainerError(f"{path}: not an ONNX file, or an incomplete copy of one: {error}") from None
    if _has_undecoded_text(model):
        raise ContainerError(f"{path}: not a sound ONNX file: a name in it is not text in UTF-8")
    if not model.graph.node:
        raise ContainerError(f"{path}: not an ONNX file, or one without operators")
    newest = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise ContainerError(f"{path}: opset {opset.version}; those up to {newest} are read")
    folder = os.path.realpath(path.parent)
    _check_external_data(model, path, folder)
    try:
        onnx.load_external_data_for_model(model, folder)
        split_fused_(model)
        onnx.checker.check_model(model)
    except ModelError:
        raise
    except Exception as error:  # the checker's own class, and whatever reading weights raises
        raise ContainerError(f"{path}: not a sound ONNX file: {first_line(error)}") from None
    _check_sizes(model, path)
    return model


def _check_external_data(model: Any, path: Path, folder: str) -> None:
    """Raise ContainerError unless all tensors outside of the file are whole in plain files of its folder.

    O(tensors).
    """
    sizes, read = dict[str, int](), 0
    for tensor in _tensors(model):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        entries, name = {e.key: e.value for e in tensor.external_data}, tensor.name
        value = entries.get("location", "")
        location = os.path.realpath(os.path.join(folder, value))
        if not location.startswith(folder + os.sep):
            raise ContainerError(f"{path}: {name} is stored outside the file's folder: {value!r}")
        if not os.path.isfile(location):
            raise ContainerError(
                f"{path}: {name} is stored in {value!r}, which is missing or no plain file: both files belong into one "
                "folder"
            )
        sizes[location] = os.path.getsize(location)
        offset, length = (entries.get(key, default) for key, default in (("offset", "0"), ("length", "")))
        if not all(re.fullmatch("[0-9]{1,18}", n) for n in (offset, length or "0")):
            raise ContainerError(f"{path}: {name} is stored at byte {offset!r}, {length!r} bytes: expected numbers")
        num_bytes = int(length) if length else sizes[location] - int(offset)
        if num_bytes < 0 or int(offset) + num_bytes > sizes[location]:
            raise ContainerError(
                f"{path}: {name} ends at byte {int(offset) + max(num_bytes, 0):,} of {value!r}, which has "
                f"{sizes[location]:,}: copy both files again"
            )
        read += num_bytes
    if read > MAX_REPEATS * sum(sizes.values()):
        raise ContainerError(f"{path}: its tensors read {read:,} bytes of files of {sum(sizes.values()):,} bytes")


def _tensors(message: Any) -> Iterator[Any]:
    """Yield all tensors of a message: weights, attributes, and those of subgraphs and functions. O(fields)."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                if field.message_type.name == "TensorProto":
                    yield inner
                else:
                    yield from _tensors(inner)


def _has_undecoded_text(message: Any) -> bool:
    """Return whether a text of a message is not UTF-8: protobuf returns it as bytes, which no reader of names expects.

    O(fields).
    """
    for field, value in message.ListFields():
        values = [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value
        if field.type == field.TYPE_STRING and any(type(v) is bytes for v in values):
            return True
        if field.message_type is not None and any(map(_has_undecoded_text, values)):
            return True
    return False


def _check_sizes(model: Any, path: Path) -> None:
    """Raise ModelError for functions that expand to too many nodes, and for values of too many elements."""

    known = {*DOMAINS, *(f.domain for f in model.functions)}
    strange = sorted({f"{n.domain}.{n.op_type}" for n in model.graph.node if n.domain not in known})
    if strange:
        laid_out = all(name.startswith("com.microsoft.nchwc.") for name in strange)
        hint = "; ONNX Runtime laid this file out for one CPU: save it with ORT_ENABLE_EXTENDED" if laid_out else ""
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise ModelError(f"{path}: operators that are not part of ONNX: {', '.join(strange[:5])}{more}{hint}")
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
        check_sizes(infer_kinds(model))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


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


def inline_functions(model: Any) -> Any:
    """Return the model with calls of functions replaced by their bodies: the file's own, and those that ONNX defines
    for operators which are unknown here."""
    import onnx
    from onnx import inliner

    known = {(f.domain, f.name) for f in model.functions}
    defined = [n for n in model.graph.node if function_of(n) is None and _has_body(n)]
    if not known and not defined:
        return model
    light = without_weights(model)
    names = [*known, *((n.domain, n.op_type) for n in defined)]
    try:
        inlined = inliner.inline_selected_functions(light, names, inline_schema_functions=bool(defined))
    except Exception as error:  # onnx's own classes
        if not known:  # the converter names the operators
            return model
        raise ModelError(f"its functions cannot be inlined: {first_line(error)}") from None
    graph = onnx.GraphProto(name=model.graph.name, node=inlined.graph.node, output=model.graph.output)
    graph.input.extend(model.graph.input)
    graph.initializer.extend(model.graph.initializer)
    graph.value_info.extend(model.graph.value_info)
    whole = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
    whole.opset_import.extend(inlined.opset_import)
    return whole


def _has_body(node: Any) -> bool:
    """Return whether ONNX defines an operator by others."""
    from onnx import defs

    try:
        schema: Any = defs.get_schema(node.op_type, node.domain)
    except defs.SchemaError:
        return False
    return schema.has_function or schema.has_context_dependent_function
