"""Other engines for a dense text encoder of any shape of input: what `rivals` times at one shape, judged on texts.

Each is exported once with open sizes; OpenVINO is timed with the sizes of each example fixed, which is faster. 8 bits:
ONNX Runtime quantizes activations in each call, OpenVINO by NNCF with the given calibration.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rivals import First, feed, has_bf16, onnxruntime_session, openvino_network

Inputs = dict[str, Tensor]
Encode = Callable[[Inputs], Tensor]
Timed = dict[int, Callable[[], Any]]


def exported(model: nn.Module, x: Inputs, file: Path) -> None:
    """Write a model with open sizes as ONNX."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            First(model, x),
            tuple(x.values()),
            str(file),
            input_names=list(x),
            output_names=["hidden"],
            dynamic_axes={name: {0: "batch", 1: "tokens"} for name in [*x, "hidden"]},
            dynamo=False,
        )


def onnxruntime(file: Path, examples: Mapping[int, Inputs]) -> tuple[Encode, Timed]:
    """Return an ONNX Runtime session as a function of inputs, and calls on the examples."""
    session = onnxruntime_session(file)

    def timed(x: Inputs) -> Callable[[], Any]:
        inputs = feed(x)
        return lambda: session.run(None, inputs)[0]

    return lambda x: torch.from_numpy(timed(x)()), {batch: timed(x) for batch, x in examples.items()}


def quantized_onnx(file: Path) -> Path:
    """Return the file of a model whose weights are int8, a scale per channel, and whose inputs are in each call."""
    tools: Any = import_module("onnxruntime.quantization")
    out = file.with_suffix(".int8.onnx")
    quiet = logging.getLogger()
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it asks for a preprocessing that makes dynamic quantization no faster
    try:
        tools.quantize_dynamic(str(file), str(out), per_channel=True, weight_type=tools.QuantType.QInt8)
    finally:
        quiet.setLevel(level)
    return out


def openvino(network: Any, precision: str, examples: Mapping[int, Inputs]) -> tuple[Encode, Timed]:
    """Return an OpenVINO network as a function of inputs, and calls of it with the sizes of the examples."""
    any_size = openvino_network(network, precision)
    timed: Timed = {}
    for batch, x in examples.items():
        fixed = network.clone()
        fixed.reshape({name: list(value.shape) for name, value in x.items()})
        compiled, inputs = openvino_network(fixed, precision), feed(x)
        timed[batch] = lambda c=compiled, i=inputs: c(i, share_outputs=True)[0]
    return lambda x: torch.from_numpy(any_size(feed(x))[0].copy()), timed


def nncf_int8(network: Any, data: list[Inputs]) -> Any:
    """Return the network quantized after training with this calibration."""
    nncf: Any = import_module("nncf")
    nncf.set_log_level(logging.ERROR)
    with redirect_stdout(StringIO()):  # progress bars
        batches = nncf.Dataset([feed(x) for x in data])
        return nncf.quantize(network, batches, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(data))


def encoders(
    model: nn.Module, data: list[Inputs], examples: Mapping[int, Inputs], folder: Path
) -> dict[str, tuple[Encode, Timed]]:
    """Return each engine's function of inputs, and its calls on the examples."""
    file = folder / "model.onnx"
    exported(model, data[0], file)
    core = import_module("openvino").Core()
    plain = core.read_model(str(file))
    found = {
        "onnxruntime fp32": onnxruntime(file, examples),
        "onnxruntime int8": onnxruntime(quantized_onnx(file), examples),
        "openvino fp32": openvino(plain, "fp32", examples),
    }
    if has_bf16():
        found["openvino bf16"] = openvino(plain, "bf16", examples)
    found["openvino int8"] = openvino(nncf_int8(core.read_model(str(file)), data), "int8", examples)
    return found
