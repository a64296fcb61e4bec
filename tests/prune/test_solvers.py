"""Solvers against slow, obviously right versions: one row and one column at a time, exact least squares, finite sums."""

import pytest
import torch
from torch import nn

import rarefy
from helpers.textbook import textbook_obs
from rarefy.calibration.gram import Gram
from rarefy.common.errors import DataError, ModelError, PatternError
from rarefy.model.sparsity_pattern import masks_at_sparsity, parse_pattern
from rarefy.prune import layerwise, solvers
from rarefy.prune.solver_config import SOLVERS, resolve


def problem(G=1, O=6, C=12, tokens=400, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(G, C, C, generator=rng, dtype=dtype) / C**0.5 + torch.eye(C, dtype=dtype)
    X = mix @ torch.randn(G, C, tokens, generator=rng, dtype=dtype)
    return torch.randn(G, O, C, generator=rng, dtype=dtype), X, X @ X.transpose(1, 2) / tokens


def chooser(pattern, sparsity):
    plan = parse_pattern(pattern)
    sparsity = plan.fixed_sparsity or sparsity
    return lambda score, a, b: masks_at_sparsity([score[:, None]], plan, sparsity, "layer")[0][:, 0]


def exact_fit(target, H, mask):
    """Least squares on the kept entries, a row at a time, from the normal equations."""
    out = torch.zeros_like(target)
    for g in range(target.shape[0]):
        for i in range(target.shape[1]):
            k = mask[g, i].nonzero()[:, 0]
            if len(k):
                out[g, i, k] = torch.linalg.lstsq(H[g][k][:, k], (H[g] @ target[g, i])[k][:, None]).solution[:, 0]
    return out


def test_error_is_that_of_the_outputs():
    W, X, H = problem(G=2)
    V = W + torch.randn_like(W)
    torch.testing.assert_close(solvers.squared_errors(V, W, H) * X.shape[-1], ((V - W) @ X).square().sum(-1))


@pytest.mark.parametrize("C", [1, 7, 40])
def test_factor_is_that_of_the_inverse(C):
    _, _, H = problem(G=3, C=C)
    U, used = solvers.inverse_factor(H, 0.01)
    assert used == 0.01
    torch.testing.assert_close(U, U.triu())
    want = torch.linalg.inv(H + 0.01 * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(C))
    torch.testing.assert_close(U.transpose(1, 2) @ U, want)


def test_damping_climbs_and_is_reported():
    H = torch.tensor([[[1.0, 1.02], [1.02, 1.0]]], dtype=torch.float64)
    U, used = solvers.inverse_factor(H, 0.001)
    assert used == pytest.approx(0.1)
    torch.testing.assert_close(U.transpose(1, 2) @ U, torch.linalg.inv(solvers.damped(H, 0.1)))


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_no_silent_identity(bad):
    with pytest.raises(ArithmeticError, match="not positive definite even with damping 10"):
        solvers.inverse_factor(torch.full((1, 2, 2), bad), 0.01)


def test_inputs_that_were_always_zero_do_no_harm():
    W, X, _ = problem()
    X[:, 3] = 0
    H = X @ X.transpose(1, 2)
    U, _ = solvers.inverse_factor(H, 0.01)
    new, mask = solvers.obs(W, U, chooser("unstructured", 0.5), range(0, 13, 4))
    assert torch.isfinite(new).all()
    assert (new[mask] != 0).all()


@pytest.mark.parametrize("edges", [[0, 12], [0, 4, 8, 12], list(range(13)), [0, 5, 12]])
def test_obs_is_the_textbooks(edges):
    W, _, H = problem(G=2)
    mask = torch.rand(W.shape) > 0.5
    U, _ = solvers.inverse_factor(H, 0.01)
    new, same = solvers.obs(W, U, lambda _, a, b: mask[..., a:b], edges)
    assert torch.equal(same, mask)
    for g in range(2):
        torch.testing.assert_close(new[g], textbook_obs(W[g], solvers.damped(H, 0.01)[g], mask[g]))


def test_obs_chooses_by_the_error_it_will_make():
    """One column at a time: its least w^2 / [H^-1]_jj, weights moved by those before it."""
    W, _, H = problem(O=8, C=6)
    U, _ = solvers.inverse_factor(H, 0.01)
    _, mask = solvers.obs(W, U, chooser("unstructured", 0.5), range(7))
    Hd, moved = solvers.damped(H, 0.01)[0], W[0].clone()
    for j in range(6):
        inverse = torch.linalg.inv(Hd[j:, j:])
        loss = moved[:, j].square() / inverse[0, 0]
        gone = loss <= loss.sort().values[3]
        assert torch.equal(mask[0, :, j], ~gone)
        moved[:, j:] -= torch.where(gone, moved[:, j] / inverse[0, 0], 0)[:, None] * inverse[:, 0]


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_obs_at_the_ends(sparsity):
    W, _, H = problem()
    U, _ = solvers.inverse_factor(H, 0.01)
    new, _ = solvers.obs(W, U, chooser("unstructured", sparsity), [0, 6, 12])
    torch.testing.assert_close(new, W * (1 - sparsity))


@pytest.mark.parametrize("kind", ["random", "magnitude", "2:4", "3:5", "2x3", "column"])
def test_refit_comes_within_one_percent_of_least_squares_and_never_above_its_start(kind):
    W, _, H = problem(G=2, O=16, C=48)
    if kind == "random":
        mask = torch.rand(W.shape) > 0.6
    else:
        mask = chooser(kind if kind != "magnitude" else "unstructured", None if ":" in kind else 0.6)(W.abs(), 0, 48)
    best = solvers.squared_errors(exact_fit(W, H, mask), W, H).sum()
    starts = [W, torch.randn_like(W), exact_fit(W, H, mask)]
    for start in starts:
        new = solvers.refit(start, W, H, mask, steps=20)
        assert (new[~mask] == 0).all()
        assert (solvers.squared_errors(new, W, H) <= solvers.squared_errors(torch.where(mask, start, 0), W, H)).all()
        assert solvers.squared_errors(new, W, H).sum() <= 1.01 * best
    errors = [float(solvers.squared_errors(solvers.refit(W, W, H, mask, n), W, H).sum()) for n in range(12)]
    assert errors == sorted(errors, reverse=True)


def test_refit_survives_rows_without_weights_and_inputs_without_energy():
    W, _, H = problem()
    H[:, 3] = H[:, :, 3] = 0
    mask = torch.ones_like(W, dtype=torch.bool)
    mask[:, 0] = False
    new = solvers.refit(W, W, H, mask)
    assert torch.isfinite(new).all() and (new[:, 0] == 0).all()


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.7), ("2:4", 0.5), ("3:5", 0.4), ("2x2", 0.5)])
def test_admm_finds_better_masks_than_obs_and_magnitude(pattern, sparsity):
    W, _, H = problem(O=32, C=40, tokens=2000)
    Hd, choose = solvers.damped(H, 0.01), chooser(pattern, None if ":" in pattern else sparsity)
    new, mask = solvers.admm(W, Hd, choose)
    assert (new[~mask] == 0).all()
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        assert (mask.reshape(-1, m).sum(1) == n).all()
    else:
        assert mask.float().mean().item() == pytest.approx(1 - sparsity, abs=1e-3)
    U, _ = solvers.inverse_factor(H, 0.01)
    greedy = choose(W.square() / U.diagonal(dim1=1, dim2=2)[:, None].square(), 0, 40)
    rivals = [solvers.refit(W, W, Hd, m, 60) for m in (greedy, choose(W.abs(), 0, 40))]
    assert all(solvers.squared_errors(new, W, Hd).sum() < solvers.squared_errors(r, W, Hd).sum() for r in rivals)


