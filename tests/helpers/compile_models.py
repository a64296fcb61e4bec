"""Models that use what the compiler fuses: attention, gates, norms, residuals, convolutions."""

import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from rarefy.compiler.packed_program import PackedProgram
from rarefy.compiler.step_structs import NAMES
from rarefy.compiler.subgraph import FusedSubgraph

CONVOLUTIONS = [  # inputs, outputs, kernel, stride, padding, dilation
    (64, 64, 3, 1, 1, 1),
    (3, 70, 7, 2, 3, 1),
    (20, 33, 1, 1, 0, 1),
    (33, 16, 1, 2, 0, 1),
    (24, 40, 3, 2, 1, 1),
    (17, 130, (1, 5), 1, (0, 2), 1),
    (12, 8, 3, 1, 2, 2),
    (8, 5, (3, 2), (2, 1), (0, 1), (1, 2)),
    (160, 64, 3, 1, 0, 1),
]


def pruned(model, sparsity=0.8, seed=0):
    """Weights of all Linear layers, most of them zero."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.weight.data *= torch.rand(m.weight.shape, generator=g) >= sparsity
    return model.eval()


class Attends(nn.Module):
    """q, k and v of one tensor, attention as models write it, and a product after it."""

    def __init__(self, heads=4, kv_heads=4, width=8, causal=False, scale=None):
        super().__init__()
        self.heads, self.kv_heads, self.width, self.causal, self.scale = heads, kv_heads, width, causal, scale
        C = heads * width
        self.q, self.k, self.v, self.o = (nn.Linear(C, n) for n in (C, kv_heads * width, kv_heads * width, C))

    def forward(self, x, mask=None):
        B, S, _ = x.shape
        q, k, v = (
            f(x).view(B, S, n, self.width).transpose(1, 2)
            for f, n in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal, scale=self.scale, enable_gqa=self.heads != self.kv_heads
        )
        return self.o(y.transpose(1, 2).reshape(B, S, -1)) + x


class Gated(nn.Module):
    """A block as language models have them: RMSNorm, a gate, a residual; and LayerNorm at its end."""

    def __init__(self, C=24, H=50):
        super().__init__()
        self.before, self.after = nn.RMSNorm(C, eps=1e-6), nn.LayerNorm(C)
        self.gate, self.up, self.down = nn.Linear(C, H, bias=False), nn.Linear(C, H), nn.Linear(H, C)

    def forward(self, x):
        h = self.before(x)
        return self.after(x + self.down(F.silu(self.gate(h)) * self.up(h)))


class Residual(nn.Module):
    """Convolutions as ResNets have them."""

    def __init__(self, groups=1, affine=True, inplace=True):
        super().__init__()
        self.a = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False, groups=groups)
        self.b, self.c = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(8, 16, 1, stride=2, bias=False)
        self.na, self.nb, self.nc = (nn.BatchNorm2d(16, affine=affine) for _ in range(3))
        self.act, self.head = nn.ReLU(inplace=inplace), nn.Linear(16, 5)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.data *= torch.rand(m.weight.shape) < 0.3
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)

    def forward(self, x):
        y = self.nb(self.b(self.act(self.na(self.a(x)))))
        return self.head(self.act(y + self.nc(self.c(x))).mean((2, 3)))


def far(want, got):
    return float((want - got).norm() / want.norm())


def equal(net, *x, most=1e-5):
    made = rarefy.compile(net.eval(), x)
    with torch.no_grad():
        assert far(net(*x), made(*x)) < most
    return made


def packed_programs(made):
    """Return the programs for real tokens that a compiled model keeps."""
    subgraphs = [s for s in made.schedule if isinstance(s, FusedSubgraph)]
    return [p for s in subgraphs for free in s.programs.values() for p in free if isinstance(p, PackedProgram)]


def steps(made):
    """The names of the steps of all programs."""
    calls = [c for c in made.schedule if isinstance(c, FusedSubgraph)]
    return [NAMES[s.op] for c in calls for kept in c.programs.values() for p in kept for s, _, _ in p.steps]
