"""What each setting is, told from its own declaration: meaning, default, what is allowed, and a value to paste."""

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from longfit.config.problems import nearest_key
from longfit.config.sections import SECTIONS, known_keys, meaning
from longfit.errors import ConfigError

KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a map"}
EXAMPLES = {str: "TEXT", int: "2", float: "0.1", bool: "true", list: "[a, b]", dict: "'{prompt: a, answer: b}'"}


@dataclass(frozen=True)
class Description:
    """One setting: its dotted key, default, allowed values, a value to paste, and what it means."""

    key: str
    default: str
    allowed: str
    example: str
    meaning: str


def describe(names: Sequence[str] = ()) -> list[Description]:
    """Describe settings.

    Args:
        names: dotted keys, keys alone, or sections; none for all.
    Raises: ConfigError: an unknown name, with the nearest known one.
    """
    known = known_keys()
    found = []
    for name in names:
        fitting = [key for key in known if name in (key, *key.split("."))]
        if not fitting:
            guess = nearest_key(name)
            advice = f"did you mean {guess}?" if guess else f"the sections are {', '.join(SECTIONS)}"
            raise ConfigError(f"unknown setting {name}; {advice}")
        found += fitting
    return [_describe(key) for key in (found or known)]


def _describe(key: str) -> Description:
    section, _, name = key.partition(".")
    field: Any = SECTIONS[section].model_fields[name]
    default = "must be given" if field.default is PydanticUndefined else _shown(field.default)
    allowed, example = _allowed(field.annotation)
    if isinstance(field.default, int | float) and not isinstance(field.default, bool):
        example = default
    return Description(key, default, allowed, example, " ".join(meaning(key).split()))


def _shown(value: object) -> str:
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _allowed(annotation: Any) -> tuple[str, str]:
    """What may be written for a type, and an example."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(parts[0])
    if origin is Literal:
        return ", ".join(map(str, parts)), str(parts[-1])
    if origin in (Union, types.UnionType):
        several = [_allowed(part) for part in parts if part is not type(None)]
        return " or ".join(text for text, _ in several), several[0][1]
    kind = origin or annotation
    if kind is tuple:
        return "a list", "[0.9, 0.999]"
    if kind is list and parts and get_origin(parts[0]) is Literal:
        allowed, example = _allowed(parts[0])
        return f"a list of {allowed}", f"[{example}]"
    return KINDS.get(kind, getattr(kind, "__name__", str(kind))), EXAMPLES.get(kind, "VALUE")