def test_admm_of_a_given_mask_is_least_squares():
    W, _, H = problem(G=2)
    mask = torch.rand(W.shape) > 0.5
    new, same = solvers.admm(W, H, lambda _, a, b: mask[..., a:b], refits=20)
    assert torch.equal(mask, same)
    torch.testing.assert_close(new, exact_fit(W, H, mask), rtol=1e-3, atol=1e-3)


def test_shifted_target_is_the_asymmetric_problem():
    """|| V X' - W X ||^2 and || (V - shifted) X' ||^2 differ by a constant."""
    W, X, _ = problem(O=4)
    Y = X + 0.3 * torch.randn_like(X)
    H = Y @ Y.transpose(1, 2)
    target = W + solvers.target_shift(W, (X - Y) @ Y.transpose(1, 2), torch.linalg.cholesky(H))
    gaps = []
    for seed in range(3):
        V = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed), dtype=W.dtype)
        gaps.append((V @ Y - W @ X).square().sum() - solvers.squared_errors(V, target, H).sum())
    torch.testing.assert_close(gaps[0], gaps[1])
    torch.testing.assert_close(gaps[0], gaps[2])


def test_the_best_amount_of_a_shift_is_the_best_of_all():
    W, X, _ = problem(O=4)
    Y = X + 0.3 * torch.randn_like(X)
    move = torch.randn_like(W)
    best = float(solvers.best_shift_amount(W, move, Y @ Y.transpose(1, 2), (X - Y) @ Y.transpose(1, 2)))
    errors = {a: float(((W + a * move) @ Y - W @ X).square().sum()) for a in (best - 0.01, best, best + 0.01)}
    assert min(errors, key=lambda a: errors[a]) == best


