"""A model as a graph of words and ATen calls: exported with open sizes, then read again in the engine's words."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError, first_line
from rarefy.compiler import ops
from rarefy.compiler.fx_utils import VIEWS, Node, Traced, aten, kind_of, new_constant, put, same, shape
from rarefy.runtime import torch_ops  # noqa: F401 (models that run sparse already hold its operator)
from rarefy.runtime.sparse_layers import Sparse, rebuilt

WHOLE = (1 << 63) - 1  # where a slice of all ends
MOST_SIZE = 1 << 62  # of an open size, where nothing is known


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rules: Sequence[Any], name: str | None = None
) -> Traced:
    """Export a model with all its sizes open that can be; ModelError with what export said where it cannot be.
    name: what the message calls the model, else its class."""
    two = two_samples(args, kwargs)
    try:
        return read(_export(model, *two), rules)
    except Exception as error:  # torch.export raises its own kinds, and those of whatever the model calls
        if isinstance(error, ModelError):
            raise
        why = f"{name or type(model).__name__} cannot be exported: {first_line(error)}"
        if "cache_utils" in str(error):
            why += " (a language model: put use_cache=False into the example)"
        if two[0] is args:
            raise ModelError(why) from error
    try:
        traced = read(_export(model, args, kwargs), rules)
    except ModelError:
        raise
    except Exception:
        raise ModelError(why) from None
    traced.notes = (f"for batches of the example's size alone: {why}",)
    return traced


def two_samples(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return arguments with two samples where the example has one: export takes a size of one for a constant."""
    leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not leaves or any(not t.dim() or len(t) != 1 for t in leaves):
        return args, kwargs
    return pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]), (args, dict(kwargs)))


def _export(model: nn.Module, args: Any, kwargs: Any) -> Any:
    names = list(inspect.signature(model.forward).parameters)
    given = {**dict(zip(names, args)), **kwargs}
    open_ = pytree.tree_map(lambda t: _open(t) if isinstance(t, Tensor) else None, given)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own trees
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)  # caches; the proof tells
        program = export(model, args, dict(kwargs), dynamic_shapes=open_, strict=False)
        changes = any(_changes(n.target) for n in program.graph.nodes if n.op == "call_function")
        return program.run_decompositions({}) if changes else program  # calls that change their inputs become others


def _open(t: Tensor) -> list[Any]:
    """Which sizes of an input stay open: all, but of images, of whose sizes export reasons for minutes, the first."""
    return [Dim.AUTO, *[Dim.STATIC if t.dim() > 3 and t.is_floating_point() else Dim.AUTO] * (t.dim() - 1)][: t.dim()]


def _changes(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def read(program: Any, rules: Sequence[Callable[[Traced, Node], None]]) -> Traced:
    """Return a program's graph in the engine's words: each rule is shown every node in turn."""
    signature, graph = program.graph_signature, program.graph_module.graph
    state = {**program.state_dict, **program.constants}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise ModelError("the model changes its buffers or its inputs when it is called: that cannot be compiled")
    constants = {n: state[t].detach() for n, t in names.items()}
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.name not in constants]
    ranges = {str(k): (int(v.lower), int(min(v.upper, MOST_SIZE))) for k, v in program.range_constraints.items()}
    specs = program.call_spec.in_spec, program.call_spec.out_spec
    traced = Traced(graph, constants, inputs, *specs, ranges, names=names)
    for rule in rules:
        for node in list(graph.nodes):
            if node.op == "call_function" and not node._erased:
                rule(traced, node)
        graph.eliminate_dead_code()
    graph.lint()
    return traced


# ---- one rule each: of a node, its place in the graph and what the constants are ------------------------------------


CHECKS = (
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default,
)  # fmt: skip
NOTHING = (
    aten.dropout.default, aten.alias.default, aten.contiguous.default, aten.clone.default, aten.detach.default,
    aten.lift_fresh_copy.default, aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
    aten.type_as.default,
)  # fmt: skip


