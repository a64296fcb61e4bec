"""Which names of functions, classes and files the configuration files of a model may contain.

transformers and sentence-transformers look up such names and call what they find. This is the only place that decides
which they may be; what is in no list here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch.nn.modules import activation

from rarefy.common.errors import ModelError

# of modules.json and of routers: what sentence-transformers itself puts into a model
MODULE_CLASSES = (
    *("Asym", "BoW", "CLIPModel", "CNN", "Dense", "Dropout", "HierarchicalTokenPooling", "LSTM", "LayerNorm"),
    *("LogitScore", "MLMTransformer", "MultiVectorMask", "Normalize", "PhraseTokenizer", "Pooling", "Router"),
    *("SparseAutoEncoder", "SparseStaticEmbedding", "SpladePooling", "StaticEmbedding", "Transformer"),
    *("WeightedLayerPooling", "WhitespaceTokenizer", "WordEmbeddings", "WordWeights"),
)
MODULE_CLASS = re.compile(
    r"sentence_transformers(\.([a-z]+_encoder|multi_vector_encoder|base|sentence_transformer))?\.(models|modules)"
    r"(\.[a-z_]+){0,2}\.(?P<name>[A-Z]\w*)"
)
ACTIVATIONS = frozenset(
    f"torch.nn{place}.{name}"
    for names, module in ((activation.__all__, ".modules.activation"), (["Identity"], ".modules.linear"))
    for name in names
    if name != "MultiheadAttention"
    for place in ("", module)
)
ACTIVATION_KEYS = ("activation_function", "activation_fn", "sbert_ce_default_activation_function")
IMPLEMENTATIONS = ("", "eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")  # those that torch itself has
QUANT_METHODS = ("rarefy", "compressed-tensors", "gptq", "awq", "bitsandbytes", "mxfp4", "fp8")
DTYPE_KEYS = (
    *("dtype", "torch_dtype", "router_dtype", "mel_filters_dtype", "mamba_ssm_cache_dtype", "mamba_ssm_dtype"),
    *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"),
)
DTYPES = (
    *("auto", "float32", "float", "float16", "half", "bfloat16", "float64", "double"),
    *("float8_e4m3fn", "float8_e5m2", "int8", "uint8"),
)
PROCESSOR_KEYS = re.compile(
    r"(slow_|fast_|audio_)?(tokenizer|(image_|video_|audio_)?processor|feature_extractor)_(class|type)"
)
PROCESSOR = re.compile(
    r"[A-Z]\w*(Tokenizer|TokenizerFast|Processor|ProcessorFast|ProcessorPil|FeatureExtractor)"
    r"|TokenizersBackend|PythonBackend|SentencePieceBackend|MistralCommonBackend"
)
METHODS = ("forward", *(f"get_{kind}_features" for kind in ("text", "image", "audio", "video", "vision", "multimodal")))
ARCHITECTURE_KEYS = ("architecture", "backbone")  # names of timm; with a colon or slash those of repositories and files
ARCHITECTURE = re.compile(r"\w[\w.-]*")
# the configs that have timm build their backbone; others ask the hub for a model of its name
TIMM_TYPES = (
    *("timm_backbone", "conditional_detr", "dab-detr", "deformable_detr", "detr", "omdet-turbo", "table-transformer"),
)
# values out of a fixed table: of the task "retrieval" sentence-transformers fetches a config and calls any class
CHOICES = {
    "transformer_task": re.compile("feature-extraction|sequence-classification|text-generation|any-to-any|fill-mask"),
    "mecab_dic": re.compile("unidic_lite|unidic|ipadic"),
    "sudachi_dict_type": re.compile("small|core|full"),
    "ocr_lang": re.compile(r"\w+([+]\w+)*"),
}
# arguments of constructors and of from_pretrained that a file gives; texts among them would be paths, names or code
ARGUMENT_KEYS = re.compile(r"(model|tokenizer|processor|config|backbone)_(args|kwargs)")
TEXT_ARGUMENTS = (*DTYPE_KEYS, "attn_implementation", "padding_side", "truncation_side", "act_layer", "norm_layer")
REFUSED_ARGUMENTS = ("use_kernels", "mistral_format", "weights_only", "pretrained", "state_dict")
FREE_KEYS = ("prompts", "id2label", "label2id", "added_tokens_decoder")  # their own keys are texts of the model
COUNT_KEYS = re.compile(r"(.*_)?(layers?|depths?|blocks?|stages|experts|labels)")
MAX_COUNT = 1 << 17  # that such a key may state: configs of transformers make lists of so many entries
# where a library would read further files, which nobody has checked; options of other programs; unnamed arguments
OTHER_PLACES = (
    *("tokenizer_name_or_path", "processor_name", "audio_tokenizer", "path", "init_inputs"),
    *("mecab_option", "sudachi_config_path", "sudachi_resource_dir", "tesseract_config"),
)
# such texts are left out of what a library sees: models have them as they were where somebody saved them
PLACES = re.compile(
    r"(.*_)?(paths?|files?|filename|urls?|uri|dir|directory|folder|repo|repo_id|hub_id|spm|vocab|merges)"
    r"|rewriting_rules|font"
)


def check_names(values: Any, where: str) -> None:
    """Raise ModelError for a name in a configuration by which a library would call, import or fetch something.

    Args:
        values: the plain data of a config.json, tokenizer_config.json, modules.json or another of these files.
        where: what errors call it.
    """
    _check_backbone(values, where)
    for key, value in _pairs(values):
        rule = _rule(key)
        if rule is not None:
            rule(key, value, where)
        if isinstance(value, dict):
            _check_backbone(value, where)


def without_places(values: Any) -> Any:
    """Return the plain data of a configuration without names of files, folders, addresses and repositories.

    Libraries open such files, wherever they are. What a model needs lies in its folder under names that they know.

    Example:
        >>> without_places({"model_type": "bert", "vocab_file": "/etc/passwd", "vocab_size": 10})
        {'model_type': 'bert', 'vocab_size': 10}
    """
    if isinstance(values, list):
        return [without_places(v) for v in values]
    if not isinstance(values, dict):
        return values
    return {
        key: value if key in FREE_KEYS else without_places(value)
        for key, value in values.items()
        if not (PLACES.fullmatch(key) and _is_place(key, value))
    }


def _is_place(key: str, value: Any) -> bool:
    """Return whether a value is a name or names; a list of words is the vocabulary itself."""
    is_data = key.endswith(("vocab", "merges"))
    return isinstance(value, str) or (not is_data and next(_texts(value), None) is not None)


def check_module_class(name: str, where: str) -> None:
    """Raise ModelError for a class that is no module of sentence-transformers."""
    match = MODULE_CLASS.fullmatch(name)
    if match is None or match["name"] not in MODULE_CLASSES:
        raise ModelError(f"{where}: {name[:80]!r} is no module of sentence-transformers; code of a folder is never run")


def _rule(key: str) -> Callable[[str, Any, str], None] | None:
    if key.endswith("_implementation"):
        return _implementation
    if key.endswith("_type") or key.endswith("_class"):
        return _processor_class if PROCESSOR_KEYS.fullmatch(key) else None
    if ARGUMENT_KEYS.fullmatch(key):
        return _arguments
    return RULES.get(key, _count if COUNT_KEYS.fullmatch(key) else None)


def _implementation(key: str, value: Any, where: str) -> None:
    for text in _texts(value):
        if text not in IMPLEMENTATIONS:
            raise ModelError(
                f"{where}: the config requests custom attention code ({text[:80]}); remove {key.lstrip('_')}, or use "
                f"one of {', '.join(IMPLEMENTATIONS[1:])}"
            )


def _activation(key: str, value: Any, where: str) -> None:
    # names without a dot are those of a fixed table in transformers, such as "gelu"
    if value is not None and (not isinstance(value, str) or ("." in value and value not in ACTIVATIONS)):
        raise ModelError(f"{where}: {key}: expected a class of torch.nn, got {str(value)[:80]!r}, no activation")


def _dtype(key: str, value: Any, where: str) -> None:
    for text in _texts(value):
        if text.removeprefix("torch.") not in DTYPES:
            raise ModelError(f"{where}: {key}: expected a type such as float32 or bfloat16, got {text[:80]!r}")


def _processor_class(key: str, value: Any, where: str) -> None:
    for text in _texts(value):
        if text.startswith("sentence_transformers."):
            check_module_class(text, where)
        elif not PROCESSOR.fullmatch(text) or not _is_processor(text):
            raise ModelError(
                f"{where}: {key}: expected the class of a tokenizer or processor of transformers, got {text[:80]!r}: "
                "correct the name, or remove it"
            )


def _is_processor(name: str) -> bool:
    """Return whether a name is that of a tokenizer or processor in transformers, or of nothing there."""
    import transformers
    from transformers import BaseVideoProcessor, FeatureExtractionMixin, ImageProcessingMixin, ProcessorMixin

    kinds = (
        transformers.PreTrainedTokenizerBase, ProcessorMixin, ImageProcessingMixin, FeatureExtractionMixin,
        BaseVideoProcessor,
    )  # fmt: skip
    kind = getattr(transformers, name, None)
    return kind is None or bool(getattr(kind, "is_dummy", False)) or issubclass(kind, kinds)


def _quantization(key: str, value: Any, where: str) -> None:
    method = value.get("quant_method") if isinstance(value, dict) else value
    if method is not None and method not in QUANT_METHODS:
        raise ModelError(
            f"{where}: {key}: expected quant_method to be one of {', '.join(QUANT_METHODS)}, got {str(method)[:80]!r}"
        )


def _modalities(key: str, value: Any, where: str) -> None:
    for name, method in _pairs(value):
        if name == "method" and method not in METHODS:
            raise ModelError(f"{where}: {key}: expected a method out of {', '.join(METHODS)}, got {str(method)[:80]!r}")


def _architecture(key: str, value: Any, where: str) -> None:
    if isinstance(value, str) and not ARCHITECTURE.fullmatch(value):
        raise ModelError(f"{where}: {key}: expected the name of an architecture of timm, got {value[:80]!r}")


def _check_backbone(values: Any, where: str) -> None:
    """Raise ModelError for a backbone by name in a config that would ask the hub for a model of this name."""
    if not isinstance(values, dict) or values.get("backbone") is None or values.get("backbone_config") is not None:
        return
    by_timm = values.get("use_timm_backbone", True) and not values.get("backbone_kwargs")
    if values.get("model_type") not in TIMM_TYPES or not by_timm:
        raise ModelError(
            f"{where}: backbone: {str(values['backbone'])[:80]!r} would be looked up on the hub: state its "
            "backbone_config"
        )


def _choice(key: str, value: Any, where: str) -> None:
    if value is not None and not (isinstance(value, str) and CHOICES[key].fullmatch(value)):
        raise ModelError(f"{where}: {key}: expected {CHOICES[key].pattern}, got {str(value)[:80]!r}")


def _modules(key: str, value: Any, where: str) -> None:  # of a router: classes by the names of folders
    for text in _texts(value):
        if "." in text:
            check_module_class(text, where)


def _arguments(key: str, value: Any, where: str) -> None:
    for name, argument in _pairs(value):
        text = isinstance(argument, str) and name not in TEXT_ARGUMENTS and not name.isdigit()
        if text or (isinstance(argument, dict) and argument) or (argument and name in REFUSED_ARGUMENTS):
            raise ModelError(f"{where}: {key}: the argument {name!r} is not accepted from a file: remove it")


def _count(key: str, value: Any, where: str) -> None:
    for number in [value, *(v for _, v in _pairs(value))]:
        if isinstance(number, int | float) and not number <= MAX_COUNT:
            raise ModelError(f"{where}: {key}: expected at most {MAX_COUNT:,}, got {number:,}: the file is damaged")


def _other_place(key: str, value: Any, where: str) -> None:
    if value:
        raise ModelError(f"{where}: {key}: files of another place are not read ({str(value)[:80]!r}): remove it")


RULES: dict[str, Callable[[str, Any, str], None]] = {
    **dict.fromkeys(ACTIVATION_KEYS, _activation),
    **dict.fromkeys(DTYPE_KEYS, _dtype),
    **dict.fromkeys(ARCHITECTURE_KEYS, _architecture),
    **dict.fromkeys(OTHER_PLACES, _other_place),
    **dict.fromkeys(CHOICES, _choice),
    "quantization_config": _quantization,
    "modality_config": _modalities,
    "types": _modules,
}


def _pairs(values: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of all objects in plain data, and the indices and values of all lists."""
    waiting = [values]
    while waiting:
        data = waiting.pop()
        items = enumerate(data) if isinstance(data, list) else data.items() if isinstance(data, dict) else ()
        for key, value in items:
            yield str(key), value
            if isinstance(value, dict | list) and key not in FREE_KEYS:
                waiting.append(value)


def _texts(value: Any) -> Iterator[str]:
    """Yield a value if it is a text, and all texts inside of it."""
    return (text for text in [value, *(v for _, v in _pairs(value))] if isinstance(text, str))
