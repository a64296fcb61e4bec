"""Other engines for a dense model, each at its best settings, judged on real data.

Several settings of an engine are timed in turns before the benchmark. The fastest is kept for each example, unless
another one is much more exact (`fastest`); the record names all of them. Each engine gets torch's number of threads. It
is started for the sizes of each example alone, which is faster than open sizes. The network that is started for the
largest example is the one that is judged.

- ONNX Runtime: threads that spin while they wait, its default, and threads that sleep. 8 bits, a scale per channel of
  the weights: ranges of activations from calibration ("static"), also of layers with weights alone ("static, weights"),
  and those of each call ("dynamic"). Fusing MiniLM with its optimizer for transformers first was no faster.
- OpenVINO, the hint for latency: the precision that it chooses itself (bf16 where the CPU has it), bf16, and fp32. In
  8 bits by NNCF these are the precisions of operators that are not quantized. Networks with attention are quantized as
  transformers.
- torch.compile.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import first_line
from rarefy.evaluation.profiling import PAUSE, cpu_flags
from rarefy.onnx.engines import has_attention
from rarefy.onnx.runtimes import THREADS, session_for_timing
from runtime import alternate

Inputs = Any  # tensors by name, or an image
Encode = Callable[[Inputs], Tensor]
Timed = dict[Any, Callable[[], Any]]  # by the keys of the examples
Run = Callable[[dict[str, Any]], Any]  # arrays by name -> array
Start = Callable[[Inputs | None], Run]  # an example whose sizes are fixed; None: open sizes

LEAST = {"fp32": 0.9999, "bf16": 0.99}  # cosine with the dense model's output, to find exports that went wrong
CHOICE_REPEATS = 9  # timed calls of each setting
MAX_WORSE = 0.05  # cosine that the chosen setting may lose beside the most exact one
WITH_WEIGHTS = {"op_types_to_quantize": ["MatMul", "Gemm", "Conv"], "extra_options": {"MatMulConstBOnly": True}}


@dataclass(frozen=True)
class Engine:
    """An engine with the fastest of its settings for each example.

    Attributes:
        encode: returns the first output for inputs of any number, and of at most the tokens of the largest example.
        timed: calls on the examples.
        settings: the chosen one by example ("setting"), milliseconds of each by example, or why it does not run
            ("tried"), and the cosines of those that are not exact enough ("refused").
    """

    encode: Encode
    timed: Timed
    settings: dict[str, Any]


def fastest(
    starts: Mapping[str, Start], examples: Mapping[Any, Inputs], fixed: bool = True, want: Tensor | None = None
) -> Engine:
    """Return the engine with the setting whose call takes least time, for each example; encode is that of the largest.

    Args:
        starts: starts the engine with each setting.
        examples: what it is timed with.
        fixed: whether sizes of the examples are fixed.
        want: the dense model's output for the largest example. Settings whose cosine with it is more than MAX_WORSE
            below that of the most exact setting are not chosen for any example.

    Raises:
        RuntimeError: no setting runs.
    """
    made: dict[str, tuple[Encode, Timed]] = {}
    tried: dict[str, Any] = {}
    for setting, start in starts.items():
        try:
            made[setting] = _at_sizes(start, examples) if fixed else _at_any_size(start, examples)
            for run in made[setting][1].values():
                run()
        except Exception as error:  # of the engine or its tools
            made.pop(setting, None)
            tried[setting] = f"{type(error).__name__}: {first_line(error)}"
    if not made:
        raise RuntimeError(f"no setting runs: {tried}")
    for size in examples:
        times = alternate({s: timed[size] for s, (_, timed) in made.items()}, CHOICE_REPEATS, PAUSE)
        for setting, (_, median, _) in times.items():
            tried.setdefault(setting, {})[str(size)] = round(median, 4)
    last, more = largest(examples), dict[str, Any]()
    if want is not None:
        cosines = {s: cosine(encode(examples[last]), want) for s, (encode, _) in made.items()}
        refused = {s: c for s, c in cosines.items() if not c >= max(cosines.values()) - MAX_WORSE}
        more = {"cosines": cosines, "refused": refused}
    exact = [s for s in made if s not in more.get("refused", {})]
    best = {size: min(exact, key=lambda s, size=size: tried[s][str(size)]) for size in examples}
    setting = {str(size): s for size, s in best.items()}
    timed = {size: made[s][1][size] for size, s in best.items()}
    return Engine(made[best[last]][0], timed, {"setting": setting, "tried": tried, **more})


def largest(examples: Mapping[Any, Inputs]) -> Any:
    """Return the key of the example with the most numbers in its first input."""
    return max(examples, key=lambda key: next(iter(named(examples[key]).values())).numel())


def _at_any_size(start: Start, examples: Mapping[Any, Inputs]) -> tuple[Encode, Timed]:
    """Return a function whose outputs are valid until its next call, and calls on the examples."""
    run = start(None)
    return lambda x: torch.from_numpy(run(feed(x))), {key: partial(run, feed(x)) for key, x in examples.items()}


def _at_sizes(start: Start, examples: Mapping[Any, Inputs]) -> tuple[Encode, Timed]:
    runs = {key: start(x) for key, x in examples.items()}
    key = largest(examples)
    encode = partial(_in_parts, runs[key], next(iter(named(examples[key]).values())).shape)
    return encode, {key: partial(runs[key], feed(x)) for key, x in examples.items()}


def _in_parts(run: Run, shape: Sequence[int], x: Inputs) -> Tensor:
    """Return a network's output for inputs that are split into batches of its own size; missing entries are zeros."""
    inputs, is_text = named(x), isinstance(x, dict)
    count, tokens = next(iter(inputs.values())).shape[:2]
    if is_text and tokens > shape[1]:
        raise ValueError(f"expected at most {shape[1]} tokens, which the network is started for, got {tokens}")
    outputs = []
    for start in range(0, count, shape[0]):
        part = {n: a[start : start + shape[0]] for n, a in inputs.items()}
        missing = shape[0] - len(next(iter(part.values())))
        widths = (0, shape[1] - tokens, 0, missing) if is_text else (*[0] * (2 * (len(shape) - 1)), 0, missing)
        outputs.append(torch.tensor(run({n: nn.functional.pad(a, widths).numpy() for n, a in part.items()})))
    joined = torch.cat(outputs)[:count]
    return joined[:, :tokens] if is_text else joined


