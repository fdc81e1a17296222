"""AdamW for fine-tuning: float32 masters (or stochastic rounding) for 16-bit parameters, no full-size temporaries.

Why not torch.optim.AdamW: it moves bfloat16 parameters in bfloat16. LongLoRA trains embeddings and norms, at learning
rates where the step is below half a unit in the last place; such a weight never moves. Here the update runs in float32:

- ``master_weights="fp32"`` keeps a float32 copy of each 16-bit parameter; the parameter is its rounded shadow;
- ``master_weights="stochastic"`` keeps no copy (4 bytes a parameter less) and rounds each new bfloat16 value up or
  down at random, right on average.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longfit.errors import ConfigError
from longfit.optim.update import (
    StepScalars,
    adamw_update,
    refresh_master,
    round_stochastically,
    rounding_key,
    step_scalars,
)

_SLICE = 1 << 16  # elements updated at once: five float32 temporaries of 256 KiB stay in the second-level cache
_STATE_KEYS = ("exp_avg", "exp_avg_sq", "master")


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; the mathematics and the param groups of ``torch.optim.AdamW``.

    Args:
        params: parameters or param groups; bfloat16, float16, float32 or float64, any strides.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; each may be set per group.
        master_weights: ``"fp32"`` or ``"stochastic"`` (bfloat16 only): how 16-bit parameters keep small updates.
    Raises:
        ConfigError: a setting is out of its range, or a parameter has a dtype that cannot be trained.
    Source: arXiv 1711.05101, algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        master_weights: str = "fp32",
    ) -> None:
        if master_weights not in ("fp32", "stochastic"):
            raise ConfigError(
                f"master_weights: got {master_weights!r}; allowed: 'fp32' or 'stochastic'; "
                "'fp32' costs 4 bytes per 16-bit parameter"
            )
        self.master_weights = master_weights
        self._seed = int(torch.randint(1 << 32, ()))
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its settings and dtypes are checked here."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_hyperparameters(group)
        for param in group["params"]:
            _check_parameter(param, self.master_weights)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters whose ``grad`` is None keep their value and their state.

        Args:
            closure: re-evaluates the model and returns the loss.
        Returns: what ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, param, group in self._numbered():
            if param.grad is not None and param.numel() > 0:
                self._step_param(number, param, group)
        return loss

    def _step_param(self, number: int, param: Tensor, group: dict[str, Any]) -> None:
        grad = param.grad
        assert grad is not None
        if grad.is_sparse:
            raise ConfigError("PagedAdamW takes dense gradients only; build the embedding with sparse=False")
        state = self.state[param]
        if not state:
            state.update(_new_state(param, self.master_weights))
        state["step"] += 1
        step = int(state["step"])
        scalars = step_scalars(
            step, lr=float(group["lr"]), betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"]
        )
        key = rounding_key(self._seed, param=number, step=step)
        flat = {name: state[name].view(-1) for name in _STATE_KEYS if name in state}
        for start in range(0, param.numel(), _SLICE):
            stop = min(start + _SLICE, param.numel())
            run = {name: tensor[start:stop] for name, tensor in flat.items()}
            _step_run(param, grad, start, stop, run, scalars, key)

    def _numbered(self) -> list[tuple[int, Tensor, dict[str, Any]]]:
        pairs = [(param, group) for group in self.param_groups for param in group["params"]]
        return [(number, param, group) for number, (param, group) in enumerate(pairs)]

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dictionary; the moments keep their float32 and the masters come along."""
        saved = super().state_dict()
        saved["seed"] = self._seed
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, or the state of a ``torch.optim.AdamW``.

        Unlike torch this never casts the state to the parameter's dtype, which would cut float32 moments to bfloat16.
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._seed = state_dict.get("seed", self._seed)
        for number, param, _ in self._numbered():
            if number not in state_dict["state"]:
                continue
            saved = state_dict["state"][number]
            fresh = _new_state(param, self.master_weights)
            for name in _STATE_KEYS:
                if name in fresh and name in saved:
                    fresh[name].copy_(saved[name])
            fresh["step"] = torch.as_tensor(saved["step"], dtype=torch.float32).clone().cpu()
            self.state[param] = fresh


def _new_state(param: Tensor, master_weights: str) -> dict[str, Tensor]:
    dtype = torch.promote_types(param.dtype, torch.float32)
    names = ["exp_avg", "exp_avg_sq"]
    if param.dtype in (torch.bfloat16, torch.float16) and master_weights == "fp32":
        names.append("master")
    state = {name: torch.zeros(param.shape, dtype=dtype, device=param.device) for name in names}
    return {"step": torch.tensor(0.0), **state}


def _step_run(
    param: Tensor, grad: Tensor, start: int, stop: int, state: dict[str, Tensor], scalars: StepScalars, key: int
) -> None:
    """Update elements ``start`` to ``stop`` of ``param``; ``state`` holds the same run of each state tensor."""
    grad = _take(grad, start, stop).to(state["exp_avg"].dtype)
    here = _take(param, start, stop)
    moments = state["exp_avg"], state["exp_avg_sq"]
    if here.dtype == moments[0].dtype:
        adamw_update(here, grad, *moments, scalars)
        updated = here
    elif "master" in state:
        refresh_master(state["master"], here)
        adamw_update(state["master"], grad, *moments, scalars)
        updated = state["master"]
    else:
        wide = here.float()
        adamw_update(wide, grad, *moments, scalars)
        updated = round_stochastically(wide, key=key, start=start)
    if updated is not here or not param.is_contiguous():
        _put(param, start, stop, updated)


def _take(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return elements ``start`` to ``stop`` in row-major order: a view where strides allow it, else a small copy."""
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    width = tensor[0].numel()
    first = start // width
    return tensor[first : -(-stop // width)].reshape(-1)[start - first * width : stop - first * width]


def _put(tensor: Tensor, start: int, stop: int, values: Tensor) -> None:
    """Write ``values`` to elements ``start`` to ``stop`` in row-major order."""
    if tensor.is_contiguous():
        tensor.view(-1)[start:stop].copy_(values)
        return
    width = tensor[0].numel()
    first, last = start // width, -(-stop // width)
    rows = tensor[first:last].reshape(-1).clone()
    rows[start - first * width : stop - first * width].copy_(values)
    tensor[first:last].copy_(rows.view(tensor[first:last].shape))


def _check_hyperparameters(group: dict[str, Any]) -> None:
    allowed = {
        "lr": (group["lr"] >= 0, "at least 0"),
        "betas": (all(0 <= beta < 1 for beta in group["betas"]), "two numbers in [0, 1)"),
        "eps": (group["eps"] > 0, "above 0"),
        "weight_decay": (group["weight_decay"] >= 0, "at least 0"),
    }
    for name, (fine, rule) in allowed.items():
        if not fine:
            raise ConfigError(f"{name}: got {group[name]}; allowed: {rule}; torch's default is a good start")


def _check_parameter(param: Tensor, master_weights: str) -> None:
    allowed = [torch.float32, torch.float64, torch.bfloat16]
    if master_weights == "fp32":
        allowed.append(torch.float16)
    if param.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ConfigError(
            f"a parameter of shape {tuple(param.shape)} has dtype {param.dtype}; allowed with "
            f"master_weights={master_weights!r}: {names}; cast it, or set requires_grad_(False) and leave it out"
        )
