"""Padding in batches of texts of unequal lengths: which fused subgraphs may leave it out, and the tokens that are left.

A subgraph may run on the real tokens alone if each of its operators computes every token by itself, or is attention
whose mask comes from the model's input `attention_mask`, and if nothing outside reads its outputs at padding. These are
zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import Node, aten
from rarefy.compiler.operators.table import BY_TARGET
from rarefy.compiler.program import NT, VECTOR

MASK_INPUTS = ("attention_mask", "padding_mask")  # how names of inputs that say what is padding end
HIDDEN = -1e30  # masks hide keys from this number down
BROADCASTS = (aten.unsqueeze.default, aten.expand.default)
CASTS = (aten.to.dtype, aten.to.device, aten._to_copy.default, aten.clone.default)


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a batch are in a program's memory.

    Attributes:
        batch: number of sequences.
        tokens: length of the padded sequences.
        longest: tokens of the longest sequence.
        rows: int64 [real tokens], which of the batch * tokens each one is.
        bounds: int64 [batch, 2], first column and number of real tokens of each sequence.
    """

    batch: int
    tokens: int
    longest: int
    rows: Tensor
    bounds: Tensor

    @property
    def columns(self) -> int:
        """Return the number of columns, one for each token that is no padding."""
        return len(self.rows)

    @property
    def tiles(self) -> int:
        """Return the number of tiles of `NT` columns."""
        return -(-self.columns // NT)


@dataclass(frozen=True)
class PaddingRule:
    """What must hold in a call so that a subgraph may leave out padding.

    Attributes:
        mask: the attention mask, additive.
        reads_first: the first token of each sequence is read outside, so it must be real.
        factors: inputs of the model [batch, tokens] that outputs are multiplied by, so they must be zero at padding
            and nowhere else.
    """

    mask: Node
    reads_first: bool
    factors: tuple[Node, ...]

    def packing(
        self, inputs: Mapping[Node, Tensor], lookup: Callable[[Node], Any], *, any_batch: bool = False
    ) -> Packing | None:
        """Return the real tokens of a call's batch; None where nothing is gained, or padding cannot be left out.

        Args:
            inputs: the inputs of the subgraph.
            lookup: gives the value of a node.
            any_batch: also of a batch with little or no padding, so that it needs no program for its very shape.
        """
        mask = inputs[self.mask]
        batch, tokens = next(t.shape[:2] for n, t in inputs.items() if n is not self.mask)
        if any(t.dim() != 3 or t.shape[:2] != (batch, tokens) for n, t in inputs.items() if n is not self.mask):
            return None
        real = real_tokens(mask, batch, tokens)
        if real is None or (self.reads_first and not bool(real[:, 0].all())):
            return None
        if not any_batch and bool(real.all()):
            return None
        for factor in map(lookup, self.factors):
            if factor.shape != real.shape or not torch.equal(factor != 0, real):
                return None
        packing = pack(real)
        padded = batch * (-(-tokens // VECTOR) * VECTOR if batch > 1 else tokens)
        return packing if any_batch or packing.columns <= padded - VECTOR else None


def real_tokens(mask: Tensor, batch: int, tokens: int) -> Tensor | None:
    """Return which tokens an additive mask [.., heads, queries, keys] shows to all queries, bool [batch, tokens].

    Returns:
        None if it hides other keys from other heads or queries, has other numbers than zero for keys that it shows, or
        hides all tokens of a sequence.
    """
    mask = mask[(None,) * (4 - mask.dim())]
    by_head, by_query = (mask.shape[d] > 1 and mask.stride(d) != 0 for d in (1, 2))
    if by_head or by_query or mask.shape[0] != batch or mask.shape[3] != tokens:
        return None
    keys = mask[:, 0, 0]
    real = keys == 0
    if not bool((real | (keys <= HIDDEN)).all()) or not bool(real.any(1).all()):
        return None
    return real


def pack(real: Tensor) -> Packing:
    """Return where the real tokens of a batch go: sequence after sequence, without gaps. O(batch * tokens).

    Args:
        real: bool [batch, tokens].

    >>> packing = pack(torch.tensor([[False, True, True], [True, False, False]]))
    >>> packing.rows.tolist(), packing.bounds.tolist()
    ([1, 2, 3], [[0, 2], [2, 1]])
    """
    lengths = real.sum(1)
    rows = real.flatten().nonzero()[:, 0].contiguous()
    bounds = torch.stack([lengths.cumsum(0) - lengths, lengths], 1)
    batch, tokens = real.shape
    return Packing(batch, tokens, int(lengths.max()), rows, bounds)


def padding_rule(nodes: Sequence[Node], outputs: Sequence[Node]) -> PaddingRule | None:
    """Return what must hold so that a subgraph may leave out padding; None if it never may. O(nodes of the graph).

    Args:
        nodes: the operators of the subgraph.
        outputs: those that are read outside.
    """
    masks = {n.args[3] for n in nodes if n.target is ops.attention}
    if len(masks) != 1 or None in masks:
        return None
    if not all(n.target in (ops.attention, ops.rope) or BY_TARGET[n.target].per_row for n in nodes):
        return None
    (mask,) = masks
    if not all(_attends_to_itself(n, set(nodes)) for n in nodes if n.target is ops.attention):
        return None
    if not any(n.op == "placeholder" and n.name.endswith(MASK_INPUTS) for n in _sources(mask)):
        return None
    readers = _Readers(mask, set(nodes))
    return PaddingRule(mask, readers.read_first, tuple(readers.factors)) if readers.allow(outputs) else None


def _sources(node: Node, inside: set[Node] | None = None) -> set[Node]:
    """Return all nodes that a node is computed from; those that are not inside are not followed further."""
    sources, pending = {node}, [node]
    while pending:
        source = pending.pop()
        if inside is None or source in inside:
            new = set(source.all_input_nodes) - sources
            sources |= new
            pending += new
    return sources


def _attends_to_itself(node: Node, inside: set[Node]) -> bool:
    """Return whether keys and values are computed from inputs that queries are computed from too."""
    q, k, v = ({s for s in _sources(x, inside) - inside if not _is_weight(s)} for x in node.args[:3])
    return k | v <= q


def _is_weight(node: Node) -> bool:
    return node.op == "placeholder" and all(
        u.target in BY_TARGET and node not in BY_TARGET[u.target].tensors(u) for u in node.users
    )


class _Readers:
    """Follows what reads the outputs of a subgraph.

    Attributes:
        read_first: the first token of each sequence is read alone.
        factors: inputs of the model that values are multiplied by.
    """

    def __init__(self, mask: Node, inside: set[Node]):
        self.mask, self.inside = mask, inside
        self.read_first = False
        self.factors: dict[Node, None] = {}

    def allow(self, outputs: Sequence[Node]) -> bool:
        """Return whether no other token depends on the values of these outputs at padding."""
        pending = [n for n in outputs if not self._is_zero_at_padding(n)]
        seen = set(pending)
        while pending:
            node = pending.pop()
            for user in (u for u in node.users if u.op != "output" and u not in self.inside | seen):
                if user.target in (aten.select.int, aten.slice.Tensor) and _first_token(user):
                    self.read_first = True
                elif user.target is not aten.sym_size.int and not self._is_zero_at_padding(user):
                    if not self._by_token(user, node, seen):
                        return False
                    seen.add(user)
                    pending.append(user)
        return True

    def _by_token(self, user: Node, node: Node, seen: set[Node]) -> bool:
        """Return whether each token of an operator's output depends on that token alone, or on real tokens."""
        if user.target is ops.attention:
            return user.args[3] is self.mask
        if user.target in BY_TARGET:
            return user.target is ops.rope or BY_TARGET[user.target].per_row
        pointwise = isinstance(user.target, torch._ops.OpOverload) and torch.Tag.pointwise in user.target.tags
        return (pointwise or user.target in CASTS) and all(a is node or a in seen for a in user.all_input_nodes)

    def _is_zero_at_padding(self, node: Node) -> bool:
        """Return whether a node multiplies by one of the model's inputs [batch, tokens]; note which."""
        if node.target not in (aten.mul.Tensor, ops.mul) or any(a is not None for a in node.args[2:]):
            return False
        for factor in node.args[:2]:
            unsqueezed = False
            while isinstance(factor, fx.Node) and factor.target in (*BROADCASTS, *CASTS):
                if factor.target is aten.unsqueeze.default:
                    if unsqueezed or factor.args[1] not in (-1, 2):
                        break
                    unsqueezed = True
                factor = factor.args[0]
            if unsqueezed and isinstance(factor, fx.Node) and factor.op == "placeholder":
                self.factors[factor] = None
                return True
        return False


def _first_token(node: Node) -> bool:
    """Return whether a select or a slice takes the first token."""
    _, *args = node.args
    return args == [1, 0] or (node.target is aten.slice.Tensor and args == [1, 0, 1])
