"""What of a run decides its bytes, and the engine's own choices where the run leaves them free.

The names are those of the run's settings (``config/sections.py``), so that what a plan proposes can be pasted into a
command. Sizes are checked here, once: a plan for nonsense would be nonsense.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from longfit.attention.limits import quarter_of
from longfit.engine.working_memory import tile_tokens
from longfit.errors import ConfigError, ContextError
from longfit.planning.shapes import ModelShape

CHOICES = {
    "device": ("cuda", "cpu"),
    "quant": ("nf4", "fp4", "int4", "int8", "none"),
    "attention": ("exact", "shifted"),
    "offload": ("device", "ram", "pinned", "file"),
    "stream": ("none", "ram", "file"),
    "optim": ("adamw", "adamw8bit"),
    "dtype": ("bfloat16", "float16", "float32"),
    "engine": ("sweep", "plain"),
}


class UnplannedError(ConfigError):
    """A run that trains, but whose memory is not planned."""


@dataclass(frozen=True)
class PlanSettings:
    """The settings of a run that a plan depends on; the defaults are those of a run.

    Attributes:
        context: tokens in a window.
        device: "cuda" for any accelerator, or "cpu".
        tile: tokens at once; None lets the engine choose.
        group_size: of shifted attention; None is a quarter of the context.
        budget: bytes of optimiser state kept on the device; None keeps all there.
        file: whether what exceeds the budget goes to a file (always, on a CPU).
        saved_attention: bytes of attention outputs saved for backward; None is the engine's choice.
        saved_products: bytes of results of linear layers saved for backward.
        evaluates: whether there is validation text.
        keep_best: whether the adapter of the best evaluation is kept.
        targets: "all-linear", or the names of the layers that get an adapter.
        dropout: on the input of the adapters.
        experts: whether stacked experts get adapters too.
        fused_kernels: on a CPU, whether norms, gated products and the loss are kernels that keep no float32 copies.
        processes: devices of the run; the plan is of one of them.
        sequence: devices that share a window.
        shard: devices that share one copy of the weights.
    """

    context: int
    device: str = "cuda"
    quant: str = "nf4"
    double_quant: bool = True
    block_size: int = 64
    dtype: str = "bfloat16"
    attention: str = "exact"
    group_size: int | None = None
    rank: int = 16
    train_embeddings: bool = False
    train_norms: bool = False
    train_new_tokens: bool = False
    batch_size: int = 1
    gradient_accumulation: int = 1
    optim: str = "adamw"
    budget: int | None = None
    file: bool = False
    engine: str = "sweep"
    offload: str = "device"
    stream: str = "none"
    tile: int | None = None
    saved_attention: int | None = None
    saved_products: int = 0
    keep_checkpoints: int = 2
    evaluates: bool = False
    keep_best: bool = True
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    experts: bool = False
    fused_kernels: bool = False
    processes: int = 1
    sequence: int = 1
    shard: int = 1

    @property
    def keeps_best(self) -> bool:
        """Whether there is an adapter of the best evaluation."""
        return self.evaluates and self.keep_best

    def __post_init__(self) -> None:
        counts = ("context", "rank", "batch_size", "gradient_accumulation", "block_size", "keep_checkpoints")
        for name in (*counts, "processes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: must be at least 1")
        for name in ("sequence", "shard"):
            if getattr(self, name) < 1 or self.processes % getattr(self, name):
                raise ConfigError(f"{name} {getattr(self, name)}: must divide the number of devices, {self.processes}")
        if self.shard > 1 and self.stream != "none":
            raise ConfigError("stream: shards are gathered, not streamed; use stream none, or shard 1")
        for name in ("tile", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}: must be at least 1; leave it out to let the engine choose")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} {getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        if self.group_size is not None and (self.group_size < 2 or self.group_size % 2):
            raise ContextError(f"group_size {self.group_size}: must be an even number of tokens, at least 2")
        if self.group_size is not None and self.attention != "shifted":
            raise ContextError(f"group_size {self.group_size}: exact attention has no groups; say attention 'shifted'")
        for name in ("saved_attention", "saved_products"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} {value}: must be at least 0, which keeps nothing")
        if self.engine == "plain":
            raise UnplannedError("engine 'plain': only swept training is planned; use engine sweep")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            raise ConfigError(f"targets {self.targets!r}: must be 'all-linear' or a tuple of names of linear layers")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout {self.dropout}: must be at least 0 and below 1")
        if self.device == "cpu" and self.offload == "pinned":
            raise ConfigError("offload 'pinned': pinned host memory is for accelerators; on a CPU use ram or file")
        if self.device == "cpu" and self.stream == "ram":
            raise ConfigError("stream 'ram': on a CPU the weights are in host memory already; use file or none")

    def changed(self, changes: Mapping[str, Any]) -> "PlanSettings":
        """Return a checked copy with some settings changed."""
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                raise ConfigError(f"{name}: a plan has no such setting; allowed: {', '.join(sorted(known))}")
        return replace(self, **changes)

    @property
    def fuses(self) -> bool:
        """Whether those kernels take the run's numbers (``kernels/cpu/elementwise.py``)."""
        return self.fused_kernels and self.device == "cpu" and self.dtype in ("bfloat16", "float32")

    @property
    def element_bytes(self) -> int:
        """Bytes of a hidden state's number."""
        return 4 if self.dtype == "float32" else 2

    @property
    def effective_group_size(self) -> int | None:
        """Tokens in a group of shifted attention; None for exact attention."""
        if self.attention == "exact":
            return None
        return self.group_size or quarter_of(self.context)

    @property
    def aliases(self) -> bool:
        """Whether layer inputs wait as the very tensors they are, as they do on their own device."""
        return self.offload == "device" or (self.offload == "ram" and self.device == "cpu")

    def tile_tokens(self, shape: ModelShape) -> int:
        """Tokens of a tile in each row of the batch (``engine/working_memory.py``, ``Sweeper.tile_for``)."""
        if self.tile is not None:
            return min(self.tile, self.context)
        width = max(2, self.element_bytes)
        chosen = tile_tokens(shape.hidden_size, shape.intermediate_size, width, self.device)
        return min(self.context, max(1, min(chosen, max(chosen // self.batch_size, 64))))
