"""Masks that survive: a torch parametrization on the weight, so that optimizers, deepcopy, state_dict, compile
and DDP need to know nothing. The entries under a False are zero whatever happens to the parameter beneath.

`fold_` writes masks, grids and codebooks alike into plain weights.
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

MIN_ZEROS_ON_GRID = 0.3  # zeros that rounding to few bits may have made


class Mask(nn.Module):
    """Parametrization: weight -> weight where the mask is True, +0 elsewhere (NaN and -0 beneath do not leak).

    A `probe` of zeros, where there is one, is added on top: its gradient is that of the weight, at masked places too.
    """

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask.bool())
        self.probe: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        kept = torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
        return kept if self.probe is None or not torch.is_grad_enabled() else kept + self.probe.to(weight.device)


def get_mask(layer: Layer) -> Tensor | None:
    """Return the layer's mask (bool, stored shape, True = kept), or None."""
    found = _masks_of(layer.module, layer.param)
    return found[0].mask if found else None


def mask_or_dense(layer: Layer) -> Tensor:
    """Return the layer's mask, or one that masks nothing where it has none."""
    found = get_mask(layer)
    return dense_mask(layer) if found is None else found


def dense_mask(layer: Layer) -> Tensor:
    """Return a mask that masks nothing."""
    return torch.ones(layer.original.shape, dtype=torch.bool, device=layer.original.device)


def zero_masked_(values: Iterable[Any], mask: Tensor) -> None:
    """Make those tensors among `values` that have the mask's shape zero where it is False."""
    with torch.no_grad():
        for value in values:
            if isinstance(value, Tensor) and value.shape == mask.shape:
                value.masked_fill_(shard_like(~mask.to(value.device), value), 0)


def set_mask_(layer: Layer, mask: Tensor) -> None:
    """Attach or replace the mask of a layer, at every owner of a tied weight.

    The parameter beneath keeps its values, so a later mask may bring weights back. Raises ModelError on a
    mask of another shape or type. O(1) besides the check.
    """
    weight = layer.original
    check_maskable(layer)
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ModelError(
            f"{layer.full_name}: a mask is bool of shape {tuple(weight.shape)}, got {mask.dtype} of {tuple(mask.shape)}"
        )
    mask = mask.to(weight.device)
    present = _masks_of(layer.module, layer.param)
    if present:
        present[0].mask.copy_(mask)
        return
    shared = Mask(mask)  # one object at all owners: one buffer, one truth
    for _, module, param in layer.owners:
        attach_(module, param, shared)


def effective_weight(layer: Layer) -> Tensor:
    """Return the weight as it counts, without gradients, as stored: masked, and whole where processes share it."""
    if not is_sharded(layer.original):
        return layer.weight.detach()
    weight, mask = full_tensor(layer.original.detach()), get_mask(layer)
    return weight if mask is None else torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))


