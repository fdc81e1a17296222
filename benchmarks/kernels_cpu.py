"""The 4-bit and 8-bit kernels on the CPU: longfit against bitsandbytes, dense matmuls and a plain memory copy.

    python benchmarks/kernels_cpu.py [--quick] [--repeats 9] [--threads N] [--isa avx2]

First the gate: on every shape the kernels must have the bits of `numerics`, and the matmuls must agree with the dense
product of the same weight; nothing is timed on a red gate. Then peers and longfit take turns in one process, so that
whatever else the machine does meets all of them; medians are compared. "existing memory" leaves out the allocation of
the result, which costs more than the work on large shapes (the peer offers no such call on the CPU: its own C function
is called after its own decoding of the constants); "new tensor" is what a caller of the function pays. What of that the
system takes for handing out memory, whoever writes to it, is the row "first touch of as many fresh bytes".

Bandwidth rows count bytes moved: 0.5 read for the codes, 2 or 4 written, and the constants, against a copy that moves
as many. Rows with a target say whether it is met. All run in the dtype that the instruction set multiplies fast,
bfloat16 or float32. Writes results/kernels_cpu.json and .md, with ``--isa`` kernels_cpu_<isa>.json and .md; rows that
longfit loses stay in.
"""

from forced_isa import DTYPE, add_argument, suffix  # before torch

# isort: split
import argparse
import ctypes
import json
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.cextension import lib as bnb_library
from torch import Tensor

from loading_cpu import Loading, loading_rows
from longfit.kernels import dispatch
from longfit.kernels.cpu import library as cpu_library
from longfit.kernels.cpu import weights_4bit as cpu
from longfit.numerics import quant_state
from longfit.numerics.codebooks import dynamic_map
from longfit.numerics.row_format import RowFormat, to_rows
from machine import commit, machine

RESULTS = Path(__file__).parent / "results"
COMPUTE, NARROW = {"bfloat16": (torch.bfloat16, "bf16"), "float32": (torch.float32, "fp32")}[DTYPE]
BNB_DEQUANTIZE = getattr(bnb_library, f"cdequantize_blockwise_cpu_nf4_{NARROW}")
SHAPES = ((4096, 4096), (14336, 4096), (576, 576), (1536, 576))
BATCHES = (1, 4, 16, 256, 2048)

# Ratios to reach: against bitsandbytes, a memory copy, and the product with the dense weight.
DEQUANTISE = {"large": 8.0, "small": 3.0}
COPY = 0.7
QUANTISE = 40.0
GENERATE = {"bfloat16": 1.0, "float32": 2.0}[DTYPE]  # one row: of bytes, a float32 weight has twice as many
MULTIPLY = 0.9
EXTRA_BYTES = 8 << 20  # of a matmul
LOADING_SHARE = 0.05

