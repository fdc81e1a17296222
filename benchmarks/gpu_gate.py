"""The gate of ``gpu.py``: kernels and engine against their references on the device that is about to be timed."""

import torch
from torch import Tensor, nn

from gpu_bench import TINY, Bench, model_of, sweep
from longfit.attention.backends import tile_backward, tile_forward
from longfit.attention.tile import QueryTile
from longfit.attention.visibility import build_schedule, document_starts
from longfit.engine.gradient_check import check_gradients
from longfit.engine.loss.training_loss import training_loss
from longfit.kernels import dispatch
from longfit.model.liger_kernels import fuse
from longfit.numerics import adamw, quant_state
from longfit.numerics.adamw import AdamwState, AdamwUpdate, step_scalars
from longfit.numerics.row_format import RowFormat, dequantize_rows, to_rows

FLOAT32 = 1e-3
"""Relative difference of gradients by kernels that round otherwise: 1e-6 a layer, more where one is a difference."""


def gate(bench: Bench) -> None:
    """Hold kernels and engine against their references on this device; AssertionError on the first that is wrong."""
    weight = torch.randn(130, 192).to(bench.device, bench.dtype)
    packed, state = dispatch.quantize_4bit(weight)
    expected, expected_state = quant_state.quantize_4bit(weight)
    assert torch.equal(packed, expected), "codes"
    assert torch.equal(state.block_absmax(), expected_state.block_absmax()), "block constants"
    for dtype in (torch.float32, bench.dtype):
        decoded = dispatch.dequantize_4bit(packed, state, dtype)
        assert torch.equal(decoded, quant_state.dequantize_4bit(packed, state, dtype)), f"weights in {dtype}"
    rows, constants = to_rows(packed, state)
    fmt = RowFormat.of(state)
    dense = dequantize_rows(rows, constants, fmt, torch.float32)
    for num_rows in (3, 70):  # the fused kernel, and de-quantise with a GEMM; n products of size one in float32
        x = bench.randn(num_rows, 192, dtype=torch.float32)
        error = (dispatch.linear_4bit(x, rows, constants, fmt) - x @ dense.t()).abs().max()
        assert error < 192 * 1e-4, f"product of {num_rows} rows is off by {error}"
    _hold_adamw(bench)
    _hold_attention(bench)
    model = model_of(bench, layers=2, config=TINY.config, dtype=torch.float64, rank=4)
    ids = torch.randint(TINY.config["vocab_size"], (1, 90), device=bench.device)
    worst = check_gradients(model, ids, tile=32, offload=bench.offload()).worst
    # Everything but the norms, which transformers computes in float32, is float64.
    assert worst[1] < 1e-5, f"gradient of {worst[0]} is off by {worst[1]}"
    _hold_fused(bench, ids)


def _hold_fused(bench: Bench, ids: Tensor) -> None:
    """Liger's norms, rotary embedding and SwiGLU against the model's own, swept; nothing where they are not used."""
    model = model_of(bench, layers=2, config=TINY.config, dtype=torch.float32, rank=4)
    trained = [p for p in model.parameters() if p.requires_grad]
    sweep(bench, model, "exact", bench.offload(), tile=32)
    for parameter in trained:  # with B at zero nothing would reach A
        nn.init.normal_(parameter, std=0.1)
    own = torch.autograd.grad(training_loss(model, ids), trained)
    if fuse(model).kernels is not None:
        for mine, theirs in zip(torch.autograd.grad(training_loss(model, ids), trained), own, strict=True):
            assert (mine - theirs).norm() <= FLOAT32 * theirs.norm(), "fused norms"


def _hold_adamw(bench: Bench) -> None:
    def update(device: torch.device) -> AdamwUpdate:
        torch.manual_seed(0)
        codes = [torch.zeros(3000, dtype=torch.uint8, device=device) for _ in range(2)]
        state = AdamwState(*codes, *(torch.zeros(12, device=device) for _ in range(2)))
        scalars = step_scalars(1, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
        return AdamwUpdate(torch.randn(3000).to(device), torch.randn(3000).to(device), state, scalars)

    mine, theirs = update(bench.device), update(torch.device("cpu"))
    dispatch.adamw_step([mine])
    adamw.adamw_step([theirs])
    assert torch.equal(mine.param.cpu(), theirs.param), "AdamW parameters"
    assert torch.equal(mine.state.exp_avg.cpu(), theirs.state.exp_avg), "AdamW moments"


def _hold_attention(bench: Bench) -> None:
    schedule = build_schedule(8, document_starts(1, 300, device=bench.device), group_size=64)
    q, k, v, grad = (bench.randn(1, heads, 300, 64) for heads in (8, 2, 2, 8))
    results = []
    for backend, values in ((None, (q, k, v, grad)), ("reference", tuple(x.double() for x in (q, k, v, grad)))):
        sums = [torch.zeros_like(values[1], dtype=torch.promote_types(values[1].dtype, torch.float32)) for _ in "kv"]
        tile = QueryTile(*values[:3], schedule, 0, 0.125)
        out, lse = tile_forward(tile, backend=backend)
        grad_q = tile_backward(tile, values[3], out, lse, grad_k=sums[0], grad_v=sums[1], backend=backend)
        results.append([x.double() for x in (out, grad_q, *sums)])
    for mine, exact in zip(*results, strict=True):  # eight roundings of the dtype, of the largest element
        limit = 8 * torch.finfo(bench.dtype).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= limit, "attention"