def onnxruntime(
    files: Mapping[str, Callable[[], Path]],
    examples: Mapping[Any, Inputs],
    fixed: bool = True,
    want: Tensor | None = None,
) -> Engine:
    """Return ONNX Runtime with the fastest of some files, and threads that spin or sleep.

    Args:
        files: makes each file; "" names no setting.
        examples: what it is timed with.
        fixed: whether sizes of the examples are fixed.
        want: the output of the model in fp32 for the largest example, if the files differ.
    """

    def start(make: Callable[[], Path], spinning: bool, x: Inputs | None) -> Run:
        file = make()
        session = session_for_timing(file, torch.get_num_threads(), spinning=spinning, sizes=open_sizes(file, x))
        known = [i.name for i in session.get_inputs()]
        return lambda arrays: session.run(None, {n: arrays[n] for n in known})[0]

    starts = {
        ", ".join(filter(None, [label, threads])): partial(start, cache(make), spinning)
        for label, make in files.items()
        for threads, spinning in THREADS.items()
    }
    return fastest(starts, examples, fixed, want)


def open_sizes(file: Path, x: Inputs | None) -> dict[str, int]:
    """Return the values that an example gives to the named sizes of a file's inputs."""
    if x is None:
        return {}
    inputs = import_module("onnx").load(str(file), load_external_data=False).graph.input
    return {
        dim.dim_param: size
        for value in inputs
        if value.name in named(x)
        for dim, size in zip(value.type.tensor_type.shape.dim, named(x)[value.name].shape)
        if dim.dim_param
    }


def openvino(network: Any, precisions: Sequence[str], examples: Mapping[Any, Inputs], fixed: bool = True) -> Engine:
    """Return OpenVINO with the fastest of some hints for the precision; "own" is none."""

    def start(precision: str, x: Inputs | None) -> Run:
        sized = network.clone()
        if x is not None:
            sized.reshape({name: list(value.shape) for name, value in named(x).items()})
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        settings |= {} if precision == "own" else {"INFERENCE_PRECISION_HINT": precision}
        compiled = import_module("openvino").Core().compile_model(sized, "CPU", settings)
        return lambda arrays: compiled(arrays, share_outputs=True)[0]

    starts = {f"{p} precision" if p == "own" else f"precision {p}": partial(start, p) for p in precisions}
    return fastest(starts, examples, fixed)


