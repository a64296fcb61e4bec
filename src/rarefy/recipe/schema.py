"""The schema of recipes: the stages with their options, the data, the evaluation and how the result is saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from rarefy.common.errors import RecipeError, unknown
from rarefy.common.options import AsTuple, Fraction, Keyed, OneOf, Options, Positive, at, show
from rarefy.common.yaml_text import write_yaml
from rarefy.evaluation.metrics import METRICS
from rarefy.evaluation.quality import RECIPE_METRICS
from rarefy.lowrank.layer_tying import TieOptions
from rarefy.lowrank.svd import BUDGETS, FactorizeOptions, check_beside
from rarefy.prune.options import PruneOptions
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
        default=None,
        description="how the remaining units compensate; null: all ways if there is calibration data, else none",
    )


class FactorizeStage(FactorizeOptions):
    """Replace layers by low-rank factors, or add factors that correct compression errors. See `rarefy.factorize_`."""

    beside: bool = Field(
        default=False,
        description="add factors of `rank` to layers, which correct the error since the recipe began",
    )
    whiten: bool | None = Field(
        default=None, description="minimize errors of outputs on calibration data; null: if there is such data"
    )

    @model_validator(mode="after")
    def _check_beside(self) -> FactorizeStage:
        if self.beside:
            with at(next(name for name in BUDGETS if getattr(self, name) is not None)):
                check_beside(self)
        return self


class ShareStage(ShareOptions):
    """Replace the weights of a layer by a few shared values. See `rarefy.share_`."""

    weigh: bool | None = Field(
        default=None, description="weight errors by the inputs in the calibration data; null: if there is such data"
    )


class Optimizer(Options):
    """A torch optimizer by name."""

    name: Annotated[str, OneOf(OPTIMIZERS, "optimizer")] = Field(default="adamw", description="the optimizer")
    lr: Rate = Field(default=1e-4, description="learning rate")
    momentum: Rate | None = Field(default=None, description="sgd: momentum")
    weight_decay: Rate | None = Field(default=None, description="weight decay")
    nesterov: bool | None = Field(default=None, description="sgd: Nesterov momentum")

    @model_validator(mode="after")
    def _check_options(self) -> Optimizer:
        with at("name"):
            optimizer_of(self.name, self.lr, **self.options())
        return self

    def options(self) -> dict[str, Any]:
        """Return the options that are set, without name and learning rate."""
        return self.model_dump(exclude={"name", "lr"}, exclude_none=True)


class QuantizeInTraining(QuantizeOptions):
    """Quantization-aware training: weights are rounded in each forward pass from `start` on."""

    start: Fraction = Field(default=0.5, description="progress of training at which weights are quantized")


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
    """Train the model; masked weights stay zero. See `rarefy.fit_`."""

    optimizer: Optimizer = Field(default=Optimizer.model_validate({}), description="the optimizer and its rates")
    lr_schedule: Annotated[str, OneOf(LR_SCHEDULES)] = Field(
        default="cosine", description="how the learning rate changes"
    )
    prune: SparsityField | None = Field(
        default=None, description="how weights are pruned during training; `method` selects the class"
    )
    distill: Distill | None = Field(default=None, description="also train on the outputs of a teacher")
    quantize: QuantizeInTraining | None = Field(
        default=None, description="round weights in each forward pass from its `start` on"
    )
    validate: Metric | None = Field(  # type: ignore[assignment]
        default=None, description="measure each epoch on data.validate, and keep the best one"
    )
    keep_zeros: bool = Field(default=False, description="weights that are zero before training stay zero")

    @model_validator(mode="after")
    def _check_patience(self) -> TrainStage:
        if self.patience is not None and self.validate is None:
            with at("patience"):
                raise RecipeError("patience needs a validation metric: give validate")
        return self


class CastOptions(Options):
    """Convert parameters and saved buffers to another floating-point type. See `rarefy.cast_`."""

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
        if type(value) not in STAGE_NAMES:
            name = type(value).__name__
            raise RecipeError(f"expected a stage, one of {', '.join(STAGES)}, got {name}: write it inside its stage")
        return value
    if not isinstance(value, Mapping) or len(value) != 1:
        raise RecipeError(f"expected a stage, one of {', '.join(STAGES)}, with its options, got {show(value)}")
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
        raise RecipeError(f"stages must be a list such as '- prune: {{sparsity: 0.5}}', got {show(value)}")
    return tuple(value)


class Data(Options):
    """Data for calibration, training and validation: paths or built-in names, and numbers of samples (null: all)."""

    calibrate: str | None = Field(default=None, description="calibration data")
    train: str | None = Field(default=None, description="training data")
    validate: str | None = Field(  # type: ignore[assignment]
        default=None, description="data that `train.validate` measures on"
    )
    samples: Positive | None = Field(default=64, description="calibration samples: texts of `tokens`, or images")
    train_samples: Positive | None = Field(default=None, description="training samples")
    validate_samples: Positive | None = Field(default=None, description="validation samples")
    tokens: Positive = Field(default=512, description="tokens of each text")
    batch: Positive = Field(default=8, description="samples of a batch")
    seed: Seed = Field(default=0, description="seed of the choice of samples")


class Latency(Options):
    """Time forward passes at each batch size; evaluation samples are repeated where there are too few."""

    batch: Annotated[tuple[Positive, ...], AsTuple()] = Field(default=(1,), description="batch sizes")
    repeats: Positive = Field(default=20, description="timed calls")


class Decode(Options):
    """Time a causal language model at batch 1: prefill of a prompt, then decoding of new tokens."""

    prompt: Positive = Field(default=256, description="tokens of the prompt")
    new: Positive = Field(default=24, description="new tokens")
    repeats: Positive = Field(default=5, description="timed rounds")
    text: str | None = Field(default=None, description="prompt that both models complete; the receipt shows the texts")


RUNTIMES = ("onnxruntime", "openvino")


class Evaluate(Options):
    """Measure before and after on held-out data."""

    metric: Annotated[str, OneOf(RECIPE_METRICS)] = Field(
        description="what is measured; similarity and agreement compare with the model before, without labels"
    )
    data: str | None = Field(
        default=None, description="held-out data: a path or a built-in name; for retrieval pairs of texts, or texts"
    )
    samples: Positive | None = Field(default=None, description="samples; null: all")
    tokens: Positive = Field(default=512, description="tokens of each text")
    batch: Positive = Field(default=8, description="samples of a batch")
    latency: Latency | None = Field(default=None, description="time forward calls")
    decode: Decode | None = Field(default=None, description="time a causal language model")
    accelerate: bool = Field(
        default=False, description="also time the result with `accelerate_`, whose kernels skip zeros"
    )
    engine: bool = Field(
        default=False,
        description="evaluate and time the result on the engine, not in eager torch: with `rarefy.decoder` for causal "
        "language models, with `rarefy.compile` for others",
    )
    precision: Annotated[str, OneOf(("int8",))] | None = Field(
        default=None, description="precision of the engine; null: that of the model"
    )
    runtimes: Annotated[tuple[Annotated[str, OneOf(RUNTIMES)], ...], AsTuple()] = Field(
        default=(), description="other runtimes in which the result is measured too, exported to ONNX"
    )
    max_degradation: float | None = Field(
        default=None,
        gt=-1,
        le=1,
        description="largest accepted relative loss of quality, such as 0.15; the run fails beyond it",
    )

    @model_validator(mode="after")
    def _check_effect(self) -> Evaluate:
        if self.accelerate and not (self.latency or self.decode):
            with at("accelerate"):
                raise RecipeError("accelerate has no effect without latency or decode: give one of them")
        if len(set(self.runtimes)) < len(self.runtimes):
            with at("runtimes"):
                raise RecipeError(f"expected each runtime once, got {', '.join(self.runtimes)}")
        if self.precision is not None and not self.engine:
            with at("precision"):
                raise RecipeError("precision has no effect without engine: true")
        if self.accelerate and self.engine:
            with at("accelerate"):
                raise RecipeError(
                    "accelerate and engine exclude each other: the first times eager PyTorch, the second the engine"
                )
        return self


class Save(Options):
    """Storage format of the result."""

    format: Annotated[str, OneOf(FORMATS)] = Field(
        default="smallest",
        description="smallest: the smallest format for each tensor; else the format of all tensors that it supports",
    )
    compress: bool = Field(default=False, description="compress the files with LZMA")


class Recipe(Options):
    """A complete compression: stages in order, the data, the evaluation and how the result is saved.

    `rarefy.compress_` runs it. It accepts the same content as YAML, as a dict or as the name of a preset.

    Example:
        >>> recipe = Recipe(stages=[{"prune": {"sparsity": 0.5}}, {"quantize": {"weights": "int8"}}], name="small")
        >>> [type(stage).__name__ for stage in recipe.stages]
        ['PruneOptions', 'QuantizeOptions']
    """

    stages: Annotated[tuple[Stage, ...], BeforeValidator(_check_stages)] = Field(description="the stages, in order")
    name: str = Field(default="recipe", description="name of the recipe")
    about: str = Field(default="", description="what the recipe is for")
    data: Data | None = Field(default=None, description="data for calibration and training")
    evaluate: Evaluate | None = Field(default=None, description="what is measured before and after the stages")
    save: Save = Field(default=Save.model_validate({}), description="how the result is stored")
    seed: Seed = Field(default=0, description="seed of all random choices")

    @model_validator(mode="after")
    def _check_order(self) -> Recipe:
        """Raise RecipeError for a cut or permute stage after a stage that prunes, quantizes or factorizes."""
        changed = None  # the last stage whose masks, scales or factors assume fixed shapes
        for i, stage in enumerate(self.stages):
            with at("stages", i):
                if isinstance(stage, CutStage | PermuteOptions) and changed:
                    subject = "a cut" if isinstance(stage, CutStage) else "permute"
                    raise RecipeError(
                        f"{subject} must come before {changed}: it changes the shapes or order of the weights"
                    )
                self._check_hidden(i)
            if isinstance(stage, PruneOptions | QuantizeOptions | FactorizeStage | ShareStage) or (
                isinstance(stage, TrainStage) and (stage.prune or stage.quantize)
            ):
                changed = STAGE_NAMES[type(stage)]
        return self

    def _check_hidden(self, i: int) -> None:
        """Raise RecipeError where distillation would compare hidden states whose units are in another order."""
        late = isinstance(self.stages[i], PermuteOptions) and not all(
            isinstance(stage, PermuteOptions) for stage in self.stages[:i]
        )
        if late and any(isinstance(s, TrainStage) and s.distill and s.distill.hidden for s in self.stages[i:]):
            raise RecipeError(
                "distill.hidden compares hidden states with the original model, but permute reorders their units: "
                "make permute the first stage"
            )

    @property
    def solves(self) -> bool:
        """Return whether a stage has a solver or trains: only these save a state."""
        return self.trains or any(isinstance(s, PruneOptions) and s.solver is not None for s in self.stages)

    @property
    def trains(self) -> bool:
        """Return whether a stage trains."""
        return any(isinstance(stage, TrainStage) for stage in self.stages)

    @property
    def cuts(self) -> bool:
        """Return whether a stage removes units."""
        return any(isinstance(stage, CutStage) for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, with every default; `Recipe(**values)` reads it back."""
        stages = [{STAGE_NAMES[type(stage)]: stage.model_dump(mode="json")} for stage in self.stages]
        return {"stages": stages, **self.model_dump(mode="json", exclude={"stages"})}

    def to_yaml(self) -> str:
        """Return the recipe as YAML, with every default."""
        return write_yaml(self.to_dict())
