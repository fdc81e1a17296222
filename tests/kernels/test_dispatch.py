"""The table of operations: which backend runs, why, what is refused, and what torch.compile sees."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from longfit.errors import BackendError
from longfit.kernels import dispatch
from longfit.kernels.cpu import weights_4bit as cpu
from longfit.kernels.dispatch import Dispatcher, backends, use_backend
from longfit.kernels.ops import format_fields
from longfit.kernels.triton import device as triton_device
from longfit.numerics import quant_state, row_format
from longfit.numerics.codebooks import dynamic_map
from longfit.numerics.row_format import RowFormat


@pytest.fixture(autouse=True)
def _free_choice() -> Iterator[None]:
    with use_backend(None):
        yield


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "no compiler was found")


def weight_in_rows(out_features: int = 40, in_features: int = 192) -> tuple[Tensor, Tensor, RowFormat]:
    packed, state = quant_state.quantize_4bit(torch.randn(out_features, in_features).bfloat16())
    return (*row_format.to_rows(packed, state), RowFormat.of(state))


def test_every_operation_names_its_backend_and_why() -> None:
    chosen = backends()
    assert tuple(chosen) == dispatch.KERNELS
    for choice in chosen.values():
        assert choice.backend in ("cpu", "reference")
        assert choice.reason
    if not torch.cuda.is_available():
        on_a_card = backends("cuda").values()
        assert {choice.backend for choice in on_a_card} == {"reference"}
        assert all("not triton: " in choice.reason for choice in on_a_card)


def test_triton_needs_a_card_that_it_compiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(triton_device, "find_spec", lambda name: object())
    assert "compute capability 7.0, Triton needs 7.5" in backends("cuda")["linear_4bit"].reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    choices = backends("cuda")
    assert {choice.backend for choice in choices.values()} == {"triton"}
    assert choices["adamw_step"].reason == "Triton kernels for Tesla T4"
    assert {choice.backend for choice in backends("cpu").values()} <= {"cpu", "reference"}
    monkeypatch.setattr(triton_device, "find_spec", lambda name: None)
    assert "triton is missing" in backends("cuda")["linear_4bit"].reason


@pytest.mark.parametrize("op", dispatch.KERNELS)
def test_every_file_has_its_operation(op: str) -> None:
    pytest.importorskip("triton", reason="the package triton is missing; it comes with the dev extra on Linux")
    for backend in dispatch.TABLE[op]:
        assert callable(getattr(dispatch._file(backend, op), op))


def test_without_the_library_the_reference_runs_and_says_so_once(no_library: None) -> None:
    fresh = Dispatcher()
    with pytest.warns(RuntimeWarning, match="no compiler was found"):
        function = fresh.function("quantize_4bit", torch.device("cpu"))
    packed, _ = function(torch.randn(64), quant_type="nf4", block_size=64, double_quant=True, absmax_block_size=256)
    assert packed.shape == (32,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.function("linear_4bit", torch.device("cpu"))
    assert fresh.choose("linear_4bit", "cpu").backend == "reference"
    assert "no compiler was found" in fresh.choose("linear_4bit", "cpu").reason


class TestUseBackend:
    def test_block_restores_what_was_forced_before(self) -> None:
        use_backend("reference")
        with use_backend(None):
            assert dispatch.dispatcher().forced_for("linear_4bit") is None
        assert dispatch.dispatcher().forced_for("linear_4bit") == "reference"
        assert {choice.backend for choice in backends().values()} == {"reference"}

    def test_forced_backend_that_is_missing(self, no_library: None) -> None:
        with pytest.raises(BackendError, match="no compiler was found"):
            use_backend("cpu")
        with pytest.raises(BackendError, match=r"'triton' cannot be used"):
            use_backend("triton")
        with pytest.raises(BackendError, match="'cuda'; allowed: triton, cpu, reference"):
            use_backend("cuda")
        with pytest.raises(BackendError, match="'triton'; allowed: flash, efficient, cpu, aten, reference"):
            use_backend("triton", op="attention")
        with pytest.raises(BackendError, match="op: got 'softmax'; allowed: quantize_4bit"):
            use_backend("reference", op="softmax")
        assert dispatch.dispatcher().forced == dispatch.Rule()

    def test_one_operation_alone(self) -> None:
        with use_backend("reference", op="attention"):
            assert dispatch.dispatcher().forced_for("attention") == "reference"
            assert dispatch.dispatcher().forced_for("linear_4bit") is None
            with use_backend("aten"), use_backend(None, op="attention"):
                assert dispatch.dispatcher().forced_for("attention") == "aten"  # the one for all that have it
                assert dispatch.dispatcher().forced_for("linear_4bit") is None
            assert dispatch.dispatcher().forced_for("attention") == "reference"
        assert dispatch.dispatcher().forced_for("attention") is None

    def test_forced_backend_on_a_device_it_does_not_serve(self, isa: str) -> None:
        with use_backend("cpu"), pytest.raises(BackendError, match="it serves cpu, the tensors are on cuda"):
            dispatch.dispatcher().choose("linear_4bit", "cuda")

    def test_both_backends_agree(self, isa: str) -> None:
        weight = torch.randn(30, 70).half()
        results = []
        for backend in ("reference", "cpu"):
            with use_backend(backend):
                packed, state = dispatch.quantize_4bit(weight, quant_type="fp4")
                codes, absmax = dispatch.quantize_8bit(weight, dynamic_map(signed=True), block_size=128)
                restored = dispatch.dequantize_8bit(
                    codes, absmax, dynamic_map(signed=True), block_size=128, dtype=torch.bfloat16
                )
                results.append((packed, dispatch.dequantize_4bit(packed, state), codes, absmax, restored))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
class TestShapes:
    @pytest.fixture(autouse=True)
    def _backend(self, backend: str) -> Iterator[None]:
        if backend == "cpu" and cpu.unavailable() is not None:
            pytest.skip(cpu.unavailable() or "")
        with use_backend(backend):
            yield

    def test_leading_axes_are_kept(self) -> None:
        rows, constants, fmt = weight_in_rows()
        dense = dispatch.dequantize_rows(rows, constants, fmt, torch.float32)
        for shape in ((), (3,), (2, 5), (2, 0), (1, 2, 20)):
            x, grad = torch.randn(*shape, 192), torch.randn(*shape, 40)
            torch.testing.assert_close(dispatch.linear_4bit(x, rows, constants, fmt), x @ dense.t())
            torch.testing.assert_close(dispatch.linear_4bit_grad_input(grad, rows, constants, fmt), grad @ dense)

    def test_transposed_input(self) -> None:
        rows, constants, fmt = weight_in_rows()
        dense = dispatch.dequantize_rows(rows, constants, fmt, torch.float32)
        for num_rows in (5, 50):
            x, grad = torch.randn(192, num_rows).t(), torch.randn(40, num_rows).t()
            torch.testing.assert_close(dispatch.linear_4bit(x, rows, constants, fmt), x @ dense.t())
            torch.testing.assert_close(dispatch.linear_4bit_grad_input(grad, rows, constants, fmt), grad @ dense)

    def test_shape_and_dtype_of_the_weight_come_back(self) -> None:
        weight = torch.randn(3, 5, 7).half()
        packed, state = dispatch.quantize_4bit(weight, block_size=32)
        restored = dispatch.dequantize_4bit(packed, state)
        assert (restored.shape, restored.dtype) == (weight.shape, weight.dtype)
        assert dispatch.dequantize_4bit(packed, state, torch.float64).dtype == torch.float64


def _everything(
    x: Tensor, weight: Tensor, book: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat
) -> list[Tensor]:
    packed, state = dispatch.quantize_4bit(weight)
    codes, absmax = dispatch.quantize_8bit(weight, book, block_size=256)
    y = dispatch.linear_4bit(x, rows, constants, fmt)
    return [
        packed,
        dispatch.dequantize_4bit(packed, state),
        dispatch.dequantize_8bit(codes, absmax, book, block_size=256, dtype=torch.float32),
        dispatch.dequantize_rows(rows, constants, fmt),
        y,
        dispatch.linear_4bit_grad_input(y, rows, constants, fmt),
    ]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    rows, constants, fmt = weight_in_rows()
    weight, x, book = torch.randn(30, 70), torch.randn(2, 3, 192), dynamic_map(signed=True)
    expected = _everything(x, weight, book, rows, constants, fmt)
    compiled = torch.compile(_everything, fullgraph=True, backend=backend)(x, weight, book, rows, constants, fmt)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))


class _Recorder(TorchDispatchMode):
    """Writes down the operators that reach torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_the_operator() -> None:
    """Tracers, modes, subclasses and autograd get the operator, not the kernel that runs behind torch's back."""
    rows, constants, fmt = weight_in_rows()
    x = torch.randn(2, 192)
    expected = dispatch.linear_4bit(x, rows, constants, fmt)
    with _Recorder() as seen:
        watched = dispatch.linear_4bit(x, rows, constants, fmt)
    assert torch.equal(watched, expected)
    assert seen.names == ["longfit::linear_4bit"]
    graph = make_fx(lambda x: dispatch.linear_4bit(x, rows, constants, fmt))(x)
    assert torch.equal(graph(2 * x), dispatch.linear_4bit(2 * x, rows, constants, fmt))
    traced = torch.jit.trace(lambda x: dispatch.linear_4bit(x, rows, constants, fmt), (x,))
    assert torch.equal(traced(2 * x), dispatch.linear_4bit(2 * x, rows, constants, fmt))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(dispatch.linear_4bit(mode.from_tensor(x), rows, constants, fmt), FakeTensor)


