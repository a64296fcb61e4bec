"""Calibration statistics of layers: squared norms of inputs and outputs, and gradients, in one pass.

Shapes follow `rarefy.model.layout`: everything broadcasts to [G, K, O, I].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.calibration.gram import padded_input, token_rows
from rarefy.calibration.weight_hooks import identity_like
from rarefy.common.errors import DataError, ModelError
from rarefy.model import distributed
from rarefy.model.batches import count_tokens
from rarefy.model.forward import call, check_batches, evaluating, on_device, trainable
from rarefy.model.layers import Layer
from rarefy.model.losses import Loss, check_finite, resolve_loss
from rarefy.model.mha import without_mha_fastpath
from rarefy.model.moe import Rows, observing_experts


@dataclass
class LayerStats:
    """Sums over the calibration set for one layer; scores read the properties."""

    in_square: Tensor | None = None  # [G, K, 1, I] sum of squared inputs (Embedding: [1, 1, O, 1] token counts)
    out_square: Tensor | None = None  # [G, 1, O, 1] sum of squared outputs
    tokens: float = 0.0  # number of input vectors (tokens, or output pixels of a convolution)
    grad_abs: Tensor | None = None  # [G, K, O, I] sum over batches of tokens x |gradient|
    grad_square: Tensor | None = None  # [G, K, O, I] sum over batches of tokens x gradient^2
    weight: float = 0.0  # tokens behind the gradients
    generator: torch.Generator | None = field(default=None, repr=False)

    @property
    def in_norm(self) -> Tensor:
        """Return the root mean square of each input."""
        assert self.in_square is not None
        return (self.in_square / max(self.tokens, 1)).sqrt()

    @property
    def out_norm(self) -> Tensor:
        """Return the root mean square of each output."""
        assert self.out_square is not None
        return (self.out_square / max(self.tokens, 1)).sqrt()

    @property
    def gradient(self) -> Tensor:
        """Return the mean absolute gradient E|g|; the absolute value is taken before the mean over batches."""
        assert self.grad_abs is not None
        return self.grad_abs / max(self.weight, 1)

    @property
    def fisher(self) -> Tensor:
        """Return the mean squared gradient E[g^2]: the diagonal of the empirical Fisher matrix over batches."""
        assert self.grad_square is not None
        return self.grad_square / max(self.weight, 1)


def collect_stats(
    model: nn.Module,
    data: Iterable[Any],
    layers: Sequence[Layer],
    needs: frozenset[str],
    *,
    loss: Loss | None = None,
    leave_out: bool = False,
) -> dict[str, LayerStats]:
    """Return {layer name: LayerStats} after one pass of `data` through the model in evaluation mode.

    needs: any of "input", "output", "gradient". Batches are weighted by their tokens; positions that `attention_mask`
    marks as padding do not count. Layers that no batch reaches are an error, or to `leave_out`. Raises DataError for
    them and for empty data, ModelError for NaN or inf (the message names the layer and the batch). Memory: one vector
    per layer for norms, two tensors of the size of the weights for gradients.
    """
    check_batches(data)
    stats = {l.full_name: LayerStats() for l in layers}
    batches = 0
    with evaluating(model), without_mha_fastpath(), ExitStack() as stack:
        current: dict[str, Any] = {}
        if needs & {"input", "output"}:
            parents = {id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
            experts: dict[nn.Module, dict[str, Layer]] = {}
            for layer in layers:
                for _, module, param in layer.owners:
                    parent = parents.get(id(module))
                    if layer.layout.kind == "experts":
                        experts.setdefault(module, {})[param] = layer
                        continue
                    stack.enter_context(_observing(module, param, layer, stats[layer.full_name], current, parent))
            for module, params in experts.items():
                stack.enter_context(observing_experts(module, partial(_add_experts, params, stats, current)))
        if "gradient" in needs:
            stack.enter_context(trainable([l.original for l in layers]))
        for index, batch in distributed.local_batches(data):
            batch = on_device(model, batch)
            current.update(batch=batch, index=index)
            if "gradient" in needs:
                _add_gradients(model, batch, layers, stats, resolve_loss(loss), index)
            else:
                with torch.no_grad():
                    call(model, batch)
            batches += 1
    if not distributed.all_reduce_number(batches):
        raise DataError("the calibration data is empty: the score needs at least one batch")
    for layer in layers:
        layer_stats = stats[layer.full_name]
        if distributed.num_data_shards() > 1:
            _all_reduce_stats(layer_stats, layer)
        if needs & {"input", "output"} and layer_stats.in_square is None:
            if leave_out:
                del stats[layer.full_name]
                continue
            raise DataError(
                f"{layer.full_name} was never called on the calibration data: ignore it, "
                "or use a score that needs no activations (magnitude)"
            )
    return stats


def _all_reduce_stats(stats: LayerStats, layer: Layer) -> None:
    """Sum the statistics of a layer over all processes."""
    G, K, O, I = layer.layout.shape
    input_shape = (1, 1, O, 1) if layer.layout.kind == "embedding" else (G, K, 1, I)
    shapes = {
        "in_square": input_shape,
        "out_square": (G, 1, O, 1),
        "grad_abs": (G, K, O, I),
        "grad_square": (G, K, O, I),
    }
    for name, shape in shapes.items():
        local_sum = getattr(stats, name)
        setattr(
            stats,
            name,
            distributed.all_reduce_tensor(local_sum, shape if local_sum is None else tuple(local_sum.shape)),
        )
    stats.tokens, stats.weight = (
        distributed.all_reduce_number(stats.tokens),
        distributed.all_reduce_number(stats.weight),
    )


def _add_gradients(
    model: nn.Module, batch: Any, layers: Sequence[Layer], stats: dict[str, LayerStats], loss: Loss, index: int
) -> None:
    with torch.enable_grad():
        value = check_finite(loss(call(model, batch), batch), index)
        grads = torch.autograd.grad(value, [l.original for l in layers], allow_unused=True)
    weight = count_tokens(batch)
    for layer, grad in zip(layers, grads):
        if grad is None:
            raise DataError(f"the loss does not depend on {layer.full_name}: ignore it, or give another loss")
        g, s = layer.layout.view(grad.float()), stats[layer.full_name]
        if not torch.isfinite(g).all():
            raise ModelError(f"the gradient of {layer.full_name} is not finite on calibration batch {index}")
        s.grad_abs = weight * g.abs() if s.grad_abs is None else s.grad_abs.add_(g.abs(), alpha=weight)
        s.grad_square = weight * g.square() if s.grad_square is None else s.grad_square.addcmul_(g, g, value=weight)
        s.weight += weight


@contextmanager
def _observing(
    module: nn.Module,
    param: str,
    layer: Layer,
    s: LayerStats,
    current: dict[str, Any],
    parent: nn.MultiheadAttention | None,
) -> Iterator[None]:
    """Add the calls of a module to the statistics; `parent` is the attention whose output projection it is."""
    handles = []

    def add(inputs: Tensor, outputs: Tensor) -> None:
        batch = current["batch"]
        mask = batch["attention_mask"] if hasattr(batch, "keys") and "attention_mask" in batch else None
        _accumulate(s, layer, current, *_squared_sums(module, param, layer, inputs.detach(), outputs.detach(), mask))

    if parent is not None:
        handles.append(parent.register_forward_hook(_out_proj_hook(parent, add), with_kwargs=True))
    elif isinstance(module, nn.MultiheadAttention):
        handles.append(module.register_forward_hook(_attention_hook(module, param, add), with_kwargs=True))
    else:
        handles.append(module.register_forward_hook(_plain_hook(add), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _accumulate(s: LayerStats, layer: Layer, current: dict[str, Any], ins: Tensor, outs: Tensor, tokens: float) -> None:
    if not (torch.isfinite(ins).all() and torch.isfinite(outs).all()):
        raise ModelError(f"{layer.full_name}: NaN or inf in its activations on calibration batch {current['index']}")
    s.in_square = ins if s.in_square is None else s.in_square + ins
    s.out_square = outs if s.out_square is None else s.out_square + outs
    s.tokens += tokens


def _add_experts(
    known: dict[str, Layer],
    stats: dict[str, LayerStats],
    current: dict[str, Any],
    param: str,
    rows: Rows,
    out: Rows | None,
) -> None:
    if out is None or param not in known:
        return
    layer = known[param]
    ins = torch.stack([r.detach().float().square().sum(0) for r in rows])[:, None, None]
    outs = torch.stack([y.detach().float().square().sum(0) for y in out])[:, None, :, None]
    _accumulate(stats[layer.full_name], layer, current, ins, outs, sum(len(r) for r in rows) / len(rows))


def _squared_sums(
    module: Any, param: str, layer: Layer, x: Tensor, y: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """Return the sums of squared inputs [G, K, 1, I] and outputs [G, 1, O, 1], and the number of input vectors."""
    G, K, O, I = layer.layout.shape
    if isinstance(module, nn.Embedding):
        tokens = x if mask is None or mask.shape != x.shape else x[mask.bool()]
        counts = torch.bincount(tokens.flatten(), minlength=O).float()
        return counts.reshape(1, 1, O, 1), counts.reshape(1, 1, O, 1), tokens.numel()
    if layer.layout.kind in ("conv", "conv-transposed"):
        # a transposed convolution uses each input at every kernel position
        inputs = (
            _conv_squared_sums(module, x, y, K)
            if layer.layout.kind == "conv"
            else _conv_transposed_squared_sums(module, x, K)
        )
        y = y if y.dim() == len(module.kernel_size) + 2 else y[None]
        out = y.float().square().transpose(0, 1).flatten(1).sum(1)
        pixels = y[:, 0].numel() if layer.layout.kind == "conv" else x.numel() // module.in_channels  # type: ignore
        return inputs, out.reshape(G, 1, O, 1), pixels
    rows, out = token_rows(x, mask), token_rows(y, mask)
    in_sums = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square()
    out_sums = torch.linalg.vector_norm(out, dim=0, dtype=torch.float32).square()
    return in_sums.reshape(-1, 1, 1, I), out_sums.reshape(-1, 1, O, 1), len(rows)


def _conv_squared_sums(module: Any, x: Tensor, y: Tensor, K: int) -> Tensor:
    """Return [G, K, 1, I]: the sum of squares of each input channel at each kernel position. O(K x input).

    Sums strided windows with padding and stride as they are, so that the input is never unfolded.
    """
    n = len(module.kernel_size)
    y = y if y.dim() == n + 2 else y[None]
    x = padded_input(module, x, y.shape[2:])
    squared = x.float().square().sum(0)
    sums = []
    for position in range(K):
        window, rest = [slice(None)], position
        for d in reversed(range(n)):
            rest, offset = divmod(rest, module.kernel_size[d])
            start = offset * module.dilation[d]
            window.insert(1, slice(start, start + (y.shape[2 + d] - 1) * module.stride[d] + 1, module.stride[d]))
        sums.append(squared[tuple(window)].flatten(1).sum(1))
    g = module.groups
    return torch.stack(sums).reshape(K, g, 1, -1).transpose(0, 1)


def _conv_transposed_squared_sums(module: Any, x: Tensor, K: int) -> Tensor:
    n = len(module.kernel_size)
    x = x if x.dim() == n + 2 else x[None]
    squared = x.float().square().sum(0).flatten(1).sum(1)
    return squared.reshape(module.groups, 1, 1, -1).expand(-1, K, -1, -1).clone()


def _plain_hook(add: Callable[[Tensor, Tensor], None]) -> Any:
    return lambda _, args, kwargs, out: add(args[0] if args else next(iter(kwargs.values())), out)


def _attention_hook(module: nn.MultiheadAttention, param: str, add: Callable[[Tensor, Tensor], None]) -> Any:
    """Return a hook for MultiheadAttention, which multiplies by its projections itself."""
    names = list(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]

    def hook(_: nn.Module, args: tuple, kwargs: dict, __: Any) -> None:
        q, k, v = ({**dict(zip(names, args)), **kwargs}[n] for n in ("query", "key", "value"))
        if param != "in_proj_weight":
            x = {"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}[param]
            add(x, F.linear(x, getattr(module, param)))
            return
        W = module.in_proj_weight
        first = [t if module.batch_first or t.dim() == 2 else t.transpose(0, 1) for t in (q, k, v)]
        outs = [F.linear(t, w) for t, w in zip(first, W.chunk(3))]
        longest = max(t.shape[-2] for t in first)  # fewer keys than queries: zero rows add nothing to a sum of squares
        padded = [[F.pad(t, (0, 0, 0, longest - t.shape[-2])) for t in ts] for ts in (first, outs)]
        add(torch.cat(padded[0], -1), torch.cat(padded[1], -1))

    return hook


def _out_proj_hook(parent: nn.MultiheadAttention, add: Callable[[Tensor, Tensor], None]) -> Any:
    """Return a hook for the output projection of MultiheadAttention, which never calls that module.

    The attention is run once more with the identity in its place: its output is the projection's input.
    """

    def hook(_: nn.Module, args: tuple, kwargs: dict, __: Any) -> None:
        real = parent.out_proj
        parent.out_proj = identity_like(real)
        try:
            x = parent.forward(*args, **kwargs)[0]
        finally:
            parent.out_proj = real
        add(x, F.linear(x, real.weight, real.bias))

    return hook
