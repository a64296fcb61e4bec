"""Hugging Face models in folders. transformers is imported only inside these functions.

A class is never looked up by a name that a file contains. An Auto class of transformers maps the config to a model
class, whose name must then agree with the file. Remote code is never run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rarefy.common.errors import ModelError, first_line
from rarefy.common.extras import install
from rarefy.model import embedding_modules, own_attention
from rarefy.model.checked_folder import GENERATION, checked_folder, load_error, name_source_, source_of
from rarefy.model.config_names import check_names, without_places
from rarefy.model.construction_limit import ConstructionLimit, Stored, stored_in

# in order of preference where an architecture is in several
AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification",
    "AutoModel",
)
# keys of a config that make transformers fetch or run something; a saved folder needs none of them
CODE_KEYS = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "quantization_config",
    "backbone",
    "use_pretrained_backbone",
    "use_timm_backbone",
)
MAX_TOKENS = 1 << 24  # of a tokenizer
STAMPS = ("model_type", "transformers_version", "dtype", "torch_dtype")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)


def is_folder(path: str | Path) -> bool:
    """Return whether a path is a folder with a Hugging Face config."""
    return (Path(path) / "config.json").is_file()


def is_model(model: nn.Module) -> bool:
    """Return whether a model has a Hugging Face config, without importing transformers."""
    config = getattr(model, "config", None)
    return hasattr(config, "to_dict") and hasattr(config, "model_type")


def is_causal_lm(model: nn.Module) -> bool:
    """Return whether a model predicts the next token: no masked language model, no encoder-decoder."""
    can_generate = getattr(model, "can_generate", None)
    return (
        is_model(model)
        and callable(can_generate)
        and bool(can_generate())
        and not getattr(model.config, "is_encoder_decoder", False)
    )


@contextmanager
def attending(model: Any, attend: Any) -> Iterator[None]:
    """Have a model's attention run by `attend(module, q, k, v, mask, **how)`, without masks, for a while; ModelError
    where a model's attention is its own code, unless own_attention.py has it."""
    _transformers()
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if own_attention.is_known(model):
        with own_attention.replaced(model, attend):
            yield
        return
    before = model.config._attn_implementation
    AttentionInterface.register("rarefy", attend)
    AttentionMaskInterface.register("rarefy", lambda *_, **__: None)
    try:
        model.set_attn_implementation("rarefy")
        yield
    except (ValueError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{type(model).__name__} cannot switch its attention implementation: {first_line(error)}"
        ) from error
    finally:
        model.set_attn_implementation(before)


def no_bars() -> None:
    """Keep transformers from drawing progress bars of its own."""
    _transformers().utils.logging.disable_progress_bar()


