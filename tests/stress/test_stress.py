"""Random calls of kernels and programs, with sanitizers where a test is slow; calls from several threads."""

from collections import Counter

import pytest
import torch

from rarefy.compiler.step_structs import NAMES
from rarefy.runtime import bindings
from rarefy.runtime.kernel import Kernel
from stress.builds import SANITIZED, start_python
from stress.kernel_cases import CASES, Case, Rows, close, functions
from stress.models import MODELS
from stress.program_cases import PROGRAMS
from stress.races import Races, find_races, parse
from stress.sanitize import BUILDS, run_build, run_case, usable_isas
from stress.sanitize import NAMES as CASE_NAMES
from stress.soak import Soak, soak

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing()))
SEEDS = {**dict.fromkeys(CASES, 8), "program": 25, "exact program": 10, "decoder": 3}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_random_cases(name, threads):
    isas = [i for i in usable_isas() if i != "amx"]
    for seed in range(SEEDS[name]):
        run_case(name, seed, isas, threads, Counter())


def test_each_function_of_the_header_has_a_case():
    called = {f for _, names in CASES.values() for f in names}
    assert called | {"run_program"} == functions() and "run_program" not in called


def test_cases_see_wrong_numbers():
    with pytest.raises(AssertionError, match="what: 1.0 at .1., expected 2.0, 1 differ"):
        close(torch.ones(3), torch.tensor([1.0, 2.0, 1.0]), 1e-3, "what")
    with pytest.raises(AssertionError, match="nan at"):
        close(torch.tensor([float("nan")]), torch.ones(1), 1e-3, "what")
    rows = Rows.of(torch.zeros(3, 4), 2)
    rows.values.fill_(7)
    rows.check_gaps()
    rows.memory[4] = 0
    with pytest.raises(AssertionError, match="numbers between the rows of the output have changed"):
        rows.check_gaps()


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_with_a_wrong_kernel_differ(name, monkeypatch):
    """What random programs return is compared: a kernel with another bias is noticed."""

    def init(kernel, packed, bias=None, activation=None, made=Kernel.__init__):
        made(kernel, packed, torch.full((packed.shape[0],), 99.0), activation)

    monkeypatch.setattr(Kernel, "__init__", init)
    noticed = 0
    for seed in range(10):
        try:
            PROGRAMS[name](Case(name, seed))
        except AssertionError:
            noticed += 1
    assert noticed


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_random_cases_under_sanitizers(build):
    if why := build.missing():
        pytest.skip(why)
    result = run_build(build, 120)
    assert result.passed, str(result)
    assert set(result.counts) == set(CASE_NAMES)


@pytest.mark.slow
def test_random_programs_have_each_step():
    steps, threads = Counter(), torch.set_num_threads
    for name, count in (("program", 4000), ("decoder", 5)):
        for seed in range(count):
            run_case(name, seed, [str(bindings.isa())], threads, steps)
            if steps.keys() >= set(NAMES):
                return
    assert not set(NAMES) - steps.keys()


OVERREAD = """
import torch
from rarefy.runtime.kernel import Kernel
from rarefy.runtime.packing import pack_csr
kernel, x, y = Kernel(pack_csr(torch.ones(4, 32))), torch.ones(31), torch.empty(4)
kernel.call(kernel.at, x.data_ptr(), 32, None, y.data_ptr(), 4, 1)
"""


@pytest.mark.slow
def test_a_read_beyond_a_buffer_is_reported():
    process = start_python(SANITIZED, OVERREAD)
    assert "heap-buffer-overflow" in process.communicate()[1] and process.returncode


@pytest.mark.slow
def test_calls_from_several_threads_have_no_race():
    """ThreadSanitizer: threads of a parallel region have read a flag that its caller writes."""
    races = find_races(["text, sparse in int8", "images in int8"], 15)
    assert races.passed, str(races)


def test_reports_of_races():
    report = """WARNING: ThreadSanitizer: data race (pid=1)
  Read of size 1 at 0x7f by thread T2:
    #0 Arrivals::let_in() /csrc/parallel.h:141 (_kernels.so+0x2)
  Previous write of size 1 at 0x7f by thread T1:
    #0 Arrivals::let_in() /csrc/parallel.h:143 (_kernels.so+0x3)
==================
"""
    first = parse(report * 2)
    assert first.reports == {"Arrivals::let_in() parallel.h:141 / Arrivals::let_in() parallel.h:143": 2}
    assert not first.passed and "parallel.h:143" in str(first)
    assert Races(output="text: 40 calls, 0 differ\n").passed
    assert not Races(output="text: 40 calls, 1 differ\n").passed and not Races().passed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text in int8", "images"])
def test_short_soak(name):
    result = soak(name, 300, rounds=2, inputs=6)
    assert result.calls == 300 and not result.wrong and not result.errors, str(result)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_soak(name):
    result = soak(name, 12_000)
    assert result.passed, str(result)


def test_a_soak_that_fails():
    assert Soak("text", 10, bytes_early=100 << 20, bytes_late=102 << 20).passed
    assert not Soak("text", 10, bytes_early=100 << 20, bytes_late=103 << 20).passed
    assert not Soak("text", 10, wrong=1).passed and not Soak("text", 10, errors=["DataError: x"]).passed
