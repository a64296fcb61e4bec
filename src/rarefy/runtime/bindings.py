"""Load the compiled kernels, connect them to torch's threads and call them by pointers.

`RAREFY_ISA` (amx, avx512, avx2, portable) forces an instruction set. Without kernels `missing()` says why, and
`rarefy.runtime.reference` does the same in torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from ctypes import POINTER, Structure, c_char_p, c_double, c_int32, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rarefy.common.errors import FormatError, unknown
from rarefy.runtime import reference
from rarefy.runtime.packed_formats import (
    DTYPES,
    Bitmask,
    Csr,
    Dense,
    QuantizedPanels,
    Sell,
    Tiles,
)

ISAS = ("amx", "avx512", "avx2", "portable")
ABI_VERSION = 34  # RAREFY_ABI_VERSION of csrc/rarefy.h: change both with every change of the C interface
ACTIVATIONS = tuple(reference.ACTIVATIONS)
FORMATS = (Bitmask, Csr, Tiles, QuantizedPanels, Sell, Dense)  # in the order of csrc/rarefy.h
_KINDS = {name: i for i, name in enumerate(DTYPES)}  # rarefy_dtype


class _Bitmask(Structure):
    _fields_ = [
        *[(n, c_int64) for n in ("rows", "cols", "col_blocks")],
        *[(n, c_void_p) for n in ("masks", "starts", "values", "scales", "row_sums", "bias")],
        *[(n, c_int32) for n in ("dtype", "act")],
    ]


class _Quantized(Structure):
    _fields_ = [
        *[(n, c_int64) for n in ("rows", "cols", "col_blocks")],
        *[(n, c_void_p) for n in ("values", "scales", "zeros", "row_scales", "row_sums", "bias")],
        *[(n, c_int32) for n in ("dtype", "act", "scale_groups", "fp32_inputs", "two_terms", "zero_bits")],
    ]


class _Csr(Structure):
    _fields_ = [
        *[(n, c_int64) for n in ("rows", "inputs")],
        *[(n, c_void_p) for n in ("starts", "columns", "values", "scales", "bias")],
        *[(n, c_int32) for n in ("dtype", "act")],
    ]


class _Tiles(Structure):
    _fields_ = [
        *[(n, c_int64) for n in ("rows", "inputs", "lanes", "block")],
        *[(n, c_void_p) for n in ("counts", "starts", "columns", "values", "scales", "row_sums", "bias")],
        *[(n, c_int32) for n in ("dtype", "act")],
    ]


class _Sell(Structure):
    _fields_ = [
        *[(n, c_int64) for n in ("rows", "inputs", "lanes", "block")],
        *[(n, c_void_p) for n in ("starts", "counts", "order", "columns", "values", "scales", "row_sums", "bias")],
        *[(n, c_int32) for n in ("dtype", "act")],
    ]


class _Dense(Structure):
    _fields_ = [
        *[(n, c_int64) for n in ("rows", "cols")],
        *[(n, c_void_p) for n in ("values", "scales", "row_sums", "bias")],
        *[(n, c_int32) for n in ("dtype", "act")],
    ]


class ScaleFit(Structure):
    _fields_ = [
        *[(n, c_void_p) for n in ("x", "weigh")],
        *[(n, c_int64) for n in ("blocks", "size")],
        ("fractions", c_void_p),
        ("count", c_int64),
        *[(n, c_int32) for n in ("min_code", "max_code", "symmetric")],
        *[(n, c_void_p) for n in ("scale", "zero")],
    ]


class Conv(Structure):
    _fields_ = [
        ("weight", _Tiles),
        *[(n, c_void_p) for n in ("sell", "dense")],
        *[(n, c_int64) for n in ("groups", "outputs", "inputs")],
        *[(n, c_int64 * 2) for n in ("kernel", "stride", "padding", "dilation")],
    ]


@cache
def _open() -> tuple[Any, str | None]:
    """Return the library, or why there is none."""
    spec = find_spec("rarefy.runtime._kernels")
    if spec is None or spec.origin is None:
        return None, "no compiled kernels: install again where there is a C++20 compiler"
    try:
        library = ctypes.CDLL(spec.origin)
        version = getattr(library, "rarefy_abi_version", None)
        if version is None or version() != ABI_VERSION:
            return None, "the compiled kernels are of another version: install again"
        name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
        pool = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        library.rarefy_set_parallel_for(pool.torch_parallel_for, pool.torch_get_num_threads)
    except (OSError, AttributeError) as error:
        return None, f"the compiled kernels do not load: {error}"
    library.rarefy_isa.restype = c_char_p
    structs = {"bitmask": _Bitmask, "csr": _Csr, "tiles": _Tiles, "quantized": _Quantized, "sell": _Sell}
    for name, kind in structs.items():
        run = getattr(library, f"rarefy_run_{name}")
        run.argtypes = [POINTER(kind), c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64]
    library.rarefy_run_grouped.argtypes = [c_int32, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64]
    library.rarefy_padded_image_floats.argtypes = [POINTER(Conv), c_int64, c_int64]
    library.rarefy_padded_image_floats.restype = c_int64
    library.rarefy_indirection_offsets.argtypes = [POINTER(Conv), c_int64, c_int64, c_void_p]
    library.rarefy_indirection_offsets.restype = None
    library.rarefy_measure_ceiling.argtypes = [c_int32, c_double, c_void_p, c_int64]
    library.rarefy_measure_ceiling.restype = c_double
    library.rarefy_run_program.argtypes = [c_void_p, c_int64, c_void_p]
    library.rarefy_run_conv.argtypes = [POINTER(Conv), c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64]
    library.rarefy_fit_scales.argtypes = [POINTER(ScaleFit)]
    library.rarefy_dequantize_rows.argtypes = [POINTER(_Quantized), c_void_p, c_int64, c_void_p]
    library.rarefy_check_conv.argtypes = [POINTER(Conv), c_int64, c_int64]
    library.rarefy_check_csr.argtypes = [POINTER(_Csr), c_int64]
    library.rarefy_check_sell.argtypes = [POINTER(_Sell), c_int64]
    library.rarefy_check_quantized.argtypes = [POINTER(_Quantized), c_int64]
    library.rarefy_check_bitmask.argtypes = [POINTER(_Bitmask), c_int64]
    library.rarefy_check_tiles.argtypes = [POINTER(_Tiles), c_int64, c_int64]
    forced = os.environ.get("RAREFY_ISA")
    if forced:
        _use(library, forced)
    return library, None


def missing() -> str | None:
    """Return why the kernels are not available, or None if they are."""
    return _open()[1]


def library() -> Any:
    """Return the library; FormatError where there is none."""
    opened, why = _open()
    if opened is None:
        raise FormatError(str(why))
    return opened


def isa() -> str | None:
    """Return the instruction set that the kernels use, or None where there are none."""
    library, _ = _open()
    return None if library is None else library.rarefy_isa().decode()


def multiplies_bf16() -> bool:
    """Return whether the instruction set multiplies bf16 faster than fp32 on this CPU: AMX, and AVX-512 of AMD."""
    library, _ = _open()
    return library is not None and bool(library.rarefy_multiplies_bf16())


def scales_blocks(rows: bool) -> bool:
    """Return whether inputs have an int8 scale for each 32 features in place of two terms.

    Those of prompts, or with `rows` those of single tokens that meet weights of 4 to 6 bits.
    """
    library, _ = _open()
    return library is not None and bool(library.rarefy_scales_blocks(int(rows)))


@cache
def digest() -> str | None:
    """Return a digest of the compiled kernels, None without kernels: timings hold for one build."""
    spec = find_spec("rarefy.runtime._kernels")
    if spec is None or spec.origin is None:
        return None
    return hashlib.blake2b(Path(spec.origin).read_bytes(), digest_size=8).hexdigest()


def use(name: str) -> None:
    """Use an instruction set from now on; FormatError for one that this CPU does not have."""
    library, why = _open()
    if library is None:
        raise FormatError(str(why))
    _use(library, name)


def _use(library: Any, name: str) -> None:
    if name not in ISAS:
        raise FormatError(unknown("instruction set", name, ISAS))
    if library.rarefy_set_isa(name.encode()):
        raise FormatError(f"this CPU has no {name}; RAREFY_ISA=portable runs everywhere")
