"""A native program for the real tokens of padded batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rarefy.compiler.fx_utils import Node
from rarefy.compiler.padding import Packing
from rarefy.compiler.program import NT, Program


def capacity(tiles: int) -> int:
    """Return for how many tiles a program for so many is built: few sizes, at most a quarter more.

    >>> [capacity(n) for n in (1, 8, 9, 17, 33)]
    [1, 8, 10, 20, 40]
    """
    unit = 1 << max(0, tiles.bit_length() - 3)
    return -(-tiles // unit) * unit


class PackedProgram(Program):
    """The steps of a subgraph on one row of tokens, for any batch whose real tokens fit."""

    def __init__(self, tiles: int, features: Mapping[Node, int], *args: Any):
        """Build the steps.

        Args:
            tiles: number of tiles of tokens.
            features: features of each input that is no mask.
            *args: nodes, outputs, kernels, constants and operators, as for `Program`.
        """
        nodes, outputs, *rest = args
        shapes = {n: (1, tiles * NT, f) for n, f in features.items()}
        super().__init__(nodes, list(features), outputs, shapes, *rest)
        self.masks.clear()
        self.columns = tiles * NT
        steps = [i for packs in self.raw.values() for i in packs]
        self.edges = [*steps, *self.final]  # steps on external tensors
        self.packing: Packing | None = None

    def set_packing(self, packing: Packing) -> None:
        """Let the next call run on the tokens of a batch. O(steps)."""
        self.packing = packing
        self.used_share = packing.columns / self.columns
        for s in self.array:
            s.columns = s.tokens = s.seq_stride = packing.columns
        for i in self.edges:
            self.array[i].token_rows = packing.rows.data_ptr()
        for a, _ in self.attentions:
            a.batch, a.queries, a.keys = packing.batch, packing.longest, packing.longest
            a.bounds = packing.bounds.data_ptr()

    def _new_outputs(self) -> list[Tensor]:
        assert self.packing is not None
        batch, tokens = self.packing.batch, self.packing.tokens
        return [torch.zeros(batch, tokens, shape[-1], dtype=torch.float32) for shape in self.out_shapes]
