"""One finished run for all tests of what is made of it; nothing writes into it."""

from pathlib import Path

import pytest
from tests.evaluation.finished_run import make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; beside it lie ``model``, ``texts`` and ``held-out.txt``."""
    return make_run(tmp_path_factory.mktemp("evaluation"))
