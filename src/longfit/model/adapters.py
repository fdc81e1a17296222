"""Low-rank adapters on every linear layer, and LongLoRA's extra trainable parts (QLoRA, section 3; LongLoRA, 3.3).

LoRA on all linear layers is what QLoRA needs to match full fine-tuning; embeddings and norms, a few per cent of the
parameters, are what LongLoRA needs to close the gap at long context. All of it is ordinary PEFT: ``target_modules``
and ``modules_to_save``, one adapter file.

Embeddings and norms keep the dtype of the base. At LongLoRA's learning rate a bfloat16 norm weight would never move,
so they must be trained by an optimiser with fp32 masters (``longfit.PagedAdamW``). Adapter weights are fp32 from the
start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from longfit.compat.peft import register_adapter_layer
from longfit.compat.transformers import tied_weights
from longfit.engine.hf_model import base_model, decoder
from longfit.errors import ModelError
from longfit.layers.experts import packed_experts
from longfit.layers.qlora import QLoRALinear
from longfit.layers.qlora_experts import ParamWrapper
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model.adapter_start import StartReport, begin, require_no_experts
from longfit.model.adapter_targets import excluded, expert_targets, linear_targets, untargeted
from longfit.model.vocabulary import added_rows, tables


@dataclass(frozen=True)
class AdapterReport:
    """What is trained: layers with an adapter, modules trained whole, parameter counts, and rows of new tokens.

    Attributes:
        adapted: layers with an adapter; stacked experts once for each of their parameters that has one.
        trained_whole: modules that train as they are.
        trainable_params, total_params: counts.
        new_tokens: rows of the embedding that were added and train.
        untargeted: linear layers that cannot have an adapter, by name, and why.
        start: what adapters began with; None if at nothing, as LoRA does.
    """

    adapted: tuple[str, ...]
    trained_whole: tuple[str, ...]
    trainable_params: int
    total_params: int
    new_tokens: int = 0
    untargeted: dict[str, str] = field(default_factory=dict)
    start: StartReport | None = None

    def __str__(self) -> str:
        """Say it in a line, and in another for each reason why layers have no adapter."""
        share = f"{self.trainable_params:,} of {self.total_params:,} parameters train"
        whole = f", {len(self.trained_whole)} modules whole" if self.trained_whole else ""
        rows = f", rows of {self.new_tokens:,} new tokens" if self.new_tokens else ""
        lines = [f"{share}: adapters on {len(self.adapted)} layers{whole}{rows}"]
        if self.start is not None:
            lines.append(str(self.start))
        for reason in dict.fromkeys(self.untargeted.values()):
            names = [name for name, why in self.untargeted.items() if why == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"no adapter: {', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines)


def add_adapters(
    model: Any,
    *,
    rank: int = 16,
    alpha: float = 32,
    rank_stabilised: bool = False,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    experts: bool = False,
    train_embeddings: bool = False,
    train_norms: bool = False,
    train_new_tokens: bool = False,
) -> PeftModel:
    """Put an adapter on the target layers and freeze everything else.

    The layers are replaced inside ``model``, which therefore trains as well as the returned ``PeftModel`` does. A base
    loaded with ``start="loftq"`` gives its adapters their first values.

    Args:
        rank: R; columns of A and rows of B.
        alpha: the adapter's output is scaled by ``alpha / rank``.
        rank_stabilised: scale by ``alpha / sqrt(rank)`` instead, so that large ranks learn as fast as small ones
            (Kalajdzievski, 2023: rsLoRA).
        dropout: probability, on the adapter's input only.
        targets: ``"all-linear"`` (all but the output head) or the last parts of layer names.
        experts: an adapter on every weight of every stacked expert too.
        train_embeddings: train the token embeddings whole; a tied output head follows them.
        train_norms: train all normalisation weights whole.
        train_new_tokens: train the rows that ``load(..., resize_embeddings=True)`` added, and no other rows.
    Returns: the ``PeftModel``; ``longfit.reports(model).adapters`` tells what it trains.
    Raises: ModelError: a target that matches nothing, no norms or embeddings where they are asked for, new
        tokens where no rows were added, or adapters already there.
    """
    if rank < 1:
        raise ModelError(f"rank={rank}: must be at least 1; 16 is a good start")
    if not 0.0 <= dropout < 1.0:
        raise ModelError(f"dropout={dropout}: must be at least 0 and below 1")
    if isinstance(model, PeftModel) or any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ModelError("add_adapters: this model has adapters already; load it again or merge them first")
    target_modules = linear_targets(model, targets)
    if experts:
        require_no_experts(model)
    target_parameters = expert_targets(model, dropout=dropout) if experts else None
    trained_whole = whole_modules(model, train_embeddings=train_embeddings, train_norms=train_norms)
    new_rows = _new_rows(model, train_embeddings=train_embeddings) if train_new_tokens else None
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rank_stabilised,
        lora_dropout=dropout,
        target_modules=target_modules,
        exclude_modules=excluded(model),
        target_parameters=target_parameters,
        modules_to_save=trained_whole or None,
        trainable_token_indices=new_rows,
        ensure_weight_tying=train_embeddings and bool(tied_weights(model)),
        task_type="CAUSAL_LM",
    )
    register_layers(config, model)
    adapted = get_peft_model(model, config)
    adapted.__dict__["start"] = begin(adapted)
    return adapted


def _new_rows(model: Any, *, train_embeddings: bool) -> dict[str, list[int]]:
    """PEFT's setting for the rows that were added to a model; a tied output matrix follows the embedding."""
    rows = list(added_rows(model.config))
    if not rows:
        raise ModelError("train_new_tokens: no rows were added to this model; load it with resize_embeddings=True")
    if train_embeddings:
        raise ModelError("train_new_tokens: train_embeddings trains all rows of the embedding; drop one of the two")
    return {name.rsplit(".", 1)[-1]: rows for name in tables(model)}


