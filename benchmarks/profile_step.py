"""Where a training step of SmolLM2-135M goes on a CPU: seconds by phase and operation, and the floor of its products.

One thread, and its own processor time: that does not count what other processes take, so a profile of a busy machine
has the same shares as one of an idle one (caches aside). Each torch operation and each C++ kernel is clocked alone,
without what it calls; what is left of the step is Python and autograd. The floor is the time that the step's large
products take at the speed a dense product of torch's reaches here, on the same clock.

    python benchmarks/profile_step.py                    2,048 tokens, exact attention, this processor's best
    python benchmarks/profile_step.py --isa avx2         as on a processor without AVX-512
    python benchmarks/profile_step.py --context 4096 --steps 1
"""

from forced_isa import DTYPE, add_argument  # before torch

# isort: split
import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine_cpu import Cell, dense_folder, longfit_model, token_ids

PRODUCTS = {"mm", "addmm", "addmm_"}
REPEATS = 5


class Clock(TorchDispatchMode):
    """Adds up processor time by (phase, operation), each without what it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.calls: dict[tuple[str, str], int] = defaultdict(int)
        self._phases: list[str] = ["other"]
        self._inner: list[float] = [0.0]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what follows for a phase."""
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    def timed(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function and count its time."""
        key = self._phases[-1], name
        self._inner.append(0.0)
        start = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent = time.thread_time() - start
            self.seconds[key] += spent - self._inner.pop()
            self.calls[key] += 1
            self._inner[-1] += spent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.timed(func.overloadpacket.__name__ + _size(func, args), func, *args, **(kwargs or {}))


def _size(func: Any, args: tuple[Any, ...]) -> str:
    """Tell products apart: those with the output matrix, with an adapter, with a piece of a 4-bit weight."""
    name = func.overloadpacket.__name__
    if name not in PRODUCTS:
        return ""
    sizes = [size for arg in args if isinstance(arg, torch.Tensor) for size in arg.shape]
    if max(sizes) > 32768:
        return " vocabulary"
    return " low rank" if min(sizes) <= 64 else " weight"


def in_phase(clock: Clock, owner: Any, name: str, phase: str | Callable[..., str]) -> None:
    """Let calls of a function belong to a phase."""
    function = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with clock.phase(phase if isinstance(phase, str) else phase(*args)):
            return function(*args, **kwargs)

    setattr(
        owner, name, staticmethod(wrapped) if isinstance(owner, type) and name in ("forward", "backward") else wrapped
    )


def watch(clock: Clock) -> None:
    """Put the clock around phases and kernels."""
    from longfit.engine.loss.linear_cross_entropy import _LinearCrossEntropy
    from longfit.engine.sweep import tile_pass
    from longfit.engine.sweep.layer import _SweptLayer
    from longfit.engine.sweep.layer_call import LayerCall
    from longfit.kernels.cpu.library import Library

    in_phase(clock, _SweptLayer, "forward", "forward")
    in_phase(clock, _SweptLayer, "backward", "backward")
    in_phase(clock, _LinearCrossEntropy, "forward", "loss")
    in_phase(
        clock,
        LayerCall,
        "run",
        lambda call, hidden, tile, *state: "forward" if isinstance(tile, tile_pass.ForwardTile) else "recompute",
    )
    kernel = Library.kernel

    def clocked(self: Library, name: str) -> Callable[..., Any]:
        function = kernel(self, name)
        return lambda *args: clock.timed(f"kernel {name}", function, *args)

    Library.kernel = clocked  # type: ignore[method-assign]


def product_speed(dtype: torch.dtype) -> float:
    """FLOP/s of a dense product of the model's shape, one thread."""
    a, b = torch.randn(2048, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.thread_time()
        torch.mm(a, b)
        best = min(best, time.thread_time() - start)
    return 2 * a.shape[0] * b.numel() / best


def floor(model: Any, context: int) -> dict[str, float]:
    """FLOP of a step's large products: forward, input gradients, and what is computed again in between."""
    config = model.config
    linear = sum(
        module.in_features * module.out_features for module in model.modules() if hasattr(module, "row_format")
    )
    queries = config.num_attention_heads * config.hidden_size // config.num_attention_heads
    attention = 2 * queries * context * context * config.num_hidden_layers  # causal: half of 4 Q T^2
    return {
        "4-bit forward": 2 * linear * context,
        "4-bit input gradient": 2 * linear * context,
        "output matrix": 4 * config.vocab_size * config.hidden_size * context,
        "attention forward": attention,
        "attention backward": 2.5 * attention,
    }


def profile(context: int, steps: int, folder: Path) -> None:
    from longfit.engine.loss.training_loss import training_loss

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, tokenizer = longfit_model(folder, Cell("longfit", context), folder)
    ids = token_ids(tokenizer, context)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    clock = Clock()

    def step() -> None:
        training_loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    training_loss(model, ids[:, :128]).backward()
    optimizer.zero_grad()
    watch(clock)
    start = time.thread_time()
    with clock:
        for _ in range(steps):
            step()
    total = (time.thread_time() - start) / steps
    render(clock, total, steps, context, floor(model, context))


def render(clock: Clock, total: float, steps: int, context: int, flop: dict[str, float]) -> None:
    print(f"{context:,} tokens, {DTYPE}, one thread: {total:.2f} s a step, {context / total:.1f} tokens/s\n")
    print("| phase | operation | calls | seconds | share |\n|---|---|---|---|---|")
    small = 0.0
    for key, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        if seconds / steps < 0.003 * total:
            small += seconds / steps
            continue
        row = f"| {key[0]} | {key[1]} | {clock.calls[key] // steps} | {seconds / steps:.3f} |"
        print(f"{row} {seconds / steps / total:.1%} |")
    print(f"| | operations below 0.3 percent | | {small:.3f} | {small / total:.1%} |")
    rest = total - sum(clock.seconds.values()) / steps
    print(f"| | Python and autograd | | {rest:.3f} | {rest / total:.1%} |")
    speed = product_speed(getattr(torch, DTYPE))
    print(f"\ndense product 2048 x 576 x 1536: {speed / 1e9:.0f} GFLOP/s; at that speed\n")
    print("| products | GFLOP | seconds | share |\n|---|---|---|---|")
    for name, value in {**flop, "all": sum(flop.values())}.items():
        print(f"| {name} | {value / 1e9:.0f} | {value / speed:.2f} | {value / speed / total:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=1)
    add_argument(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        profile(arguments.context, arguments.steps, dense_folder(Path(parent)))


if __name__ == "__main__":
    main()