def drop(t: Traced, node: Node) -> None:
    """What does nothing to values."""
    if node.target in CHECKS:
        t.graph.erase_node(node)
        return
    if node.target in VIEWS:
        node.target = aten.reshape.default  # what was contiguous by a call that does nothing else may not be so now
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or kind_of(x) != kind_of(node):
        return
    if node.target is aten.slice.Tensor and (*node.args, 1)[2] == 0 and len(node.args) == 4 and node.args[3] == WHOLE:
        node.replace_all_uses_with(x)
        t.graph.erase_node(node)
        return
    if node.target is aten.dropout.default and node.args[2]:
        raise ModelError("the model drops out at random: call eval() first")
    by_one = node.target is aten.mul.Tensor and isinstance(node.args[1], int | float) and node.args[1] == 1
    if by_one or node.target in NOTHING or (node.target in VIEWS and same(shape(node), shape(x))):
        node.replace_all_uses_with(x)
        t.graph.erase_node(node)


def linear(t: Traced, node: Node) -> None:
    """A product with a constant weight, dense or of a layer that runs sparse already."""
    if node.target is aten.linear.default:
        x, w, bias = (*node.args, None)[:3]
        fixed = all(n is None or n.name in t.constants for n in (w, bias))
        if fixed and kind_of(node) == torch.float32:
            put(t, node, ops.product, x, w, bias, None, None)
    if node.target is aten.addmm.default and not node.kwargs and kind_of(node) == torch.float32:
        bias, x, w = node.args
        if {bias.name, w.name} <= t.constants.keys() and len(shape(bias)) == 1:
            put(t, node, ops.product, x, new_constant(t, f"{w.name}_t", t.constants[w.name].t()), bias, None, None)
    if node.target is torch.ops.rarefy.sparse.default:
        _unpack_sparse(t, node)


def _unpack_sparse(t: Traced, node: Node) -> None:
    """A layer that runs sparse already: its weight once more, for the plan to pack."""
    x, parts, bias, about = node.args
    layer = rebuilt([t.constants[p.name] for p in parts], None, about)
    if len(layer.shape) != 2 or layer.rounds or _small(layer):
        return
    with t.graph.inserting_before(next(iter(t.graph.nodes))):
        w = t.graph.placeholder(f"{parts[0].name}_unpacked")
    t.constants[w.name] = w.meta["val"] = layer.weight.float()
    put(t, node, ops.product, x, w, bias, None, layer.activation)


def _small(layer: Sparse) -> bool:
    """Whether a layer's weight has other numbers than fp32."""
    return any(how.get("kind", "fp32") != "fp32" for _, how in layer.about)


def reshaped(t: Traced, node: Node) -> None:
    """view(product(view(x))): the product alone."""
    if node.target not in VIEWS or not isinstance(node.args[0], fx.Node):
        return
    y = node.args[0]
    if y.target is not ops.product or len(y.users) != 1 or y.args[3] is not None:
        return
    x = y.args[0]
    wide = x.args[0] if x.target in VIEWS else None
    ends = wide is not None and shape(x)[-1] == shape(wide)[-1] and shape(node)[-1] == shape(y)[-1]
    if ends and same(shape(wide)[:-1], shape(node)[:-1]):
        put(t, node, ops.product, wide, *y.args[1:])


def norm(t: Traced, node: Node) -> None:
    """LayerNorm and RMSNorm over the last dimension."""
    centred = node.target is aten.layer_norm.default
    if (not centred and node.target is not aten.rms_norm.default) or kind_of(node) != torch.float32:
        return
    x, over, *rest = node.args
    usual: tuple[Any, ...] = (None, None, 1e-5) if centred else (None, torch.finfo(torch.float32).eps)
    given = [*rest, *usual[len(rest) :]]
    gain, bias, least = given[:3] if centred else (given[0], None, given[1] if given[1] is not None else usual[1])
    if len(over) == 1 and all(c is None or c.name in t.constants for c in (gain, bias)):
        put(t, node, ops.norm, x, gain, bias, least, centred, 1)


ACTIVATIONS = {
    aten.relu.default: "relu", aten.silu.default: "silu",
}  # fmt: skip


def _act(node: Node) -> str | None:
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return ACTIVATIONS.get(node.target)


