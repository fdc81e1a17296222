"""Norms and gated products of a layer in one pass over the elements, for as long as the layer is swept.

A root-mean-square norm written in torch makes copies of its input, silu and its product keep two tensors of the
intermediate size and make two more in backward. On a CPU longfit has kernels that read and write every element once
(``kernels/cpu/elementwise.py``).

Which modules compute such a function is asked of the modules, not of a list of families, and of each dtype for itself:
a norm must give what the formula gives, for random weights and rows of every size; of an MLP the inner projections are
made to give chosen tensors, and what reaches the outer one must be ``silu(gate) * up``. In bf16 that is bit for bit, in
the order of roundings of the kernels. In float32 the last bits are the order of a sum and the quality of an
exponential, and both the module and the kernel must lie within the bound of such roundings from the exact value.
Gemma's norm, which adds one to its weight, or an MLP with another activation, a clamp, a dropout or parameters beside
its projections keep their own forward.

Nothing is installed in a model. The forward of a module is set aside while its layer is swept, and only there; inputs
that the kernels do not take (another dtype, say) are computed by torch as the module would. Rotary embedding, which
models compute in a function of their family's module, is exchanged in the same way where liger-kernel has one.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfit.compat.torch import is_hooked
from longfit.engine.model_state import preserve_modes
from longfit.engine.sweep.recompute_state import preserve_random_state
from longfit.kernels.cpu import elementwise as cpu_elementwise
from longfit.kernels.elementwise import runs_kernel


# ------------------------------------------------------------------------------------------------ the two functions
class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse_rms = cpu_elementwise.rms_norm_forward(x, weight, eps=eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return *cpu_elementwise.rms_norm_backward(grad, *ctx.saved_tensors, trains=ctx.needs_input_grad[1]), None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return cpu_elementwise.swiglu_forward(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return cpu_elementwise.swiglu_backward(grad, *ctx.saved_tensors)


# ------------------------------------------------------------------------------------------------ the modules
@dataclass(frozen=True)
class Norm:
    """A module that is a root-mean-square norm with a weight, in some dtypes."""

    module: nn.Module
    eps: float
    dtypes: tuple[torch.dtype, ...]

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        if x.dtype not in self.dtypes or not runs_kernel("rms_norm", x, weight):
            return type(self.module).forward(self.module, x)
        return _RmsNorm.apply(x, weight, self.eps)


@dataclass(frozen=True)
class GatedMlp:
    """A module that computes ``down(silu(gate(x)) * up(x))``, in some dtypes."""

    module: nn.Module
    dtypes: tuple[torch.dtype, ...]

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = self.module
        gate, up = inner.gate_proj(x), inner.up_proj(x)
        if gate.dtype not in self.dtypes or gate.shape != up.shape or not runs_kernel("swiglu", gate, up):
            return inner.down_proj(F.silu(gate) * up)
        return inner.down_proj(_SwiGlu.apply(gate, up))


ROTARY = "_longfit_rotary"
"""Attribute of a transformers model whose rotary embedding is computed by another function while it is swept."""


@dataclass(frozen=True)
class FusedRotary:
    """A function that computes what ``apply_rotary_pos_emb`` of a family's module does."""

    family: ModuleType
    function: Callable[..., tuple[Tensor, Tensor]]


@contextmanager
def fused_rotary(base: nn.Module) -> Iterator[None]:
    """Let a model's family rotate by its fused function, if it has one, while this lasts."""
    fused: FusedRotary | None = vars(base).get(ROTARY)
    if fused is None:
        yield
        return
    names = vars(fused.family)
    own = names["apply_rotary_pos_emb"]
    try:
        names["apply_rotary_pos_emb"] = fused.function
        yield
    finally:
        names["apply_rotary_pos_emb"] = own


Fused = Norm | GatedMlp
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROBED = (torch.bfloat16, torch.float32)
"""What a model trains in on a CPU; in other dtypes every module keeps its own forward."""


def find_fused(layer: nn.Module) -> tuple[Fused, ...]:
    """The modules of a layer whose function the kernels compute; none without kernels, on a card or in a trace."""
    if cpu_elementwise.supported() is not None or not all(map(_is_plain, layer.parameters())):
        return ()
    with torch.no_grad(), preserve_random_state(torch.device("cpu")):
        found = [as_norm(module) or as_gated_mlp(module) for module in layer.modules()]
    return tuple(fused for fused in found if fused is not None)


def _is_plain(parameter: Tensor) -> bool:
    return type(parameter.data) is Tensor and parameter.device.type == "cpu"


@contextmanager
def fused_forwards(modules: tuple[Fused, ...]) -> Iterator[None]:
    """Compute these modules by the kernels while this lasts; not those that somebody else has replaced or watches."""
    free = [fused for fused in modules if "forward" not in vars(fused.module) and not _is_passed_by_watched(fused)]
    try:
        for fused in free:
            fused.module.forward = fused.forward
        yield
    finally:
        for fused in free:
            vars(fused.module).pop("forward", None)


def _is_passed_by_watched(fused: Fused) -> bool:
    """Whether the kernels would pass by a module inside, such as an activation, whose call somebody wants to see."""
    inside = fused.module.named_children()
    return any(_is_watched(child) for name, child in inside if name not in PROJECTIONS)


def _is_watched(module: nn.Module) -> bool:
    return is_hooked(module) or "forward" in vars(module)


