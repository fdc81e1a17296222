"""What an adapter does to the weights of its base, one weight at a time (LoRA; PEFT's file format).

    base_model.model.P.lora_A.weight, .lora_B.weight    P.weight += scaling B A
    base_model.model.P.lora_magnitude_vector            DoRA: each row then has this length
    base_model.model.P.weight, .bias                    trained whole (norms, embeddings): takes the base's place
    base_model.model.P.token_adapter...                 rows of an embedding that were trained
    base_model.model.P.experts.[base_layer.]lora_A...   stacked experts: each its own B_e A_e

A key that is none of these is refused by name: an adapter that is read in part is another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from longfit.errors import ModelError
from longfit.files import checksums
from longfit.files.reading import read_object, reading
from longfit.model.accounting import is_finite, not_finite
from longfit.model.weight_files import ADAPTER, read_adapter_header

PREFIX = "base_model.model."
ROWS = re.compile(r"(?:\.token_adapter)?\.(?:base_layer\.)?trainable_tokens_delta$")


@dataclass(frozen=True)
class LowRank:
    """The low-rank update of one weight: ``scaling B A``, A ``[R, I]``, B ``[O, R]``; a magnitude ``[O]`` for DoRA."""

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def add_to(self, weight: Tensor) -> Tensor:
        """Apply the update to a float32 weight ``[O, I]``, in place."""
        weight.addmm_(self.B.float(), self.A.float(), alpha=self.scaling)
        if self.magnitude is not None:
            weight.mul_((self.magnitude.float() / weight.norm(dim=1))[:, None])
        return weight


@dataclass(frozen=True)
class Experts:
    """A module of stacked experts: its parameters in PEFT's order, and which way round they are.

    Attributes:
        parameters: names in the module, those that PEFT wraps first standing first.
        transposed: they are ``[E, I, O]``.
    """

    parameters: tuple[str, ...]
    transposed: bool


@dataclass(frozen=True)
class LowRankExperts:
    """The low-rank updates of stacked experts: A ``[E R, I]``, B ``[O, R E]`` with the expert innermost."""

    A: Tensor
    B: Tensor
    scaling: float
    transposed: bool

    def add_to(self, weight: Tensor) -> Tensor:
        """Apply the updates to a float32 ``[E, O, I]``, or ``[E, I, O]`` where transposed, expert by expert, in place.

        Raises: ModelError: the adapter is of other shapes.
        """
        num_experts = weight.shape[0]
        sizes = weight.shape[:0:-1] if not self.transposed else weight.shape[1:]  # I, O
        if (self.A.shape[1], self.B.shape[0]) != tuple(sizes) or self.A.shape[0] % num_experts:
            raise ModelError(
                f"stacked experts: the base has {list(weight.shape)}, the adapter A {list(self.A.shape)} and "
                f"B {list(self.B.shape)}; this adapter belongs to another base"
            )
        a = self.A.float().view(num_experts, -1, self.A.shape[1])  # [E, R, I]
        b = self.B.float().view(self.B.shape[0], -1, num_experts).permute(2, 0, 1)  # [E, O, R]
        for expert, each_a, each_b in zip(weight, a, b, strict=True):
            if self.transposed:
                expert.addmm_(each_a.t(), each_b.t(), alpha=self.scaling)
            else:
                expert.addmm_(each_b, each_a, alpha=self.scaling)
        return weight


class AdapterWeights:
    """An adapter folder, read tensor by tensor."""

    def __init__(self, folder: Path, *, experts: Mapping[str, Experts] | None = None) -> None:
        """Open it.

        Args:
            experts: the base's modules of stacked experts, by name; without them adapters on experts are refused.
        Raises: ModelError: it is not plain LoRA, or holds something that longfit cannot merge.
        """
        self.folder, self._modules = folder, dict(experts or {})
        self.settings: dict[str, Any] = read_object(
            folder / "adapter_config.json", ModelError, what="the adapter's configuration", do="copy it again"
        )
        read_adapter_header(folder)
        path = folder / ADAPTER
        if (folder / checksums.NAME).is_file() and (found := checksums.folder_damage(folder, ignore=("README.md",))):
            raise ModelError(
                f"{folder}: {'; '.join(found[:3])}; copy it again, or resume its run, which writes it again"
            )
        with reading(path, "the adapter", ModelError, do="copy it again"):
            self._file = safe_open(str(path), framework="pt")
            self._find()

    def _find(self) -> None:
        """Sort the tensors of the file."""
        self._require_lora()
        self.low_rank: dict[str, dict[str, str]] = {}
        self.whole: dict[str, str] = {}
        self.rows: dict[str, str] = {}
        self.experts: dict[str, Experts] = {}
        unknown = []
        for key in self._file.keys():  # noqa: SIM118
            name = key.removeprefix(PREFIX)
            found = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name)
            if not key.startswith(PREFIX) or (not found and "lora_" in name):
                unknown.append(key)
            elif found:
                self.low_rank.setdefault(self._weight_of(found[1]), {})[found[2]] = key
            elif ROWS.search(name):
                self.rows[ROWS.sub(".weight", name)] = key
            else:
                self.whole[name] = key
        unknown += [name for name, parts in self.low_rank.items() if not {"lora_A", "lora_B"} <= parts.keys()]
        if unknown:
            raise ModelError(f"{len(unknown)} tensors that longfit cannot merge, first {unknown[0]}")

    def _weight_of(self, module: str) -> str:
        """The weight that a module's adapter changes. Of stacked experts PEFT wraps one parameter after the other, and
        each wrapper is the ``base_layer`` of the next."""
        path = module
        while path.endswith(".base_layer"):
            path = path.removesuffix(".base_layer")
        if path not in self._modules:
            return f"{module}.weight"
        experts, targets = self._modules[path], self.settings.get("target_parameters") or ()
        wrapped = [name for name in experts.parameters if any(f".{path}.{name}".endswith(f".{t}") for t in targets)]
        depth = (len(module) - len(path)) // len(".base_layer")
        if depth >= len(wrapped):
            return f"{module}.weight"  # of nothing in the base, which is said by name
        name = f"{path}.{wrapped[-1 - depth]}"
        self.experts[name] = experts
        return name

    def _require_lora(self) -> None:
        settings = self.settings
        odd = [
            f"{key}={settings[key]!r}"
            for key in ("target_parameters", "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens")
            if settings.get(key) and not (key == "target_parameters" and self._modules)
        ]
        start = settings.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
            odd.append(f"init_lora_weights={start!r} (the base that it changed is in no file)")
        if settings.get("peft_type") != "LORA":
            odd.insert(0, f"peft_type={settings.get('peft_type')!r}")
        if odd:
            raise ModelError(f"{self.folder}: {', '.join(odd)}: longfit merges LoRA, DoRA and modules trained whole")

    @property
    def largest_rank(self) -> int:
        """Of all its low-rank updates; 0 if it has none."""
        return max(
            (int(self._file.get_slice(keys["lora_A"]).get_shape()[0]) for keys in self.low_rank.values()), default=0
        )

    @property
    def ties_embeddings(self) -> bool:
        """Whether trained embeddings carry the output head along."""
        return bool(self.settings.get("ensure_weight_tying"))

    def changed(self) -> set[str]:
        """Names of the base's tensors that this adapter changes."""
        return self.low_rank.keys() | self.whole.keys() | self.rows.keys()

    def update_of(self, name: str) -> LowRank | None:
        """The low-rank update of a weight; None for stacked experts. Raises ModelError where it is not finite."""
        keys = self.low_rank.get(name)
        if keys is None or name in self.experts:
            return None
        A, B = (self._tensor(keys[part]) for part in ("lora_A", "lora_B"))
        magnitude = self._tensor(keys["lora_magnitude_vector"]) if "lora_magnitude_vector" in keys else None
        return LowRank(A, B, self._scaling(name.removesuffix(".weight"), int(A.shape[0])), magnitude)

    def experts_update_of(self, name: str, num_experts: int) -> LowRankExperts | None:
        """The low-rank updates of a parameter of stacked experts. Raises ModelError where they are not finite."""
        if name not in self.experts:
            return None
        keys = self.low_rank[name]
        A, B = (self._tensor(keys[part]) for part in ("lora_A", "lora_B"))
        return LowRankExperts(A, B, self._scaling(name, len(A) // num_experts), self.experts[name].transposed)

    def _scaling(self, module: str, rank: int) -> float:
        alpha = float(_by_pattern(self.settings.get("alpha_pattern"), module, self.settings["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """A base's tensor as the adapter changes it: float32 if it was computed, else as it is stored.

        Raises: ModelError: shapes differ, or the result is not finite.
        """
        if name in self.whole:
            weight = self._tensor(self.whole[name])
        update = self.update_of(name)
        if update is not None:
            if weight.shape != (update.B.shape[0], update.A.shape[1]):
                raise ModelError(
                    f"{name}: the base has {list(weight.shape)}, the adapter {[len(update.B), update.A.shape[1]]}; "
                    "this adapter belongs to another base"
                )
            weight = update.add_to(weight.to(torch.float32, copy=True))
        if (experts := self.experts_update_of(name, len(weight))) is not None:
            weight = experts.add_to(weight.to(torch.float32, copy=True))
        if name in self.rows:
            indices, rows = self.rows_of(name)
            weight = weight.to(torch.promote_types(weight.dtype, rows.dtype), copy=True)
            weight[indices] = rows.to(weight.dtype)
        if name in self.changed() and not is_finite(weight):
            raise ModelError(
                f"{name}: the adapter has values so large that the sum is not finite; take an earlier checkpoint"
            )
        return weight

    def rows_of(self, name: str) -> tuple[list[int], Tensor]:
        """The rows of an embedding that were trained, and what stands in them ``[rows, D]``."""
        return self._row_indices(name), self._tensor(self.rows[name])

    def _tensor(self, key: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(key)
        if not is_finite(tensor):
            raise ModelError(f"{not_finite(str(self.folder / ADAPTER), key)}, or take an earlier checkpoint")
        return tensor

    def _row_indices(self, name: str) -> list[int]:
        indices = self.settings["trainable_token_indices"]
        if isinstance(indices, dict):
            module = name.removesuffix(".weight")
            (indices,) = [found for key, found in indices.items() if module == key or module.endswith(f".{key}")]
        return list(indices)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """What PEFT's ``alpha_pattern`` says about a module: the first pattern that matches the end of its name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
