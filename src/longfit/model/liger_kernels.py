"""Fused RMSNorm, rotary embedding and SwiGLU (or GeGLU) on a card, through liger-kernel where it is installed.

Written in torch, each of the three is a chain of small operations that read and write a tile of activations again and
again: an RMS norm makes a float32 copy of its input, the rotary embedding copies queries and keys, SwiGLU keeps three
tensors of the intermediate size. Liger's Triton kernels read once and write once, and their backward writes over what
was saved. Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, section 3.2.

It is applied as ``Trainer(use_liger_kernel=True)`` does: by ``transformers.integrations.liger``, which gives the norms
and MLPs of *this* model another forward. Two things it does beyond that, for the whole process, are undone here:

- It exchanges the classes from which later models of the family would be built. They are put back.
- It exchanges the rotary embedding, a function of the family's module that all its models share. That is put back too,
  and exchanged only while a layer of this model is swept (``engine/sweep/fused_modules.py``).

Not here: the loss, which is longfit's own (``engine/loss/training_loss.py``); attention; and anything on a CPU.
"""

import sys
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from longfit.engine.hf_model import base_model
from longfit.engine.sweep.fused_modules import ROTARY, FusedRotary
from longfit.errors import BackendError
from longfit.kernels.dispatch import dispatcher
from longfit.kernels.elementwise import liger_unavailable
from longfit.kernels.triton import device as triton_device

KERNELS = ("auto", "none", "liger")

ACTIVATIONS = {
    **dict.fromkeys(("llama", "mistral", "phi3", "qwen2", "qwen3"), ("hidden_act", ("silu", "swish"))),
    **dict.fromkeys(("gemma2", "gemma3_text"), ("hidden_activation", ("gelu_pytorch_tanh",))),
}
"""By model type: the config key of the MLP's activation, and the names under which it is the one that liger computes.

Liger knows more families. These are the ones whose gradients are tested here, tile by tile, and it does not look at the
activation itself.
"""


@dataclass(frozen=True)
class FusedReport:
    """What computes norms, rotary embedding and SwiGLU.

    Attributes:
        kernels: name and version of the package, or None where the model's own torch operations stay.
        reason: why they stay; empty otherwise.
        modules: names of the modules that compute in another way now.
    """

    kernels: str | None
    reason: str = ""
    modules: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in one line."""
        if self.kernels is None:
            return f"norms, rotary, SwiGLU: the model's own ({self.reason})"
        return f"norms, rotary, SwiGLU: {self.kernels}, {len(self.modules)} modules"


def fuse(model: nn.Module, *, kernels: str = "auto") -> FusedReport:
    """Let a model on a card compute norms, rotary embedding and SwiGLU in fused kernels.

    Call it after ``add_adapters``, which replaces modules. There is no way back for this model, and it must stay on its
    card.

    Args:
        model: a transformers causal language model, or a PeftModel around one.
        kernels: ``"auto"`` takes liger-kernel where it can, ``"liger"`` insists on it, ``"none"`` leaves the model.
    Returns: what was done, or why nothing.
    Raises: BackendError: ``kernels`` is unknown, or liger-kernel was insisted on and cannot be used; says why.
    """
    if kernels not in KERNELS:
        raise BackendError(f"fused kernels {kernels!r}: must be one of {', '.join(KERNELS)}")
    if kernels == "none":
        return FusedReport(None, "as asked")
    base = base_model(model)
    forced = dispatcher().forced_for("rms_norm")
    if forced not in (None, "liger"):
        return FusedReport(None, f"use_backend forces {forced!r}")
    obstacle = liger_unavailable(base.device.type) or not_known(base)
    if obstacle is None:
        return FusedReport(f"liger-kernel {version('liger-kernel')}", modules=_apply(base))
    if kernels == "liger":
        raise BackendError(f"fused kernels 'liger': {obstacle}; use auto or none")
    return FusedReport(None, obstacle)


def not_known(base: Any) -> str | None:
    """Return what about the model liger's kernels do not compute, or None."""
    family, config = base.config.model_type, base.config
    if family not in ACTIVATIONS:
        return f"not tested with liger-kernel for {family}, only for {', '.join(sorted(ACTIVATIONS))}"
    key, names = ACTIVATIONS[family]
    activation = config.to_dict()[key]
    if activation not in names:
        return f"{key} is {activation}, liger-kernel computes {names[0]}"
    return None if _compiles(base.dtype, base.device) else f"liger-kernel has no kernels for {base.dtype} here"


def _compiles(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton reads and writes a dtype on a device: no float64 in liger, no bfloat16 on cards before Ampere."""
    return triton_device.kernel_dtype(dtype, device) == dtype


def _apply(base: Any) -> tuple[str, ...]:
    """Put liger's kernels into a model and leave the rest of its family as it was; return the names of its modules."""
    from transformers.integrations.liger import apply_liger_kernel

    family = sys.modules[type(base).__module__]
    found = dict(vars(family))
    forwards = {name: vars(module).get("forward") for name, module in base.named_modules()}
    try:
        apply_liger_kernel(base, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    finally:
        fused: Any = vars(family).get("apply_rotary_pos_emb")
        vars(family).update(found)
    own = found["apply_rotary_pos_emb"]
    if fused is not own:
        vars(base)[ROTARY] = FusedRotary(family, fused)
    changed = tuple(n for n, module in base.named_modules() if vars(module).get("forward") is not forwards[n])
    if not changed or fused is own:
        raise BackendError(
            f"liger-kernel {version('liger-kernel')} changed nothing in a {base.config.model_type} model; "
            "install a newer one, or use fused kernels 'none'"
        )
    return changed
