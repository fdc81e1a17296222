"""The kernels for NEON, cross-compiled and run under an emulator: against float64, `numerics` and the scalar kernels.

It needs Debian's g++-aarch64-linux-gnu and qemu-user-static (the CMake preset ``neon`` builds into ``build/neon``), and
skips itself where they are not installed. On a processor with NEON the other tests run these kernels as they are.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tests.kernels.cpu import test_attention
from torch import Tensor

from longfit.kernels import dispatch
from longfit.kernels.cpu import attention as cpu_attention
from longfit.kernels.cpu import elementwise, weights_4bit
from longfit.kernels.cpu import library as cpu_library
from longfit.numerics import codebooks

ROOT = Path(__file__).parents[3]
DTYPES = pytest.mark.parametrize("dtype", cpu_library.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(scope="module")
def driver() -> Path:
    """The program that runs one kernel for NEON."""
    missing = [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64-static", "cmake") if shutil.which(tool) is None]
    if missing:
        pytest.skip(
            f"{', '.join(missing)}: not installed; apt-get install g++-aarch64-linux-gnu qemu-user-static cmake"
        )
    if cpu_library.unavailable() is not None:
        pytest.skip(cpu_library.unavailable() or "")
    for command in (["cmake", "--preset", "neon"], ["cmake", "--build", "--preset", "neon"]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "build" / "neon" / "kernel_driver"


def run(driver: Path, work: str, given: list[Tensor], results: list[Tensor]) -> list[Tensor]:
    """Send arrays, and receive arrays of these shapes and dtypes."""
    sent = b"".join(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in given)
    command = ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu", str(driver), work]
    done = subprocess.run(command, input=sent, capture_output=True, timeout=300, check=True)
    answers, at = [], 0
    for like in results:
        answers.append(
            torch.frombuffer(bytearray(done.stdout[at : at + like.nbytes]), dtype=like.dtype).view(like.shape)
        )
        at += like.nbytes
    assert at == len(done.stdout)
    return answers


@DTYPES
@pytest.mark.parametrize("case", [{"group": 64, "start": 200}, {"head_dim": 40, "heads": (4, 2), "start": 7}], ids=str)
def test_attention_within_its_bound_of_float64(
    driver: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, case: dict
) -> None:
    def emulated(p: test_attention.Problem) -> list[Tensor]:
        batch, heads, queries, head_dim = p.q.shape
        kv_heads, keys, classes = p.k.shape[1], p.k.shape[2], p.first_key.shape[0]
        tensors = [x.contiguous() for x in (p.q, p.k, p.v, p.grad_out)]
        sizes = (cpu_library.DTYPES[dtype], 2, batch, heads, kv_heads, queries, keys, head_dim, classes, p.start)
        given = [torch.tensor(sizes), torch.tensor([p.scaling]), torch.tensor(p.head_bounds)]
        sums = torch.empty(p.k.shape)
        results = [tensors[0], torch.empty(p.q.shape[:3]), tensors[0], sums, sums]
        return run(driver, "attention", [*given, p.first_key, *tensors], results)

    monkeypatch.setattr(test_attention.Problem, "run", emulated)
    monkeypatch.setattr(cpu_attention, "multiplies_bf16", lambda: False)
    test_attention.check_against_float64(test_attention.problem(**case, dtype=dtype))


@DTYPES
def test_norm_gated_product_and_cross_entropy_are_those_of_the_scalar_kernels(driver: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(9, 101, generator=generator).to(dtype) for _ in range(2))
    weight, labels = torch.randn(101, generator=generator).to(dtype), torch.arange(9)
    library = cpu_library.library()
    before, library.isa = library.isa, "scalar"
    try:
        norm, inverse_rms = elementwise.rms_norm_forward(x, weight, eps=1e-5)
        grad_x, grad_weight = elementwise.rms_norm_backward(grad, x, weight, inverse_rms, trains=True)
        expected = [norm, grad_x, grad_weight, elementwise.swiglu_forward(x, grad)]
        expected += elementwise.swiglu_backward(x, x, grad)
        logits = x.clone()
        expected += [elementwise.cross_entropy_(logits, labels, factor=0.25), logits]
    finally:
        library.isa = before
    given = [torch.tensor([cpu_library.DTYPES[dtype], *x.shape]), x, weight, grad, labels]
    for mine, theirs in zip(run(driver, "elementwise", given, expected), expected, strict=True):
        # The same lanes in the same order; products that are added round once instead of twice. Sums of 101 terms then
        # differ by 101 units of float32, relative to a largest term below 16, and results by one unit of their dtype.
        unit = test_attention.UNIT[dtype]
        torch.testing.assert_close(mine, theirs, rtol=2 * unit + 2.0**-20, atol=16 * 101 * 2.0**-24)


@DTYPES
def test_4_bit_weights_are_those_of_numerics(driver: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(30, 192, generator=torch.Generator().manual_seed(2))
    packed, state = dispatch.quantize_4bit(weight, double_quant=False)
    dense = weights_4bit.dequantize_4bit(packed, state, dtype)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(3)).to(dtype)
    sizes = torch.tensor([cpu_library.DTYPES[dtype], 3, 30, 192, state.block_size])
    given = [sizes, codebooks.codebook("nf4"), state.absmax, packed, x]
    mine, product = run(driver, "weights_4bit", given, [dense, torch.empty(3, 30, dtype=dtype)])
    assert torch.equal(mine, dense)
    exact, sizes = x.double() @ dense.double().T, x.double().abs() @ dense.double().abs().T
    bound = test_attention.UNIT[dtype] * exact.abs() + (192 / 4 + 4) * 2.0**-24 * sizes  # four partial sums
    assert ((product - exact).abs() <= bound * (1 + 2.0**-8)).all()
