"""Rarefy inside transformers: compiled models in its pipelines.

from rarefy.integrations.transformers import pipeline
classify = pipeline("text-classification", model="folder", precision="int8")
classify("The ship sails at noon.")
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rarefy.common.errors import ModelError, RarefyError, first_line, nearest, unknown
from rarefy.common.extras import install
from rarefy.compiler.compile import compile as compile_graph
from rarefy.data import builtin
from rarefy.generation.decoder import decoder
from rarefy.model import hf, hub
from rarefy.model.checked_folder import checked_folder, load_error, name_source_
from rarefy.model.construction_limit import ConstructionLimit
from rarefy.model.embedding_modules import refuse_pickles

try:
    import transformers
except ImportError as error:
    raise ModelError(f"pipelines need transformers: {install('hf')} ({first_line(error)})") from None

from rarefy.integrations.embedding_folder import all_stored
from rarefy.integrations.hf_adapter import OnEngine, adapter
from rarefy.integrations.hf_quantizer import register

register()

EXAMPLE_TEXTS = (  # of two lengths, so that the graph has open sizes and padding
    "The ship sails at noon, and every boat in the harbour follows it out to sea before the wind turns.",
    "Boats leave at midday.",
)
EXAMPLE_TOKENS = 16


def compile(
    model: nn.Module,
    example: Mapping[str, Any] | None = None,
    *,
    precision: str | None = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    **options: Any,
) -> Any:
    """Return a model of transformers that runs on the engine, and is a model of transformers.

    It has the class, config and outputs of the model: `isinstance(fast, PreTrainedModel)`, named outputs, `device`,
    `dtype`, `generate`. Language models get a decoder with a KV cache. Batch sizes and lengths are open.

    Args:
        model: a model of transformers in evaluation mode, on the CPU.
        example: a batch by names; by default texts or images that the tokenizer or image processor prepares, or random
            ids or pixels without them. Language models need none.
        precision: as for `rarefy.compile`, or `rarefy.decoder` for language models.
        tokenizer: the model's tokenizer, for the example.
        image_processor: the model's image processor, for the example.
        **options: more options of `rarefy.compile`: calibrate, ignore, per_layer, solver, tune.

    Returns:
        An object of the model's class with `engine`, the compiled model. `save_pretrained` writes it; AutoModel reads
        it. It cannot be trained or moved to another device.

    Raises:
        ModelError: as `rarefy.compile` and `rarefy.decoder` do, and for other models than those of transformers.

    Cost: that of `rarefy.compile`. The model may be deleted afterwards.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> fast = compile(BertModel(BertConfig(vocab_size=32, **sizes)).eval(), tune=False)
        >>> fast(input_ids=torch.tensor([[3, 1, 4]])).last_hidden_state.shape
        torch.Size([1, 3, 16])
    """
    if isinstance(model, OnEngine):
        raise ModelError(f"{type(model).__name__} is compiled already")
    if not isinstance(model, transformers.PreTrainedModel):
        raise ModelError(f"expected a model of transformers, got {type(model).__name__}: use rarefy.compile")
    if hf.is_causal_lm(model):
        if example is not None or options:
            unused = "example" if example is not None else next(iter(options))
            raise ModelError(f"{unused}= has no effect on a language model: leave it out")
        return adapter(model, decoder(model, precision=precision))
    if example is not None and not isinstance(example, Mapping):
        raise ModelError(f"example: expected a dict of inputs by name, got {type(example).__name__}")
    example = _example(model, tokenizer, image_processor) if example is None else dict(example)
    with _without_cache(model):
        return adapter(model, compile_graph(model, example, precision=precision, **options))


def pipeline(
    task: str,
    model: Any,
    *,
    precision: str | None = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    example: Mapping[str, Any] | None = None,
    compile_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Return a pipeline of transformers whose model runs on the engine.

    Args:
        task: a task of transformers: "feature-extraction", "text-classification", "token-classification", "fill-mask",
            "zero-shot-classification", "image-classification", "text-generation", and others whose model compiles.
        model: a folder of transformers or of Rarefy, compiled or not, a built-in model such as "minilm", or a model.
        precision: as for `rarefy.compile`; None for a compiled folder.
        tokenizer: the tokenizer; by default that of the folder.
        image_processor: the image processor; by default that of the folder.
        example: a batch by names to compile with; see `compile`.
        compile_options: more options of `rarefy.compile`, such as {"calibrate": batches}.
        **options: those of transformers' `pipeline`, such as top_k and batch_size.

    Returns:
        The pipeline of transformers. Its `model` is what `compile` returns.

    Raises:
        ModelError: for an unknown task or folder, a folder without what the task needs, and as `compile` does.

    Cost: that of `rarefy.compile`; seconds less from a compiled folder.

    Example:
        >>> extract = pipeline("feature-extraction", "minilm")
        >>> len(extract("The ship sails at noon.")[0])
        8
    """
    device = options.pop("device", None)
    if device not in (None, -1) and str(device) != "cpu":
        raise ModelError(f"the engine runs on the CPU, got the device {device!r}: leave it out")
    prepared = {"tokenizer": tokenizer, "image_processor": image_processor}
    fast, parts = load(
        model, task=task, precision=precision, example=example, compile_options=compile_options, **prepared
    )
    parts = {name: part for name, part in parts.items() if part is not None}
    if not parts:
        raise ModelError(f"{task} needs a tokenizer or an image processor: pass tokenizer=... or image_processor=...")
    make: Any = transformers.pipeline
    return make(task, model=fast, device="cpu", **parts, **options)


