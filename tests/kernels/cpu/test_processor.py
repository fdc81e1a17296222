"""The processor: which instruction sets it has, which dtype follows, and how one variable forces both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longfit.kernels.cpu import library as cpu_library
from longfit.kernels.cpu import processor


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGFIT_ISA", raising=False)


def test_it_agrees_with_the_library_that_is_loaded() -> None:
    if cpu_library.unavailable() is not None:
        pytest.skip(cpu_library.unavailable() or "")
    assert processor.instruction_sets() == cpu_library.library().isas


def pretend(monkeypatch: pytest.MonkeyPatch, *, features: str, machine: str = "x86_64", system: str = "linux") -> None:
    monkeypatch.setattr(processor, "features", lambda: frozenset(features.split()))
    monkeypatch.setattr(processor, "instruction_sets", processor.instruction_sets.__wrapped__)
    monkeypatch.setenv("LONGFIT_LIBRARY", "/nowhere.so")
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(processor.sys, "platform", system)


AVX2 = "avx2 fma bmi2"
AVX512 = AVX2 + " avx512f avx512bw avx512vl avx512dq"


@pytest.mark.parametrize(
    ("features", "machine", "system", "dtype", "reason"),
    [
        ("sse4_2", "x86_64", "linux", "float32", "this processor (scalar) has no bf16 instructions"),
        (AVX2, "x86_64", "linux", "float32", "this processor (avx2) has no bf16 instructions"),
        (AVX512, "x86_64", "linux", "float32", "this processor (avx512) has no bf16 instructions"),
        (AVX512 + " avx512_bf16 avx512vbmi", "x86_64", "linux", "bfloat16", "this processor has AVX512-BF16"),
        (AVX512 + " avx512_bf16", "x86_64", "linux", "bfloat16", "this processor has AVX512-BF16"),
        (AVX512 + " amx_bf16 avx512_bf16 avx512vbmi", "x86_64", "linux", "bfloat16", "this processor has AMX"),
        ("asimd", "aarch64", "linux", "float32", "this processor (neon) has no bf16 instructions"),
        ("asimd bf16", "aarch64", "linux", "bfloat16", "this processor has ARM's BF16"),
        ("", "arm64", "darwin", "float32", "this processor (neon) has no bf16 instructions"),
    ],
)
def test_auto_is_what_the_processor_multiplies_fast(
    monkeypatch: pytest.MonkeyPatch, features: str, machine: str, system: str, dtype: str, reason: str
) -> None:
    pretend(monkeypatch, features=features, machine=machine, system=system)
    assert processor.auto_dtype() == (dtype, reason)
    assert processor.auto_dtype("cuda")[0] == "bfloat16"


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_a_forced_set_without_bf16_is_believed(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    pretend(monkeypatch, features=AVX512 + " amx_bf16 avx512_bf16 avx512vbmi")
    monkeypatch.setenv("LONGFIT_ISA", isa)
    assert processor.auto_dtype() == ("float32", f"this processor ({isa}) has no bf16 instructions")
    assert processor.instruction_set() == isa


@pytest.mark.parametrize(("isa", "reason"), [("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")])
def test_a_forced_set_with_bf16_names_what_multiplies(monkeypatch: pytest.MonkeyPatch, isa: str, reason: str) -> None:
    pretend(monkeypatch, features=AVX512 + " amx_bf16 amx_tile avx512_bf16 avx512vbmi")
    assert processor.instruction_sets() == ("amx_bf16", "avx512_bf16", "avx512", "avx2", "scalar")
    monkeypatch.setenv("LONGFIT_ISA", isa)
    assert processor.auto_dtype() == ("bfloat16", f"this processor has {reason}")


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch itself has nothing to be held back from here"
)
def test_one_variable_holds_torch_to_the_same_set() -> None:
    code = "import longfit, torch; print(torch.backends.cpu.get_cpu_capability())"
    names = {*processor.TORCH_VARIABLES, "LONGFIT_ISA"}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    clean["PYTHONPATH"] = str(Path(processor.__file__).parents[3])

    def capability(**forced: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code], env=clean | forced, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert capability(LONGFIT_ISA="scalar") == "DEFAULT"
    if "avx2" in processor.instruction_sets():
        assert capability(LONGFIT_ISA="avx2") == "AVX2"
        assert capability(LONGFIT_ISA="avx2", ATEN_CPU_CAPABILITY="default") == "DEFAULT", "what the user set stays"
