"""Masks as torch parametrizations of the weight, so that optimizers, deepcopy, state_dict, compile and DDP just work.

Entries where the mask is False are zero, whatever the underlying parameter holds. `fold_` writes masks, quantization
grids and codebooks into plain weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from rarefy.common.errors import ModelError
from rarefy.model.distributed import full_tensor, is_sharded, shard_like
from rarefy.model.layers import Layer, Selector, all_layers, parameter_layer, select_layers
from rarefy.model.parametrize import attach_, detach_
from rarefy.model.quant_grid import (
    GRID_PARAMETRIZATIONS,
    CodebookParametrization,
    attached_grid,
    get_grid,
    record_grid_,
    recorded_grids,
    set_grid_,
)

MIN_ZEROS_ON_GRID = 0.3  # below this fraction, zeros of a quantized weight may come from rounding


class Mask(nn.Module):
    """Parametrization: the weight where the mask is True, +0 elsewhere (NaN and -0 of masked weights do not leak).

    If `probe`, a tensor of zeros, is set, it is added: its gradient is that of the effective weight, at masked entries
    too.
    """

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask.bool())
        self.probe: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        masked = torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
        return masked if self.probe is None or not torch.is_grad_enabled() else masked + self.probe.to(weight.device)


def get_mask(layer: Layer) -> Tensor | None:
    """Return the layer's mask (bool, stored shape, True = kept), or None."""
    masks = _masks_of(layer.module, layer.param)
    return masks[0].mask if masks else None


def mask_or_dense(layer: Layer) -> Tensor:
    """Return the layer's mask, or an all-True mask if it has none."""
    mask = get_mask(layer)
    return dense_mask(layer) if mask is None else mask


def dense_mask(layer: Layer) -> Tensor:
    """Return an all-True mask of the layer's shape."""
    return torch.ones(layer.original.shape, dtype=torch.bool, device=layer.original.device)


def zero_masked_(values: Iterable[Any], mask: Tensor) -> None:
    """Set the tensors among `values` that have the mask's shape to zero where it is False."""
    with torch.no_grad():
        for value in values:
            if isinstance(value, Tensor) and value.shape == mask.shape:
                value.masked_fill_(shard_like(~mask.to(value.device), value), 0)


def set_mask_(layer: Layer, mask: Tensor) -> None:
    """Attach a mask to a layer, or replace it, at every owner of a tied weight. O(weights).

    The underlying parameter keeps its values, so a later mask may restore weights. Raises ModelError for a mask of
    another shape or dtype.
    """
    weight = layer.original
    check_maskable(layer)
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ModelError(
            f"{layer.full_name}: expected a bool mask of shape {tuple(weight.shape)}, "
            f"got {mask.dtype} of {tuple(mask.shape)}"
        )
    mask = mask.to(weight.device)
    present = _masks_of(layer.module, layer.param)
    if present:
        present[0].mask.copy_(mask)
        return
    shared = Mask(mask)  # one object at all owners, so that there is one buffer
    for _, module, param in layer.owners:
        attach_(module, param, shared)


def effective_weight(layer: Layer) -> Tensor:
    """Return the masked weight without gradients, in its stored shape, whole even if it is sharded."""
    if not is_sharded(layer.original):
        return layer.weight.detach()
    weight, mask = full_tensor(layer.original.detach()), get_mask(layer)
    return weight if mask is None else torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))


