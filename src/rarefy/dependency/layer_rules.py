"""Rules of layers: matrix products, convolutions, norms, attention, lookups. See `shape_rules.py` for the interface."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from rarefy.dependency.shape_rules import arg, note
from rarefy.dependency.symbolic_dims import ONE, Expr, Prod, fixed, leaves, lock, size
from rarefy.dependency.tracer import KERNEL, Trace
from rarefy.model.batches import tensors_in


def matmul(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Join the dimension that mm, bmm and their variants with an added tensor sum over in both inputs."""
    name = func.overloadpacket.__name__.rstrip("_")
    addends, (a, b) = (args[:1], args[1:3]) if name in ("addmm", "baddbmm", "addmv", "addbmm") else ((), args[:2])
    da, db = t.dims(a), t.dims(b)
    t.unify(da[-1], db[max(b.dim() - 2, 0)])
    t.mark_input(a, da[-1])
    t.mark_input(b, db[max(b.dim() - 2, 0)])
    dims = list(da[:-1]) + (list(db[-1:]) if b.dim() > 1 else [])
    if a.dim() == 3:
        t.unify(da[0], db[0])
    if a.dim() == 3 and a not in t.source and b not in t.source:
        for e, kind in ((da[0], "head"), (da[-1], "head_dim"), (db[-1], "head_dim")):
            set_kind(e, kind)
        for axis in leaves(da[-1]):
            axis.scores = True
    if b.dim() == 2 and b not in t.source:  # x W^T, where W is computed in each call
        t.derived_weights.setdefault(t.stack[-1], [db[1], db[0]])
    t.set_dims(out, dims)
    t.costs.append((1, [*dims, da[-1]]))
    t.products.append((func.overloadpacket.__name__, dims))
    for x in addends:
        addend_dims = t.dims(x)
        for back in range(1, x.dim() + 1):
            if x.shape[-back] != 1:
                t.unify(addend_dims[-back], dims[-back])


def set_kind(e: Expr, kind: str) -> None:
    """Set the kind of a dimension's free axes. Where queries share keys, the second axis are the query heads."""
    for i, axis in enumerate(dict.fromkeys(a for a in leaves(e) if not a.lock)):
        axis.kind = "query_head" if kind == "head" and i else kind


