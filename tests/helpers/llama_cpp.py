"""llama.cpp as an oracle, through the C interface that `bench/language.py` declares."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def open_file(file: Path) -> Any:
    """Return a GGUF file in llama.cpp; skip the test where xllamacpp is not installed."""
    from language import LlamaCpp, libraries

    library = libraries().get("xllamacpp")
    if library is None:
        pytest.skip("xllamacpp is not installed")
    return LlamaCpp(file, 1, library)


def logits(file: Path, ids: list[int]) -> np.ndarray:
    """Return llama.cpp's logits [tokens, vocabulary] of a file."""
    model = open_file(file)
    try:
        return model.logits(ids)
    finally:
        model.close()


def tokenize(file: Path, texts: list[str]) -> list[list[int]]:
    """Return llama.cpp's ids of texts, with the special tokens that the file asks for and those in the text."""
    model = open_file(file)
    try:
        vocab = model.lib.llama_model_get_vocab(model.model)
        function = model.lib.llama_tokenize
        function.restype = ctypes.c_int32
        function.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool
        ]  # fmt: skip
        found = []
        for text in texts:
            data, room = text.encode(), (ctypes.c_int32 * 4096)()
            count = function(vocab, data, len(data), room, 4096, True, True)
            found.append(list(room[:count]))
        return found
    finally:
        model.close()