def load(
    model: Any,
    *,
    task: str,
    precision: str | None = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    example: Mapping[str, Any] | None = None,
    compile_options: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Return the compiled model for a task, and the tokenizer and image processor of its folder by name.

    Arguments, errors and cost are those of `pipeline`.
    """
    classes = _auto_classes(task)
    _check_compile_options(compile_options)
    folder = None if isinstance(model, nn.Module) else _folder(model)
    if folder is not None:
        model = _load(folder, classes, task)
        tokenizer = hf.load_tokenizer(folder) if tokenizer is None else tokenizer
        image_processor = _load_image_processor(folder) if image_processor is None else image_processor
    parts = {"tokenizer": tokenizer, "image_processor": image_processor}
    if isinstance(model, OnEngine):
        if precision is not None or example is not None or compile_options:
            raise ModelError("the model is compiled already: leave out precision, example and compile_options")
        return model, parts
    return compile(model, example, precision=precision, **parts, **(compile_options or {})), parts


def _check_compile_options(options: Any) -> None:
    """Raise ModelError for what `compile` does not take as further options."""
    if not isinstance(options, Mapping | None):
        raise ModelError(f"compile_options: expected a dict such as {{'tune': False}}, got {type(options).__name__}")
    own = {"model", "precision", "example", "tokenizer", "image_processor"}  # arguments of `pipeline` itself
    known = [n for n in inspect.signature(compile_graph).parameters if n not in own]
    for name in options or {}:
        if name not in known:
            raise ModelError(unknown("compile option", name, known))


def _auto_classes(task: str) -> tuple[Any, ...]:
    """Return transformers' Auto classes for a task; ModelError for an unknown one."""
    from transformers.pipelines import PIPELINE_REGISTRY

    try:
        return PIPELINE_REGISTRY.check_task(task)[1]["pt"]
    except KeyError:
        known = PIPELINE_REGISTRY.get_supported_tasks()
        near = nearest(str(task), known)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
        raise ModelError(f"transformers {transformers.__version__} has no task {task!r}: {hint}") from None


def _folder(model: Any) -> Path:
    """Return the folder of a model that was named; ModelError where there is none."""
    if not isinstance(model, str | Path):
        raise ModelError(f"expected a folder or a model of transformers, got {type(model).__name__}")
    path = Path(model).expanduser()
    folder = path if path.is_dir() or model not in builtin.MODELS else Path(builtin.model_folder(str(model)))
    if not hf.is_folder(folder):
        kind = "has no config.json" if folder.is_dir() else "does not exist"
        near = nearest(str(model), builtin.MODELS)
        hint = f" (did you mean {near[0]!r}?)" if near and not folder.is_dir() else ""
        if hub.parse_hub_name(str(model)) is not None and not folder.is_dir():
            hint = "; rarefy.model.hub.download(name) returns the folder of a model of the hub"
        raise ModelError(f"{folder} {kind}: expected a model folder, or one of {', '.join(builtin.MODELS)}{hint}")
    return folder


def _load(folder: Path, classes: tuple[Any, ...], task: str) -> Any:
    """Return the model of a folder in the class that a task needs."""
    config = hf.load_config(folder)
    auto = next((c for c in classes if type(config) in c._model_mapping), None)
    if auto is None:
        raise ModelError(f"{task}: transformers has no such model for a {config.model_type} config")
    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    refuse_pickles(folder)
    with checked_folder(folder) as shown:
        try:
            with ConstructionLimit(all_stored(folder, shown), folder):
                model, info = auto.from_pretrained(shown, config=config, output_loading_info=True, **options)
        except RarefyError:
            raise
        except Exception as error:  # a damaged folder makes transformers raise anything
            raise ModelError(f"{folder}: the model does not load: {load_error(error, shown)}") from None
        name_source_(model, shown)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:2])
        raise ModelError(f"{folder} has no weights for {task}: {missing} are missing; give a folder of such a model")
    return model.eval()


def _load_image_processor(folder: Path) -> Any:
    """Return the image processor of a folder, None where there is none."""
    if not (folder / "preprocessor_config.json").is_file():
        return None
    return hf.load_part("AutoImageProcessor", folder, "image processor")


@contextmanager
def _without_cache(model: Any) -> Any:
    """Let a model return no KV cache for a while: one call reads a whole text."""
    before = getattr(model.config, "use_cache", None)
    try:
        if before is not None:
            model.config.use_cache = False
        yield
    finally:
        if before is not None:
            model.config.use_cache = before


def _example(model: Any, tokenizer: Any, image_processor: Any) -> dict[str, Any]:
    """Return a batch of two inputs of a model."""
    if model.main_input_name == "pixel_values":
        return _example_images(model.config, image_processor)
    if model.main_input_name != "input_ids":
        raise ModelError(f"{type(model).__name__} takes {model.main_input_name}: pass example= with a batch by names")
    if tokenizer is not None and getattr(tokenizer, "pad_token", None) is not None:
        batch = dict(tokenizer(list(EXAMPLE_TEXTS), padding=True, return_tensors="pt"))
    else:
        ids = torch.arange(2 * EXAMPLE_TOKENS).view(2, -1) % model.config.get_text_config().vocab_size
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {n: t for n, t in batch.items() if n in inspect.signature(model.forward).parameters}


def _example_images(config: Any, image_processor: Any) -> dict[str, Any]:
    channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    if image_processor is None:
        return {"pixel_values": torch.rand(2, channels, height, width, dtype=torch.float32)}
    image = torch.randint(0, 256, (channels, height, width), dtype=torch.uint8)
    return {"pixel_values": image_processor([image, image], return_tensors="pt")["pixel_values"]}
