"""The drift table of a merge or an export: the trained model, its base alone, and what was written, on the same text.

Models are in memory one after the other, never two; of each stays what it said (evaluation/drift.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from longfit.evaluation.drift import Drift, Reference, drift_between, read_reference
from longfit.exporting.held_out import HeldOut, held_out_windows
from longfit.exporting.merge_plan import MergePlan
from longfit.exporting.proof import Proof, Rounding, expected_model, prove
from longfit.exporting.trained import Trained
from longfit.model.description import read_config
from longfit.model.load import load
from longfit.training.metrics import Event, OnEvent


@dataclass
class DriftTable:
    """What was measured so far.

    Attributes:
        source: the trained model.
        text: what is read.
        dtype: that all models compute in.
        trained: what the trained model said.
        rows: of the table: the trained model, its base without the adapter, then each that was added.
    """

    source: Trained
    text: HeldOut
    device: torch.device
    dtype: torch.dtype
    trained: Reference
    rows: list[Drift] = field(default_factory=list)

    @classmethod
    def begin(
        cls, trained: Trained, text: str | None, tokens: int, device: torch.device | None, on_event: OnEvent
    ) -> DriftTable:
        """Read the text with the trained model, and with its base alone."""
        on_event(Event("phase", "measuring the drift"))
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = measuring_dtype(trained, device)
        found = held_out_windows(trained, text, tokens)
        model, _ = trained.load(device, dtype=dtype)
        reference = read_reference(model, found.windows)
        table = cls(trained, found, device, dtype, reference)
        on = "the 4-bit base" if trained.quant != "none" else "its base"
        table.rows.append(drift_between(f"as trained: adapter on {on}", reference, reference))
        with model.disable_adapter():
            table.rows.append(
                drift_between(f"{on} without the adapter", read_reference(model, found.windows), reference)
            )
        return table

    @property
    def untrained(self) -> Drift:
        """The row of the base without its adapter."""
        return self.rows[1]

    @property
    def about(self) -> str:
        """What was read and how, in words."""
        return f"{self.text.name}, computed in {str(self.dtype).removeprefix('torch.')}"

    def add(self, name: str, path: Path, *, quant: str = "none") -> Reference:
        """Open what was written as anybody would (``quant`` of a checkpoint in 4 bits), and add its row."""
        model, _ = load(path, quant=quant, dtype=self.dtype, device=self.device)
        found = read_reference(model, self.text.windows)
        self.rows.append(drift_between(name, found, self.trained))
        return found

    def prove(self, plan: MergePlan, found: Reference, onto: str, rounding: Rounding, *, levels: float) -> Proof:
        """Compare what was written with what it should be (``proof.py``)."""
        model = expected_model(
            plan.trained, onto, rounding, untied=plan.comes_apart, device=self.device, dtype=self.dtype
        )
        expected = read_reference(model, self.text.windows)
        del model
        return prove(
            found,
            expected,
            self.trained,
            num_layers=plan.config.get_text_config().num_hidden_layers,
            rank=plan.adapter.largest_rank,
            levels=levels,
        )

    def prove_adapter(self, read_back: Callable[[Any], object]) -> Proof:
        """Compare the trained model with itself, its adapter as ``read_back`` puts it there from what was written."""
        model, _ = self.source.load(self.device, dtype=self.dtype)
        read_back(model)
        found = read_reference(model, self.text.windows)
        self.rows.append(drift_between("the base with the exported adapter", found, self.trained))
        layers = model.config.get_text_config().num_hidden_layers
        return prove(found, self.trained, self.trained, num_layers=layers, rank=0, levels=0)

    def warnings(self, name: str, advice: str) -> Iterator[str]:
        """What the user should know of the row of that name."""
        row = next(row for row in self.rows if row.name == name)
        if row.kl >= self.untrained.kl:
            yield (
                f"{name}: as far from the trained model (KL {row.kl:.2g}) as its base without the adapter (KL "
                f"{self.untrained.kl:.2g}): more is lost than training brought; {advice}"
            )


def measuring_dtype(trained: Trained, device: torch.device) -> torch.dtype:
    """float32 where it fits, so that the drift is that of the weights alone.

    Two runs of one model in bfloat16 that only add in another order differ by more than a careful merge changes (KL
    7e-3 for SmolLM2-135M); but a large model in float32 may not fit, and then the run's own dtype has to do.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(read_config(trained.adapter))
    count = sum(parameter.numel() for parameter in skeleton.parameters())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil  # type: ignore[import-untyped]

        free = psutil.virtual_memory().available
    return torch.float32 if 2 * 4 * count < free else trained.compute_dtype
