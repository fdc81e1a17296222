"""What longfit takes for granted of torch beyond its public names; each test says what breaks when it is red."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from longfit.compat import torch as compat


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 2


def test_a_node_knows_its_function() -> None:
    """Else swept layers no longer write gradients over gradients: one hidden state a token more."""
    x = torch.ones(2, requires_grad=True)
    assert compat.autograd_function_of(Double.apply(x).grad_fn) is Double
    assert compat.autograd_function_of((x * 2).grad_fn) is None
    assert compat.autograd_function_of(None) is None


def test_memory_has_an_identity() -> None:
    """Else a gradient that others hold could be overwritten: gradients would be wrong."""
    x, empty = torch.ones(4), torch.empty(0)
    assert compat.storage_identity(x) == compat.storage_identity(x[1:])
    assert len({compat.storage_identity(y) for y in (x, x.clone(), empty, torch.empty(0))}) == 4


def test_writing_is_counted() -> None:
    """Else a layer input that was changed before backward, and a weight that was changed while held, are not found."""
    x = torch.ones(4)
    before = compat.version_of(x)
    x.view(2, 2).mul_(2)
    assert compat.version_of(x) == before + 1


def test_hooks_are_seen() -> None:
    """Else fused kernels pass by who watches a module, and outputs are written over inputs that a hook holds."""
    for register, in_forward in (
        ("register_forward_hook", True),
        ("register_forward_pre_hook", True),
        ("register_full_backward_hook", False),
        ("register_full_backward_pre_hook", False),
    ):
        module = nn.Linear(2, 2)
        assert not compat.is_hooked(module)
        hook = getattr(module, register)(lambda *_: None)
        assert compat.is_hooked(module)
        assert compat.forward_is_hooked(module) == in_forward
        hook.remove()
        assert not compat.is_hooked(module)


def test_modes_are_seen() -> None:
    """Else fake tensors and tracers do not see longfit's operators."""
    assert not compat.dispatch_mode_is_active()
    with TorchDispatchMode():
        assert compat.dispatch_mode_is_active()


def test_integers_are_multiplied_into_wider_ones() -> None:
    """Else int8 layers that compute in integers take their products in float32, several times slower."""
    a, b = torch.randint(-9, 9, (3, 8), dtype=torch.int8), torch.randint(-9, 9, (8, 5), dtype=torch.int8)
    product = compat.int8_product(a, b)
    assert product.dtype == torch.int32
    assert torch.equal(product, (a.long() @ b.long()).int())


def test_a_parameter_can_be_put_where_registering_would_move_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else PEFT, which builds adapters on the meta device, would take the numbers of a base from it."""
    module, values = nn.Linear(2, 2, device="meta"), nn.Parameter(torch.ones(2, 2))
    monkeypatch.setattr(nn.Module, "register_parameter", lambda *_: pytest.fail("registered"))
    compat.put_parameter(module, "weight", values)
    assert module.weight is values
    assert dict(module.named_parameters())["weight"] is values


def test_several_tensors_are_scaled_in_place() -> None:
    """Else clipping gradients does nothing."""
    tensors = [torch.ones(2), torch.full((3,), 2.0)]
    compat.multiply_all_(tensors, 0.5)
    assert [x.tolist() for x in tensors] == [[0.5, 0.5], [1.0, 1.0, 1.0]]


def test_a_cpu_that_has_no_memory_left_says_so() -> None:
    """Else a run that could go on with less, or page its optimiser state out, stops."""
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert compat.is_out_of_memory(caught.value)
    assert not compat.is_out_of_memory(RuntimeError("shapes do not fit"))


def test_the_flash_kernel_of_a_cpu_returns_and_takes_the_log_sum_exp() -> None:
    """Else attention in dtypes without a C++ kernel has to run in the slow reference."""
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    scores = (q @ k.mT * 0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = scores.softmax(-1) @ v
    grad = torch.randn_like(expected)
    inputs = [x.detach() for x in (q, k, v)]
    out, lse = compat.flash_cpu_forward(*inputs, 0.0, True, attn_mask=None, scale=0.5)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    got = compat.flash_cpu_backward(grad, *inputs, out, lse, 0.0, True, attn_mask=None, scale=0.5)
    for mine, own in zip(got, torch.autograd.grad(expected, [q, k, v], grad), strict=True):
        torch.testing.assert_close(mine, own)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("flash_forward", ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "scale", "window_size_left")),
        ("flash_backward", ("logsumexp", "cum_seq_q", "rng_state", "unused", "window_size_right")),
        ("efficient_forward", ("cu_seqlens_q", "custom_mask_type", "compute_log_sumexp", "scale")),
        ("efficient_backward", ("logsumexp", "philox_seed", "custom_mask_type", "bias_requires_grad", "scale")),
    ],
)
def test_the_kernels_of_a_card_take_what_they_are_given(name: str, arguments: tuple[str, ...]) -> None:
    """Else attention on a card has to run in the slow reference."""
    names = {argument.name for argument in getattr(compat, name)._schema.arguments}
    assert names >= set(arguments)


def test_tensors_without_numbers_are_told_from_others() -> None:
    """Else a model on fake tensors, with which memory is counted, would be asked for numbers that it lacks."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert compat.holds_values(torch.zeros(2))
    assert not compat.holds_values(torch.zeros(2, device="meta"))
    with FakeTensorMode():
        assert not compat.holds_values(torch.zeros(2))


def test_autocast_says_its_dtype() -> None:
    """Else layers of 4 and 8 bits and attention run in another dtype than torch's own under autocast."""
    cpu = torch.device("cpu")
    assert compat.autocast_dtype(cpu) is None
    with torch.autocast("cpu", dtype=torch.float16):
        assert compat.autocast_dtype(cpu) == torch.float16
        with compat.without_autocast(cpu):
            assert compat.autocast_dtype(cpu) is None
    meta = torch.device("meta")  # torch raises there
    with compat.without_autocast(meta):
        assert compat.autocast_dtype(meta) is None


def test_a_function_called_unwatched_calls_no_subclass() -> None:
    """Else a watched weight would watch what is computed from it, without end."""

    class Watching(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return compat.unwatched(func, args, kwargs or {})

    assert type(torch.ones(2).as_subclass(Watching) + 1) is Tensor
