"""How much a model still says what the dense model says: cosine, the same largest output, KL divergence, distance.

No labels are needed. The dense model's outputs are computed once and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.common.errors import DataError
from rarefy.evaluation.outputs import class_rows, outputs, value_rows, vectors
from rarefy.model.embedding_modules import Head, head_of_model
from rarefy.model.forward import Model

MAX_CLASSES = 1024  # of which KL divergence keeps each probability; those of a vocabulary would not fit the memory


@dataclass(frozen=True)
class Comparison:
    """One way to compare rows of outputs with those of the dense model.

    Args:
        rows: (output, batch, head) -> tensors of rows, one after the other.
        keep: rows of the dense model -> what is kept of them.
        compare: (what is kept, rows) -> a value for each row; their mean is the result.
        same: the result for the dense model itself.
    """

    rows: Callable[[Tensor, Any, Head | None], Iterable[Tensor]]
    keep: Callable[[Tensor], tuple[Tensor, ...]]
    compare: Callable[[tuple[Tensor, ...], Tensor], Tensor]
    same: float


@dataclass
class AgreementWith:
    """A metric relative to a dense model, whose outputs are computed at the first call and kept.

    Args:
        dense: the dense model, unchanged until the first call.
        data: batches of inputs; targets are ignored.
        comparison: how rows are compared.
        name: label of the progress bar.
        progress: whether to draw it.
    """

    dense: nn.Module
    data: list[Any]
    comparison: Comparison
    name: str
    progress: bool = False
    references: list[tuple[Tensor, ...]] | None = field(default=None, repr=False)

    @torch.no_grad()
    def __call__(self, model: Model) -> float:
        """Return the mean over all rows; ModelError or DataError for outputs that cannot be compared."""
        if self.references is None:
            self.references = [self.comparison.keep(rows) for rows in self._rows(self.dense)]
            if model is self.dense:
                return self.comparison.same
        total, count = 0.0, 0
        for reference, rows in zip(self.references, self._rows(model)):
            if len(reference[0]) != len(rows):
                raise DataError(f"the dense model has {len(reference[0])} rows of outputs, this one {len(rows)}")
            values = self.comparison.compare(reference, rows)
            total += float(values.double().sum())
            count += len(values)
        if not count:
            raise DataError(f"no samples to evaluate: {self.name} needs at least one batch")
        return total / count

    def _rows(self, model: Model) -> Iterator[Tensor]:
        head = head_of_model(self.dense)
        for batch, output in outputs(model, self.data, self.name, self.progress):
            yield from self.comparison.rows(output, batch, head)


def _check_width(expected: int, rows: Tensor) -> None:
    if rows.shape[-1] != expected:
        raise DataError(f"the dense model has {expected} outputs for each row, this one has {rows.shape[-1]}")


def _cosine(reference: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    _check_width(reference[0].shape[-1], rows)
    return (reference[0] * rows).sum(-1)


def _same_class(reference: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    return 100.0 * (reference[0] == rows.argmax(-1))


def _distance(reference: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    """Return ||dense - model||^2 / ||dense||^2 of each row."""
    _check_width(reference[0].shape[-1], rows)
    size = reference[0].square().sum(-1).clamp_min(torch.finfo(rows.dtype).tiny)
    return (reference[0] - rows).square().sum(-1) / size


def keep_probabilities(rows: Tensor, max_classes: int = MAX_CLASSES) -> tuple[Tensor, ...]:
    """Return the log probabilities of the most probable classes, and which ones; of all if they are few enough.

    Args:
        rows: logits [rows, classes].
        max_classes: how many are kept of each row.

    Returns:
        Log probabilities [rows, kept], and the int32 classes [rows, kept] unless all are kept.
    """
    log_p = F.log_softmax(rows, -1)
    if rows.shape[-1] <= max_classes:
        return (log_p,)
    top = log_p.topk(max_classes, -1)
    return top.values, top.indices.int()


def kl_divergence(reference: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    """Return KL(dense || model) of each row in nats.

    Args:
        reference: of the dense model's logits, from `keep_probabilities`. Where they are not of all classes, the other
            classes count as one, by which the divergence is a little smaller.
        rows: logits of the model [rows, classes].
    """
    log_p, log_q = reference[0], F.log_softmax(rows, -1)
    if len(reference) == 1:
        _check_width(log_p.shape[-1], rows)
    else:
        log_q = log_q.gather(-1, reference[1].long())
        log_p, log_q = (torch.cat([log, _rest(log)], -1) for log in (log_p, log_q))
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def _rest(log_p: Tensor) -> Tensor:
    """Return the log probability of all other classes [rows, 1]."""
    tiny = torch.finfo(log_p.dtype).tiny
    return (1 - log_p.double().exp().sum(-1, keepdim=True)).clamp_min(tiny).log().to(log_p.dtype)


def _without_head(rows: Callable[[Tensor, Any], Iterable[Tensor]]) -> Callable[..., Iterable[Tensor]]:
    return lambda output, batch, head: rows(output, batch)


COMPARISONS = {
    "similarity": Comparison(
        lambda output, batch, head: [vectors(output, batch, head)], lambda rows: (rows,), _cosine, 1.0
    ),
    "agreement": Comparison(_without_head(class_rows), lambda rows: (rows.argmax(-1),), _same_class, 100.0),
    "distance": Comparison(_without_head(value_rows), lambda rows: (rows,), _distance, 0.0),
    "kl": Comparison(_without_head(class_rows), keep_probabilities, kl_divergence, 0.0),
}


def agreement(name: str, dense: nn.Module, data: Iterable[Any], *, progress: bool = False) -> Callable[[Model], float]:
    """Return a function of a model: how much its outputs agree with those of `dense` on `data`.

    Args:
        name: "similarity", mean cosine of embeddings or outputs; "agreement", percentage of samples or tokens with the
            same largest output; "distance", mean squared relative distance of the outputs of a sample or token, whose
            memory is that of all outputs; "kl", mean KL divergence of the softmax of the outputs in nats.
        dense: the model to compare with; it must not change before the first call.
        data: batches of inputs.
        progress: show a progress bar.
    """
    return AgreementWith(dense, list(data), COMPARISONS[name], name, progress)
