"""Update the config of a Hugging Face model after a cut, so that its class builds the cut model from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rarefy.model import hf
from rarefy.model.compare import relative_distance
from rarefy.structured.surgery import NEAR, NEAR_OF, outputs

MAX_TRIES = 512  # combinations of config values
DERIVED = ("n_inner", "head_dim", "intermediate_size")  # None there means a multiple or quotient of other numbers
NO_SIZES = ("id", "ids", "vocab_size", "positions", "embeddings", "length", "window", "version", "dropout", "labels")
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")


def update_config(model: nn.Module, example: Any, sizes: Mapping[int, set[int]]) -> None:
    """Set config values with which the model's class builds the cut model, if there are any.

    The class must give the same shapes, and on `example` the same outputs; the cut record notes that. `sizes` says what
    each size became somewhere in the model. O(combinations of values) models without weights.
    """
    if not hf.is_model(model):
        return
    config: Any = model.config
    slots = list(_slots(config, sizes))
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    for attempt, values in enumerate(_combinations(slots)):
        if attempt == MAX_TRIES:
            return
        candidate = copy.deepcopy(config)
        for (path, name, _), value in zip(slots, values):
            setattr(_at(candidate, path), name, value)
        if _builds(model, candidate, shapes, example):
            copy_config_(model, candidate)
            model.rarefy_cut["config"] = True  # type: ignore[index, operator]
            return


def copy_config_(model: nn.Module, new: Any = None) -> Any:
    """Give a model its own copy of its config, or `new`, and return it: other models may share the old one."""
    old: Any = model.config
    new = copy.deepcopy(old) if new is None else new
    copies = {id(a): b for (_, a), (_, b) in zip(_configs(old), _configs(new))}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in copies and value is not None:
                setattr(module, name, copies[id(value)])
    return new


def merge_sizes(sizes: Mapping[int, set[int]], later: Mapping[int, set[int]]) -> dict[int, set[int]]:
    """Return what sizes became after two cuts."""
    merged = {old: {n for middle in new for n in later.get(middle, {middle})} for old, new in sizes.items()}
    for old, new in later.items():
        merged.setdefault(old, set()).update(new)
    return merged


def shrink_config(model: nn.Module, values: Any) -> None:
    """Set the smaller values of a saved config in the config of a model of the original class."""
    if not hf.is_model(model) or not isinstance(values, dict):
        return
    for path, config in _configs(copy_config_(model)):
        saved = _within(values, path)
        for name, old in list(vars(config).items()):
            new = saved.get(name)
            smaller = _is_size(name) and type(old) is int and type(new) is int and 1 <= new <= old
            filled = old is None and name in DERIVED and type(new) is int and new >= 1
            shorter = name in PER_LAYER and isinstance(new, list) and isinstance(old, list) and len(new) <= len(old)
            if smaller or filled or (shorter and all(v in old for v in new)):  # type: ignore[union-attr, operator]
                setattr(config, name, new)


def _within(values: Any, path: Sequence[str]) -> dict[str, Any]:
    """Return the values of a nested config, {} where there is none."""
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _configs(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, config) of a config and the configs nested in it."""
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _configs(value, (*path, name))


def _at(config: Any, path: Sequence[str]) -> Any:
    """Return the nested config at a path."""
    for name in path:
        config = getattr(config, name)
    return config


def _is_size(name: str) -> bool:
    """Return whether a config value may be a size that cuts change, by its name: no id, no sequence length."""
    return not name.startswith("_") and name.rpartition("_")[2] not in NO_SIZES


def _slots(config: Any, sizes: Mapping[int, set[int]]) -> Iterator[tuple[tuple[str, ...], str, list[Any]]]:
    """Yield config values that a cut may have changed, with their possible new values, the most likely first."""
    for path, nested in _configs(config):
        for name, value in vars(nested).items():
            if not _is_size(name):
                continue
            if type(value) is int and value in sizes:
                yield path, name, [*sorted(sizes[value] - {value}), value]
            elif value is None and name in DERIVED:
                yield path, name, [None, *sorted({n for new_sizes in sizes.values() for n in new_sizes})]
            elif isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
                new = [min(sizes.get(v, {v})) for v in value]
                if new != list(value):
                    yield path, name, [type(value)(new), value]


def _combinations(slots: Sequence[tuple[tuple[str, ...], str, list[Any]]]) -> Iterator[tuple[Any, ...]]:
    """Yield all combinations of values, those with more first choices first."""
    max_index = [len(s[2]) - 1 for s in slots]

    def indices(total: int, slot: int) -> Iterator[tuple[int, ...]]:
        """Yield tuples of indices, one for each slot from `slot` on, that add up to `total`."""
        if slot == len(max_index):
            if total == 0:
                yield ()
            return
        for index in range(min(total, max_index[slot]) + 1):
            if total - index <= sum(max_index[slot + 1 :]):
                for rest in indices(total - index, slot + 1):
                    yield index, *rest

    for total in range(sum(max_index) + 1):
        for chosen in indices(total, 0):
            yield tuple(s[2][i] for s, i in zip(slots, chosen))


def shrink_config_lists(model: nn.Module, kept_blocks: Sequence[int], before: int) -> list[Callable[[], Any]]:
    """Keep the entries of remaining blocks in config lists with an entry a block; return what undoes it."""
    old: Any = getattr(model, "config", None)
    lists = [
        (path, name, value)
        for path, config in (_configs(old) if hf.is_model(model) else ())
        for name in PER_LAYER
        if isinstance(value := getattr(config, name, None), list) and len(value) == before
    ]
    if not lists:
        return []
    new = copy_config_(model)
    for path, name, value in lists:
        setattr(_at(new, path), name, [value[i] for i in kept_blocks])
    return [lambda: copy_config_(model, old)]


def _builds(model: Any, config: Any, shapes: Mapping[str, torch.Size], example: Any) -> bool:
    """Return whether the class builds the cut model from this config."""
    try:
        with _fixed_random_state(), torch.device("meta"):
            skeleton = type(model)(config)
        if {n: t.shape for n, t in skeleton.state_dict().items()} != shapes:
            return False
        with _fixed_random_state(), hf.without_weights():
            rebuilt = type(model)(config).eval()
        rebuilt.load_state_dict(model.state_dict(), assign=True)
        if hasattr(rebuilt, "tie_weights"):
            rebuilt.tie_weights()
        for a, b in zip(outputs(rebuilt, example), outputs(model, example), strict=True):
            if not relative_distance(a, b, norm=math.inf, floor=1e-6) <= NEAR_OF.get(b.dtype, NEAR):
                return False
    except Exception:  # of any kind: these values build no model
        return False
    return True


@contextmanager
def _fixed_random_state() -> Iterator[None]:
    """Keep the random generators as they are: the weights that a constructor draws are not used."""
    with torch.random.fork_rng(devices=[]):
        yield
