"""One finished run for all verbs that are given one; nothing writes into it but its report."""

from pathlib import Path

import pytest
from tests.evaluation.finished_run import make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; beside it lie ``model``, ``texts`` and ``held-out.txt``."""
    return make_run(tmp_path_factory.mktemp("cli"))
