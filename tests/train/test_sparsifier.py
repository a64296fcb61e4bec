"""Sparsity methods against slow references, and properties of masks during training."""

import copy

import pytest
import torch
from torch import nn

import rarefy
from conftest import Net, image_batches
from rarefy.common.errors import DataError, ModelError, PatternError
from rarefy.model.layers import all_layers
from rarefy.train import fisher
from rarefy.train.sparsifier import Sparsifier
from rarefy.train.sparsity_config import Admm, Alternate, Gradual, Movement, Rewind, Rigl, SecondOrder, resolve_config
from rarefy.train.sparsity_methods import lr_progress
from rarefy.train.sparsity_schedule import sparsities

PLANS = {
    "gradual": (Gradual, {"steps": 4, "end": 0.6}),
    "gradual that regrows": (Gradual, {"steps": 4, "end": 0.6, "regrow": True}),
    "movement": (Movement, {"steps": 5, "end": 0.6}),
    "second-order": (SecondOrder, {"steps": 3, "end": 0.6, "block": 16, "gradients": 8}),
    "rigl": (Rigl, {"steps": 4}),
    "alternate": (Alternate, {"cycles": 2}),
    "admm": (Admm, {"steps": 6, "end": 0.7}),
    "rewind": (Rewind, {"rounds": 2}),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}
SHAPES = {"unstructured": 0.7, "2:4": None, "4x1": 0.7}


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(243, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))


def plan_of(name, pattern="unstructured", sparsity=0.7, **more):
    config, options = PLANS[name]
    return config(**{**options, "pattern": pattern, "sparsity": sparsity, "layers": ["1", "3"], **more})


def data_of(steps=20):
    batches = image_batches()
    return [batches[i % len(batches)] for i in range(steps)]


def train(model, optimizer, sparsifier, batches, each=None):
    loss = nn.CrossEntropyLoss()
    for x, y in batches:
        loss(model(x), y).backward()
        optimizer.step()
        sparsifier.step()
        if each:
            each()
        optimizer.zero_grad()


