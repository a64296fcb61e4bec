"""The real language model and encoder: sizes that the issue promises, outputs bit for bit. Skips where a package is missing."""

import copy

import pytest
import torch

import rarefy
from conftest import sample
from rarefy.calibration.sequential import calibrate_sequentially, layer_groups
from rarefy.data import builtin, sources
from rarefy.evaluation.metrics import accuracy
from rarefy.evaluation.retrieval import embed
from rarefy.model import hf
from rarefy.model import sparsity_pattern as patterns
from rarefy.model.layers import select_layers
from rarefy.prune import solvers
from rarefy.prune.matrices import to_matrix

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    pytest.importorskip("transformers")
    sample("smollm2-135m")
    return builtin.model_folder("smollm2-135m")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "sparsity", "dtype", "most"),
    [("unstructured", 0.5, "fp32", 0.54), ("2:4", None, "bf16", 0.57), ("unstructured", 0.9, "fp32", 0.14)],
)
def test_smollm2_is_smaller_on_disk_and_the_same_when_reloaded(smollm2, tmp_path, pattern, sparsity, dtype, most):
    model = hf.load_folder(smollm2)
    rarefy.prune_(model, pattern, sparsity=sparsity)
    rarefy.fold_(model)
    rarefy.cast_(model, dtype)
    linears = {f"{l.name}.weight" for l in select_layers(model)}
    assert len(linears) == 210  # embedding and head are left alone
    rarefy.save(model, tmp_path / "out")
    rows = [r for r in rarefy.inspect(tmp_path / "out").rows if r["tensor"] in linears]
    assert sum(r["bytes"] for r in rows) <= most * sum(r["dense_bytes"] for r in rows)
    fresh, ids = rarefy.load(tmp_path / "out"), torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)


def test_minilm_prunes_without_losing_its_sense(tmp_path):
    pytest.importorskip("transformers")
    sample("minilm")
    folder = builtin.model_folder("minilm")
    model, tokenizer = hf.load_folder(folder), hf.load_tokenizer(folder)
    texts = ["A kitten sleeps on the sofa.", "The cat naps on the couch.", "Stocks fell sharply on Monday."]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    rarefy.prune_(model, "unstructured", "wanda", 0.5, data=[batch])

    def cosines(m):
        unit = embed(m, [batch])
        return float(unit[0] @ unit[1]), float(unit[0] @ unit[2])

    near, far = cosines(model)
    assert near > far + 0.2
    rarefy.save(model, tmp_path / "out")
    assert cosines(rarefy.load(tmp_path / "out")) == cosines(rarefy.fold_(model))


@pytest.fixture(scope="module")
def fashion():
    """A small ResNet with a depthwise block, two epochs on a sixth of the data, and batches to train and to test."""
    sample("fashion-mnist")
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    from vision_net import SmallResNet

    torch.manual_seed(0)
    x, y = builtin.fashion_mnist(False)
    tx, ty = builtin.fashion_mnist(True)
    train = list(zip(x[:10240].split(256), y[:10240].split(256)))
    test = list(zip(tx[:2000].split(500), ty[:2000].split(500)))
    model = SmallResNet()
    rarefy.fit_(
        model,
        train,
        epochs=2,
        optimizer=torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True),
        lr_schedule="one-cycle",
        seed=0,
    )
    return model, train, test


ASYMMETRIC = {name: rarefy.Solver(name=name, asymmetric=0.5) for name in ("obs", "admm")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"solver": "obs", "allocate": "erk"},
        {"solver": "obs", "score": "magnitude", "scope": "global"},
        {"solver": ASYMMETRIC["obs"]},
        {"solver": ASYMMETRIC["admm"]},
    ],
    ids=["erk", "same masks", "asymmetric", "admm"],
)
def test_a_convolutional_network_in_one_shot(fashion, how):
    """70 % before any fine-tuning, depthwise and strided convolutions included, against magnitude at its best."""
    model, train, test = fashion
    net, other = copy.deepcopy(model), copy.deepcopy(model)
    rarefy.prune_(net, sparsity=0.7, data=train[:4], **how)
    rarefy.prune_(other, sparsity=0.7, score="magnitude", scope="global")
    assert accuracy(net, test) > accuracy(other, test) + 0.05
    assert accuracy(net, test) > accuracy(model, test) - 0.05


@pytest.mark.slow
def test_fashion_mnist_trains_and_prunes_iteratively(fashion):
    """The vision recipe end to end: learns, reaches 90 %, and stays near its dense twin."""
    model, train, test = fashion
    model = copy.deepcopy(model)
    dense = accuracy(model, test)
    data = {"calibrate": train[:2], "train": train, "evaluate": test}
    receipt = rarefy.compress_(model, "fashion-iterative-90", data, epochs=3)
    assert dense > 0.8 and receipt.quality["after"] > dense - 0.05
    assert abs(receipt.sparsity["achieved"] - 0.9) < 1e-4


@pytest.mark.slow
def test_a_network_cut_to_a_quarter_learns_from_its_readers(fashion):
    """Half of all channels, without any training: repair is worth more than 20 points."""
    model, train, test = fashion
    plain, repaired = copy.deepcopy(model), copy.deepcopy(model)
    rarefy.cut_(plain, train[0][0][:2])
    report = rarefy.cut_(repaired, train[0][0][:2], data=train[:8])
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, repaired))
    assert after < 0.27 * before and not any(r["stays because"] for r in report.rows if r["group"].startswith("blocks"))
    assert accuracy(repaired, test) > accuracy(plain, test) + 0.2


@pytest.mark.slow
def test_refit_reaches_least_squares_on_real_layers(smollm2):
    """Within 1 % of the exact minimum of each row after 20 steps, on inputs as the real model makes them."""
    model, tokenizer = hf.load_folder(smollm2), hf.load_tokenizer(smollm2)
    take = sources.Take(samples=4, tokens=512, batch=2)
    data = sources.batches("wiki", take, tokenizer=tokenizer)
    chosen = select_layers(model, "model.layers.[01].*")
    for stop in calibrate_sequentially(model, data, layer_groups(model, data[0], chosen)):
        W = torch.cat([to_matrix(l, l.weight.detach()) for l in stop.group.layers], 1)[:, ::64]
        H = solvers.damped(stop.gram.H, 0.01)
        scores = (W.abs() * stop.gram.diagonal.sqrt())[:, None]
        mask = patterns.masks_at_sparsity([scores], patterns.parse_pattern("unstructured"), 0.5, "row")[0][:, 0]
        new = solvers.refit(W, W, H, mask, 20)
        found, start = solvers.squared_errors(new, W, H)[0], solvers.squared_errors(W * mask, W, H)[0]
        R = torch.linalg.cholesky(H[0].double()).T
        best = torch.zeros_like(found, dtype=torch.float64)
        for i, (row, keep) in enumerate(zip(W[0].double(), mask[0])):
            fit = torch.linalg.lstsq(R[:, keep], (R @ row)[:, None]).solution[:, 0]
            best[i] = (R @ row - R[:, keep] @ fit).square().sum()
        assert (found <= start).all() and (found > 0.999 * best).all() and (found < 1.01 * best).all()
