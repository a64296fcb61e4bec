"""`compile`: a whole model as one callable that runs native programs, and torch for the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.common.errors import DataError, ModelError, OutputsDifferError, unknown
from rarefy.common.renamed import renamed_parameters
from rarefy.compiler import ops, tuning
from rarefy.compiler.branches import Branches
from rarefy.compiler.calibrate import calibration_batches, in_torch
from rarefy.compiler.executor import Compiled
from rarefy.compiler.export import Pass, export_graph, two_samples
from rarefy.compiler.fx_utils import ExportedGraph, Node
from rarefy.compiler.half_precision import convert_ends, copy_in_fp32, dtypes_of, in_fp32, precision_to_run
from rarefy.compiler.input_checks import input_spec
from rarefy.compiler.kernel_selection import pack_for_batches, select_kernels
from rarefy.compiler.layer_precision import layer_precisions, without_kernels
from rarefy.compiler.model_checks import check_example, check_module, check_precision, check_ready, fold_copy
from rarefy.compiler.operators.fake_quantize import rounds_values
from rarefy.compiler.operators.table import BY_TARGET
from rarefy.compiler.passes import (
    activation,
    attention,
    attention_formulas,
    attention_heads,
    channel_order,
    channels,
    cleanup,
    conv,
    flat_images,
    fusion,
    kv_attention,
    linear,
    norm,
    padding_mask,
    quantization,
    rope,
    tokens,
)
from rarefy.compiler.program import is_depthwise
from rarefy.compiler.static_kernels import calibrated_kernels
from rarefy.compiler.tolerance import (
    FAR,
    TOLERANCE,
    advice,
    check_max_error,
    tolerance,
    warn_of_error,
)
from rarefy.compiler.traced_graph import once_more
from rarefy.compiler.unit_sizes import allow_ones
from rarefy.compiler.verify import CheckedSizes, verify
from rarefy.compiler.zero_choice import choose_formats_
from rarefy.model.activation_quant import get_activation_quant, suspended
from rarefy.model.forward import calling, describe_batch, split_example
from rarefy.model.image_config import image_config_of, set_image_config_
from rarefy.model.layers import Selector, all_layers
from rarefy.model.nesting import input_names, output_names
from rarefy.model.quant_grid import Grid, OffsetGrid, get_grid
from rarefy.runtime.packed_formats import PANEL_BITS

OR_NAMED = ", or ignore= or per_layer= names all of them"
INTEGER_KINDS = {"int8": tuple(PANEL_BITS), "int16": ("int16",)}  # of packed weights; 8 bits or less count as int8


# Every pass sees each node once, in this order: what a pass matches is what the passes before it left.
PASSES = (
    # values that the model rounds; remove what does nothing, compute what is constant
    quantization.convert_fake_quantize,
    cleanup.remove_noop,
    cleanup.fold_constants,
    padding_mask.index_to_view,
    padding_mask.remove_true_operands,
    # linear layers and embeddings; split what computes queries, keys and values at once
    linear.convert_embedding,
    linear.convert_linear,
    linear.remove_views_around_linear,
    linear.fold_bias,
    linear.split_linear_outputs,
    attention.split_qkv_view,
    attention.split_mha_in_proj,
    linear.fold_batch_norm,
    linear.undo_flatten,
    linear.fold_layer_scale,
    # formulas that a model writes out
    activation.fuse_formulas,
    norm.convert_norm,
    norm.fuse_layer_norm,
    norm.fuse_rms_norm,
    norm.fuse_head_norm,
    attention_formulas.split_merged_heads,
    attention_formulas.fuse_sdpa,
    attention_formulas.fold_attention_scale,
    attention_formulas.group_repeated_heads,
    rope.fuse_rope,
    kv_attention.convert_cached_attention,
    attention.make_mha_batch_first,
    # elementwise operators, and attention as one operator
    activation.convert_pointwise,
    activation.fuse_quick_gelu,
    attention.fuse_attention,
    linear.remove_view_pairs,
    # images
    conv.convert_conv,
    conv.fold_batch_norm,
    conv.convert_transposed_conv,
    channels.rows_to_images,
    channels.fold_channel_scale,
    conv.convert_pool,
    conv.convert_avg_pool,
    channels.convert_batch_norm,
    channels.convert_constants,
    channels.convert_unit_clamp,
    channels.fold_affine,
    channels.convert_mean,
    channels.convert_scale,
    channels.convert_norm,
    channels.convert_group_norm,
    channels.convert_concat,
    channel_order.convert_selection,
    quantization.delay_fake_quantize,
    # attention in other layouts, and whole tokens that change their places
    attention_heads.convert_heads,
    tokens.convert_moves,
    tokens.convert_swap,
    # activations and residual sums move into the layer before them: at most one of each kind a run
    fusion.fuse_epilogue,
    fusion.fuse_epilogue,
    flat_images.linear_to_conv,
)

ROUNDING_LAYERS = (nn.Linear, nn.Conv2d)  # whose kernels can round inputs in each call, as `quantize_` makes layers do
SOLVERS = ("obs", "rtn")
CLEARLY_FASTER = 0.95  # time over eager's, from which the graph in torch alone, often faster than eager, is tried too

# for a model that torch runs faster: what changes nothing, and BatchNorms into convolutions
TORCH_PASSES = (
    cleanup.remove_noop,
    cleanup.fold_constants,
    linear.convert_linear,
    linear.fold_batch_norm,
    linear.undo_flatten,
    conv.convert_conv,
    conv.fold_batch_norm,
)


@renamed_parameters(values="precision")
def compile(
    model: nn.Module,
    example: Any,
    *,
    precision: str | None = None,
    ignore: Selector = None,
    per_layer: Mapping[str, str] | None = None,
    calibrate: Iterable[Any] | None = None,
    solver: str = "obs",
    tune: bool = True,
    dynamic: bool = True,
    max_error: float | None = None,
) -> Compiled:
    """Return a faster callable that returns what the model returns.

    The model is exported with `torch.export`, its operators are fused, and each fused subgraph runs as one native call
    on the CPU. Operators that the engine does not have run in torch. Outputs are compared with the model's on the
    example before it is returned.

    Args:
        model: a model in evaluation mode, on the CPU, in fp32, bf16 or fp16. Of one in bf16 or fp16 a copy in fp32 is
            compiled, which takes and returns what the model does. Masks and quantization grids that are still attached
            are folded in a copy, and `print(compiled)` says so; the model keeps them.
        example: what the model can be called with: a dict of keywords, a tuple of arguments, or one tensor. Later calls
            may have other batch sizes and lengths if the model's code allows it; heights and widths of images are
            fixed.
        precision: None for that of the model; those in fp16 run in fp32, layers whose inputs are rounded in each call
            (`quantize_(activations="int8")`) in 8 bits. "fp32" runs a model in bf16 in fp32 too. "bf16" multiplies the
            matrices of linear layers in bfloat16 with fp32 sums, and those of attention where the CPU is faster so;
            convolutions stay in fp32. "int16" runs linear layers and most convolutions of one group in 16-bit integers,
            with a scale for each output of a weight and one for the inputs of each output: outputs change by less than
            in bf16. CPUs with AVX2 run linear layers as fast in it as in int8.
            "int8" runs linear layers and convolutions in 8 bits, with a scale for each output of a weight and one
            for each row or image of inputs, and attention as "bf16" does or, where the CPU is not faster so, in 8 bits;
            grouped convolutions stay in fp32. Outputs change a little.
        ignore: selectors of layers that stay in fp32, whatever the precision: those that lose most by it. Attention
            itself, which has no weights, follows the precision. `rarefy.optimize` finds such layers.
        per_layer: precisions of single layers, "fp32", "bf16", "int16" or "int8" by selector: {"head": "bf16"}. If
            several selectors match a layer, the last one applies. Layers that lose most in 8 bits lose little in 16.
            bf16 is faster than fp32 on CPUs that multiply it fast. Layers without a kernel in a precision stay in fp32,
            as convolutions in bf16 and grouped ones in int16 do, and `print(compiled)` says so.
        calibrate: batches, each like the example, on which the ranges of inputs of int8 convolutions are found once, so
            that no call has to find them: faster, and zero points make full use of 8 bits behind a ReLU. A few dozen
            typical images are enough. Values outside of these ranges saturate. Linear layers keep a scale for each row
            where the layer before them finds it on the way.
        solver: with calibrate, how weights are rounded: "obs" makes up for each rounding error by the other weights
            of an output (GPTQ, Frantar 2023), "rtn" rounds each to the nearest, which is quicker and loses more.
        tune: time each native call against torch on the example, and the compiled model against the model. What torch
            runs faster runs in torch, and zeros are skipped where that is faster; `print(compiled)` says so. Choices
            are remembered, see `runtime/tuning_cache.py`. False, or RAREFY_TUNE=0 in the environment: everything that
            the engine has runs natively.
        dynamic: False fixes all sizes to the example's, and compiles in a part of the time.
        max_error: the largest relative distance ||compiled - model|| / ||model|| of an output on the example. None for
            0.001 in fp32, 0.1 in bf16, 0.03 in int16, and 0.2 in int8, where there is a warning from 0.1.

    Returns:
        A `Compiled`, to be called like the model, by several threads at once. It computes no gradients, and does not
        see later changes of the model. `print` it to see what runs natively and what runs in torch. Tokens that
        `attention_mask` hides are left out where nothing depends on them: outputs are zeros there. Set its attribute
        `skip_padding` to False to compute them. Its method `run` takes and returns numpy arrays by name.

    Raises:
        ModelError: if torch.export cannot export the model, the model is in training mode, has parameters of several
            types or is not on the CPU, or the compiled outputs differ from the model's.
        DataError: if the example has no tensor, or the model cannot be called with it.

    Cost: a few seconds for the export, which a model like one of the last four in this process does not need again, and
    at most about 6 seconds for timing; where weights have zeros, 6 seconds or 20 calls more. Calibration takes two
    calls a batch in torch, more for very large models, and keeps all batches in memory; rounding by obs O(outputs
    inputs^2 + inputs^3) a layer, on two cores 4 seconds for EfficientNet-Lite0 and 20 for ResNet-50. `solver="rtn"`
    leaves it out. Memory: the packed weights (with zeros left out in sparse formats) beside the model's own, which may
    be deleted afterwards; while a model in bf16 or fp16 is compiled, its copy in fp32; while layers with zeros are
    timed, both their formats; while weights are rounded, 0.5 GB; working memory grows with the activations of the
    largest call.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> fast = compile(net, torch.randn(2, 4))
        >>> x = torch.randn(5, 4)
        >>> bool((fast(x) - net(x)).abs().max() < 1e-5)
        True
    """
    check_precision(precision)
    check_max_error(max_error)
    if solver not in SOLVERS:
        raise ModelError(unknown("solver", str(solver), SOLVERS))
    check_module(model)
    calibrate = list(calibrate) if isinstance(calibrate, Iterator) else calibrate  # it may be read again
    options = {"precision": precision, "ignore": ignore, "per_layer": per_layer, "calibrate": calibrate}
    compile_call = partial(_compile_call, **options, solver=solver, tune=tune, max_error=max_error)
    arguments = split_example(example)
    if not dynamic or calibrate is not None:
        return compile_call(model, *arguments, dynamic=dynamic)
    branches = Branches(model, compile_call)
    compiled = branches.compile(model, *arguments)
    compiled.branches = branches
    return compiled


def _compile_call(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    precision: str | None,
    ignore: Selector,
    per_layer: Mapping[str, str] | None,
    calibrate: Iterable[Any] | None,
    solver: str,
    tune: bool,
    max_error: float | None,
    dynamic: bool = True,
) -> Compiled:
    """Return a model compiled for a call; see `compile`."""
    model, notes = fold_copy(model)
    dtype = check_ready(model)
    runs_in = precision_to_run(precision, dtype)
    check_example(pytree.tree_leaves((args, kwargs)))
    with calling(model, f"an example of {describe_batch(kwargs or args)}"), torch.no_grad():
        outputs = dtypes_of(model(*args, **kwargs))
    with suspended(model, ROUNDING_LAYERS) as rounding:
        chosen = layer_precisions(model, ignore, per_layer)
        if chosen and not (runs_in or rounding or any(chosen.values())):
            raise ModelError(
                "ignore= and per_layer= name layers that stay in fp32, as all others do: pass precision='int8', "
                "'int16' or 'bf16' with them"
            )
        if calibrate is not None and "int8" not in (precision, *chosen.values()):
            raise ModelError("calibrate= finds the scales of int8: pass precision='int8' with it")
        own = {**dict.fromkeys(rounding, "int8"), **chosen}
        if precision in (None, "fp32"):
            in_8_bits = [n for n, own_precision in own.items() if own_precision == "int8"]
            notes += _idle_grids(model, in_8_bits, runs_in or "fp32")
        options = own, calibrate, solver, tune, notes, dynamic, max_error
        if dtype == torch.float32:
            return _named(once_more(lambda: _compile(model, args, kwargs, runs_in, *options)), model)
        if calibrate is not None:
            options = own, [in_fp32(kw or a) for a, kw in map(split_example, calibrate)], *options[2:]
        model = copy_in_fp32(model)
        compiled = once_more(lambda: _compile(model, in_fp32(args), in_fp32(kwargs), runs_in, *options))
    inputs = dtypes_of((args, {n: kwargs[n] for n in compiled.keywords}))
    convert_ends(compiled, inputs, outputs, dtype)
    return _named(compiled, model)


def _idle_grids(model: nn.Module, rounding: Iterable[str], runs_in: str) -> tuple[str, ...]:
    """Return a note about layers whose quantized weights make no difference, because their inputs are not rounded."""
    rounded = {*rounding}
    count = sum(
        isinstance(layer.module, ROUNDING_LAYERS)
        and isinstance(get_grid(layer), Grid | OffsetGrid)
        and get_activation_quant(layer.module) is None
        and rounded.isdisjoint(name for name, *_ in layer.owners)
        for layer in all_layers(model)
    )
    if not count:
        return ()
    return (
        f"the weights alone are quantized in {count} layer{'s' * (count > 1)}, which run in {runs_in}: "
        "precision='int8' runs them in 8 bits",
    )


def _named(compiled: Compiled, model: nn.Module) -> Compiled:
    """Record in a compiled model the names of its inputs and outputs, and how images are prepared; return it."""
    exported, images = compiled.exported, image_config_of(model)
    if images is not None:
        set_image_config_(compiled, images)
    exported.input_names = tuple(input_names(model, exported.in_spec))
    exported.output_names = tuple(output_names(model, exported.out_spec))
    return compiled


def _compile(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    precision: str | None,
    own: Mapping[str, str | None],
    calibrate: Iterable[Any] | None,
    solver: str,
    tune: bool,
    notes: tuple[str, ...],
    dynamic: bool,
    max_error: float | None,
) -> Compiled:
    """Return a model in fp32 compiled in a precision, but for layers that have their `own`; see `compile`."""
    lowest = max((precision, *own.values()), key=TOLERANCE.__getitem__)
    in_16_bits = {n for n, own_precision in own.items() if own_precision in ("bf16", "int16")}
    passes = passes_for(lowest, calibrate is not None, in_16_bits)
    exported = export_graph(model, args, kwargs, passes, dynamic=dynamic)
    specs = [input_spec(n.meta.get("val")) for n in exported.inputs]
    more = two_samples(args, kwargs) if dynamic and not exported.notes else (args, kwargs)
    if dynamic and not exported.notes:
        leaves, spec = pytree.tree_flatten((more[0], dict(more[1])))

        def trace(values: list[Any]) -> ExportedGraph:
            arguments, keywords = pytree.tree_unflatten(values, spec)
            return export_graph(model, arguments, keywords, (), two=False)

        allow_ones(exported, specs, leaves, trace)
    exported.notes += notes
    checked = None  # sizes at which outputs were compared
    if lowest or rounds_values(exported):  # kernels that round would hide a wrong graph
        checked = verify(model, in_torch(exported, specs), *more, tolerance(exported))

    def precision_of(node: Node) -> str | None:
        return precision if node.target is ops.attention else own.get(exported.layers.get(node, ""), precision)

    select = partial(
        select_kernels, exported, lambda w, n, grid: pack_for_batches(w, precision_of(n), grid), precision_of
    )
    kernels = select()
    exported.notes += without_kernels(exported, kernels, {n: own[n] for n in in_16_bits})
    others = [] if calibrate is None else [n for n in exported.graph.nodes if n not in kernels]
    depthwise = [n for n in others if precision_of(n) == "int8" and _is_depthwise(exported, n)]
    if precision in INTEGER_KINDS and not (has_kernels(kernels, precision) or rounds_values(exported) or depthwise):
        raise ModelError(
            f"precision={precision!r} has no effect: {type(model).__name__} has no linear layer and no 2D convolution "
            f"that the engine runs in {precision[3:]} bits{OR_NAMED if own else ''}; leave it out for fp32"
        )
    weights = dict(exported.constants)
    if calibrate is not None:
        kernels = calibrated_kernels(
            exported, specs, kernels, depthwise, calibration_batches(calibrate), solver, select
        )
    compiled = Compiled(exported, kernels, specs)
    allowed = tolerance(exported, lowest, max_error)
    advise = partial(advice, compiled, more, weights, calibrate is not None) if lowest == "int8" else None
    checked = _verify_all_tokens(model, compiled, more, allowed, checked, advise)
    if advise is not None and max_error is None and checked.error > FAR:
        warn_of_error(checked.error, advise())
    if tune and tuning.is_enabled():
        example = _runnable(compiled, (args, kwargs), more)
        if choose_formats_(compiled, *example):
            _verify_all_tokens(model, compiled, more, allowed, checked, advise)
        compiled = _not_slower(model, compiled, weights, example, notes, dynamic)
        if lowest in INTEGER_KINDS and not (has_kernels(compiled.kernels, lowest) or rounds_values(exported)):
            why = f"torch is faster in fp32 on the example; tune=False runs {lowest} all the same"
            compiled.exported.notes += (f"nothing runs in {lowest[3:]} bits: {why}",)
    compiled.forget()
    return compiled


def _verify_all_tokens(
    model: nn.Module,
    compiled: Compiled,
    example: tuple[Any, Any],
    allowed: float,
    checked: CheckedSizes | None,
    advise: Callable[[], str] | None = None,
) -> CheckedSizes:
    """Compare a compiled model with the model, but for 8 bits at padding too; see `verify`. `advise` returns what an
    error in 8 bits adds."""
    compiled.skip_padding = False
    try:
        return verify(model, compiled, *example, allowed, checked, padding=advise is None)
    except OutputsDifferError as error:
        if advise is None:
            raise
        raise OutputsDifferError(f"{error}. {advise()}") from None
    finally:
        compiled.skip_padding = True


def has_kernels(kernels: Mapping[Node, Any], precision: str) -> bool:
    """Return whether a linear layer or a convolution has a kernel in a precision of INTEGER_KINDS."""
    layers = (k for n, k in kernels.items() if n.target in (ops.linear, ops.conv2d))
    return any(k.held[0].kind in INTEGER_KINDS[precision] for k in layers)


def _runnable(compiled: Compiled, example: tuple[Any, Any], more: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return the example's arguments; those with two samples where the compiled model does not take one."""
    try:
        compiled.leaves(*example)
    except DataError:
        return more
    return example


