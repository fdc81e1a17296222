"""Regular expressions that an adapter from elsewhere names layers with: refused where to match them may take for ever.

PEFT matches ``target_modules`` (where it is a text) and the keys of ``rank_pattern`` and ``alpha_pattern`` against
every module's name, with Python's backtracking matcher. A repetition in a repetition, ``(a+)+``, takes a time that
doubles with every character.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longfit.compat.regular_expressions import BRANCH, REPETITIONS, Expression, parsed
from longfit.errors import ModelError

MOST_REPETITIONS = 4
"""In one expression: a name of a hundred characters is then matched in some millions of tries at worst."""
LONGEST = 10_000


def require_quick_patterns(settings: Mapping[str, Any], folder: Path) -> None:
    """Raise ModelError for an expression in an adapter's configuration that might be matched for ever, or is none."""
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = settings.get(key)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, list | dict) else []:
            if isinstance(pattern, str) and (why := _trouble(pattern)) is not None:
                raise ModelError(
                    f"{folder / 'adapter_config.json'}: {key} has the expression {pattern[:60]!r}, {why}; name the "
                    "modules in a list"
                )


def _trouble(pattern: str) -> str | None:
    if len(pattern) > LONGEST:
        return f"of {len(pattern):,} characters"
    try:
        found = _repetitions(parsed(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        return f"which is not one ({error})"
    if found is None:
        return "which repeats a repetition"
    return f"with {found} repetitions (at most {MOST_REPETITIONS} are read)" if found > MOST_REPETITIONS else None


def _repetitions(tree: Any) -> int | None:
    """How many repetitions without a small limit there are, one after the other; None if one is in another."""
    count = 0
    for code, arguments in tree:
        parts = [_repetitions(part) for part in _parts(arguments)]
        if None in parts:
            return None
        found = [part for part in parts if part is not None]
        inner = max(found) if code is BRANCH else sum(found)  # of a choice, one is matched at a time
        if code in REPETITIONS and arguments[1] > 1:
            # A choice in a repetition may fit in several ways too: only one character, or a fixed text, is quick.
            if any(item[0] in (BRANCH, *REPETITIONS) for item in _below(arguments[2])):
                return None
            inner = 1
        count += inner
    return count


def _parts(arguments: Any) -> list[Any]:
    """The expressions in what follows a code: groups, choices, what is repeated or looked ahead for."""
    if isinstance(arguments, Expression):
        return [arguments]
    if isinstance(arguments, list | tuple):
        return [part for item in arguments for part in _parts(item)]
    return []


def _below(tree: Any) -> list[Any]:
    return [item for found in tree for item in (found, *(inner for part in _parts(found[1]) for inner in _below(part)))]
