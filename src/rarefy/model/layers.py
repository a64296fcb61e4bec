"""Which modules and parameters a selector means.

A selector is a word, or a list of words of which any may hold:

    model.layers.*          a glob over module names (a star crosses dots); with or without `.weight` at the end
    re:.*\\.(q|k)_proj       a regular expression that must match the whole name
    Linear                  a class name, base classes included
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

from rarefy.common.errors import ModelError, SelectorError, nearest, unknown
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
    """One prunable tensor and every place that owns it (tied weights are one tensor with several owners)."""

    name: str  # of the first owner's module
    param: str  # attribute of the owner: "weight", "in_proj_weight"
    owners: tuple[tuple[str, nn.Module, str], ...]  # (module name, module, attribute)
    layout: Layout
    is_output_head: bool = False
    tied_to: str = ""  # a place that holds the same parameter but is no layer

    @property
    def module(self) -> nn.Module:
        return self.owners[0][1]

    @property
    def weight(self) -> Tensor:
        """The effective weight (masked where a mask is attached), as stored."""
        return getattr(self.module, self.param)

    @property
    def original(self) -> nn.Parameter:
        """The trainable parameter beneath the mask."""
        return original(self.module, self.param)

    @property
    def full_name(self) -> str:
        """`name.param`, short for the usual `weight`."""
        return self.name if self.param == "weight" else _join(self.name, self.param)


def parameter_layer(module: nn.Module, param: str, name: str = "") -> Layer:
    """Return any parameter of a module as something that can be masked: a layer's weight as the layer that it is, a
    bias or a norm as a row of numbers. Raises ModelError where there is none of that name."""
    if not isinstance(module, nn.Module):
        raise ModelError(f"a module is a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(param, str):
        raise ModelError(f"a parameter has a name, got {type(param).__name__}")
    weight = original(module, param) if hasattr(module, param) else None
    if not isinstance(weight, nn.Parameter):
        known = list(dict(module.named_parameters(recurse=False)))
        raise ModelError(unknown("parameter", param, known, type(module).__name__))
    n = weight.numel()
    plan = layout(module, param) or Layout("parameter", (n,), (0,), (1, 1, 1, n))
    return Layer(name, param, ((name, module, param),), plan)


def original(module: nn.Module, param: str) -> Any:
    """Return the parameter that an optimizer holds for `module.param`, beneath a mask or a foreign one."""
    if parametrize.is_parametrized(module, param):
        return getattr(getattr(module.parametrizations, param), "original", None)  # type: ignore[union-attr]
    pruned = module._parameters.get(f"{param}_orig")  # as torch.nn.utils.prune leaves it
    return getattr(module, param) if pruned is None else pruned


def all_layers(model: nn.Module) -> list[Layer]:
    """Return every prunable tensor of `model` in module order, tied weights once. O(modules).

    >>> [l.name for l in all_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))]
    ['0', '2']
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is a torch.nn.Module, got {type(model).__name__}")
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in _modules(model):
        for param in prunable(module):
            weight = original(module, param)
            if isinstance(weight, nn.parameter.UninitializedParameter):
                raise ModelError(
                    f"{name or type(module).__name__}: a lazy layer has no weight yet; call the model once"
                )
            if not isinstance(weight, nn.Parameter):
                continue  # made from others at each call (weight norm): there is no weight to mask
            found.setdefault(id(original(module, param)), []).append((name, module, param))
    heads = _output_head_ids(unwrap(model))
    slots = {(id(m), p) for owners in found.values() for _, m, p in owners}
    others = {
        id(p): _join(n, k)
        for n, m in _modules(model)
        for k, p in m._parameters.items()
        if (id(m), k.removesuffix("_orig")) not in slots
    }
    layers = []
    for key, owners in found.items():
        plan = layout(owners[0][1], owners[0][2])
        assert plan is not None
        head = key in heads or (len(owners) > 1 and any(isinstance(m, nn.Embedding) for _, m, _ in owners))
        layers.append(Layer(owners[0][0], owners[0][2], tuple(owners), plan, head, others.get(key, "")))
    return layers


