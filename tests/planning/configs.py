"""Configurations of real models, written for these tests."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "data" / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def config(name: str) -> dict[str, Any]:
    """Return the configuration of a model."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found
