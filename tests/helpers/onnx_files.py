"""ONNX files that tests make, and ONNX Runtime to run them."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoo
from conftest import tiny_bert


def export(
    model: nn.Module,
    example: Any,
    path: Path,
    opset: Any = 13,
    names: tuple[str, ...] = ("x",),
    dims: tuple[str, ...] = ("batch",),
) -> Path:
    """By torch's exporter: the one of TorchScript, or the one of today."""
    example = example if isinstance(example, tuple) else (example,)
    open_ = {n: dict(enumerate(dims)) for n in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if opset == "dynamo":
            torch.onnx.export(
                model, example, path, dynamo=True, external_data=False, verbose=False, input_names=list(names)
            )
        else:
            how: dict[str, Any] = {"dynamo": False, "opset_version": opset, "input_names": list(names)}
            torch.onnx.export(model, example, path, dynamic_axes=open_, **how)
    return path


class Words(nn.Module):
    """A transformers model as a function of tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def bert(path: Path, opset: Any = 14, open_length: bool = False) -> tuple[nn.Module, Path, dict[str, Tensor]]:
    model = Words(zoo.lively(tiny_bert())).eval()
    words = {"input_ids": torch.randint(5, 60, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    words["attention_mask"][1, 4:] = 0
    dims = ("batch", "length") if open_length else ("batch",)
    return model, export(model, tuple(words.values()), path / "bert.onnx", opset, tuple(words), dims), words


def apart(got: Any, want: Tensor) -> float:
    got = torch.as_tensor(np.asarray(got)) if not isinstance(got, Tensor) else got
    assert got.shape == want.shape and got.dtype == want.dtype
    return float((got - want).abs().max() / want.abs().max())


def run(path: Path, feeds: dict[str, Tensor]) -> Tensor:
    return run_all(path, feeds)[0]


def run_all(path: Path, feeds: dict[str, Tensor]) -> list[Tensor]:
    """By ONNX Runtime, operator by operator as written."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {n: t.numpy() for n, t in feeds.items()})]


def ocr_file(name: str) -> Path:
    """One of the three trained files in the package rapidocr-onnxruntime."""
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package rapidocr-onnxruntime")
    return Path(spec.submodule_search_locations[0]) / "models" / f"{name}.onnx"
