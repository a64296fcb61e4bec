"""What is asked of a solver: its options and their ranges, and which zeros are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch

from rarefy.common.errors import PatternError, unknown
from rarefy.evaluation.profiling import native_bf16
from rarefy.model import sparsity_pattern as patterns
from rarefy.prune.scores import SCORES


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How kept weights are moved; what is None is the solver's own default, see `SOLVERS`.

    name        obs (SparseGPT), admm (ALPS, then conjugate gradients) or refit (conjugate gradients on a scored mask)
    damping     times the mean of diag(H) is added to the diagonal
    asymmetric  0..1: how far the target moves towards the outputs of the dense model on its own inputs, as a share of
                what is best on a batch that is held out
    bf16        run the model's forward passes in bf16, on a CPU that multiplies it; elsewhere in fp32, which is faster
    block       obs: columns whose mask is chosen together
    steps       admm: iterations
    refits      admm, refit: conjugate gradient steps once the mask is fixed
    reconstruct passes over the calibration set in which each block learns the dense block's outputs; 0 = none
    lr          of that learning (Adam, cosine)
    blocks      names of what learns as one, globs with | between; by default the members of the model's outermost lists
                of equal modules
    """

    name: str
    damping: float | None = None
    asymmetric: float | None = None
    bf16: bool | None = None
    block: int | None = None
    steps: int | None = None
    refits: int | None = None
    reconstruct: int | None = None
    lr: float | None = None
    blocks: str | None = None


@dataclass(frozen=True)
class Ask:
    """Which zeros are wanted."""

    plan: patterns.Pattern
    sparsity: float
    each: Mapping[str, float]  # sparsity by layer name, once it is known
    scope: str
    score: str | None = None  # None = the solver's own criterion (refit: wanda)
    reduce: str | None = None
    allocate: str = "uniform"  # how `each` is found
    seed: int = 0  # of that search

    @property
    def first(self) -> bool:
        """Whether masks need all layers before the first is solved."""
        if self.score is None:
            return False
        return self.scope == "global" or self.reduce is not None or bool(SCORES[self.score].needs - {"input"})


COMMON: dict[str, Any] = {
    "damping": 0.01,
    "asymmetric": 0.0,
    "bf16": False,
    "reconstruct": 0,
    "lr": 1e-3,
    "blocks": None,
}
SOLVERS: dict[str, dict[str, Any]] = {
    "obs": {**COMMON, "block": 128},
    "admm": {**COMMON, "steps": 10, "refits": 6},
    "refit": {**COMMON, "refits": 6},
}


LINES = ("row", "column")  # patterns whose units cross all blocks of columns
PAPERS = {"sparsegpt": "obs", "obc": "obs", "alps": "admm", "pcg": "refit"}
RANGES: dict[str, tuple[Any, Any, Any]] = {
    "damping": (int | float, 0, 10),
    "asymmetric": (int | float, 0, 1),
    "bf16": (bool, None, None),
    "block": (int, 1, 1 << 20),
    "steps": (int, 1, 10000),
    "refits": (int, 0, 10000),
    "reconstruct": (int, 0, 1000),
    "lr": (int | float, 0, 1),
    "blocks": (str, None, None),
}


def resolve(solver: str | Solver | Mapping[str, Any]) -> Solver:
    """Return the solver with its defaults filled in; PatternError for an unknown one or an option it does not have.

    >>> resolve("obs").block
    128
    """
    if isinstance(solver, Mapping):
        names = [f.name for f in fields(Solver)]
        strange = [k for k in solver if k not in names]
        if strange or "name" not in solver:
            raise PatternError(unknown("solver option", strange[0], names) if strange else "a solver needs a name")
        solver = Solver(**solver)
    if not isinstance(solver, Solver):
        solver = Solver(name=solver)
    if not isinstance(solver.name, str) or solver.name not in SOLVERS:
        near = PAPERS.get(str(solver.name).lower())
        hint = f"unknown solver {solver.name!r} (did you mean {near!r}?)"
        raise PatternError(hint if near else unknown("solver", solver.name, SOLVERS))
    known = SOLVERS[solver.name]
    given = {f.name: getattr(solver, f.name) for f in fields(solver) if f.name != "name"}
    idle = [k for k, v in given.items() if v is not None and k not in known]
    if idle:
        raise PatternError(f"solver {solver.name} has no {', '.join(idle)}; it has {', '.join(known)}")
    for key, value in given.items():
        kind, low, high = RANGES[key]
        if value is None:
            continue
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            words = {bool: "true or false", int: "a whole number", str: "a glob of module names"}
            raise PatternError(f"solver {solver.name}: {key} is {words.get(kind, 'a number')}, got {value!r}")
        if high is not None and not low <= value <= high:
            raise PatternError(f"solver {solver.name}: {key} lies within {low} and {high}, got {value!r}")
    for key in ("lr", "blocks"):
        if given[key] is not None and not given["reconstruct"]:
            raise PatternError(f"solver {solver.name}: {key}={given[key]!r} has no effect without reconstruct")
    if given["lr"] == 0:
        raise PatternError(f"solver {solver.name}: lr=0 learns nothing; leave reconstruct out instead")
    return Solver(name=solver.name, **{k: known[k] if given[k] is None else given[k] for k in known})


def passes(solver: Solver) -> AbstractContextManager[Any]:
    """The precision in which a solver runs the model."""
    # no cache: it would keep the weights of the first pass for as long as the context lasts
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if in_bf16(solver) else nullcontext()


def in_bf16(solver: Solver) -> bool:
    """Return whether a solver's passes run in bf16 here."""
    return bool(solver.bf16) and native_bf16()
