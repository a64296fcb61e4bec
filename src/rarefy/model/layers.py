"""Which weights of a model can be pruned, and which of them a selector matches.

A selector is a string or a list of strings; a layer is selected if any of them matches:

    model.layers.*          a glob over module names (* also matches dots), with or without `.weight` at the end
    re:.*\\.(q|k)_proj       a regular expression that must match the whole name
    Linear                  a class name; base classes match too
    size>=100_000           the number of entries of the weight (>=, <=, >, <, ==)
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from rarefy.common.errors import ModelError, SelectorError, nearest, nearest_paths, unknown
from rarefy.model.layout import CONV, Layout, layout, prunable

Selector = str | Sequence[str] | None

# Attribute names under which models keep their output head (torchvision, timm, transformers). Data, not code.
HEADS = frozenset(
    {"lm_head", "head", "heads", "classifier", "fc", "score", "cls", "qa_outputs"}
    | {"output_projection", "embed_out", "last_linear", "prediction_head"}
)

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_SIZE = re.compile(r"size\s*(>=|<=|==|>|<)\s*([0-9][0-9_]*)$")
_COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True, eq=False)
class Layer:
    """A prunable tensor with all modules that own it (a tied weight is one tensor with several owners).

    name             name of the first owner's module
    param            attribute of the owner: "weight", "in_proj_weight"
    owners           (module name, module, attribute) of each owner
    layout           how the weight is read as matrices
    is_output_head   whether the tensor produces the model's output
    tied_to          name of a parameter that holds the same tensor but cannot be pruned; "" if there is none
    """

    name: str  # of the first owner's module
    param: str  # attribute of the owner: "weight", "in_proj_weight"
    owners: tuple[tuple[str, nn.Module, str], ...]  # (module name, module, attribute)
    layout: Layout
    is_output_head: bool = False
    tied_to: str = ""  # a place that holds the same parameter but is no layer

    @property
    def module(self) -> nn.Module:
        """Return the first module that owns the weight."""
        return self.owners[0][1]

    @property
    def weight(self) -> Tensor:
        """Return the effective weight in its stored shape: masked if a mask is attached."""
        return getattr(self.module, self.param)

    @property
    def original(self) -> nn.Parameter:
        """Return the trainable parameter that the mask is applied to."""
        return original(self.module, self.param)

    @property
    def full_name(self) -> str:
        """Return `name.param`, or just `name` for the usual `weight`."""
        return self.name if self.param == "weight" else _join(self.name, self.param)


def parameter_layer(module: nn.Module, param: str, name: str = "") -> Layer:
    """Return any parameter of a module as a Layer that can be masked.

    A layer's weight keeps its layout; a bias or a norm's weight is read as one row. Raises ModelError if the module has
    no such parameter.
    """
    if not isinstance(module, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(param, str):
        raise ModelError(f"expected the name of a parameter, got {type(param).__name__}")
    weight = original(module, param) if hasattr(module, param) else None
    if not isinstance(weight, nn.Parameter):
        known = list(dict(module.named_parameters(recurse=False)))
        raise ModelError(unknown("parameter", param, known, type(module).__name__))
    n = weight.numel()
    weight_layout = layout(module, param) or Layout("parameter", (n,), (0,), (1, 1, 1, n))
    return Layer(name, param, ((name, module, param),), weight_layout)


def original(module: nn.Module, param: str) -> Any:
    """Return the unmasked parameter behind `module.param`, which the optimizer holds (masks of ours or torch's)."""
    if parametrize.is_parametrized(module, param):
        return getattr(getattr(module.parametrizations, param), "original", None)  # type: ignore[union-attr]
    pruned = module._parameters.get(f"{param}_orig")  # as torch.nn.utils.prune leaves it
    return getattr(module, param) if pruned is None else pruned


def check_is_module(model: Any) -> None:
    """Raise ModelError for what is not a torch module."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module as model, got {type(model).__name__}")


def all_layers(model: nn.Module) -> list[Layer]:
    """Return every prunable tensor of a model in module order, tied weights once. O(modules).

    >>> [l.name for l in all_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))]
    ['0', '2']
    """
    check_is_module(model)
    owners_of: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in _modules(model):
        for param in prunable(module):
            weight = original(module, param)
            if isinstance(weight, nn.parameter.UninitializedParameter):
                raise ModelError(
                    f"{name or type(module).__name__}: a lazy layer has no weight yet: call the model once"
                )
            if not isinstance(weight, nn.Parameter):
                continue  # computed from other parameters in each call (weight norm): there is no weight to mask
            owners_of.setdefault(id(original(module, param)), []).append((name, module, param))
    heads = _output_head_ids(unwrap(model))
    slots = {(id(m), p) for owners in owners_of.values() for _, m, p in owners}
    other_names = {
        id(p): _join(n, k)
        for n, m in _modules(model)
        for k, p in m._parameters.items()
        if (id(m), k.removesuffix("_orig")) not in slots
    }
    layers = []
    for key, owners in owners_of.items():
        weight_layout = layout(owners[0][1], owners[0][2])
        assert weight_layout is not None
        is_head = key in heads or (len(owners) > 1 and any(isinstance(m, nn.Embedding) for _, m, _ in owners))
        layers.append(
            Layer(owners[0][0], owners[0][2], tuple(owners), weight_layout, is_head, other_names.get(key, ""))
        )
    return layers


def select_layers(model: nn.Module, layers: Selector = None, ignore: Selector = None) -> list[Layer]:
    """Return the layers that `layers` matches, without those that `ignore` matches. O(modules x selectors).

    Without `layers`: every prunable weight except embeddings and the output head, which are pruned only if named.
    Raises SelectorError if a selector matches nothing (the message lists similar names), ModelError if no layer
    remains.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> [l.name for l in select_layers(net, ignore="2")]
    ['0']
    """
    all_of_model = all_layers(model)
    if not all_of_model:
        raise ModelError(f"{type(model).__name__} has no layer that can be pruned (Linear, Conv, Embedding, attention)")
    if layers is None:
        chosen = [l for l in all_of_model if not l.is_output_head and l.layout.kind != "embedding"]
    else:
        chosen = match_layers(all_of_model, layers, "layers")
    ignored = set(map(id, match_layers(all_of_model, ignore, "ignore"))) if ignore else set()
    selected = [l for l in chosen if id(l) not in ignored]
    if not selected:
        names = ", ".join(l.full_name for l in all_of_model[:6])
        raise ModelError(f"no layer is selected: layers={layers!r}, ignore={ignore!r}; the model has {names}")
    return selected


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DataParallel or DistributedDataParallel."""
    inner = getattr(model, "_orig_mod", None) or (model.module if isinstance(model, _WRAPPERS) else None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def matches_selector(selector: str, layer: Layer) -> bool:
    """Return whether one selector matches this layer. Raises SelectorError for an invalid one."""
    size = _SIZE.match(selector)
    if size:
        return _COMPARE[size[1]](layer.original.numel(), int(size[2].replace("_", "")))
    if re.match(r"size\s*[<>=~!]", selector):
        raise SelectorError(
            f"selector {selector!r}: expected a size such as 'size>=100_000' (one of {', '.join(_COMPARE)})"
        )
    names = [n for owner, _, param in layer.owners for n in (owner, _join(owner, param))]
    if selector.startswith("re:"):
        try:
            expression = re.compile(selector[3:])
        except re.error as error:
            raise SelectorError(f"selector {selector!r} is not a regular expression: {error}") from None
        return any(expression.fullmatch(n) for n in names)
    if any(fnmatchcase(n, selector) for n in names):
        return True
    return any(c.__name__ == selector for _, m, _ in layer.owners for c in _classes(m))


def ignored_modules(model: nn.Module, ignore: Selector) -> tuple[str, ...]:
    """Return the names of the modules whose weights `ignore` selects, in the order of the model."""
    return module_names(match_layers(all_layers(model), ignore, "ignore")) if ignore else ()


def module_names(layers: list[Layer]) -> tuple[str, ...]:
    """Return the names of the modules that have these layers' weights, each once."""
    return tuple(dict.fromkeys(name for layer in layers for name, *_ in layer.owners))


def match_layers(known: list[Layer], selectors: Selector, argument: str) -> list[Layer]:
    """Return the layers that any selector matches; SelectorError, which names the argument, for one without match."""
    matched: set[int] = set()
    if not isinstance(selectors, str | list | tuple):
        raise SelectorError(f"{argument}: expected a selector or a list of selectors, got {selectors!r}")
    for selector in [selectors] if isinstance(selectors, str) else selectors:
        if not isinstance(selector, str):
            raise SelectorError(f"{argument}: expected a selector, which is a string, got {selector!r}")
        hits = [l for l in known if matches_selector(selector, l)]
        if not hits:
            names = [l.full_name for l in known]
            classes = sorted({_classes(l.module)[0].__name__ for l in known})
            similar = nearest_paths(selector, names + classes) or nearest(selector, names, count=3) or names[:3]
            raise SelectorError(
                f"{argument}: {selector!r} matches no layer; nearest: {', '.join(similar)} "
                f"(classes: {', '.join(classes)})"
            )
        matched.update(map(id, hits))
    return [l for l in known if id(l) in matched]


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the named modules, without those inside parametrizations."""
    for name, module in model.named_modules():
        if "parametrizations" not in name.split("."):
            yield name, module


def _classes(module: nn.Module) -> list[type]:
    """Return the module's class and its bases, without the class that a parametrization adds."""
    skip = 1 if parametrize.is_parametrized(module) else 0
    return [c for c in type(module).__mro__[skip:] if c not in (nn.Module, object)]


def _output_head_ids(model: nn.Module) -> set[int]:
    """Return the ids of the weights that produce the output: as the model says, or the last Linear by its name."""
    ids: set[int] = set()
    get_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_embeddings() if callable(get_embeddings) else None
    if isinstance(head, nn.Module):
        ids.update(id(original(head, p)) for p in prunable(head))
    for name, child in model.named_children():
        if name in HEADS:
            linears = [m for _, m in _modules(child) if isinstance(m, (nn.Linear, *CONV)) and prunable(m)]
            ids.update(id(original(m, "weight")) for m in linears[-1:])
    return ids


def _join(name: str, param: str) -> str:
    return f"{name}.{param}" if name else param
