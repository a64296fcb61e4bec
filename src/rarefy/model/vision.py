"""Models of timm and torchvision by name. The libraries are imported only inside these functions.

A name is looked up in the library's own list of models, also where a saved folder names it: no class is imported by a
name from a file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from math import floor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError, first_line, nearest
from rarefy.common.extras import install
from rarefy.model import hub
from rarefy.model.image_config import ImageConfig, image_config_from_dict, image_config_of, set_image_config_
from rarefy.model.weight_files import read_weights

LIBRARIES = ("timm", "torchvision")
NAME_ATTRIBUTE = "rarefy_name"  # of a model that was built by name
PLAIN = {name: {"aux_logits": False, "transform_input": True} for name in ("googlenet", "inception_v3")}
HOW = "pass checkpoint=FILE, or random=True (shell: pass --checkpoint FILE, or --random-weights)"
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads that only training needs
OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


@dataclass(frozen=True)
class VisionName:
    """A model of timm or torchvision, and where its weights are from.

    Attributes:
        library: "timm" or "torchvision".
        name: the architecture, and after a dot the weights: "resnet50.a1_in1k", "resnet50.IMAGENET1K_V2".
        checkpoint: a file of weights; None: those of the name.
        random: no weights but random ones.
        offline: use downloaded weights only.
        progress: show a progress bar of downloads.

    Example:
        >>> print(VisionName("timm", "resnet50.a1_in1k"))
        timm/resnet50.a1_in1k
    """

    library: str
    name: str
    checkpoint: Path | None = None
    random: bool = False
    offline: bool = False
    progress: bool = True

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"


def parse_vision_name(text: str) -> VisionName | None:
    """Return the model that a name stands for; None for a name that has another form.

    Example:
        >>> str(parse_vision_name("torchvision/resnet18")), parse_vision_name("org/model")
        ('torchvision/resnet18', None)
    """
    library, _, name = text.partition("/")
    return VisionName(library, name) if library in LIBRARIES and name else None


def load_named(source: str | VisionName, checkpoint: str | Path | None = None, random: bool = False) -> nn.Module:
    """Return a model of timm or torchvision in evaluation mode, which `rarefy.save` and `rarefy.load` know by name.

    Args:
        source: such as "timm/resnet50.a1_in1k" or "torchvision/resnet50".
        checkpoint: a .safetensors or .pth file with its weights; the number of classes is that of the file.
        random: build it with random weights.

    Returns:
        The module. `image_config_of` returns how images are prepared for it.

    Raises:
        ModelError: an unknown name, a library that is not installed, weights that do not fit or cannot be fetched.

    Example:
        >>> net = load_named("torchvision/squeezenet1_1", random=True)
        >>> image_config_of(net).size, image_config_of(net).num_classes
        (224, 1000)
    """
    named = parse_vision_name(source) if isinstance(source, str) else source
    if named is None:
        raise ModelError(f"{source!r}: expected timm/NAME or torchvision/NAME, such as torchvision/resnet50")
    if checkpoint is not None or random:
        named = replace(named, checkpoint=None if checkpoint is None else Path(checkpoint), random=random)
    if named.random and named.checkpoint is not None:
        raise ModelError(
            "random weights and a checkpoint exclude each other: pass one of them (shell: pass --checkpoint or "
            "--random-weights)"
        )
    _check_name(named)
    if named.library == "timm":
        file = named.checkpoint or (None if named.random else _timm_file(named))
        return _timm_model(named, None if file is None else read_weights(file), file)
    state = None if named.random else _torchvision_weights(named)
    return _torchvision_model(named, state, named.checkpoint)


def licence_of(named: VisionName) -> str | None:
    """Return the licence of the weights that a name stands for, where the library says it."""
    if named.library == "torchvision" or named.checkpoint is not None or named.random:
        return None
    return getattr(_library("timm").models.get_pretrained_cfg(named.name), "license", None)


def structure(model: nn.Module) -> dict[str, Any] | None:
    """Return what `build` needs as plain data; None for a model that was not built by name."""
    named = getattr(model, NAME_ATTRIBUTE, None)
    images = image_config_of(model)
    if not isinstance(named, str) or images is None:
        return None
    library, _, name = named.partition("/")
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "float32")
    return {"library": library, "class": type(model).__name__, "name": name, "images": images.to_dict(), "dtype": dtype}


def build(saved: dict[str, Any]) -> nn.Module:
    """Return a fresh model for a saved structure, in evaluation mode; ModelError where it does not make sense."""
    library, name = saved.get("library"), saved.get("name")
    if library not in LIBRARIES or not isinstance(name, str):
        raise ModelError(f"saved name: expected a model of {' or '.join(LIBRARIES)}, got {str(name)[:60]!r}")
    images = image_config_from_dict(saved.get("images"))
    dtypes = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}
    dtype = dtypes.get(str(saved.get("dtype")))
    if dtype is None:
        raise ModelError(f"saved dtype: expected one of {', '.join(dtypes)}, got {saved.get('dtype')!r}")
    named = VisionName(library, name)
    _check_name(named)
    sizes = (images.num_classes, len(images.mean))
    model = _timm(named, None, sizes) if library == "timm" else _torchvision(named, sizes)
    labels = _labels(named, model) if images.num_classes == _num_pretrained(named) else ()
    return _finished(model, named, replace(images, labels=labels)).to(dtype)


# ---- both -----------------------------------------------------------------------------------------------------------


def _library(name: str) -> Any:
    try:
        if name == "timm":
            import timm as library
        else:
            import torchvision as library
    except ImportError:
        raise ModelError(f"models of {name} need the package {name}: {install('vision')}") from None
    return library


def _check_name(named: VisionName) -> None:
    """Raise ModelError, with similar names, if the library has no model or no weights of that name."""
    architecture, dot, tag = named.name.partition(".")
    known = _architectures(named.library)
    if architecture not in known:
        near = nearest(architecture, known, 3)
        hint = f"; did you mean {', '.join(f'{named.library}/{n}' for n in near)}?" if near else ""
        if named.library == "torchvision" and architecture in _library("torchvision").models.list_models():
            raise ModelError(f"{named} is no classifier: only those are loaded by name; build it, and pass the module")
        raise ModelError(f"{named.library} has no model {architecture!r}{hint}")
    tags = _tags(named.library, architecture)
    if dot and tag not in tags:
        near = nearest(tag, tags, 1)
        hint = f" (did you mean {named.library}/{architecture}.{near[0]}?)" if near else ""
        listed = ", ".join(tags) if tags else "none"
        raise ModelError(f"{named.library}/{architecture} has no weights {tag!r}; it has {listed}{hint}")


@cache
def _architectures(library: str) -> frozenset[str]:
    module = _library(library)
    names = module.list_models() if library == "timm" else module.models.list_models(module=module.models)
    return frozenset(names)


def _tags(library: str, architecture: str) -> list[str]:
    module = _library(library)
    if library == "timm":
        return [n.partition(".")[2] for n in module.list_pretrained(f"{architecture}.*")]
    return [w.name for w in module.models.get_model_weights(architecture)]


def _num_pretrained(named: VisionName) -> int:
    if named.library == "timm":
        config = _library("timm").models.get_pretrained_cfg(named.name)
        return 0 if config is None else config.num_classes
    weights = _torchvision_entry(named)
    return 0 if weights is None else len(weights.meta["categories"])


def _finished(model: nn.Module, named: VisionName, images: ImageConfig) -> nn.Module:
    setattr(model, NAME_ATTRIBUTE, str(named))
    set_image_config_(model, images)
    return model.eval()


def _labels(named: VisionName, model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the names of each class that the library's own weights of a model have."""
    if named.library == "torchvision":
        weights = _torchvision_entry(named)
        return () if weights is None else tuple((n,) for n in weights.meta["categories"])
    data = _library("timm").data
    subset = data.infer_imagenet_subset(model)
    if subset is None:
        return ()
    info = data.ImageNetInfo(subset)
    words = [info.index_to_description(i).split(", ")[0] for i in range(info.num_classes())]
    return tuple(zip(info.label_names(), words))