def pointwise(t: Traced, node: Node) -> None:
    """Activations, and sums and products of two values of one shape."""
    act = _act(node)
    if act is not None and kind_of(node) == torch.float32:
        put(t, node, ops.activation, node.args[0], act)
    if node.target in (aten.add.Tensor, aten.mul.Tensor) and kind_of(node) == torch.float32:
        a, b = node.args
        whole = isinstance(a, fx.Node) and isinstance(b, fx.Node) and same(shape(a), shape(b)) and not node.kwargs
        if whole and kind_of(a) == kind_of(b) == torch.float32 and not {a.name, b.name} & set(t.constants):
            put(t, node, ops.times if node.target is aten.mul.Tensor else ops.add, a, b, None)


def attention(t: Traced, node: Node) -> None:
    """[batch, tokens, features] split into heads, attention, and joined again."""
    if node.target is not aten.scaled_dot_product_attention.default or kind_of(node) != torch.float32:
        return
    q, k, v, *rest = node.args
    usual = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest)) | node.kwargs
    mask, drop, causal = (usual.get(n, d) for n, d in (("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False)))
    if drop or len(node.users) != 1:
        return
    apart = [split(x) for x in (q, k, v)]
    turned = next(iter(node.users))
    if any(s is None for s in apart) or not turns(turned):
        return
    joined = next(iter(turned.users)) if len(turned.users) == 1 else None
    heads, kv_heads, width = shape(q)[1], shape(k)[1], shape(q)[3]
    if joined is None or joined.target not in VIEWS or not same(shape(joined), shape(apart[0])) or shape(v)[3] != width:
        return
    if not same(shape(k)[:1] + shape(k)[2:3], shape(q)[:1] + shape(q)[2:3]):
        return  # keys of other tokens than the queries'
    if heads % kv_heads or (heads != kv_heads and not node.kwargs.get("enable_gqa")):
        return
    scale = node.kwargs.get("scale")
    if mask is not None:
        made = next((u for u in mask.users if u.target is ops.additive), None)
        if made is None:
            with t.graph.inserting_after(mask if mask.op != "placeholder" else t.inputs[-1]):
                made = t.graph.call_function(ops.additive, (mask,))
            made.meta["val"] = mask.meta["val"].float()
        mask = made
    scale = width**-0.5 if scale is None else scale
    put(t, joined, ops.attention, *apart, mask, heads, kv_heads, scale, causal)
    t.graph.erase_node(turned)
    t.graph.erase_node(node)


def turns(x: Node) -> bool:
    """Whether heads and tokens change places."""
    if x.target is aten.permute.default:
        return list(x.args[1]) == [0, 2, 1, 3]
    return x.target is aten.transpose.int and sorted(d % 4 for d in x.args[1:]) == [1, 2]


def split(x: Any) -> Any:
    """Return what was split into heads, [batch, tokens, features], or None."""
    if not turns(x):
        return None
    v = x.args[0]
    if v.target not in (*VIEWS, aten.unflatten.int) or len(shape(v)) != 4 or len(shape(v.args[0])) != 3:
        return None
    return v.args[0] if same(shape(v)[:2], shape(v.args[0])[:2]) else None


FULL = (ops.product, ops.convolution)  # words that take what is added and what follows


def fuse(t: Traced, node: Node) -> None:
    """Activations and sums that alone read a product go into it."""
    if node.target is ops.activation:
        y = node.args[0]
        alone = len(y.users) == 1
        if alone and y.target in FULL and y.args[4] is None:
            put(t, node, y.target, *y.args[:4], node.args[1], *y.args[5:])
        elif alone and y.target is ops.add and y.args[2] is None:
            put(t, node, ops.add, *y.args[:2], node.args[1])
    elif node.target is ops.add:
        a, b, act = node.args
        for y, more in ((a, b), (b, a)):
            if y.target in FULL and len(y.users) == 1 and y.args[3:5] == (None, None) and more is not y:
                put(t, node, y.target, *y.args[:3], more, act, *y.args[5:])
                return
    elif node.target is ops.times and node.args[2] is None:
        for y, more in (node.args[:2], node.args[1::-1]):
            if y.target is ops.activation and len(y.users) == 1:
                put(t, node, ops.times, y.args[0], more, y.args[1])
                return