def torch_compiled(model: nn.Module, examples: Mapping[Any, Inputs]) -> Engine:
    """Return torch.compile's default."""
    compiled = torch.compile(copy.deepcopy(model))
    return Engine(partial(call, compiled), {k: partial(call, compiled, x) for k, x in examples.items()}, {})


def engines(
    file: Path, data: list[Inputs], examples: Mapping[Any, Inputs], names: Iterable[str] = (), fixed: bool = True
) -> dict[str, Engine]:
    """Return engines of an ONNX file by name: those of ENGINES that this CPU and the installed packages can run.

    Args:
        file: the model in fp32, with open sizes.
        data: batches for the calibration of 8 bits.
        examples: what they are timed with.
        names: the wanted ones; all by default.
        fixed: whether sizes of the examples are fixed; otherwise all sizes are run by one network.
    """
    made = {}
    for name in names or ENGINES:
        needs, is_possible, make = ENGINES[name]
        missing = [n for n in needs if not find_spec(n)]
        if missing or not is_possible():
            print(f"without {name}: {'not installed: ' + ', '.join(missing) if missing else 'not on this CPU'}")
            continue
        made[name] = make(file, data, examples, fixed)
        print(f"{name}: {made[name].settings}", flush=True)
    return made


def _onnxruntime(is_quantized: bool, file: Path, data: list[Inputs], examples: Any, fixed: bool) -> Engine:
    if not is_quantized:
        return onnxruntime({"": lambda: file}, examples, fixed)
    session = session_for_timing(file, torch.get_num_threads())
    want = torch.from_numpy(session.run(None, feed(examples[largest(examples)]))[0])
    return onnxruntime(in_8_bits(file, [feed(x) for x in data]), examples, fixed, want)


def _openvino(precision: str, file: Path, data: list[Inputs], examples: Any, fixed: bool) -> Engine:
    network = import_module("openvino").Core().read_model(str(file))
    if precision == "int8":
        network = nncf_int8(network, [feed(x) for x in data], has_attention(file))
    hints = {"fp32": ["f32"], "bf16": ["own", "bf16"], "int8": ["own", "f32", *["bf16"] * has_bf16()]}
    return openvino(network, hints[precision], examples, fixed)


def always() -> bool:
    """Return True: every CPU supports it."""
    return True


def has_bf16() -> bool:
    """Return whether this CPU multiplies bf16."""
    return not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "svebf16", "bf16"})


# name: (packages, whether this CPU supports it, builder)
ENGINES: dict[str, tuple[list[str], Callable[[], bool], Callable[..., Engine]]] = {
    "onnxruntime fp32": (["onnx", "onnxruntime"], always, partial(_onnxruntime, False)),
    "onnxruntime int8": (["onnx", "onnxruntime"], always, partial(_onnxruntime, True)),
    "openvino fp32": (["onnx", "openvino"], always, partial(_openvino, "fp32")),
    "openvino bf16": (["onnx", "openvino"], has_bf16, partial(_openvino, "bf16")),
    "openvino int8": (["onnx", "openvino", "nncf"], always, partial(_openvino, "int8")),
}
IN_8_BITS = ("onnxruntime int8", "openvino int8")


def of_model(model: nn.Module, x: Inputs, data: list[Inputs], names: Iterable[str] = ()) -> dict[str, Engine]:
    """Return torch.compile and `engines` of a dense model, timed on one input, "x".

    Raises:
        AssertionError: outputs in fp32 or bf16 are not the dense model's.
    """
    examples = {"x": x}
    with torch.no_grad():
        want, made = call(model, x), {"compiled": torch_compiled(model, examples)}
        if "logits_to_keep" not in named(x):  # language models need another exporter
            with TemporaryDirectory() as folder:
                file = Path(folder) / "model.onnx"
                exported(model, x, file)
                made |= engines(file, data, examples, names)
        for name, engine in made.items():
            found, least = cosine(engine.encode(x), want), LEAST.get(name.split()[-1], LEAST["fp32"])
            if "int8" not in name and not found > least:
                raise AssertionError(f"{name} has other outputs: cosine {found:.4f}, expected more than {least}")
    return made