def _misfit(error: Exception, named: VisionName, file: Path | None) -> ModelError:
    """Return the error for weights that are not those of a model."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[1:2] or lines[:1])
    said = f"{said[:200]} ..." if len(said) > 200 else said
    return ModelError(f"{file or 'the weights'} does not hold the weights of {named}: {said}; give its own file")


# ---- timm -----------------------------------------------------------------------------------------------------------


def _timm_file(named: VisionName) -> Path:
    """Return the file of a model's weights, fetched from the hub."""
    config = _library("timm").models.get_pretrained_cfg(named.name)
    repository = getattr(config, "hf_hub_id", None)
    if not repository:
        raise ModelError(f"{named} has no weights on the hub: give a file, {HOW}")
    try:
        folder = hub.download(hub.HubName(repository), offline=named.offline, progress=named.progress)
    except ModelError as error:
        why = str(error).partition(": ")[0] if named.offline or hub.is_offline() else str(error)
        raise ModelError(f"{named}: its weights could not be fetched ({why}): {HOW}") from None
    return folder / "model.safetensors"


def _timm_model(named: VisionName, state: dict[str, Tensor] | None, file: Path | None) -> nn.Module:
    """Return a model with these weights; its sizes are those of the weights."""
    timm = _library("timm")
    own = named.checkpoint is not None
    sizes = _timm_sizes(named, state) if own and state is not None else (None, None)
    try:
        model = _timm(named, file if state is not None else None, sizes)
    except (RuntimeError, KeyError, AttributeError, ValueError) as error:
        raise error if isinstance(error, ModelError) else _misfit(error, named, file) from None
    channels = sizes[1] or timm.data.resolve_model_data_config(model)["input_size"][0]
    images = _timm_images(timm, named, model, channels)
    return _finished(model, named, images)