def check_maskable(layer: Layer) -> None:
    """Raise ModelError if a layer's weight cannot take a mask."""
    if layer.tied_to:
        raise ModelError(
            f"{layer.full_name}: its weight is also the parameter {layer.tied_to!r}, which cannot be "
            "masked; ignore this layer, or untie them"
        )
    for name, module, param in layer.owners:
        if f"{param.removesuffix('_orig')}_orig" in module._parameters:
            raise ModelError(
                f"{name or param}: its weight is masked by torch.nn.utils.prune: call rarefy.adopt_(model) first, "
                "which takes the zeros over"
            )
        if parametrize.is_parametrized(module, param) and not _is_ours(module, param):
            raise ModelError(
                f"{name or param}: its weight already has another parametrization; remove it before pruning"
            )


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every mask of a model.

    Args:
        model: a model whose weights may be masked by `prune_`, `adopt_` or a sparse training method.

    Returns:
        {name: mask}, bool in the stored shape of the parameter, True where a weight is kept. The name is that of the
        layer's module; parameters other than `weight` are named in full, such as "attn.in_proj_weight".

    Example:
        >>> import rarefy
        >>> net = nn.Linear(4, 2)
        >>> _ = rarefy.prune_(net, sparsity=0.25)
        >>> rarefy.masks(net)[""].sum().item()
        6
    """
    pairs = ((l.full_name, get_mask(l)) for l in (*all_layers(model), *_masked_parameters(model)))
    return {name: mask.clone() for name, mask in pairs if mask is not None}


def fold_(model: nn.Module) -> nn.Module:
    """Write every mask and every quantization grid into its weight, and remove the parametrizations.

    The parameters keep their identity, so optimizers stay valid. Quantization grids stay recorded:
    `save` and `accelerate_` use them while the weights match them. O(weights).

    Args:
        model: the model to change in place.

    Returns:
        The model.

    Raises:
        ModelError: a weight has a parametrization that is not Rarefy's.

    Example:
        >>> import rarefy
        >>> net = nn.Linear(4, 2)
        >>> _ = rarefy.prune_(net, sparsity=0.25)
        >>> int((rarefy.fold_(net).weight == 0).sum()), list(net.state_dict())
        (2, ['weight', 'bias'])
    """
    attached = attached_layers(model)
    for layer in attached:
        for name, module, param in layer.owners:
            if not _is_ours(module, param):
                raise ModelError(f"{name or param} has other parametrizations besides the mask; remove them first")
    for layer in attached:
        fold_parameter_(layer)
    return model


def fold_attached_(model: nn.Module) -> str | None:
    """Fold the masks and grids that are attached; return a sentence for a report, None where there are none."""
    count = len(attached_layers(model))
    if count == 0:
        return None
    fold_(model)
    return f"masks or quantization grids of {count} {'weight' if count == 1 else 'weights'} were folded in first"


def attached_layers(model: nn.Module) -> list[Layer]:
    """Return the parameters with a mask or a grid."""
    layers = (*all_layers(model), *_masked_parameters(model))
    return [
        l
        for l in layers
        if any(isinstance(p, (Mask, *GRID_PARAMETRIZATIONS)) for p in _parametrizations(l.module, l.param))
    ]


def fold_parameter_(layer: Layer) -> None:
    """Write the mask and the grid of one parameter into it, and remove the parametrizations."""
    weight, effective = layer.original, layer.weight.detach()
    grid = attached_grid(layer.module, layer.param)
    with torch.no_grad():
        weight.copy_(effective)
    trains = next(
        (p.trains for p in _parametrizations(layer.module, layer.param) if isinstance(p, CodebookParametrization)), None
    )
    for _, module, param in layer.owners:
        detach_(module, param)
        if grid is not None:
            record_grid_(module, param, grid)
    if trains is not None:
        weight.requires_grad_(trains)


def adopt_(
    model: nn.Module,
    layers: Selector = None,
    at_least: float = 0.01,
    *,
    state: Mapping[str, Any] | None = None,
) -> list[str]:
    """Turn zeros that something else has made into masks, so that they survive training and quantization.

    Adopts the masks of `torch.nn.utils.prune` (those of biases and norms too), weights with exact zeros, and the
    quantization grids that `fold_` or `load` recorded. O(weights).

    Args:
        model: the model to change in place.
        layers: which layers to search, as in `prune_`; by default all of them.
        at_least: fraction of exact zeros, 0..1, from which an unmasked weight counts as pruned. Rounding to a grid also
            makes zeros, so quantized weights need at least 0.3.
        state: a state dict of a model that `torch.nn.utils.prune` has pruned (with `weight_orig` and `weight_mask`);
            it is loaded first.

    Returns:
        The names of the layers that now have a mask or a grid.

    Raises:
        ModelError: nothing is pruned, or `state` does not fit the model.
        SelectorError: `layers` matches nothing.

    Example:
        >>> import rarefy
        >>> net = nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
        >>> rarefy.adopt_(net), int(rarefy.masks(net)[""].sum())
        ([''], 8)
    """
    loaded = {} if state is None else _load_pruned_(model, state)
    chosen = select_layers(model, layers) if layers is not None else all_layers(model)
    foreign = {**loaded, **_take_foreign_masks_(model, chosen, layers is None)}
    adopted = []
    if layers is None:
        known = {id(l.original) for l in chosen}
        slots = [(n, m, p) for n, m in model.named_modules() for p in m._parameters if id(m._parameters[p]) in foreign]
        chosen += [parameter_layer(m, p, n) for n, m, p in slots if id(m._parameters[p]) not in known]
    for layer in chosen:
        mask = foreign.get(id(layer.original))
        if mask is None and get_mask(layer) is None and layer.layout.kind != "parameter":
            nonzero = layer.weight.detach() != 0
            min_zeros = at_least if get_grid(layer) is None else max(at_least, MIN_ZEROS_ON_GRID)
            mask = nonzero if nonzero.numel() and 1 - nonzero.float().mean().item() >= min_zeros else None
        if mask is not None:
            set_mask_(layer, mask)
        _reattach_grid(layer)
        if get_mask(layer) is not None or attached_grid(layer.module, layer.param) is not None:
            adopted.append(layer.full_name)
    if not adopted:
        raise ModelError(f"nothing to adopt: no mask and no weight with {at_least:.0%} zeros or more")
    return adopted


def reattach_grids_(model: nn.Module) -> None:
    """Keep weights on the grids that `fold_` or `load` recorded. O(weights with a grid)."""
    for layer in all_layers(model):
        _reattach_grid(layer)


def _reattach_grid(layer: Layer) -> None:
    grid = recorded_grids(layer.module).get(layer.param)
    if grid is not None and attached_grid(layer.module, layer.param) is None and grid.contains(layer.weight.detach()):
        set_grid_(layer, grid)


def zero_fraction(layer: Layer) -> float:
    """Return the fraction of a layer's weights that are zero."""
    weight = effective_weight(layer)
    return 0.0 if weight.is_meta else 1 - float(weight.count_nonzero()) / max(1, weight.numel())


