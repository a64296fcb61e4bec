"""Retrieval on pairs of texts: how often a query's embedding is nearest to that of the text that answers it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import DataError, ModelError
from rarefy.evaluation.outputs import outputs, vectors
from rarefy.model.embedding_modules import Head
from rarefy.model.forward import Model, check_batches, describe_batch


@torch.no_grad()
def embed(model: Model, batches: Iterable[Any], *, head: Head | None = None, progress: bool = False) -> Tensor:
    """Return a normalized embedding of each sample: the mean of its hidden states without padding.

    Args:
        model: a module, or any callable that takes the batches; a 2-D output is taken as it is.
        batches: dicts of token ids and attention mask, or other inputs of the model.
        head: what makes embeddings of hidden states [batch, tokens, width] and mask, in place of the mean.
        progress: show a progress bar.

    Returns:
        [samples, width], rows of length 1.

    Raises:
        DataError: if there are no batches.
    """
    parts = [vectors(output, batch, head) for batch, output in outputs(model, batches, "embedding", progress)]
    if not parts:
        raise DataError("no samples to embed")
    embeddings = torch.cat(parts)
    if not bool(embeddings.isfinite().all()):
        raise ModelError("the embeddings contain inf or NaN")
    return embeddings


def ranks(queries: Tensor, texts: Tensor) -> Tensor:
    """Return the rank, from 1, of the text in each query's row among all texts by cosine; ties in order of rows.

    Args:
        queries: normalized embeddings [pairs, width].
        texts: normalized embeddings [pairs, width]; row i answers query i.

    Example:
        >>> ranks(torch.eye(2), torch.tensor([[0.0, -1.0], [0.6, 0.8]]))
        tensor([2, 1])
    """
    scores = queries @ texts.T
    own = scores.diagonal()[:, None]
    rows = torch.arange(len(scores), device=scores.device)
    tied_before = (scores == own) & (rows[None] < rows[:, None])
    return 1 + ((scores > own) | tied_before).sum(1)


def recall(queries: Tensor, texts: Tensor, k: int = 1) -> float:
    """Return the percentage of queries whose text is among the k nearest (R@k).

    Example:
        >>> recall(torch.eye(2), torch.tensor([[0.0, -1.0], [0.6, 0.8]]))
        50.0
    """
    return 100 * float((ranks(queries, texts) <= k).double().mean())


def ndcg(queries: Tensor, texts: Tensor, k: int = 10) -> float:
    """Return the mean normalized discounted cumulative gain of one relevant text among the k nearest, in percent.

    A text of rank r gains 1 / log2(r + 1), none beyond k (Järvelin and Kekäläinen 2002, binary relevance).
    """
    rank = ranks(queries, texts).double()
    return 100 * float(torch.where(rank <= k, 1 / torch.log2(rank + 1), 0.0).mean())


MEASURES = {"retrieval": recall, "ndcg": ndcg}


def retrieval(
    model: Model,
    data: Iterable[Any],
    *,
    measure: str = "retrieval",
    k: int = 1,
    head: Head | None = None,
    progress: bool = False,
) -> float:
    """Return how well a model's embeddings find the text that answers a query, in percent.

    Args:
        model: a module or any callable, as `embed` takes.
        data: pairs (queries, texts) of batches; row i of one answers row i of the other.
        measure: "retrieval" for R@k, "ndcg" for nDCG@k.
        k: how many nearest texts count.
        head: as for `embed`.
        progress: show a progress bar.

    Raises:
        DataError: for data that are no pairs, pairs of different lengths, or too few of them.
    """
    check_batches(data)
    pairs = list(data)
    for pair in pairs:
        _check_pair(pair)
    if not pairs:
        raise DataError("no pairs to evaluate: give at least one pair (queries, texts) of batches")
    queries, texts = (embed(model, [pair[side] for pair in pairs], head=head, progress=progress) for side in (0, 1))
    if len(queries) != len(texts):
        raise DataError(f"retrieval needs a text for each query, got {len(queries)} queries and {len(texts)} texts")
    if len(queries) < 2 or k >= len(queries):
        required = max(2, k + 1)
        raise DataError(f"{measure}@{k} needs at least {required} pairs, better 1,000, got {len(queries)}")
    return MEASURES[measure](queries, texts, k)


def _check_pair(pair: Any) -> None:
    """Raise DataError unless a batch of data has two batches of inputs."""
    inputs = [
        side for side in pair if hasattr(side, "keys") or (isinstance(side, Tensor) and side.dim() > 1)
    ] if isinstance(pair, tuple | list) else []  # fmt: skip
    if len(inputs) != 2 or len(pair) != 2:
        raise DataError(
            f"retrieval needs pairs (queries, texts) of batches, got {describe_batch(pair)}: "
            "rarefy.data.text_pairs makes them of texts"
        )