SHORT_RACE, MOST_TURNS = 0.2, 101  # seconds below which a race goes on, and until when

Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One comparison: seconds of longfit and of a peer, and the ratio peer / longfit (above 1: longfit is faster)."""

    task: str
    shape: str
    peer: str
    longfit_s: float
    peer_s: float
    target: float | None = None

    @property
    def ratio(self) -> float:
        return self.peer_s / self.longfit_s


@dataclass(frozen=True)
class Memory:
    """Peak memory of one matmul beyond its operands and its result."""

    task: str
    shape: str
    longfit_bytes: int
    dense_bytes: int


class Weight:
    """A weight of one shape in every form that is compared."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.shape = f"{out_features}x{in_features}"
        self.size = "large" if out_features * in_features >= 1 << 24 else "small"
        generator = torch.Generator().manual_seed(0)
        self.dense = torch.randn(out_features, in_features, generator=generator).mul_(0.02).to(COMPUTE)
        self.packed, self.state = dispatch.quantize_4bit(self.dense)
        self.fmt = RowFormat.of(self.state)
        self.rows, self.constants = to_rows(self.packed, self.state)
        self.result = torch.zeros_like(self.dense)
        self.bnb_packed, self.bnb_state = bnb.quantize_4bit(self.dense, quant_type="nf4", compress_statistics=True)
        self.bnb_result = torch.zeros_like(self.dense)
        num_bytes = (self.packed.nbytes + self.state.absmax.nbytes + self.dense.nbytes) // 2
        self.source, self.target = (torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(2))
        self.described, _ = cpu._flat_weight(self.packed, self.state)

    def fill_result(self) -> None:
        numel = self.dense.numel()
        cpu._dequantize(self.described, (0, 1), (0, numel), self.result, numel)

    def touch_fresh_memory(self) -> None:
        """Write one value all over memory that is allocated as a new result's is: the least that a new tensor takes."""
        cpu_library.library().empty((self.dense.numel(),), self.dense.dtype).fill_(1)

    def fill_bnb_result(self) -> None:
        """What bitsandbytes does in `dequantize_4bit`, less the allocation of the result."""
        state = self.bnb_state
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (self.bnb_packed, absmax, self.bnb_result))
        sizes = (ctypes.c_longlong(size) for size in (state.blocksize, *self.dense.shape))
        BNB_DEQUANTIZE(*pointers, *sizes)

    def gate(self) -> None:
        """Compare with the oracle, bit by bit, and with dense products.

        The two bf16 products sum in another order in fp32 and may round to neighbouring bf16 numbers.
        """
        packed, state = quant_state.quantize_4bit(self.dense)
        assert torch.equal(self.packed, packed)
        assert torch.equal(self.state.absmax.codes, state.absmax.codes)
        expected = quant_state.dequantize_4bit(packed, state)
        self.fill_result()
        assert torch.equal(self.result, expected)
        self.fill_bnb_result()
        assert torch.equal(self.bnb_result, bnb.dequantize_4bit(self.bnb_packed, self.bnb_state))
        for num_rows in (1, 33):
            x, grad = self.input(num_rows), self.grad(num_rows)
            y, dx = (
                f(v, self.rows, self.constants, self.fmt)
                for f, v in ((dispatch.linear_4bit, x), (dispatch.linear_4bit_grad_input, grad))
            )
            torch.testing.assert_close(y, F.linear(x, expected), rtol=2**-7, atol=1e-2 * float(y.abs().mean()))
            torch.testing.assert_close(dx, grad @ expected, rtol=2**-7, atol=1e-2 * float(dx.abs().mean()))

    def input(self, num_rows: int) -> Tensor:
        return torch.randn(num_rows, self.dense.shape[1]).to(COMPUTE)

    def grad(self, num_rows: int) -> Tensor:
        return torch.randn(num_rows, self.dense.shape[0]).to(COMPUTE)


