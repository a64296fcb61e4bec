"""What the measurements of a search depend on: they are taken up again only where all of it is the same."""

from __future__ import annotations

import inspect
import re
from types import CodeType
from typing import Any

import numpy as np
import torch

from rarefy.calibration.resume import digest, run_key
from rarefy.evaluation.profiling import machine
from rarefy.runtime import bindings
from rarefy.search.task import Task

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in the text of an object: another one in each process
STATE = 2  # of the form in which measurements are stored


def search_key(task: Task, evaluate: Any, eval_data: Any) -> dict[str, Any]:
    """Return the settings of a search, its model and data as hashes, the machine and the versions.

    The time of the search is not among them, so that a search goes on with more of it.

    Args:
        task: what is searched.
        evaluate: the user's metric: None, a name, a function or a `Metric`.
        eval_data: the batches that it measures on, or None.

    Raises:
        DataError: for data that cannot be hashed.

    Cost: O(data + weights).
    """
    computer, recovery = machine(), task.recovery
    return run_key(
        task.dense,
        task.data,
        state=STATE,
        example=digest(task.example),
        eval_data=digest(eval_data),
        evaluate=function_key(evaluate),
        metric=task.metric.name,
        held_back=task.check is not None,
        higher_is_better=task.metric.higher_is_better,
        batches=list(task.batches),
        targets=task.targets.to_dict(),
        layers=str(task.layers),
        ignore=str(task.ignore),
        seed=task.seed,
        train_minutes=None if recovery is None else recovery.seconds / 60,
        train_data=None if recovery is None else digest(list(recovery.data)),
        threads=torch.get_num_threads(),
        machine=[computer["cpu"], *computer["extensions"], bindings.isa()],
    )


def function_key(function: Any) -> Any:
    """Return what tells a function from another one: its qualified name, and a hash of its code.

    Neither the lines where it stands count, nor what it calls, nor the values of variables outside of it.
    """
    if function is None or isinstance(function, str):
        return function
    while (inner := getattr(function, "measure", getattr(function, "func", None))) is not None:
        function = inner  # of a metric, of functools.partial
    function = inspect.unwrap(function)  # of a decorator such as torch.no_grad()
    named = function if hasattr(function, "__qualname__") else type(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    defaults = getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)
    return [f"{named.__module__}.{named.__qualname__}", digest([_parts(code), _plain(defaults)])]


def _plain(value: Any) -> Any:
    """Return default arguments as data that are the same in the next process: of other objects the type or name."""
    if isinstance(value, str | bytes):
        return repr(value)
    if isinstance(value, torch.Tensor | np.ndarray):
        return value
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return [[_plain(k), _plain(v)] for k, v in value.items()]
    if not ADDRESS.search(text := repr(value)):
        return text
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _parts(code: Any) -> Any:
    """Return a function's code as plain data."""
    if isinstance(code, CodeType):
        return [code.co_code, list(code.co_names), [_parts(c) for c in code.co_consts]]
    return sorted(map(repr, code)) if isinstance(code, frozenset) else repr(code)
