"""What the optimiser accepts: settings, param groups, parameters, saved state; each refusal says what would be fine."""

import os
import sys
from typing import Any

import torch
from torch import Tensor

from longfit.errors import ConfigError
from longfit.optim.page_layout import StateFormat
from longfit.optim.paging import SMALLEST_CAPACITY
from longfit.optim.state_sizes import PAGE_BYTES

_PAGE_GRAIN = 4096  # bytes: the file system's own pages


def default_page_bytes(budget_bytes: int | None) -> int:
    """Return 4 MiB, or less where the budget would not hold four of them: two in use, two on their way."""
    if budget_bytes is None:
        return PAGE_BYTES
    return min(PAGE_BYTES, max(budget_bytes // 4 // _PAGE_GRAIN, 16) * _PAGE_GRAIN)


def check_settings(
    state_bits: int,
    master_weights: str,
    page_bytes: int,
    budget_bytes: int | None,
    path: str | os.PathLike[str] | None,
) -> None:
    """Raise ConfigError if the optimiser's own settings are out of range or do not go together."""
    if state_bits not in (8, 32):
        raise ConfigError(f"state_bits: got {state_bits}; allowed: 32 or 8; 8 takes a quarter of the memory")
    if master_weights not in ("fp32", "stochastic"):
        raise ConfigError(
            f"master_weights: got {master_weights!r}; allowed: 'fp32' or 'stochastic'; "
            "'fp32' is exact and costs 4 bytes per 16-bit parameter"
        )
    if page_bytes < 16 * _PAGE_GRAIN or page_bytes % _PAGE_GRAIN:
        raise ConfigError(
            f"page_bytes: got {page_bytes}; allowed: multiples of {_PAGE_GRAIN} from {16 * _PAGE_GRAIN}; "
            f"{PAGE_BYTES} is a good size"
        )
    if budget_bytes is not None and budget_bytes < SMALLEST_CAPACITY * page_bytes:
        raise ConfigError(
            f"budget_bytes: got {budget_bytes}; allowed: at least {SMALLEST_CAPACITY} pages of {page_bytes} bytes, one "
            "in use and one on its way; give more, or a smaller page_bytes"
        )
    if budget_bytes is not None and path is None and not torch.accelerator.is_available():
        raise ConfigError(
            f"budget_bytes: got {budget_bytes} without a path; on a CPU the other pages need a file; give path="
        )


def check_hyperparameters(group: dict[str, Any]) -> None:
    """Raise ConfigError if a param group's numbers are out of range."""
    allowed = {
        "lr": (float(group["lr"]) >= 0, "at least 0"),
        "betas": (all(0 <= beta < 1 for beta in group["betas"]), "two numbers in [0, 1)"),
        "eps": (group["eps"] > 0, "above 0"),
        "weight_decay": (group["weight_decay"] >= 0, "at least 0"),
    }
    for name, (fine, rule) in allowed.items():
        if not fine:
            raise ConfigError(f"{name}: got {group[name]}; allowed: {rule}; torch's default is a good start")


def check_parameter(param: Tensor, master_weights: str) -> None:
    """Raise ConfigError if a parameter is of a kind that cannot be trained."""
    sharded = sys.modules.get("torch.distributed.tensor")
    if sharded is not None and isinstance(param, sharded.DTensor):
        raise ConfigError(
            "PagedAdamW keeps the state of whole parameters; got one sharded as a DTensor (FSDP2). "
            "Use torch.optim.AdamW with FSDP2, which shards the state, or replicate the trained parameters (DDP)"
        )
    allowed = [torch.float32, torch.float64, torch.bfloat16]
    if master_weights == "fp32":
        allowed.append(torch.float16)
    if param.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ConfigError(
            f"a parameter of shape {tuple(param.shape)} has dtype {param.dtype}; allowed with "
            f"master_weights={master_weights!r}: {names}; cast it, or leave it out"
        )


def check_saved(number: int, param: Tensor, form: StateFormat, saved: dict[str, Any]) -> None:
    """Raise ConfigError if a saved state does not have the form that this optimiser keeps."""
    for field in form.fields if saved else ():
        tensor = saved.get(field.name)
        if tensor is None and field.name == "master":
            continue  # a torch.optim.AdamW has none; it starts from the parameter
        count = field.count(param.numel())
        if tensor is None or tensor.numel() != count or (tensor.dtype == torch.uint8) != (field.dtype == torch.uint8):
            got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ConfigError(
                f"state of parameter {number}, {field.name}: got {got}; this optimiser keeps {count} values of "
                f"{field.dtype}. Load it into an optimiser with the state_bits and the model it was saved with"
            )
