"""Tokenizers of transformers as metadata of GGUF files, and back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rarefy.common.errors import ModelError, first_line
from rarefy.formats import gguf_file
from rarefy.model import hf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {  # how a tokenizer splits text -> `tokenizer.ggml.pre`
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (LLAMA3,): "llama-bpe",
    (QWEN2,): "qwen2",
    (TEKKEN,): "tekken",
}
MAX_TOKEN = 1024  # characters
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")  # digits one by one, then as GPT-2
TRANSFORMERS_KEYS = {  # the file's key -> transformers' name for it
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
    "add_space_prefix": "add_prefix_space",
}
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}


def metadata(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Return the keys of a GGUF file for a tokenizer, after "tokenizer.".

    Args:
        tokenizer: a fast tokenizer of transformers with a BPE model: of bytes, as GPT-2's, or of characters with bytes
            for the others, as Llama 2's.
        vocab_size: rows of the model's embedding; tokens are filled up to it.

    Raises:
        ModelError: llama.cpp has no such tokenizer.
    """
    spec = _specification(tokenizer)
    model, added = spec["model"], {t["id"]: t for t in spec.get("added_tokens", [])}
    by_id = {i: text for text, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    if max(by_id) >= vocab_size:
        raise ModelError(f"the tokenizer has {max(by_id) + 1:,} tokens, the model's embedding {vocab_size:,} rows")
    of_bytes = not model.get("byte_fallback")
    kinds = [_kind(by_id.get(i), added.get(i), i == tokenizer.unk_token_id, of_bytes) for i in range(vocab_size)]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    keys: dict[str, Any] = {
        "ggml.model": "gpt2" if of_bytes else "llama",
        "ggml.pre": _pre_tokenizer(spec) if of_bytes else "default",
        "ggml.tokens": [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "ggml.token_type": kinds,
    }
    if of_bytes:
        keys["ggml.merges"] = merges
    else:
        keys["ggml.scores"] = _scores(keys["ggml.tokens"], merges)
        keys["ggml.add_space_prefix"] = _adds_space(spec)
    ids = {n: getattr(tokenizer, attribute) for n, attribute in SPECIAL.items()}
    keys |= {f"ggml.{n}_token_id": i for n, i in ids.items() if i is not None and i < vocab_size}
    encoded = tokenizer("a")["input_ids"]  # perhaps nothing
    keys["ggml.add_bos_token"] = ids["bos"] is not None and encoded[:1] == [ids["bos"]]
    keys["ggml.add_eos_token"] = ids["eos"] is not None and encoded[-1:] == [ids["eos"]]
    template = getattr(tokenizer, "chat_template", None)
    template = template.get("default") if isinstance(template, dict) else template
    return keys | ({"chat_template": template} if template else {})


def _specification(tokenizer: Any) -> dict[str, Any]:
    """Return the contents of the tokenizer's tokenizer.json."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = {} if backend is None else json.loads(backend.to_str())
    kind = spec.get("model", {}).get("type")
    if kind != "BPE":
        raise ModelError(
            f"GGUF files hold tokenizers with a BPE model, not {kind or type(tokenizer).__name__}: pass "
            "tokenizer=None for a file without one"
        )
    return spec


def _kind(text: str | None, added: dict[str, Any] | None, unknown: bool, of_bytes: bool) -> int:
    if text is None:
        return UNUSED
    if unknown and not of_bytes:
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    is_byte = not of_bytes and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return BYTE if is_byte else NORMAL


def _pre_tokenizer(spec: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer splits text before its merges."""
    steps = spec.get("pre_tokenizer") or {}
    split = tuple(_step(s) for s in steps.get("pretokenizers", [steps]))
    split = tuple(s for s in split if s)
    if split not in PRE_TOKENIZERS:
        raise ModelError(
            f"the tokenizer splits text in a way that has no known name in llama.cpp ({', '.join(split)[:200]}): pass "
            "tokenizer=None for a file without one"
        )
    return PRE_TOKENIZERS[split]


def _step(step: dict[str, Any]) -> str:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes" if step.get("use_regex") else ""  # without, only a change of letters
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step["pattern"].get("Regex") or str(step["pattern"])
    return str(kind)


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return scores with which llama.cpp merges in the order of the merges: the sooner, the higher."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [float(-ranks.get(t, len(merges)) if len(t) > 1 else 0) for t in tokens]


def _adds_space(spec: dict[str, Any]) -> bool:
    """Return whether a tokenizer puts a blank before the text."""
    normalizer, pre = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *pre.get("pretokenizers", [pre])]
    return any(
        s.get("type") == "Prepend" or (s.get("type") == "Metaspace" and s.get("prepend_scheme") != "never")
        for s in steps
    )


# ---- reading ------------------------------------------------------------------------------------------------------


def files(path: str | Path) -> dict[str, bytes]:
    """Return the files of the tokenizer of a GGUF file, as transformers writes them; {} for files without one.

    Raises:
        ModelError: the tokenizer is damaged, or of a kind that transformers does not build.
    """
    file = gguf_file.read(path)
    tokenizer = _tokenizer(file)
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {f.name: f.read_bytes() for f in Path(folder).iterdir() if f.name in hf.TOKENIZER_FILES}


def load(path: str | Path) -> Any:
    """Return the tokenizer of a GGUF file, of transformers, with its chat template; None for files without one."""
    return _tokenizer(gguf_file.read(path))


def _tokenizer(file: gguf_file.GgufFile) -> Any:
    keys = {n.removeprefix("tokenizer.ggml."): v for n, v in file.metadata.items() if n.startswith("tokenizer.ggml.")}
    if keys.get("model") in (None, "none", "no_vocab"):
        return None
    _check_tokenizer(file, keys)
    values = {new: keys[old] for old, new in TRANSFORMERS_KEYS.items() if old in keys}
    name = str(file.metadata.get("general.architecture"))
    try:
        from tokenizers import pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

        backend, _ = convert_gguf_tokenizer(name, values)
        if keys["model"] == "gpt2" and keys.get("pre") in SINGLE_DIGITS:
            plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])  # type: ignore[assignment]
        tokens = keys["tokens"]
        ids = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id"}
        ids |= {"pad_token": "padding_token_id"}
        special = {n: tokens[keys[k]] for n, k in ids.items() if k in keys}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_with_ends(backend, keys, special), **special)
        template = file.metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            tokenizer.chat_template = template
        return tokenizer
    except BaseException as error:  # a damaged vocabulary makes transformers and tokenizers raise anything
        if not hf.is_raised_by_a_library(error):
            raise
        raise ModelError(f"{file.path}: the tokenizer cannot be built: {first_line(error)}") from None


