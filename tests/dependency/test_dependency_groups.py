"""Groups of coupled slices of real models."""

import pytest
import torch
from torch import nn

import rarefy
from helpers.structured_models import Attention, Net
from rarefy.dependency.graph import trace


def by_name(graph):
    return {g.name: g for g in graph.groups}


def test_groups_of_a_network():
    graph = trace(Net().eval(), torch.randn(2, 3, 8, 8))
    groups = by_name(graph)
    assert not graph.unknown
    stem = groups["stem.weight:0"]
    assert stem.kind == "channel" and stem.lock is None and not stem.notes
    names = {(m.name, m.dim, m.role) for m in stem.members}
    assert {("stem.weight", 0, "out"), ("norm.weight", 0, "out"), ("norm.running_var", 0, "out")} <= names
    assert ("deep.weight", 0, "out") in names and ("deep.weight", 1, "out") not in names
    assert groups["head.weight:0"].lock == "the model returns it"
    assert groups["stem.weight:1"].lock == "the model is given it"
    assert all(not n.startswith(("stem.weight:2", "stem.weight:3")) for n in groups)  # kernels are no units


def test_groups_of_attention():
    graph = trace(Attention().eval(), torch.randint(0, 11, (2, 6)))
    kinds = {(g.kind, g.size): g for g in graph.groups if g.lock is None}
    assert set(kinds) == {("neuron", 16), ("head", 4), ("neuron", 32)}
    assert "mean and variance over it in norm" in kinds["neuron", 16].notes
    assert {m.role for m in kinds["neuron", 16].members if m.name == "embed.weight"} == {
        "out"
    }  # though the head reads it
    assert {(m.name, m.dim) for m in kinds["neuron", 32].members} == {("gate.weight", 0), ("down.weight", 1)}
    locked = {g.lock for g in graph.groups if g.lock}
    assert (
        "attention divides by the root of its size in the model itself" in locked and "its rows are looked up" in locked
    )


def test_unsupported_operators_lock_their_groups():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6)

        def forward(self, x):
            return torch.linalg.matrix_exp(self.b(self.a(x))).sum()

    model = Odd()
    graph = trace(model, torch.randn(6, 4))
    assert [op for op, _ in graph.unknown] == ["aten.linalg_matrix_exp"]
    assert by_name(graph)["b.weight:0"].lock == "no rule for aten.linalg_matrix_exp in the model itself"
    report = rarefy.cut_(model, torch.randn(6, 4))
    assert (
        model.a.out_features == 3 and model.b.out_features == 6 and "no rule for aten.linalg_matrix_exp" in str(report)
    )


@pytest.mark.parametrize("name", ["flash", "flash_for_cpu", "cudnn", "efficient", "fused_overrideable"])
def test_each_kernel_of_attention_has_the_same_groups(name):
    """torch picks one of them by device and data type; their shapes are known without the device."""
    words = {"flash_for_cpu": "flash_attention_for_cpu", "fused_overrideable": "fused_attention_overrideable"}
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{words.get(name, f'{name}_attention')}").default
    more = (None, False) if name in ("cudnn", "efficient") else ()  # bias, whether sums of the exponents are wanted

    class Heads(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
            self.attention = attention

        def forward(self, x):
            q, k, v = (m(x).unflatten(-1, (4, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
            return self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))

    def groups(attention, device):
        graph = trace(Heads(attention).to(device), torch.randn(2, 6, 32, device=device))
        return [(g.kind, g.name, g.size) for g in graph.groups]

    named = groups(lambda q, k, v: operator(q, k, v, *more)[0], "meta")
    assert named == groups(nn.functional.scaled_dot_product_attention, "cpu")
    assert ("head", "q.weight:0", 4) in named
