"""How the weight of each layer type is read as matrices. No other file asks what type a layer has.

Every prunable tensor is viewed in four dimensions

    [G, K, O, I]    G groups, K kernel positions, O outputs and I inputs of a group

so that patterns, scores and statistics are written once for Linear, Conv1d/2d/3d with groups, transposed convolutions,
Embedding, the Conv1D of Hugging Face (stored as [in, out]) and the projections of MultiheadAttention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rarefy.model.moe import EXPERT_WEIGHTS, expert_weights

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layout:
    """Where groups, kernel positions, outputs and inputs are in a stored weight.

    kind     linear, embedding, conv, conv-transposed, conv1d-hf, attention, experts or parameter
    split    stored shape with the groups as a dimension of their own
    order    permutation from `split` to [G, *kernel, O, I]
    shape    (G, K, O, I)
    in_axis  stored dimension that holds the inputs
    """

    kind: str
    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, int, int, int]
    in_axis: int = -1

    def view(self, weight: Tensor) -> Tensor:
        """Return a stored weight as [G, K, O, I]. O(1) for Linear, at most a copy for kernels.

        >>> layout(nn.Conv2d(4, 6, 3, groups=2), "weight").view(nn.Conv2d(4, 6, 3, groups=2).weight).shape
        torch.Size([2, 9, 3, 2])
        """
        return weight.reshape(self.split).permute(self.order).reshape(self.shape)

    def unview(self, matrix: Tensor, stored: tuple[int, ...]) -> Tensor:
        """Return a tensor [G, K, O, I] in the stored shape: the inverse of `view`. O(numel)."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        permuted = tuple(self.split[i] for i in self.order)
        return matrix.reshape(permuted).permute(inverse).reshape(stored).contiguous()


def layout(module: nn.Module, param: str) -> Layout | None:
    """Return how `module.param` is read as matrices, or None if it is not a prunable weight. O(1).

    >>> layout(nn.Linear(3, 5), "weight").shape
    (1, 1, 5, 3)
    >>> layout(nn.Linear(3, 5), "bias") is None
    True
    """
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, param)
    if param in EXPERT_WEIGHTS and param in expert_weights(module):
        return _experts(module, param)
    if param != "weight":
        return None
    if isinstance(module, nn.Linear):
        return _matrix("linear", module.out_features, module.in_features)
    if isinstance(module, nn.Embedding):
        return _matrix("embedding", module.num_embeddings, module.embedding_dim)
    if isinstance(module, CONV):
        g, o, i, kernel = module.groups, module.out_channels, module.in_channels, module.kernel_size
        split = (g, o // g, i // g, *kernel)
        order = (0, *range(3, 3 + len(kernel)), 1, 2)
        return Layout("conv", split, order, (g, math.prod(kernel), o // g, i // g), in_axis=1)
    if isinstance(module, CONV_TRANSPOSED):
        g, o, i, kernel = module.groups, module.out_channels, module.in_channels, module.kernel_size
        split = (g, i // g, o // g, *kernel)
        order = (0, *range(3, 3 + len(kernel)), 2, 1)
        return Layout("conv-transposed", split, order, (g, math.prod(kernel), o // g, i // g), in_axis=0)
    if is_hf_conv1d(module):
        i, o = (int(n) for n in module.weight.shape)  # type: ignore
        return Layout("conv1d-hf", (1, i, o), (0, 2, 1), (1, 1, o, i), in_axis=0)
    return None


def prunable(module: nn.Module) -> list[str]:
    """Return the names of the module's own parameters that can be pruned.

    >>> prunable(nn.Linear(2, 2)), prunable(nn.LayerNorm(2))
    (['weight'], [])
    """
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "weight", *EXPERT_WEIGHTS)
    return [n for n in names if getattr(module, n, None) is not None and layout(module, n) is not None]


def _matrix(kind: str, rows: int, columns: int) -> Layout:
    return Layout(kind, (1, rows, columns), (0, 1, 2), (1, 1, rows, columns))


def _experts(module: Any, param: str) -> Layout:
    e, a, b = getattr(module, param).shape
    if module.is_transposed:
        return Layout("experts", (e, a, b), (0, 2, 1), (e, 1, b, a), in_axis=1)
    return Layout("experts", (e, a, b), (0, 1, 2), (e, 1, a, b))


def _attention(module: nn.MultiheadAttention, param: str) -> Layout | None:
    if getattr(module, param, None) is None:
        return None
    e = module.embed_dim
    if param == "in_proj_weight":  # queries, keys and values read different inputs: three groups
        rows, e = module.in_proj_weight.shape[0] // 3, module.in_proj_weight.shape[1]
        return Layout("attention", (3, rows, e), (0, 1, 2), (3, 1, rows, e))
    width = {"q_proj_weight": e, "k_proj_weight": module.kdim, "v_proj_weight": module.vdim}.get(param)
    return None if width is None else _matrix("attention", e, width)


def is_hf_conv1d(module: Any) -> bool:
    """Return whether a module is the Conv1D of transformers, a Linear layer stored [in, out]."""
    # by name, so that transformers need not be imported
    named = any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)
    weight = getattr(module, "weight", None)
    return named and isinstance(weight, Tensor) and weight.dim() == 2
