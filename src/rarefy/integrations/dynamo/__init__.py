"""`torch.compile(model, backend="rarefy")`: the graphs that Dynamo hands over run on the engine where that is faster.

    fast = torch.compile(model, backend="rarefy", options={"precision": "int8", "verbose": True})
    with torch.no_grad():
        y = fast(x)

A graph is compiled, compared with eager torch and timed against it at its first call, with that call's inputs. What the
engine cannot run or runs slower stays in eager torch, without a warning: the logger `rarefy.integrations.dynamo` says
why at level INFO (`TORCH_LOGS=rarefy.integrations.dynamo`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import fx

from rarefy.common.errors import ModelError
from rarefy.common.options import OneOf, Options
from rarefy.compiler.layer_precision import PRECISIONS
from rarefy.integrations.dynamo.graph import inputs_of, place_of, reason_for_eager
from rarefy.integrations.dynamo.subgraph import Subgraph

logger = logging.getLogger(__name__)


class DynamoOptions(Options):
    """Options of `torch.compile(model, backend="rarefy", options={...})`.

    Example:
        >>> DynamoOptions(precision="int8").verbose
        False
    """

    error = ModelError

    precision: Annotated[str, OneOf(PRECISIONS)] | None = Field(
        None, description='"fp32", "bf16", "int16" or "int8", as in rarefy.compile'
    )
    tune: bool = Field(True, description="time the engine against eager torch; False: run all that the engine can run")
    verbose: bool = Field(False, description="print to standard error what ran where, and why")


def backend(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, **other: Any
) -> Callable[..., Any]:
    """Return a function that computes what a graph of Dynamo computes: on the engine, or in eager torch.

    torch calls it. Use it as `torch.compile(model, backend="rarefy")`, or without an installed package as
    `torch.compile(model, backend=rarefy.integrations.dynamo.backend)`.

    Args:
        graph: Dynamo's graph. Parameters and buffers are inputs of it.
        example_inputs: the tensors and sizes of the call that Dynamo traced.
        options: fields of `DynamoOptions`.
        **other: other arguments of torch.compile; there are none that this backend takes.

    Returns:
        A function of the graph's inputs. It returns a tuple of outputs.

    Raises:
        ModelError: for unknown options, and for `mode`.

    Cost: none here. The first call of a graph takes as long as `rarefy.compile`: seconds to a minute.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU()).eval()
        >>> fast = torch.compile(net, backend=backend)
        >>> with torch.no_grad():
        ...     bool((fast(torch.ones(2, 8)) - net(torch.ones(2, 8))).abs().max() < 1e-5)
        True
    """
    if other:
        raise ModelError(f"backend 'rarefy' has no {', '.join(other)}=: leave it out, or put options into options={{}}")
    if not isinstance(options, Mapping | None):
        raise ModelError(f"options: expected a dict such as {{'precision': 'int8'}}, got {type(options).__name__}")
    chosen = DynamoOptions(**(options or {}))
    place = place_of(graph)

    def report(text: str) -> None:
        logger.info("%s: %s", place, text)
        if chosen.verbose:
            print(f"rarefy: {place}: {text}", file=sys.stderr)

    reason = reason_for_eager(graph, example_inputs)
    if reason is not None:
        report(f"eager torch: {reason}")
        return graph.forward
    return Subgraph(graph, inputs_of(graph), chosen.precision, chosen.tune, report).run
