"""The headers of csrc/: each compiles by itself, and the structs of the C interface are those of the Python side."""

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.marks import slow_except
from rarefy.compiler import input_steps, step_structs
from rarefy.runtime import bindings

COMPILER = shutil.which("c++") or shutil.which("clang++")
FOLDER = Path(__file__).parents[2] / "csrc"
HEADERS = sorted(p.name for p in FOLDER.iterdir() if p.suffix in (".h", ".hpp"))
X86 = {"avx2.hpp", "simd512.hpp", "avx512_emulation.hpp"}
SIMDE_HEADER = Path("/usr/include/simde/x86/avx512.h")
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "bf16", "vbmi2")] + ["-mbmi2"]


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", slow_except(HEADERS, *HEADERS[::5]))
def test_header_compiles_alone(name, tmp_path):
    if name in X86 and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs an x86 compiler")
    if name == "avx512_emulation.hpp" and not SIMDE_HEADER.exists():
        pytest.skip("needs SIMDe: libsimde-dev")
    assert "#pragma once" in (FOLDER / name).read_text(encoding="utf-8")
    unit = tmp_path / "alone.cpp"
    unit.write_text(f'#include "{name}"\n', encoding="utf-8")
    flags = ["-mavx2", "-mfma", "-mpopcnt", *(AVX512 if name == "simd512.hpp" else [])] if name in X86 else []
    call = [str(COMPILER), "-std=c++20", "-fsyntax-only", f"-I{FOLDER}", *flags, str(unit)]
    ran = subprocess.run(call, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]


STRUCTS = {
    "bitmask": bindings._Bitmask, "quantized": bindings._Quantized, "tiles": bindings._Tiles, "sell": bindings._Sell,
    "csr": bindings._Csr, "dense": bindings._Dense, "conv": bindings.Conv, "view": step_structs.View, "step": step_structs.Step,
    "kv_cache": step_structs.KVCache, "attention": step_structs.Attention, "indirection": input_steps.Indirection,
}  # fmt: skip


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_python_structs_match_the_header(tmp_path):
    """Every field of a ctypes struct has the name, offset and size that csrc/rarefy.h gives it."""
    wanted, lines = [], []
    for name, struct in STRUCTS.items():
        wanted.append(ctypes.sizeof(struct))
        lines.append(f'printf("%zu\\n", sizeof(rarefy_{name}));')
        for field, *_ in struct._fields_:
            about = getattr(struct, field)
            wanted += [about.offset, about.size]
            lines.append(f'printf("%zu\\n%zu\\n", offsetof(rarefy_{name}, {field}), sizeof(rarefy_{name}::{field}));')
    unit, binary = tmp_path / "offsets.cpp", tmp_path / "offsets"
    body = "\n".join(lines)
    unit.write_text(f'#include <cstddef>\n#include <cstdio>\n#include "rarefy.h"\nint main() {{\n{body}\n}}\n')
    call = [str(COMPILER), "-std=c++20", f"-I{FOLDER}", str(unit), "-o", str(binary)]
    ran = subprocess.run(call, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    printed = subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout
    assert [int(n) for n in printed.split()] == wanted


def test_operators_match_the_header():
    header = (FOLDER / "rarefy.h").read_text(encoding="utf-8")
    numbers = {name.lower(): int(i) for name, i in re.findall(r"RAREFY_OP_(\w+) = (\d+)", header)}
    assert numbers.pop("count") == len(numbers)
    assert numbers == step_structs.OPS