def _timm_sizes(named: VisionName, state: dict[str, Tensor]) -> tuple[int | None, int | None]:
    """Return the numbers of classes and of channels of a file of weights, None where they are not in it."""
    config = _library("timm").models.get_pretrained_cfg(named.name)

    def size(layers: Any, dim: int) -> int | None:
        first = layers[0] if isinstance(layers, tuple | list) else layers
        weight = state.get(f"{first}.weight")
        return weight.shape[dim] if weight is not None and weight.dim() > dim else None

    return size(getattr(config, "classifier", None), 0), size(getattr(config, "first_conv", None), 1)


def _timm(named: VisionName, file: Path | None, sizes: tuple[int | None, int | None]) -> nn.Module:
    """Return a model of timm: with the weights of a file, which timm converts where they are of another library."""
    timm = _library("timm")
    classes, channels = sizes
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    options |= {} if channels is None else {"in_chans": channels}
    overlay: dict[str, Any] = {} if file is None else {"file": str(file), "hf_hub_id": None, "url": ""}
    overlay |= {"num_classes": classes, "label_offset": 0} if file is not None and classes is not None else {}
    if file is not None and channels is not None:
        size = timm.models.get_pretrained_cfg(named.name).input_size[1:]
        overlay["input_size"] = (channels, *size)
    with _seeded():
        return timm.create_model(
            named.name, pretrained=file is not None, pretrained_cfg_overlay=overlay or None, **options
        )


def _timm_images(timm: Any, named: VisionName, model: nn.Module, channels: int) -> ImageConfig:
    """Return how timm prepares images for a model; ModelError for ways that are not supported."""
    config = timm.data.resolve_model_data_config(model)
    size, crop = config["input_size"][1:], config["crop_pct"]
    if size[0] != size[1] or config["crop_mode"] not in ("center", "squash"):
        raise ModelError(f"{named}: images that are not square, or have borders, are not supported")
    mean, std = (config[n] if len(config[n]) == channels else (_mean(config[n]),) * channels for n in ("mean", "std"))
    num_classes = int(model.num_classes)  # type: ignore[arg-type]
    return ImageConfig(
        size=size[0],
        resize=floor(size[0] / crop),
        squash=config["crop_mode"] == "squash",
        interpolation=config["interpolation"],
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        num_classes=num_classes or None,
        labels=_labels(named, model) if num_classes == _num_pretrained(named) else (),
    )


