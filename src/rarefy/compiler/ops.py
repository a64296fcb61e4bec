"""The engine's operators as attributes, for passes and tests: `ops.linear`, `ops.norm` and so on.

Each is the reference function of an `OpSpec`, which nodes of a compiled graph call.
"""

from __future__ import annotations

from typing import Any

from rarefy.compiler.operators.table import BY_NAME


def __getattr__(name: str) -> Any:
    if name not in BY_NAME:
        raise AttributeError(f"the engine has no operator {name!r}; it has {', '.join(BY_NAME)}")
    return BY_NAME[name].reference
