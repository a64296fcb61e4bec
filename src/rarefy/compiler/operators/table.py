"""The table of the engine's operators. A new operator is an `OpSpec` in one of these files, a kernel, and a pass."""

from __future__ import annotations

from typing import Any

from rarefy.compiler.operators import (
    attention,
    channels,
    conv,
    elementwise,
    embedding,
    fake_quantize,
    linear,
    norm,
    pooling,
    tokens,
    transpose,
)
from rarefy.compiler.operators.spec import OpSpec

FILES = (linear, conv, attention, elementwise, norm, pooling, channels, tokens, transpose, embedding, fake_quantize)
BY_NAME: dict[str, OpSpec] = {spec.name: spec for file in FILES for spec in file.OPERATORS}
BY_TARGET: dict[Any, OpSpec] = {spec.reference: spec for spec in BY_NAME.values()}  # by what a graph's node calls
