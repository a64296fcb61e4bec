"""An estimate of what pruning with a solver costs: counted operations over this machine's measured rate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rarefy.calibration import offload
from rarefy.calibration.sequential import LayerGroup
from rarefy.prune.allocation import GRADIENTS, LEVELS, TOKENS
from rarefy.prune.allocation_search import TOKENS as TRIAL_TOKENS
from rarefy.prune.allocation_search import TRIALS
from rarefy.prune.solver_config import Solver, in_bf16

OVERHEAD = 1.5  # time of a forward pass over that of its matrix products
SLOWDOWN = {
    "factor": 4.0,
    "columns": 3.0,
    "eigen": 40.0,
}  # slower than a matrix product of as many operations by this factor
SUSPENDED = 4  # activations per token, of the layer's output width, in a suspended pass besides the input


@dataclass(frozen=True)
class Cost:
    """Seconds, and resident bytes at the peak."""

    seconds: float
    bytes: int

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        return f"about {f'{minutes} min ' if minutes else ''}{seconds} s and {self.bytes / 1e9:.1f} GB"


def estimate(
    groups: Sequence[LayerGroup],
    samples: int,
    tokens: int,
    solver: Solver,
    allocate: str = "uniform",
    max_suspended_bytes: int | None = None,
    rate: float | None = None,
) -> Cost:
    """Return the estimated cost of a run over `samples` with `tokens` in total. Takes 0.1 s.

    max_suspended_bytes  limit for suspended activations
    rate                 operations per second; by default measured now with a matrix product

    Right within a factor of two if nothing else runs. Attention over long sequences is not counted.
    """
    streams = 2 if solver.asymmetric or solver.reconstruct else 1
    pass_ops = gram_ops = solver_ops = single_pass = 0.0
    suspended, workspace, activations = 0, 0, 0
    for g in groups:
        shapes = [l.layout.shape for l in g.layers]
        G, C = shapes[0][0], shapes[0][1] * shapes[0][3]
        O = sum(s[2] for s in shapes)
        rows = g.rows * samples
        products = 2.0 * rows * G * O * C
        single_pass += products * g.calls
        pass_ops += products * streams * g.calls
        if solver.reconstruct:  # forward, backward (two products), held-out errors, and one rerun
            pass_ops += products * (3 * solver.reconstruct + 2)
        gram = rows * G * C * C
        gram_ops += gram * (3 if solver.asymmetric else 1)
        if allocate in GRADIENTS:  # errors are measured
            gram_ops += gram * min(1, TOKENS["errors"] / max(tokens, 1))
            solver_ops += (
                SLOWDOWN["factor"] * G * C**3 * 2 / 3 + len(LEVELS) * (SLOWDOWN["columns"] + 4) * G * O * C * C
            )
        product = 2.0 * G * O * C * C
        solver_ops += 2 * product  # error of the result
        solver_ops += 2 * product if solver.asymmetric else 0
        if solver.name == "obs":
            solver_ops += SLOWDOWN["columns"] * product / 2 + SLOWDOWN["factor"] * G * C**3 * 2 / 3
        else:
            solver_ops += product * (2 * (solver.refits or 0) + 2) + SLOWDOWN["factor"] * G * C**3
        if solver.name == "admm":
            solver_ops += product * 2 * (solver.steps or 0) + SLOWDOWN["eigen"] * G * C**3
        width = 3 if in_bf16(solver) else 4
        group_bytes = rows * (G * C + SUSPENDED * min(G * C, max(s[0] * s[2] for s in shapes))) * width
        suspended, activations = max(suspended, group_bytes * streams), activations + group_bytes
        workspace = max(workspace, 4 * G * (5 * C * C + 8 * O * C))
    rate_fp32 = rate or _rate(torch.float32)
    rate_pass = rate or (_rate(torch.bfloat16) if in_bf16(solver) else rate_fp32)
    weights = sum(l.original.numel() for g in groups for l in g.layers)
    suspended = suspended if max_suspended_bytes is None else min(suspended, max_suspended_bytes)
    fractions = {k: min(1.0, v / max(tokens, 1)) for k, v in {**TOKENS, "trial": TRIAL_TOKENS}.items()}
    allocation_passes = {"owl": 1.0, "errors": 3 * fractions["gradients"] + fractions["errors"]}
    allocation_passes["search"] = allocation_passes["errors"] + (TRIALS + 4) * fractions["trial"]
    pass_ops += single_pass * allocation_passes.get(allocate, 0)
    peak = suspended + max(workspace, weights)
    if allocate in GRADIENTS:  # gradients with all activations; then all weights at each level
        peak = max(peak, 4 * weights + activations * fractions["pass"], weights * (4 + 2 * len(LEVELS)))
    seconds = OVERHEAD * pass_ops / rate_pass + (gram_ops + solver_ops) / rate_fp32
    return Cost(seconds, sum(offload.resident_bytes()) + round(peak))


def _rate(dtype: torch.dtype) -> float:
    """Return the operations per second of a matrix product, measured now."""
    a = torch.ones(768, 768, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - began)
    return 2 * 768**3 / best