def _mean(numbers: Any) -> float:
    return sum(numbers) / len(numbers)


def _seeded() -> Any:
    """Return a context in which random weights are always the same, and torch's own random numbers stay as they are."""
    from contextlib import contextmanager

    @contextmanager
    def seeded() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield

    return seeded()


# ---- torchvision ----------------------------------------------------------------------------------------------------


def _torchvision_entry(named: VisionName) -> Any:
    """Return torchvision's weights of a name, those that it recommends where the name does not say; None for none."""
    architecture, _, tag = named.name.partition(".")
    entries = _library("torchvision").models.get_model_weights(architecture)
    return entries[tag] if tag else next(iter([entries.DEFAULT] if len(entries) else []), None)


def _torchvision_weights(named: VisionName) -> dict[str, Tensor]:
    """Return the weights of a file, or of torchvision's, downloaded where they are not in torch's cache."""
    if named.checkpoint is not None:
        return read_weights(named.checkpoint)
    entry = _torchvision_entry(named)
    if entry is None:
        raise ModelError(f"{named} has no weights: {HOW}")
    file = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    if not file.is_file():
        _fetch(named, entry.url, file)
    return read_weights(file)


def _fetch(named: VisionName, url: str, file: Path) -> None:
    if named.offline or hub.is_offline():
        raise ModelError(f"{named}: its weights are not in {file.parent}, and the run is offline: {HOW}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([0-9a-f]{8,})\.", file.name)
        torch.hub.download_url_to_file(url, str(file), digest[1] if digest else None, progress=named.progress)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise ModelError(f"{named}: {url} could not be fetched ({first_line(error)}): {HOW}") from None


def _torchvision_model(named: VisionName, state: dict[str, Tensor] | None, file: Path | None) -> nn.Module:
    sizes: tuple[int | None, int | None] = (None, None)
    if state is not None:
        state = {OLD_DENSENET.sub(r"\1\2", n): t for n, t in state.items() if not n.startswith(AUXILIARY)}
        sizes = (_torchvision_classes(named, state), None)
    model = _torchvision(named, sizes)
    if state is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise _misfit(error, named, file) from None
    return _finished(model, named, _torchvision_images(named, model, sizes[0]))


def _torchvision_classes(named: VisionName, state: dict[str, Tensor]) -> int | None:
    """Return the number of classes of weights: the outputs of the last layer, where they are other than 1,000."""
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in _torchvision(named, (None, None)).state_dict().items()}
    last = [n for n in shapes if n.endswith(".weight")][-1]
    return len(state[last]) if last in state and state[last].shape[1:] == shapes[last][1:] else None


def _torchvision(named: VisionName, sizes: tuple[int | None, int | None]) -> nn.Module:
    models = _library("torchvision").models
    architecture = named.name.partition(".")[0]
    if sizes[1] not in (None, 3):
        raise ModelError(f"{named}: models of torchvision read images of 3 channels, got {sizes[1]}")
    options: dict[str, Any] = {} if sizes[0] is None else {"num_classes": sizes[0]}
    plain = PLAIN.get(architecture)
    options |= {} if plain is None else {**plain, "init_weights": False}
    with _seeded():
        return models.get_model(architecture, weights=None, **options)


def _torchvision_images(named: VisionName, model: nn.Module, classes: int | None) -> ImageConfig:
    entry = _torchvision_entry(named)
    if entry is None:
        return ImageConfig(num_classes=classes or 1000)
    preset = entry.transforms()
    pretrained = len(entry.meta["categories"])
    return ImageConfig(
        size=preset.crop_size[0],
        resize=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        num_classes=classes or pretrained,
        labels=_labels(named, model) if classes in (None, pretrained) else (),
    )
