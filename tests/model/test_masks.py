import copy
import os
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.utils import prune as torch_prune

import rarefy
from conftest import Net, Tied, image_batches
from helpers.marks import slow_case
from rarefy.common.errors import ModelError
from rarefy.model.layers import all_layers, original, select_layers
from rarefy.model.masks import folded_state, get_mask, masks, set_mask_

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


def pruned() -> Net:
    model = Net()
    rarefy.prune_(model, sparsity=0.5)
    return model


def zeros_hold(model: nn.Module, kept: dict[str, torch.Tensor]) -> bool:
    return all(bool((l.weight[~kept[l.full_name]] == 0).all()) for l in all_layers(model) if l.full_name in kept)


def train(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_survive_optimizers(name):
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, image_batches())  # momentum from before the masks must not leak either
    rarefy.prune_(model, sparsity=0.5)
    kept = masks(model)
    before = model.hidden.weight.detach().clone()
    train(model, optimizer, image_batches())
    assert len(kept) == 4 and zeros_hold(model, kept)
    assert not torch.equal(before, model.hidden.weight)  # the same parameters are still being trained


def test_the_parameter_keeps_its_identity():
    model = Net()
    parameter = model.hidden.weight
    rarefy.prune_(model, sparsity=0.5)
    assert original(model.hidden, "weight") is parameter
    rarefy.fold_(model)
    assert model.hidden.weight is parameter


def test_deepcopy_and_state_dict_round_trip():
    model = pruned()
    twin = copy.deepcopy(model)
    other = pruned()
    rarefy.prune_(other, score="random", sparsity=0.6)
    other.load_state_dict(model.state_dict())
    for l, a, b in zip(all_layers(model), all_layers(twin), all_layers(other)):
        assert torch.equal(l.weight, a.weight) and torch.equal(l.weight, b.weight)
    assert all(torch.equal(m, masks(other)[n]) for n, m in masks(model).items())
    twin.hidden.parametrizations.weight.original.data.fill_(1)
    assert not torch.equal(twin.hidden.weight, model.hidden.weight)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", slow_case("inductor")])
def test_masks_under_compile(backend):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    rarefy.prune_(model, sparsity=0.5)
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))


