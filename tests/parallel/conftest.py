"""The short way to a config that the tests of training have."""

from tests.training.conftest import make_config

__all__ = ["make_config"]
