"""The tensors of one 4-bit weight as a bitsandbytes checkpoint holds them, written and read in plain torch.

    key here                        in the file, for layer p               what
    weight                          p.weight                               uint8 [(numel + 1) // 2, 1]
    absmax                          p.weight.absmax                        uint8 codes; fp32 without double quantisation
    quant_map                       p.weight.quant_map                     fp32 [16]
    nested_absmax                   p.weight.nested_absmax                 fp32, double quantisation only
    nested_quant_map                p.weight.nested_quant_map              fp32 [256], double quantisation only
    quant_state.bitsandbytes__nf4   p.weight.quant_state.bitsandbytes__nf4 JSON text as uint8: types, sizes, the offset

Three traps that this file exists for. The offset is a float32 printed as a double: it must be read as float32 whatever
torch's default dtype is. Weights stored as bf16 or fp32 are uint8 bytes under another name: viewed, never cast. And a
level table in a file may not be the one of its type: such a file is refused, as its codes mean something else.

What bitsandbytes cannot read (INT4, fp64, other nested block sizes) is refused when writing.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longfit.numerics.codebooks import codebook, dynamic_map
from longfit.numerics.double_quant import DoubleQuant
from longfit.numerics.quant_state import QuantState

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STATE_PREFIX = "quant_state.bitsandbytes__"


def to_bitsandbytes(packed: Tensor, state: QuantState) -> dict[str, Tensor]:
    """Return the tensors of a 4-bit weight under bitsandbytes' names, in bitsandbytes' order.

    Args:
        packed: uint8 ``[(numel + 1) // 2]``.
        state: of the packed weight.
    Returns: name to tensor, as in the table above; the bytes equal those that bitsandbytes writes.
    Raises: ValueError: bitsandbytes has no such format.
    """
    _check_writable(state)
    tensors = {"weight": packed.view(-1, 1)}
    text: dict[str, Any] = {
        "quant_type": state.quant_type,
        "blocksize": state.block_size,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }
    quant_map = codebook(state.quant_type, device=packed.device)
    if isinstance(state.absmax, DoubleQuant):
        double = state.absmax
        tensors |= {"absmax": double.codes, "quant_map": quant_map, "nested_absmax": double.absmax}
        tensors["nested_quant_map"] = dynamic_map(signed=True, device=packed.device)
        text |= {
            "nested_blocksize": double.absmax_block_size,
            "nested_dtype": "float32",
            "nested_offset": double.offset.item(),
        }
    else:
        tensors |= {"absmax": state.absmax, "quant_map": quant_map}
    encoded = bytearray(json.dumps(text).encode())
    tensors[_STATE_PREFIX + state.quant_type] = torch.frombuffer(encoded, dtype=torch.uint8).to(packed.device)
    return tensors


def from_bitsandbytes(tensors: Mapping[str, Tensor]) -> tuple[Tensor, QuantState]:
    """Read a 4-bit weight from its tensors under bitsandbytes' names.

    Args:
        tensors: name to tensor, as in the table above. ``weight`` may have any shape and be stored in any dtype.
    Returns: packed uint8 ``[(numel + 1) // 2]``; the state.
    Raises: ValueError: a tensor is missing, unknown or does not fit, or a level table is not the one of its type.
    """
    state_keys = [key for key in tensors if key.startswith(_STATE_PREFIX)]
    if len(state_keys) != 1:
        raise ValueError(
            f"bitsandbytes weight: got {sorted(tensors)}; exactly one key must start with {_STATE_PREFIX!r}; "
            "pass all tensors of one weight, without the name of the layer"
        )
    text = json.loads(bytes(tensors[state_keys[0]].tolist()))
    nested = "nested_absmax" in tensors
    _check_keys(tensors, text, nested=nested, state_key=state_keys[0])
    quant_type = text["quant_type"]
    _check_levels("quant_map", tensors["quant_map"], codebook(quant_type))
    absmax: Tensor | DoubleQuant = tensors["absmax"]
    if nested:
        _check_levels("nested_quant_map", tensors["nested_quant_map"], dynamic_map(signed=True))
        offset = torch.tensor(text["nested_offset"], dtype=torch.float32, device=tensors["absmax"].device)
        absmax = DoubleQuant(tensors["absmax"], tensors["nested_absmax"], offset, text["nested_blocksize"])
    state = QuantState(quant_type, text["blocksize"], tuple(text["shape"]), _DTYPES[text["dtype"]], absmax)
    packed = tensors["weight"].contiguous().view(-1).view(torch.uint8)  # bytes, whatever type they are stored under
    if packed.numel() != (state.numel + 1) // 2:
        raise ValueError(
            f"weight: got {packed.numel()} bytes; shape {list(state.shape)} needs {(state.numel + 1) // 2}; "
            "the file is damaged or its tensors are of different weights"
        )
    return packed, state


def _check_writable(state: QuantState) -> None:
    double = state.absmax if isinstance(state.absmax, DoubleQuant) else None
    if state.quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type: got {state.quant_type!r}; bitsandbytes files hold nf4 or fp4; quantise to those")
    if state.dtype not in _DTYPES.values():
        raise ValueError(f"dtype: got {state.dtype}; bitsandbytes files hold {', '.join(_DTYPES)}; convert before")
    if double is not None and double.absmax_block_size != 256:
        raise ValueError(
            f"absmax: got constants in blocks of {double.absmax_block_size}; bitsandbytes files hold "
            "blocks of 256; quantise with absmax_block_size=256"
        )


def _check_keys(tensors: Mapping[str, Tensor], text: dict[str, Any], *, nested: bool, state_key: str) -> None:
    expected = {"weight", "absmax", "quant_map", state_key}
    fields = {"quant_type", "blocksize", "dtype", "shape"}
    if nested:
        expected |= {"nested_absmax", "nested_quant_map"}
        fields |= {"nested_blocksize", "nested_dtype", "nested_offset"}
    if set(tensors) != expected or set(text) != fields or state_key != _STATE_PREFIX + text["quant_type"]:
        raise ValueError(
            f"bitsandbytes weight: got tensors {sorted(tensors)} and the text {text}; "
            f"needs exactly the tensors {sorted(expected)} and the fields {sorted(fields)}"
        )
    if text["dtype"] not in _DTYPES:
        raise ValueError(f"dtype: got {text['dtype']!r}; allowed: {', '.join(_DTYPES)}")


def _check_levels(name: str, levels: Tensor, expected: Tensor) -> None:
    if not torch.equal(levels.float().cpu().view(-1), expected):
        raise ValueError(
            f"{name}: the levels in the file are not those of its type, so its codes mean something else; "
            "load the model with bitsandbytes, de-quantise it, and start from the 16-bit weights"
        )