def register_layers(config: LoraConfig, model: nn.Module | None = None) -> None:
    register_adapter_layer(config, QuantizedLinear, QLoRALinear)
    modules = () if model is None else model.modules()
    for kind in {type(module) for module in modules if packed_experts(module) is not None}:
        register_adapter_layer(config, kind, ParamWrapper)


def whole_modules(model: Any, *, train_embeddings: bool, train_norms: bool) -> list[str]:
    """Names of the modules of the decoder that are trained whole: their last parts, unless another's name ends so."""
    embeddings, inside = model.get_input_embeddings(), set(decoder(model).modules())
    chosen, others = [], []
    for name, module in model.named_modules():
        if (train_embeddings and module is embeddings) or (train_norms and module in inside and is_norm(module)):
            chosen.append(name)
        else:
            others.append(name)
    if train_norms and not any(map(is_norm, inside)):
        raise ModelError("train_norms: no normalisation layers with weights in this model")
    shared = {last for last in {name.rsplit(".", 1)[-1] for name in chosen} if any(o.endswith(last) for o in others)}
    return sorted({name if name.rsplit(".", 1)[-1] in shared else name.rsplit(".", 1)[-1] for name in chosen})


def is_norm(module: nn.Module) -> bool:
    """A normalisation layer with a weight vector, whatever the family calls its class."""
    return "Norm" in type(module).__name__ and any(True for _ in module.parameters(recurse=False))


def adapter_report(model: nn.Module) -> AdapterReport:
    """List what a model with adapters trains."""
    modules = list(model.named_modules())
    token_layers = [module for _, module in modules if isinstance(module, TrainableTokensLayer)]
    return AdapterReport(
        adapted=tuple(name for name, module in modules if isinstance(module, LoraLayer)),
        trained_whole=tuple(name for name, module in modules if isinstance(module, ModulesToSaveWrapper)),
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_params=sum(own_params(module) for _, module in modules),
        new_tokens=max((len(next(iter(m.token_indices.values()), ())) for m in token_layers), default=0),
        untargeted=untargeted(base_model(model)),
        start=model.__dict__.get("start"),
    )


def own_params(module: nn.Module) -> int:
    """Parameters that belong to this module itself; a quantised weight counts as what it stands for."""
    if isinstance(module, QuantizedLinear):
        bias = 0 if module.bias is None else module.bias.numel()
        return module.in_features * module.out_features + bias
    if (packed := packed_experts(module)) is not None:
        own = (p.numel() for name, p in module.named_parameters(recurse=False) if name not in packed.formats)
        return sum(packed.numel(name) for name in packed.formats) + sum(own)
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))
