"""What longfit made of a model, in one place: how it was loaded, extended, adapted, and how it is differentiated.

Every operation that changes a model is told here, in the same way. What can be read off the model is read off it, so
that a model which other tools have loaded or adapted is reported as well.
"""

from dataclasses import dataclass
from typing import Any

from longfit.engine.hf_model import base_model
from longfit.engine.sweep.sweeper import SweepReport, sweeper_of
from longfit.model.adapters import AdapterReport, adapter_report
from longfit.model.context import ContextReport, context_report
from longfit.model.load import LoadReport, load_report


@dataclass(frozen=True)
class Reports:
    """Reports of one model; None for what was not done.

    Attributes:
        load: what is stored in how many bits, and why not in fewer.
        context: what ``extend_context`` changed.
        adapters: what is trained.
        sweep: how the layers are differentiated.
    """

    load: LoadReport
    context: ContextReport | None
    adapters: AdapterReport | None
    sweep: SweepReport | None

    def __str__(self) -> str:
        """Say all of it, a few lines each."""
        return "\n".join(str(report) for report in (self.load, self.context, self.adapters, self.sweep) if report)


def reports(model: Any) -> Reports:
    """Tell what was done to a model.

    Args:
        model: a transformers causal language model, or a PeftModel around one.
    Raises: ModelError: it is neither.
    """
    base = base_model(model)
    adapters = adapter_report(model)
    sweeper = sweeper_of(model)
    return Reports(
        load_report(base),
        context_report(base),
        adapters if adapters.adapted or adapters.trained_whole else None,
        None if sweeper is None else sweeper.report,
    )