@pytest.mark.parametrize("pattern", SHAPES)
@pytest.mark.parametrize("name", PLANS)
def test_every_method_reaches_its_pattern_and_masked_weights_stay_zero(name, pattern):
    model, batches = mlp(), data_of()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    plan = plan_of(name, pattern, SHAPES[pattern])
    sparsifier = Sparsifier(model, plan, steps=20, optimizer=optimizer, calibrate=batches[:4])

    def hold():
        for i in (1, 3):
            mask = rarefy.masks(model)[str(i)]
            assert not bool(model[i].weight[~mask].any())
            if not sparsifier._method.hidden(plan):
                for value in optimizer.state[all_layers(model)[i // 2].original].values():
                    assert value.dim() == 0 or not bool(value[~mask].any())

    train(model, optimizer, sparsifier, batches, hold)
    assert sparsifier.done and sparsifier.sparsity == pytest.approx(SHAPES[pattern] or 0.5, abs=0.03)
    for i in (1, 3):
        mask = rarefy.masks(model)[str(i)]
        assert 1 - mask.float().mean().item() == pytest.approx(SHAPES[pattern] or 0.5, abs=0.03)
        if pattern == "2:4":
            assert int(mask[:, : mask.shape[1] // 4 * 4].reshape(-1, 4).sum(1).max()) <= 2
        if pattern == "4x1":
            assert bool((mask.reshape(-1, 4, mask.shape[1]).float().mean(1) % 1 == 0).all())
    assert "5" not in rarefy.masks(model)


@pytest.mark.parametrize("maker", OPTIMIZERS)
@pytest.mark.parametrize("how", ["plain", "clipped", "scaled", "accumulated", "averaged", "restored", "compiled"])
def test_masked_weights_stay_zero_for_every_optimizer(maker, how, tmp_path):
    model, batches = Net(), image_batches() * 2
    rarefy.prune_(model, sparsity=0.6)
    kept = rarefy.masks(model)
    optimizer = OPTIMIZERS[maker](model.parameters())
    sparsifier = Sparsifier(model, None, steps=len(batches), optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=how == "scaled")
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    for index, (x, y) in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "scaled", cache_enabled=False):
            loss = nn.functional.cross_entropy(run(x).float(), y)
        scaler.scale(loss).backward()
        if how == "accumulated" and index % 2 == 0:
            continue
        if how == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        sparsifier.step()
        optimizer.zero_grad()
        mean.update_parameters(model)
        if how == "restored":
            torch.save(
                {"m": model.state_dict(), "o": optimizer.state_dict(), "s": sparsifier.state_dict()}, tmp_path / "x"
            )
            state = torch.load(tmp_path / "x", weights_only=True)
            model.load_state_dict(state["m"])
            optimizer.load_state_dict(state["o"])
            sparsifier.load_state_dict(state["s"])
        for layer in (l for l in all_layers(model) if l.full_name in kept):
            gone = ~kept[layer.full_name]
            assert not bool(layer.weight[gone].any())
            for value in optimizer.state[layer.original].values():
                assert value.dim() == 0 or not bool(value[gone].any())
    sparsifier.copy_masks_(mean)
    for layer in (l for l in all_layers(mean.module) if l.full_name in kept):
        assert not bool(layer.weight[~kept[layer.full_name]].any()) and bool(layer.weight.any())


def test_averaged_weights_get_the_masks():
    model, batches = mlp(), data_of(8)
    mean = torch.optim.swa_utils.AveragedModel(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = Sparsifier(model, plan_of("gradual"), steps=8, optimizer=optimizer)
    train(model, optimizer, sparsifier, batches)
    sparsifier.copy_masks_(mean)
    assert all(torch.equal(m, rarefy.masks(mean)[f"module.{n}"]) for n, m in rarefy.masks(model).items())


@pytest.mark.parametrize("name", PLANS)
def test_a_resumed_run_ends_with_the_same_bits(name):
    plan, ends = plan_of(name), []
    for cut in (None, 7, 13):
        torch.manual_seed(1)
        model, batches = mlp(), data_of()
        optimizer = OPTIMIZERS["adam"](model.parameters())
        make = lambda m, o: Sparsifier(m, plan, steps=20, optimizer=o, calibrate=data_of()[:4])  # noqa: E731
        sparsifier = make(model, optimizer)
        train(model, optimizer, sparsifier, batches[:cut])
        if cut is not None:
            states = [copy.deepcopy(x.state_dict()) for x in (model, optimizer, sparsifier)]
            model = mlp()
            optimizer = OPTIMIZERS["adam"](model.parameters())
            sparsifier = make(model, optimizer)
            for x, state in reversed([*zip((model, optimizer, sparsifier), states)]):
                x.load_state_dict(state)
            train(model, optimizer, sparsifier, batches[cut:])
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for end in ends[1:] for a, b in zip(ends[0], end))


def test_layers_reach_their_own_final_sparsity():
    model = mlp()
    plan = Gradual(sparsity=0.9, ends={"3": 0.5}, layers=["1", "3"], steps=3, end=0.5)
    sparsifier = Sparsifier(model, plan, steps=4)
    for _ in range(4):
        sparsifier.step()
    zeros = {n: 1 - m.float().mean().item() for n, m in rarefy.masks(model).items()}
    assert zeros["1"] == pytest.approx(0.9, abs=0.01) and zeros["3"] == pytest.approx(0.5, abs=0.01)
    sizes = {"1": 243 * 16, "3": 128}
    assert sparsifier.sparsity == pytest.approx((0.9 * sizes["1"] + 0.5 * sizes["3"]) / sum(sizes.values()))


def test_movement_scores_match_their_equation():
    torch.manual_seed(0)
    model, batches, want = mlp(), data_of(6), torch.zeros(16, 243)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, Movement(sparsity=0.5, layers="1", steps=2, start=0.4, end=0.9), steps=6)
    W = all_layers(model)[0].original
    for x, y in batches:
        effective = model[1].weight.detach().clone().requires_grad_()
        loss = nn.functional.cross_entropy(model[2:](nn.functional.linear(x.flatten(1), effective, model[1].bias)), y)
        (g,) = torch.autograd.grad(loss, [effective])
        nn.functional.cross_entropy(model(x), y).backward()
        if not sparsifier.done:
            want -= g * W.detach()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    torch.testing.assert_close(sparsifier._context.state["score/1"], want)
    order = want.flatten().argsort()[: want.numel() // 2]
    assert not bool(rarefy.masks(model)["1"].flatten()[order].any())


def test_soft_movement_prunes_more_with_a_larger_penalty():
    found = []
    for penalty in (0.5, 3.0):
        torch.manual_seed(0)
        model, batches = mlp(), data_of(40)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        plan = Movement(penalty=penalty, threshold=0.4, rate=0.05, layers="1", steps=5, end=0.8)
        sparsifier = Sparsifier(model, plan, steps=40, optimizer=optimizer)
        train(model, optimizer, sparsifier, batches)
        score = sparsifier._context.state["score/1"]
        assert torch.equal(rarefy.masks(model)["1"], score.sigmoid() > 0.4)
        found.append(sparsifier.sparsity)
    assert 0 < found[0] < found[1] < 1


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "2:4"])
def test_rigl_matches_a_slow_reference(pattern):
    model, batches = mlp(), data_of(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = Rigl(sparsity=SHAPES[pattern], pattern=pattern, layers="1", steps=2, end=1.0, drop=0.5)
    sparsifier = Sparsifier(model, plan, steps=10, optimizer=optimizer)
    first = rarefy.masks(model)["1"]
    layer = all_layers(model)[0]
    for index, (x, y) in enumerate(batches[:5]):
        effective = model[1].weight.detach().clone().requires_grad_()
        out = model[2:](nn.functional.linear(x.flatten(1), effective, model[1].bias))
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(out, y), [effective])
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        w = layer.weight.detach().clone()
        sparsifier.step()
        optimizer.zero_grad()
        assert torch.equal(rarefy.masks(model)["1"], first) == (index < 4)
    part = 0.5 / 2 * (1 + torch.cos(torch.tensor(torch.pi * 0.5)).item())
    units = (lambda t: t.reshape(4, 4, -1).mean(1)) if pattern == "4x1" else lambda t: t
    m, size, grad = units(first.float()).bool(), units(w.abs()), units(g.abs())
    active = m.flatten().nonzero()[:, 0]
    many = round((1 - m.float().mean().item() * (1 - part)) * m.numel()) - (m.numel() - len(active))
    dropped = active[size.flatten()[active].argsort()[:many]]
    stays = m.flatten().clone()
    stays[dropped] = False
    want = stays.clone()
    if pattern == "2:4":
        for row in want.reshape(16, -1).split(1):
            for a in range(0, 243, 4):
                group = slice(a, min(a + 4, 243))
                r = int(row.storage_offset() // 243)
                free = [k for k in range(group.start, group.stop) if not row[0, k]]
                free.sort(key=lambda k, r=r: -float(grad[r, k]))
                for k in free[: max(0, min(2, group.stop - group.start) - int(row[0, group].sum()))]:
                    row[0, k] = True
    else:
        free = (~stays).nonzero()[:, 0]
        want[free[grad.flatten()[free].argsort(descending=True)[: len(active) - int(stays.sum())]]] = True
    got = rarefy.masks(model)["1"]
    assert torch.equal(units(got.float()).bool().flatten(), want)
    new = got & ~first
    assert bool(new.any()) and not bool(layer.weight.detach()[new].any())  # what grows begins at zero


def test_phases_alternate_and_the_last_is_sparse():
    model, seen = mlp(), []
    sparsifier = Sparsifier(model, plan_of("alternate", cycles=2, start=0.2, end=0.8), steps=10)
    for _ in range(10):
        sparsifier.step()
        seen.append(sparsifier.sparsity)
    assert seen == [0, 0.7, 0.7, 0, 0.7, 0.7, 0, 0.7, 0.7, 0.7]


def test_admm_converges_to_its_projection():
    model = mlp()
    start = all_layers(model)[0].original.detach().clone()
    sparsifier = Sparsifier(model, Admm(sparsity=0.5, layers="1", steps=1, start=0.0, end=0.5, pull=50.0), steps=100)
    want = torch.where(start.abs() >= start.abs().flatten().sort().values[start.numel() // 2], start, 0.0)
    for _ in range(49):
        sparsifier.step()
    assert rarefy.masks(model)["1"].all()
    torch.testing.assert_close(model[1].weight.detach(), want, atol=1e-4, rtol=0)
    sparsifier.step()
    assert torch.equal(rarefy.masks(model)["1"], want != 0)


def test_admm_weighs_by_second_moments():
    model, batches = mlp(), data_of(10)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    sparsifier = Sparsifier(
        model, Admm(sparsity=0.5, layers="1", steps=3, end=0.5, weigh=True), steps=10, optimizer=optimizer
    )
    seen = {}

    def look():
        if sparsifier.count == 4:
            layer = all_layers(model)[0]
            kept = {k: v.clone() for k, v in sparsifier._context.state.items()}
            seen.update(
                kept, w=layer.original.detach().clone(), v=optimizer.state[layer.original]["exp_avg_sq"].clone()
            )

    train(model, optimizer, sparsifier, batches[:5], look)
    with pytest.raises(PatternError, match="needs the optimizer's second moments"):
        plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        other = mlp()
        plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
        train(
            other, plain, Sparsifier(other, Admm(sparsity=0.5, weigh=True, steps=3), steps=10, optimizer=plain), batches
        )
    score = (all_layers(model)[0].original.detach() + seen["u/1"]).square()
    assert score.shape == (16, 243) and set(seen) == {"z/1", "u/1", "w", "v"}


def test_rewind_restores_early_weights():
    model, batches = mlp(), data_of(12)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    plan = plan_of("rewind", rounds=2, to=0.5)
    sparsifier = Sparsifier(model, plan, steps=12, optimizer=optimizer)
    seen = []
    train(model, optimizer, sparsifier, batches, lambda: seen.append([p.detach().clone() for p in model.parameters()]))
    early = seen[1]  # half of the first of three trainings of four steps
    mask = {n: m for n, m in rarefy.masks(model).items()}
    for index in (3, 7):
        for name, a, b in zip((n for n, _ in model.named_parameters()), early, seen[index]):
            layer = name.split(".")[0]
            keep = b != 0 if layer in mask and "original" in name else torch.ones_like(b, dtype=torch.bool)
            assert torch.equal(a[keep], b[keep])
    assert sparsifier.sparsity == 0.7 and sparsities("exponential", 0.7, 2)[0] < 0.7
    rates = Rewind(sparsity=0.7, rounds=2, to=0.5, weights=False)
    assert lr_progress(rates, 1 / 3) == 0.5 and lr_progress(rates, 1.0) == 1.0 and lr_progress(None, 0.3) == 0.3


def test_inverse_fisher_blocks_match_the_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    data = [(torch.randn(5, 6), torch.randint(3, (5,))) for _ in range(4)]
    layers = all_layers(model)[:1]
    got = fisher.inverses(model, layers, data, None, count=20, block=8, damp=0.1)["0"]
    grads = []
    for x, y in data:
        for i in range(5):
            loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            grads.append(torch.autograd.grad(loss, [model[0].weight])[0].flatten())
    G = torch.stack(grads)
    damp = 0.1 * G[:16].square().mean()
    for b in range(3):
        g = G[:, 8 * b : 8 * b + 8]
        want = torch.linalg.inv(damp * torch.eye(8) + g.T @ g / 20)
        torch.testing.assert_close(got[b], want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    w = model[0].weight.detach().flatten()
    want = torch.cat([w[8 * b : 8 * b + 8] ** 2 / (2 * got[b].diagonal()) for b in range(3)])
    torch.testing.assert_close(fisher.saliency(model[0].weight.detach(), got).flatten(), want)


def test_compensation_matches_least_squares():
    torch.manual_seed(0)
    w, mask, A = torch.randn(3, 5), torch.rand(3, 5) > 0.4, torch.randn(2, 20, 8)
    F = A.transpose(1, 2) @ A / 20 + 0.01 * torch.eye(8)
    got = fisher.compensated(w, mask, torch.linalg.inv(F)).flatten()
    for b in range(2):
        old = torch.zeros(8)
        old[: len(w.flatten()[8 * b : 8 * b + 8])] = w.flatten()[8 * b : 8 * b + 8]
        keep = torch.zeros(8, dtype=torch.bool)
        keep[: len(mask.flatten()[8 * b : 8 * b + 8])] = mask.flatten()[8 * b : 8 * b + 8]
        want = torch.zeros(8)  # argmin of (new - old)' F (new - old) with zeros where no mask is
        want[keep] = torch.linalg.solve(F[b][keep][:, keep], (F[b] @ old)[keep])
        torch.testing.assert_close(got[8 * b : 8 * b + 8], want[: len(got[8 * b : 8 * b + 8])], rtol=1e-3, atol=1e-4)


def test_second_order_loses_less_than_magnitude():
    torch.manual_seed(0)
    x = torch.randn(400, 12) @ torch.randn(12, 12)
    y = (x @ torch.randn(12, 5)).argmax(1)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5))
    rarefy.fit_(model, [(x, y)], epochs=150, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    data, losses = [(x[i : i + 50], y[i : i + 50]) for i in range(0, 400, 50)], {}
    for plan in (Gradual(sparsity=0.6, steps=1), SecondOrder(sparsity=0.6, steps=4, end=0.0, gradients=200, block=32)):
        twin = copy.deepcopy(model)
        Sparsifier(twin, plan, calibrate=data)
        losses[plan.method] = float(nn.functional.cross_entropy(twin(x), y).detach())
    assert losses["second-order"] < losses["gradual"]


@pytest.mark.parametrize("name", PLANS)
def test_training_under_autocast(name):
    model, data = mlp(), [(torch.randn(6, 3, 9, 9), torch.randint(8, (6,))) for _ in range(8)]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        rarefy.fit_(model, data, epochs=2, prune=plan_of(name), calibrate=data, seed=0)
    assert abs(float((model[1].weight == 0).float().mean()) - 0.7) < 0.05
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


BAD = {
    "no plan": (lambda: Sparsifier(mlp(), "rigl", steps=3), "prune: expected a configuration such as rarefy.Gradual"),
    "steps": (lambda: Sparsifier(mlp(), Gradual(sparsity=0.5), steps=0), "steps: expected a whole number of at least 1, got 0"),
    "no progress": (lambda: Sparsifier(mlp(), Gradual(sparsity=0.5)).step(), "needs the progress of training"),
    "beyond the end": (lambda: resolve_config(Rigl(sparsity=0.5, end=1.2)), "end: expected a number between 0 and 1, got 1.2"),
    "too short": (lambda: Sparsifier(mlp(), Alternate(sparsity=0.5, cycles=8), steps=10), "has 17 events, but training has only 10 steps"),
    "soft with sparsity": (lambda: resolve_config(Movement(sparsity=0.5, penalty=1.0)), "sparsity has no effect with penalty"),
    "soft N:M": (lambda: resolve_config(Movement(pattern="2:4", penalty=1.0)), "penalty has no effect: pattern 2:4 determines the sparsity"),
    "soft scope": (lambda: resolve_config(Movement(scope="global", penalty=1.0)), "scope has no effect"),
    "penalty": (lambda: resolve_config(Movement(penalty=-1.0)), "penalty: expected a number above 0, got -1.0"),
    "drop": (lambda: resolve_config(Rigl(sparsity=0.5, drop=1.5)), "drop: expected a number between 0 and 1, got 1.5"),
    "rounds": (lambda: resolve_config(Rewind(sparsity=0.5, rounds=0)), "rounds: expected a whole number between 1 and 100,000, got 0"),
    "cycles": (lambda: resolve_config(Alternate(sparsity=0.5, cycles=2.5)), "cycles: expected a whole number between 1 and 100,000, got 2.5"),
    "phases": (lambda: resolve_config(Alternate(sparsity=0.5, start=0.5, end=0.5)), "expected start < end for the phases"),
    "damp": (lambda: resolve_config(SecondOrder(sparsity=0.5, damp=0.0)), "damp: expected a number above 0, got 0.0"),
    "allocate": (lambda: resolve_config(Rigl(sparsity=0.5, allocate="owl")), "unknown allocation 'owl'"),
    "allocate N:M": (lambda: resolve_config(Rigl(pattern="2:4", allocate="erk")), "allocate has no effect"),
    "rigl global": (lambda: resolve_config(Rigl(sparsity=0.5, scope="global")), "use allocate='erk' instead of scope='global'"),
    "ends N:M": (lambda: resolve_config(Gradual(pattern="2:4", ends={"1": 0.5})), "ends has no effect"),
    "ends": (lambda: resolve_config(Gradual(sparsity=0.5, first=0.3, ends={"1": 0.2})), "expected a sparsity between first .0.3. and 1 for '1', got 0.2"),
    "start after end": (lambda: resolve_config(Gradual(sparsity=0.5, start=0.9)), "expected start <= end, got start 0.9 and end 0.7"),
    "no data": (lambda: Sparsifier(mlp(), SecondOrder(sparsity=0.5), steps=30), "second-order pruning needs data: give calibrate"),
    "score without data": (lambda: Sparsifier(mlp(), Gradual(sparsity=0.5, score="wanda"), steps=30), "score 'wanda' needs data"),
    "empty data": (lambda: Sparsifier(mlp(), SecondOrder(sparsity=0.5), steps=30, calibrate=[]), "the calibration data is empty"),
    "no gradient": (lambda: Sparsifier(mlp(), Movement(sparsity=0.5), steps=30).step(), "has no gradient: call sparsifier.step.. after backward"),
    "foreign state": (lambda: Sparsifier(mlp(), None, steps=3).load_state_dict({"count": 1}), "is of another run of a sparsifier: it lacks"),
    "other state": (lambda: Sparsifier(mlp(), None, steps=3).load_state_dict({"count": 1, "progress": 0.1, "stride": 0.1, "sparsity": 0.1, "left": 4}), "has 4 of 0 events left"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_messages_for_wrong_configs(case):
    with pytest.raises((PatternError, DataError, ModelError), match=BAD[case][1]):
        BAD[case][0]()


def test_a_fisher_matrix_larger_than_memory_is_refused(monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 10)
    with pytest.raises(
        ModelError, match="in blocks of 50 takes 0.0 GB, more than half of this machine's 0.0: give a smaller"
    ):
        Sparsifier(mlp(), SecondOrder(sparsity=0.5), calibrate=data_of(4))