def _ddp_worker(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Net()
    rarefy.prune_(model, sparsity=0.5)
    kept = masks(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    train(parallel, OPTIMIZERS["sgd"](parallel.parameters()), image_batches()[rank : rank + 2])
    ok = zeros_hold(model, kept)
    torch.save({"ok": ok, "weight": model.hidden.weight.detach()}, f"{out}/{rank}.pt")
    dist.barrier()
    # gloo's threads may still hold Python objects: the interpreter's end would stop them in the middle (SIGABRT)
    os._exit(0)


@pytest.mark.slow
def test_masks_under_ddp(tmp_path):
    mp.spawn(_ddp_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert first["ok"] and second["ok"]
    assert torch.equal(first["weight"], second["weight"])


def test_tied_weights_share_one_mask():
    model = Tied()
    rarefy.prune_(model, sparsity=0.5, layers="lm_head")
    assert torch.equal(model.lm_head.weight, model.embed.weight)
    rarefy.fold_(model)
    assert model.lm_head.weight is model.embed.weight
    assert int((model.embed.weight == 0).sum()) == 80


def test_nan_and_minus_zero_beneath_a_mask_do_not_leak():
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[float("nan"), -0.0], [float("inf"), 1.0]])
    set_mask_(all_layers(layer)[0], torch.tensor([[False, False], [False, True]]))
    assert torch.equal(layer.weight.view(torch.int32), torch.tensor([[0.0, 0.0], [0.0, 1.0]]).view(torch.int32))


def test_a_mask_of_another_shape_or_type_is_refused():
    layer = all_layers(nn.Linear(2, 2))[0]
    with pytest.raises(ModelError, match=r"expected a bool mask of shape \(2, 2\), got torch.bool of \(2, 3\)"):
        set_mask_(layer, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ModelError, match="got torch.float32"):
        set_mask_(layer, torch.ones(2, 2))


def test_adopt_torch_prune():
    model = Net()
    torch_prune.l1_unstructured(model.hidden, "weight", 0.5)
    torch_prune.random_structured(model.conv, "weight", 0.25, dim=0)
    torch_prune.l1_unstructured(model.hidden, "bias", 0.25)
    want = {n: model.get_submodule(n).weight.detach().clone() for n in ("hidden", "conv")}
    assert rarefy.adopt_(model) == ["conv", "hidden", "hidden.bias"]
    for name, weight in want.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
        assert not any("forward_pre" in k for k in model.get_submodule(name)._forward_pre_hooks)
    assert int((model.hidden.bias == 0).sum()) == 4
    train(model, OPTIMIZERS["sgd"](model.parameters()), image_batches())
    assert all(bool((model.get_submodule(n).weight[w == 0] == 0).all()) for n, w in want.items())


def test_adopt_plain_zeros_and_only_those():
    model = Net()
    model.hidden.weight.data[::2] = 0
    assert rarefy.adopt_(model) == ["hidden"]
    assert rarefy.adopt_(model) == ["hidden"]  # what is masked stays so
    with pytest.raises(ModelError, match="nothing to adopt"):
        rarefy.adopt_(Net())


def test_fold_refuses_a_chain_it_does_not_know():
    layer = nn.Linear(4, 4)
    rarefy.prune_(layer, sparsity=0.5)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(ModelError, match="other parametrizations besides the mask"):
        rarefy.fold_(layer)


def test_parameters_come_back_in_their_order():
    """A state of an optimizer goes by the order of parameters."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MultiheadAttention(4, 2))
    before = [n for n, _ in net.named_parameters()]
    rarefy.prune_(net, sparsity=0.5)
    rarefy.quantize_(net, "int8", layers=["0"])
    rarefy.fold_(copy.deepcopy(net))
    assert [n for n, _ in rarefy.fold_(net).named_parameters()] == before
    assert not any("rarefy_order" in vars(m) for m in net.modules())


def test_plain_state_is_the_folded_state():
    model = pruned()
    plain = dict(folded_state(model))
    folded = rarefy.fold_(copy.deepcopy(model)).state_dict()
    assert sorted(plain) == sorted(folded)
    assert all(torch.equal(plain[k], folded[k]) for k in folded)


def test_a_single_layer_has_an_empty_name():
    layer = nn.Linear(4, 4)
    rarefy.prune_(layer, sparsity=0.5)
    assert list(masks(layer)) == [""] and get_mask(select_layers(layer)[0]) is not None
    assert list(dict(folded_state(layer))) == ["weight", "bias"] or set(dict(folded_state(layer))) == {"weight", "bias"}


class Shared(nn.Module):
    """A weight that is also a plain parameter of the model."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8, bias=False)
        self.w = self.lin.weight


def test_a_weight_that_lives_elsewhere_too_is_refused():
    with pytest.raises(ModelError, match="lin: its weight is also the parameter 'w'"):
        rarefy.prune_(Shared(), sparsity=0.5)


@pytest.mark.parametrize("which", [0, 1])
def test_adopting_torch_prune_on_a_tied_weight(which):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    torch_prune.l1_unstructured(model[which], "weight", 0.5)
    assert rarefy.adopt_(model) == ["0"]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight, model[1].weight) and int((model[1].weight == 0).sum()) == 32
    rarefy.fold_(model)
    assert model[0].weight is model[1].weight


def test_adopt_takes_only_the_layers_it_is_told():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in model:
        torch_prune.l1_unstructured(layer, "weight", 0.5)
    assert rarefy.adopt_(model, layers="0") == ["0"]
    assert torch_prune.is_pruned(model[1]) and list(masks(model)) == ["0"]


def test_a_foreign_parametrization_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.spectral_norm(model[1])
    with pytest.raises(ModelError, match="1: its weight already has another parametrization"):
        rarefy.prune_(model, sparsity=0.5, layers="1")


def test_weight_norm_is_no_weight_to_prune():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert [l.name for l in all_layers(model)] == ["1"]


def test_a_lazy_layer_is_named():
    with pytest.raises(ModelError, match="0 is lazy and has no weight yet|0: a lazy layer"):
        rarefy.prune_(nn.Sequential(nn.LazyLinear(4)), sparsity=0.5)


def test_masks_are_a_snapshot():
    model = nn.Linear(8, 8)
    rarefy.prune_(model, sparsity=0.5)
    before = rarefy.masks(model)[""]
    rarefy.prune_(model, sparsity=0.75)
    assert int((~before).sum()) == 32


def test_folding_a_copy_leaves_the_other_as_it_is():
    net = nn.Sequential(nn.Linear(4, 4))
    rarefy.prune_(net, sparsity=0.5)
    other = copy.deepcopy(net)
    rarefy.fold_(other)
    assert torch.equal(net[0].weight, other[0].weight) and list(rarefy.masks(net)) == ["0"]
    assert type(other[0]) is nn.Linear and rarefy.masks(other) == {}
    rarefy.fold_(net)
    assert type(net[0]) is nn.Linear and torch.equal(net[0].weight, other[0].weight)
