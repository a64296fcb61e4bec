"""Other engines for dense models, each with its best settings: torch.compile, and ONNX Runtime and OpenVINO if they are
installed, in fp32, in bf16 where the CPU has it, and in int8.

Each gets as many threads as torch. Calls of engines alternate, so threads should not spin between calls: ONNX Runtime
has a setting for that; OpenVINO's (TBB) always spin for about one ms. The outputs of each are checked against the dense
model's before it is timed, within a cosine that its precision allows.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.evaluation.profiling import cpu_flags

# smallest cosine with the dense model's output, to find exports that went wrong; 0.9999 for fp32
LEAST = {"bf16": 0.99, "int8": 0.7}
INPUTS = 8  # batches for the calibration of int8


def call(model: Any, x: Any) -> Tensor:
    """Return the first of a model's outputs."""
    y = model(**x) if isinstance(x, dict) else model(x)
    return y if isinstance(y, Tensor) else y[0]


class First(nn.Module):
    """A model that takes the values of `x` as positional arguments and returns its first output."""

    def __init__(self, model: nn.Module, x: Any):
        super().__init__()
        self.model, self.names = model, list(x) if isinstance(x, dict) else None
        self.train(model.training)  # the exporter restores this mode in all submodules

    def forward(self, *args: Tensor) -> Tensor:
        return call(self.model, dict(zip(self.names, args)) if self.names else args[0])


def engines(model: nn.Module, x: Any) -> dict[str, Callable[[], Any]]:
    """Return a call of this dense model on `x` for each engine. Raises AssertionError for other outputs."""
    with torch.no_grad():
        want = call(model, x)
        compiled = torch.compile(copy.deepcopy(model))
        runs: dict[str, Callable[[], Any]] = {"compiled": lambda: call(compiled, x)}
        check("compiled", runs["compiled"](), want)
    if "logits_to_keep" in named(x):
        return runs  # language models need another exporter
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "m.onnx"
        torch.backends.mha.set_fastpath_enabled(False)  # it has no ONNX form
        torch.onnx.export(
            First(model, x), tuple(named(x).values()), str(file), input_names=list(named(x)), dynamo=False
        )
        torch.backends.mha.set_fastpath_enabled(True)
        for name, (needs, possible, make) in RIVALS.items():
            missing = [n for n in needs if not find_spec(n)]
            if missing or not possible():
                print(f"without {name}: {'not installed: ' + ', '.join(missing) if missing else 'not on this CPU'}")
                continue
            runs[name] = make(file, x)
            check(name, runs[name](), want)
    return runs


def check(name: str, got: Any, want: Tensor) -> None:
    """Raise AssertionError if an output differs from the dense model's by more than its precision allows."""
    found, least = cosine(torch.as_tensor(got), want), LEAST.get(name.split()[-1], 0.9999)
    if not found > least:
        raise AssertionError(f"{name} has other outputs: cosine {found:.4f}, expected more than {least}")


def cosine(got: Tensor, want: Tensor) -> float:
    """Return the cosine of two outputs."""
    return float(torch.cosine_similarity(got.flatten().double(), want.flatten().double(), dim=0))


def named(x: Any) -> dict[str, Tensor]:
    """Return inputs by their names in the exported graph."""
    return x if isinstance(x, dict) else {"x": x}


def feed(x: Any) -> dict[str, Any]:
    """Return inputs as numpy arrays by name."""
    return {n: a.numpy() for n, a in named(x).items()}


def similar(x: Any) -> Iterator[dict[str, Any]]:
    """Yield calibration inputs like `x`: noise for images, other token ids of the same range, the same mask."""
    random = torch.Generator().manual_seed(1)
    for _ in range(INPUTS):
        new = dict(named(x))
        for name, a in new.items():
            if a.is_floating_point():
                new[name] = torch.randn(a.shape, generator=random)
            elif name == "input_ids":
                new[name] = torch.randint(int(a.min()), int(a.max()) + 1, a.shape, generator=random)
        yield feed(new)


def onnxruntime_session(file: Path) -> Any:
    """Return an ONNX Runtime session with torch's number of threads."""
    onnxruntime: Any = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def onnxruntime_fp32(file: Path, x: Any) -> Callable[[], Any]:
    """Return a call of an ONNX Runtime session."""
    session, inputs = onnxruntime_session(file), feed(x)
    return lambda: session.run(None, inputs)[0]


