"""Solvers: refit the remaining weights of one layer to preserve its outputs on the calibration set. One function per
paper.

    W        [G, O, C]   weights of G groups, O outputs, C inputs (columns of a convolution: kernel position x input)
    target   [G, O, C]   weights whose outputs are wanted: the dense ones, or these plus `target_shift`
    H        [G, C, C]   Gram matrix X X^T of the inputs, with its damping added (see `damped`)
    mask     [G, O, C]   True = kept

The error of a layer is || (W' - target) X ||^2 = sum of diag((W' - target) H (W' - target)^T).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

ChooseMask = Callable[[Tensor, int, int], Tensor]  # score [G, O, b - a] of columns a to b -> mask of the same shape
ROWS = 8192  # whose errors are computed at once, to save memory


class ColumnQuantizer(Protocol):
    """Quantizes weights column by column; the columns of a group share their scales."""

    group: int  # columns that share scales, which are fitted when the first is reached; 0: all are known

    def begin(self, W: Tensor, mask: Tensor, first: int) -> None:
        """Fit the scales of the columns W [G, group, O] that start at `first`; `mask` marks the remaining weights."""
        ...

    def __call__(self, w: Tensor, column: int) -> Tensor:
        """Return the quantized weights [G, O] of a column."""
        ...


DAMPING_FACTORS = (10.0, 100.0, 1000.0)
MIN_DAMPING = 1e-4  # smallest damping that is multiplied


def squared_errors(W: Tensor, target: Tensor, H: Tensor) -> Tensor:
    """Return the squared error [G, O] of each output row over the calibration set. O(G O C^2).

    >>> squared_errors(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), torch.eye(2)[None])
    tensor([[2.]])
    """
    differences = (a - b for a, b in zip(W.split(ROWS, -2), target.split(ROWS, -2)))
    return torch.cat([((D @ H) * D).sum(-1) for D in differences], -1)


def damped(H: Tensor, damping: float) -> Tensor:
    """Return H + damping x mean(diag H) I, which gives inputs that are always zero a small weight. O(G C^2).

    A group whose inputs are all zero gets the identity: there only the weights themselves can be compared.
    """
    mean = H.diagonal(dim1=-2, dim2=-1).mean(-1)
    out = H.clone()
    out.diagonal(dim1=-2, dim2=-1).add_(torch.where(mean == 0, 1.0, damping * mean)[:, None])
    return out


def inverse_factor(H: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return U, upper triangular with U^T U = (H + damping x mean(diag H) I)^-1, and the damping that was needed.

    One Cholesky factorization and one triangular inverse: with the exchange matrix J, J H J = L L^T makes R = J L J
    upper triangular with H = R R^T, so U = R^-1. The damping is as in `cholesky_factor`. O(G C^3).

    >>> U, used = inverse_factor(torch.tensor([[[4.0, 0.0], [0.0, 1.0]]]), 0.0)
    >>> U[0].diagonal(), used
    (tensor([0.5000, 1.0000]), 0.0)
    """
    L, used = cholesky_factor(H.flip(-2, -1), damping)
    R = L.flip(-2, -1)
    del L
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device).expand_as(H).contiguous()
    return torch.linalg.solve_triangular(R, eye, upper=True, out=eye), used


