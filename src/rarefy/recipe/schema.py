"""The schema of recipes: stages are the options of verbs, and what surrounds them is data, evaluation and saving."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from rarefy.common.errors import RecipeError, unknown
from rarefy.common.options import AsTuple, Fraction, Keyed, OneOf, Options, Positive, at, show
from rarefy.common.yaml_text import write_yaml
from rarefy.evaluation.metrics import METRICS
from rarefy.lowrank.layer_tying import TieOptions
from rarefy.lowrank.svd import BUDGETS, FactorizeOptions, check_beside
from rarefy.prune.prune import PruneOptions
from rarefy.quantization.codebook import ShareOptions
from rarefy.quantization.config import QuantizeOptions
from rarefy.structured.options import CutOptions, RepairField
from rarefy.structured.permutation import PermuteOptions
from rarefy.train.distill import Distill
from rarefy.train.fit import FitOptions, Steps
from rarefy.train.optimizers import LR_SCHEDULES, OPTIMIZERS, optimizer_of
from rarefy.train.sparsity_config import (
    Admm,
    Alternate,
    Gradual,
    Movement,
    Rewind,
    Rigl,
    SecondOrder,
    SparsityConfig,
    config_class,
)

# pydantic has a deprecated method of the name of this field
warnings.filterwarnings("ignore", 'Field name "validate" in "(TrainStage|Data)" shadows', UserWarning)

DTYPES = ("bf16", "fp16", "fp32")
FORMATS = ("smallest", "dense", "dense+mask", "bitmask", "csr", "csc", "bsr", "nm")
Seed = Annotated[int, Field(ge=0, le=(1 << 32) - 1)]
Rate = Annotated[float, Field(ge=0)]
Metric = Annotated[str, OneOf(METRICS)]


class CutStage(CutOptions):
    """Remove whole units; the model becomes an ordinary smaller one. See `rarefy.cut_`."""

    repair: RepairField | None = Field(
        None, description="how the remaining units compensate; null: all ways if there is calibration data, else none"
    )


class FactorizeStage(FactorizeOptions):
    """Replace layers by products of smaller ones, or restore what they have lost. See `rarefy.factorize_`."""

    beside: bool = Field(
        False,
        description="put factors of `rank` beside layers, that restore what they have lost since the recipe began",
    )
    whiten: bool | None = Field(
        None, description="minimize errors of outputs on calibration data; null: if there is such data"
    )

    @model_validator(mode="after")
    def _check_beside(self) -> FactorizeStage:
        if self.beside:
            with at(next(name for name in BUDGETS if getattr(self, name) is not None)):
                check_beside(self)
        return self


class ShareStage(ShareOptions):
    """Let the weights of a layer share a few values. See `rarefy.share_`."""

    weigh: bool | None = Field(
        None, description="weight errors by the inputs in the calibration data; null: if there is such data"
    )


class Optimizer(Options):
    """A torch optimizer by name."""

    name: Annotated[str, OneOf(OPTIMIZERS, "optimizer")] = Field("adamw", description="the optimizer")
    lr: Rate = Field(1e-4, description="learning rate")
    momentum: Rate | None = Field(None, description="sgd: momentum")
    weight_decay: Rate | None = Field(None, description="weight decay")
    nesterov: bool | None = Field(None, description="sgd: Nesterov momentum")

    @model_validator(mode="after")
    def _check_options(self) -> Optimizer:
        with at("name"):
            optimizer_of(self.name, self.lr, **self.options())
        return self

    def options(self) -> dict[str, Any]:
        """Return what is set besides name and rate."""
        return self.model_dump(exclude={"name", "lr"}, exclude_none=True)


class QuantizeInTraining(QuantizeOptions):
    """Quantization-aware training: weights are kept on a grid from `start` on."""

    start: Fraction = Field(0.5, description="progress of training at which weights are quantized")


def _config_name(value: Any) -> str:
    if isinstance(value, SparsityConfig):
        return type(value).__name__
    method = value.get("method", "gradual") if isinstance(value, Mapping) else "gradual"
    return config_class(method).__name__ if isinstance(method, str) else "Gradual"


def _check_method(value: Any) -> Any:
    with at("method"):
        _config_name(value)
    return value


SparsityField = Annotated[
    Annotated[Gradual, Tag("Gradual")]
    | Annotated[Movement, Tag("Movement")]
    | Annotated[SecondOrder, Tag("SecondOrder")]
    | Annotated[Rigl, Tag("Rigl")]
    | Annotated[Alternate, Tag("Alternate")]
    | Annotated[Admm, Tag("Admm")]
    | Annotated[Rewind, Tag("Rewind")],
    Discriminator(_config_name),
    BeforeValidator(_check_method),
]


class TrainStage(Steps, FitOptions):
    """Train with the masks held. See `rarefy.fit_`."""

    optimizer: Optimizer = Field(Optimizer.model_validate({}), description="the optimizer and its rates")
    lr_schedule: Annotated[str, OneOf(LR_SCHEDULES)] = Field("cosine", description="how the learning rate changes")
    prune: SparsityField | None = Field(None, description="how zeros come into the weights; `method` chooses the way")
    distill: Distill | None = Field(None, description="learn from a teacher too")
    quantize: QuantizeInTraining | None = Field(None, description="keep weights on a grid from its `start` on")
    validate: Metric | None = Field(  # type: ignore[assignment]
        None, description="measure each epoch on data.validate, and keep the best one"
    )
    keep_zeros: bool = Field(False, description="zeros that weights have already stay zero")

    @model_validator(mode="after")
    def _check_patience(self) -> TrainStage:
        if self.patience is not None and self.validate is None:
            with at("patience"):
                raise RecipeError("patience waits for a better epoch: give validate, a metric")
        return self


class CastOptions(Options):
    """Keep parameters and saved buffers in another floating-point type from here on. See `rarefy.cast_`."""

    dtype: Annotated[str, OneOf(DTYPES)] = Field(description="the type of weights")


StageOptions = (
    PermuteOptions | CutStage | PruneOptions | QuantizeOptions | FactorizeStage | ShareStage | TieOptions | TrainStage
    | CastOptions
)  # fmt: skip
STAGES: dict[str, type[Options]] = {
    "permute": PermuteOptions, "cut": CutStage, "prune": PruneOptions, "quantize": QuantizeOptions,
    "factorize": FactorizeStage, "share": ShareStage, "tie": TieOptions, "train": TrainStage, "cast": CastOptions,
}  # fmt: skip
STAGE_NAMES = {options: name for name, options in STAGES.items()}


def _check_stage(value: Any) -> Any:
    if isinstance(value, Options):
        return value
    if not isinstance(value, Mapping) or len(value) != 1:
        raise RecipeError(f"a stage is one of {', '.join(STAGES)} with its settings, got {show(value)}")
    name = next(iter(value))
    if name not in STAGES:
        raise RecipeError(unknown("stage", name, STAGES))
    return value


Stage = Annotated[
    Annotated[PermuteOptions, Keyed("permute"), Tag("permute")]
    | Annotated[CutStage, Keyed("cut"), Tag("cut")]
    | Annotated[PruneOptions, Keyed("prune"), Tag("prune")]
    | Annotated[QuantizeOptions, Keyed("quantize"), Tag("quantize")]
    | Annotated[FactorizeStage, Keyed("factorize"), Tag("factorize")]
    | Annotated[ShareStage, Keyed("share"), Tag("share")]
    | Annotated[TieOptions, Keyed("tie"), Tag("tie")]
    | Annotated[TrainStage, Keyed("train"), Tag("train")]
    | Annotated[CastOptions, Keyed("cast"), Tag("cast")],
    Discriminator(lambda value: STAGE_NAMES[type(value)] if isinstance(value, Options) else next(iter(value))),
    BeforeValidator(_check_stage),
]


def _check_stages(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not value:
        raise RecipeError(f"stages is a list such as '- prune: {{sparsity: 0.5}}', got {show(value)}")
    return tuple(value)


class Data(Options):
    """What calibration and training read: paths or built-in names, and how much of them (null: all)."""

    calibrate: str | None = Field(None, description="calibration data")
    train: str | None = Field(None, description="training data")
    validate: str | None = Field(  # type: ignore[assignment]
        None, description="data that `train.validate` measures on"
    )
    samples: Positive | None = Field(64, description="calibration samples: texts of `tokens`, or images")
    train_samples: Positive | None = Field(None, description="training samples")
    validate_samples: Positive | None = Field(None, description="validation samples")
    tokens: Positive = Field(512, description="tokens of each text")
    batch: Positive = Field(8, description="samples of a batch")
    seed: Seed = Field(0, description="of the choice of samples")


class Latency(Options):
    """Time forward calls on an evaluation batch cut or repeated to each of these sizes."""

    batch: Annotated[tuple[Positive, ...], AsTuple()] = Field((1,), description="batch sizes")
    repeats: Positive = Field(20, description="timed calls")


class Decode(Options):
    """Time a causal language model at batch 1: reading a prompt (prefill), then writing tokens (decode)."""

    prompt: Positive = Field(256, description="tokens of the prompt")
    new: Positive = Field(24, description="tokens that are written")
    repeats: Positive = Field(5, description="timed rounds")
    text: str | None = Field(None, description="beginning of a sentence that both models finish, for the receipt")


class Evaluate(Options):
    """Measure before and after on held-out data."""

    metric: Metric = Field(description="what is measured")
    data: str | None = Field(None, description="held-out data: a path or a built-in name")
    samples: Positive | None = Field(None, description="samples; null: all")
    tokens: Positive = Field(512, description="tokens of each text")
    batch: Positive = Field(8, description="samples of a batch")
    latency: Latency | None = Field(None, description="time forward calls")
    decode: Decode | None = Field(None, description="time a causal language model")
    accelerate: bool = Field(False, description="also time the result with `accelerate_`, whose layers skip zeros")
    engine: bool = Field(
        False,
        description="evaluate and time the result on the engine, not in eager torch: with `rarefy.decoder` for causal "
        "language models, with `rarefy.compile` for others",
    )
    precision: Annotated[str, OneOf(("int8",))] | None = Field(
        None, description="engine: the precision of products; null: that of the model"
    )
    max_degradation: float | None = Field(
        None, gt=-1, le=1, description="largest relative loss of quality, such as 0.15 for 15 %; more fails the run"
    )

    @model_validator(mode="after")
    def _check_effect(self) -> Evaluate:
        if self.accelerate and not (self.latency or self.decode):
            with at("accelerate"):
                raise RecipeError("accelerate has no effect: it is timed by latency or decode, give one")
        if self.precision is not None and not self.engine:
            with at("precision"):
                raise RecipeError("precision has no effect without engine: true")
        if self.accelerate and self.engine:
            with at("accelerate"):
                raise RecipeError("accelerate times eager torch and engine the engine: leave one of them out")
        return self


class Save(Options):
    """How weights are stored."""

    format: Annotated[str, OneOf(FORMATS)] = Field(
        "smallest", description="smallest: the smallest of all formats for each tensor; or one format where it fits"
    )
    compress: bool = Field(False, description="compress all of it by LZMA")


class Recipe(Options):
    """A compression: stages in order, and what surrounds them."""

    stages: Annotated[tuple[Stage, ...], BeforeValidator(_check_stages)] = Field(description="what is done, in order")
    name: str = Field("recipe", description="name of the recipe")
    about: str = Field("", description="what the recipe is for")
    data: Data | None = Field(None, description="data for calibration and training")
    evaluate: Evaluate | None = Field(None, description="what is measured before and after")
    save: Save = Field(Save.model_validate({}), description="how the result is stored")
    seed: Seed = Field(0, description="of all random choices")

    @model_validator(mode="after")
    def _check_order(self) -> Recipe:
        """Refuse a cut or a reordering of a model that has masks, grids or factors by then."""
        changed = None  # the last stage whose result a change of units would not fit
        for i, stage in enumerate(self.stages):
            with at("stages", i):
                if isinstance(stage, CutStage | PermuteOptions) and changed:
                    subject = "a cut" if isinstance(stage, CutStage) else "permute"
                    raise RecipeError(f"{subject} comes before a stage {changed}, whose result it would not fit")
                self._check_hidden(i)
            if isinstance(stage, PruneOptions | QuantizeOptions | FactorizeStage | ShareStage) or (
                isinstance(stage, TrainStage) and (stage.prune or stage.quantize)
            ):
                changed = STAGE_NAMES[type(stage)]
        return self

    def _check_hidden(self, i: int) -> None:
        """Raise where a later stage compares hidden states with a model whose units stand in another order."""
        late = isinstance(self.stages[i], PermuteOptions) and not all(
            isinstance(stage, PermuteOptions) for stage in self.stages[:i]
        )
        if late and any(isinstance(s, TrainStage) and s.distill and s.distill.hidden for s in self.stages[i:]):
            raise RecipeError(
                "distill.hidden compares with the model before the first stage, whose units would stand in another "
                "order: permute first"
            )

    @property
    def solves(self) -> bool:
        """Whether a stage has a solver or trains, so that its state can be kept."""
        return self.trains or any(isinstance(s, PruneOptions) and s.solver is not None for s in self.stages)

    @property
    def trains(self) -> bool:
        """Whether a stage trains."""
        return any(isinstance(stage, TrainStage) for stage in self.stages)

    @property
    def cuts(self) -> bool:
        """Whether a stage removes units."""
        return any(isinstance(stage, CutStage) for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, with every default; `from_dict` reads it back."""
        stages = [{STAGE_NAMES[type(stage)]: stage.model_dump(mode="json")} for stage in self.stages]
        return {"stages": stages, **self.model_dump(mode="json", exclude={"stages"})}

    def to_yaml(self) -> str:
        """Return the recipe as YAML, with every default."""
        return write_yaml(self.to_dict())
