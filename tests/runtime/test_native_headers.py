"""Every header of csrc/ compiles by itself, so each names what it needs and none is a fragment of another file."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = shutil.which("c++") or shutil.which("clang++")
FOLDER = Path(__file__).parents[2] / "csrc"
HEADERS = sorted(p.name for p in FOLDER.iterdir() if p.suffix in (".h", ".hpp"))
X86 = {"avx2.hpp", "simd512.hpp", "avx512_emulation.hpp"}
SIMDE_HEADER = Path("/usr/include/simde/x86/avx512.h")
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "bf16", "vbmi2")] + ["-mbmi2"]


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", HEADERS)
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
