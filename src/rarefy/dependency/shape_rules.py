"""Rules of shape operators: what a family of ATen operators does to dimensions (`op_table.py` lists their names).

A rule is called after the operator with (trace, func, args, kwargs, out). It says which dimensions are the same, which
consist of which, and which are locked: none of their units may be removed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rarefy.dependency.symbolic_dims import ONE, Axis, Expr, Prod, Sum, fixed, is_fixed, leaves, lock, size
from rarefy.dependency.tracer import Trace, unsupported_op
from rarefy.model.batches import tensors_in


def arg(func: Any, args: Any, kwargs: Any, name: str, default: Any = None) -> Any:
    """Return an argument by its name in the operator's schema."""
    for i, a in enumerate(func._schema.arguments):
        if a.name == name:
            if i < len(args):
                return args[i]
            return kwargs.get(name, a.default_value if a.has_default_value() else default)
    return default


def pointwise(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Join aligned dimensions of all inputs of an elementwise operator."""
    inputs = list(tensors_in([list(args), kwargs]))
    for y in tensors_in([out]):
        dims: list[Expr | None] = [None] * y.dim()
        for x in inputs:
            for back in range(1, x.dim() + 1):
                e = t.dims(x)[-back]
                if x.shape[-back] != 1 and x.shape[-back] == y.shape[-back]:
                    earlier = dims[-back]
                    if earlier is None:
                        dims[-back] = e
                    else:
                        t.unify(earlier, e)
        if any(y is x for x in inputs):
            if adds_bias(func, args, y):
                t.products.append((func.overloadpacket.__name__, t.dims(y)))
        else:
            new_dims = [ONE if n == 1 else e or fixed(n) for e, n in zip(dims, y.shape)]
            if adds_bias(func, args, y):
                t.products.append((func.overloadpacket.__name__, new_dims))
            t.set_dims(y, new_dims, inputs[0] if len(inputs) == 1 else None)


def adds_bias(func: Any, args: Any, out: Any) -> bool:
    """Return whether an addition is the bias of a matrix product; torch splits them for some strides."""
    sizes = [a.dim() for a in args if isinstance(a, Tensor)]
    return (
        func.overloadpacket.__name__ in ("add", "add_") and out.dim() > 1 and sizes in ([out.dim(), 1], [1, out.dim()])
    )


def averages_features(func: Any, args: Any) -> bool:
    """Return whether a mean is taken over the last dimension only."""
    has_dims = func.overloadpacket.__name__ == "mean" and len(args) > 1 and isinstance(args[1], list | tuple)
    return has_dims and args[0].dim() > 0 and [d % args[0].dim() for d in args[1]] == [args[0].dim() - 1]


def same_shape(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Give the output the dimensions of the first input."""
    for y in tensors_in([out]):
        if y is not args[0]:
            t.set_dims(y, list(t.dims(args[0])), args[0])


def restrided(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Give the output the same dimensions with other strides, as after pooling to one pixel; else it is unsupported."""
    if len(t.dims(args[0])) == out.dim() and [size(e) for e in t.dims(args[0])] == list(out.shape):
        return t.set_dims(out, list(t.dims(args[0])), args[0])
    return unsupported_op(t, func, args, kwargs, out)


def like(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    t.set_dims(out, [free(n) for n in out.shape] if out.shape != args[0].shape else list(t.dims(args[0])))


def factory(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Give constants such as zeros free dimensions; their sizes are attributes of the module, which cuts update."""
    for y in tensors_in([out]):
        dims = [free(n) for n in y.shape]
        t.set_dims(y, dims)
        t.record_sizes(dims)


def constant(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    for y in tensors_in([out]):
        t.set_dims(y, [fixed(n, f"{t.module_name} makes it") for n in y.shape])


def free(n: int) -> Expr:
    return ONE if n == 1 else Axis(n)


def view(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x = args[0]
    t.set_dims(out, regroup(t, t.dims(x), list(x.shape), list(out.shape)), x)
    t.record_sizes(t.dims(out))


def regroup(t: Trace, dims: list[Expr], sizes: list[int], to: list[int]) -> list[Expr]:
    """Return the dimensions in another shape: the shortest runs of equal size are merged and split."""
    if 0 in sizes:
        for e in dims:
            lock(e, f"an empty view in {t.module_name}")
        return [fixed(n) for n in to]
    out: list[Expr] = []
    old, new = list(zip(dims, sizes))[::-1], list(to)[::-1]
    while old or new:
        old_run, new_run, old_size, new_size = [], [], 1, 1
        while not (old_run or new_run) or old_size != new_size:
            if (old_size <= new_size and old) or not new:
                e, n = old.pop()
                old_run.append(e)
                old_size *= n
            else:
                new_run.append(new.pop())
                new_size *= new_run[-1]
        rest: Expr = Prod(tuple(old_run))
        for n in new_run[:-1]:
            first, rest = t.algebra.factor(rest, n)
            out.append(first)
        out += [rest] if new_run else []
    return out


def permute(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dims = t.dims(args[0])
    t.set_dims(out, [dims[d] for d in args[1]], args[0])


def transpose(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dims = list(t.dims(args[0]))
    if len(dims) > 1:
        a, b = (args[1], args[2]) if len(args) > 2 else (0, 1)
        dims[a], dims[b] = dims[b], dims[a]
    t.set_dims(out, dims, args[0])


def expand(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x = args[0]
    dims, lead = t.dims(x), out.dim() - x.dim()
    new = [fixed(n, f"expanded in {t.module_name}") for n in out.shape[:lead]]
    new += [e if a == b else free(b) for e, a, b in zip(dims, x.shape, out.shape[lead:])]
    t.set_dims(out, new, x)
    t.record_sizes(new)


def squeeze(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    t.set_dims(out, regroup(t, t.dims(args[0]), list(args[0].shape), list(out.shape)), args[0])


def cat(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    tensors = [x for x in args[0] if not (x.dim() == 1 and x.numel() == 0 and out.dim() != 1)]
    dim = arg(func, args, kwargs, "dim", 0) % out.dim()
    first = list(t.dims(tensors[0]))
    for x in tensors[1:]:
        for d, e in enumerate(t.dims(x)):
            if d != dim:
                t.unify(first[d], e)
    first[dim] = Sum(tuple(t.dims(x)[dim] for x in tensors if x.shape[dim]))
    t.set_dims(out, first)


def stack(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = arg(func, args, kwargs, "dim", 0) % out.dim()
    first = list(t.dims(args[0][0]))
    for x in args[0][1:]:
        for a, e in zip(first, t.dims(x)):
            t.unify(a, e)
    first.insert(dim, fixed(out.shape[dim], f"stacked in {t.module_name}"))
    t.set_dims(out, first)


def split(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, dim = args[0], arg(func, args, kwargs, "dim", 0) % args[0].dim()
    parts = t.algebra.cut(t.dims(x)[dim], [y.shape[dim] for y in out])
    for y, e in zip(out, parts):
        t.set_dims(y, [e if d == dim else a for d, a in enumerate(t.dims(x))], x)


def glu(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Join the two halves of a dimension: the first is multiplied by the sigmoid of the second."""
    dims, dim = list(t.dims(args[0])), arg(func, args, kwargs, "dim", -1) % out.dim()
    dims[dim], gate = t.algebra.cut(dims[dim], [out.shape[dim]] * 2)
    t.unify(dims[dim], gate)
    t.set_dims(out, dims)


def slice_(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x, dim = args[0], arg(func, args, kwargs, "dim", 0) % args[0].dim()
    dims, n, step = list(t.dims(x)), x.shape[dim], arg(func, args, kwargs, "step", 1)
    start = arg(func, args, kwargs, "start") or 0
    start = min(max(start + n if start < 0 else start, 0), n)
    e, length = dims[dim], out.shape[dim]
    if length == n:
        pass
    elif length == 0 or is_fixed(e):
        dims[dim] = fixed(length)
        if not is_fixed(e):
            lock(e, f"an empty slice in {t.module_name}")
    elif step == 1:
        ends = [s for s in (start, length, n - start - length) if s]
        dims[dim] = t.algebra.cut(e, ends)[1 if start else 0]
    elif n % step == 0 and length == n // step:
        dims[dim], inner = t.algebra.factor(e, length)
        lock(inner, f"every {step}th is taken in {t.module_name}")
    else:
        lock(e, f"every {step}th is taken in {t.module_name}")
        dims[dim] = fixed(length)
    t.set_dims(out, dims, x)


def select(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Remove a dimension of which one index is selected, or each of them; its units stay."""
    dim = arg(func, args, kwargs, "dim", 0) % args[0].dim()
    dims = t.dims(args[0])
    lock(dims[dim], f"single units are picked in {t.module_name}")
    for y in tensors_in([out]):
        t.set_dims(y, dims[:dim] + dims[dim + 1 :], args[0])


def repeat(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x, times = args[0], args[1]
    dims = [ONE] * (len(times) - x.dim()) + list(t.dims(x))
    t.set_dims(out, [e if r == 1 else Prod((fixed(r, f"repeated in {t.module_name}"), e)) for e, r in zip(dims, times)])


def pad(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x, amounts = args[0], list(args[1])
    dims = list(t.dims(x))
    for i in range(len(amounts) // 2):
        before, after, d = amounts[2 * i], amounts[2 * i + 1], x.dim() - 1 - i
        if before or after:
            if before < 0 or after < 0 or not str(func.overloadpacket).endswith("constant_pad_nd"):
                lock(dims[d], f"padded in {t.module_name}")
                dims[d] = fixed(out.shape[d])
            elif is_fixed(dims[d]):
                dims[d] = fixed(out.shape[d])
            else:
                ends = [fixed(n, f"padded in {t.module_name}") for n in (before, after)]
                dims[d] = Sum(tuple(e for e, n in zip([ends[0], dims[d], ends[1]], [before, 1, after]) if n))
    t.set_dims(out, dims)


def order_dependent(t: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Lock the dimensions whose units change positions or depend on their order."""
    dims = arg(func, args, kwargs, "dims", None)
    dims = arg(func, args, kwargs, "dim", None) if dims is None else dims
    for d in range(out.dim()) if dims in (None, []) else [dims] if isinstance(dims, int) else dims:
        if args[0].dim():
            lock(t.dims(args[0])[d], f"{func.overloadpacket.__name__} in {t.module_name}")
    for y in tensors_in([out]):
        if y is not args[0]:
            t.set_dims(y, list(t.dims(args[0])))


def reduction(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Drop the dimensions that are reduced.

    A sum does not change when zeros are removed. A mean counts them, and a maximum may be one of them.
    """
    x, name = args[0], func.overloadpacket.__name__
    dims, keep = arg(func, args, kwargs, "dim"), bool(arg(func, args, kwargs, "keepdim", False))
    reduced = {d % max(x.dim(), 1) for d in ([dims] if isinstance(dims, int) else dims or range(x.dim()))}
    if averages_features(func, args):
        t.products.append((name, list(t.dims(x))))
    for d in reduced if x.dim() else ():
        e = t.dims(x)[d]
        if name == "sum" or (name in ("linalg_vector_norm", "norm") and x not in t.source):
            continue
        if name in ("mean", "var", "var_mean", "std") and x not in t.source:
            note(e, f"{name} over it in {t.module_name}")
        else:
            lock(e, f"{name} in {t.module_name}")
    for y in tensors_in([out]):
        remaining = [(ONE if d in reduced else e) for d, e in enumerate(t.dims(x)) if keep or d not in reduced]
        t.set_dims(y, remaining)


def note(e: Expr, text: str) -> None:
    for axis in leaves(e):
        axis.notes.add(text)
