"""The C++ library is found and checked; what does not belong to this longfit is refused with what to do."""

from pathlib import Path

import pytest

from longfit.errors import BackendError
from longfit.kernels.cpu import library as cpu_library


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="without a working compiler"):
        cpu_library.Library(tmp_path / "_longfit.so")


def test_broken_file(tmp_path: Path) -> None:
    (tmp_path / "_longfit.so").write_bytes(b"not a library")
    with pytest.raises(BackendError, match="does not load"):
        cpu_library.Library(tmp_path / "_longfit.so")


def test_unknown_instruction_set(isa: str) -> None:
    with pytest.raises(BackendError, match=r"'sse9'.*scalar"):
        cpu_library.library().isa = "sse9"
    assert cpu_library.library().isa == isa


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_library.unavailable() is not None:
        pytest.skip(cpu_library.unavailable() or "")
    path = cpu_library.library().path
    monkeypatch.setattr(cpu_library, "ABI", cpu_library.ABI + 1)
    with pytest.raises(BackendError, match=rf"version {cpu_library.ABI - 1}, this longfit needs {cpu_library.ABI}; "):
        cpu_library.Library(path)


def test_a_forced_library_that_is_missing_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the variable the reference kernels run; who names a file wants that file."""
    monkeypatch.setattr(cpu_library, "library", cpu_library.library.__wrapped__)
    monkeypatch.setenv("LONGFIT_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(BackendError, match=r"none\.so is missing"):
        cpu_library.unavailable()
