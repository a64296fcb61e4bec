"""`SentenceTransformer` and `CrossEncoder` of sentence-transformers with the transformer on the engine.

from rarefy.integrations.sentence_transformers import SentenceTransformer
model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2", precision="int8")
embeddings = model.encode(["The ship sails at noon.", "Boats leave at midday."])
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rarefy.checkpoint.load import load
from rarefy.checkpoint.save import save
from rarefy.common.atomic_io import INDEX, atomic_folder, container_errors
from rarefy.common.errors import ContainerError, DataError, ModelError, RarefyError, RecipeError, first_line, unknown
from rarefy.common.extras import install
from rarefy.compiler.compile import compile
from rarefy.compiler.executor import Compiled
from rarefy.compiler.layer_precision import PRECISIONS
from rarefy.data.text_pairs import token_batches
from rarefy.integrations.compiled_transformer import CompiledTransformer, tensor_inputs
from rarefy.integrations.embedding_folder import (
    ENGINE,
    MARKER,
    NOTE,
    all_stored,
    check_folder,
    config_labels,
    copy_missing,
    dense_hashes,
    dense_stamps,
    missing_file,
    note_bytes,
    read_note,
    resolve,
)
from rarefy.model.checked_folder import check_modules, checked_folder, load_error, name_source_
from rarefy.model.construction_limit import ConstructionLimit
from rarefy.model.embedding_modules import HEAD, apply_modules
from rarefy.pipeline.compress import compress_

try:
    import sentence_transformers as st
    from sentence_transformers.base.modules import Transformer
except ImportError as error:
    raise ModelError(
        f"embedding models need sentence-transformers 6 or later: {install('embeddings')} ({first_line(error, 100)})"
    ) from None

TASKS = ("feature-extraction", "sequence-classification")
# arguments that say what is downloaded, and how `hub.download` calls them
HUB = {"revision": "revision", "token": "token", "local_files_only": "offline", "cache_folder": "cache_folder"}
REFUSED = {
    "backend": "the engine is the backend",
    "trust_remote_code": "code of a model's folder is never run",
    "modules": "give the folder or the name of a model",
    "device": "the engine runs on the CPU",
}
# of several lengths, as texts are: what `compile` compares outputs on, and times
EXAMPLES = [
    "The ship sails at noon.",
    "A cat sat on the mat and looked at the birds outside.",
    "She opened the letter.",
    "Rain is expected in the north for most of the week, with sunny spells in the south and strong winds at the coast.",
]
TOKENS = 128  # of texts that a recipe is calibrated on
Make = Callable[[Any, str], nn.Module]  # of a config and a task


class _OnEngine:
    """What both classes share: the base class loads the model, then its transformers are compiled."""

    default_huggingface_organization: str | None
    _module_classes: Any

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str],
        precision: str | None = None,
        *,
        recipe: Any = None,
        data: Any = None,
        tune: bool = True,
        **options: Any,
    ):
        _check_options(precision, recipe, data, options)
        hub = {HUB[name]: options.pop(name) for name in HUB if options.get(name) is not None}
        folder = resolve(model_name_or_path, self.default_huggingface_organization, **hub).absolute()
        check_folder(folder)
        note = read_note(folder) if recipe is None else None
        if note is not None and precision in (None, note.precision) and note.dense != dense_hashes(folder):
            warnings.warn(
                f"{folder}: the dense weights have changed since the model was compiled: it is compiled again",
                stacklevel=3,
            )
            note = None
        if note is not None and precision not in (None, note.precision):
            note = None
        changes = _changes_of_model(folder, options)
        if changes and (folder / INDEX).is_file():
            raise ModelError(f"{changes[0]} has no effect on {folder}, which holds a compressed model: leave it out")
        note = None if changes else note  # it was compiled without them
        self.precision = precision or (note.precision if note is not None else "int8")
        self.source_folder = folder
        self.receipt = None
        self.dense_stamps = dense_stamps(_module_folder(folder))
        make = _maker(folder, note is not None)
        if make is not None:
            self._module_classes = _classes(folder, make)
        self._load_dense(folder, options)
        if make is not None:
            first: Any = next(iter(self.children()))  # type: ignore[attr-defined]
            first.__class__ = Transformer  # as it is saved
            del self._module_classes
        for module in list(self.modules()):  # type: ignore[attr-defined]
            if isinstance(module, Transformer) and not isinstance(module.model, CompiledTransformer):
                self._compile_(module, recipe, data, tune)
        if not any(isinstance(m, CompiledTransformer) for m in self.modules()):  # type: ignore[attr-defined]
            raise ModelError(f"{folder} has no transformer to compile: use sentence-transformers itself")

    def _load_dense(self, folder: Path, options: dict[str, Any]) -> None:
        """Let the base class load the folder; what it raises becomes a ModelError of one line."""
        options["model_kwargs"] = {**(options.get("model_kwargs") or {}), "use_safetensors": True}
        with checked_folder(folder) as shown:
            try:
                with ConstructionLimit(all_stored(folder, shown), folder):
                    super().__init__(str(shown), device="cpu", local_files_only=True, **options)  # type: ignore[call-arg]
            except RarefyError:
                raise
            except Exception as error:  # a damaged folder makes it raise anything
                if isinstance(error, TypeError) and "unexpected keyword" in str(error):
                    raise
                damage = missing_file(folder)
                hint = "" if damage is None else f"; {damage}: copy it again"
                raise ModelError(f"{folder}: the model does not load: {load_error(error, shown)}{hint}") from error
            for module in self.modules():  # type: ignore[attr-defined]
                name_source_(module, shown)
                name_source_(getattr(module, "processor", None), shown)
        self.eval()  # type: ignore[attr-defined]

    def _compile_(self, module: Transformer, recipe: Any, data: Any, tune: bool) -> None:
        """Compress a module's transformer by the recipe, and put the compiled one in its place."""
        dense: Any = module.model
        _check_transformer(module)
        if recipe is not None:
            heads = partial(apply_modules, list(self.children())[1:])  # type: ignore[attr-defined]
            dense.__dict__[HEAD] = heads
            batches = _batches(data, module)
            self.receipt = compress_(dense, recipe, batches, tokenizer=module.tokenizer)
            del dense.__dict__[HEAD]
        try:
            example = _example(module, self)
        except Exception as error:  # damaged settings make it raise anything
            raise ModelError(f"{self.source_folder}: the model does not run on a text: {first_line(error)}") from error
        compiled = compile(dense, example, precision=self.precision, tune=tune)
        is_first = module is next(iter(self.children()))  # type: ignore[attr-defined]
        on_disk = recipe is None and is_first and not (self.source_folder / INDEX).is_file()
        where = _module_folder(self.source_folder) if on_disk else None
        module.model = CompiledTransformer(  # type: ignore[assignment]
            compiled, dense.config, dense=None if on_disk else dense, dense_folder=where
        )

    def save_pretrained(self, path: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        """Write a folder that sentence-transformers loads, with the compiled model beside its dense weights: `save`."""
        self.save(path, *args, **options)

    def save(self, path: str | os.PathLike[str], *args: Any, overwrite: bool = False, **options: Any) -> None:
        """Write a folder that sentence-transformers loads, with the compiled model beside its dense weights.

        All files of the folder that the model was loaded from are kept, but for other forms of its weights. This class
        loads such a folder without compiling. It appears whole or not at all.

        Args:
            path: the folder.
            *args: those of sentence-transformers.
            overwrite: replace a folder that this method wrote. An empty one is always replaced.
            **options: those of sentence-transformers.

        Raises:
            ContainerError: if the folder exists or cannot be written, or the dense weights have changed since the model
                was loaded.
        """
        if not isinstance(path, str | os.PathLike) or not str(path):
            raise ContainerError(f"expected the path of a folder, got {path!r}")
        path = Path(path).expanduser()
        overwrite = overwrite or (path.is_dir() and not any(path.iterdir()))
        with atomic_folder(path, overwrite=overwrite, marker=MARKER) as partial_folder, container_errors(Path(path)):
            super().save(str(partial_folder), *args, **options)  # type: ignore[misc]
            copy_missing(self.source_folder, partial_folder)
            first: Any = next(iter(self.children()))  # type: ignore[attr-defined]
            engine = getattr(first, "model", None)
            if isinstance(engine, CompiledTransformer):
                where = engine.dense_folder
                if engine.dense is None and where is not None and dense_stamps(where) != self.dense_stamps:
                    raise ContainerError(f"{where}: the weights have changed since the model was loaded: load it again")
                note = note_bytes(self.precision, partial_folder)
                save(engine.compiled, partial_folder / ENGINE, files={NOTE: note})

    def start_multi_process_pool(self, target_devices: list[str] | None = None) -> dict[str, Any]:
        """Start processes that `encode(pool=...)` or `predict(pool=...)` divide their inputs among.

        Each process gets its part of the threads.

        Args:
            target_devices: "cpu" for each process; by default four.

        Returns:
            What `pool` takes.

        Raises:
            ModelError: for devices other than the CPU.
        """
        for device in target_devices or ():
            _check_device(device, "pass 'cpu' for each process")
        self.num_workers = len(target_devices or ()) or 4
        return super().start_multi_process_pool(target_devices)  # type: ignore[misc]

    @classmethod
    def _multi_process_worker(cls, target_device: str, model: Any, *queues: Any) -> None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // model.num_workers))
        super()._multi_process_worker(target_device, model, *queues)  # type: ignore[misc]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model: it is on the CPU. Raises ModelError for another device."""
        device = args[0] if args else kwargs.get("device")
        if isinstance(device, str | int | torch.device):
            _check_device(device)
        return super().to(*args, **kwargs)  # type: ignore[misc]

    def cuda(self, device: Any = None) -> Any:
        """Raise ModelError: the engine runs on the CPU."""
        _check_device("cuda" if device is None else device)

    def _resolve_inference_device(self, device: Any) -> torch.device:
        """Return the device of `encode` and `predict`; ModelError for another one than the CPU."""
        _check_device(device)
        return super()._resolve_inference_device(device)  # type: ignore[misc]


class SentenceTransformer(_OnEngine, st.SentenceTransformer):
    """A `sentence_transformers.SentenceTransformer` whose transformer runs on the engine.

    It does all that its base class does: prompts, pooling, dense layers, normalization, truncated dimensions,
    evaluators, several processes. Results are those of the base class, to the precision. Padding is not computed.

    Args:
        model_name_or_path: a folder, a built-in name such as "minilm", or a name of the hub.
        precision: "fp32", "bf16", "int16" or "int8"; see `rarefy.compile`. None: that of a folder that
            `save_pretrained` wrote, "int8" for others.
        recipe: of `rarefy.compress_`, to compress the transformer before it is compiled. Its receipt is `receipt`.
        data: for the recipe: texts, or what `compress_` takes.
        tune: whether `rarefy.compile` times kernels.
        **options: those of the base class, such as prompts, truncate_dim, similarity_fn_name, processor_kwargs.

    Raises:
        RarefyError: for a name without model, a folder that is none, and options that have no effect.

    Cost: that of `rarefy.compile`, some seconds; a folder that `save_pretrained` wrote is not compiled again. Memory:
    the packed weights; with a recipe, or from a folder that `rarefy compress` wrote, the dense ones too.

    Example:
        >>> from rarefy.data import builtin
        >>> model = SentenceTransformer(builtin.model_folder("minilm"), "fp32", tune=False)
        >>> model.encode(["The ship sails at noon.", "Boats leave at midday."]).shape
        (2, 384)
    """


class CrossEncoder(_OnEngine, st.CrossEncoder):
    """A `sentence_transformers.CrossEncoder` whose transformer runs on the engine: `predict` and `rank`.

    Arguments, errors and cost are those of `SentenceTransformer` here; `**options` are those of the base class, such as
    num_labels, max_length, activation_fn.
    """


def _check_device(device: Any, hint: str = "leave it out") -> None:
    """Raise ModelError for another device than the CPU; None is none."""
    try:
        is_cpu = device is None or torch.device(device).type == "cpu"
    except (RuntimeError, TypeError, AssertionError):  # torch knows no such device, or was built without it
        is_cpu = False
    if not is_cpu:
        raise ModelError(f"the engine runs on the CPU, got the device {str(device)!r}: {hint}")


def _check_options(precision: Any, recipe: Any, data: Any, options: dict[str, Any]) -> None:
    """Raise for options that are unknown or have no effect."""
    if precision is not None and (not isinstance(precision, str) or precision not in PRECISIONS):
        raise ModelError(unknown("precision", precision, PRECISIONS))
    if data is not None and recipe is None:
        raise RecipeError("data has no effect without recipe: give one, such as recipe='embeddings-fast'")
    for name, why in REFUSED.items():
        value = options.pop(name, None)
        if value not in (None, False) and not (name == "device" and str(value) == "cpu"):
            raise ModelError(f"{name}: {why}; leave it out")
    if (options.get("model_kwargs") or {}).get("device_map") is not None:
        raise ModelError("model_kwargs: the engine runs on the CPU; leave device_map out")


def _changes_of_model(folder: Path, options: dict[str, Any]) -> list[str]:
    """Return the names of options that make another model than the folder's own."""
    names = [name for name in ("model_kwargs", "config_kwargs") if options.get(name)]
    labels = options.get("num_labels")
    return [*names, *(["num_labels"] if labels is not None and labels != config_labels(folder) else [])]


def _check_transformer(module: Transformer) -> None:
    """Raise ModelError for a transformer that is not called with text alone."""
    if module.transformer_task not in TASKS:
        raise ModelError(
            f"the task {module.transformer_task!r} is not supported, only {', '.join(TASKS)}: use "
            "sentence-transformers itself"
        )
    text: Any = module.modality_config.get("text")
    if text is None or text["method"] != "forward":
        raise ModelError(f"{type(module.model).__name__} takes no text: use sentence-transformers itself")


def _batches(data: Any, module: Transformer) -> Any:
    """Return the data of a recipe; texts as batches of tokens."""
    if isinstance(data, str):
        raise DataError("data: expected texts or batches, got one text; a recipe names files itself")
    if isinstance(data, Iterable) and not hasattr(data, "keys"):
        data = list(data)
        wrong = [type(item).__name__ for item in data if isinstance(item, int | float | bytes | None)]
        if wrong:
            raise DataError(f"data: expected texts or batches, got {wrong[0]} among them")
        if data and all(isinstance(text, str) for text in data):
            return token_batches(data, module.tokenizer, batch=8, tokens=min(TOKENS, module.max_seq_length or TOKENS))
    return data


def _example(module: Transformer, model: Any) -> dict[str, Any]:
    """Return what a module calls its transformer with, for a few texts, or pairs of them."""

    class Recorder(nn.Module):
        def __init__(self, dense: Any):
            super().__init__()
            self.dense, self.config = dense, dense.config

        def forward(self, **inputs: Any) -> Any:
            self.inputs = inputs
            return self.dense(**inputs)

    pairs = list(zip(EXAMPLES, reversed(EXAMPLES)))
    texts: Any = pairs if isinstance(model, st.CrossEncoder) else EXAMPLES
    dense: Any = module.model
    recorder = Recorder(dense)
    module.model = recorder  # type: ignore[assignment]
    try:
        with torch.no_grad():
            module(module.preprocess(texts))
    finally:
        module.model = dense
    dense.config.return_dict = True
    if recorder.inputs.get("output_hidden_states"):
        dense.config.output_hidden_states = True
    declared = inspect.signature(dense.forward).parameters  # what is not, the model ignores
    return {n: value for n, value in tensor_inputs(recorder.inputs).items() if n in declared}


def _module_folder(folder: Path) -> Path:
    """Return where the weights of the first module are."""
    entries = check_modules(folder)
    return folder / entries[0]["path"] if entries else folder


def _maker(folder: Path, compiled: bool) -> Make | None:
    """Return what makes the transformer of a folder's first module without transformers, None for ordinary folders."""
    if compiled:
        packed = folder / ENGINE
        return lambda config, _: CompiledTransformer(
            _load_compiled(packed), config, dense_folder=_module_folder(folder), folder=packed
        )
    return partial(_compressed, folder) if (folder / INDEX).is_file() else None


def _load_compiled(folder: Path) -> Compiled:
    model = load(folder)
    if not isinstance(model, Compiled):
        raise ModelError(f"{folder} holds no compiled model: delete it to compile the model again")
    return model


def _compressed(folder: Path, config: Any, task: str) -> nn.Module:
    """Return the transformer in a folder that `rarefy compress` wrote."""
    model = load(folder)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{folder} holds a compiled model without its tokenization: save_pretrained of this class writes one that "
            "loads"
        )
    return getattr(model, "base_model", model) if task == "feature-extraction" else model


def _classes(folder: Path, make: Make) -> dict[str, type[nn.Module]]:
    """Return the class that is loaded in place of the transformer, by the name that modules.json has for it.

    Raises:
        ModelError: if the folder does not say what its modules are.
    """
    entries = check_modules(folder)
    if not entries or not entries[0]["type"].endswith(".Transformer"):
        raise ModelError(
            f"{folder} has no modules.json that begins with a Transformer: compress the folder of a model of "
            "sentence-transformers again"
        )

    class Loaded(Transformer):
        """A transformer that reads no dense weights."""

        def _load_model(self, model_name_or_path: str, transformer_task: Any, config: Any, *_: Any, **__: Any) -> Any:
            return make(config, transformer_task)

    return {entries[0]["type"]: Loaded}
