"""Receipts in MLflow: what was measured as metrics of a run, and the receipt as a file."""

from __future__ import annotations

import re
from typing import Any

from rarefy.common.errors import ModelError
from rarefy.evaluation.receipt import Receipt
from rarefy.train.loggers import mlflow_errors

OTHER = re.compile(r"[^\w\-. :/]+")  # characters that MLflow's names do not have


def log_receipt(receipt: Receipt) -> None:
    """Log a receipt to the active run of MLflow, or to a new one.

    Numbers become metrics such as "bytes on disk/before" and "bytes on disk/after", the receipt the artifacts
    receipt.json and receipt.txt. Where they go is set in MLflow itself: `mlflow.set_tracking_uri`.

    Raises:
        ModelError: this is no receipt, or MLflow is not installed or cannot store it.

    Example:
        >>> import rarefy
        >>> from torch import nn
        >>> receipt = rarefy.compress_(nn.Linear(8, 8), {"stages": [{"prune": {"sparsity": 0.5}}]})
        >>> sorted(metrics_of(receipt))[:2]
        ['bytes in memory/after', 'bytes in memory/before']
    """
    if not isinstance(receipt, Receipt):
        raise ModelError(f"expected a receipt, as rarefy.compress_ returns, got {type(receipt).__name__}")
    try:
        import mlflow  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ModelError("log_receipt needs MLflow: pip install mlflow") from None
    own = mlflow.active_run() is None  # MLflow starts one where there is none
    try:
        with mlflow_errors():
            mlflow.log_metrics(metrics_of(receipt))
            mlflow.set_tag("rarefy.recipe", receipt.name)
            for name, data in receipt.files().items():
                mlflow.log_text(data.decode(), name)
    finally:
        if own:
            mlflow.end_run()


def metrics_of(receipt: Receipt) -> dict[str, float]:
    """Return the numbers of a receipt by names that MLflow takes."""
    values: dict[str, Any] = {}
    for row in receipt.numbers():
        name = OTHER.sub("", row["measured"]) + (f" {row['unit']}" if row["unit"] in ("ms", "tokens/s") else "")
        values |= {f"{name}/{side}": row[side] for side in ("before", "after")}
    return {name: float(value) for name, value in values.items() if value is not None}