def race(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Return the median seconds of each run; they take turns, after one turn that does not count.

    What takes microseconds gets more turns than ``repeats``, until a turn more would not matter: its first ones find
    neither code nor data in the caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    turn = 0
    while turn <= repeats or (turn <= MOST_TURNS and time.perf_counter() - begun < SHORT_RACE):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
        turn += 1
    return {name: statistics.median(times) for name, times in seconds.items()}


def versus(
    task: str, shape: str, ours: Run, peers: dict[str, Run], repeats: int, targets: dict[str, float] | None = None
) -> list[Row]:
    medians = race({"longfit": ours, **peers}, repeats)
    targets = targets or {}
    return [Row(task, shape, peer, medians["longfit"], medians[peer], targets.get(peer)) for peer in peers]


def quantisation_rows(weight: Weight, repeats: int) -> list[Row]:
    rows = versus(
        f"de-quantise NF4 + double quantisation to {NARROW}, existing memory",
        weight.shape,
        weight.fill_result,
        {
            "bitsandbytes": weight.fill_bnb_result,
            "memory copy of as many bytes": lambda: weight.target.copy_(weight.source),
        },
        repeats,
        {"memory copy of as many bytes": COPY},
    )
    rows += versus(
        f"de-quantise NF4 + double quantisation to {NARROW}, reused workspace "
        "(the peer's public call always allocates)",
        weight.shape,
        weight.fill_result,
        {"bitsandbytes": lambda: bnb.dequantize_4bit(weight.bnb_packed, weight.bnb_state)},
        repeats,
    )
    rows += versus(
        f"de-quantise NF4 + double quantisation to {NARROW}, new tensor",
        weight.shape,
        lambda: dispatch.dequantize_4bit(weight.packed, weight.state),
        {
            "bitsandbytes": lambda: bnb.dequantize_4bit(weight.bnb_packed, weight.bnb_state),
            "first touch of as many fresh bytes": weight.touch_fresh_memory,
        },
        repeats,
        {"bitsandbytes": DEQUANTISE[weight.size]},
    )
    rows += versus(
        f"quantise {NARROW} to NF4 + double quantisation",
        weight.shape,
        lambda: dispatch.quantize_4bit(weight.dense),
        {"bitsandbytes": lambda: bnb.quantize_4bit(weight.dense, quant_type="nf4", compress_statistics=True)},
        min(repeats, 7),
        {"bitsandbytes": QUANTISE},
    )
    return rows


def eight_bit_rows(weight: Weight, repeats: int) -> list[Row]:
    values, book = weight.dense.float(), dynamic_map(signed=True)
    codes, absmax = dispatch.quantize_8bit(values, book, block_size=256)
    bnb_codes, bnb_state = bnb.quantize_blockwise(values, code=book, blocksize=256)
    rows = versus(
        "quantise fp32 to 8 bits, signed dynamic map, block 256 (the peer's codes are not the nearest)",
        weight.shape,
        lambda: dispatch.quantize_8bit(values, book, block_size=256),
        {"bitsandbytes": lambda: bnb.quantize_blockwise(values, code=book, blocksize=256)},
        repeats,
    )
    rows += versus(
        "de-quantise 8 bits to fp32",
        weight.shape,
        lambda: dispatch.dequantize_8bit(codes, absmax, book, block_size=256, dtype=torch.float32),
        {"bitsandbytes": lambda: bnb.dequantize_blockwise(bnb_codes, bnb_state)},
        repeats,
    )
    return rows


def matmul_rows(weight: Weight, batches: tuple[int, ...], repeats: int) -> list[Row]:
    rows = []
    for num_rows in batches:
        x, grad = weight.input(num_rows), weight.grad(num_rows)
        turns = repeats if num_rows * weight.dense.numel() < 1 << 33 else min(repeats, 7)

        def forward(x: Tensor = x) -> Tensor:
            return dispatch.linear_4bit(x, weight.rows, weight.constants, weight.fmt)

        def backward(grad: Tensor = grad) -> Tensor:
            return dispatch.linear_4bit_grad_input(grad, weight.rows, weight.constants, weight.fmt)

        dense_forward: dict[str, Run] = {f"dense {NARROW}": lambda x=x: F.linear(x, weight.dense)}
        dense_backward: dict[str, Run] = {f"dense {NARROW}": lambda grad=grad: grad @ weight.dense}
        target = {f"dense {NARROW}": GENERATE if num_rows == 1 else MULTIPLY}
        rows += versus(f"matmul, {num_rows} rows", weight.shape, forward, dense_forward, turns, target)
        if num_rows > 1:
            rows += versus(f"input gradient, {num_rows} rows", weight.shape, backward, dense_backward, turns, target)
    return rows


def model_row(repeats: int) -> Row:
    """All linear layers of SmolLM2-135M."""
    layer = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    weights = [torch.randn(shape).mul_(0.02).to(COMPUTE) for shape in layer]

    def ours() -> None:
        for _ in range(30):
            for weight in weights:
                dispatch.quantize_4bit(weight)

    def peer() -> None:
        for weight in weights:
            bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)

    medians = race({"longfit": ours, "bitsandbytes": peer}, repeats)
    ours_s, peer_s = medians["longfit"], 30 * medians["bitsandbytes"]
    return Row("quantise SmolLM2-135M", "30 layers", "bitsandbytes", ours_s, peer_s, QUANTISE)


