"""Models whose units are removed or reordered in tests."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import tiny_llama


class Attends(nn.Module):
    """Tied embedding, torch's attention, a gated pair out of one layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.both, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(32, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        a, b = self.both(self.norm(x)).chunk(2, -1)
        return self.head(x + self.down(F.silu(a) * b))


class Net(nn.Module):
    """What graphs of other tools stumble over, in one small network."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=4)
        self.shared = nn.Conv2d(12, 12, 1)
        self.up = nn.ConvTranspose2d(24, 6, 2, stride=2)
        self.shuffle = nn.Conv2d(6, 16, 1)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.head = nn.Linear(4 * 9, 5)
        for p in self.shared.parameters():
            p.requires_grad_(False)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.silu(self.deep(x))
        x = self.grouped(x)
        x = self.shared(self.shared(x)) * 0.5 + x  # used twice
        a, b = x.chunk(2, 1)
        x = torch.cat([b, a, x], 1)
        x = F.pixel_shuffle(self.shuffle(self.up(x)), 2) * self.scale
        return {"y": self.head(F.adaptive_avg_pool2d(x, 3).flatten(1))}


class Attention(nn.Module):
    """Queries, keys and values in one matrix, as timm has them; a tied head."""

    def __init__(self, tied=True):
        super().__init__()
        self.num_heads, self.embed = 4, nn.Embedding(11, 16)
        self.position = nn.Parameter(torch.randn(1, 6, 16) * 0.1)
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.gate = nn.Linear(16, 64, bias=False)
        self.down = nn.Linear(32, 16)
        self.out = nn.Linear(16, 11, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.position
        B, N = ids.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, -1))
        a, b = self.gate(x).chunk(2, -1)
        return self.out(x + self.down(F.gelu(a) * b))


def vision(name, **how):
    models = pytest.importorskip("torchvision.models")
    model = getattr(models, name)(weights=None, **how)
    for p in model.parameters():  # heads and scales that start at zero would prove nothing
        if p.detach().abs().max() < 1e-3:
            nn.init.normal_(p, std=0.05)
    return model


def language(name, head="ForCausalLM", **more):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = getattr(transformers, name + head)(getattr(transformers, name + "Config")(**sizes | more))
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * 0.05
    return model


IMAGE, IDS = torch.randn(2, 3, 64, 64), {"input_ids": torch.randint(5, 99, (2, 10))}


GROUPED = {"num_key_value_heads": 2}


CASES = {
    "net": (Net, torch.randn(2, 3, 8, 8)),
    "attention": (Attention, torch.randint(0, 11, (2, 6))),
    "attention, untied": (lambda: Attention(False), torch.randint(0, 11, (2, 6))),
    "llama": (tiny_llama, {"input_ids": torch.randint(5, 60, (2, 10))}),
    "qwen3": (lambda: language("Qwen3", **GROUPED, head_dim=12), IDS),
    "gemma": (lambda: language("Gemma", **GROUPED, head_dim=12), IDS),
    "bert": (lambda: language("Bert", "ForSequenceClassification"), IDS),
    "gpt2": (lambda: language("GPT2", "LMHeadModel"), IDS),
    "resnet18": (lambda: vision("resnet18"), IMAGE),
    "mobilenet_v3_small": (lambda: vision("mobilenet_v3_small"), IMAGE),
    "shufflenet_v2_x0_5": (lambda: vision("shufflenet_v2_x0_5"), IMAGE),
    "regnet_y_400mf": (lambda: vision("regnet_y_400mf"), IMAGE),
    "squeezenet1_1": (lambda: vision("squeezenet1_1"), IMAGE),
    "swin_t": (lambda: vision("swin_t"), IMAGE),
}


def outputs(model, x):
    y = model(**x) if isinstance(x, dict) else model(x)
    y = y if isinstance(y, torch.Tensor) else y[next(iter(y))]
    return y
