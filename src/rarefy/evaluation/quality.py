"""The number that says how good a model is: a built-in metric, a function of the user, or one that fits the outputs.

perplexity                 of language models, lower is better
accuracy                   fraction of (inputs, class) samples
retrieval, retrieval@K     R@1, R@K in percent: queries that find their text, on pairs (queries, texts)
ndcg@K                     nDCG@K in percent, on the same pairs
similarity                 mean cosine with the dense model's embeddings or outputs
agreement                  percentage of samples or tokens with the same largest output as the dense model
distance                   mean squared relative distance from the dense model's outputs, lower is better
kl                         mean KL divergence from the dense model's output distribution, lower is better
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError, first_line, unknown
from rarefy.evaluation.agreement import COMPARISONS, agreement
from rarefy.evaluation.metrics import BETTER, METRICS, accuracies
from rarefy.evaluation.outputs import named_output, output_tensor, token_mask
from rarefy.evaluation.retrieval import retrieval
from rarefy.model import hf
from rarefy.model.embedding_modules import head_of_model
from rarefy.model.forward import Model, call, check_batches, evaluating, on_device, without_targets

RANKED = {"retrieval": ("R", 1), "ndcg": ("nDCG", 10)}  # what the number is called, and its k where none is given
BEST_IS_ZERO = ("distance", "kl")  # a fraction of the dense model's number, which is 0, means nothing
LOWER_IS_BETTER = {"distance", "kl", *(name for name, best in BETTER.items() if best is min)}
RECIPE_METRICS = (*METRICS, "retrieval", "similarity", "agreement")  # those whose relative change means something
METRIC_NAMES = (*METRICS, *RANKED, "retrieval@10", "ndcg@10", *COMPARISONS)


@dataclass(frozen=True)
class Metric:
    """How good a model is, as a number.

    Args:
        name: what the number is.
        higher_is_better: whether a higher number is better.
        measure: function of a model as it is deployed: a module, or what `rarefy.compile` returned.
        scale: "%" where the number is a percentage.

    Example:
        >>> metric = Metric("zeros", True, lambda model: float((model.weight == 0).sum()))
        >>> metric.measure(nn.Linear(4, 4))
        0.0
    """

    name: str
    higher_is_better: bool
    measure: Callable[[Any], float]
    scale: str = ""


def metric_of(
    evaluate: str | Callable[[Any], float] | Metric | None,
    dense: nn.Module,
    data: Iterable[Any] | None,
    *,
    higher_is_better: bool = True,
    progress: bool = False,
) -> Metric:
    """Return the metric that a name, a function or nothing stands for; its result is always a finite number.

    Args:
        evaluate: a name of `METRIC_NAMES`; a `Metric`; a function that returns a number of a model, called with the
            model in evaluation mode and without gradients. None chooses "perplexity" for language models, "agreement"
            for classifiers of samples or tokens, "similarity" for other models.
        dense: the model before compression. "similarity", "agreement", "distance" and "kl" compare with its outputs,
            which are computed once, at the first measurement: measure the dense model before it changes.
        data: batches to evaluate; for "retrieval" and "ndcg" pairs (queries, texts) of batches. Functions need none.
        higher_is_better: of a function.
        progress: show a progress bar for each measurement.

    Raises:
        DataError: for an unknown name, higher_is_better where the metric says it, or data that are missing or no
            batches. `measure` raises DataError for data
            that the metric cannot read, and ModelError for a function that raises or returns no finite number.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 4))
        >>> metric = metric_of(None, net, [torch.randn(16, 8)])
        >>> metric.name, metric.measure(net), metric.scale
        ('agreement', 100.0, '%')
    """
    if isinstance(evaluate, Metric):
        if not higher_is_better:
            raise DataError("higher_is_better has no effect on a Metric, which has its own: leave it out")
        checked = isinstance(evaluate.measure, _Checked)
        return evaluate if checked else replace(evaluate, measure=_Checked(evaluate.measure, evaluate.name, dense))
    if evaluate is not None and not isinstance(evaluate, str):
        if not callable(evaluate):
            raise DataError(
                f"evaluate: expected a metric's name, a function of a model or None, got {type(evaluate).__name__}"
            )
        name = getattr(evaluate, "__name__", type(evaluate).__name__)
        name = "the metric" if name == "<lambda>" else f"{name}()" if name in BEST_IS_ZERO else name
        return Metric(name, higher_is_better, _Checked(evaluate, name, dense))
    if data is None:
        raise DataError("evaluate: this metric needs batches of data, got none: pass data, or a function of a model")
    check_batches(data)
    if hasattr(data, "__next__"):
        data = list(data)
    name = evaluate if evaluate is not None else default_metric(dense, data)
    metric = _built_in(name, dense, data, progress)
    if not higher_is_better and metric.higher_is_better:
        raise DataError(f"higher_is_better=False is for functions; a higher {metric.name} is always better")
    return metric


def _built_in(name: str, dense: nn.Module, data: Iterable[Any], progress: bool) -> Metric:
    """Return the metric of a name, such as "retrieval@10"."""
    ranked = re.fullmatch(r"(retrieval|ndcg)(?:@([1-9]\d{0,5}))?", name)
    if name in METRICS:
        function = accuracies if name == "accuracy" else METRICS[name]
        measure: Callable[[Any], Any] = partial(function, data=data, progress=progress)
        title, scale = name, ""
    elif name in COMPARISONS:
        measure = agreement(name, dense, data, progress=progress)
        title, scale = name, "%" if name == "agreement" else ""
    elif ranked:
        label, k = RANKED[ranked[1]]
        k = int(ranked[2] or k)
        measure = partial(retrieval, data=data, measure=ranked[1], k=k, head=head_of_model(dense), progress=progress)
        title, scale = f"retrieval {label}@{k}", "%"
    else:
        raise DataError(unknown("metric", name, METRIC_NAMES))
    return Metric(title, name not in LOWER_IS_BETTER, _Checked(measure, title, dense), scale)


@torch.no_grad()
def default_metric(dense: nn.Module, data: Iterable[Any]) -> str:
    """Return the metric that fits the dense model's outputs for the first batch, and needs no labels beside the inputs.

    Raises:
        DataError: if there is no batch, or the model cannot be called with it.
    """
    batch = next(iter(data), None)
    if batch is None:
        raise DataError("no samples to evaluate: give at least one batch")
    inputs = on_device(dense, without_targets(batch))
    with evaluating(dense):
        output = call(dense, inputs)
    tensor, logits = output_tensor(output), named_output(output, "logits")
    if hf.is_causal_lm(dense):
        reads_text = hasattr(inputs, "keys") and "input_ids" in inputs and inputs["input_ids"].shape[-1] > 1
        return "perplexity" if reads_text else "agreement"
    if logits is not None and token_mask(inputs, logits) is not None:
        return "agreement"
    unnamed = logits is not None or isinstance(output, Tensor | tuple | list)
    classes = unnamed and tensor.dim() == 2 and tensor.shape[1] > 1
    return "agreement" if classes and not _are_embeddings(tensor) else "similarity"


def _are_embeddings(output: Tensor) -> bool:
    """Return whether all rows have length 1, as normalized embeddings do and logits do not."""
    return bool(((output.float().norm(dim=-1) - 1).abs() < 1e-3).all())


@dataclass(frozen=True)
class _Checked:
    """A function of a model in evaluation mode, whose errors name the model and whose result is a finite number."""

    measure: Callable[[Any], Any]
    name: str
    dense: nn.Module

    def __call__(self, model: Model) -> float:
        return next(iter(self.numbers(model).values()))

    def numbers(self, model: Model) -> dict[str, float]:
        """Return the metric's number, and after it those that were measured beside it, by name."""
        which = "the dense model" if model is self.dense else f"the model ({type(model).__name__})"
        try:
            with torch.no_grad(), evaluating(model):
                value = self.measure(model)
        except Exception as error:
            kind = DataError if isinstance(error, DataError) else ModelError
            raised = "" if isinstance(error, DataError | ModelError) else f"{type(error).__name__}: "
            raise kind(f"{self.name} failed on {which}: {raised}{first_line(error, 500)}") from error
        values = value if isinstance(value, dict) and self.name in value else {self.name: value}
        return {name: finite_number(v, f"{name} of {which}") for name, v in values.items()}


def measured(metric: Metric, model: Any) -> dict[str, float]:
    """Return a metric's number for a model, and after it those that were measured in the same pass, by name.

    Example:
        >>> images = [(torch.eye(8), torch.arange(8))]
        >>> measured(metric_of("accuracy", nn.Identity(), images), nn.Identity())
        {'accuracy': 1.0, 'top-5 accuracy': 1.0}
    """
    checked = isinstance(metric.measure, _Checked)
    return metric.measure.numbers(model) if checked else {metric.name: metric.measure(model)}


def finite_number(value: Any, what: str) -> float:
    """Return a number, numpy scalar or tensor without dimensions as a float.

    Raises:
        ModelError: for anything else, for NaN and for infinity.

    Example:
        >>> finite_number(torch.tensor(0.5), "accuracy")
        0.5
    """
    number = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(number, bool) or not isinstance(number, Real):
        got = f"{value!r:.60} ({type(value).__name__})"
        raise ModelError(f"{what}: expected a finite number, got {got}")
    try:
        finite = math.isfinite(number)
    except OverflowError:
        finite = False
    if not finite:
        raise ModelError(f"{what}: expected a finite number, got {number if isinstance(number, float) else 'too much'}")
    return float(number)
