"""Which of PEFT's ways to set up a LoRA layer a quantised base carries, and which it cannot.

PEFT's own layer reads the dense weight in three places: to start an adapter from it (PiSSA, OLoRA, orthogonal, MiCA),
to scale it (DoRA), and to merge into it. A packed weight has none to read, so ``qlora.py`` shows PEFT a dense twin
that holds dq(W) there. What rewrites the base beyond that, or needs it dense over whole batches, is refused by name
before a layer is built.

It is not the list of what PEFT knows: a way that is not named here does not read the weight, and takes PEFT's path.
"""

from __future__ import annotations

from peft import LoraConfig

from longfit.errors import ModelError

LOW_RANK_STARTS = ("pissa", "olora")
"""Starts that move a low-rank part of the base into the adapter; the base keeps its bytes, see ``QLoRALinear``."""

READING_STARTS = ("mica", "orthogonal")
"""Starts that need the weight, its dtype or its singular vectors, and leave it as it is."""

VARIANTS = ("use_dora", "alora_invocation_tokens", "velora_config", "monteclora_config", "use_bdlora")
"""Settings that give PEFT's layer another forward."""

REFUSED_STARTS = {
    "loftq": "it would quantise again what is quantised already; load the model dense, or start it as plain LoRA",
    "corda": "its covariances are collected on a dense base; use init_lora_weights='pissa', which reads dq(W)",
    "lora_ga": "it starts from gradients of the base, which is frozen in few bits; use init_lora_weights='pissa'",
}

REFUSED_SETTINGS = {
    "kasa_config": "KaSA truncates the base weight, which packed codes cannot hold; drop kasa_config",
    "use_qalora": "it belongs to GPTQ layers; drop use_qalora",
    "megatron_config": "Megatron shards dense layers; drop megatron_config",
}


def start_of(config: LoraConfig) -> str:
    """The name of the start without its iterations: ``"pissa_niter_4"`` is ``"pissa"``, plain LoRA is ``""``."""
    start = config.init_lora_weights
    return start.lower().partition("_niter_")[0] if isinstance(start, str) else ""


def reads_weight(config: LoraConfig) -> bool:
    """Whether PEFT reads the base's weight, or its dtype, while it builds the layer."""
    return start_of(config) in (*LOW_RANK_STARTS, *READING_STARTS) or any(getattr(config, v, None) for v in VARIANTS)


def require_supported(config: LoraConfig) -> None:
    """Raise ModelError naming a setting that no quantised base can carry, with the way out."""
    start = start_of(config)
    if start in REFUSED_STARTS:
        raise ModelError(f"init_lora_weights={config.init_lora_weights!r} on a quantised base: {REFUSED_STARTS[start]}")
    combined = [name for name in VARIANTS if getattr(config, name, None)]
    if start in LOW_RANK_STARTS and combined:
        raise ModelError(
            f"init_lora_weights={config.init_lora_weights!r} with {combined[0]} on a quantised base: the part taken "
            f"out of the base is subtracted by plain LoRA only; drop {combined[0]} or the start"
        )
    for name, reason in REFUSED_SETTINGS.items():
        if getattr(config, name, None):
            raise ModelError(f"{name} on a quantised base: {reason}")
    if config.fan_in_fan_out:
        raise ModelError("fan_in_fan_out on a quantised base: its weight is [out, in]; set fan_in_fan_out=False")
