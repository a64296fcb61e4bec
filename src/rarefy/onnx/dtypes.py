"""Tensors of ONNX types: as numpy arrays, and as torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.common.errors import ModelError, first_line

DTYPES: dict[int, torch.dtype] = {  # TensorProto.DataType: torch's type
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2,
    20: torch.float8_e5m2fnuz,
}
STORED_AS = {"bfloat16": (np.uint16, torch.bfloat16)}  # types that numpy lacks: the bits, and torch's type
STORED_AS |= {
    str(t).removeprefix("torch."): (np.uint8, t)
    for t in (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
}
SMALL_INTEGERS = {"int4": np.int8, "uint4": np.uint8, "int2": np.int8, "uint2": np.uint8}
WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch computes little on them


def dtype_of(number: int, operator: str) -> torch.dtype:
    """Return torch's type of an ONNX data type; ModelError for a type that torch does not have."""
    if number not in DTYPES:
        from onnx import TensorProto

        known = number in TensorProto.DataType.values()
        name = TensorProto.DataType.Name(number) if known else str(number)  # type: ignore[arg-type]
        raise ModelError(f"{operator}: torch has no type for {name}")
    return DTYPES[number]


def to_tensor(array: np.ndarray) -> Tensor:
    """Return a copy of an array as a tensor; integers of 2 and 4 bits take a byte each."""
    kind = str(array.dtype)
    if kind in STORED_AS:
        bits, dtype = STORED_AS[kind]
        return torch.from_numpy(np.array(array.view(bits))).view(dtype)
    if kind in SMALL_INTEGERS:
        array = array.astype(SMALL_INTEGERS[kind])
    if array.dtype.kind not in "fiubc":
        raise ModelError(f"a constant is not an array of numbers: it holds {kind}")
    return torch.from_numpy(np.array(array))


def stored_array(tensor: Any, otherwise: str = "a constant is not an array of numbers") -> np.ndarray:
    """Return a TensorProto as an array.

    Raises:
        ModelError: its type, sizes and bytes do not fit each other; `otherwise` begins the message.
    """
    from onnx import numpy_helper

    try:
        return numpy_helper.to_array(tensor)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{otherwise}: {first_line(error)}") from None


def to_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array."""
    for name, (bits, dtype) in STORED_AS.items():
        if tensor.dtype == dtype:
            import ml_dtypes

            whole = torch.uint16 if bits is np.uint16 else torch.uint8
            return tensor.contiguous().view(whole).numpy().view(getattr(ml_dtypes, name))
    return tensor.numpy()
