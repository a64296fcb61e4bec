"""Models of timm and torchvision on the command line: real weights and photographs, from the name to the folder."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import rarefy
from conftest import shell
from helpers.photographs import efficientnet_lite0, photographs
from rarefy.model.image_config import image_config_of

pytest.importorskip("timm")
MODEL = "timm/tf_efficientnet_lite0.in1k"
RECIPE = """\
name: a third
data: {samples: COUNT, batch: 2}
stages: [{prune: {sparsity: 0.2, score: wanda}}]
evaluate: {metric: accuracy, max_degradation: 0.5}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights, photographs in folders of their classes, and a recipe."""
    root = tmp_path_factory.mktemp("named")
    save_file(efficientnet_lite0(), root / "lite0.safetensors")
    for what, file in photographs().items():
        name = {"cat": "tiger cat", "daisy": "n11939491"}.get(what, what)  # by word and by WordNet's number
        (root / "photos" / name).mkdir(parents=True)
        with Image.open(file) as image:
            image.convert("RGB").save(root / "photos" / name / "1.png")
    (root / "r.yaml").write_text(RECIPE.replace("COUNT", str(len(photographs()))))
    return root


@pytest.mark.slow
def test_from_a_name_to_a_folder(folder):
    photos, out = folder / "photos", folder / "out"
    weights = ("--checkpoint", folder / "lite0.safetensors")
    ran = shell(
        "compress",
        MODEL,
        *weights,
        "-r",
        folder / "r.yaml",
        "--data",
        photos,
        "--eval-data",
        photos,
        "-o",
        out,
        "--json",
    )
    assert ran.returncode == 0, ran.stderr
    receipt = json.loads(ran.stdout)
    quality = receipt["quality"]
    assert (
        quality["metric"] == "accuracy"
        and quality["before"] == 1.0
        and abs(receipt["sparsity"]["achieved"] - 0.2) < 1e-4
    )
    assert quality["more"]["top-5 accuracy"]["before"] == 1.0 and "top-5 accuracy" in (out / "receipt.txt").read_text()
    assert json.loads((out / "source.json").read_text()) == {"model": MODEL, "weights": "lite0.safetensors"}
    loaded = rarefy.load(out)
    assert image_config_of(loaded).mean == (0.5, 0.5, 0.5) and loaded(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bench", "timm/resnet10t"), "rarefy: timm/resnet10t: its weights could not be fetched (timm/resnet10t.c3_in1k is not in the cache, and the run is offline): pass --checkpoint FILE, or --random-weights"),
        (("profile", "torchvision/resnet1"), "rarefy: torchvision has no model 'resnet1'; did you mean torchvision/resnet18"),
        (("inspect", "minilm", "--random-weights"), "rarefy: --random-weights has no effect: minilm is no model of timm or torchvision"),
        (("inspect", "timm/resnet10t", "--checkpoint", "no.pth"), "rarefy: no file of weights 'no.pth'"),
        (("sensitivity", "timm/resnet10t", "--random-weights", "--tokens", "3"), "rarefy: --tokens has no effect: the model reads images"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_one_line(arguments, said, capsys, monkeypatch):
    from rarefy.cli.main import main

    monkeypatch.setattr("sys.argv", ["rarefy", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(said) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "timm/resnet10t", "--random-weights"), "conv1.0.weight"),
        (("bench", "timm/resnet10t", "--random-weights", "--no-engine", "--repeats", "2"), "forward, batch 1"),
        (("sensitivity", "timm/resnet10t", "--random-weights", "--layers", "fc", "--samples", "1", "--bits", "4"), "fc"),
        (("compress", "timm/resnet10t", "--random-weights", "-r", "fast", "--dry-run"), "layer1"),
    ],
)  # fmt: skip
def test_commands_take_names(arguments, said, capsys, monkeypatch):
    from rarefy.cli.main import main

    monkeypatch.setattr("sys.argv", ["rarefy", *arguments])
    try:
        main()
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err
    assert said in capsys.readouterr().out
