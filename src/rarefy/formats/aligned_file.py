"""Write safetensors files whose large tensors begin at multiples of 64 bytes, so that kernels can read them mapped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_aligned(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors to a safetensors file. O(bytes); nothing is copied. Raises OSError.

    Tensors whose bytes are a multiple of 64 come first, and so all begin at one; then the widest types.

    Args:
        tensors: by name, of the types in `NAMES`.
        file: the file to write.
        metadata: texts by name.

    >>> import tempfile
    >>> from safetensors import safe_open
    >>> write_aligned({"a": torch.ones(3), "b": torch.zeros(64)}, file := Path(tempfile.mkdtemp(), "x"), {})
    >>> with safe_open(file, "pt") as opened:
    ...     opened.get_tensor("a").tolist(), opened.get_tensor("b").data_ptr() % 64
    ([1.0, 1.0, 1.0], 0)
    """
    ordered = sorted(tensors, key=lambda n: (tensors[n].nbytes % ALIGNMENT != 0, -tensors[n].element_size(), n))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in ordered:
        t = tensors[name]
        offsets = [end, end := end + t.nbytes]
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            flat = tensors[name].detach().reshape(-1)
            if flat.stride(0) != 1:  # a single number of a larger tensor
                flat = flat.clone(memory_format=torch.contiguous_format)
            stream.write(flat.view(torch.uint8).numpy().data)
