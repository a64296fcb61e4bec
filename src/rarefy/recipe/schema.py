"""The words of recipes: what stages, data and evaluation can be told. `recipe.py` reads and checks them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rarefy.model import sparsity_pattern as patterns
from rarefy.model.quant_grid import BITS
from rarefy.prune.allocation import ALLOCATIONS
from rarefy.prune.scores import SCORES
from rarefy.prune.solver_config import Solver
from rarefy.quantization.activation_observers import KINDS as ACTIVATIONS
from rarefy.quantization.activation_observers import OBSERVERS
from rarefy.quantization.scale_fitting import FITS
from rarefy.structured.budget import SCOPES as CUT_SCOPES
from rarefy.structured.compensation import REPAIRS
from rarefy.structured.importance import REDUCTIONS as CUT_REDUCTIONS
from rarefy.structured.importance import UNIT_SCORES
from rarefy.structured.options import BUDGETS, KINDS, LAYER_SCORES
from rarefy.train.distill import DEPTHS, Distill
from rarefy.train.distillation_losses import HIDDEN, OUTPUTS
from rarefy.train.fit import AUTOCAST
from rarefy.train.optimizers import LR_SCHEDULES
from rarefy.train.sparsity_config import Admm, Alternate, Gradual, Movement, Rewind, Rigl, SecondOrder
from rarefy.train.sparsity_schedule import SCHEDULES


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What calibration and training read: paths or built-in names, and how much of them (null = all)."""

    calibrate: str | None = None
    train: str | None = None
    validate: str | None = None
    samples: int | None = 64  # windows of text or images to calibrate on
    train_samples: int | None = None
    validate_samples: int | None = None
    tokens: int = 512
    batch: int = 8
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prune:
    """Put zeros in, in one step. See `rarefy.prune_`."""

    pattern: str = "unstructured"
    score: str | None = None
    sparsity: float | None = None
    solver: Solver | str | None = None
    allocate: str | None = None
    scope: str | None = None
    reduce: str | None = None
    layers: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantize:
    """Put weights on grids of few bits, by their own values or by calibration. See `rarefy.quantize_`."""

    weights: str = "int8"
    group: int | str | None = None
    symmetric: bool = True
    fit: str | None = None
    solver: Solver | str = "rtn"
    activations: str | None = None
    observer: str | None = None
    smooth: float | None = None
    pattern: str | None = None
    sparsity: float | None = None
    layers: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None

    def options(self) -> dict[str, Any]:
        """Return what `rarefy.quantization.config.asked` takes."""
        names = ("weights", "group", "symmetric", "fit", "solver", "activations", "observer", "smooth")
        return {n: getattr(self, n) for n in (*names, "pattern", "sparsity")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Aware(Quantize):
    """Put weights on grids while they are trained, from `start` of the way on (quantization-aware training)."""

    start: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Factorize:
    """Put products of thinner layers in the place of layers, or `beside` pruned and quantized ones what they have lost
    since the recipe began. See `rarefy.factorize_`. `whiten: null` means where calibration data is given."""

    rank: int | None = None
    keep: float | None = None
    energy: float | None = None
    time: float | None = None
    batch: int = 128
    round_to: int = 1
    beside: bool = False
    whiten: bool | None = None
    layers: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None

    def options(self) -> dict[str, Any]:
        """Return what `rarefy.lowrank.svd.asked` takes."""
        return {n: getattr(self, n) for n in ("rank", "keep", "energy", "time", "batch", "beside", "round_to")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Let weights share a few values. See `rarefy.share_`. `weigh: null` means where calibration data is given."""

    bits: int = 4
    group: str | None = "tensor"
    weigh: bool | None = None
    layers: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Tie:
    """Let neighbouring blocks share their weights. See `rarefy.tie_layers_`."""

    every: int = 2
    blocks: str | None = None
    average: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """A torch optimizer by name; what the optimizer does not know is an error."""

    name: str = "adamw"
    lr: float = 1e-4
    momentum: float | None = None
    weight_decay: float | None = None
    nesterov: bool | None = None

    def options(self) -> dict[str, Any]:
        """Return what was set besides name and rate."""
        found = {k: getattr(self, k) for k in ("momentum", "weight_decay", "nesterov")}
        return {k: v for k, v in found.items() if v is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """Fine-tune with the masks held. `prune` lets zeros in on the way (`rarefy.train.sparsity_config`),
    `quantize` keeps weights
    on a grid from its `start` on, `distill` learns from the model as it was before the first stage (or another, in the
    folder `teacher`). `validate` measures every epoch on `data.validate` and keeps the best; with `patience` it stops
    early. With `keep_zeros` zeros that weights have already stay (`rarefy.adopt_`). See `rarefy.fit_`."""

    epochs: int = 1
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_schedule: str = "cosine"
    prune: Gradual | Movement | SecondOrder | Rigl | Alternate | Admm | Rewind | None = None
    distill: Distill | None = None
    quantize: Aware | None = None
    validate: str | None = None
    patience: int | None = None
    accumulate: int = 1
    clip: float | None = None
    autocast: str | None = None
    keep_zeros: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Cast:
    """Keep parameters and saved buffers as bf16, fp16 or fp32 from here on."""

    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Take whole units out: the model becomes an ordinary smaller one. See `rarefy.cut_`. `repair: null` means all ways
    where calibration data is given, none elsewhere."""

    units: tuple[str, ...] = ("channel", "neuron", "head")
    keep: float | None = None
    parameters: float | None = None
    flops: float | None = None
    latency: float | None = None
    score: str | None = None
    reduce: str = "sum"
    scope: str = "layer"
    min_keep: float = 0.0
    round_to: int = 1
    steps: int = 1
    repair: bool | tuple[str, ...] | None = None
    layers: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None

    @property
    def whole(self) -> bool:
        """Whether whole blocks go."""
        return "layer" in self.units

    def options(self) -> dict[str, Any]:
        """Return what `rarefy.structured.options.check_cut` takes."""
        names = ("units", *BUDGETS, "score", "reduce", "scope", "min_keep", "round_to", "steps")
        return {**{n: getattr(self, n) for n in names}, "repair": True if self.repair is None else self.repair}


@dataclass(frozen=True, kw_only=True, slots=True)
class Permute:
    """Put inputs in an order in which N:M loses less; outputs stay. See `rarefy.permute_`."""

    pattern: str = "2:4"
    score: str = "magnitude"
    seconds: float = 30.0
    layers: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Time forward calls on an evaluation batch cut or repeated to each of these sizes."""

    batch: tuple[int, ...] = (1,)
    repeats: int = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """Time a causal language model at batch 1: a prompt of so many tokens (prefill), then so many new ones (decode).
    `text` is the beginning of a sentence that both models finish, for the receipt."""

    prompt: int = 256
    new: int = 24
    repeats: int = 5
    text: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """Measure before and after on held-out data. `max_degradation: 0.15` makes a larger relative loss a failed check;
    `accelerate: true` times the model also with layers that skip zeros (`accelerate_`). `engine: true` evaluates and
    times the result on the engine instead of eager torch: with `rarefy.decoder` for causal language models, with
    `rarefy.compile` for others, in `precision` (int8, or null for that of the model)."""

    metric: str
    data: str | None = None
    samples: int | None = None
    tokens: int = 512
    batch: int = 8
    latency: Latency | None = None
    decode: Decode | None = None
    accelerate: bool = False
    engine: bool = False
    precision: str | None = None
    max_degradation: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Save:
    """How weights are stored: `smallest` of all formats for each tensor, or one format for all that it fits; `compress`
    puts all of it through LZMA."""

    format: str = "smallest"
    compress: bool = False


# the words that fields allow, by field; and by field of one class
DTYPES = ("bf16", "fp16", "fp32")
CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": DTYPES,
    "metric": ("perplexity", "accuracy"),
    "precision": ("int8",),
    "validate": ("perplexity", "accuracy"),
    "autocast": tuple(AUTOCAST),
    "format": ("smallest", "dense", "dense+mask", "bitmask", "csr", "csc", "bsr", "nm"),
    "lr_schedule": tuple(LR_SCHEDULES),
    "schedule": tuple(SCHEDULES),
    "score": tuple(SCORES),
    "scope": patterns.SCOPES,
    "allocate": ALLOCATIONS,
    "reduce": tuple(patterns.REDUCTIONS),
}
OWN: dict[Any, dict[str, tuple[str, ...]]] = {
    Cut: {
        "units": (*KINDS, "layer"),
        "score": tuple(dict.fromkeys((*UNIT_SCORES, *LAYER_SCORES))),
        "scope": CUT_SCOPES,
        "reduce": CUT_REDUCTIONS,
        "repair": REPAIRS,
    },
    Data: {"validate": ()},
    Distill: {"by": tuple(OUTPUTS), "hidden": tuple(HIDDEN), "depth": tuple(DEPTHS)},
    Quantize: {
        "fit": tuple(FITS),
        "weights": tuple(f"int{b}" for b in BITS),
        "activations": ACTIVATIONS,
        "observer": OBSERVERS,
    },
}
AT_LEAST_ONE = frozenset(
    {
        "samples",
        "train_samples",
        "validate_samples",
        "patience",
        "tokens",
        "batch",
        "epochs",
        "steps",
        "repeats",
        "prompt",
        "new",
    }
)
FRACTIONS = frozenset({"sparsity", "first", "start", "end"})
RATES = frozenset({"lr", "momentum", "weight_decay"})
