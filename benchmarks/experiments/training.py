"""The training loop of the experiments, from public pieces of longfit; each step is `longfit train`'s.

A loop of its own, and not ``longfit.train``, because an experiment changes things that a run keeps: attention in the
middle of training, windows shorter than the context that the positions are scaled for, a clock that stops while
held-out text is measured.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longfit.attention.hf_attention import attention_key
from longfit.demo import demo_model
from longfit.engine.hf_model import base_model
from longfit.engine.loss.training_loss import training_loss
from longfit.engine.sweep.install import enable_sweep
from longfit.model.adapters import add_adapters
from longfit.model.context import extend_context
from longfit.model.load import load
from longfit.optim.adamw import PagedAdamW
from longfit.training.optimizer import clip_gradients
from longfit.training.schedule import learning_rate


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the defaults are those of ``longfit train``.

    Attributes:
        quant: storage of the frozen base; ``"none"`` is 16 bits.
        context: tokens the positions are scaled for; the windows may be shorter.
        rope: scaling of the positions.
        attention: ``"exact"`` or ``"shifted"``, with ``group_size``.
        exact_from: step from which shifted training goes on with exact attention; None is never.
        train_norms, train_embeddings: LongLoRA's extra trainable parts.
        peak: learning rate after a warm-up over a tenth of the steps; ``schedule`` says how it goes on.
        seed: of the adapters.
    """

    quant: str = "nf4"
    context: int = 8192
    rope: str = "yarn"
    attention: str = "exact"
    group_size: int | None = None
    exact_from: int | None = None
    train_norms: bool = False
    train_embeddings: bool = False
    peak: float = 2e-4
    schedule: str = "cosine"
    seed: int = 0


def extended_base(recipe: Recipe) -> tuple[Any, Any]:
    """The base with scaled positions, in eval mode, without adapters; and its tokenizer."""
    model, tokenizer = load(demo_model(), quant=recipe.quant, device="cpu")
    extend_context(
        model,
        tokenizer,
        context=recipe.context,
        rope=recipe.rope,
        attention=recipe.attention,
        group_size=recipe.group_size,
    )
    return model, tokenizer


def trainable(recipe: Recipe) -> tuple[Any, Any]:
    """The model with fresh adapters, swept, in train mode; and its tokenizer."""
    model, tokenizer = extended_base(recipe)
    torch.manual_seed(recipe.seed)
    model = add_adapters(model, train_norms=recipe.train_norms, train_embeddings=recipe.train_embeddings)
    enable_sweep(model)
    return model.train(), tokenizer


def train(
    model: Any,
    windows: Sequence[Tensor],
    recipe: Recipe,
    *,
    after_step: Callable[[int], None] = lambda step: None,
) -> dict[str, list[float]]:
    """One optimiser step for each window.

    Args:
        model: from `trainable`.
        windows: tokens ``[window]``, in order.
        after_step: called with the number of steps done; the clock does not run meanwhile.
    Returns: ``loss`` before each step, with the attention trained with; what the step took by the clock, ``step_s``,
        and in processor time of all threads, ``step_cpu_s``, which other programs on the machine disturb less.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = PagedAdamW(parameters, lr=recipe.peak)
    record: dict[str, list[float]] = {"loss": [], "step_s": [], "step_cpu_s": []}
    for step, window in enumerate(windows):
        began, began_cpu = time.perf_counter(), time.process_time()
        if step == recipe.exact_from:
            base_model(model).set_attn_implementation(attention_key("exact"))
        loss = training_loss(model, window[None])
        loss.backward()
        clip_gradients(parameters, 1.0)
        rate = learning_rate(
            step, recipe.peak, total_steps=len(windows), warmup_steps=len(windows) // 10, schedule=recipe.schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record["step_s"].append(time.perf_counter() - began)
        record["step_cpu_s"].append(time.process_time() - began_cpu)
        record["loss"].append(loss.item())
        print(f"    step {step + 1}/{len(windows)}: {loss.item():.4f}, {record['step_s'][-1]:.1f} s", flush=True)
        after_step(step + 1)
    return record
