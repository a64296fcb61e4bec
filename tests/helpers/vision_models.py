"""Small vision models with every kind of connection."""

import torch
import torch.nn.functional as F
from torch import nn


class Everything(nn.Module):
    """Forks, joins, residuals, groups, depthwise, concatenation, a view that spreads channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.joined = nn.Conv2d(24, 16, 1)
        self.group_norm = nn.GroupNorm(4, 16)
        self.flat, self.fc = nn.Linear(16 * 4, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.relu(self.deep(self.one(x)))
        y = torch.cat([self.grouped(x), self.two(x)], 1)
        x = x + self.group_norm(self.joined(F.relu(y)))
        return self.fc(F.relu(self.flat(F.adaptive_avg_pool2d(x, 2).flatten(1))))


def spread_(model):
    """Columns of very different sizes, so that an order matters."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[1] > 3:
                module.weight.mul_(
                    torch.linspace(1, -1, module.weight.shape[1]).exp().reshape(1, -1, *[1] * (module.weight.dim() - 2))
                )
    return model.eval()


class Small(nn.Module):
    """A convolution, a norm, two linear layers and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16, 64)
        self.more = nn.Linear(64, 32)
        self.out = nn.Linear(32, 5)

    def features(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.more(self.hidden(x).relu()).relu()

    def forward(self, x):
        return self.out(self.features(x))


def data(n=3):
    rng = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 3, 8, 8, generator=rng), torch.randint(0, 5, (16,), generator=rng)) for _ in range(n)]
