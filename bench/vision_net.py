"""The vision test bed: a small residual network for Fashion-MNIST that trains in minutes on two cores.

It has what a pruner meets in real networks: BatchNorm, identity and projection shortcuts, a depthwise-
separable block, and a classifier behind a global pool. On shared cores give each process one thread: two
threads that wait for each other at every operation can be many times slower there.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DATA = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530  # of the training pixels, scaled to 0..1

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def conv_bn(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size (up to the stride), and its BatchNorm."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(cout)]


class Block(nn.Module):
    """relu(body(x) + shortcut(x)); the body is two 3x3 convolutions, or a depthwise-separable pair."""

    def __init__(self, cin: int, cout: int, stride: int = 1, separable: bool = False):
        super().__init__()
        if separable:  # stride 1 only: oneDNN's strided depthwise backward in bf16 is 30 times slower
            body = [*conv_bn(cin, cin, 3, groups=cin), nn.ReLU(), *conv_bn(cin, cout, 1)]
        else:
            body = [*conv_bn(cin, cout, 3, stride), nn.ReLU(), *conv_bn(cout, cout, 3)]
        self.body = nn.Sequential(*body)
        same = stride == 1 and cin == cout
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(cin, cout, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Stem to 14x14, residual blocks at 14x14, 7x7 and 4x4, average pool, linear; channels times `width`."""

    def __init__(self, classes: int = 10, width: int = 1):
        super().__init__()
        a, b, c = 32 * width, 64 * width, 96 * width
        self.stem = nn.Sequential(*conv_bn(1, a, 5, 2), nn.ReLU())
        self.blocks = nn.Sequential(
            Block(a, a, separable=True),
            Block(a, b, stride=2),
            Block(b, b, separable=True),
            Block(b, c, stride=2),
        )
        self.fc = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        # not AdaptiveAvgPool2d(1): the backward of its mean leaves channels_last, which costs 3 % of a step
        size = [int(s) for s in x.shape[-2:]]  # int: fixed in ONNX files
        return self.fc(F.avg_pool2d(x, size).flatten(1))


def load(folder: Path = DATA) -> Data:
    """x_train [60000, 1, 28, 28], y_train, x_test [10000, 1, 28, 28], y_test; pixels normalised."""

    def read(name: str, header: int) -> np.ndarray:
        path = folder / f"{name}-ubyte.gz"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: apt-get update && apt-get install -y dataset-fashion-mnist")
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)[header:]

    def images(name: str) -> Tensor:
        pixels = torch.from_numpy(read(f"{name}-images-idx3", 16).astype(np.float32))
        return pixels.view(-1, 1, 28, 28).div_(255).sub_(MEAN).div_(STD)

    def labels(name: str) -> Tensor:
        return torch.from_numpy(read(f"{name}-labels-idx1", 8).astype(np.int64))

    return images("train"), labels("train"), images("t10k"), labels("t10k")


def augment(x: Tensor, rng: torch.Generator, shift: int = 0) -> Tensor:
    """Mirrors a random half of the batch and moves each image by up to `shift` pixels each way."""
    n, _, height, width = x.shape
    padded = F.pad(x, [shift] * 4, mode="replicate")[:, 0]
    rows = torch.randint(2 * shift + 1, (n, 1), generator=rng) + torch.arange(height)
    cols = torch.randint(2 * shift + 1, (n, 1), generator=rng) + torch.arange(width)
    flip = torch.rand(n, 1, generator=rng) < 0.5
    cols = torch.where(flip, cols.flip(1), cols)
    # one gather does all three: image i takes its own rows and columns
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], cols[:, None, :]][:, None]


def train(
    model: nn.Module,
    data: Data,
    epochs: int,
    seed: int = 0,
    lr: float = 0.2,
    batch: int = 256,
    warmup: float = 0.2,
    weight_decay: float = 5e-4,
    smoothing: float = 0.0,
    shift: int = 0,
    after_step: Callable[[float], None] | None = None,
) -> nn.Module:
    """One cycle of SGD: the rate rises to `lr` over the share `warmup` of the steps, then falls to zero.

    `after_step(progress)` is called after each optimizer step with progress in (0, 1]: the place for masks.
    """
    x, y = data[:2]
    rng = torch.Generator().manual_seed(seed)
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay, foreach=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=warmup, cycle_momentum=False, anneal_strategy="cos"
    )
    # channels_last with bf16 is the fastest of the four combinations (torch's stubs do not know the keyword)
    model.train().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=rng)
        for pick in order[: len(x) // batch * batch].split(batch):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(augment(x[pick], rng, shift))
            F.cross_entropy(logits.float(), y[pick], label_smoothing=smoothing).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if after_step is not None:
                after_step(step / steps)
    return model.eval().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> float:
    """The share of images classified correctly, in fp32."""
    model.eval()
    hits = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(batch), y.split(batch)))
    return hits / len(y)
