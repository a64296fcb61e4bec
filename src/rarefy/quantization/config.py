"""TODO."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from rarefy.common.errors import PatternError, unknown
from rarefy.model.quant_grid import BITS, WeightGrid
from rarefy.model.sparsity_pattern import Pattern, check_sparsity, parse_pattern
from rarefy.prune.solver_config import Solver, resolve
from rarefy.quantization.activation_observers import KINDS, OBSERVERS
from rarefy.quantization.scale_fitting import FITS

ROUNDINGS = ("rtn", "obs", "round")


ROUND = {"steps": 200, "bf16": False}  # defaults of the solver round, whose lr is 1 / steps


FLOATS = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "half": "fp16", "fp32": "fp32"}


QuantizedWeight = tuple[WeightGrid, Tensor, Tensor | None]  # grid, weights as stored, mask where it is new


@dataclass(frozen=True)
class Ask:
    """How weights are to lie: bits, who shares a scale, how it is found, how weights are rounded."""

    bits: int
    group: int | str | None = None
    symmetric: bool = True
    fit: str = "mse"
    solver: Solver | None = None  # None: each weight to its nearest point
    pattern: Pattern | None = None  # zeros that are chosen in the same pass
    sparsity: float = 0.0
    activations: str | None = None
    observer: str = "mse"
    smooth: float | None = None

    @property
    def words(self) -> str:
        """The grid in a word or two: `int4 by 128`."""
        kind = ("int" if self.symmetric else "uint") + str(self.bits)
        return kind if self.group is None else f"{kind} by {self.group}"


def asked(
    weights: Any = "int8",
    group: Any = None,
    symmetric: Any = True,
    fit: Any = None,
    solver: Any = "rtn",
    activations: Any = None,
    observer: Any = None,
    smooth: Any = None,
    pattern: Any = None,
    sparsity: Any = None,
) -> Ask:
    """Return what `quantize_` is asked for with its defaults filled in; PatternError for what it does not know."""
    if isinstance(weights, str) and weights in FLOATS:
        raise PatternError(
            f"weights={weights!r}: whole models are cast, with what they compute: rarefy.cast_(model, "
            f"{FLOATS[weights]!r}), in recipes the stage cast"
        )
    found = re.fullmatch(r"int(\d+)", str(weights))
    if found is None or int(found[1]) not in BITS:
        raise PatternError(unknown("weights", weights, [f"int{b}" for b in BITS]))
    bits = int(found[1])
    whole = isinstance(group, int) and not isinstance(group, bool) and group > 1
    if not (group is None or group == "tensor" or whole):
        raise PatternError(f"group is a number of inputs from 2 up, 'tensor', or None for all, got {group!r}")
    if not isinstance(symmetric, bool):
        raise PatternError(f"symmetric is True or False, got {symmetric!r}")
    fit = ("minmax" if bits == 8 else "mse") if fit is None else fit
    if not isinstance(fit, str) or fit not in FITS:
        raise PatternError(unknown("fit", fit, FITS))
    if activations is not None and activations not in KINDS:
        raise PatternError(unknown("activations", activations, KINDS))
    if observer is not None and observer not in OBSERVERS:
        raise PatternError(unknown("observer", observer, OBSERVERS))
    if observer is not None and activations != "int8-static":
        raise PatternError(f"observer={observer!r} has no effect without activations='int8-static'")
    if smooth is not None:
        if isinstance(smooth, bool) or not isinstance(smooth, int | float) or not 0 <= smooth <= 1:
            raise PatternError(f"smooth is a number from 0 to 1, got {smooth!r}")
        if activations is None:
            raise PatternError(f"smooth={smooth!r} has no effect without activations")
    how = None
    if solver != "rtn":
        name = solver.get("name") if isinstance(solver, dict) else getattr(solver, "name", solver)
        papers = {"gptq": "obs", "autoround": "round"}
        meant = papers.get(str(name).lower())
        if name not in ("obs", "round"):
            hint = f" ({name} is called {meant} here)" if meant else ""
            raise PatternError(unknown("solver of quantization", name, ROUNDINGS) + hint)
        how = _learning(solver) if name == "round" else resolve(solver)
        if how.reconstruct:
            raise PatternError("solver obs: reconstruct learns weights that are not rounded; leave it out here")
    plan, share = None, 0.0
    if pattern is not None:
        if how is None or how.name != "obs":
            raise PatternError(
                f"pattern {pattern!r}: zeros are chosen along the way by solver='obs' alone; prune_ first"
            )
        plan = parse_pattern(pattern)
        share, _ = check_sparsity(plan, sparsity, None)
        if plan.kind not in ("unstructured", "nm", "block"):
            raise PatternError(f"pattern {pattern} crosses all columns: prune_ first, then quantize")
        if plan.kind == "nm" and isinstance(group, int) and group % plan.b:
            raise PatternError(f"groups of {group} inputs and the {plan.b} of pattern {pattern} overlap")
    elif sparsity is not None:
        raise PatternError(f"sparsity={sparsity!r} has no effect without pattern")
    return Ask(bits, group, symmetric, fit, how, plan, share, activations, observer or "mse", smooth)


def _learning(solver: Any) -> Solver:
    """Return the solver round with its defaults; PatternError for an option that it does not have."""
    given = solver if isinstance(solver, dict) else {} if isinstance(solver, str) else vars_of(solver)
    known = ("steps", "lr", "bf16", "blocks")
    idle = [k for k, v in given.items() if v is not None and k not in ("name", *known)]
    if idle:
        raise PatternError(f"solver round has no {', '.join(idle)}; it has {', '.join(known)}")
    how = Solver(name="round", **{**ROUND, **{k: given[k] for k in known if given.get(k) is not None}})
    if isinstance(how.steps, bool) or not isinstance(how.steps, int) or how.steps < 1:
        raise PatternError(f"solver round: steps is a whole number from 1 up, got {how.steps!r}")
    if how.lr is not None and (not isinstance(how.lr, int | float) or not 0 < how.lr <= 1):
        raise PatternError(f"solver round: lr lies within 0 and 1, got {how.lr!r}")
    return how


def vars_of(solver: Solver) -> dict[str, Any]:
    """Return the options of a solver."""
    return {f.name: getattr(solver, f.name) for f in fields(solver)}
