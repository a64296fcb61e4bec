"""Weights as the matrices [G, O, C] that solvers work on, and back."""

from __future__ import annotations

from torch import Tensor

from rarefy.model.layers import Layer


def to_matrix(layer: Layer, weight: Tensor) -> Tensor:
    """Return a stored weight as [G, O, C]; kernel positions of a transposed convolution are rows."""
    return flatten_gkoi(layer.layout.view(weight), layer.layout.kind == "conv-transposed")


def flatten_gkoi(view: Tensor, positions_are_rows: bool = False) -> Tensor:
    """Reshape [G, K, O, I] to [G, O, K I], or to [G, K O, I]."""
    return view.flatten(1, 2) if positions_are_rows else view.transpose(1, 2).flatten(2)


def to_gkoi(layer: Layer, W: Tensor) -> Tensor:
    """Reshape [G, O, C] to [G, K, O, I]."""
    G, K, O, I = layer.layout.shape
    if layer.layout.kind == "conv-transposed":
        return W.reshape(G, K, O, I)
    return W.reshape(G, O, K, I).transpose(1, 2)


def to_stored(layer: Layer, W: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a weight [G, O, C] in its stored shape: the inverse of `to_matrix`."""
    return layer.layout.unview(to_gkoi(layer, W), shape)
