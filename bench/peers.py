"""Other engines for a dense model and inputs of any batch: what `rivals` times at one shape, judged on real data.

Each is exported once with open sizes; OpenVINO is timed with the sizes of each example fixed, which is faster. 8 bits:
OpenVINO by NNCF with the given calibration; ONNX Runtime with the same for images, and for texts with activations
quantized in each call (rivals.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rivals import (
    First,
    feed,
    has_bf16,
    named,
    nncf_int8,
    onnxruntime_session,
    openvino_network,
    quantized_dynamically,
    quantized_statically,
)

Inputs = Any  # tensors by name, or an image
Encode = Callable[[Inputs], Tensor]
Timed = dict[Any, Callable[[], Any]]  # by the keys of the examples


def exported(model: nn.Module, x: Inputs, file: Path) -> None:
    """Write a model with open sizes as ONNX: texts of any number and length, images of any number."""
    names = list(named(x))
    open_sizes = {0: "batch", 1: "tokens"} if isinstance(x, dict) else {0: "batch"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            First(model, x),
            tuple(named(x).values()),
            str(file),
            input_names=names,
            output_names=["output"],
            dynamic_axes={name: open_sizes for name in [*names, "output"]},
            dynamo=False,
        )


def onnxruntime(file: Path, examples: Mapping[Any, Inputs]) -> tuple[Encode, Timed]:
    """Return an ONNX Runtime session as a function of inputs, and calls on the examples."""
    session = onnxruntime_session(file)

    def timed(x: Inputs) -> Callable[[], Any]:
        inputs = feed(x)
        return lambda: session.run(None, inputs)[0]

    return lambda x: torch.from_numpy(timed(x)()), {batch: timed(x) for batch, x in examples.items()}


def openvino(network: Any, precision: str, examples: Mapping[Any, Inputs]) -> tuple[Encode, Timed]:
    """Return an OpenVINO network as a function of inputs, and calls of it with the sizes of the examples."""
    any_size = openvino_network(network, precision)
    timed: Timed = {}
    for batch, x in examples.items():
        fixed = network.clone()
        fixed.reshape({name: list(value.shape) for name, value in named(x).items()})
        compiled, inputs = openvino_network(fixed, precision), feed(x)
        timed[batch] = lambda c=compiled, i=inputs: c(i, share_outputs=True)[0]
    return lambda x: torch.from_numpy(any_size(feed(x))[0].copy()), timed


def openvino_int8(
    model: nn.Module, data: list[Inputs], examples: Mapping[Any, Inputs], folder: Path
) -> tuple[Encode, Timed]:
    """Return OpenVINO in calibrated 8 bits as a function of inputs, and its calls on the examples."""
    file = folder / "model.onnx"
    exported(model, data[0], file)
    network = import_module("openvino").Core().read_model(str(file))
    return openvino(nncf_int8(network, [feed(x) for x in data]), "int8", examples)


def engines(
    model: nn.Module, data: list[Inputs], examples: Mapping[Any, Inputs], folder: Path
) -> dict[str, tuple[Encode, Timed]]:
    """Return each engine's function of inputs, and its calls on the examples."""
    file = folder / "model.onnx"
    exported(model, data[0], file)
    batches = [feed(x) for x in data]
    core = import_module("openvino").Core()
    plain = core.read_model(str(file))
    found = {
        "onnxruntime fp32": onnxruntime(file, examples),
        "onnxruntime int8": onnxruntime(
            quantized_dynamically(file) if isinstance(data[0], dict) else quantized_statically(file, batches), examples
        ),
        "openvino fp32": openvino(plain, "fp32", examples),
    }
    if has_bf16():
        found["openvino bf16"] = openvino(plain, "bf16", examples)
    found["openvino int8"] = openvino(nncf_int8(core.read_model(str(file)), batches), "int8", examples)
    return found