def test_schemas_and_shapes_for_tracing() -> None:
    """torch's own check: what tracing computes has the shapes and types of the real results, and nothing is mutated."""
    rows, constants, fmt = weight_in_rows()
    packed, state = quant_state.quantize_4bit(torch.randn(30, 70), double_quant=False)
    fields = format_fields(fmt)
    ops = torch.ops.longfit
    checks = ("test_schema", "test_faketensor")
    for op, args in (
        (ops.quantize_4bit, (torch.randn(30, 7), "nf4", 64, True, 256)),
        (ops.quantize_4bit, (torch.randn(0), "nf4", 64, False, 256)),
        (ops.dequantize_4bit, (packed, state.absmax, None, None, [30, 70], "nf4", 64, 256, torch.half)),
        (ops.quantize_8bit, (torch.randn(300), dynamic_map(signed=True), 256)),
        (ops.dequantize_8bit, (packed, torch.ones(5), dynamic_map(signed=True), 256, torch.bfloat16)),
        (ops.dequantize_rows, (rows[3:7], constants, *fields, torch.float32, 3)),
        (ops.linear_4bit, (torch.randn(2, 3, 192), rows, constants, *fields)),
        (ops.linear_4bit_grad_input, (torch.randn(20, 40), rows, constants, *fields)),
    ):
        torch.library.opcheck(op, args, test_utils=checks)