def cholesky_factor(H: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return L, lower triangular with L L^T = H + damping x mean(diag H) I, and the damping that was needed.

    If Cholesky fails, the damping is multiplied by `DAMPING_FACTORS` in turn; raises ArithmeticError if all fail.
    O(G C^3).
    """
    steps = [damping, *(max(damping, MIN_DAMPING) * s for s in DAMPING_FACTORS)]
    for used in steps:
        L, info = torch.linalg.cholesky_ex(damped(H, used))
        if not info.any() and torch.isfinite(L.diagonal(dim1=-2, dim2=-1)).all():
            return L, used
    raise ArithmeticError(f"not positive definite even with damping {steps[-1]:g}")


def obs(
    target: Tensor, U: Tensor, choose: ChooseMask, edges: Sequence[int], snap: ColumnQuantizer | None = None
) -> tuple[Tensor, Tensor]:
    """Return (weights, mask) of SparseGPT (Frantar and Alistarh 2023, algorithm 1), an Optimal Brain Surgeon.

    Columns are processed from left to right. The mask of each block of columns is chosen by w^2 / U_jj^2 when the block
    is reached, and the error of each pruned weight is compensated by the columns to its right.

    U       from `inverse_factor`
    choose  mask of one block of columns; `lambda score, a, b: mask[..., a:b]` for a fixed mask
    edges   where blocks start, from 0 to C, such as range(0, C + 1, 128)
    snap    quantizes the remaining weights, whose rounding errors are compensated too: GPTQ (Frantar 2022), or with a
            mask both at once; its groups lie within blocks

    O(G O C^2) besides the factor.
    """
    W = target.transpose(-2, -1).contiguous()  # [G, C, O]: a column of weights is contiguous
    mask = torch.empty_like(W, dtype=torch.bool)
    d = U.diagonal(dim1=-2, dim2=-1)[..., None]  # [G, C, 1]
    for a, b in pairwise(edges):
        score = (W[:, a:b] / d[:, a:b]).square()
        block_mask = choose(score.transpose(-2, -1), a, b).transpose(-2, -1)
        mask[:, a:b] = block_mask
        pruned = (~block_mask).to(W.dtype) / d[:, a:b]
        E = torch.zeros_like(W[:, a:b])  # error of column j: (w_j - q_j) / U_jj
        Q = torch.zeros_like(E) if snap is not None else None
        inner = U[:, a:b, a:b].transpose(-2, -1).contiguous()
        for j in range(b - a):
            if snap is not None and snap.group and (a + j) % snap.group == 0:
                ahead = slice(j, j + snap.group)
                columns = W[:, a:b][:, ahead]
                columns = torch.baddbmm(columns, inner[:, ahead, :j], E[:, :j], alpha=-1) if j else columns
                snap.begin(columns, block_mask[:, ahead], a + j)
            w = W[:, a + j : a + j + 1]
            if j:
                w = torch.baddbmm(w, inner[:, j : j + 1, :j], E[:, :j], alpha=-1)
            if snap is None or Q is None:
                E[:, j] = w[:, 0] * pruned[:, j]
            else:
                Q[:, j] = torch.where(block_mask[:, j], snap(w[:, 0], a + j), 0.0)
                E[:, j] = (w[:, 0] - Q[:, j]) / d[:, a + j]
        if Q is None:
            W[:, a:b].baddbmm_(inner, E, alpha=-1)
        else:
            W[:, a:b] = Q
        W[:, b:].baddbmm_(U[:, a:b, b:].transpose(-2, -1), E, alpha=-1)
    W = torch.where(mask, W, 0.0)
    return W.transpose(-2, -1).contiguous(), mask.transpose(-2, -1).contiguous()


def refit(W: Tensor, target: Tensor, H: Tensor, mask: Tensor, steps: int = 6) -> Tensor:
    """Return the kept weights after `steps` of conjugate gradients towards least squares on their mask.

    All rows at once (ALPS, Meng 2024, section 3.3). No row's error rises above that of W x mask. The preconditioner is
    H^-1 on a row's kept columns, one matrix for all rows: exact if nothing is pruned. On real layers 20 steps end
    within 0.4 % of the minimum, where diag(H) leaves up to 10 %. O(steps G O C^2 + G C^3).
    """
    start = torch.where(mask, W, 0.0)
    X, P, rz = start.clone(), torch.zeros_like(W), W.new_zeros(*W.shape[:2], 1)
    inverse = _inverse(H)
    full = (target - X) @ H
    before = (full * (target - X)).sum(-1)
    R = torch.where(mask, full, 0.0)
    for _ in range(steps):
        Z = torch.where(mask, R @ inverse, 0.0)
        new = (R * Z).sum(-1, keepdim=True)
        P = torch.where(rz > 0, new / rz, 0.0) * P + Z
        rz = new
        Q = P @ H
        curve = (P * Q).sum(-1, keepdim=True)
        alpha = torch.where(curve > 0, rz / curve, 0.0)
        X.addcmul_(alpha, P)
        R = torch.where(mask, R.addcmul_(alpha, Q, value=-1), 0.0)
    worse = ~(squared_errors(X, target, H) <= before)  # by rounding, or NaN
    return torch.where(worse[..., None], start, X)


def _inverse(H: Tensor) -> Tensor:
    """Return H^-1, or the inverse of its diagonal if H is not positive definite; a preconditioner need not be exact."""
    L, info = torch.linalg.cholesky_ex(H)
    if info.any():
        return torch.diag_embed(1 / H.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(H.dtype).tiny))
    return torch.cholesky_inverse(L)


def admm(
    target: Tensor,
    H: Tensor,
    choose: ChooseMask,
    *,
    steps: int = 10,
    rho: float = 0.3,
    start: Tensor | None = None,
    refits: int = 6,
) -> tuple[Tensor, Tensor]:
    """Return (weights, mask) of l0-constrained least squares by ADMM (ALPS, Meng 2024, eq. 4 and 5), then `refit`.

    Columns are scaled to diag(H) = 1, so that the projection ranks by |w_j| ||x_j||, and damping and rho need no units.
    One eigendecomposition serves every rho. rho grows while the support changes, and the iteration ends early once it
    stops changing. start: initial weights (default: the target). O(steps G O C^2 + G C^3).
    """
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()[:, None]  # [G, 1, C]; what is always zero stays as it is
    Hn = H / (scale.transpose(-2, -1) * scale)
    values, Q = torch.linalg.eigh(Hn)
    T = target * scale
    goal = T @ Hn
    C = T.shape[-1]
    V, mask = torch.zeros_like(T), None
    D = T if start is None else start * scale
    mask = choose(D.square(), 0, C)
    D = torch.where(mask, D, 0.0)
    unchanged_steps = 0
    A = None
    for step in range(steps):
        if A is None:
            A = (Q / (values.clamp(min=0) + rho)[:, None]) @ Q.transpose(-2, -1)
        X = (goal - V + rho * D) @ A
        new_mask = choose((X + V / rho).square(), 0, C)
        changed = (new_mask ^ mask).float().mean().item()
        D, mask = torch.where(new_mask, X + V / rho, 0.0), new_mask
        V = V + rho * (X - D)
        unchanged_steps = unchanged_steps + 1 if changed == 0 else 0
        if unchanged_steps >= 3:
            break
        if step % 3 == 2:
            grow = 1.3 if changed > 0.01 else 1.2 if changed > 0.001 else 1.1
            rho, A = rho * grow, None
    return refit(D / scale, target, H, mask, refits), mask


def target_shift(W: Tensor, cross: Tensor, L: Tensor) -> Tensor:
    """Return W (X - X') X'^T H^-1.

    The symmetric problem for the target W + shift on the compressed inputs X' is the asymmetric one, || W' X' - W X
    ||^2 (GPTAQ, Li 2025, for each column; here for any solver).

    cross  [G, C, C] (X - X') X'^T
    L      lower Cholesky factor of H = X' X'^T, damped
    """
    return torch.cholesky_solve((W @ cross).transpose(-2, -1), L).transpose(-2, -1)


def best_shift_amount(W: Tensor, shift: Tensor, H: Tensor, cross: Tensor) -> Tensor:
    """Return the multiple of `shift` [G, O, C] that brings W X' closest to W X on other tokens.

    H and cross are sums over those tokens: the minimum of || (W + a shift) X' - W X ||^2 over a, in closed form.
    """
    gain = (W @ cross * shift).sum()
    return gain / (shift @ H * shift).sum().clamp(min=torch.finfo(W.dtype).tiny)
