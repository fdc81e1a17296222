"""Begin a run from the adapter of another one: the same weights, new data, a new schedule. It is not resuming.

The new run may have a higher rank and more layers with an adapter. Rows of A that the old one did not have stay as they
were drawn, and their columns of B are zero; where ``alpha / rank`` differs B is multiplied by the ratio. So the first
loss is the old run's evaluation, whatever the new shape. What would lose a part of the old adapter (a lower rank, fewer
layers, norms that do not train any more) is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor

from longfit.errors import ConfigError, ModelError
from longfit.files.reading import reading
from longfit.model.adapter_weights import AdapterWeights, LowRank
from longfit.training import run_directory


@dataclass(frozen=True)
class WarmStart:
    """What was taken over: from where, tensors set, and in words what is different in the new run."""

    source: Path
    num_tensors: int
    differences: tuple[str, ...]

    def __str__(self) -> str:
        """One line for who watches."""
        rest = f" ({'; '.join(self.differences)})" if self.differences else ""
        return f"starting from {self.source}: {self.num_tensors} tensors{rest}"


def find_initial_adapter(init: str) -> Path:
    """The adapter that ``adapter.init`` names: of a run (its best, if it has one), or an adapter folder itself.

    Raises: ConfigError: neither. RunError: a run that has saved nothing.
    """
    path = Path(init)
    if (path / "adapter_config.json").is_file():
        return path
    if (path / "config.yaml").is_file():
        return run_directory.find_adapter(path)
    what = "no such folder" if not path.exists() else "neither a run nor an adapter folder"
    raise ConfigError(f"adapter.init={init}: {what}; give the directory of a run or a folder with adapter_config.json")


def warm_start(model: Any, init: str) -> WarmStart:
    """Set the trained tensors of a PeftModel, in place, to those of an older adapter.

    Raises: ConfigError: a part of the older adapter has no place in this run; nothing has been changed then.
    """
    folder = find_initial_adapter(init)
    with reading(folder, "the adapter", ModelError, do="copy it again (--debug shows where it failed)"):
        return _taken_over(model, init, folder)


def _taken_over(model: Any, init: str, folder: Path) -> WarmStart:
    old = AdapterWeights(folder)
    layers = {
        f"{name.removeprefix('base_model.model.')}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in getattr(module, "lora_A", {})
    }
    whole = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".modules_to_save.default." in name
    }
    rows = {
        f"{name.removeprefix('base_model.model.').removesuffix('.token_adapter')}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None
    }
    tied = _tied_alias(model, old, whole)
    _require_places(init, old, layers, whole, tied)
    _require_rows(init, old, rows)
    ranks: set[tuple[int, int]] = set()
    differences: list[str] = []
    with torch.no_grad():
        for name in old.low_rank:
            update = old.update_of(name)
            assert update is not None, name
            ranks.add((update.rank, int(layers[name].lora_A["default"].weight.shape[0])))
            _set_low_rank(layers[name], update)
        for name in old.whole:
            if name not in tied:
                whole[name].copy_(old.apply(name, torch.zeros(0)))
        for name in old.rows:
            rows[name].trainable_tokens_delta["default"].copy_(old.rows_of(name)[1])
    differences += [f"rank {before} to {now}" for before, now in sorted(ranks) if before != now]
    added = len(layers.keys() - old.low_rank.keys())
    if added:
        differences.append(f"{added} layers get a new adapter")
    fresh = sorted(whole.keys() - old.whole.keys())
    if fresh:
        differences.append(f"{len(fresh)} tensors train whole that did not, first {fresh[0]}")
    if rows and not old.rows:
        differences.append("rows of new tokens begin as the mean of the others")
    return WarmStart(folder, 2 * len(old.low_rank) + len(old.whole) + len(old.rows), tuple(differences))


def _tied_alias(model: Any, old: AdapterWeights, whole: dict[str, Tensor]) -> set[str]:
    """Saved copies of a tied tensor, which the model has once."""
    tied = dict(getattr(model.get_base_model(), "all_tied_weights_keys", {}) or {})
    return {name for name, source in tied.items() if name in old.whole and name not in whole and source in whole}


def _require_places(
    init: str, old: AdapterWeights, layers: dict[str, Any], whole: dict[str, Tensor], tied: set[str]
) -> None:
    problems = []
    homeless = sorted(old.low_rank.keys() - layers.keys())
    if homeless:
        problems.append(f"{len(homeless)} of its layers get no adapter here, first {homeless[0]}; add adapter.targets")
    lost = sorted(old.whole.keys() - whole.keys() - tied)
    if lost:
        problems.append(
            f"{len(lost)} tensors trained whole, first {lost[0]}; add adapter.train_norms=true, "
            "adapter.train_embeddings=true"
        )
    for name in old.low_rank.keys() & layers.keys():
        update, layer = old.update_of(name), layers[name]
        assert update is not None, name
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if (update.A.shape[1], update.B.shape[0]) != (A.shape[1], B.shape[0]):
            there, here = [update.B.shape[0], update.A.shape[1]], [B.shape[0], A.shape[1]]
            problems.append(f"{name} is {there} there and {here} here")
        elif update.rank > A.shape[0]:
            problems.append(
                f"its rank is {update.rank}, here it is {A.shape[0]}; use adapter.rank={update.rank} or more"
            )
        elif (update.magnitude is not None) != ("default" in layer.lora_magnitude_vector):
            problems.append("one of the two uses DoRA and the other does not")
        else:
            continue
        break  # the same is wrong everywhere
    if problems:
        raise ConfigError(f"adapter.init={init}: a part of it would be lost: {'; '.join(problems)}")


def _require_rows(init: str, old: AdapterWeights, rows: dict[str, TrainableTokensLayer]) -> None:
    """Raise ConfigError unless every row of a token that the older adapter trained is one that this run trains."""
    for name in old.rows:
        indices = old.rows_of(name)[0]
        ours = list(rows[name].token_indices["default"]) if name in rows else []
        if ours != indices:
            raise ConfigError(
                f"adapter.init={init}: it trained the rows of {len(indices)} new tokens of {name}, this run trains"
                f" {len(ours)}: give it the same base and adapter.train_new_tokens=true, or merge the old run first and"
                " start from the merged model"
            )


def _set_low_rank(layer: Any, update: LowRank) -> None:
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A[: update.rank].copy_(update.A)
    B.zero_()
    B[:, : update.rank].copy_(update.B * (update.scaling / layer.scaling["default"]))
    if update.magnitude is not None:
        layer.lora_magnitude_vector["default"].weight.copy_(update.magnitude)
