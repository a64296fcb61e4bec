"""Small models of blocks and their inputs, for tests of calibration and reconstruction."""

import torch
from torch import nn


def rows(count=3, width=6, size=40):
    return [torch.randn(size, width, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def module(forward, **parts):
    """A module of these parts with this forward."""

    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    Made.forward = lambda self, x: forward(self, x)
    return Made().eval()


def lin(width=6):
    return nn.Linear(width, width)


class Decoder(nn.Module):
    """Blocks that each read one memory, as cross-attention does."""

    def __init__(self, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": lin(), "c": lin(), "o": lin()}) for _ in range(depth))
        for block in self.blocks:
            block.forward = lambda x, memory, b=block: x + b["o"](torch.relu(b["a"](x) + b["c"](memory)))

    def forward(self, x):
        memory = x * 2
        for block in self.blocks:
            x = block(x, memory)
        return x
