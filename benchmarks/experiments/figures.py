"""The figures of the experiments: one row of panels in the look of longfit's reports."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.experiments.cells import IMAGES

from longfit.evaluation.pictures import STYLE

PANEL_INCHES = (5.2, 4.0)


@contextmanager
def panels(name: str, count: int) -> Iterator[list[Any]]:
    """Draw into these axes, from left to right; the figure is then ``docs/images/NAME``."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(PANEL_INCHES[0] * count, PANEL_INCHES[1]), layout="constrained")
        yield list(figure.subplots(1, count, squeeze=False)[0])
        IMAGES.mkdir(parents=True, exist_ok=True)
        figure.savefig(IMAGES / name, dpi=150)


def count_tokens(axes: Any) -> None:
    """Positions along the horizontal axis: every 4,096 tokens, written with thousands."""
    from matplotlib.ticker import MultipleLocator

    axes.xaxis.set_major_locator(MultipleLocator(4096))
    axes.xaxis.set_major_formatter("{x:,.0f}")
