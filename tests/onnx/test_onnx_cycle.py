"""ONNX files cut to half, trained a step, exported and run in ONNX Runtime: the outputs are the cut model's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rarefy
import zoo
from helpers.marks import slow_case
from helpers.onnx_files import export, ocr_file, run


def check_cycle(net: nn.Module, x: Tensor, path: Path, most: float = 0.8) -> None:
    """Cut a model to half, train it and export it; compare it with ONNX Runtime."""
    count = sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        first = net(x)
    rarefy.cut_(net, (x,), keep=0.5)
    assert sum(p.numel() for p in net.parameters()) < most * count
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    net(x).square().mean().backward()
    optimizer.step()
    report = rarefy.export_onnx(net.eval(), x, path)
    with torch.no_grad():
        want = net(x)
    name = next(iter(input_names(report.path)))
    torch.testing.assert_close(run(report.path, {name: x}), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert want.shape == first.shape and not torch.allclose(want, first)
    assert path.stat().st_size < 4.2 * most * count + 1_000_000


def input_names(path: Path) -> list[str]:
    import onnx

    return [i.name for i in onnx.load(path).graph.input]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("ch_PP-OCRv4_det_infer", (1, 3, 64, 96)),
        ("ch_PP-OCRv4_rec_infer", (1, 3, 48, 96)),
        ("ch_ppocr_mobile_v2.0_cls_infer", (1, 3, 48, 192)),
    ],
)
def test_files_of_an_ocr_system(name, shape, tmp_path):
    x = torch.rand(shape)
    net = rarefy.from_onnx(ocr_file(name), example=x)
    if "det" in name:  # noise is no text: without this, all outputs would be 1e-9
        with torch.no_grad():
            [m for m in net.modules() if isinstance(m, nn.ConvTranspose2d)][-1].bias += 20
    check_cycle(net, x, tmp_path / "cut.onnx", most=0.5)


def from_torchvision(name: str) -> Callable[[], nn.Module]:
    return zoo.torchvision_cases()[name][0]


def from_timm(name: str, **options: int) -> Callable[[], nn.Module]:
    timm = pytest.importorskip("timm")
    return lambda: zoo.lively(timm.create_model(name, pretrained=False, **options))


@pytest.mark.parametrize(
    ("name", "opset"),
    [
        ("resnet18", 17), slow_case("mobilenet_v3_small", 13), slow_case("mobilenet_v3_small", "dynamo"),
        slow_case("mnasnet0_5", "dynamo"), slow_case("timm.convnext_atto", 17), slow_case("timm.vit_tiny_patch16_224", 17),
    ],
)  # fmt: skip
def test_image_models(name, opset, tmp_path):
    pytest.importorskip("torchvision")
    source, _, family = name.rpartition(".")
    sizes = {"img_size": 64} if family.startswith("vit") else {}
    make = from_timm(family, **sizes) if source else from_torchvision(family)
    torch.manual_seed(0)
    x = zoo.images(64)
    check_cycle(rarefy.from_onnx(export(make(), x, tmp_path / "net.onnx", opset), example=x), x, tmp_path / "cut.onnx")


@pytest.mark.slow
def test_a_language_model_keeps_an_open_batch(tmp_path):
    """Constants of its file are named as torch's exporter names what it computes."""
    make, inputs = zoo.transformers_cases()["llama"]

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x, use_cache=False)[0]

    x = inputs["input_ids"]
    path = tmp_path / "net.onnx"
    shapes = ({0: torch.export.Dim.AUTO},)
    options = {"dynamo": True, "dynamic_shapes": shapes, "external_data": False, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Logits().eval(), (x,), path, input_names=["x"], **options)
    report = rarefy.export_onnx(rarefy.from_onnx(path, example=x), x, tmp_path / "again.onnx")
    assert report.summary["open sizes"] == "x[0] batch"
