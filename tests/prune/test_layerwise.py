"""Pruning with solvers, through `prune_` and recipes, on every layer type and the model families of transformers."""

import pytest
import torch
from torch import nn

import rarefy
from conftest import Attention, Net, image_batches, tiny_llama
from helpers.textbook import textbook_obs
from rarefy.common.errors import DataError, ModelError, PatternError, RecipeError
from rarefy.model.layers import all_layers, select_layers
from rarefy.prune import solver_config as solvers
from rarefy.prune.matrices import to_matrix
from rarefy.prune.solver_config import SOLVERS
from rarefy.recipe import parser as recipes

SETTINGS = [("unstructured", 0.5), ("2:4", None), ("2x2", 0.5), ("column", 0.5), ("row", 0.25)]


def outputs(model, data):
    with torch.no_grad():
        return torch.cat([model(b[0] if isinstance(b, tuple) else b) for b in data])


@pytest.mark.parametrize(("pattern", "sparsity"), SETTINGS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_layer_type(solver, pattern, sparsity):
    net, data = Net().eval(), image_batches(4, 16)
    ignore = ["deep"] if pattern == "2:4" else None
    if pattern == "column":
        ignore = ["deep"]  # one input a group: a column is all or nothing
    report = rarefy.prune_(net, pattern, sparsity=sparsity, solver=solver, data=data, ignore=ignore)
    for layer in select_layers(net, ignore=ignore):
        mask = layer.layout.view(rarefy.masks(net)[layer.full_name])
        assert (layer.layout.view(layer.original.detach())[~mask] == 0).all()
        if pattern == "2:4":
            groups = nn.functional.pad(mask.float(), (0, -mask.shape[3] % 4)).unflatten(3, (-1, 4)).sum(-1)
            assert (groups <= 2).all()
    if pattern == "unstructured":
        assert report.summary["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert all(0 <= r["error"] < 1.0001 and r["seconds"] > 0 for r in report.rows)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "make",
    [
        Net,
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
        ),
    ],
)
def test_outputs_stay_closer_than_with_the_mask_alone(solver, make):
    torch.manual_seed(1)
    net = make().eval()
    data = (
        image_batches(6, 16)
        if isinstance(net, Net)
        else [torch.randn(8, 9, 4) @ torch.randn(4, 16) + 0.1 * torch.randn(8, 9, 16) for _ in range(6)]
    )
    state, want, errors = {k: v.clone() for k, v in net.state_dict().items()}, outputs(net, data), {}
    for how in ({"score": "magnitude"}, {"solver": solver, "data": data}):
        fresh = make().eval()
        fresh.load_state_dict(state)
        rarefy.prune_(fresh, sparsity=0.5, **how)
        errors["solver" in how] = float((outputs(fresh, data) - want).square().mean())
    assert errors[True] < 0.8 * errors[False]


def test_obs_of_one_layer_is_the_textbooks():
    net, data = nn.Sequential(nn.Linear(12, 6)), [torch.randn(50, 12)]
    W = net[0].weight.detach().clone().double()
    rarefy.prune_(net, sparsity=0.5, solver=rarefy.Solver(name="obs", block=4), data=data, layers="0")
    X = data[0].double().T
    H = X @ X.T
    H += 0.01 * H.diagonal().mean() * torch.eye(12)
    want = textbook_obs(W, H, rarefy.masks(net)["0"])
    torch.testing.assert_close(net[0].weight.detach().double(), want, rtol=1e-3, atol=1e-4)


def test_a_score_gives_the_mask_and_the_solver_the_weights():
    net, data = (
        nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4)),
        [(torch.randn(50, 12), torch.arange(50) % 4)],
    )
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for score, scope in (
        ("magnitude", "layer"),
        ("wanda", None),
        ("magnitude", "global"),
        ("ria", None),
        ("taylor", "global"),
    ):
        for solver in SOLVERS:
            one, two = (nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(2))
            one.load_state_dict(state)
            two.load_state_dict(state)
            rarefy.prune_(one, score=score, sparsity=0.5, scope=scope, solver=solver, data=data)
            rarefy.prune_(two, score=score, sparsity=0.5, scope=scope, data=data)
            assert torch.equal(rarefy.masks(one)["0"], rarefy.masks(two)["0"])  # the first layer's inputs are the same
            assert not torch.equal(one[0].weight, two[0].weight)


def test_zeros_stay_and_more_come():
    data = [torch.randn(64, 16)]
    for solver in SOLVERS:
        net = nn.Sequential(nn.Linear(16, 8))
        rarefy.prune_(net, "2:4", layers="0")
        first = rarefy.masks(net)["0"]
        rarefy.prune_(net, sparsity=0.75, solver=solver, data=data, layers="0")
        now = rarefy.masks(net)["0"]
        assert (now <= first).all() and now.float().mean() == 0.25


