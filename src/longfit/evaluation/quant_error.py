"""What a data type costs a model: bits per parameter, error of the weights, perplexity (QLoRA, section 4, table 2).

Each linear layer of a 16-bit model that ``longfit.load`` would quantise is quantised and de-quantised in place, the
model is measured, and the weights come back. So every data type is compared on equal terms, also those that longfit
has no packed storage for: MXFP4, NVFP4, 8-bit integers in blocks, and levels from each weight's own quantiles.

Bits count everything that must be stored: codes, block constants (in 32 bits, or in 8 and their own constants with
double quantisation), and the 16 levels where they belong to one tensor alone. A smaller error of the weights does not
always mean a smaller perplexity: that is why both stand in a row.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from longfit.engine.hf_model import base_model
from longfit.errors import ConfigError, ModelError
from longfit.evaluation.perplexity import perplexity
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model.hf_quantizer import skipped_linears
from longfit.model.pack_experts import packable_experts, skipped_experts
from longfit.numerics.absmax import check_block_size, dequantize_int8, quantize_int8
from longfit.numerics.blockwise import dequantize_blockwise, quantize_blockwise
from longfit.numerics.codebooks import QUANT_TYPES, codebook
from longfit.numerics.double_quant import dequantize_absmax, quantize_absmax
from longfit.numerics.low_rank import leading
from longfit.numerics.microscaling import dequantize_mxfp4, dequantize_nvfp4, quantize_mxfp4, quantize_nvfp4
from longfit.numerics.quantile import quantile_codebook, quantile_edges
from longfit.numerics.vectorwise import dequantize_vectors, quantize_vectors

NAMES = ("int8", "int8_rows", "int4", "fp4", "mxfp4", "nvfp4", "nf4", "quantile")
OWN_SCALES = ("int8_rows", "mxfp4", "nvfp4")
"""Types whose constants are part of them: no block size to choose, and no double quantisation."""


@dataclass(frozen=True)
class DataType:
    """How a weight is stored.

    Attributes:
        name: one of ``NAMES``; ``"quantile"`` is 16 levels estimated from each weight (QLoRA, equation 4),
            ``"int8_rows"`` what ``quant: int8`` stores.
        block_size: weights per absmax; not of ``OWN_SCALES``.
        double_quant: block constants in 8 bits; not of ``OWN_SCALES``.
        low_rank: rank of the adapter that begins with the low-rank part of the error (LoftQ); its bytes, which any
            adapter of this rank has, are not counted.
    Raises: ConfigError: unknown name, a block size below 1, or double quantisation of a type with scales of its own.
    """

    name: str
    block_size: int = 64
    double_quant: bool = False
    low_rank: int = 0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"data type {self.name!r}: unknown; allowed are {', '.join(NAMES)}")
        if self.name in OWN_SCALES and self.double_quant:
            raise ConfigError(f"data type {self.name}: its scales are part of it; drop double_quant")
        try:
            check_block_size(self.block_size)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def __str__(self) -> str:
        repaired = f", and rank {self.low_rank} of the error" if self.low_rank else ""
        if self.name in OWN_SCALES:
            return {"int8_rows": "INT8, one constant a row"}.get(self.name, self.name.upper()) + repaired
        double = ", double quantisation" * self.double_quant
        return f"{self.name.upper()}, blocks of {self.block_size}{double}{repaired}"


def data_types(
    *, names: Sequence[str] = NAMES, block_sizes: Sequence[int] = (64,), low_rank: int = 0
) -> tuple[DataType, ...]:
    """Every name and block size, without and with double quantisation; types with scales of their own once.

    Args:
        low_rank: R above 0 adds each of them with the part of rank R of its error.
    """
    found = (
        DataType(name, low_rank=rank) if name in OWN_SCALES else DataType(name, block_size, double_quant, rank)
        for name in names
        for block_size in block_sizes
        for double_quant in (False, True)
        for rank in dict.fromkeys((0, low_rank))
    )
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class QuantError:
    """One row of the table.

    Attributes:
        data_type: None for the weights as they are.
        bits_per_param: of the quantised layers, everything counted.
        relative_error: root of the squared error of all these weights over the root of their squares.
        mean_abs_error: of these weights.
        perplexity, nll: of the model with them; None if no text was given.
    """

    data_type: DataType | None
    bits_per_param: float
    relative_error: float
    mean_abs_error: float
    perplexity: float | None
    nll: float | None


def quant_error(
    model: nn.Module,
    token_ids: Tensor | Sequence[Tensor] | None = None,
    *,
    types: Sequence[DataType] | None = None,
    window: int = 2048,
    stride: int | None = None,
    convention: str = "document",
    on_progress: Callable[[int, int], Any] | None = None,
) -> tuple[QuantError, ...]:
    """Measure data types on a model (QLoRA, section 4); its weights are as before in the end.

    Args:
        model: a transformers causal language model in 16 or more bits, or a PeftModel around one.
        token_ids: text for the perplexity, as in ``perplexity``; None leaves it out.
        types: what to compare; default: `data_types`.
        window, stride, convention: as in ``perplexity``; the stride is the window by default.
        on_progress: called with rows done and rows in all.
    Returns: the model as it is, then one row for each type.
    Raises: ModelError: the model is quantised already. ConfigError, DataError: as ``perplexity``.
    """
    chosen: list[DataType | None] = [None, *(data_types() if types is None else types)]
    rows = []
    for done, data_type in enumerate(chosen, start=1):
        with quantized_weights(model, data_type) as cost:
            measured = None
            if token_ids is not None:
                measured = perplexity(model, token_ids, window=window, stride=stride or window, convention=convention)
        rows.append(
            QuantError(
                data_type,
                cost.bits_per_param,
                cost.relative_error,
                cost.mean_abs_error,
                None if measured is None else measured.perplexity,
                None if measured is None else measured.nll,
            )
        )
        if on_progress is not None:
            on_progress(done, len(chosen))
    return tuple(rows)


@dataclass
class Cost:
    """Sums over all quantised weights."""

    numel: int = 0
    nbytes: float = 0
    squares: float = 0.0
    squared_error: float = 0.0
    abs_error: float = 0.0

    @property
    def bits_per_param(self) -> float:
        return 8 * self.nbytes / self.numel

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.squared_error / self.squares) if self.squares else 0.0

    @property
    def mean_abs_error(self) -> float:
        return self.abs_error / self.numel

    def add(self, weight: Tensor, rounded: Tensor, nbytes: int) -> None:
        """Count one weight."""
        values = weight.flatten().float()
        error = (rounded.flatten().float() - values).abs_()
        self.numel += weight.numel()
        self.nbytes += nbytes
        self.abs_error += float(error.sum(dtype=torch.float64))
        self.squared_error += float(error.square_().sum(dtype=torch.float64))
        self.squares += float(values.square().sum(dtype=torch.float64))


@contextmanager
def quantized_weights(model: nn.Module, data_type: DataType | None) -> Iterator[Cost]:
    """Round what ``load`` would quantise in a model to a data type inside the block; the weights come back bit by bit.

    Args:
        model: as in `quant_error`; a copy of its linear weights waits in host memory.
        data_type: None changes nothing.
    Yields: bits and errors.
    Raises: ModelError: the model is quantised already, or has no linear layer to quantise.
    """
    matrices, cost = quantizable_matrices(model), Cost()
    kept: list[Tensor] = []
    try:
        with torch.no_grad():
            for weight in matrices:
                if data_type is None:
                    cost.add(weight, weight, weight.nbytes)
                    continue
                rounded, nbytes = round_to(weight, data_type)
                cost.add(weight, rounded, nbytes)
                kept.append(weight.to("cpu", copy=True))
                weight.copy_(rounded)
        yield cost
    finally:
        with torch.no_grad():
            for matrix, weight in zip(matrices, kept, strict=False):  # fewer, if it failed on the way
                matrix.copy_(weight)


def quantizable_matrices(model: nn.Module) -> list[Tensor]:
    """The weights that ``longfit.load`` would quantise, as views ``[out, in]``: of layers, and of each stacked expert.

    Raises: ModelError: the model is quantised already, or there are none.
    """
    base = base_model(model)
    experts = packable_experts(base, skipped_experts(base, []))
    stacked = [expert for _, module, names in experts for name in names for expert in getattr(module, name).detach()]
    layers = [module for module in base.modules() if isinstance(module, Conv1D)]
    return [
        *(layer.weight.detach() for layer in quantizable_layers(model, alone=not stacked and not layers)),
        *(layer.weight.detach().t() for layer in layers),
        *stacked,
    ]


def quantizable_layers(model: nn.Module, *, alone: bool = True) -> list[nn.Linear]:
    """The linear layers that ``longfit.load`` would quantise: all but the output head and tied weights.

    Args:
        alone: whether there must be some.
    Raises: ModelError: the model is quantised already, or there are none.
    """
    base = base_model(model)
    if any(isinstance(module, QuantizedLinear) for module in base.modules()):
        raise ModelError("the model is quantised already; load it with quant='none' to compare data types")
    skipped = skipped_linears(base, [])
    layers = [
        module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name not in skipped and ".lora_" not in f".{name}"
    ]
    if not layers and alone:
        raise ModelError(f"{type(base).__name__}: has no plain linear layer that could be quantised")
    return layers


def round_to(weight: Tensor, data_type: DataType) -> tuple[Tensor, int]:
    """Quantise and de-quantise.

    Args:
        weight: any shape, a matrix where ``data_type.low_rank`` is above 0, any float dtype.
        data_type: what to store it as.
    Returns: the weight as it would be computed with, in its own dtype and shape; the bytes it would be stored in.
    """
    if data_type.low_rank:
        rounded, nbytes = round_to(weight, replace(data_type, low_rank=0))
        exact, rows = weight.float(), rounded.float()
        A, B = leading(exact - rows, min(data_type.low_rank, *weight.shape))
        return rows.addmm_(B, A).to(weight.dtype), nbytes
    if data_type.name in OWN_SCALES:
        return _round_with_own_scales(weight, data_type.name)
    block_size, own_levels = data_type.block_size, 0
    if data_type.name == "int8":
        codes, absmax = quantize_int8(weight, block_size=block_size)
        code_bytes = weight.numel()
    else:
        levels = _levels(weight, data_type)
        own_levels = 0 if data_type.name in QUANT_TYPES else levels.nbytes
        codes, absmax = quantize_blockwise(weight, levels, block_size=block_size)
        code_bytes = (weight.numel() + 1) // 2
    constant_bytes = absmax.nbytes
    if data_type.double_quant:
        stored = quantize_absmax(absmax)
        absmax, constant_bytes = dequantize_absmax(stored), stored.nbytes
    if data_type.name == "int8":
        rounded = dequantize_int8(codes, absmax, block_size=block_size, dtype=weight.dtype)
    else:
        rounded = dequantize_blockwise(codes, absmax, levels, block_size=block_size, dtype=weight.dtype)
    return rounded.view(weight.shape), code_bytes + constant_bytes + own_levels


def _round_with_own_scales(weight: Tensor, name: str) -> tuple[Tensor, int]:
    if name == "int8_rows":
        codes, absmax = quantize_vectors(weight)
        return dequantize_vectors(codes, absmax, dtype=weight.dtype), codes.nbytes + absmax.nbytes
    code_bytes = (weight.numel() + 1) // 2
    if name == "mxfp4":
        codes, scales = quantize_mxfp4(weight)
        return dequantize_mxfp4(codes, scales, dtype=weight.dtype).view(weight.shape), code_bytes + scales.nbytes
    codes, scales, tensor_scale = quantize_nvfp4(weight)
    rounded = dequantize_nvfp4(codes, scales, tensor_scale, dtype=weight.dtype)
    return rounded.view(weight.shape), code_bytes + scales.nbytes + tensor_scale.nbytes


def _levels(weight: Tensor, data_type: DataType) -> Tensor:
    if data_type.name in QUANT_TYPES:
        return codebook(data_type.name, device=weight.device)
    return quantile_codebook(quantile_edges(weight, num_levels=16, block_size=data_type.block_size))
