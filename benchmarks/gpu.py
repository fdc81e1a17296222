"""Everything that a GPU decides, in one table: kernels, layers, training steps, memory, the longest context of a card.

    python benchmarks/gpu.py                      on a CUDA device, at most nine minutes
    python benchmarks/gpu.py --tiny --device cpu  the same code on small sizes, to try it without one

First the gate: every kernel against its reference and the engine's gradients against autograd; nothing is timed on a
red gate. Then the card's own ceilings (a copy, a dense matmul), and everything else beside them. The model has the
shape of Llama-3.1-8B and random weights. What there is no time for is a row that says so. Writes results/gpu.json and
gpu.md. Exit code 2: there is no CUDA device. 1: the gate is red.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_bench import RANK, REAL, TINY, Bench, model_of, step, step_flops, sweep
from gpu_gate import gate
from gpu_report import PEER_CONTEXTS, Line, Report
from longfit.attention.backends import tile_backward, tile_forward
from longfit.attention.hf_attention import attention_key
from longfit.attention.tile import QueryTile
from longfit.attention.visibility import Schedule, build_schedule, document_starts
from longfit.engine.hf_model import base_model
from longfit.engine.offload.activations import DeviceActivations
from longfit.engine.sweep.install import disable_sweep
from longfit.errors import PlanError
from longfit.kernels import dispatch
from longfit.layers.linear4bit import Linear4bit
from longfit.layers.qlora import QLoRAMatmul
from longfit.model.liger_kernels import fuse
from longfit.numerics.adamw import AdamwState, AdamwUpdate, step_scalars
from longfit.numerics.row_format import RowFormat, to_rows
from longfit.planning.memory import memory_plan
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import ModelShape
from machine import commit, processor_name

RESULTS = Path(__file__).parent / "results"
GIB = 1 << 30


# ------------------------------------------------------------------------------------------------ measurements
def ceilings(bench: Bench) -> None:
    """What the card can do at best."""
    source = torch.zeros(bench.sizes.copy_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.zeros_like(source)
    bench.copy_bandwidth = 2 * source.nbytes / bench.seconds(lambda: target.copy_(source))
    bench.report.add("ceiling", "copy on the device", bench.copy_bandwidth / 1e9, "GB/s")
    if bench.cuda:
        host = torch.zeros(bench.sizes.copy_bytes, dtype=torch.uint8, pin_memory=True)
        seconds = bench.seconds(lambda: target.copy_(host, non_blocking=True))
        bench.report.add("ceiling", "copy from pinned host memory", host.nbytes / seconds / 1e9, "GB/s")
    a, b = (bench.randn(bench.sizes.gemm, bench.sizes.gemm) for _ in range(2))
    bench.gemm_flops = 2 * bench.sizes.gemm**3 / bench.seconds(lambda: a @ b)
    bench.report.add("ceiling", f"dense matmul in {bench.dtype}", bench.gemm_flops / 1e12, "TFLOPS")


def kernel_rows(bench: Bench) -> None:
    """Quantise, de-quantise, generate, step the optimiser."""
    out_features, in_features = bench.sizes.weight
    report = bench.report
    weight = bench.randn(8 * out_features, in_features).mul_(0.02)  # so large that the calls themselves cost nothing
    packed, state = dispatch.quantize_4bit(weight)
    moved = packed.nbytes + state.absmax.nbytes + weight.nbytes
    seconds = bench.seconds(lambda: dispatch.dequantize_4bit(packed, state))
    share = moved / seconds / bench.copy_bandwidth
    report.add("kernels", "de-quantise, share of the copy's bandwidth", share, "", least=0.85)
    report.add("kernels", "de-quantise", moved / seconds / 1e9, "GB/s")
    quantise_s = bench.seconds(lambda: dispatch.quantize_4bit(weight))
    report.add("kernels", "quantise", moved / quantise_s / 1e9, "GB/s")
    rows, constants = to_rows(packed, state)
    fmt, x = RowFormat.of(state), bench.randn(1, in_features)
    generate_s = bench.seconds_in_a_graph(lambda: dispatch.linear_4bit(x, rows, constants, fmt))
    dense_s = bench.seconds_in_a_graph(lambda: F.linear(x, weight))
    report.add("kernels", "product of one row, times faster than with the dense weight", dense_s / generate_s, "x")
    if bench.cuda and find_spec("bitsandbytes") is not None:
        import bitsandbytes.functional as bnb

        peer = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        peer_s = bench.seconds(lambda: bnb.dequantize_4bit(*peer))
        report.add("kernels", "de-quantise, times faster than bitsandbytes", peer_s / seconds, "x", least=1.5)
    else:
        report.skip("kernels", "de-quantise against bitsandbytes", "it is not installed here, or there is no card")
    _adamw_rows(bench)


def _adamw_rows(bench: Bench) -> None:
    numel = bench.sizes.copy_bytes // 16
    for bits, per_element in ((32, 8 + 8 + 4 + 8), (8, 2 + 2 + 4 + 8)):  # moments read and written, grad, param
        if bits == 32:
            state = AdamwState(*(torch.zeros(numel, device=bench.device) for _ in range(2)))
        else:
            codes = [torch.zeros(numel, dtype=torch.uint8, device=bench.device) for _ in range(2)]
            state = AdamwState(*codes, *(torch.zeros(-(-numel // 256), device=bench.device) for _ in range(2)))
        scalars = step_scalars(1, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        param, grad = (bench.randn(numel, dtype=torch.float32) for _ in range(2))
        update = AdamwUpdate(param, grad, state, scalars)
        seconds = bench.seconds(partial(dispatch.adamw_step, [update]))
        bench.report.add("kernels", f"AdamW with {bits}-bit moments", numel * per_element / seconds / 1e9, "GB/s")


def layer_rows(bench: Bench) -> None:
    """A QLoRA linear, forward and backward, beside a dense one with the same adapter."""
    out_features, in_features = bench.sizes.weight
    x = bench.randn(bench.sizes.tokens, in_features).requires_grad_()
    dense = nn.Linear(in_features, out_features, bias=False, device=bench.device, dtype=bench.dtype)
    dense.requires_grad_(False)
    layer = Linear4bit.from_linear(dense)
    A, B = (nn.Parameter(bench.randn(*s, dtype=torch.float32)) for s in ((RANK, in_features), (out_features, RANK)))
    grad = bench.randn(bench.sizes.tokens, out_features)

    def quantised() -> None:
        QLoRAMatmul.apply(x, x, A, B, layer.weight, layer.constants, layer.product, 2.0).backward(grad)

    def full() -> None:
        (dense(x) + 2.0 * ((x @ A.t().to(x.dtype)) @ B.t().to(x.dtype))).backward(grad)

    seconds, dense_s = bench.seconds(quantised), bench.seconds(full)
    name = f"QLoRA linear, {bench.sizes.tokens:,} tokens"
    bench.report.add("layer", f"{name}, forward and backward", seconds * 1e3, "ms")
    bench.report.add("layer", f"{name}, time over dense with LoRA", seconds / dense_s, "x", most=1.08)
    if not (bench.cuda and find_spec("bitsandbytes") is not None):
        bench.report.skip("layer", f"{name}, against PEFT and bitsandbytes", "not installed here, or there is no card")
        return
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    quantised_peer = bnb.nn.Linear4bit(
        in_features, out_features, bias=False, compute_dtype=bench.dtype, quant_type="nf4", compress_statistics=True
    )
    quantised_peer.load_state_dict(dense.state_dict())
    holder = nn.ModuleDict({"linear": quantised_peer}).to(bench.device)
    holder.is_loaded_in_4bit = True  # by which PEFT chooses its layer for bitsandbytes
    peer = get_peft_model(holder, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["linear"])).base_model.model
    peer_s = bench.seconds(lambda: peer["linear"](x).backward(grad))
    bench.report.add("layer", f"{name}, times faster than PEFT and bitsandbytes", peer_s / seconds, "x")


def attention_rows(bench: Bench) -> None:
    """A tile of queries at the end of a long sequence, exact and shifted."""
    tile, keys = bench.sizes.attention
    config = bench.sizes.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["hidden_size"] // heads
    q, grad = (bench.randn(1, tile, heads, dim).transpose(1, 2) for _ in range(2))
    k, v = (bench.randn(1, kv_heads, keys, dim) for _ in range(2))
    for name, group in (("exact", None), ("shifted", bench.sizes.group)):
        schedule = build_schedule(heads, document_starts(1, keys, device=bench.device), group_size=group)
        forward_s, backward_s = _attention_seconds(bench, (q, k, v, grad), schedule)
        seen = keys - tile / 2 if group is None else group / 2  # keys of the average query
        flops = 4 * tile * seen * heads * dim
        what = f"attention, {tile:,} queries on {keys:,} keys, {name}"
        bench.report.add("attention", f"{what}, forward", flops / forward_s / 1e12, "TFLOPS")
        bench.report.add("attention", f"{what}, backward", 2.5 * flops / backward_s / 1e12, "TFLOPS")


def _attention_seconds(bench: Bench, tensors: tuple[Tensor, ...], schedule: Schedule) -> tuple[float, float]:
    q, k, v, grad = tensors
    tile = QueryTile(q, k, v, schedule, k.shape[2] - q.shape[2], q.shape[-1] ** -0.5)
    out, lse = tile_forward(tile)
    sums = {name: torch.zeros(k.shape, device=bench.device) for name in ("grad_k", "grad_v")}
    forward_s = bench.seconds(lambda: tile_forward(tile))
    return forward_s, bench.seconds(lambda: tile_backward(tile, grad, out, lse, **sums))


# ------------------------------------------------------------------------------------------------ training
def train_rows(bench: Bench) -> tuple[float, dict[int, int]]:
    """Steps of the full model. Returns seconds per operation, and peak bytes by context with exact attention."""
    sizes, report = bench.sizes, bench.report
    layers = sizes.config["num_hidden_layers"]
    model = model_of(bench, layers=layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    offload, peaks, seconds_of = bench.offload(), {}, {}
    per_flop = 1 / (0.4 * bench.gemm_flops)

    def run(name: str, tokens: int, group: int | None = None) -> tuple[float, int] | None:
        nonlocal per_flop
        flops = step_flops(sizes.config, tokens, layers=layers, group=group)
        if not report.allows("train", name, flops * per_flop * 1.2):
            return None
        bench.reserve(offload, tile, tokens, layers)
        ids = torch.randint(sizes.config["vocab_size"], (1, tokens), device=bench.device)
        try:
            seconds, peak = bench.once(lambda: step(model, ids, optimizer))
        except torch.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            report.skip("train", name, "out of memory")
            return None
        per_flop = seconds / flops
        report.add("train", f"{name}, tokens", tokens / seconds, "tokens/s")
        if bench.cuda:
            report.add("train", f"{name}, peak memory", peak / GIB, "GiB")
        return seconds, peak

    tile = sweep(bench, model, "exact", offload)
    step(model, torch.randint(sizes.config["vocab_size"], (1, sizes.contexts[0]), device=bench.device), optimizer)
    for tokens in sizes.contexts:
        result = run(f"exact, {tokens:,} tokens", tokens)
        if result is not None:
            seconds_of[tokens], peaks[tokens] = result
            _plan_row(bench, tokens, result[1], "exact")
    _offload_row(bench, model, run)
    longest = sizes.contexts[-1]
    sweep(bench, model, "shifted", offload)
    result = run(f"shifted, {longest:,} tokens", longest, sizes.group)
    if result is not None and longest in seconds_of:
        name = f"shifted, {longest:,} tokens, times faster than exact"
        report.add("train", name, seconds_of[longest] / result[0], "x", least=2.0)
        _plan_row(bench, longest, result[1], "shifted")
    disable_sweep(model)
    base_model(model).set_attn_implementation(attention_key())
    base_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for tokens in sizes.plain_contexts:
        run(f"plain checkpointing, {tokens:,} tokens", tokens)
    base_model(model).gradient_checkpointing_disable()
    sweep(bench, model, "exact", offload)
    _fused_row(bench, model, optimizer, per_flop)
    return per_flop, peaks


def _fused_row(bench: Bench, model: Any, optimizer: torch.optim.Optimizer, per_flop: float) -> None:
    """A step with liger-kernel's norms, rotary embedding and SwiGLU against the model's own; there is no way back."""
    config, tokens, repeats = bench.sizes.config, bench.sizes.contexts[0], 3
    name = f"exact, {tokens:,} tokens, time with liger-kernel over the model's own norms and MLPs"
    flops = step_flops(config, tokens, layers=config["num_hidden_layers"])
    if not bench.report.allows("train", name, flops * per_flop * 2 * (repeats + 1)):
        return
    ids = torch.randint(config["vocab_size"], (1, tokens), device=bench.device)

    def best() -> tuple[float, int]:
        step(model, ids, optimizer)  # compiles
        return min(bench.once(lambda: step(model, ids, optimizer)) for _ in range(repeats))

    own_s, own_peak = best()
    report = fuse(model)
    if report.kernels is None:
        bench.report.skip("train", name, report.reason)
        return
    fused_s, fused_peak = best()
    note = f"{report.kernels}; peak {fused_peak / GIB:.2f} GiB instead of {own_peak / GIB:.2f}"
    bench.report.add("train", name, fused_s / own_s, "x", note=note)


def _offload_row(bench: Bench, model: Any, run: Callable[..., tuple[float, int] | None]) -> None:
    """Layer inputs on the host against on the device."""
    tokens = bench.sizes.offload_context
    on_host = run(f"exact, {tokens:,} tokens, layer inputs on the host", tokens)
    sweep(bench, model, "exact", DeviceActivations(copy=True))
    on_device = run(f"exact, {tokens:,} tokens, layer inputs on the device", tokens)
    if on_host is not None and on_device is not None:
        name = f"offloaded layer inputs, {tokens:,} tokens, time over kept on the device"
        bench.report.add("train", name, on_host[0] / on_device[0], "x", most=1.03)


def _plan_row(bench: Bench, tokens: int, peak: int, attention: str) -> None:
    if not bench.cuda:
        return
    shape = ModelShape.of({"model_type": "llama", **bench.sizes.config})
    group = bench.sizes.group if attention == "shifted" else None
    settings = PlanSettings(
        context=tokens, rank=RANK, offload="ram", attention=attention, group_size=group, evaluates=False
    )
    plan = memory_plan(shape, settings)
    at_peak = sum(size for name, size in plan.at_peak("accelerator"))
    name = f"planned over allocated, {attention}, {tokens:,} tokens"
    bench.report.add("memory", name, at_peak / peak, "x", note="the plan also counts CUDA's context and fragments")


def slope_rows(bench: Bench, per_flop: float) -> dict[str, Line]:
    """Two layers at great length: bytes per token, exact and shifted; memory peaks one layer at a time."""
    sizes, lines = bench.sizes, {}
    model = model_of(bench, layers=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    offload = bench.offload()
    for attention, most in (("exact", 32.0), ("shifted", 18.0)):
        tile = sweep(bench, model, attention, offload)
        measured: list[tuple[int, int]] = []
        for tokens in sizes.slope_contexts:
            name = f"two layers, {attention}, {tokens:,} tokens"
            group = sizes.group if attention == "shifted" else None
            flops = step_flops(sizes.config, tokens, layers=2, group=group)
            if not bench.report.allows("memory", name, flops * per_flop * 1.3):
                break
            bench.reserve(offload, tile, tokens, 2)
            ids = torch.randint(sizes.config["vocab_size"], (1, tokens), device=bench.device)
            try:
                seconds, peak = bench.once(partial(step, model, ids, optimizer))
            except torch.OutOfMemoryError:
                optimizer.zero_grad(set_to_none=True)
                bench.report.skip("memory", name, "out of memory")
                break
            measured.append((tokens, peak))
            bench.report.add("memory", f"{name}, a step", seconds, "s")
        if bench.cuda and len(measured) > 1:
            lines[attention] = Line.through(measured[0], measured[-1])
            slope = lines[attention].bytes_per_token / 1e3
            bench.report.add("memory", f"bytes per token, {attention}", slope, "kB", most=most)
    return lines


def card_rows(bench: Bench, per_flop: float, peaks: dict[int, int], lines: dict[str, Line]) -> None:
    """The longest context of every size of card: predicted from what was measured, then tried where time allows.

    Tried with two layers and a ballast of as many bytes as the other layers and their adapters take.
    """
    if not bench.cuda or "exact" not in lines or not peaks:
        bench.report.skip("cards", "longest context by size of card", "it needs a card and the rows above")
        return
    sizes, slope = bench.sizes, lines["exact"].bytes_per_token
    short = min(peaks)
    whole = Line(peaks[short] - slope * short, slope)
    total = torch.cuda.get_device_properties(bench.device).total_memory
    for gib in sizes.cards_gib:
        context = whole.longest(0.97 * gib * GIB - (750 << 20))
        name = f"{gib} GiB, exact"
        if context == 0:
            bench.report.skip("cards", name, "the model does not fit with its weights on the card; stream them")
            continue
        peer = PEER_CONTEXTS.get(gib)
        host = context * sizes.config["num_hidden_layers"] * sizes.config["hidden_size"] * 2 / GIB
        step_s = step_flops(sizes.config, context, layers=sizes.config["num_hidden_layers"]) * per_flop
        note = f"predicted; {host:,.0f} GiB of host memory, about {step_s:,.0f} s a step"
        bench.report.add("cards", f"{name}, longest context", context, "tokens", note=note)
        if peer:
            bench.report.add("cards", f"{name}, times the peer's {peer:,}", context / peer, "x", least=4.0)
        if gib * GIB > total:
            bench.report.skip("cards", f"{name}, tried", "the card is smaller")
        elif bench.report.allows("cards", f"{name}, tried", step_s / sizes.config["num_hidden_layers"] * 2 * 1.3):
            ballast = int(whole.fixed_bytes - lines["exact"].fixed_bytes)
            _try_card(bench, name, gib * GIB / total, context, ballast=ballast)


def _try_card(bench: Bench, name: str, fraction: float, context: int, *, ballast: int) -> None:
    """Run two layers at a context within a part of the card's memory."""
    clear(bench)
    torch.cuda.set_per_process_memory_fraction(min(1.0, fraction))
    try:
        held = torch.empty(max(0, ballast), dtype=torch.uint8, device=bench.device)
        model = model_of(bench, layers=2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        sweep(bench, model, "exact", bench.offload())
        ids = torch.randint(bench.sizes.config["vocab_size"], (1, context), device=bench.device)
        seconds, peak = bench.once(lambda: step(model, ids, optimizer))
        note = f"peak {peak / GIB:.2f} GiB with a ballast of {held.nbytes / GIB:.2f} GiB"
        bench.report.add("cards", f"{name}, tried: two layers' step", seconds, "s", note=note)
    except torch.OutOfMemoryError:
        bench.report.skip("cards", f"{name}, tried", "out of memory at the predicted context")
    except PlanError as error:
        bench.report.skip("cards", f"{name}, tried", str(error))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ------------------------------------------------------------------------------------------------ all of it
def about(device: torch.device) -> dict[str, Any]:
    """What decides the numbers."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {"device": name, "torch": torch.__version__, "cuda": str(torch.version.cuda), "commit": commit()}


def clear(bench: Bench) -> None:
    """Give back what the section before has left: a swept model refers to itself, and would be counted in the next."""
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()


def run(bench: Bench) -> None:
    """Every measurement; a section for which the card is too small says so, and the next one begins."""

    def section(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        clear(bench)
        try:
            return function(bench, *arguments)
        except torch.OutOfMemoryError:
            bench.report.skip(name, "the rest of this section", "the card has too little memory")
            return None

    section("ceiling", ceilings)
    section("kernels", kernel_rows)
    section("layer", layer_rows)
    section("attention", attention_rows)
    per_flop, peaks = section("train", train_rows) or (1 / (0.4 * bench.gemm_flops), {})
    lines = section("memory", slope_rows, per_flop) or {}
    section("cards", card_rows, per_flop, peaks, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: tries the code, measures nothing of worth")
    parser.add_argument("--minutes", type=float, default=9.0, help="what there is no time for is left out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.json and gpu.md")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu.py: this machine has no CUDA device; try --tiny --device cpu to run the code", file=sys.stderr)
        return 2
    if device.type != "cuda" and not args.tiny:
        print(f"gpu.py: on {device} only --tiny makes sense: the real sizes are those of a card", file=sys.stderr)
        return 2
    if device.type == "cuda":
        torch.cuda.set_device(device)
    report = Report(about(device), args.minutes * 60)
    bench = Bench(device, TINY if args.tiny else REAL, report)
    try:
        gate(bench)
    except AssertionError as error:
        print(f"gpu.py: the gate is red, nothing is measured: {error}", file=sys.stderr)
        return 1
    report.add("gate", "kernels, attention and gradients equal their references", 1, "")
    run(bench)
    report.save(args.out)
    print(f"\nwritten to {args.out}: gpu.json, gpu.md; {args.minutes * 60 - report.left_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
