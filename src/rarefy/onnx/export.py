"""Export models to ONNX. Quantized layers become operators on codes, which ONNX Runtime and OpenVINO fuse."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.common.atomic_io import atomic_folder, check_output_folder, container_errors, folder_beside, sync
from rarefy.common.errors import ContainerError, ModelError, first_line
from rarefy.common.extras import install
from rarefy.common.plain_file import usable_path
from rarefy.common.report import Report
from rarefy.model.activation_quant import rounding_by
from rarefy.model.forward import check_batches, evaluating
from rarefy.model.layers import check_is_module, unwrap
from rarefy.model.masks import attached_layers, fold_
from rarefy.model.nesting import output_names
from rarefy.model.rounding_noise import noise_of_sums
from rarefy.onnx.axes import Axes, check_axes, default_axes, name_axes_, only_these, shapes_for_export, texts_of
from rarefy.onnx.example_calls import ExampleCall, calls_with_other_sizes, example_call, outputs_of
from rarefy.onnx.integer_layers import quantize_static, unshare_zero_points_, use_integer_operators_
from rarefy.onnx.names import SCOPES
from rarefy.onnx.quantize_outputs import quantize_outputs_
from rarefy.onnx.runtimes import Feeds, compare_with_runtimes

OPSETS = range(13, 24)  # scales of single outputs begin with 13
TORCH_OPSET = 18  # in which torch writes its operators; others are converted
MIN_CONVERTED = 14  # to which onnx has a converter; it refuses Relu below
MAX_FILE = 1536 << 20  # bytes of weights in one file; protobuf ends at 2 GB


@dataclass(frozen=True)
class OnnxFile(Report):
    """A written ONNX file: how far its outputs are from the model's. It can be given wherever a path can.

    Args:
        path: the file. Further fields are those of a `Report`.
    """

    path: Path = Path()

    def __fspath__(self) -> str:
        return str(self.path)


def export_onnx(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    opset: int = TORCH_OPSET,
    calibrate: Iterable[Any] | None = None,
    external_data: bool | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> OnnxFile:
    """Write a model, in evaluation mode, as an ONNX file, and compare its outputs in ONNX Runtime and OpenVINO.

    Masks are folded into what is written. Quantized weights are stored as codes of 8 bits. Statically quantized
    activations get QuantizeLinear and DequantizeLinear; dynamically quantized ones DynamicQuantizeLinear, with
    MatMulInteger and ConvInteger on the codes: there ONNX has one scale for all rows of a call, Rarefy one for each.
    Codebooks and everything else are stored in fp32. Needs the extra [onnx]. O(weights), and a few calls.

    Args:
        model: an fp32 model.
        example: what the model is called with: a tensor, a tuple of tensors, or a dict of keyword arguments.
        path: the file to write.
        dynamic: sizes that stay open and their names, such as {"x": {0: "batch", 2: "height", 3: "width"}}; {} for
            none. By default the first dimension of each input ("batch") and the second one of texts ("length"), where
            the model's code allows it.
        opset: version of ONNX's operators, 13 to 23. torch writes 18; older and newer ones are converted.
        calibrate: batches, each like the example: outputs of convolutions with static activations, and sums of them,
            are then rounded to 8 bits too, with ranges found on these batches. ONNX Runtime needs this to compute a
            convolution in 8 bits that a sum follows, as in residual networks; OpenVINO does not.
        external_data: store the weights in `path` + ".data" beside the file. The folder of `path` is then the model's
            own and is written whole or not at all. By default for weights of more than 1.5 GB.
        verify: run the file in ONNX Runtime and, where it is installed, OpenVINO: with the example, and once with each
            open size changed. OpenVINO's difference is reported only.
        overwrite: replace an existing file; with external data the folder, if nothing else is in it.

    Returns:
        A report with the path, which can be given wherever a path can: one row for each run, with the distance of the
        outputs (relative to the largest; of the norm if activations are quantized).

    Raises:
        ContainerError: the file exists, or cannot be written.
        DataError: the model cannot be called with the example, or with a batch of `calibrate`.
        ModelError: the model is not fp32, fixes a size of `dynamic`, or torch cannot export it; an opset that it cannot
            be converted to; outputs in ONNX Runtime that differ by more than 1e-3 (with static activations 0.05, with
            dynamic ones 0.5); a missing package.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> export_onnx(net, torch.randn(1, 4), tempfile.mkdtemp() + "/net.onnx").path.name
        'net.onnx'
    """
    target = Path(path)
    _check_options(model, opset, external_data)
    call = example_call(model, example)
    axes = default_axes(call.inputs) if dynamic is None else check_axes(dynamic, call.inputs)
    large = sum(p.nbytes for p in model.parameters()) > MAX_FILE
    check_target(target, overwrite, bool(large if external_data is None else external_data))
    calls, rigid = calls_with_other_sizes(model, call, axes)
    fixed = texts_of(only_these(axes, rigid.__contains__), call.inputs)
    axes = only_these(axes, lambda axis: axis not in rigid)
    folded = _folded_copy(model)
    quantized = use_integer_operators_(folded)
    if calibrate is not None:
        check_batches(calibrate, "calibrate")
        if quantized != "static":
            raise ModelError("calibrate= has no effect: no layer has static activations; quantize_ with 'int8-static'")
    with _as_exporter(), evaluating(folded):  # a key-value cache is not an output that ONNX can have
        program, notes = _export(folded, call, axes, opset, fixed, required=dynamic is not None)
    if calibrate is not None:
        batches = (_feeds(program, example_call(model, batch).inputs) for batch in calibrate)
        with tempfile.TemporaryDirectory() as folder:
            count = quantize_outputs_(program, batches, Path(folder) / "model.onnx")
        notes.append(f"outputs of {count} operators are rounded to 8 bits")
    size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values() if v.const_value is not None)
    apart = size > MAX_FILE if external_data is None else external_data
    if size > MAX_FILE and not apart:
        raise ModelError(f"{size:,} bytes of weights are too many for one file: leave out external_data=False")
    rows: list[dict[str, Any]] = []
    with _written(program, target, overwrite, apart) as file:
        if verify:
            feeds = [(label, _feeds(program, inputs), outputs) for label, inputs, outputs in calls]
            left = [label for label, feed, _ in feeds if not _takes(program, feed)]
            noise = partial(_noise, model, call, calls)
            rows, more = compare_with_runtimes(file, [f for f in feeds if f[0] not in left], quantized, noise)
            notes += more
            if left:
                notes.append(f"not compared, as the file fixes that size: {', '.join(left)}")
        num_bytes = sum(f.stat().st_size for f in file.parent.iterdir())
    summary = {"opset": opset, "bytes": num_bytes, "open sizes": _open_sizes(program)}
    return OnnxFile(f"wrote {target}", tuple(rows), summary, tuple(notes), path=target)


def _noise(model: nn.Module, call: ExampleCall, calls: Sequence[tuple[str, Any, list[Tensor]]], label: str) -> float:
    """Return how far rounding errors of the inputs of one of the calls move the model's own outputs."""
    inputs, outputs = next((i, o) for name, i, o in calls if name == label)
    with evaluating(model), torch.no_grad():
        return noise_of_sums(lambda x: outputs_of(model, call, x), inputs, outputs)


