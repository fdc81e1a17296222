"""longfit: fine-tune large language models lighter (QLoRA) and longer (LongLoRA).

The names below are the public library. Each is imported when it is first used, so ``import longfit`` costs nothing.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load": "longfit.model.load",
    "extend_context": "longfit.model.context",
    "add_adapters": "longfit.model.adapters",
    "save_adapter": "longfit.model.save",
    "load_adapter": "longfit.model.save",
    "reports": "longfit.model.reports",
    "training_loss": "longfit.engine.loss.training_loss",
    "enable_sweep": "longfit.engine.sweep.install",
    "disable_sweep": "longfit.engine.sweep.install",
    "check_gradients": "longfit.engine.gradient_check",
    "PagedAdamW": "longfit.optim.adamw",
    "quantize_4bit": "longfit.kernels.dispatch",
    "dequantize_4bit": "longfit.kernels.dispatch",
    "use_backend": "longfit.kernels.dispatch",
    "QuantState": "longfit.numerics.quant_state",
    "Linear4bit": "longfit.layers.linear4bit",
    "plan": "longfit.planning.plan",
    "train": "longfit.training.loop",
    "open_run": "longfit.training.prepare",
    "merge": "longfit.exporting.merge",
    "export": "longfit.exporting.export",
    "RunConfig": "longfit.config",
    "perplexity": "longfit.evaluation.perplexity",
    "passkey": "longfit.evaluation.passkey",
    "LongfitError": "longfit.errors",
}
__all__ = [*_HOME, "__version__"]

if "LONGFIT_ISA" in os.environ:  # for tests and bug reports: torch is held to the same instruction set
    import_module("longfit.kernels.cpu.processor").force()

if TYPE_CHECKING:
    from longfit.config import RunConfig
    from longfit.engine.gradient_check import check_gradients
    from longfit.engine.loss.training_loss import training_loss
    from longfit.engine.sweep.install import disable_sweep, enable_sweep
    from longfit.errors import LongfitError
    from longfit.evaluation.passkey import passkey
    from longfit.evaluation.perplexity import perplexity
    from longfit.exporting.export import export
    from longfit.exporting.merge import merge
    from longfit.kernels.dispatch import dequantize_4bit, quantize_4bit, use_backend
    from longfit.layers.linear4bit import Linear4bit
    from longfit.model.adapters import add_adapters
    from longfit.model.context import extend_context
    from longfit.model.load import load
    from longfit.model.reports import reports
    from longfit.model.save import load_adapter, save_adapter
    from longfit.numerics.quant_state import QuantState
    from longfit.optim.adamw import PagedAdamW
    from longfit.planning.plan import plan
    from longfit.training.loop import train
    from longfit.training.prepare import open_run


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longfit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