def convolution(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x, w, bias = args[0], args[1], args[2]
    transposed, groups = bool(arg(func, args, kwargs, "transposed", False)), arg(func, args, kwargs, "groups", 1)
    dims, W = list(t.dims(x)), t.dims(w)
    for e in W[2:]:
        lock(e, KERNEL)
    in_channels, outputs = (W[0], W[1]) if transposed else (W[1], W[0])
    if groups == 1:
        t.unify(dims[1], in_channels)
        out_channels: Expr = outputs
    else:
        G, each = t.algebra.factor(dims[1], groups)
        if transposed:
            t.unify(in_channels, Prod((G, each)))
            out_channels = Prod((G, outputs))
        else:
            H, _ = t.algebra.factor(outputs, groups)
            t.unify(G, H)
            t.unify(each, in_channels)
            out_channels = outputs
        if size(each) > 1:
            set_kind(G, "group")
    if w in t.source:
        t.roles[t.source[w], 0 if transposed else 1] = "in"
    else:
        t.derived_weights.setdefault(t.stack[-1], W)
    kernel = math.prod(w.shape[2:])
    spatial_dims = [fixed(n) for n in (x if transposed else out).shape[2:]]
    t.costs.append(
        (
            kernel,
            [dims[0], dims[1], W[1], *spatial_dims]
            if transposed
            else [dims[0], out_channels, in_channels, *spatial_dims],
        )
    )
    if bias is not None:
        t.unify(t.dims(bias)[0], out_channels)
    dims = [dims[0], out_channels, *(fixed(n) for n in out.shape[2:])]
    t.products.append((func.overloadpacket.__name__, dims))
    t.set_dims(out, dims)


def weight_norm(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """w = g v / ||v||, with the norm over all dimensions but one (Salimans and Kingma 2016, eq. 2).

    A slice of a normalized dimension cannot go, because the norm would change. A slice of the other dimension can,
    because its norm goes with it. g produces its units. v is marked as reading them: zeroing v would divide 0 by 0.
    """
    v, g, dim = args[0], args[1], arg(func, args, kwargs, "dim", 0)
    dims = t.dims(v)
    for d, e in enumerate(dims):
        if d == dim:
            t.unify(e, t.dims(g)[d])
            if v in t.source:
                t.roles[t.source[v], d] = "in"
        else:
            lock(e, f"weight normalization divides by the norm over it in {t.module_name}")
    w, norm = out
    t.set_dims(w, list(dims))
    t.set_dims(norm, list(t.dims(g)))


def batch_norm(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    channel = t.dims(args[0])[1]
    if arg(func, args, kwargs, "training", False):
        for e in t.dims(args[0])[2:]:  # weight standardization
            lock(e, f"mean and variance over it in {t.module_name}")
    for p in args[1:]:
        if isinstance(p, Tensor):
            t.unify(channel, t.dims(p)[0])
    t.set_dims(out[0], list(t.dims(args[0])))
    for y in out[1:]:
        t.set_dims(y, [channel] if y.dim() == 1 and y.shape[0] == args[0].shape[1] else [fixed(n) for n in y.shape])


def layer_norm(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, shape = args[0], args[1]
    dims = t.dims(x)
    if len(shape) == 1:
        t.products.append((func.overloadpacket.__name__, list(dims)))
    t.record_sizes(dims[-len(shape) :])
    for e in dims[-len(shape) :]:
        note(e, f"mean and variance over it in {t.module_name}")
    for p in args[2:4]:
        if isinstance(p, Tensor):
            for a, e in zip(t.dims(p), dims[-len(shape) :]):
                t.unify(a, e)
    y, *others = out if isinstance(out, tuple) else (out,)
    t.set_dims(y, list(dims))
    for z in others:
        t.set_dims(z, [*dims[: -len(shape)], *(ONE for _ in shape)][: z.dim()])


def group_norm(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, weight, bias, groups = args[0], args[1], args[2], arg(func, args, kwargs, "group")
    dims = t.dims(x)
    t.products.append((func.overloadpacket.__name__, list(dims)))
    outer, inner = t.algebra.factor(dims[1], groups)
    t.record_sizes([outer])
    note(inner, f"mean and variance over it in {t.module_name}")
    for p in (weight, bias):
        if p is not None:
            t.unify(t.dims(p)[0], dims[1])
    t.set_dims(out[0], list(dims))
    for z in out[1:]:
        t.set_dims(z, [fixed(n) for n in z.shape])


def resample(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Keep the channels in pooling and upsampling, which change spatial sizes."""
    x, name = args[0], func.overloadpacket.__name__
    num_spatial = 3 if "3d" in name else 1 if "1d" in name else 2
    for y in tensors_in([out]):
        t.set_dims(y, [*t.dims(x)[:-num_spatial], *(fixed(n) for n in y.shape[-num_spatial:])])


def grid_sample(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    t.set_dims(out, [*t.dims(args[0])[:2], *(fixed(n) for n in out.shape[2:])])


def pixel_shuffle(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """pixel_shuffle turns r x r channels into pixels; pixel_unshuffle is the inverse."""
    dims, r = list(t.dims(args[0])), args[1]
    sizes = [fixed(n) for n in out.shape[-2:]]
    if "unshuffle" in str(func.overloadpacket):
        dims[-3] = Prod((dims[-3], fixed(r * r)))
    else:
        dims[-3], factor = t.algebra.factor(dims[-3], size(dims[-3]) // (r * r))
        lock(factor, f"they make an image in {t.module_name}")
    t.set_dims(out, [*dims[:-2], *sizes])


def channel_shuffle(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dims = list(t.dims(args[0]))
    a, b = t.algebra.factor(dims[1], args[1])
    lock(a, f"shuffled in {t.module_name}")
    dims[1] = Prod((b, a))
    t.set_dims(out, dims)


def embedding(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    W = t.dims(args[0])
    lock(W[0], "its rows are looked up")
    if args[0] in t.source:
        t.output_dims.add((t.source[args[0]], 1))  # even if a tied output head reads the same units
    t.set_dims(out, [*t.dims(args[1]), *W[1:]])


def index(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """x[..., i, ...]: a dimension that is indexed by numbers keeps its units."""
    x, indices = args[0], args[1]
    dims = t.dims(x)
    indexed = [d for d, i in enumerate(indices) if i is not None]
    widths = [
        max(i.dim(), 1) if i is not None and str(i.dtype) in ("torch.bool", "torch.uint8") else 1 for i in indices
    ]
    if any(s != 1 for s in widths):
        return all_fixed(t, func, args, out)
    for d in indexed:
        lock(dims[d], f"units are picked in {t.module_name}")
    new = out.dim() - (x.dim() - len(indexed))
    remaining = [e for d, e in enumerate(dims) if d not in indexed]
    position = indexed[0] if indexed and indexed[-1] - indexed[0] == len(indexed) - 1 else 0
    picked = [fixed(n) for n in out.shape[position : position + new]]
    t.set_dims(out, [*remaining[:position], *picked, *remaining[position:]])


def all_fixed(t: Trace, func: Any, args: Any, out: Any) -> None:
    for x in tensors_in([list(args)]):
        for e in t.dims(x):
            lock(e, f"{func.overloadpacket.__name__} in {t.module_name}")
    for y in tensors_in([out]):
        t.set_dims(y, [fixed(n) for n in y.shape])


def gather(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Keep the units of the one dimension that index_select and gather index."""
    x, dim = args[0], arg(func, args, kwargs, "dim", 0)
    dims = list(t.dims(x))
    if not dims:
        return t.set_dims(out, [])
    lock(dims[dim], f"units are picked in {t.module_name}")
    dims[dim] = fixed(out.shape[dim])
    t.set_dims(out, [e if size(e) == n else fixed(n) for e, n in zip(dims, out.shape)])


def attention(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """softmax(q k^T / sqrt(d)) v over [batch, heads, length, d]."""
    q, k, v = (list(t.dims(x)) for x in args[:3])
    t.unify(k[-2], v[-2])
    if arg(func, args, kwargs, "scale") is None:
        lock(q[-1], f"attention divides by the root of its size in {t.module_name}")
    t.unify(q[-1], k[-1])
    for axis in leaves(q[-1]):
        axis.scores = True
    for d in range(len(q) - 2):
        if size(q[d]) == size(k[d]):
            t.unify(q[d], k[d])
        else:  # several queries share a key
            key_heads, _ = t.algebra.factor(q[d], size(k[d]))
            t.unify(key_heads, k[d])
        t.unify(k[d], v[d])
    set_kind(q[-3], "head") if len(q) > 3 else None
    set_kind(q[-1], "head_dim")
    set_kind(v[-1], "head_dim")
    t.costs += [(1, [*q[:-1], k[-2], d]) for d in (q[-1], v[-1])]
    mask = arg(func, args, kwargs, "attn_mask")
    mask = arg(func, args, kwargs, "attn_bias") if mask is None else mask
    if isinstance(mask, Tensor):
        for back, e in enumerate(t.dims(mask)[::-1]):
            if 2 <= back < len(q) and mask.shape[-1 - back] != 1:
                t.unify(e, q[-1 - back])
    y, *others = out if isinstance(out, tuple) else (out,)
    t.set_dims(y, [*q[:-1], v[-1]])
    for z in tensors_in(others):
        t.set_dims(z, [fixed(n) for n in z.shape])


def scatter(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Join a tensor and the values that are written at its indices: both keep their units."""
    all_fixed(t, func, [x for x in args if isinstance(x, Tensor)], ())
    if not any(out is a for a in tensors_in([list(args)])):
        t.set_dims(out, [fixed(n) for n in out.shape])


def scalar(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Leave scalars out of the graph; dimensions of tensors do not change."""
    for y in tensors_in([out]):
        t.set_dims(y, [fixed(n) for n in y.shape])
