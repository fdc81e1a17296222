"""Every instruction set in turn, and results that were poisoned before the kernel wrote them."""

from collections.abc import Iterator

import pytest
import torch

from longfit.kernels import cpu


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512_bf16", "neon"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with one instruction set forced; skipped with its reason where it cannot run."""
    reason = cpu.unavailable()
    if reason is not None:
        pytest.skip(reason)
    library = cpu.library()
    if request.param not in library.isas:
        pytest.skip(f"this processor and build have {', '.join(library.isas)}")
    before, library.isa = library.isa, request.param
    yield request.param
    library.isa = before


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN or 0xFF, so that a value left unwritten cannot pass for right."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