def _check_options(model: Any, opset: Any, external_data: Any) -> None:
    """Raise ModelError for what cannot be exported, and where a package is missing."""
    check_is_module(model)
    if type(opset) is not int or opset not in OPSETS:
        raise ModelError(f"opset: expected a whole number from {OPSETS[0]} to {OPSETS[-1]}, got {opset!r}")
    if external_data is not None and type(external_data) is not bool:
        raise ModelError(f"external_data: expected True, False or None, got {external_data!r}")
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError(f"ONNX needs more packages: {install('onnx')} ({error})") from None
    half = next((n for n, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if half is not None:
        raise ModelError(f"{half} is {str(model.get_parameter(half).dtype).removeprefix('torch.')}: cast to fp32 first")


def check_target(path: Path, overwrite: bool, external_data: bool) -> None:
    """Raise ContainerError if a file, or with external data its folder, must not be written."""
    usable_path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise ContainerError(f"{path} exists: pass overwrite=True, or give another name")
    if not external_data:
        if not path.parent.is_dir():
            raise ContainerError(f"cannot write {path}: the folder {path.parent} does not exist")
        return
    folder = Path(os.path.realpath(path.parent))
    known = {path.name, f"{path.name}.data"}
    other = sorted(f.name for f in folder.iterdir() if f.name not in known or f.is_dir()) if folder.is_dir() else []
    if other:
        raise ContainerError(
            f"{folder} holds other files ({other[0]}): external data needs a folder of its own, such as "
            f"{path.with_suffix('') / 'model.onnx'}"
        )
    check_output_folder(folder, overwrite=True, marker=path.name)


def _folded_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode without masks and grids, which shares all tensors that have none."""
    model = unwrap(model)
    own = {id(layer.original) for layer in attached_layers(model)}
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in own}
    return fold_(copy.deepcopy(model, shared)).eval()


@contextmanager
def _as_exporter() -> Iterator[None]:
    """Export static rounding as ONNX's operators, without gradients and without the exporter's messages."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad(), rounding_by(quantize_static):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _export(
    model: nn.Module, call: ExampleCall, axes: Axes, opset: int, fixed: list[str], required: bool
) -> tuple[Any, list[str]]:
    """Return torch's program with its sizes and outputs named, and notes.

    Args:
        model: a folded model.
        call: how it is called.
        axes: names of the sizes that stay open.
        opset: version of the operators.
        fixed: sizes that the model takes in no other value, as messages name them.
        required: whether a size that cannot be open is an error.
    """
    from onnx_ir.passes.common import NameFixPass

    notes: list[str] = []
    options: dict[str, Any] = {"dynamo": True, "verbose": False, "optimize": True}
    options |= {"opset_version": max(opset, TORCH_OPSET), "kwargs": call.kwargs or None}
    if call.names and len(call.names) == len(call.inputs):
        options |= {"input_names": list(call.inputs)}
    options |= {"output_names": _output_names(model, call)}
    _check_fixed(model, fixed, required)
    try:
        shapes = shapes_for_export(call.arguments, axes, call.names)
        program: Any = torch.onnx.export(model, call.args, dynamic_shapes=shapes, **options)
    except Exception as error:  # torch raises many kinds of errors
        reason = f"torch cannot export this {type(model).__name__} to ONNX: {_cause(error)}"
        if required or not any(axes.values()):
            hint = "; if an open size is the reason, leave it out of dynamic=" if any(axes.values()) else ""
            raise ModelError(reason + hint) from error
        try:
            program = torch.onnx.export(model, call.args, **options)
        except Exception:
            raise ModelError(reason) from error
        notes.append(f"all sizes are fixed at the example's: with open ones, {reason}")
    else:
        fixed = fixed + texts_of(name_axes_(program.model, axes), call.inputs)
        _check_fixed(model, fixed, required)
    notes += [f"the model's code fixes {text}" for text in fixed]
    for node in program.model.graph.all_nodes():
        for key in [k for k in node.metadata_props if k != SCOPES]:  # as large as small models' weights
            del node.metadata_props[key]
    NameFixPass()(program.model)  # a value inside may have the name that an output was given
    unshare_zero_points_(program.model.graph)
    if opset < TORCH_OPSET:
        _convert_down_(program, opset)
    return program, notes


def _output_names(model: nn.Module, call: ExampleCall) -> list[str] | None:
    """Return the names of a model's outputs: those of its file, else of fields, else output_0 and so on.

    None where torch has to choose them, as some output is no tensor.
    """
    leaves, spec = pytree.tree_flatten(model(*call.args, **call.kwargs))
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    names = call.outputs if len(call.outputs) == len(leaves) else output_names(None, spec)
    unique: list[str] = []
    for name in names:
        while name in call.inputs or name in unique:
            name = f"{name}_output"
        unique.append(name)
    return unique


def _check_fixed(model: nn.Module, fixed: list[str], required: bool) -> None:
    """Raise ModelError for a required size that cannot be open."""
    if fixed and required:
        raise ModelError(
            f"dynamic: the code of {type(model).__name__} fixes {fixed[0]}: leave it out of dynamic=, or export a "
            "model whose code does not depend on it"
        )


def _cause(error: BaseException) -> str:
    """Return the first line of the error that caused another."""
    while error.__cause__ is not None:  # the cause is in the last one
        error = error.__cause__
    return first_line(error)


def _convert_down_(program: Any, opset: int) -> None:
    """Convert a program to an older opset; ModelError where ONNX has no conversion."""
    import onnx
    import onnx_ir
    from onnx import version_converter

    try:
        model = version_converter.convert_version(program.model_proto, max(opset, MIN_CONVERTED))
        if opset < MIN_CONVERTED:  # differs by types and attributes alone, which the checker knows
            for node in model.graph.node:
                attributes = [a for a in node.attribute if a.name != "allowzero"]  # torch's shapes have no zeros
                del node.attribute[:]
                node.attribute.extend(attributes)
            next(o for o in model.opset_import if o.domain == "").version = opset
            onnx.checker.check_model(model, full_check=True)
        program.model = onnx_ir.from_proto(model)
    except Exception as error:  # onnx's own classes
        raise ModelError(
            f"opset: the model cannot be converted to {opset} ({first_line(error)}): give {TORCH_OPSET} or more"
        ) from None


@contextmanager
def _written(program: Any, target: Path, overwrite: bool, external_data: bool) -> Iterator[Path]:
    """Write a program into a temporary folder and yield the file there; it goes to its place after the block."""
    if external_data:
        check_target(target, overwrite, True)
        folder = atomic_folder(target.parent, overwrite=True, marker=target.name)
    else:
        folder = folder_beside(target)
    with ExitStack() as stack:
        with container_errors(target):
            file = stack.enter_context(folder) / target.name
        with container_errors(target):
            program.save(file, external_data=external_data)
        yield file
        if not external_data:
            with container_errors(target):
                sync(file)
                os.replace(file, target)


def _takes(program: Any, feeds: Mapping[str, Any]) -> bool:
    """Return whether a program takes inputs of these sizes."""
    shapes = ((i.shape, feeds[i.name].shape) for i in program.model.graph.inputs)
    return all(not isinstance(want, int) or want == size for shape, sizes in shapes for want, size in zip(shape, sizes))


def _open_sizes(program: Any) -> str:
    """Return the names of the open sizes of a program's inputs."""
    inputs = program.model.graph.inputs
    named = [f"{v.name}[{d}] {n.value}" for v in inputs for d, n in enumerate(v.shape) if not isinstance(n, int)]
    return ", ".join(named) or "none"


def _feeds(program: Any, inputs: Mapping[str, Tensor]) -> Feeds:
    """Return the inputs by the names that the file has for them."""
    names = [v.name for v in program.model.graph.inputs]
    same = inputs if set(names) <= set(inputs) else dict(zip(names, inputs.values()))
    return {name: same[name].detach().contiguous() for name in names}
