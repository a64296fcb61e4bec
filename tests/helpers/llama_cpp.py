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


def quantized(source: Path, out: Path, kind: str) -> Path:
    """Write a GGUF file of fp32 again with its matrices in another type, rounded by llama.cpp."""
    import gguf

    from language import libraries, load

    library = libraries().get("xllamacpp")
    if library is None:
        pytest.skip("xllamacpp is not installed")
    function = load(library).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip
    reader, number = gguf.GGUFReader(source), gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for tensor in reader.tensors:
        data = np.ascontiguousarray(tensor.data, np.float32)
        if data.ndim < 2 or data.shape[1] % block:
            writer.add_tensor(tensor.name, data)
            continue
        blocks = np.zeros((len(data), data.shape[1] // block * size), np.uint8)
        written = function(number.value, data.ctypes.data, blocks.ctypes.data, 0, *data.shape, None)
        assert written == blocks.nbytes
        writer.add_tensor(tensor.name, blocks, raw_dtype=number)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return out
