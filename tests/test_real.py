"""The real language model and encoder: sizes that the issue promises, outputs bit for bit. Skips where a package is missing."""

import pytest
import torch

import rarefy
from conftest import sample
from rarefy import samples
from rarefy.model import hf
from rarefy.model.select import select
from rarefy.proof.evaluate import accuracy

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    pytest.importorskip("transformers")
    sample("smollm2-135m")
    return samples.model_folder("smollm2-135m")


@pytest.mark.parametrize(
    ("pattern", "sparsity", "dtype", "most"),
    [("unstructured", 0.5, "fp32", 0.54), ("2:4", None, "bf16", 0.57), ("unstructured", 0.9, "fp32", 0.14)],
)
def test_smollm2_is_smaller_on_disk_and_the_same_when_reloaded(smollm2, tmp_path, pattern, sparsity, dtype, most):
    model = hf.load_folder(smollm2)
    rarefy.prune_(model, pattern, sparsity=sparsity)
    rarefy.fold_(model)
    rarefy.cast_(model, dtype)
    linears = {f"{l.name}.weight" for l in select(model)}
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
    folder = samples.model_folder("minilm")
    model, tokenizer = hf.load_folder(folder), hf.load_tokenizer(folder)
    texts = ["A kitten sleeps on the sofa.", "The cat naps on the couch.", "Stocks fell sharply on Monday."]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    rarefy.prune_(model, "unstructured", "wanda", 0.5, data=[batch])

    def cosines(m):
        with torch.no_grad():
            hidden = m(**batch).last_hidden_state * batch["attention_mask"][..., None]
        unit = torch.nn.functional.normalize(hidden.sum(1), dim=-1)
        return float(unit[0] @ unit[1]), float(unit[0] @ unit[2])

    near, far = cosines(model)
    assert near > far + 0.2
    rarefy.save(model, tmp_path / "out")
    assert cosines(rarefy.load(tmp_path / "out")) == cosines(rarefy.fold_(model))


def test_fashion_mnist_trains_and_prunes_iteratively():
    """The vision recipe end to end on a sixth of the data: learns, reaches 90 %, and stays near its dense twin."""
    sample("fashion-mnist")
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    from vision_net import SmallResNet

    x, y = samples.fashion_mnist(False)
    tx, ty = samples.fashion_mnist(True)
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
    dense = accuracy(model, test)
    data = {"calibrate": train[:2], "train": train, "evaluate": test}
    receipt = rarefy.compress_(model, "fashion-iterative-90", data, epochs=3)
    assert dense > 0.8 and receipt.quality["after"] > dense - 0.05
    assert abs(receipt.sparsity["achieved"] - 0.9) < 1e-4
