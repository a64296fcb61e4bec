"""ONNX files cut to half, trained a step, exported and run in ONNX Runtime: the outputs are the cut model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rarefy
import zoo
from helpers.onnx_files import export, ocr_file, run


def check_cycle(net: nn.Module, x: Tensor, path: Path) -> None:
    """Cut a model, train it and export it; compare it with ONNX Runtime."""
    count = sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        first = net(x)
    rarefy.cut_(net, (x,), keep=0.5)
    assert sum(p.numel() for p in net.parameters()) < 0.75 * count
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    net(x).square().mean().backward()
    optimizer.step()
    report = rarefy.export_onnx(net.eval(), x, path)
    with torch.no_grad():
        want = net(x)
    name = next(iter(input_names(report.path)))
    torch.testing.assert_close(run(report.path, {name: x}), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert want.shape == first.shape and not torch.allclose(want, first)
    assert path.stat().st_size < 4.2 * 0.75 * count + 1_000_000


def input_names(path: Path) -> list[str]:
    import onnx

    return [i.name for i in onnx.load(path).graph.input]


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "shape"),
    [("ch_PP-OCRv4_det_infer", (1, 3, 64, 96)), ("ch_PP-OCRv4_rec_infer", (1, 3, 48, 96)), ("ch_ppocr_mobile_v2.0_cls_infer", (1, 3, 48, 192))],
)  # fmt: skip
def test_files_of_an_ocr_system(name, shape, tmp_path):
    x = torch.rand(shape)
    check_cycle(rarefy.from_onnx(ocr_file(name), example=x), x, tmp_path / "cut.onnx")


def from_torchvision(name: str) -> Callable[[], nn.Module]:
    return zoo.torchvision_cases()[name][0]


def from_timm(name: str, **options: int) -> Callable[[], nn.Module]:
    timm = pytest.importorskip("timm")
    return lambda: zoo.lively(timm.create_model(name, pretrained=False, **options))


@pytest.mark.parametrize("opset", [17, "dynamo"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "mnasnet0_5", "timm.convnext_atto", "timm.vit_tiny_patch16_224"])  # fmt: skip
def test_image_models(name, opset, tmp_path):
    pytest.importorskip("torchvision")
    source, _, family = name.rpartition(".")
    sizes = {"img_size": 64} if family.startswith("vit") else {}
    make = from_timm(family, **sizes) if source else from_torchvision(family)
    torch.manual_seed(0)
    x = zoo.images(64)
    check_cycle(rarefy.from_onnx(export(make(), x, tmp_path / "net.onnx", opset), example=x), x, tmp_path / "cut.onnx")
