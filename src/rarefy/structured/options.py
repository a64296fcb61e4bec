"""Options of `cut_` and `drop_layers_`, and what they refuse before they have seen a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from torch import nn

from rarefy.common.errors import DataError, ModelError, unknown
from rarefy.common.options import AsTuple, Fraction, Names, OneOf, Options, Positive, at
from rarefy.model import lowrank_modules
from rarefy.model.forward import check_batches
from rarefy.model.layers import all_layers
from rarefy.model.masks import masks as attached
from rarefy.model.quant_grid import attached_grid, recorded_grids
from rarefy.structured.compensation import REPAIRS
from rarefy.structured.importance import REDUCTIONS, UNIT_SCORES
from rarefy.structured.unit_selection import SCOPES

RENAMED_KINDS = {"head of a group": "query_head", "head dimension": "head_dim"}
KINDS = ("channel", "neuron", "head", "query_head", "head_dim", "group")
LAYER_SCORES = ("similarity", "loss", "random")
BUDGETS = ("keep", "parameters", "flops", "latency", "counts")


def _current_name(kind: Any) -> Any:
    if isinstance(kind, str) and kind in RENAMED_KINDS:
        raise ModelError(f"units {kind!r} is called {RENAMED_KINDS[kind]!r} now")
    return kind


Kind = Annotated[str, OneOf((*KINDS, "layer")), BeforeValidator(_current_name)]
Part = Annotated[float, Field(gt=0, le=1)]
Repairs = Annotated[tuple[Annotated[str, OneOf(REPAIRS)], ...], AsTuple()]
RepairField = Annotated[
    Annotated[bool, Tag("<all or none>")] | Annotated[Repairs, Tag("<names>")],
    Discriminator(lambda value: "<all or none>" if isinstance(value, bool) else "<names>"),
]


class CutOptions(Options):
    """Remove whole units; the model becomes an ordinary smaller one. See `rarefy.cut_`."""

    error = ModelError

    units: Annotated[tuple[Kind, ...], AsTuple()] = Field(
        default=("channel", "neuron", "head"),
        description="kinds of units: channel or group of a convolution, neuron of a Linear layer, head, head_dim "
        "(features of heads), query_head (queries that share keys); or layer alone: whole blocks",
    )
    keep: Part | None = Field(
        default=None, description="fraction of units that stays in each group; 0.5 where no budget is given"
    )
    parameters: Part | None = Field(
        default=None, description="instead of keep: fraction of the model's parameters to leave"
    )
    flops: Part | None = Field(default=None, description="instead of keep: fraction of the model's operations to leave")
    latency: Part | None = Field(
        default=None, description="instead of keep: fraction of the model's time to leave, measured"
    )
    counts: dict[str, Annotated[int, Field(ge=1)]] | None = Field(
        default=None,
        description="instead of keep: how many units stay in each group, by its name in `rarefy inspect --groups`; "
        "other groups stay whole",
    )
    score: Annotated[str, OneOf(dict.fromkeys((*UNIT_SCORES, *LAYER_SCORES)))] | None = Field(
        default=None,
        description="how units are ranked; by default fluctuation with "
        "calibration data, magnitude without, for whole blocks similarity",
    )
    reduce: Annotated[str, OneOf(REDUCTIONS)] = Field(default="sum", description="how the slices of a unit are joined")
    scope: Annotated[str, OneOf(SCOPES)] = Field(
        default="layer",
        description="units compete in their group, with all, or in groups of equal structure (isomorphic)",
    )
    min_keep: Fraction = Field(default=0.0, description="no group keeps less than this fraction")
    layers: Names | None = Field(
        default=None, description="cut groups whose units are produced by these layers for at least half"
    )
    ignore: Names | None = Field(default=None, description="layers that must not lose outputs")
    round_to: Positive = Field(default=1, description="unit counts that stay are multiples of this")
    steps: Positive = Field(default=1, description="cut in so many steps, with new scores in each")
    repair: RepairField = Field(
        default=True, description="with data, how the remaining units compensate; true: all ways, false: none"
    )

    @model_validator(mode="after")
    def _check_combination(self) -> CutOptions:
        if self.drops_layers:
            self._check_layers()
            return self
        if self.score in LAYER_SCORES and self.score not in UNIT_SCORES:
            with at("score"):
                raise ModelError(unknown("score", self.score, UNIT_SCORES))
        if self.reduce != "sum" and self.unit_score in ("obs", "median", "random"):
            with at("reduce"):
                raise ModelError(f"reduce has no effect: score {self.unit_score} gives one number per unit")
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            with at(budgets[1]):
                raise ModelError(f"expected one budget, got {' and '.join(budgets)}")
        if self.counts is not None:
            self._check_counts()
        return self

    def _check_counts(self) -> None:
        """Raise for options that have no effect where the number of units of each group is given."""
        if not self.counts:
            with at("counts"):
                raise ModelError("counts is empty: expected group names with numbers of units")
        for name in ("scope", "min_keep", "layers", "ignore", "round_to", "steps"):
            if getattr(self, name) != type(self).model_fields[name].default:
                with at(name):
                    raise ModelError(f"{name} has no effect: counts gives the units of each group")

    def _check_layers(self) -> None:
        """Raise for options that have no effect when whole blocks are removed."""
        if self.units != ("layer",):
            with at("units"):
                raise ModelError("layers cannot be combined with other units: give units='layer'")
        if self.score is not None and self.score not in LAYER_SCORES:
            with at("score"):
                raise ModelError(unknown("score of layers", self.score, LAYER_SCORES))
        for name in BUDGETS[1:]:
            if getattr(self, name) is not None:
                with at(name):
                    raise ModelError(f"layers are removed as a whole: give keep, not {name}")
        for name in ("reduce", "scope", "min_keep", "round_to", "steps", "repair"):
            if getattr(self, name) != type(self).model_fields[name].default:
                with at(name):
                    raise ModelError(f"{name} has no effect on layers")

    @property
    def drops_layers(self) -> bool:
        """Return whether whole blocks are removed."""
        return "layer" in self.units

    @property
    def unit_score(self) -> str:
        """Return the score of units; by default that without data."""
        return self.score or "magnitude"

    @property
    def budget(self) -> str:
        """Return what is limited: keep, parameters, flops, latency or counts."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), "keep")

    @property
    def target(self) -> float:
        """Return the fraction of the budget's measure that is to be left."""
        value = 0.0 if self.counts is not None else getattr(self, self.budget)
        return 0.5 if value is None else value

    @property
    def repairs(self) -> tuple[str, ...]:
        """Return the ways in which the remaining units compensate, where there is data."""
        return REPAIRS if self.repair is True or self.repair is None else self.repair or ()