@pytest.mark.parametrize(("agrees", "moves"), [(1.0, True), (-0.9, False)])
def test_a_shift_that_held_out_tokens_do_not_support_is_not_made(agrees, moves):
    W, X, H = problem(O=4, dtype=torch.float32)
    Y = X + 0.3 * torch.randn_like(X)
    one = (X - Y) @ Y.transpose(1, 2) / X.shape[-1]
    gram = Gram(H, (one + agrees * one) / 2, 800, Gram(H, agrees * one, 400))
    how = resolve(rarefy.Solver(name="obs", asymmetric=1.0))
    moved = layerwise.target_of(W, H, gram, how) - W
    assert (float(moved.abs().max()) > 0.01) == moves


def rows(count=3, width=6, size=40):
    return [torch.randn(size, width, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def lin(width=6):
    return nn.Linear(width, width)


@pytest.mark.parametrize("way", ["parametrization", "parameter"])
def test_parametrized_and_tied_weights_are_refused_first(way):
    net = nn.Sequential(lin(), lin())
    if way == "parameter":
        net.also = net[1].weight
    else:
        nn.utils.parametrizations.spectral_norm(net[1])
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ModelError, match="another parametrization|also the parameter"):
        rarefy.prune_(net, sparsity=0.5, solver="obs", data=rows())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


@pytest.mark.parametrize("solver", SOLVERS)
def test_wide_transposed_convolutions(solver):
    net, data = nn.Sequential(nn.ConvTranspose2d(160, 4, 3)), [torch.randn(2, 160, 5, 5) for _ in range(2)]
    assert rarefy.prune_(net, sparsity=0.5, solver=solver, data=data).summary["sparsity"] == 0.5


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_damping(solver):
    data = [torch.randn(4, 6) * torch.tensor([1.0, 1, 1, 1, 1, 0]) for _ in range(1)]
    report = rarefy.prune_(
        nn.Sequential(lin()), sparsity=0.5, solver=rarefy.Solver(name=solver, damping=0.0), data=data
    )
    assert all(0 <= r["error"] < 1.0001 for r in report.rows)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ({"allocate": "errors", "data": []}, DataError, "calibration data is empty: allocation 'errors'"),
        ({"solver": {"name": "obs", "blok": 3}}, PatternError, "unknown field 'blok'.*did you mean 'block'"),
        ({"solver": {"damping": 3}}, PatternError, "solver: name is required"),
        ({"solver": "SparseGPT"}, PatternError, "unknown solver 'SparseGPT' .did you mean 'obs'"),
        (
            {"solver": {"name": "obs", "damping": "0.1"}},
            PatternError,
            "damping: expected a number between 0 and 10, got '0.1'",
        ),
        (
            {"solver": {"name": "obs", "block": 1.5}},
            PatternError,
            "block: expected a whole number from 1 to 1048576, got 1.5",
        ),
        (
            {"solver": {"name": "obs", "reconstruct": True}},
            PatternError,
            "reconstruct: expected a whole number between 0 and 1,000, got True",
        ),
        ({"solver": {"name": "obs", "bf16": "no"}}, PatternError, "bf16: expected true or false, got 'no'"),
        (
            {"solver": {"name": "obs", "reconstruct": 1, "lr": 0}},
            PatternError,
            "lr: expected a number above 0 and at most 1, got 0",
        ),
    ],
)
def test_messages_for_wrong_solvers(how, kind, message):
    with pytest.raises(kind, match=message):
        rarefy.prune_(nn.Sequential(lin()), sparsity=0.5, **{"data": rows(), **how})


def test_solver_as_a_dict_and_data_as_an_iterator():
    from tqdm import tqdm

    net = nn.Sequential(lin())
    rarefy.prune_(net, sparsity=0.5, solver={"name": "obs", "block": 2}, data=tqdm(iter(rows()), total=3, disable=True))
    assert rarefy.masks(net)