def _with_ends(backend: Any, keys: Mapping[str, Any], special: Mapping[str, str]) -> Any:
    """Return the tokenizer so that it adds the tokens at the ends of texts that the file asks for, and no others."""
    from tokenizers import Tokenizer, processors

    start = keys.get("add_bos_token", keys["model"] == "llama") and "bos_token" in special
    end = keys.get("add_eos_token", False) and "eos_token" in special
    used = [(special[f"{n}_token"], keys[f"{n}_token_id"]) for n, on in (("bos", start), ("eos", end)) if on]
    parts = [*[special["bos_token"]] * bool(start), "$A", *[special["eos_token"]] * bool(end)]
    backend = Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), "post_processor": None}))
    if used:
        backend.post_processor = processors.TemplateProcessing(single=" ".join(parts), special_tokens=used)
    return backend


def _check_tokenizer(file: gguf_file.GgufFile, keys: Mapping[str, Any]) -> None:
    """Raise ModelError unless the arrays of a tokenizer fit each other."""
    tokens, problems = keys.get("tokens"), []
    texts = isinstance(tokens, list) and bool(tokens) and all(isinstance(t, str) for t in tokens)
    count = len(tokens) if texts and isinstance(tokens, list) else 0
    if not texts or len(set(tokens or ())) != count or max(map(len, tokens)) > MAX_TOKEN:  # type: ignore[arg-type]
        problems.append(f"tokens must be different texts of at most {MAX_TOKEN} characters")
    for name, kind in (("scores", float), ("token_type", int)):
        values = keys.get(name)
        if values is not None and (
            not isinstance(values, list) or len(values) != count or any(type(v) is not kind for v in values)
        ):
            problems.append(f"{name} must be a list of {count} numbers")
    merges = keys.get("merges")
    if merges is not None and not (
        isinstance(merges, list) and all(isinstance(m, str) and m.count(" ") == 1 for m in merges)
    ):
        problems.append("merges must be pairs of texts")
    for name, value in keys.items():
        if name.endswith("_token_id") and (type(value) is not int or not 0 <= value < count):
            problems.append(f"{name} must be one of {count} tokens, got {str(value)[:40]}")
    if problems:
        raise ModelError(f"{file.path}: the tokenizer is damaged: {problems[0]}")