def test_asymmetric_targets_follow_the_dense_model():
    torch.manual_seed(3)
    make = lambda: nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(16, 16), nn.ReLU())]).eval()  # noqa: E731
    net, data = make(), [torch.randn(256, 16) for _ in range(4)]
    state, want, errors = net.state_dict(), outputs(net, data), []
    for a in (0.0, 0.5):
        fresh = make()
        fresh.load_state_dict(state)
        rarefy.prune_(fresh, sparsity=0.6, solver=rarefy.Solver(name="obs", asymmetric=a), data=data, layers="Linear")
        errors.append(float((outputs(fresh, data) - want).square().mean()))
    assert errors[1] < errors[0]


def test_half_precision_passes_and_weights():
    net = tiny_llama(torch.bfloat16)
    data = [{"input_ids": torch.randint(0, 64, (4, 16))} for _ in range(2)]
    report = rarefy.prune_(net, "2:4", solver=rarefy.Solver(name="admm", bf16=True), data=data)
    assert report.summary["sparsity"] == 0.5 and net.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"solver": "obss"}, PatternError, r"unknown solver 'obss'; choose from admm, obs, refit \(did you mean 'obs'"),
        ({"solver": "obs", "data": None}, DataError, "solver obs needs the inputs of each layer: give data=batches"),
        (
            {"solver": "obs", "data": []},
            DataError,
            "the calibration data is empty: solver obs needs at least one batch",
        ),
        (
            {"solver": rarefy.Solver(name="obs", steps=3)},
            PatternError,
            "solver obs has no steps; it has damping, .*block",
        ),
        (
            {"solver": {"name": "admm", "asymmetric": 2}},
            PatternError,
            "solver.asymmetric: expected a number between 0 and 1, got 2",
        ),
        ({"solver": "obs", "scope": "global"}, PatternError, "block by block: scope 'global' has no effect without a"),
        ({"solver": "obs", "layers": "*"}, PatternError, "cannot solve an embedding: ignore embed"),
    ],
)
def test_errors(settings, kind, message):
    net = nn.Sequential()
    net.embed, net.body = nn.Embedding(9, 8), nn.Linear(8, 8)
    before = net.body.weight.detach().clone()
    with pytest.raises(kind, match=message):
        rarefy.prune_(net, **{"sparsity": 0.5, "data": [torch.randint(0, 9, (2, 3))], **settings})
    assert torch.equal(net.body.weight, before) and not rarefy.masks(net)


def test_nan_in_inputs_is_named():
    with pytest.raises(ModelError, match="0: NaN or inf in its inputs on calibration batch 1"):
        rarefy.prune_(nn.Sequential(nn.Linear(2, 2)), sparsity=0.5, solver="obs", layers="0",
                      data=[torch.ones(1, 2), torch.full((1, 2), torch.inf)])  # fmt: skip


def test_recipes():
    short = recipes.load({"stages": [{"prune": {"sparsity": 0.5, "solver": "obs"}}]})
    assert short.stages[0].solver == "obs"
    long = recipes.from_yaml("stages:\n  - prune: {sparsity: 0.5, solver: {name: admm, steps: 12}}\n")
    assert long.stages[0].solver == rarefy.Solver(name="admm", steps=12)
    assert recipes.load(long.to_dict()) == long
    for text, message in [
        ("{sparsity: 0.5, solver: obbs}", r"r line 2: .*unknown solver 'obbs'"),
        ("{sparsity: 0.5, solver: {name: refit, block: 4}}", r"r line 2: .*solver refit has no block"),
        ("{sparsity: 0.5, solver: {name: obs, blck: 4}}", r"unknown field 'blck'.*did you mean 'block'"),
        ("{sparsity: 0.5, solver: 3}", "solver: expected a string or keys and values, got 3"),
    ]:
        with pytest.raises(RecipeError, match=message):
            recipes.from_yaml(f"stages:\n  - prune: {text}\n", "r")
    net = tiny_llama()
    data = [{"input_ids": torch.randint(0, 64, (4, 16))}]
    receipt = rarefy.compress_(net, long, data)
    assert all("error" in r for r in receipt.sparsity["layers"]) and receipt.sparsity["achieved"] == pytest.approx(0.5)


def test_cross_attention_and_other_keys():
    net = Attention(kdim=6, vdim=4)
    data = [(torch.randn(3, 5, 8),)]

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = net.attn

        def forward(self, q):
            kv = q.flip(1)
            return self.attn(q, kv[..., :6], kv[..., :4])[0]

    report = rarefy.prune_(Cross().eval(), sparsity=0.5, solver="admm", data=data)
    assert {r["layer"] for r in report.rows} == {
        "attn.q_proj_weight",
        "attn.k_proj_weight",
        "attn.v_proj_weight",
        "attn.out_proj",
    }


def test_matrix_of_each_layout_keeps_every_weight_once():
    for layer in all_layers(Net()):
        W = to_matrix(layer, layer.original.detach())
        assert torch.equal(W.flatten().sort().values, layer.original.detach().flatten().sort().values)


def test_passes_in_bf16_only_where_the_cpu_multiplies_it(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(solvers, "native_bf16", lambda native=native: native)
        with solvers.passes(rarefy.Solver(name="refit", bf16=True)):
            got = nn.Linear(4, 4)(torch.randn(2, 4)).dtype
        assert got == (torch.bfloat16 if native else torch.float32)