def onnxruntime_int8(file: Path, x: Any) -> Callable[[], Any]:
    """Return an int8 session with a scale per channel of the weights.

    Models with token ids quantize activations dynamically: on MiniLM that is faster than static QDQ graphs (of all
    operators, or of products alone) and closer to the dense model (cosine 0.98 instead of 0.68 and 0.84). Fusing with
    the optimizer for transformers first was no faster."""
    if "input_ids" in named(x):
        return onnxruntime_fp32(quantized_dynamically(file), x)
    return onnxruntime_fp32(quantized_statically(file, similar(x)), x)


def quantized_statically(file: Path, batches: Iterable[dict[str, Any]]) -> Path:
    """Return the file of a model with int8 weights, a scale per channel, and activations, calibrated on batches."""
    tools: Any = import_module("onnxruntime.quantization")
    shapes: Any = import_module("onnxruntime.quantization.shape_inference")
    source, out = str(file.with_suffix(".shapes.onnx")), file.with_suffix(".int8.onnx")
    with errors_alone():  # it warns that the graph was not preprocessed, which was just done
        shapes.quant_pre_process(str(file), source, skip_symbolic_shape=True)
        kinds = {"activation_type": tools.QuantType.QUInt8, "weight_type": tools.QuantType.QInt8}
        tools.quantize_static(source, str(out), Reader(batches), per_channel=True, **kinds)
    return out


def quantized_dynamically(file: Path) -> Path:
    """Return the file of a model with int8 weights, a scale per channel, which quantizes activations in each call."""
    tools: Any = import_module("onnxruntime.quantization")
    out = file.with_suffix(".int8.onnx")
    with errors_alone():  # it asks for a preprocessing that makes dynamic quantization no faster
        tools.quantize_dynamic(str(file), str(out), per_channel=True, weight_type=tools.QuantType.QInt8)
    return out


@contextmanager
def errors_alone() -> Iterator[None]:
    """Log no warnings."""
    quiet = logging.getLogger()
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        yield
    finally:
        quiet.setLevel(level)


class Reader:
    """Calibration inputs in the interface of ONNX Runtime."""

    def __init__(self, batches: Iterable[dict[str, Any]]):
        self.inputs = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        return next(self.inputs, None)


def openvino(precision: str, file: Path, x: Any) -> Callable[[], Any]:
    """Return a call of an OpenVINO network in a precision."""
    network: Any = import_module("openvino").Core().read_model(str(file))
    if precision == "int8":
        network = nncf_int8(network, list(similar(x)))
    compiled, inputs = openvino_network(network, precision), feed(x)
    return lambda: compiled(inputs, share_outputs=True)[0]


def openvino_network(network: Any, precision: str) -> Any:
    """Return a network compiled for the CPU with torch's number of threads."""
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        # for int8 too: it concerns operators that were not quantized
        "INFERENCE_PRECISION_HINT": "bf16" if precision != "fp32" and has_bf16() else "f32",
    }
    return import_module("openvino").Core().compile_model(network, "CPU", settings)


def nncf_int8(network: Any, batches: list[dict[str, Any]]) -> Any:
    """Return the network quantized after training, calibrated on batches of numpy arrays by name."""
    nncf: Any = import_module("nncf")
    nncf.set_log_level(logging.ERROR)
    kind = nncf.ModelType.TRANSFORMER if "input_ids" in batches[0] else None
    with redirect_stdout(io.StringIO()):  # progress bars
        return nncf.quantize(network, nncf.Dataset(batches), model_type=kind, subset_size=len(batches))


def always() -> bool:
    """Return True: every CPU supports it."""
    return True


def has_bf16() -> bool:
    """Return whether this CPU multiplies bf16."""
    return not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "svebf16", "bf16"})


# name: (packages, whether this CPU supports it, builder from an ONNX file and inputs)
RIVALS: dict[str, tuple[list[str], Callable[[], bool], Callable[[Path, Any], Callable[[], Any]]]] = {
    "onnxruntime": (["onnx", "onnxruntime"], always, onnxruntime_fp32),
    "onnxruntime int8": (["onnx", "onnxruntime"], always, onnxruntime_int8),
    "openvino": (["onnx", "openvino"], always, partial(openvino, "fp32")),
    "openvino bf16": (["onnx", "openvino"], has_bf16, partial(openvino, "bf16")),
    "openvino int8": (["onnx", "openvino", "nncf"], always, partial(openvino, "int8")),
}
