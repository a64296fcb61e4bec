"""Programs of `torch.export` in memory, as modules."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from rarefy.common.errors import DataError, ModelError


def to_module(program: ExportedProgram, example: Any = None) -> tuple[nn.Module, Any]:
    """Return a program as a module in evaluation mode, and the example, by default the one it was exported with.

    Raises:
        DataError: if there is no example, and the program has none.
        ModelError: if the program takes some inputs by position and others by keyword.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = program.module()
    for part in module.modules():
        part.training = False  # its eval() raises an error
    if example is not None:
        return module, example
    if program.example_inputs is None:
        raise DataError("the program has no example inputs: compile(program, example)")
    args, kwargs = program.example_inputs
    if args and kwargs:
        raise ModelError(
            "the program takes inputs by position and by keyword: export the model with all of them by keyword"
        )
    return module, kwargs or args
