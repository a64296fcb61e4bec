"""The operators that a saved graph may call, by name: the engine's, pure functions of ATen, and arithmetic of sizes.

A name from a file is looked up here and nowhere else. The arguments of a call are checked against the operator's
signature: see `check_call`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.immutable_collections import immutable_list

from rarefy.compiler.checked_ops import MAX_PIXELS, UNCHECKED
from rarefy.compiler.operators.table import BY_NAME, BY_TARGET
from rarefy.model.activation_quant import MIN_SCALE
from rarefy.runtime.reference import ACTIVATIONS

TENSOR, NUMBER, SEVERAL, CACHE = "a tensor", "a number", "several tensors", "a cache"  # what a node's output is

# operators on sizes, and their number of arguments
PYTHON: dict[str, tuple[Any, int]] = {
    "operator.getitem": (operator.getitem, 2),
    "operator.add": (operator.add, 2),
    "operator.sub": (operator.sub, 2),
    "operator.mul": (operator.mul, 2),
    "operator.floordiv": (operator.floordiv, 2),
    "operator.mod": (operator.mod, 2),
    "operator.truediv": (operator.truediv, 2),
    "operator.eq": (operator.eq, 2),
    "operator.ne": (operator.ne, 2),
    "operator.lt": (operator.lt, 2),
    "operator.le": (operator.le, 2),
    "operator.gt": (operator.gt, 2),
    "operator.ge": (operator.ge, 2),
    "operator.neg": (operator.neg, 1),
    "torch.sym_int": (torch.sym_int, 1),
    "torch.sym_float": (torch.sym_float, 1),
    "torch.sym_not": (torch.sym_not, 1),
    "torch.sym_max": (torch.sym_max, 2),
    "torch.sym_min": (torch.sym_min, 2),
    "math.ceil": (math.ceil, 1),
    "math.floor": (math.floor, 1),
    "math.trunc": (math.trunc, 1),
}

# pure functions: they change nothing, draw no random numbers and touch no file
_NAMES = """
__and__.Scalar __and__.Tensor __or__.Scalar __or__.Tensor __xor__.Scalar __xor__.Tensor
_adaptive_avg_pool2d.default _log_softmax.default _native_batch_norm_legit.no_stats
_native_batch_norm_legit_no_training.default _softmax.default _to_copy.default
abs.default acos.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default
adaptive_max_pool1d.default adaptive_max_pool2d.default add.Scalar add.Tensor addcdiv.default addcmul.default
addmm.default alias.default all.default all.dim amax.default amin.default any.default any.dim arange.default
arange.start arange.start_step argmax.default argmin.default argsort.default asin.default atan.default
atan2.default avg_pool1d.default avg_pool2d.default avg_pool3d.default
baddbmm.default batch_norm.default bitwise_and.Scalar bitwise_and.Tensor bitwise_not.default bitwise_or.Scalar
bitwise_or.Tensor bitwise_xor.Scalar bitwise_xor.Tensor bmm.default broadcast_tensors.default broadcast_to.default
cat.default ceil.default celu.default chunk.default clamp.Tensor clamp.default clamp_max.default clamp_min.default
clone.default concat.default constant_pad_nd.default contiguous.default conv1d.default conv1d.padding
conv2d.default conv2d.padding conv3d.default conv3d.padding conv_transpose1d.default conv_transpose2d.input
conv_transpose3d.input convolution.default cos.default cosh.default cumprod.default cumsum.default
detach.default diag.default diagonal.default diff.default div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode
einsum.default elu.default embedding.default eq.Scalar eq.Tensor erf.default erfc.default
exp.default exp2.default expand.default expand_as.default expm1.default eye.default eye.m
fill.Scalar flatten.using_ints flip.default floor.default floor_divide.Scalar floor_divide.default fmod.Scalar
fmod.Tensor full.default full_like.default
gather.default ge.Scalar ge.Tensor gelu.default glu.default group_norm.default gt.Scalar gt.Tensor
hardsigmoid.default hardswish.default hardtanh.default
im2col.default index.Tensor index_select.default instance_norm.default isfinite.default isinf.default isnan.default
layer_norm.default le.Scalar le.Tensor leaky_relu.default lerp.Scalar lerp.Tensor lift_fresh_copy.default
linalg_norm.default linalg_vector_norm.default linear.default linspace.default log.default log10.default
log1p.default log2.default log_sigmoid.default log_softmax.int logical_and.default logical_not.default
logical_or.default logical_xor.default logsumexp.default lt.Scalar lt.Tensor
masked_fill.Scalar masked_fill.Tensor matmul.default max.default max.dim max.other max_pool1d.default
max_pool2d.default max_pool2d_with_indices.default max_pool3d.default maximum.default mean.default mean.dim
meshgrid.default meshgrid.indexing min.default min.dim min.other minimum.default mish.default mm.default
movedim.int movedim.intlist mul.Scalar mul.Tensor mv.default
narrow.default native_group_norm.default native_layer_norm.default ne.Scalar ne.Tensor neg.default
new_full.default new_ones.default new_zeros.default norm.ScalarOpt_dim numpy_T.default
one_hot.default ones.default ones_like.default
pad.default permute.default pixel_shuffle.default pixel_unshuffle.default pow.Scalar pow.Tensor_Scalar
pow.Tensor_Tensor prelu.default prod.default prod.dim_int
reciprocal.default reflection_pad1d.default reflection_pad2d.default relu.default relu6.default remainder.Scalar
remainder.Tensor repeat.default repeat_interleave.self_int replication_pad1d.default replication_pad2d.default
reshape.default reshape_as.default rms_norm.default roll.default round.default rsqrt.default rsub.Scalar
rsub.Tensor
scalar_tensor.default scaled_dot_product_attention.default scatter.src scatter.value scatter_add.default
select.int select_scatter.default selu.default sigmoid.default sign.default silu.default sin.default sinh.default
slice.Tensor slice_scatter.default softmax.int softplus.default sort.default split.Tensor split.sizes
split_with_sizes.default sqrt.default square.default squeeze.default squeeze.dim squeeze.dims stack.default
std.correction std.dim sub.Scalar sub.Tensor sum.default sum.dim_IntList swapaxes.default sym_numel.default
sym_size.int
t.default tan.default tanh.default tensor_split.indices tensor_split.sections tile.default to.device to.dtype
to.dtype_layout to.other topk.default transpose.int tril.default triu.default true_divide.Tensor trunc.default
type_as.default
unbind.int unflatten.int unfold.default unsqueeze.default upsample_bicubic2d.default upsample_bicubic2d.vec
upsample_bilinear2d.default upsample_bilinear2d.vec upsample_linear1d.default upsample_linear1d.vec
upsample_nearest1d.default upsample_nearest1d.vec upsample_nearest2d.default upsample_nearest2d.vec
var.correction var.dim var_mean.correction view.default
where.Scalar where.ScalarOther where.ScalarSelf where.self
zeros.default zeros_like.default
"""
ATEN = frozenset(_NAMES.split())
PURE_WITH: dict[str, dict[str, Any]] = {  # arguments with which these are pure
    "aten.scaled_dot_product_attention.default": {"dropout_p": 0.0},
    "aten.batch_norm.default": {"training": False},
    "aten.instance_norm.default": {"running_mean": None, "running_var": None},
    "aten._native_batch_norm_legit.no_stats": {"training": True},
}
SIZES = ("kernel_size", "stride", "padding", "dilation", "output_size", "output_padding", "pad")  # ATen's names


def find(name: str) -> Any:
    """Return the operator of a name, None for one that no graph may call. O(1)."""
    family, _, rest = name.partition(".")
    if family == "rarefy":
        return BY_NAME[rest].reference if rest in BY_NAME else None
    if name in PYTHON:
        return PYTHON[name][0]
    if family != "aten" or rest not in ATEN:
        return None
    packet, _, overload = rest.partition(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload, None)  # another version of torch may lack it


def name_of(target: Any) -> str | None:
    """Return the name under which `find` has an operator, None where it has none. O(operators).

    >>> name_of(torch.ops.aten.relu.default), name_of(operator.mul), name_of(BY_NAME["norm"].reference), name_of(print)
    ('aten.relu.default', 'operator.mul', 'rarefy.norm', None)
    """
    target = UNCHECKED.get(target, target)
    if target in BY_TARGET:
        return f"rarefy.{BY_TARGET[target].name}"
    name = next((n for n, (function, _) in PYTHON.items() if function is target), str(target))
    return name if find(name) is target else None


def output_kind(target: Any) -> str:
    """Return what calls of an operator that `find` has return: TENSOR, NUMBER or SEVERAL."""
    if not isinstance(target, torch._ops.OpOverload):
        return NUMBER if any(target is f for f, _ in PYTHON.values()) else TENSOR
    kinds = [str(r.real_type) for r in target._schema.returns]
    return SEVERAL if len(kinds) > 1 or "List" in kinds[0] else TENSOR if kinds == ["Tensor"] else NUMBER


def check_call(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], nodes: Mapping[Any, str], weights: Mapping[Any, bool]
) -> str:
    """Check a call, and return what it returns: TENSOR, NUMBER or SEVERAL.

    Args:
        target: an operator that `find` has.
        args: its arguments.
        kwargs: its keywords.
        nodes: what the output of each earlier node is.
        weights: the placeholders of constants; False where only the packed weight is stored.

    Raises:
        ValueError: unless the operator has so many arguments of these kinds.
    """
    if target in BY_TARGET:
        _check_engine_call(BY_TARGET[target].arguments, args, kwargs, nodes, weights)
    elif isinstance(target, torch._ops.OpOverload):
        _check_aten_call(target, args, kwargs, nodes)
    elif target is operator.getitem:
        if len(args) != 2 or kwargs or not _is_output(args[0], SEVERAL, nodes) or type(args[1]) is not int:
            raise ValueError("getitem: expected several tensors and a whole number")
        return TENSOR
    else:
        count = next(n for f, n in PYTHON.values() if f is target)
        if len(args) != count or kwargs or not all(_fits("number", a, nodes) for a in args):
            raise ValueError(f"expected {count} number{'s' * (count > 1)}, got {_short(args)}")
    return output_kind(target)


def _check_engine_call(
    kinds: Sequence[str], args: Sequence[Any], kwargs: Any, nodes: Mapping[Any, str], weights: Mapping[Any, bool]
) -> None:
    if kwargs or len(args) != len(kinds):
        raise ValueError(f"expected {len(kinds)} arguments, got {len(args) + len(kwargs)}")
    for i, (kind, value) in enumerate(zip(kinds, args)):
        name = kind.removesuffix("?")
        valid, description = ARGUMENTS[name]
        if (value is not None or name == kind) and not valid(value, nodes, weights):
            raise ValueError(f"argument {i + 1}: expected {description}, got {_short(value)}")


MAX_BIAS = 64.0  # of position biases in files
MAX_COUNT = (1 << 31) - 1

# kinds of arguments in `OpSpec.arguments`: whether a value is one, and what messages call it
ARGUMENTS: dict[str, tuple[Callable[[Any, Any, Any], bool], str]] = {
    "tensor": (lambda v, nodes, _: _is_output(v, TENSOR, nodes), "an earlier tensor"),
    "mask": (lambda v, nodes, _: _is_output(v, TENSOR, nodes), "an earlier tensor"),
    "weight": (lambda v, _, weights: isinstance(v, fx.Node) and v in weights, "a weight"),
    "constant": (lambda v, _, weights: isinstance(v, fx.Node) and weights.get(v, False), "a constant"),
    "act": (
        lambda v, *_: (v is None or type(v) is str) and v in ACTIVATIONS,
        "None or " + ", ".join(a for a in ACTIVATIONS if a),
    ),
    "slots": (lambda v, *_: _is_pair(v, 0, MAX_COUNT), "a pair of whole numbers from 0 to 2^31 - 1"),
    "steps": (lambda v, *_: _is_pair(v, 1, MAX_PIXELS), "a pair of whole numbers from 1 to 2^20"),
    "padding": (lambda v, *_: _is_pair(v, 0, MAX_PIXELS), "a pair of whole numbers from 0 to 2^20"),
    "count": (lambda v, *_: type(v) is int and 0 < v <= MAX_COUNT, "a whole number from 1 to 2^31 - 1"),
    "sizes": (
        lambda v, *_: type(v) is tuple and all(type(n) is int and 0 < n <= MAX_COUNT for n in v),
        "a tuple of whole numbers from 1 to 2^31 - 1",
    ),
    "window": (lambda v, *_: type(v) is int and 0 <= v < 1 << 62, "a whole number of at least 0"),
    "cache": (lambda v, nodes, _: _is_output(v, CACHE, nodes), "the cache"),
    "number": (lambda v, *_: type(v) in (int, float), "a number"),
    "max_bias": (lambda v, *_: type(v) is float and 0 < v <= MAX_BIAS, f"a number above 0 and at most {MAX_BIAS:g}"),
    "scale": (lambda v, *_: type(v) is float and MIN_SCALE < v < 1e36, "a scale above zero"),
    "zero_point": (lambda v, *_: type(v) is int and 0 <= v <= 255, "a whole number from 0 to 255"),
    "precision": (lambda v, *_: v in ("bf16", "int8"), "None, bf16 or int8"),
    "flag": (lambda v, *_: type(v) is bool, "True or False"),
}


def _is_pair(value: Any, smallest: int, largest: int) -> bool:
    return type(value) is tuple and len(value) == 2 and all(type(n) is int and smallest <= n <= largest for n in value)


def _check_aten_call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], nodes: Mapping[Any, str]) -> None:
    schema = list(target._schema.arguments)
    positional = [a for a in schema if not a.kwarg_only]
    if len(args) > len(positional):
        raise ValueError(f"expected at most {len(positional)} arguments, got {len(args)}")
    named = {a.name: a for a in schema[len(args) :]}
    unexpected = next((n for n in kwargs if n not in named), None)
    missing = next((n for n, a in named.items() if n not in kwargs and not a.has_default_value()), None)
    if unexpected is not None:
        raise ValueError(f"has no argument {_short(unexpected)} here")
    if missing is not None:
        raise ValueError(f"the argument {missing} is missing")
    values = {**dict(zip((a.name for a in positional), args)), **kwargs}
    for argument in schema:
        kind, value = str(argument.real_type), values.get(argument.name)
        repeated = argument.N is not None and type(value) is int  # one number stands for N equal ones
        if argument.name in values and not repeated and not _fits(kind, value, nodes):
            raise ValueError(f"argument {argument.name}: expected {kind}, got {_short(value)}")
        numbers: Any = value if type(value) in LISTS else [value]
        if kind in TENSOR_LISTS and type(value) in LISTS and all(n is None for n in numbers):
            raise ValueError(f"argument {argument.name}: expected at least one tensor, got {_short(value)}")
        if argument.name in SIZES and any(type(n) is int and abs(n) > MAX_PIXELS for n in numbers):
            raise ValueError(f"argument {argument.name}: expected sizes of at most {MAX_PIXELS:,}, got {_short(value)}")
    for name, pure in PURE_WITH.get(str(target), {}).items():
        if values.get(name, pure) != pure:
            raise ValueError(f"argument {name}: expected {pure}, got {_short(values[name])}")


LITERALS: dict[str, tuple[type, ...]] = {
    "int": (int, bool),
    "float": (float, int),
    "number": (float, int, bool),
    "bool": (bool,),
    "Tensor": (float, int, bool),  # numbers stand for tensors too
    "str": (str,),
    "ScalarType": (torch.dtype,),
    "Device": (torch.device,),
    "Layout": (torch.layout,),
    "MemoryFormat": (torch.memory_format,),
}
NUMERIC = ("int", "float", "number", "bool", "Tensor")  # kinds for which another node's number will do
LISTS = (list, tuple, immutable_list)
TENSOR_LISTS = ("List[Tensor]", "List[Optional[Tensor]]")


def _fits(kind: str, value: Any, nodes: Mapping[Any, str]) -> bool:
    """Return whether a value is of a schema's kind, such as Optional[List[int]]."""
    outer, _, inner = kind.removesuffix("]").partition("[")
    if outer == "Optional":
        return value is None or _fits(inner, value, nodes)
    if isinstance(value, fx.Node):
        number = kind in NUMERIC and _is_output(value, NUMBER, nodes)
        return number or _is_output(value, {"Tensor": TENSOR, "List[Tensor]": SEVERAL}.get(kind), nodes)
    if outer == "List":
        return type(value) in LISTS and all(_fits(inner, v, nodes) for v in value)
    return type(value) in LITERALS.get(kind, ())


def _is_output(value: Any, kind: str | None, nodes: Mapping[Any, str]) -> bool:
    return isinstance(value, fx.Node) and kind is not None and nodes.get(value) == kind


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
