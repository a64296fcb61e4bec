"""Cuts of real architectures: exact, trainable, saved and loaded into the class that they came from."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
import zoo
from helpers.marks import slow_case
from rarefy.dependency.graph import trace
from rarefy.dependency.symbolic_dims import unit_of_index
from rarefy.model.batches import tensors_in
from rarefy.structured.masked_reference import MaskedReference

pytest.importorskip("torchvision")
pytest.importorskip("transformers")
pytest.importorskip("timm")

CASES = zoo.torchvision_cases() | zoo.transformers_cases() | zoo.timm_cases()
KEEPS = (0.25, 0.5, 0.75)
QUICK = {  # the one share of units that `make test` keeps of these models
    "mnasnet0_5": 0.5, "shufflenet_v2_x0_5": 0.5, "squeezenet1_1": 0.5, "bert": 0.25, "roberta": 0.75, "vit": 0.5,
    "clip": 0.75, "opt": 0.5, "qwen2": 0.25, "qwen3": 0.75, "gemma": 0.5, "whisper": 0.25, "timm.mixer_s32_224": 0.5,
}  # fmt: skip
# how much smaller the cut leaves it at least, where a class lets only some of its groups go
STUBBORN = {"raft_small", "raft_large", "clip", "t5", "opt", "timm.nfnet_l0", "timm.coat_lite_tiny",
            "timm.eva02_tiny_patch14_224", "timm.res2net50_14w_8s", "timm.edgenext_xx_small",
            "timm.twins_svt_small"}  # fmt: skip


# a bias of their product over tokens comes back into every channel
MIXING = {"timm.mixer_s32_224", "timm.resmlp_12_224", "timm.gmlp_s16_224"}


def call(model: nn.Module, x: object) -> list[Tensor]:
    out = model(**x) if isinstance(x, dict) else model(x)
    return [t for t in tensors_in(out) if t.is_floating_point()]


@pytest.mark.parametrize(
    ("name", "keep"), [(n, k) if QUICK.get(n) == k else slow_case(n, k) for n in CASES for k in KEEPS]
)
def test_a_cut_is_exact_and_the_model_lives_on(name, keep, tmp_path):
    make, x = CASES[name]
    torch.manual_seed(0)
    model = make()
    masked = copy.deepcopy(model)
    before = sum(p.numel() for p in model.parameters())
    rarefy.cut_(masked, x, keep=keep, mask_only=True)
    with torch.no_grad(), MaskedReference(**_going(model, masked, x) if name in MIXING else {}):
        want = call(masked, x)
    del masked
    rarefy.cut_(model, x, keep=keep)
    after = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        got = call(model, x)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and float((a - b).abs().max()) <= 1e-4 * max(float(b.abs().max()), 1e-6)
    assert max(float(b.abs().max()) for b in want) > 1e-4  # there is something to compare
    assert after < before * (0.95 if name in STUBBORN else {0.25: 0.4, 0.5: 0.65, 0.75: 0.85}[keep])
    rarefy.save(model, tmp_path / "cut", format="dense")
    again = rarefy.load(tmp_path / "cut", model=make(), verify=False).eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(call(again, x), got, strict=True))
    del again
    _trains(model, x)


def _going(dense: nn.Module, masked: nn.Module, x: object) -> dict[str, Any]:
    """Return the arguments of `MaskedReference` for removed units, read from the weights: they are zero where they are made."""
    graph, there = trace(dense, x), dict(masked.named_parameters())
    masks = {}
    for g in (g for g in graph.groups if g.lock is None):
        left = torch.zeros(g.size, dtype=torch.bool)
        for m in (m for m in g.members if m.role == "out" and m.name in there):
            rows = there[m.name].detach().transpose(0, m.dim).reshape(there[m.name].shape[m.dim], -1).any(1)
            where = unit_of_index(graph.dims[m.name][m.dim], g.axis)
            left[where[(where >= 0) & rows]] = True
        if not left.all():
            masks[g.axis] = left
    return {"graph": graph, "masks": masks}


def _trains(model: nn.Module, x: object) -> None:
    model.train()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.Dropout):
            m.eval()  # one picture gives no statistics
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sum(t.float().square().mean() for t in call(model, x)).backward()  # type: ignore[union-attr]
    moved = [(p, p.detach().clone()) for p in model.parameters() if p.grad is not None and p.grad.any()]
    assert len(moved) > 1 and all(torch.isfinite(p.grad).all() for p, _ in moved)  # type: ignore[arg-type]
    optimizer.step()
    assert any(not torch.equal(p, before) for p, before in moved)


def test_models_tell_their_width_after_a_cut():
    import timm

    for name, width in (("vit_tiny_patch16_224", 96), ("resnet18", 256), ("convnext_atto", 160)):
        model = zoo.lively(timm.create_model(name, pretrained=False))
        rarefy.cut_(model, zoo.images(224, 1), keep=0.5)
        assert model.num_features == width
        model.reset_classifier(7)
        assert model(zoo.images(224, 1)).shape == (1, 7)


def _half(name: str, shape: torch.Size, model: str) -> int:
    """How many numbers a parameter has when every unit that is not given or returned is halved."""
    first = {"resnet50": "conv1.weight", "densenet121": "features.conv0.weight", "mobilenet_v2": "features.0.0.weight",
             "vit_b_16": "conv_proj.weight", "swin_t": "features.0.0.weight"}  # fmt: skip
    stays: set[int] = set(range(2, len(shape)))  # kernels
    if name == first.get(model):
        stays.add(1)  # red, green and blue
    if name.startswith(("fc.", "classifier.", "heads.head.", "head.", "lm_head.")):
        stays.add(0)  # classes
    if "embed_tokens" in name or "relative_position_bias_table" in name:
        stays.add(0)  # words; places
    if name in ("class_token", "encoder.pos_embedding"):
        stays = {0, 1}
    out = 1
    for d, n in enumerate(shape):
        out *= n if d in stays or n == 1 else (n + 1) // 2
    return out


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "densenet121", slow_case("vit_b_16"), "swin_t", "llama"])
def test_where_a_unit_can_go_it_goes(name):
    make, x = CASES[name]
    model = make()
    want = sum(_half(n, p.shape, name) for n, p in model.named_parameters())
    rarefy.cut_(model, x, keep=0.5)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(want, rel=0.02)


def test_every_model_is_on_the_list():
    assert len(CASES) > 140 and set(QUICK) <= set(CASES) and set(CASES) >= STUBBORN | MIXING