# ------------------------------------------------------------------------------------------------ who computes what
def as_norm(module: nn.Module) -> Norm | None:
    """The module as a norm, in the dtypes in which it gives ``w * (x / rms(x))``, the quotient rounded."""
    eps = vars(module).get("variance_epsilon", vars(module).get("eps"))
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers(), *module.named_children())]
    if names != ["weight"] or not isinstance(eps, float) or not _takes_one_tensor(module) or _is_watched(module):
        return None
    if module.weight.dim() != 1:  # type: ignore[operator]
        return None
    dtypes = tuple(dtype for dtype in PROBED if _is_norm(module, eps, dtype))
    return Norm(module, eps, dtypes) if dtypes else None


def _is_norm(module: nn.Module, eps: float, dtype: torch.dtype) -> bool:
    size = len(module.weight)  # type: ignore[arg-type]
    weight, x = _chosen(size, 1, dtype)[0], _chosen(size, 2, dtype)
    wide = x.float() if dtype == torch.bfloat16 else x.double()
    quotient = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    expected = weight * quotient.to(dtype) if dtype == torch.bfloat16 else weight.double() * quotient
    # A sum of D squares errs by at most D roundings, its root by half; root, quotient, weight and eps by 6 more.
    answers = (torch.func.functional_call(module, {"weight": weight}, (x,)) for _ in _modes(module))
    return all(_agree(answer, expected, dtype, roundings=size / 2 + 6) for answer in answers)


def as_gated_mlp(module: nn.Module) -> GatedMlp | None:
    """The module as a gated MLP, in the dtypes in which ``silu(gate) * up`` reaches its outer projection."""
    children = dict(module.named_children())
    if not set(PROJECTIONS) <= children.keys() or not _takes_one_tensor(module):
        return None
    if any(map(_is_watched, children.values())):  # who watches must not be shown the tensors chosen below
        return None
    tensors = (name for name, _ in (*module.named_parameters(), *module.named_buffers()))
    if any(name.split(".")[0] not in PROJECTIONS for name in tensors):  # a scale, say, that is 1 now and trains
        return None
    outer, inner = (vars(children[name]).get("in_features") for name in ("gate_proj", "down_proj"))
    if not isinstance(outer, int) or not isinstance(inner, int):
        return None
    dtypes = tuple(dtype for dtype in PROBED if _is_gated_mlp(module, children, outer, inner, dtype))
    return GatedMlp(module, dtypes) if dtypes else None


def _is_gated_mlp(
    module: nn.Module, children: dict[str, nn.Module], outer: int, inner: int, dtype: torch.dtype
) -> bool:
    x, gate, up, out = (_chosen(size, seed, dtype)[None] for seed, size in enumerate((outer, inner, inner, outer), 1))
    expected = F.silu(gate) * up if dtype == torch.bfloat16 else F.silu(gate.double()) * up.double()
    for _ in _modes(module):
        given: dict[str, list[Tensor]] = {"gate_proj": [], "up_proj": [], "down_proj": []}
        with _answers(children, given, {"gate_proj": gate, "up_proj": up, "down_proj": out}):
            result = type(module).forward(module, x)
        inputs = [*given["gate_proj"], *given["up_proj"]]
        if len(inputs) != 2 or any(tensor is not x for tensor in inputs) or result is not out:
            return False
        # An exponential is good to a few units in the last place; a sum, a quotient and a product round once each. From
        # -88.7 on 1 + exp(-gate) is infinite, and what is left of silu there, 3e-37, is lost.
        options = {"roundings": 8, "lost": 3e-37 * float(up.abs().max())}
        if len(given["down_proj"]) != 1 or not _agree(given["down_proj"][0], expected, dtype, **options):
            return False
    return True


def _takes_one_tensor(module: nn.Module) -> bool:
    """Whether the forward is the class's own, and is called with one tensor and nothing else."""
    return "forward" not in vars(module) and len(inspect.signature(module.forward).parameters) == 1


def _chosen(size: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Rows of every magnitude between 1e-3 and 1e3, ``[16, size]``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(16, size, generator=generator) * torch.logspace(-3, 3, 16)[:, None]
    return values.to(dtype)


def _agree(answer: Any, expected: Tensor, dtype: torch.dtype, *, roundings: float, lost: float = 0.0) -> bool:
    """Whether these are the bits, or in float32 the exact values but for some roundings and what is lost."""
    if not isinstance(answer, Tensor) or answer.dtype != dtype or answer.shape != expected.shape:
        return False
    if dtype == torch.bfloat16:
        return torch.equal(answer, expected)
    bound = roundings * 2.0**-24 * expected.abs() + lost
    return bool(((answer - expected).abs() <= bound).all())


def _modes(module: nn.Module) -> Iterator[None]:
    """Evaluation and training, one after the other."""
    with preserve_modes(module.modules()):
        for training in (False, True):
            module.train(training)
            yield


@contextmanager
def _answers(
    children: dict[str, nn.Module], given: dict[str, list[Tensor]], answers: dict[str, Tensor]
) -> Iterator[None]:
    """Let some children note what they are given, and answer with chosen tensors."""

    def forward(name: str, x: Tensor) -> Tensor:
        given[name].append(x)
        return answers[name]

    before = {name: vars(children[name]).get("forward") for name in answers}
    try:
        for name in answers:
            children[name].forward = partial(forward, name)
        yield
    finally:
        for name, own in before.items():
            vars(children[name]).pop("forward", None)
            if own is not None:
                children[name].forward = own