def select_layers(model: nn.Module, layers: Selector = None, ignore: Selector = None) -> list[Layer]:
    """Return the layers that `layers` means, less those that `ignore` means.

    Without `layers`: every prunable weight but embeddings and the output head, which are left alone until named.
    Raises SelectorError where a word matches nothing (naming the nearest names), ModelError where nothing is left.
    O(modules x words).

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> [l.name for l in select_layers(net, ignore="2")]
    ['0']
    """
    known = all_layers(model)
    if not known:
        raise ModelError(f"{type(model).__name__} has no layer that can be pruned (Linear, Conv, Embedding, attention)")
    if layers is None:
        chosen = [l for l in known if not l.is_output_head and l.layout.kind != "embedding"]
    else:
        chosen = _match_all(known, layers, "layers")
    dropped = set(map(id, _match_all(known, ignore, "ignore"))) if ignore else set()
    left = [l for l in chosen if id(l) not in dropped]
    if not left:
        seen = ", ".join(l.full_name for l in known[:6])
        raise ModelError(f"no layer is left to work on: layers={layers!r}, ignore={ignore!r}; the model has {seen}")
    return left


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DataParallel or DistributedDataParallel."""
    inner = getattr(model, "_orig_mod", None) or (model.module if isinstance(model, _WRAPPERS) else None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def matches_selector(word: str, layer: Layer) -> bool:
    """Return whether one selector word means this layer. Raises SelectorError for a bad expression."""
    size = _SIZE.match(word)
    if size:
        return _COMPARE[size[1]](layer.original.numel(), int(size[2].replace("_", "")))
    if re.match(r"size\s*[<>=~!]", word):
        raise SelectorError(f"selector {word!r}: a size reads like 'size>=100_000' (one of {', '.join(_COMPARE)})")
    names = [n for owner, _, param in layer.owners for n in (owner, _join(owner, param))]
    if word.startswith("re:"):
        try:
            expression = re.compile(word[3:])
        except re.error as error:
            raise SelectorError(f"selector {word!r} is no regular expression: {error}") from None
        return any(expression.fullmatch(n) for n in names)
    if any(fnmatchcase(n, word) for n in names):
        return True
    return any(c.__name__ == word for _, m, _ in layer.owners for c in _classes(m))


def _match_all(known: list[Layer], words: Selector, what: str) -> list[Layer]:
    hit: set[int] = set()
    if not isinstance(words, str | list | tuple):
        raise SelectorError(f"{what}: a selector is a word or a list of words, got {words!r}")
    for word in [words] if isinstance(words, str) else words:
        if not isinstance(word, str):
            raise SelectorError(f"{what}: a selector is a string, got {word!r}")
        found = [l for l in known if matches_selector(word, l)]
        if not found:
            names = [l.full_name for l in known]
            classes = sorted({_classes(l.module)[0].__name__ for l in known})
            near = nearest(word, names + classes, many=3) or names[:3]
            raise SelectorError(
                f"{what}: {word!r} matches no layer; nearest: {', '.join(near)} (classes: {', '.join(classes)})"
            )
        hit.update(map(id, found))
    return [l for l in known if id(l) in hit]


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules without the insides of parametrizations."""
    for name, module in model.named_modules():
        if "parametrizations" not in name.split("."):
            yield name, module


def _classes(module: nn.Module) -> list[type]:
    """The module's class and bases, less the class that a parametrization puts in front."""
    skip = 1 if parametrize.is_parametrized(module) else 0
    return [c for c in type(module).__mro__[skip:] if c not in (nn.Module, object)]


def _output_head_ids(model: nn.Module) -> set[int]:
    """Ids of the parameters that make the output: what the model itself names, else the last Linear of a known name."""
    ids: set[int] = set()
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if isinstance(head, nn.Module):
        ids.update(id(original(head, p)) for p in prunable(head))
    for name, child in model.named_children():
        if name in HEADS:
            linears = [m for _, m in _modules(child) if isinstance(m, (nn.Linear, *CONV)) and prunable(m)]
            ids.update(id(original(m, "weight")) for m in linears[-1:])
    return ids


def _join(name: str, param: str) -> str:
    return f"{name}.{param}" if name else param
