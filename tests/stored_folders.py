"""Folders of tiny models whose weights are quantised already, packed by the formats' descriptions, and their twins.

Each packer takes a weight and returns the tensors of the format and, in float32, what they stand for.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from longfit.numerics.microscaling import E2M1, e2m1_codes

Packer = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def words(codes: Tensor, bits: int) -> Tensor:
    """Integers of each row ``[N, M]`` in words ``[N, M bits / 32]``, lowest bits first."""
    per_word = 32 // bits
    shifted = codes.view(len(codes), -1, per_word).long() << (torch.arange(per_word) * bits)
    total = shifted.sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def rounded(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[O, I]``, zeros and scales ``[O, G]`` of 4 bits."""
    groups = weight.float().view(len(weight), -1, group_size)
    low, high = groups.amin(-1).clamp(max=-1e-3), groups.amax(-1).clamp(min=1e-3)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(1, 15)
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return codes.view_as(weight).int(), zeros.int(), scales


def spread(values: Tensor, group_size: int) -> Tensor:
    return values.repeat_interleave(group_size, 1)


def gptq(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros, scales = rounded(weight, 32)
    stem = name.removesuffix(".weight")
    parts = {
        f"{stem}.qweight": words(codes, 4).t(),
        f"{stem}.qzeros": words(zeros.t() - 1, 4),
        f"{stem}.scales": scales.half().t(),
        f"{stem}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // 32,
    }
    return parts, (codes - spread(zeros, 32)) * spread(scales, 32)


def awq(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros, scales = rounded(weight, 32)
    stem, order = name.removesuffix(".weight"), [0, 2, 4, 6, 1, 3, 5, 7]

    def mixed(values: Tensor) -> Tensor:
        return words(values.t().reshape(values.shape[1], -1, 8)[:, :, order].flatten(1), 4)

    parts = {f"{stem}.qweight": mixed(codes), f"{stem}.qzeros": mixed(zeros), f"{stem}.scales": scales.half().t()}
    return parts, (codes - spread(zeros, 32)) * spread(scales, 32)


def pack_quantized(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scales = (weight.float().view(len(weight), -1, 32).abs().amax(-1) / 7).clamp(min=1e-4).bfloat16().float()
    codes = (weight.float() / spread(scales, 32)).round().clamp(-8, 7).int()
    parts = {
        f"{name}_packed": words(codes + 8, 4),
        f"{name}_scale": scales.bfloat16(),
        f"{name}_shape": torch.tensor(weight.shape),
    }
    return parts, codes * spread(scales, 32)


def fp8(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = weight.shape
    blocks = torch.nn.functional.pad(weight.float(), (0, -columns % 128, 0, -rows % 128))
    blocks = blocks.view(-(-rows // 128), 128, -(-columns // 128), 128)
    scale = (blocks.abs().amax((1, 3)) / 448).clamp(min=1e-6)
    each = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    stored = (weight.float() / each).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale_inv": scale}, stored.float() * each


def mxfp4(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Stacked experts ``[E, I, O]``."""
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))  # [E, O, G, 32]
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=2.0**-20))) - 2
    codes = e2m1_codes((groups / 2 ** exponent[..., None]).contiguous())
    levels = torch.tensor([*E2M1, *(-level for level in E2M1)])
    parts = {
        f"{name}_blocks": codes[..., 0::2] | codes[..., 1::2] << 4,
        f"{name}_scales": (exponent + 127).to(torch.uint8),
    }
    dense = levels[codes.int()] * 2 ** exponent[..., None]
    return parts, dense.flatten(-2).transpose(1, 2)


FORMATS: dict[str, tuple[Packer, dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    "compressed-tensors": (
        pack_quantized,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
                }
            },
        },
    ),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
}


def is_linear(name: str, tensor: Tensor) -> bool:
    return name.endswith("proj.weight") and tensor.dim() == 2


def save_stored(folder: Path, model: PreTrainedModel, kind: str, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model twice: ``folder/stored`` in a format, ``folder/dense`` with the values that it stands for.

    Returns: ``folder``.
    """
    pack, block = FORMATS[kind]
    for name in ("dense", "stored"):
        model.save_pretrained(folder / name)
    dense = load_file(folder / "dense" / "model.safetensors")
    stored = {}
    for name, tensor in list(dense.items()):
        chosen = tensor.dim() == 3 if kind == "mxfp4" else is_linear(name, tensor)
        if not chosen:
            stored[name] = dense[name] = tensor.to(dtype)
            continue
        parts, value = pack(name, tensor)
        stored |= parts
        dense[name] = value.to(dtype)
    for name, tensors in (("dense", dense), ("stored", stored)):
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    path = folder / "stored" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": block}))
    return folder