def settings_of(engines: Mapping[str, Engine]) -> dict[str, Any]:
    """Return the settings of engines that have some, for a record."""
    return {name: engine.settings for name, engine in engines.items() if engine.settings}


# Models and inputs


def call(model: Any, x: Any) -> Tensor:
    """Return the first of a model's outputs."""
    y = model(**x) if isinstance(x, dict) else model(x)
    return y if isinstance(y, Tensor) else y[0]


def cosine(got: Tensor, want: Tensor) -> float:
    """Return the cosine of two outputs."""
    return float(torch.cosine_similarity(got.flatten().double(), want.flatten().double(), dim=0))


def named(x: Any) -> dict[str, Tensor]:
    """Return inputs by their names in the exported graph."""
    return x if isinstance(x, dict) else {"x": x}


def feed(x: Any) -> dict[str, Any]:
    """Return inputs as numpy arrays by name."""
    return {n: a.numpy() for n, a in named(x).items()}


class First(nn.Module):
    """A model that takes the values of `x` as positional arguments and returns its first output."""

    def __init__(self, model: nn.Module, x: Any):
        super().__init__()
        self.model, self.names = model, list(x) if isinstance(x, dict) else None
        self.train(model.training)  # the exporter restores this mode in all submodules

    def forward(self, *args: Tensor) -> Tensor:
        return call(self.model, dict(zip(self.names, args)) if self.names else args[0])


def exported(model: nn.Module, x: Inputs, file: Path) -> None:
    """Write a model with open sizes as ONNX: texts of any number and length, images of any number."""
    names = list(named(x))
    open_sizes = {0: "batch", 1: "tokens"} if isinstance(x, dict) else {0: "batch"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)  # it has no ONNX form
        torch.onnx.export(
            First(model, x),
            tuple(named(x).values()),
            str(file),
            input_names=names,
            output_names=["output"],
            dynamic_axes={name: open_sizes for name in [*names, "output"]},
            dynamo=False,
        )
        torch.backends.mha.set_fastpath_enabled(True)


# 8 bits


def in_8_bits(file: Path, batches: list[dict[str, Any]]) -> dict[str, Callable[[], Path]]:
    """Return what makes ONNX Runtime's files with int8 weights: activations calibrated, or quantized in each call."""
    return {
        "static": partial(quantized_statically, file, batches),
        "static, weights": partial(quantized_statically, file, batches, WITH_WEIGHTS),
        "dynamic": partial(quantized_dynamically, file),
    }


def quantized_statically(
    file: Path, batches: Iterable[dict[str, Any]], only: Mapping[str, Any] = MappingProxyType({})
) -> Path:
    """Return the file of a model with int8 weights, a scale per channel, and activations, calibrated on batches.

    `only` are options that leave some operators as they are.
    """
    tools: Any = import_module("onnxruntime.quantization")
    shapes: Any = import_module("onnxruntime.quantization.shape_inference")
    source, out = str(file.with_suffix(".shapes.onnx")), file.with_suffix(f".{'weights' if only else 'static'}.onnx")
    with errors_alone():  # it warns that the graph was not preprocessed, which was just done
        shapes.quant_pre_process(str(file), source, skip_symbolic_shape=True)
        kinds = {"activation_type": tools.QuantType.QUInt8, "weight_type": tools.QuantType.QInt8}
        tools.quantize_static(source, str(out), Reader(batches), per_channel=True, **kinds, **only)
    return out


def quantized_dynamically(file: Path) -> Path:
    """Return the file of a model with int8 weights, a scale per channel, which quantizes activations in each call."""
    tools: Any = import_module("onnxruntime.quantization")
    out = file.with_suffix(".dynamic.onnx")
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


def nncf_int8(network: Any, batches: list[dict[str, Any]], is_transformer: bool) -> Any:
    """Return the network quantized after training, calibrated on batches of numpy arrays by name."""
    nncf: Any = import_module("nncf")
    nncf.set_log_level(logging.ERROR)
    kind = nncf.ModelType.TRANSFORMER if is_transformer else None
    with redirect_stdout(io.StringIO()):  # progress bars
        return nncf.quantize(network, nncf.Dataset(batches), model_type=kind, subset_size=len(batches))
