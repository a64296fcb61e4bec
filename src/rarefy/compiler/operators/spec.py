"""`OpSpec`: all that the compiler knows about one operator of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rarefy.compiler.fx_utils import Node

Shape = tuple[int, ...]

# how a program stores an operator's values
ROWS = "rows"  # [.., tokens, features], the operator reads features
IMAGES = "images"  # [batch, channels, height, width], the operator reads neighbouring pixels
PIXELS = "pixels"  # [batch, channels, height, width], the operator reads each pixel, or sums of all, as they are stored
IMAGES_TO_ROWS = "images to rows"  # from [batch, channels, height, width] to rows
ROWS_TO_IMAGES = "rows to images"  # from rows to [batch, channels, height, width]
ELEMENTWISE = "elementwise"  # either of them


@dataclass(frozen=True)
class Call:
    """One node of a graph with the shapes that it meets.

    Attributes:
        node: the node, whose arguments are as the operator's `OpSpec.arguments` says.
        shapes: shapes of the arguments that are tensors, without weights and masks.
        weight: shape of the weight, None for an operator without one.
        packed: the packed weight, None where there is none.
        constants: the graph's constants by the names of their placeholders.
        masks: the tensors of attention masks, by their node.
    """

    node: Node
    shapes: tuple[Shape, ...]
    weight: Shape | None
    packed: Any
    constants: Mapping[str, Tensor]
    masks: Mapping[Node, Tensor]


def describe(
    node: Node,
    spec: OpSpec,
    shapes: Sequence[Any],
    kernels: Mapping[Node, Any],
    constants: Mapping[str, Tensor],
    masks: Mapping[Node, Tensor],
) -> Call:
    """Return a node's call on tensors of these shapes."""
    weight, kernel = spec.argument(node, "weight"), kernels.get(node)
    shape = None if weight is None else tuple((constants[weight.name] if kernel is None else kernel).shape)
    return Call(node, tuple(shapes), shape, None if kernel is None else kernel.held[0], constants, masks)


def first_shape(call: Call) -> Shape:
    """Return the shape of the first argument, which most operators keep."""
    return call.shapes[0]


def same_shapes(call: Call) -> bool:
    """Return whether all tensors have one shape."""
    return len(set(call.shapes)) == 1


@dataclass(frozen=True)
class OpSpec:
    """One operator of the engine.

    Attributes:
        reference: the function that torch runs where there are no kernels, and that defines what the kernels compute.
            Its name is the operator's name, also in saved graphs.
        arguments: the kind of each argument, a key of `op_registry.ARGUMENTS`; one that ends with "?" may be None.
        lower: adds the operator's steps to a `Program`; None: it never runs in a program.
        fits: whether a program may run a call of these shapes, which a file can make up.
        out_shape: the shape of the output.
        layout: how a program stores its values: ROWS, IMAGES, PIXELS, IMAGES_TO_ROWS, ROWS_TO_IMAGES or
            ELEMENTWISE.
        heavy: a program is worth its packing and unpacking if it has such an operator.
        epilogue: arguments 3 and 4 are a residual and an activation, which other operators can move into.
        per_row: row i of the output depends on row i of the inputs alone.
        few_tokens: programs for few tokens can run it.
        whole_sequences: its sequences begin at whole vectors in a program's memory.
        own_call: a packed weight makes it one native call outside of programs.
        packed_formats: formats of a packed weight in saved models.
        check_weights: raises ValueError if a file's weights do not fit the call.
    """

    reference: Callable[..., Any]
    arguments: tuple[str, ...]
    lower: Callable[[Any, Node], None] | None = None
    fits: Callable[[Call], bool] = same_shapes
    out_shape: Callable[[Call], Shape] = first_shape
    layout: str = ROWS
    heavy: bool = False
    epilogue: bool = False
    per_row: bool = False
    few_tokens: bool = True
    whole_sequences: bool = False
    own_call: bool = False
    packed_formats: tuple[str, ...] = ()
    check_weights: Callable[[Call], None] | None = None

    @property
    def name(self) -> str:
        """Return the name of the operator."""
        return self.reference.__name__

    def index(self, kind: str) -> int | None:
        """Return which argument is the first of a kind, None where there is none."""
        kinds = [k.removesuffix("?") for k in self.arguments]
        return kinds.index(kind) if kind in kinds else None

    def argument(self, node: Node, kind: str) -> Any:
        """Return a node's argument of a kind, None where there is none."""
        i = self.index(kind)
        return None if i is None else node.args[i]

    def tensors(self, node: Node) -> list[Node]:
        """Return the arguments of a node that are tensors, without weights and masks."""
        return [a for kind, a in zip(self.arguments, node.args) if kind.removesuffix("?") == "tensor" and a is not None]
