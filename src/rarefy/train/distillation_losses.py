"""Distillation losses between the outputs, hidden states and attention of a student and its teacher.

s, t        student's and teacher's, [rows, features] of real tokens or samples
kl          KL(t || s) of softened outputs, times T^2 (Hinton 2015)
mse         mean squared difference
dist        1 - correlation, within samples and within classes (DIST, Huang 2022)
squarehead  MSE(s, t) / MSE(0, t), each layer on its own scale (Kurtic 2023)
cosine      1 - cosine of rows
contrastive each row identifies its teacher row in the batch (InfoNCE; CRD, Tian 2020, with the batch as negatives)
embedding   1 - cosine of pooled outputs
similarity  mean squared difference between the cosines of all pairs of texts in the batch (relational distillation of
            Park 2019, with cosines)
relations   KL between softmax(A A' / sqrt d) for A of queries, keys and values each (MiniLMv2, Wang 2021, eq. 3)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.common.errors import RecipeError


def kl(s: Tensor, t: Tensor, T: float = 1.0, top: int | None = None) -> Tensor:
    """Return KL(t || s) at temperature T, times T^2, averaged over rows.

    With `top`, over the teacher's most likely classes and one class for all others.

    >>> float(kl(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]])))
    0.0
    """
    p, q = F.log_softmax(t.float() / T, -1), F.log_softmax(s.float() / T, -1)
    if top is not None and top < p.shape[-1]:
        p, index = p.topk(top, -1)
        p, q = _with_other_class(p), _with_other_class(q.gather(-1, index))
    return T * T * F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()


def _with_other_class(log_p: Tensor) -> Tensor:
    """Return log-probabilities with one class added for all others."""
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-9).log()
    return torch.cat([log_p, rest], -1)


def mse(s: Tensor, t: Tensor) -> Tensor:
    """Return the mean squared difference."""
    return F.mse_loss(s.float(), t.float())


def squarehead(s: Tensor, t: Tensor) -> Tensor:
    """Return the squared difference relative to the teacher's mean square (Kurtic 2023)."""
    return mse(s, t) / t.float().square().mean().clamp(min=1e-12)


def cosine(s: Tensor, t: Tensor) -> Tensor:
    """Return 1 - cosine of rows, averaged."""
    return (1 - F.cosine_similarity(s.float(), t.float(), dim=-1)).mean()


def pool(hidden: Tensor, mask: Tensor | None, by: str) -> Tensor:
    """Return embeddings [batch, features] of hidden states [batch, tokens, features]: the mean of real tokens, or the
    first token.

    >>> pool(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]), "mean")
    tensor([[2.]])
    """
    hidden = hidden.float()
    if by == "first":
        return hidden[:, 0]
    if mask is None:
        return hidden.mean(1)
    real = mask[..., None].to(hidden.dtype)
    return (hidden * real).sum(1) / real.sum(1).clamp(min=1.0)


def similarity(s: Tensor, t: Tensor) -> Tensor:
    """Return the mean squared difference between the cosines of all pairs of rows.

    >>> float(similarity(torch.eye(2), 3 * torch.eye(2)))
    0.0
    """
    a, b = (F.normalize(x.float(), dim=-1) for x in (s, t))
    return F.mse_loss(a @ a.T, b @ b.T)


def contrastive(s: Tensor, t: Tensor, T: float = 0.1, max_rows: int = 512) -> Tensor:
    """Return the InfoNCE loss of the first `max_rows` rows at temperature T."""
    a, b = (F.normalize(x.float()[:max_rows], dim=-1) for x in (s, t))
    return F.cross_entropy(a @ b.T / T, torch.arange(len(a), device=a.device))


def dist(s: Tensor, t: Tensor, T: float = 1.0) -> Tensor:
    """Return 1 - correlation within rows plus, with two or more rows, within columns, times T^2 (DIST, Huang 2022)."""
    p, q = (F.softmax(x.float() / T, -1) for x in (t, s))
    return T * T * (_correlation_distance(q, p) + (_correlation_distance(q.T, p.T) if len(q) > 1 else 0))


def _correlation_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - correlation of rows, averaged."""
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    return (1 - F.cosine_similarity(a, b, dim=-1)).mean()


def relations(s: Tensor, t: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Return the KL divergence between the token relations of s and t, [batch, tokens, features] each.

    Averaged over heads and real tokens (MiniLMv2, eq. 3).
    """

    def related(x: Tensor) -> Tensor:
        B, n, C = x.shape
        if C % heads:
            raise RecipeError(
                f"relations: {heads} heads do not divide {C} features; choose a number of heads that does"
            )
        x = x.float().reshape(B, n, heads, C // heads).transpose(1, 2)
        scores = x @ x.transpose(-1, -2) / math.sqrt(C // heads)
        if mask is not None:
            scores = scores.masked_fill(~mask.bool()[:, None, None, :], float("-inf"))
        return F.log_softmax(scores, -1)

    p, q = related(t), related(s)
    each = torch.where(p.isneginf(), 0.0, p.exp() * (p - q).nan_to_num(0.0)).sum(-1).mean(1)
    return each.mean() if mask is None else each[mask.bool()].mean()


POOLINGS = {"mean": "of real tokens", "first": "token, such as [CLS]"}
OUTPUTS: dict[str, Callable[..., Tensor]] = {"kl": kl, "mse": mse, "dist": dist}
HIDDEN: dict[str, Callable[..., Tensor]] = {
    "mse": mse, "squarehead": squarehead, "cosine": cosine, "contrastive": contrastive,
}  # fmt: skip
