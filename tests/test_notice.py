"""Lines said unasked: shown where nobody set logging up, left to whoever did, silent where they are not wanted."""

import subprocess
import sys

import pytest

SAY = "import logging, sys; {setup}; from longfit.notice import notify; notify('sweeping')"


@pytest.mark.parametrize(
    ("setup", "shown"),
    [
        ("pass", "longfit: sweeping\n"),
        ("logging.basicConfig(level=logging.INFO)", "INFO:longfit:sweeping\n"),
        ("logging.basicConfig(level=logging.WARNING)", ""),
        ("logging.getLogger('longfit').setLevel(logging.WARNING)", ""),
    ],
)
def test_a_line_goes_where_the_application_wants_it(setup: str, shown: str) -> None:
    told = subprocess.run([sys.executable, "-c", SAY.format(setup=setup)], capture_output=True, text=True, check=True)
    assert told.stderr == shown
    assert told.stdout == ""
