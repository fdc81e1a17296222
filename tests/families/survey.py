"""What longfit does with every type of causal language model that transformers registers, one after another.

A result is kept as soon as a type is done, so that a survey that was broken off goes on where it was.

    made      "" or why there is no tiny model of the type
    layers    each kind of layer: its class, how many there are, "swept" or why not; or why the model is refused
    checks    what came of each check (``exactness.py``)
"""

import fcntl
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.families.exactness import CHECKS, outcome
from tests.families.tiny_family import CannotBuild, tiny_family

from longfit.engine.sweep.attention_choice import take_exact_attention
from longfit.errors import LongfitError
from longfit.model.family import understand

RESULTS = Path(__file__).with_name("results.json")


@dataclass(frozen=True)
class Surveyed:
    """What was found about a type; see the module."""

    made: str = ""
    layers: tuple[tuple[str, int, str], ...] = ()
    refused: str = ""
    checks: dict[str, str] = field(default_factory=dict)


def survey(kind: str) -> Surveyed:
    """Try everything with a type."""
    try:
        model = tiny_family(kind).model
    except CannotBuild as reason:
        return Surveyed(made=" ".join(str(reason).split()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers, refused = _layers(model)
    checks = {}
    for name, check in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            checks[name] = outcome(check, kind, Path(folder))
    return Surveyed(layers=tuple(layers), refused=refused, checks=checks)


def _layers(model: object) -> tuple[list[tuple[str, int, str]], str]:
    try:
        family = understand(model, nature=take_exact_attention(model))  # type: ignore[arg-type]
        kinds = [(layer.module, len(layer.layers), layer.sweeps or "swept") for layer in family.layers]
        family.require_trainable()
    except LongfitError as error:
        return [], " ".join(str(error).split())
    except Exception as error:
        return [], f"{type(error).__name__}: {' '.join(str(error).split())}"
    return kinds, ""


def read_results(path: Path = RESULTS) -> dict[str, Surveyed]:
    """The results so far, by type."""
    if not path.exists():
        return {}
    return {
        kind: Surveyed(**found | {"layers": tuple((module, count, how) for module, count, how in found["layers"])})
        for kind, found in json.loads(path.read_text()).items()
    }


def keep_result(kind: str, found: Surveyed, path: Path = RESULTS) -> None:
    """Add a result to the file, which stays in the order of the names; several processes may survey at once."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write(read_results(path) | {kind: found}, path)


def _write(results: dict[str, Surveyed], path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_text(json.dumps({kind: asdict(results[kind]) for kind in sorted(results)}, indent=1) + "\n")
    os.replace(other, path)


def survey_missing(kinds: tuple[str, ...], *, again: bool = False, path: Path = RESULTS) -> Iterator[str]:
    """Survey the types that have no result yet, or all of them ``again``; yields each when its result is kept."""
    for kind in kinds:
        if again or kind not in read_results(path):
            keep_result(kind, survey(kind), path)
            yield kind