class DropLayersOptions(Options):
    """Remove whole blocks. See `rarefy.drop_layers_`."""

    error = ModelError

    keep: Part | None = Field(
        default=None, description="fraction of blocks that stays; by default 0.75, or all but `layers`"
    )
    score: Annotated[str, OneOf(LAYER_SCORES, "score of layers")] = Field(
        default="similarity", description="how blocks are ranked"
    )
    layers: Names | None = Field(default=None, description="names or globs of blocks that may go")
    ignore: Names | None = Field(default=None, description="names or globs of blocks that stay")


def check_unmasked(model: nn.Module, whole: bool = False, doing: str = "cut") -> None:
    """Raise ModelError for a model with masks, grids or factors, which would not fit the cut model.

    With `whole` (blocks are dropped), recorded grids are allowed: they stay with the blocks that remain.
    """
    if attached(model):
        raise ModelError("masks are still attached: fold_ the model first")
    for layer in all_layers(model):
        if attached_grid(layer.module, layer.param) is not None or (recorded_grids(layer.module) and not whole):
            raise ModelError(f"{layer.full_name} is already quantized: {doing} first, then quantize")
    factorized = next(iter(lowrank_modules.factor_records(model)), None)
    if factorized is not None:
        raise ModelError(f"{factorized} is already factorized: {doing} first, then factorize")


def check_repeatable(data: Any) -> None:
    """Raise DataError for data that is no list of batches, or can be iterated only once."""
    check_batches(data)
    if isinstance(data, Iterator):
        raise DataError("data is read more than once: give a list or a DataLoader, not an iterator")


def check_data(options: CutOptions, data: Any, loss: Any) -> tuple[str, ...]:
    """Return the repairs that there is data for; raise for what is missing or has no effect."""
    needs = UNIT_SCORES[options.unit_score].needs
    if loss is not None and needs != "gradient":
        raise ModelError(f"loss has no effect: score {options.unit_score} takes no gradients")
    if data is None:
        if needs:
            raise DataError(f"score {options.unit_score} needs data: give batches")
        if options.repairs and isinstance(options.repair, tuple):
            raise DataError(f"repair {', '.join(options.repairs)} needs data: give batches")
        return ()
    check_repeatable(data)
    if not options.repairs and not needs and options.score is not None:
        raise DataError(f"data has no effect: nothing is repaired, and score {options.unit_score} reads weights alone")
    return options.repairs