def check_maskable(layer: Layer) -> None:
    """Raise ModelError where a layer's weight cannot take a mask, for what else it is or has."""
    if layer.tied_to:
        raise ModelError(
            f"{layer.full_name}: its weight is also the parameter {layer.tied_to!r}, which is no layer and would go "
            "unmasked; ignore this layer, or untie them"
        )
    for name, module, param in layer.owners:
        if parametrize.is_parametrized(module, param) and not _is_ours(module, param):
            raise ModelError(f"{name or param}: its weight has a parametrization already; remove it before pruning")


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Return {layer name: a copy of its mask} of every masked layer.

    >>> net = nn.Linear(2, 2)
    >>> set_mask_(all_layers(net)[0], torch.eye(2).bool())
    >>> masks(net)[""].sum().item()
    2
    """
    pairs = ((l.full_name, get_mask(l)) for l in (*all_layers(model), *_masked_parameters(model)))
    return {name: mask.clone() for name, mask in pairs if mask is not None}


def fold_(model: nn.Module) -> nn.Module:
    """Write every mask and every grid into its weight and take the parametrizations off; returns the model.

    The parameters keep their identity, so an optimizer that holds them goes on. Grids stay noted: `save` and
    `accelerate_` go by them as long as the weights lie on them. O(weights).

    >>> net = nn.Linear(2, 2)
    >>> set_mask_(all_layers(net)[0], torch.eye(2).bool())
    >>> int((fold_(net).weight == 0).sum())
    2
    """
    attached = _attached(model)
    for layer in attached:
        for name, module, param in layer.owners:
            if not _is_ours(module, param):
                raise ModelError(f"{name or param} has other parametrizations besides the mask; remove them first")
    for layer in attached:
        fold_parameter_(layer)
    return model


def fold_attached_(model: nn.Module) -> str | None:
    """Fold the masks and grids that are attached; return a sentence for a report, None where there are none."""
    count = len(_attached(model))
    if count == 0:
        return None
    fold_(model)
    return f"masks or quantization grids of {count} {'weight' if count == 1 else 'weights'} were folded in first"


def _attached(model: nn.Module) -> list[Layer]:
    """The parameters with a mask or a grid on them."""
    layers = (*all_layers(model), *_masked_parameters(model))
    return [
        l
        for l in layers
        if any(isinstance(p, (Mask, *GRID_PARAMETRIZATIONS)) for p in _parametrizations(l.module, l.param))
    ]


def fold_parameter_(layer: Layer) -> None:
    """Write the mask and the grid of one parameter into it and take the parametrizations off."""
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
    """Take over foreign masks: models pruned with `torch.nn.utils.prune` (biases and norms too), and plain zeros of
    weights; returns the layer names. Grids that `fold_` or `load` has noted are kept to again too.

    `layers` narrows the search as in `select`; a weight with a smaller share of exact zeros than `at_least` is
    dense by intent and is left alone; of weights on a grid, where rounding makes zeros too, below three tenths. `state`
    is a state dict that torch saved of such a model (with `weight_orig` and `weight_mask`), which is loaded first.
    Raises ModelError where nothing is pruned. O(weights).

    >>> net = nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    >>> adopt_(net), int(masks(net)[""].sum())
    ([''], 8)
    """
    loaded = {} if state is None else _load_pruned_(model, state)
    chosen = select_layers(model, layers) if layers is not None else all_layers(model)
    foreign = {**loaded, **_take_foreign_masks_(model, chosen, layers is None)}
    taken = []
    if layers is None:
        known = {id(l.original) for l in chosen}
        named = [(n, m, p) for n, m in model.named_modules() for p in m._parameters if id(m._parameters[p]) in foreign]
        chosen += [parameter_layer(m, p, n) for n, m, p in named if id(m._parameters[p]) not in known]
    for layer in chosen:
        mask = foreign.get(id(layer.original))
        if mask is None and get_mask(layer) is None and layer.layout.kind != "parameter":
            kept = layer.weight.detach() != 0
            few = at_least if get_grid(layer) is None else max(at_least, MIN_ZEROS_ON_GRID)
            mask = kept if kept.numel() and 1 - kept.float().mean().item() >= few else None
        if mask is not None:
            set_mask_(layer, mask)
        _reattach_grid(layer)
        if get_mask(layer) is not None or attached_grid(layer.module, layer.param) is not None:
            taken.append(layer.full_name)
    if not taken:
        raise ModelError(f"nothing to adopt: no mask and no weight with {at_least:.0%} zeros or more")
    return taken


def reattach_grids_(model: nn.Module) -> None:
    """Keep weights to the grids again that `fold_` or `load` has noted of them. O(weights that have one)."""
    for layer in all_layers(model):
        _reattach_grid(layer)


def _reattach_grid(layer: Layer) -> None:
    grid = recorded_grids(layer.module).get(layer.param)
    if grid is not None and attached_grid(layer.module, layer.param) is None and grid.contains(layer.weight.detach()):
        set_grid_(layer, grid)


def zero_fraction(layer: Layer) -> float:
    """Return the share of a layer's weights that are zero."""
    weight = effective_weight(layer)
    return 0.0 if weight.is_meta else 1 - float(weight.count_nonzero()) / max(1, weight.numel())


def folded_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) as `state_dict` would if the masks were folded, one effective tensor at a time.

    Tied tensors come under each of their names; compare `data_ptr` of `state_dict` values to find them.
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
                yield name, tensor  # somebody else's parametrization goes as it is
            continue
        yield f"{owner[1:]}.{param}".lstrip("."), getattr(module, param).detach()


def _parametrizations(module: nn.Module, param: str) -> list[nn.Module]:
    if not parametrize.is_parametrized(module, param):
        return []
    return list(getattr(module.parametrizations, param))  # type: ignore[union-attr]


def _masked_parameters(model: nn.Module) -> Iterator[Layer]:
    """Masked parameters that are no weights of layers."""
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
    """Load a state dict of a model that `torch.nn.utils.prune` has pruned; return {id of the parameter: mask}."""
    pruned = [
        k.removesuffix("_orig") for k in state if k.endswith("_orig") and f"{k.removesuffix('_orig')}_mask" in state
    ]
    found = {n: state[f"{n}_mask"] for n in pruned}
    plain = {k: v for k, v in state.items() if not (k.endswith(("_orig", "_mask")) and k[:-5] in found)}
    try:
        model.load_state_dict({**plain, **{n: state[f"{n}_orig"] for n in pruned}})
    except RuntimeError as error:
        raise ModelError(f"this state does not fit {type(model).__name__}: {error}") from None
    wrong = next((n for n, m in found.items() if m.shape != model.get_parameter(n).shape), None)
    if wrong is not None:
        raise ModelError(f"{wrong}_mask of the state has shape {list(found[wrong].shape)}, unlike its parameter")
    return {id(model.get_parameter(n)): m != 0 for n, m in found.items()}


def _take_foreign_masks_(model: nn.Module, chosen: list[Layer], everything: bool) -> dict[int, Tensor]:
    """Undo the hooks of `torch.nn.utils.prune` on the chosen layers and return {id of the parameter: mask}.

    With `everything` also those of biases and norms.
    """
    found: dict[int, Tensor] = {}
    wanted = {(id(m), p) for layer in chosen for _, m, p in layer.owners}
    for module in list(model.modules()):
        for key, held in list(module._parameters.items()):
            param = key.removesuffix("_orig")
            mask = module._buffers.get(f"{param}_mask")
            if param == key or mask is None or not (everything or (id(module), param) in wanted):
                continue
            torch_prune.remove(module, param)
            before = found.get(id(held))
            found[id(held)] = mask.bool() if before is None else mask.bool() & before
    return found