def _not_slower(
    model: nn.Module,
    compiled: Compiled,
    weights: Mapping[str, Tensor],
    example: tuple[Any, Any],
    notes: tuple[str, ...],
    dynamic: bool,
) -> Compiled:
    """Return a compiled model that runs in torch what torch runs faster, all of it if need be.

    Args:
        model: the model.
        compiled: made from it, all operators of the engine native.
        weights: dense weights by the names of their placeholders.
        example: arguments and keywords.
        notes: sentences about the model for `print`.
        dynamic: whether sizes stay open.
    """
    args, kwargs = example
    slow = tuning.slow_nodes(compiled, weights, compiled.leaves(args, kwargs))
    if slow:
        compiled.move_to_torch(slow, weights)
    ours, eager = tuning.seconds_of_calls(compiled, model, args, kwargs)
    if ours <= CLEARLY_FASTER * eager:
        return compiled
    exported = export_graph(model, args, kwargs, TORCH_PASSES, dynamic=dynamic)
    more = two_samples(args, kwargs) if dynamic and not exported.notes else (args, kwargs)
    exported.torch_nodes.update(n for n in exported.graph.nodes if n.target in BY_TARGET)
    unchanged = Compiled(exported, {}, [input_spec(n.meta.get("val")) for n in exported.inputs])
    verify(model, unchanged, *more, tolerance(compiled.exported))
    ours, in_torch_alone = tuning.seconds_of_calls(compiled, unchanged, args, kwargs)
    if ours <= in_torch_alone:
        return compiled
    times = f"on the example it takes {1e3 * in_torch_alone:.3g} ms, with native calls {1e3 * ours:.3g} ms"
    exported.notes += (*notes, f"all in torch: {times}")
    return unchanged


def passes_for(
    precision: str | None, static: bool = False, in_16_bits: Collection[str] = frozenset()
) -> tuple[Pass, ...]:
    """Return the passes for a precision: linear layers have faster kernels than convolutions in bf16, and in int8 where
    the scales of inputs are not static. Layers `in_16_bits` stay linear."""
    if precision is None:
        return PASSES
    last = (partial(flat_images.linear_to_conv, stay=in_16_bits),) if static else ()
    return (*(p for p in PASSES if p not in (channels.rows_to_images, flat_images.linear_to_conv)), *last)


def _is_depthwise(exported: ExportedGraph, node: Node) -> bool:
    return node.target is ops.conv2d and is_depthwise(node, exported.constants)
