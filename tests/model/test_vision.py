"""Models of timm and torchvision by name, judged by these libraries themselves."""

import builtins

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rarefy
from helpers.photographs import efficientnet_lite0, photographs
from rarefy.common.errors import ContainerError, DataError, ModelError
from rarefy.data.images import transform_of
from rarefy.model.image_config import ImageConfig, class_ids, image_config_from_dict, image_config_of
from rarefy.model.vision import build, load_named, structure
from rarefy.model.weight_files import read_weights

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Trained weights of EfficientNet-Lite0 as a file."""
    file = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    save_file(efficientnet_lite0(), file)
    return file


def picture(size=(301, 207)):
    from PIL import Image

    noise = torch.randint(0, 256, (size[1] // 9, size[0] // 9, 3), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize(size, Image.Resampling.BICUBIC)


# preprocessing


@pytest.mark.parametrize(
    "name", ["resnet50.a1_in1k", "tf_efficientnet_lite0.in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "mobilenetv4_conv_small.e2400_r224_in1k"],
)  # fmt: skip
def test_images_are_prepared_as_by_timm(name):
    model = load_named(f"timm/{name}", random=True)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    for size in ((301, 207), (207, 301), (224, 224)):
        image = picture(size)
        torch.testing.assert_close(transform_of(image_config_of(model))(image), theirs(image), rtol=0, atol=1e-6)


def test_images_that_timm_squashes():
    name = next(
        n
        for n in timm.list_pretrained("*tiny*")
        if timm.models.get_pretrained_cfg(n).crop_mode == "squash" and timm.models.get_pretrained_cfg(n).num_classes
    )
    model = load_named(f"timm/{name}", random=True)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    assert image_config_of(model).squash
    image = picture()
    torch.testing.assert_close(transform_of(image_config_of(model))(image), theirs(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18.IMAGENET1K_V1", "mobilenet_v3_small", "regnet_y_400mf.IMAGENET1K_V2"])
def test_images_are_prepared_as_by_torchvision(name):
    model = load_named(f"torchvision/{name}", random=True)
    architecture, _, tag = name.partition(".")
    entries = torchvision.models.get_model_weights(architecture)
    theirs = (entries[tag] if tag else entries.DEFAULT).transforms()
    image = picture()
    torch.testing.assert_close(transform_of(image_config_of(model))(image), theirs(image), rtol=0, atol=1e-6)


# weights


def test_real_weights_tell_what_real_photographs_show(weights):
    from PIL import Image

    model = load_named("timm/tf_efficientnet_lite0.in1k", weights)
    images, files = image_config_of(model), photographs()
    answers = {}
    for what, file in files.items():
        with Image.open(file) as image:
            best = int(model(transform_of(images)(image)[None]).argmax())
        answers[what] = images.labels[best][1]
    assert {w: a for w, a in answers.items() if w not in a} == {}


def test_outputs_are_those_of_timm_and_torchvision(tmp_path):
    theirs = timm.create_model("resnet18", num_classes=7, in_chans=1).eval()
    torch.save({"state_dict": {f"module.{n}": t for n, t in theirs.state_dict().items()}}, tmp_path / "a.pth")
    ours = load_named("timm/resnet18", tmp_path / "a.pth")
    x = torch.randn(2, 1, 64, 64)
    assert torch.equal(ours(x), theirs(x))
    assert image_config_of(ours).num_classes == 7 and image_config_of(ours).shape(2) == (2, 1, 224, 224)
    theirs = torchvision.models.squeezenet1_1(num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / "b.pth")
    ours = load_named("torchvision/squeezenet1_1", tmp_path / "b.pth")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x)) and image_config_of(ours).num_classes == 5


def test_names_of_layers_in_old_weights(tmp_path):
    theirs = torchvision.models.densenet121(num_classes=3).eval()
    old = {n.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): t for n, t in theirs.state_dict().items()}
    torch.save(old, tmp_path / "old.pth")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_named("torchvision/densenet121", tmp_path / "old.pth")(x), theirs(x))


def test_heads_that_only_training_needs_are_left_out(tmp_path):
    theirs = torchvision.models.googlenet(init_weights=False, transform_input=True).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = load_named("torchvision/googlenet", tmp_path / "w.pth")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x)) and not any(n.startswith("aux") for n in ours.state_dict())


def test_torchvision_weights_in_the_cache_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    theirs = torchvision.models.squeezenet1_1().eval()
    file = tmp_path / "checkpoints" / torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    with pytest.raises(ModelError, match=r"squeezenet1_1: its weights are not in .*, and the run is offline: pass"):
        load_named("torchvision/squeezenet1_1")
    file.parent.mkdir()
    torch.save(theirs.state_dict(), file)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_named("torchvision/squeezenet1_1")(x), theirs(x))


def test_random_weights_are_always_the_same_and_change_no_seed():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    a, b = (load_named("timm/resnet10t", random=True) for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


# saved and loaded again


def test_a_compressed_model_loads_by_its_name(weights, tmp_path):
    model = load_named("timm/tf_efficientnet_lite0.in1k", weights)
    x = torch.randn(1, 3, 224, 224)
    rarefy.cut_(model, x, "channel", keep=0.8, repair=False)
    rarefy.prune_(model, sparsity=0.5)
    rarefy.quantize_(model, "int8")
    expected = model(x)
    rarefy.save(model, tmp_path / "out")
    loaded = rarefy.load(tmp_path / "out")
    assert torch.equal(loaded(x), rarefy.load(tmp_path / "out")(x))
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
    assert image_config_of(loaded) == image_config_of(model) and not loaded.training


def test_a_model_with_other_classes_and_types_loads(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=4)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    model = load_named("timm/vit_tiny_patch16_224", tmp_path / "w.safetensors")
    rarefy.cast_(model, "bf16")
    rarefy.save(model, tmp_path / "out")
    loaded = rarefy.load(tmp_path / "out")
    x = torch.randn(1, 3, 224, 224, dtype=torch.bfloat16)
    assert torch.equal(loaded(x), model(x)) and loaded(x).shape == (1, 4)


def test_a_compiled_model_knows_its_images(tmp_path):
    model = load_named("timm/resnet10t", random=True)
    fast = rarefy.compile(model, torch.randn(1, 3, 64, 64))
    rarefy.save(fast, tmp_path / "out")
    images = image_config_of(rarefy.load(tmp_path / "out"))
    assert images.to_dict() == image_config_of(model).to_dict() and images.labels == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "hf-hub:org/model"}, "timm has no model 'hf-hub:org/model'"),
        ({"name": "os.system"}, "timm has no model 'os'"),
        ({"name": 3}, "expected a model of timm or torchvision"),
        ({"library": "torchvision", "name": "resnet"}, "torchvision has no model 'resnet'; did you mean"),
        ({"dtype": "float64"}, "saved dtype: expected one of"),
        ({"images": None}, "images: expected the fields size"),
        (
            {"images": {**ImageConfig().to_dict(), "size": 10**9}},
            "images.size: expected a whole number from 1 to 16384",
        ),
        ({"images": {**ImageConfig().to_dict(), "num_classes": 10**9}}, "images.num_classes: expected a whole number"),
        ({"images": {**ImageConfig().to_dict(), "std": [0.0] * 3}}, "std above 0"),
        ({"images": {**ImageConfig().to_dict(), "mean": ["0"] * 3}}, "expected lists of finite numbers"),
        (
            {"images": {**ImageConfig().to_dict(), "interpolation": "x"}},
            "images.interpolation: expected one of nearest",
        ),
    ],
)
def test_structures_of_hostile_folders(change, said):
    with pytest.raises(ModelError, match=said):
        build({**(structure(load_named("timm/resnet10t", random=True)) or {}), **change})


def test_a_folder_of_another_architecture(tmp_path, monkeypatch):
    rarefy.save(load_named("timm/resnet10t", random=True), tmp_path / "out")
    file = tmp_path / "out" / "rarefy.json"
    file.write_text(file.read_text().replace('"resnet10t"', '"resnet18"'))
    with pytest.raises(ContainerError):
        rarefy.load(tmp_path / "out")


# what is wrong


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm/resnet5", r"timm has no model 'resnet5'; did you mean timm/resnet"),
        ("timm/resnet18.a9_in1k", r"no weights 'a9_in1k'; it has a1_in1k, .*did you mean timm/resnet18.a[123]_in1k\?"),
        ("torchvision/resnet50.V2", r"no weights 'V2'; it has IMAGENET1K_V1, IMAGENET1K_V2"),
        ("torchvision/fcn_resnet50", "torchvision/fcn_resnet50 is no classifier: only those are loaded by name"),
        ("timm/hf-hub:timm/resnet18", "timm has no model 'hf-hub:timm/resnet18'"),
        ("resnet50", "'resnet50': expected timm/NAME or torchvision/NAME"),
        ("timm/resnet18", r"could not be fetched \(timm/resnet18.a1_in1k is not in the cache, and the run is offline\): pass"),
        ("timm/resnet10t.c3_in1k.x", "has no weights 'c3_in1k.x'"),
    ],
)  # fmt: skip
def test_names(name, said):
    with pytest.raises(ModelError, match=said):
        load_named(name)


class Touch:
    """An object whose unpickling writes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_files_of_weights(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(1)}, "args": Touch(tmp_path / "hit")}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match=r"evil.pth holds more than tensors, which would run code: save its weights"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "hit").exists()
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "linear.pth")
    for name, said in (
        ("none.pth", "no file of weights"),
        ("cut.pth", r"is no file of weights that torch.save wrote \(.*\): give .pth or .safetensors"),
        ("cut.safetensors", "is not readable as .safetensors"),
        ("list.pth", "holds no weights: expected tensors by name"),
    ):
        with pytest.raises(ModelError, match=said):
            read_weights(tmp_path / name)
    for name in ("timm/resnet10t", "torchvision/resnet18"):
        with pytest.raises(ModelError, match=rf"linear.pth does not hold the weights of {name}: Missing key.* \.\.\."):
            load_named(name, tmp_path / "linear.pth")
    with pytest.raises(ModelError, match="random weights and a checkpoint exclude each other"):
        load_named("timm/resnet10t", tmp_path / "linear.pth", random=True)
    (tmp_path / "w.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"expected weights as .safetensors, .pth, .pt"):
        read_weights(tmp_path / "w.bin")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_missing(library, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == library:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    from rarefy.model import vision

    vision._architectures.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=rf'models of {library} need .*: pip install "rarefy\[vision\]"'):
        load_named(f"{library}/resnet18", random=True)


# classes


def test_classes_of_data_and_of_the_model():
    images = ImageConfig(num_classes=3, labels=(("ox",), ("emu",), ("cat", "n1")))
    assert class_ids(["b", "a", "c"], images, "d") == [0, 1, 2]  # as many: in their order
    assert class_ids(["2", "0"], images, "d") == [2, 0] and class_ids(["N1", "Ox"], images, "d") == [2, 0]
    assert class_ids(["photos"], images, "d") == [-100] and class_ids(["x", "y"], ImageConfig(), "d") == [0, 1]
    with pytest.raises(DataError, match=r"d: 'emuu' is no class of the model \(did you mean 'emu'\?\)"):
        class_ids(["cat", "emuu"], images, "d")
    with pytest.raises(DataError, match="d has 4 classes, and the model 3"):
        class_ids(list("abcd"), images, "d")
    assert image_config_from_dict(images.to_dict()).labels == ()
