"""Round the outputs of quantized convolutions, and the sums of such outputs: ONNX Runtime computes a convolution or a
sum in 8 bits only between codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rarefy.common.errors import DataError, first_line
from rarefy.onnx.runtimes import Feeds, session_of

FUSED_ACTIVATIONS = ("Relu", "Clip")  # which ONNX Runtime fuses with the operator before


def quantize_outputs_(program: Any, batches: Iterable[Feeds], file: Path) -> int:
    """Insert QuantizeLinear and DequantizeLinear where an operator's inputs are codes, but not its outputs.

    An output that a layer reads as codes already is read as these codes by all. Others get a scale for the range that
    they have on the batches.

    Args:
        program: torch's program, whose model is changed.
        batches: inputs by name.
        file: where the model may be written for calibration.

    Returns:
        The number of outputs that are rounded now.

    Raises:
        DataError: there is no batch, one has NaN or infinity, or ONNX Runtime cannot run one.
    """
    graph = program.model.graph
    values = [v for v in open_outputs(graph) if not _share_codes_(v)]
    if values:
        for value, (low, high) in zip(values, _ranges(program, values, batches, file)):
            _insert_(graph, value, low, high)
    graph.sort()
    return len(values)


def open_outputs(graph: Any) -> list[Any]:
    """Return what operators on codes read and write that something else than QuantizeLinear reads."""
    outputs: dict[int, Any] = {}
    rounded: set[int] = set()  # values that are codes, or will be
    for node in graph:
        inputs = [v for v in node.inputs[:2] if v is not None]
        if node.op_type == "Conv" and all(_made_by(v, "DequantizeLinear") for v in inputs):
            if not _made_by(inputs[0].producer().inputs[0], "QuantizeLinear"):
                continue  # weights alone are quantized
        elif node.op_type == "Add" and all(id(v) in rounded or _is_quantized(v) for v in inputs):
            outputs |= {id(v): v for v in inputs if not _made_by(v, "DequantizeLinear")}
        else:
            continue
        value = node.outputs[0]
        while len(value.consumers()) == 1 and value.consumers()[0].op_type in FUSED_ACTIVATIONS:
            value = value.consumers()[0].outputs[0]
        rounded.add(id(value))
        if any(user.op_type != "QuantizeLinear" for user in value.consumers()):
            outputs[id(value)] = value
    return list(outputs.values())


def _is_quantized(value: Any) -> bool:
    """Return whether a value is dequantized from codes, or read as codes by a layer."""
    return _made_by(value, "DequantizeLinear") or any(u.op_type == "QuantizeLinear" for u in value.consumers())


def _made_by(value: Any, kind: str) -> bool:
    return value is not None and value.producer() is not None and value.producer().op_type == kind


def _share_codes_(value: Any) -> bool:
    """Let all that read a value read the codes that a layer reads; False where no layer does."""
    quantize = next((user for user in value.consumers() if user.op_type == "QuantizeLinear"), None)
    dequantize = None if quantize is None else next(iter(quantize.outputs[0].consumers()), None)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return False
    _replace_uses_(value, dequantize.outputs[0])
    return True


def _replace_uses_(value: Any, rounded: Any) -> None:
    """Let what reads a value read it rounded, except for QuantizeLinear."""
    for use in list(value.uses()):
        if use.node.op_type != "QuantizeLinear":
            use.node.replace_input_with(use.idx, rounded)


def _insert_(graph: Any, value: Any, low: float, high: float) -> None:
    """Round a value to 8 bits over a range."""
    import onnx_ir as ir

    scale = np.float32(max(high - low, 1e-30) / 255)
    arrays = {"scale": scale, "zero": np.uint8(np.clip(round(-low / float(scale)), 0, 255))}
    grid = []
    for part, array in arrays.items():
        grid.append(ir.Value(name=f"{value.name}_{part}", const_value=ir.tensor(np.asarray(array))))
        graph.register_initializer(grid[-1])
    quantize = ir.node("QuantizeLinear", [value, *grid])
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *grid])
    for node, kind, part in ((quantize, ir.DataType.UINT8, "codes"), (dequantize, ir.DataType.FLOAT, "rounded")):
        output = node.outputs[0]
        output.name, output.shape, output.type = f"{value.name}_{part}", value.shape, ir.TensorType(kind)
    _replace_uses_(value, dequantize.outputs[0])
    graph.insert_after(value.producer(), [quantize, dequantize])


def _ranges(program: Any, values: Sequence[Any], batches: Iterable[Feeds], file: Path) -> list[tuple[float, float]]:
    """Return the range of each value over all batches, with 0 in it."""
    outputs = program.model.graph.outputs
    count = len(outputs)
    outputs.extend(v for v in values if not v.is_graph_output())
    try:
        program.save(file, external_data=None)
    finally:
        del outputs[count:]
    session = session_of(file)
    names = [v.name for v in values]
    low, high = np.zeros(len(values)), np.zeros(len(values))
    num_batches = 0
    for feeds in batches:
        if not all(bool(t.isfinite().all()) for t in feeds.values()):
            raise DataError(f"calibrate: batch {num_batches} has NaN or infinity")
        try:
            arrays = session.run(names, {n: t.numpy() for n, t in feeds.items()})
        except Exception as error:  # its own classes
            raise DataError(f"calibrate: ONNX Runtime cannot run batch {num_batches}: {first_line(error)}") from None
        num_batches += 1
        low = np.minimum(low, [a.min() for a in arrays])
        high = np.maximum(high, [a.max() for a in arrays])
    if not num_batches:
        raise DataError("calibrate: there is no batch")
    return list(zip(low.tolist(), high.tolist()))
