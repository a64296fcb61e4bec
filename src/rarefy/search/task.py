"""What is searched: the model, its data, how good a model is, the limits and the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rarefy.evaluation.quality import Metric
from rarefy.model.layers import Selector
from rarefy.recipe.schema import Data
from rarefy.search.recovery import Recovery
from rarefy.search.targets import Targets


@dataclass(frozen=True)
class Task:
    """What is searched.

    Attributes:
        dense: the model, in evaluation mode.
        example: what it can be called with.
        data: calibration batches; may be empty.
        metric: what is measured of each model.
        targets: the limits.
        batches: batch sizes that are timed.
        seconds: how long the search may take.
        layers: selectors of layers that may change.
        ignore: selectors of layers that stay.
        recovery: training that comes after the search; None: nothing is trained.
        data_options: where recipes read the calibration data from; None where it was given as batches.
        seed: of all random choices.
        progress: whether to say what is measured.
        other_engines: whether the dense model is measured in ONNX Runtime and OpenVINO too.
        check: the metric on data held back, by which the best models are measured once more; None without such data.
        num_samples: how many samples are evaluated, those held back included; 0 where a function reads its own data.
        only_precisions: whether there is no data: the example alone cannot tell how good a smaller model is.
    """

    dense: nn.Module
    example: Any
    data: Sequence[Any]
    metric: Metric
    targets: Targets
    batches: tuple[int, ...]
    seconds: float
    layers: Selector = None
    ignore: Selector = None
    recovery: Recovery | None = None
    data_options: Data | None = None
    seed: int = 0
    progress: bool = False
    other_engines: bool = False
    check: Metric | None = None
    num_samples: int = 0
    only_precisions: bool = False
