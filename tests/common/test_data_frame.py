"""Tables of results as data frames: the same rows, numbers as numbers."""

import sys

import pytest
import torch
from torch import nn

import frontier_samples as samples
import rarefy
from conftest import image_batches
from rarefy.common.errors import DataError
from rarefy.common.report import Report

pytest.importorskip("pandas")


def test_rows_of_a_report():
    report = Report("timed", ({"layer": "a", "ms": 1.5, "zeros": 3}, {"layer": "b", "ms": None, "extra": True}))
    frame = report.to_pandas()
    assert list(frame.columns) == ["layer", "ms", "zeros", "extra"] and len(frame) == 2
    assert frame["ms"].sum() == 1.5 and frame.loc[1, "layer"] == "b" and frame["ms"].isna().tolist() == [False, True]
    assert Report("nothing").to_pandas().empty


def test_rows_of_a_sensitivity():
    net = nn.Sequential(nn.Flatten(), nn.Linear(243, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    report = rarefy.sensitivity(net, [x for x, _ in image_batches()][:1], sparsities=(0.5,))
    frame = report.to_pandas()
    assert (
        frame.astype(object).where(frame.notna(), None).to_dict("records") == [dict(r) for r in report.rows]
        and len(frame) >= 2
    )


def test_a_receipt_has_the_numbers_that_it_prints():
    net, data = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), [torch.randn(4, 8)]
    recipe = {"stages": [{"prune": {"sparsity": 0.5}}], "evaluate": {"metric": "similarity", "latency": {"batch": [2]}}}
    receipt = rarefy.compress_(net.eval(), recipe, {"evaluate": data})
    frame, printed = receipt.to_pandas(), {r["measured"]: r for r in receipt.rows()}
    by_name = {r["measured"]: r for r in frame.to_dict("records")}
    assert {"similarity", "bytes on disk", "bytes in memory", "FLOPs, one evaluation batch"} <= set(by_name) & set(
        printed
    )
    for name in ("bytes on disk", "bytes in memory"):
        assert f"{int(by_name[name]['after']):,}" == printed[name]["after"]
    assert f"{by_name['similarity']['after']:.4g}" == printed["similarity"]["after"]
    forward = by_name["forward, batch 2"]
    assert forward["unit"] == "ms" and printed["forward, batch 2, ms"]["after"].startswith(f"{forward['after']:,.4g}")
    layers = receipt.to_pandas(layers=True)
    assert list(layers["layer"]) == ["0", "2"] and (layers["sparsity"] == 0.5).all()
    unpruned = rarefy.compress_(net, {"stages": [{"quantize": {"weights": "int8"}}]}, {"evaluate": data})
    assert list(unpruned.to_pandas(layers=True)["layer"]) == []


def test_a_frontier_has_its_points():
    frontier = samples.realistic()
    frame = frontier.to_pandas()
    assert list(frame["model"]) == ["dense", *(p.name for p in frontier.points)]
    assert frame["best"].sum() == 1 and frame.loc[frame["best"], "model"].item() == frontier.best_point.name
    assert list(frame["loss"].dropna()) == [p.loss for p in (frontier.dense, *frontier.points) if p.loss is not None]
    assert frame["on_front"].sum() == len([p for p in frontier.front()])
    first = frontier.points[0]
    assert frame.loc[1, "batch 1, ms"] == first.milliseconds["1"]["median"]
    assert frame.loc[1, "batch 16, speedup"] == first.speedup["16"]


def test_without_pandas_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DataError, match="to_pandas needs pandas: pip install pandas"):
        Report("timed", ({"a": 1},)).to_pandas()
