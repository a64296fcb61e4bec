"""The config of a Hugging Face model, after a cut: numbers with which its class builds the cut model by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rarefy.model import hf
from rarefy.structured.surgery import NEAR, NEAR_OF, outputs

TRIES = 512  # combinations of numbers
OTHERWISE = ("n_inner", "head_dim", "intermediate_size")  # None there means a multiple or quotient of other numbers
KEPT = ("id", "ids", "vocab_size", "positions", "embeddings", "length", "window", "version", "dropout", "labels")
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")


def update_config(model: nn.Module, example: Any, sizes: Mapping[int, set[int]]) -> None:
    """Give the config numbers with which the model's class builds what the model now is, if there are any: the same
    shapes, and on `example` the same outputs; the model's notes of its cuts say so. `sizes`: what each size has become
    somewhere in the model. O(combinations of numbers that could be meant) skeletons."""
    if not hf.is_model(model):
        return
    config: Any = model.config
    slots = list(_slots(config, sizes))
    want = {n: t.shape for n, t in model.state_dict().items()}
    for tried, values in enumerate(_combinations(slots)):
        if tried == TRIES:
            return
        fresh = copy.deepcopy(config)
        for (path, name, _), value in zip(slots, values):
            setattr(_at(fresh, path), name, value)
        if _builds(model, fresh, want, example):
            copy_config_(model, fresh)
            model.rarefy_cut["config"] = True  # type: ignore[index, operator]
            return


def copy_config_(model: nn.Module, new: Any = None) -> Any:
    """Give a model a config of its own, which may be changed: other models may have been made from the same. Return
    it."""
    old: Any = model.config
    new = copy.deepcopy(old) if new is None else new
    parts = {id(a): b for (_, a), (_, b) in zip(_parts(old), _parts(new))}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in parts and value is not None:
                setattr(module, name, parts[id(value)])
    return new


def merge_sizes(sizes: Mapping[int, set[int]], more: Mapping[int, set[int]]) -> dict[int, set[int]]:
    """Return what sizes have become after both of two cuts."""
    out = {old: {n for to in new for n in more.get(to, {to})} for old, new in sizes.items()}
    for old, new in more.items():
        out.setdefault(old, set()).update(new)
    return out


def shrink_config(model: nn.Module, values: Any) -> None:
    """Give the config of a model of the original class the smaller numbers of a saved one."""
    if not hf.is_model(model) or not isinstance(values, dict):
        return
    for path, part in _parts(copy_config_(model)):
        saved = _within(values, path)
        for name, old in list(vars(part).items()):
            new = saved.get(name)
            smaller = _is_size(name) and type(old) is int and type(new) is int and 1 <= new <= old
            given = old is None and name in OTHERWISE and type(new) is int and new >= 1
            shorter = name in PER_LAYER and isinstance(new, list) and isinstance(old, list) and len(new) <= len(old)
            if smaller or given or (shorter and all(v in old for v in new)):  # type: ignore[union-attr, operator]
                setattr(part, name, new)


def _within(values: Any, path: Sequence[str]) -> dict[str, Any]:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _parts(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The config and the configs in it."""
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value, (*path, name))


def _at(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _is_size(name: str) -> bool:
    """Whether a number of a config may be a size that cuts change, by its name: no id, no length of a text."""
    return not name.startswith("_") and name.rpartition("_")[2] not in KEPT


def _slots(config: Any, sizes: Mapping[int, set[int]]) -> Iterator[tuple[tuple[str, ...], str, list[Any]]]:
    """Numbers of the config that a cut may have changed, and what they may be now: the likeliest first."""
    for path, part in _parts(config):
        for name, value in vars(part).items():
            if not _is_size(name):
                continue
            if type(value) is int and value in sizes:
                yield path, name, [*sorted(sizes[value] - {value}), value]
            elif value is None and name in OTHERWISE:
                yield path, name, [None, *sorted({n for to in sizes.values() for n in to})]
            elif isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
                new = [min(sizes.get(v, {v})) for v in value]
                if new != list(value):
                    yield path, name, [type(value)(new), value]


def _combinations(slots: Sequence[tuple[tuple[str, ...], str, list[Any]]]) -> Iterator[tuple[Any, ...]]:
    """All choices of values, those with more first choices first."""
    most = [len(s[2]) - 1 for s in slots]

    def picks(total: int, at: int) -> Iterator[tuple[int, ...]]:
        """Numbers of choices, from a slot on, that add up."""
        if at == len(most):
            if total == 0:
                yield ()
            return
        for first in range(min(total, most[at]) + 1):
            if total - first <= sum(most[at + 1 :]):
                for others in picks(total - first, at + 1):
                    yield first, *others

    for total in range(sum(most) + 1):
        for chosen in picks(total, 0):
            yield tuple(s[2][p] for s, p in zip(slots, chosen))


def shrink_config_lists(model: nn.Module, kept: Sequence[int], before: int) -> list[Callable[[], Any]]:
    """Leave in the config's lists with an entry a block those of blocks that stay; return what undoes it."""
    old: Any = getattr(model, "config", None)
    lists = [
        (path, name, value)
        for path, part in (_parts(old) if hf.is_model(model) else ())
        for name in PER_LAYER
        if isinstance(value := getattr(part, name, None), list) and len(value) == before
    ]
    if not lists:
        return []
    new = copy_config_(model)
    for path, name, value in lists:
        setattr(_at(new, path), name, [value[i] for i in kept])
    return [lambda: copy_config_(model, old)]


def _builds(model: Any, config: Any, want: Mapping[str, torch.Size], example: Any) -> bool:
    """Whether the class makes of this config what the model is."""
    try:
        with _quietly(), torch.device("meta"):
            skeleton = type(model)(config)
        if {n: t.shape for n, t in skeleton.state_dict().items()} != want:
            return False
        with _quietly(), hf.without_weights():
            again = type(model)(config).eval()
        again.load_state_dict(model.state_dict(), assign=True)
        if hasattr(again, "tie_weights"):
            again.tie_weights()
        for a, b in zip(outputs(again, example), outputs(model, example), strict=True):
            if a.shape != b.shape or not bool(
                (a - b).abs().max() <= NEAR_OF.get(b.dtype, NEAR) * b.abs().max().clamp(min=1e-6)
            ):
                return False
    except Exception:  # of whatever kind: these numbers make no model
        return False
    return True


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a step of the random generators for weights that are not used."""
    with torch.random.fork_rng(devices=[]):
        yield