def load_folder(path: str | Path, *, meta: bool = False) -> nn.Module:
    """Return the model of a local folder in evaluation mode; with `meta` its skeleton without weights.

    In a folder of sentence-transformers its attribute `rarefy_head` makes embeddings of hidden states, unless that is
    their mean.
    """
    with checked_folder(path) as shown:
        config = _config(shown)
        auto = _auto_class(config, (getattr(config, "architectures", None) or [""])[0])
        try:
            stored = stored_in(shown)
            if meta:  # which folders without weights have, too
                with torch.device("meta"), ConstructionLimit(stored) if stored.tensors else nullcontext():
                    return auto.from_config(config).eval()
            with ConstructionLimit(stored):
                model, info = auto.from_pretrained(
                    shown,
                    local_files_only=True,
                    trust_remote_code=False,
                    dtype="auto",
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except Exception as error:
            raise ModelError(f"{path}: the model does not load: {load_error(error, shown)}") from None
        name_source_(model, shown)
    lost = sorted([*info["missing_keys"], *(str(k) for k in info["mismatched_keys"])])
    if lost:
        example = f"such as {lost[0]}: the copy is incomplete, or config.json is of another model"
        raise ModelError(f"{path}: {len(lost)} weights are missing or of another shape, {example}")
    head = embedding_modules.head_of(Path(path))
    if head is not None:
        setattr(model, embedding_modules.HEAD, head)
    return model.eval()


def load_generation_config_(model: Any, path: str | Path) -> None:
    """Set the generation settings of a model from the folder's file, where there is one that can be read."""
    if not (Path(path) / GENERATION).is_file():
        return
    with suppress(Exception), checked_folder(path) as shown:  # settings only: a damaged file makes it raise anything
        model.generation_config = _transformers().GenerationConfig.from_pretrained(shown, local_files_only=True)
        name_source_(model, shown)


def load_config(path: str | Path) -> Any:
    """Return the config of a local folder; ModelError where there is none, or it requests code that is not here."""
    with checked_folder(path) as shown:
        config = _config(shown)
        name_source_(config, shown)
        return config


def _config(shown: Path) -> Any:
    """Return the config of a folder that `checked_folder` made."""
    try:
        return _transformers().AutoConfig.from_pretrained(shown, local_files_only=True, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # a damaged folder makes transformers raise anything
        raise ModelError(f"{source_of(shown)}: the config is not usable: {load_error(error, shown)}") from None


def load_tokenizer(path: str | Path) -> Any:
    """Return the tokenizer of a local folder, or None where there is none."""
    if not any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return None
    return load_part("AutoTokenizer", path, "tokenizer", _check_tokenizer)


def load_part(auto: str, path: str | Path, what: str, check: Callable[[Any], None] = lambda _: None) -> Any:
    """Return what an Auto class of transformers makes of a local folder; ModelError, naming `what`, if it or a check
    fails."""
    with checked_folder(path) as shown:
        try:
            part = getattr(_transformers(), auto).from_pretrained(shown, local_files_only=True, trust_remote_code=False)
            check(part)
        except BaseException as error:  # a damaged folder makes transformers and tokenizers raise anything
            if not is_raised_by_a_library(error):
                raise
            raise ModelError(f"{path}: the {what} does not load: {load_error(error, shown)}") from None
        name_source_(part, shown)
        return part


def _check_tokenizer(tokenizer: Any) -> None:
    """Try a tokenizer on a text, and raise ValueError for a token so large that a table of all would fill the memory.

    The library tokenizers writes a tokenizer with a line for each number up to the largest.
    """
    tokenizer("a")
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= MAX_TOKENS:
        raise ValueError(f"expected tokens below {MAX_TOKENS:,}, got {largest:,}: tokenizer.json is damaged")


def is_raised_by_a_library(error: BaseException) -> bool:
    """Return whether an error is an exception or a panic of a library in Rust, rather than Ctrl-C."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def structure(model: nn.Module) -> dict[str, Any]:
    """Return what `build` needs: the class's name, the config as JSON, the type of the numbers."""
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "float32")
    config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    return {"library": "transformers", "class": type(model).__name__, "config": config, "dtype": dtype}


def build(saved: dict[str, Any], stored: Stored, *, empty: bool = False) -> nn.Module:
    """Return a fresh model for a saved structure, in evaluation mode.

    Args:
        saved: what `structure` returns.
        stored: what the model's files hold, which limits what the config may ask for.
        empty: its parameters are on the meta device.

    Raises:
        ModelError: the structure makes no sense, or does not fit the files.
    """
    transformers = _transformers()
    values = saved.get("config")
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ModelError("the saved config is not a dict with a model_type")
    if values.get("auto_map"):
        raise ModelError("the saved config requests custom code (auto_map): load it with model=YourClass(...)")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = dtypes.get(str(saved.get("dtype")))
    if dtype is None:
        raise ModelError(f"saved dtype: expected one of {', '.join(dtypes)}, got {saved.get('dtype')!r}")
    options = {k: v for k, v in _without(values, CODE_KEYS).items() if k not in STAMPS}
    check_names(options, "the saved config")
    try:
        config = transformers.AutoConfig.for_model(values["model_type"], **without_places(options))
        auto = _auto_class(config, str(saved.get("class")))
        with ConstructionLimit(stored), without_weights() if empty else nullcontext():
            return auto.from_config(config, dtype=dtype).eval()
    except ModelError:
        raise
    except Exception as error:  # a hostile config makes transformers raise anything
        raise ModelError(
            f"the saved config does not make a {values['model_type']} model: {first_line(error, 300)}"
        ) from None


def without_weights() -> Any:
    """Return a context in which modules are made without their parameters; ModelError without accelerate."""
    try:
        from accelerate import init_empty_weights  # installed with transformers by the extra hf
    except ImportError:
        raise ModelError(f"weights are read one at a time by the package accelerate: {install('hf')}") from None
    return init_empty_weights(include_buffers=False)


def _without(values: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(values, dict):
        return {k: _without(v, keys) for k, v in values.items() if k not in keys}
    return [_without(v, keys) for v in values] if isinstance(values, list) else values


def _auto_class(config: Any, architecture: str) -> Any:
    transformers = _transformers()
    names: list[str] = []
    for auto in (getattr(transformers, name) for name in AUTO):
        known = auto._model_mapping.get(type(config), None)
        names += [c.__name__ for c in (known if isinstance(known, tuple | list) else [known]) if c is not None]
        if architecture in names:
            return auto
    if not architecture:
        raise ModelError(f'config.json names no architecture: add "architectures": [one of {", ".join(names)}]')
    raise ModelError(
        f"{architecture} is not a class that transformers makes of a {config.model_type} config; load it in Python and "
        "pass model=..."
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ModelError(f"Hugging Face models need transformers: {install('hf')}") from None
    return transformers