def folded_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) as `state_dict` would if the masks were folded, one effective tensor at a time.

    Tied tensors appear under each of their names; compare `data_ptr` of `state_dict` values to find them.
    """
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ModelError(f"{name} of the state is a {type(tensor).__name__}: only tensors can be stored")
        if ".parametrizations." not in f".{name}":
            yield name, tensor
            continue
        owner, _, rest = f".{name}".rpartition(".parametrizations.")
        module = model.get_submodule(owner[1:])
        param, _, leaf = rest.partition(".")
        if not _is_ours(module, param) or leaf != "original":
            if not _is_ours(module, param):
                yield name, tensor  # another library's parametrization is stored as it is
            continue
        yield f"{owner[1:]}.{param}".lstrip("."), getattr(module, param).detach()


def _parametrizations(module: nn.Module, param: str) -> list[nn.Module]:
    if not parametrize.is_parametrized(module, param):
        return []
    return list(getattr(module.parametrizations, param))  # type: ignore[union-attr]


def _masked_parameters(model: nn.Module) -> Iterator[Layer]:
    """Yield masked parameters that are not weights of layers."""
    weights = {(id(m), p) for l in all_layers(model) for _, m, p in l.owners}
    for name, module in model.named_modules():
        for param in dict.fromkeys(getattr(module, "parametrizations", ())):
            if (id(module), param) not in weights and _masks_of(module, param):
                yield parameter_layer(module, param, name)


def _is_ours(module: nn.Module, param: str) -> bool:
    return all(isinstance(p, (Mask, *GRID_PARAMETRIZATIONS)) for p in _parametrizations(module, param))


def _masks_of(module: nn.Module, param: str) -> list[Mask]:
    return [p for p in _parametrizations(module, param) if isinstance(p, Mask)]


def _load_pruned_(model: nn.Module, state: Mapping[str, Any]) -> dict[int, Tensor]:
    """Load a state dict of `torch.nn.utils.prune`; return {id of the parameter: mask}."""
    if not isinstance(state, Mapping):
        raise ModelError(f"state: expected a state dict, got {type(state).__name__}: load the file first")
    pruned = [
        k.removesuffix("_orig") for k in state if k.endswith("_orig") and f"{k.removesuffix('_orig')}_mask" in state
    ]
    masks_of = {n: state[f"{n}_mask"] for n in pruned}
    plain = {k: v for k, v in state.items() if not (k.endswith(("_orig", "_mask")) and k[:-5] in masks_of)}
    try:
        model.load_state_dict({**plain, **{n: state[f"{n}_orig"] for n in pruned}})
    except RuntimeError as error:
        raise ModelError(f"this state does not fit {type(model).__name__}: {error}") from None
    wrong = next((n for n, m in masks_of.items() if m.shape != model.get_parameter(n).shape), None)
    if wrong is not None:
        raise ModelError(f"{wrong}_mask of the state has shape {list(masks_of[wrong].shape)}, unlike its parameter")
    return {id(model.get_parameter(n)): m != 0 for n, m in masks_of.items()}


def _take_foreign_masks_(model: nn.Module, chosen: list[Layer], everything: bool) -> dict[int, Tensor]:
    """Remove the hooks of `torch.nn.utils.prune` from the chosen layers; return {id of the parameter: mask}.

    With `everything` also from biases and norms.
    """
    masks_of: dict[int, Tensor] = {}
    slots = {(id(m), p) for layer in chosen for _, m, p in layer.owners}
    for module in list(model.modules()):
        for key, parameter in list(module._parameters.items()):
            param = key.removesuffix("_orig")
            mask = module._buffers.get(f"{param}_mask")
            if param == key or mask is None or not (everything or (id(module), param) in slots):
                continue
            torch_prune.remove(module, param)
            earlier = masks_of.get(id(parameter))
            masks_of[id(parameter)] = mask.bool() if earlier is None else mask.bool() & earlier
    return masks_of
