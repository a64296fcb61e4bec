"""Architectures exported to ONNX by both of torch's exporters, read by `from_onnx`, and compared with ONNX Runtime.

    python bench/onnx_models.py --correct                 every file is read and compared
    python bench/onnx_models.py --correct --only resnet18 vit_b_16 --opsets 13 20
    python bench/onnx_models.py --speed                   compiled, and timed alternately with ONNX Runtime in fp32
    python bench/onnx_models.py --table                   only print what was recorded last

Weights are random. Appends one JSON line per architecture to results/onnx_models.jsonl. The exporter of TorchScript
writes opsets 11 to 20, the one of torch.export 18 to 20. Needs the extras [onnx], [vision] and [hf].
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rarefy
from peers import onnxruntime, settings_of
from rarefy.common.errors import first_line
from rarefy.evaluation.profiling import PAUSE
from recording import keep
from runtime import alternate
from tables import show

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "onnx_models.jsonl"
sys.path.insert(0, str(HERE.parent / "tests"))

OPSETS = {"torchscript": range(11, 21), "dynamo": range(18, 21)}
SLOW_IN_TORCHSCRIPT = ("swin_t",)  # minutes
IMAGES = [
    *("alexnet", "vgg11", "resnet18", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "googlenet", "inception_v3"),
    *("squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "efficientnet_b0"),
    *("regnet_y_400mf", "convnext_tiny", "vit_b_16", "swin_t"),
]
TIMM = ["convnext_atto", "vit_tiny_patch16_224", "mixer_s32_224", "ghostnet_050", "mobilevit_xxs", "repvgg_a0"]
TEXTS = ["bert", "roberta", "distilbert", "gpt2", "llama", "t5"]


class ByPosition(nn.Module):
    """A transformers model as a function of tensors, which the exporter of TorchScript needs."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs)), use_cache=False)[0]


Case = tuple[nn.Module, tuple[Tensor, ...], list[str]]  # a model, its inputs, their names


def torchvision_case(name: str, full: bool) -> Case:
    """Return a classifier, and two images: of 64 pixels, or of the size that it is used with."""
    zoo, models = importlib.import_module("zoo"), importlib.import_module("torchvision.models")
    size = (299 if full else 96) if name == "inception_v3" else 224 if full else 64
    options: dict[str, Any] = {"image_size": size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "aux_logits": False}
    return zoo.lively(models.get_model(name, weights=None, **options)), (zoo.images(size),), ["x"]


def timm_case(name: str, full: bool) -> Case:
    make, x = importlib.import_module("zoo").timm_cases()[f"timm.{name}"]
    return make(), (x,), ["x"]


def text_case(name: str, full: bool) -> Case:
    """Return a tiny model, and two texts: of 10 tokens, or of 128."""
    make, x = importlib.import_module("zoo").transformers_cases()[name]
    inputs = tuple(t.repeat(1, 13)[:, :128] if full else t for t in x.values())
    return ByPosition(make(), list(x)).eval(), inputs, list(x)


CASES: dict[str, Callable[[bool], Case]] = {
    **{name: partial(torchvision_case, name) for name in IMAGES},
    **{f"timm.{name}": partial(timm_case, name) for name in TIMM},
    **{name: partial(text_case, name) for name in TEXTS},
}


def write(
    model: nn.Module, inputs: tuple[Tensor, ...], names: list[str], file: Path, exporter: str, opset: int
) -> None:
    """Write an ONNX file with an open batch."""
    if exporter == "torchscript":
        axes = {name: {0: "batch"} for name in names}
        options = {"dynamo": False, "dynamic_axes": axes, "input_names": names, "opset_version": opset}
        torch.onnx.export(model, inputs, file, **options)
        return
    auto = {0: torch.export.Dim.AUTO}
    shapes = (tuple(auto for _ in inputs),) if isinstance(model, ByPosition) else tuple(auto for _ in inputs)
    options = {"dynamo": True, "dynamic_shapes": shapes, "opset_version": opset, "verbose": False}
    torch.onnx.export(model, inputs, file, external_data=False, input_names=names, **options)


def write_readable(name: str, model: nn.Module, inputs: tuple[Tensor, ...], names: list[str], file: Path) -> None:
    """Write an ONNX file of an architecture by whichever exporter can."""
    if name not in SLOW_IN_TORCHSCRIPT:
        try:
            return write(model, inputs, names, file, "torchscript", 17)
        except Exception:  # of torch's exporter, which lacks some operators
            pass
    write(model, inputs, names, file, "dynamo", 18)


def onnx_runtime(file: Path) -> Callable[[tuple[Tensor, ...]], list[Tensor]]:
    """Return a function that runs a file in ONNX Runtime without optimizations: what is right."""
    ort: Any = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda xs: [torch.from_numpy(y) for y in session.run(None, {n: x.numpy() for n, x in zip(names, xs)})]


def difference(module: Any, run: Callable[[Any], list[Tensor]], inputs: tuple[Tensor, ...]) -> float:
    """Return the largest difference of an output from ONNX Runtime's, relative to its largest entry."""
    with torch.no_grad():
        outputs = module(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if a.shape == b.shape else math.inf
        for a, b in zip(outputs, run(inputs))
    )


def correctness(name: str, make: Callable[[bool], Case], wanted: list[int], folder: Path) -> dict[str, Any]:
    """Return the difference of each file, or why there is none."""
    torch.manual_seed(0)
    model, inputs, names = make(False)
    files: dict[str, Any] = {}
    for exporter, opset in ((e, o) for e, opsets in OPSETS.items() for o in opsets if not wanted or o in wanted):
        file = folder / "net.onnx"
        try:
            write(model, inputs, names, file, exporter, opset)
        except Exception as error:  # of torch's exporter
            files[f"{exporter} {opset}"] = f"not exported: {reason(error)}"
            continue
        try:
            module = rarefy.from_onnx(file, example=inputs)
            files[f"{exporter} {opset}"] = difference(module, onnx_runtime(file), inputs)
        except Exception as error:
            files[f"{exporter} {opset}"] = f"not read: {reason(error)}"
    return {"run": "correct", "model": name, "files": files}


def speed(name: str, make: Callable[[bool], Case], folder: Path) -> dict[str, Any]:
    """Return quartiles in milliseconds of one input in ONNX Runtime and in the compiled model, timed alternately."""
    torch.manual_seed(0)
    model, inputs, names = make(True)
    file = folder / "net.onnx"
    write_readable(name, model, inputs, names, file)
    single = tuple(x[:1] for x in inputs)
    theirs = onnxruntime({"": lambda: file}, {1: dict(zip(names, single))})
    fast = rarefy.compile(rarefy.from_onnx(file, example=inputs), single)
    apart = difference(fast, onnx_runtime(file), single)
    times = alternate({"onnxruntime": theirs.timed[1], "compiled": lambda: fast(*single)}, 30, PAUSE)
    return {"run": "speed", "model": name, "apart": apart, "settings": settings_of({"onnxruntime": theirs}), **times}


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a record of each architecture."""
    for name, make in CASES.items():
        if args.only and name not in args.only:
            continue
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if args.correct:
                yield correctness(name, make, args.opsets, Path(folder))
            if args.speed:
                yield speed(name, make, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--correct", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--opsets", nargs="*", type=int, default=[], help="all by default")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.correct or args.speed:
        keep(RESULTS, [lambda: measured(args)])
    if args.table or not (args.correct or args.speed):
        show("onnx-models")


if __name__ == "__main__":
    main()
