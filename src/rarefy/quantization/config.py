"""Options of `quantize_`, and how weights are quantized once the defaults are filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from rarefy.calibration.static_grids import OBSERVERS
from rarefy.common.errors import PatternError, unknown
from rarefy.common.options import Fraction, Names, OneOf, Options, at
from rarefy.model.layers import Layer
from rarefy.model.quant_grid import BITS, WeightGrid
from rarefy.model.sparsity_pattern import Pattern, check_sparsity, parse_pattern
from rarefy.prune.solver_config import Solver, SolverField, as_solver, check_options, resolve
from rarefy.quantization.activation_observers import KINDS
from rarefy.quantization.scale_fitting import FITS

ROUNDINGS = ("rtn", "obs", "round")
PAPERS = {"gptq": "obs", "autoround": "round"}
ROUND = {"steps": 200, "lr": None, "bf16": False, "blocks": None}  # defaults of the solver round, whose lr is 1 / steps
FLOATS = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "half": "fp16", "fp32": "fp32"}

DRIFT_CORRECTION = 0.5  # `asymmetric` of the solver obs below 8 bits

QuantizedWeight = tuple[WeightGrid, Tensor, Tensor | None]  # grid, weights as stored, mask where it is new


class QuantizeOptions(Options):
    """Round weights to grids of few bits. See `rarefy.quantize_`."""

    error = PatternError

    weights: Annotated[str, OneOf([f"int{b}" for b in BITS])] = Field(default="int8", description="bits of each weight")
    per_layer: dict[str, Annotated[str, OneOf([f"int{b}" for b in BITS], "bits in per_layer")]] | None = Field(
        default=None, description="bits of layers that differ from weights, by the full name of the layer"
    )
    group: Annotated[int, Field(ge=2)] | Literal["tensor"] | None = Field(
        default=None, description="inputs that share a scale; null: all inputs of an output; tensor: the whole weight"
    )
    symmetric: bool = Field(default=True, description="codes are centred at 0; false: with a zero point")
    fit: Annotated[str, OneOf(FITS)] | None = Field(
        default=None, description="how a scale is found; by default mse, of 8 bits minmax"
    )
    solver: SolverField = Field(
        default="rtn",
        description="rtn: round to nearest; obs: GPTQ, below 8 bits with asymmetric: 0.5; round: AutoRound; the last "
        "two need data",
    )
    activations: Annotated[str, OneOf(KINDS)] | None = Field(
        default=None,
        description="quantize the inputs of Linear and Conv layers too: with a scale a row, or calibrated scales",
    )
    observer: Annotated[str, OneOf(OBSERVERS)] | None = Field(
        default=None, description="int8-static: how the range of inputs is found; by default mse"
    )
    smooth: Fraction | None = Field(
        default=None,
        description="with activations: the power of the largest inputs that is moved into the weights before",
    )
    pattern: str | None = Field(default=None, description="obs: prune in the same pass, to this pattern")
    sparsity: Fraction | None = Field(default=None, description="with pattern: fraction of zeros")
    layers: Names | None = Field(
        default=None, description="selectors of layers; by default all but embeddings and head"
    )
    ignore: Names | None = Field(default=None, description="selectors of layers to leave as they are")

    @field_validator("weights", mode="before")
    @classmethod
    def _refuse_floats(cls, weights: Any) -> Any:
        if isinstance(weights, str) and weights in FLOATS:
            raise PatternError(
                f"weights={weights!r}: floating-point types are for whole models: rarefy.cast_(model, "
                f"{FLOATS[weights]!r}), in recipes the stage cast"
            )
        return weights

    @model_validator(mode="after")
    def _check_combination(self) -> QuantizeOptions:
        if self.observer is not None and self.activations != "int8-static":
            with at("observer"):
                raise PatternError(f"observer={self.observer!r} has no effect without activations='int8-static'")
        if self.smooth is not None and self.activations is None:
            with at("smooth"):
                raise PatternError(f"smooth={self.smooth!r} has no effect without activations")
        with at("solver"):
            solver = _solver_of(self.solver, 8)
        if self.pattern is None and self.sparsity is not None:
            with at("sparsity"):
                raise PatternError(f"sparsity={self.sparsity!r} has no effect without pattern")
        with at("pattern"):
            _pattern_of(self, solver)
        with at("per_layer"):
            if self.per_layer == {}:
                raise PatternError("per_layer is empty: expected names of layers with their bits")
            if self.per_layer is not None and solver is not None and solver.name == "round":
                raise PatternError("per_layer is not supported by solver round: quantize each number of bits by itself")
        return self


@dataclass(frozen=True)
class QuantizeConfig:
    """How weights are quantized: bits, who shares a scale, how it is found, how weights are rounded."""

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
    def description(self) -> str:
        """Return the grid in short, such as `int4 by 128`."""
        kind = ("int" if self.symmetric else "uint") + str(self.bits)
        return kind if self.group is None else f"{kind} by {self.group}"


def resolve_options(options: QuantizeOptions) -> QuantizeConfig:
    """Return how weights are quantized, with defaults filled in.

    >>> resolve_options(QuantizeOptions(weights="int4", group=128)).description
    'int4 by 128'
    """
    bits = int(options.weights.removeprefix("int"))
    solver = _solver_of(options.solver, bits)
    pattern, sparsity = _pattern_of(options, solver)
    return QuantizeConfig(
        bits=bits,
        group=options.group,
        symmetric=options.symmetric,
        fit=options.fit or ("minmax" if bits == 8 else "mse"),
        solver=solver,
        pattern=pattern,
        sparsity=sparsity,
        activations=options.activations,
        observer=options.observer or "mse",
        smooth=options.smooth,
    )


def layer_configs(options: QuantizeOptions, layers: Sequence[Layer]) -> dict[str, QuantizeConfig]:
    """Return how each of these layers is quantized; PatternError where `per_layer` names others.

    >>> from torch import nn
    >>> from rarefy.model.layers import all_layers
    >>> options = QuantizeOptions(weights="int6", group=32, per_layer={"0": "int4"})
    >>> made = layer_configs(options, all_layers(nn.Sequential(nn.Linear(32, 2), nn.Linear(2, 2))))
    >>> {name: config.description for name, config in made.items()}
    {'0': 'int4 by 32', '1': 'int6 by 32'}
    """
    known = {name: l.full_name for l in layers for name in (l.full_name, *(owner for owner, _, _ in l.owners))}
    other = next((name for name in options.per_layer or {} if name not in known), None)
    if other is not None:
        first = layers[0].full_name
        raise PatternError(f"per_layer: expected full names of selected layers, such as {first!r}, got {other!r}")
    bits = dict.fromkeys(known.values(), options.weights)
    bits |= {known[name]: b for name, b in (options.per_layer or {}).items()}
    configs = {b: resolve_options(options.model_copy(update={"weights": b})) for b in {*bits.values()}}
    return {name: configs[b] for name, b in bits.items()}


def _solver_of(solver: SolverField, bits: int) -> Solver | None:
    """Return the solver with its defaults for that many bits, None for rounding to nearest."""
    solver = as_solver(solver)
    name = solver.name
    if name == "rtn":
        return None
    if name not in ROUNDINGS:
        meant = PAPERS.get(name.lower())
        hint = f" ({name} is called {meant} here)" if meant else ""
        raise PatternError(unknown("solver of quantization", name, ROUNDINGS) + hint)
    if name == "round":
        options = check_options(solver, ROUND)
        return Solver(name=name, **(ROUND | options))
    asymmetric, solver = solver.asymmetric, resolve(solver)
    if solver.reconstruct:
        raise PatternError("solver obs: reconstruct is not supported for quantization; leave it out")
    if asymmetric is None and bits < 8:  # of 8 bits the error of earlier layers is too small to take the time
        return solver.model_copy(update={"asymmetric": DRIFT_CORRECTION})
    return solver


def _pattern_of(options: QuantizeOptions, solver: Solver | None) -> tuple[Pattern | None, float]:
    """Return the pattern and the sparsity of zeros that are chosen in the same pass."""
    if options.pattern is None:
        return None, 0.0
    if solver is None or solver.name != "obs":
        raise PatternError(
            f"pattern {options.pattern!r}: only solver='obs' prunes in the same pass; prune_ first, then quantize"
        )
    pattern = parse_pattern(options.pattern)
    sparsity, _ = check_sparsity(pattern, options.sparsity, None)
    if pattern.kind not in ("unstructured", "nm", "block"):
        raise PatternError(
            f"pattern {pattern} spans all columns, which solver obs quantizes in order: prune_ first, then quantize"
        )
    if pattern.kind in ("nm", "block") and isinstance(options.group, int) and options.group % pattern.b:
        raise PatternError(f"group={options.group} must be a multiple of {pattern.b} for pattern {pattern}")
    return pattern, sparsity