def memory_rows(weight: Weight, num_rows: int) -> list[Memory]:
    """Measure the peak resident memory."""
    x, grad = weight.input(num_rows), weight.grad(num_rows)
    parts: list[tuple[str, Run, Run, int]] = [
        (
            "matmul",
            lambda: dispatch.linear_4bit(x, weight.rows, weight.constants, weight.fmt),
            lambda: F.linear(x, weight.dense),
            grad.nbytes,
        ),
        (
            "input gradient",
            lambda: dispatch.linear_4bit_grad_input(grad, weight.rows, weight.constants, weight.fmt),
            lambda: grad @ weight.dense,
            x.nbytes,
        ),
    ]
    return [
        Memory(f"{name}, {num_rows} rows", weight.shape, _extra(ours) - result, _extra(dense) - result)
        for name, ours, dense, result in parts
    ]


def _extra(run: Run) -> int:
    """Peak resident bytes during a run above those before it, from a heap without spare pages (Linux, glibc).

    What longfit keeps belongs to a thread, so a new thread has nothing yet.
    """
    thread = threading.Thread(target=run)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    thread.start()
    thread.join()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def table(about: dict[str, object], rows: list[Row], memory: list[Memory], loading: list[Loading]) -> str:
    lines = [
        "# CPU kernels",
        "",
        "Written by `python benchmarks/kernels_cpu.py`. "
        + ", ".join(f"{key} {value}" for key, value in about.items())
        + ".",
        "Ratio: time of the peer over time of longfit; **below 1 longfit loses**. Gate: bit-equal to `numerics`.",
        "",
        "| task | shape | peer | longfit ms | peer ms | ratio | target |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        ratio = f"{row.ratio:.2f}" if row.ratio >= 1 else f"**{row.ratio:.2f}**"
        times = f"{row.longfit_s * 1e3:.3f} | {row.peer_s * 1e3:.3f}"
        target = "" if row.target is None else verdict(f"{row.target:g}", row.ratio >= row.target)
        lines.append(f"| {row.task} | {row.shape} | {row.peer} | {times} | {ratio} | {target} |")
    lines += [
        "",
        "| peak memory beyond operands and result | shape | longfit MiB | dense MiB | target |",
        "|---|---|---:|---:|---|",
    ]
    for m in memory:
        target = verdict(f"below {EXTRA_BYTES >> 20}", m.longfit_bytes < EXTRA_BYTES)
        sizes = f"{m.longfit_bytes / 2**20:.1f} | {m.dense_bytes / 2**20:.1f}"
        lines.append(f"| {m.task} | {m.shape} | {sizes} | {target} |")
    lines += [
        "",
        "| loading SmolLM2-135M into NF4 | quantising ms | loading ms | share | target |",
        "|---|---:|---:|---:|---|",
    ]
    for load in loading:
        target = verdict(f"below {LOADING_SHARE:.0%}", load.share < LOADING_SHARE)
        times = f"{load.quantise_s * 1e3:.0f} | {load.load_s * 1e3:.0f}"
        lines.append(f"| from {load.source} | {times} | {load.share:.1%} | {target} |")
    return "\n".join(lines) + "\n"


def verdict(target: str, met: bool) -> str:
    return f"{target}: met" if met else f"{target}: **not met**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few turns, nothing is written")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    repeats = 3 if args.quick else max(7, args.repeats)
    rows: list[Row] = []
    memory: list[Memory] = []
    for shape in SHAPES[2:] if args.quick else SHAPES:
        weight = Weight(*shape)
        weight.gate()
        small = weight.dense.numel() < 1 << 20
        turns = repeats * (5 if small and not args.quick else 1)
        memory += memory_rows(weight, 256)
        rows += quantisation_rows(weight, turns)
        if weight.dense.numel() <= 1 << 24:
            rows += eight_bit_rows(weight, turns)
        rows += matmul_rows(weight, (1, 256) if args.quick else BATCHES, turns)
    rows.append(model_row(repeats))
    loading = loading_rows(1 if args.quick else 7)
    about = machine("torch", "bitsandbytes") | {"threads": torch.get_num_threads(), "commit": commit()}
    text = table(about, rows, memory, loading)
    print(text)
    if args.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    results = {
        "machine": about,
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
        "memory": [asdict(m) for m in memory],
        "loading": [{**asdict(load), "share": load.share} for load in loading],
    }
    (RESULTS / f"kernels_cpu{suffix()}.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / f"kernels_cpu{suffix()}.md").write_text(text)


if __name__ == "__main__":
    main()
