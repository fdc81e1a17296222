"""Where settings come from: a YAML file with its line numbers, ``section.key=value`` texts, flags.

PyYAML's composed nodes are used instead of its loaded objects because only they know their lines, and because a loaded
dict has silently dropped the first of two equal keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from longfit.errors import ConfigError
from longfit.files.reading import NOT_OURS, read_text, reason

LARGEST_BYTES = 1 << 20
DEEPEST = 8  # of nested brackets; a setting is at most a list below a section


@dataclass(frozen=True)
class Given:
    """A value given for a dotted key; origin: ``run.yaml:7``, ``override``, ``--rank``, ``MODEL``, ``python``."""

    key: str
    value: object
    origin: str

    def __str__(self) -> str:
        """Return the setting as its origin shows it."""
        return f"{self.origin} {self.value}" if self.is_flag else f"{self.origin}: {self.key} = {self.value!r}"

    @property
    def is_flag(self) -> bool:
        return self.origin.startswith("--") or self.origin.isupper()

    def spelt(self, value: object) -> str:
        """Return the same setting with another value, as the user would type it where this one was typed."""
        if self.is_flag:
            return f"{self.origin} {value}"
        return f"{self.key.rpartition('.')[2]}: {value}" if ":" in self.origin else f"{self.key}={value}"


def read_override(text: str) -> Given:
    """Read ``section.key=value``; ``[...]`` is a list, ``{...}`` a map, ``null`` unsets, a field converts the rest."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r}: an override is written section.key=value, such as data.bad_rows=skip")
    value: object = raw
    if raw == "null":
        value = None
    elif raw.startswith(("[", "{")) and not raw.startswith(("{{", "{%", "{#")):  # Jinja text is a text
        try:
            _require_plain(raw, text)
            value = yaml.safe_load(raw)
        except ConfigError:
            raise
        except Exception as error:  # what a number or date looks like decides what PyYAML raises
            form = (
                'a list; write {}=["first", "second"], in quotes for the shell'
                if raw[0] == "["
                else "a map; write {}={{name: value}}"
            )
            raise ConfigError(f"{text!r}: cannot be read ({reason(error)}): not {form.format(key)}") from error
    return Given(key.strip(), value, "override")


def read_yaml(path: Path) -> Iterator[Given]:
    """Yield every setting of a YAML file with its line."""
    text = read_text(
        path, ConfigError, what="this config file", do="give the path of a .yaml file", largest_bytes=LARGEST_BYTES
    )
    try:
        _require_plain(text, str(path))
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if root is None:
        return
    for section, node, line in _entries(root, path):
        if not isinstance(node, yaml.MappingNode):
            value = _value(node, f"{path}:{line}")
            if value is not None:  # "train:" with nothing below it is an empty section
                yield Given(section, value, f"{path}:{line}")
            continue
        for key, value_node, key_line in _entries(node, path):
            yield Given(f"{section}.{key}", _value(value_node, f"{path}:{key_line}"), f"{path}:{key_line}")


def _require_plain(text: str, name: str) -> None:
    """Raise ConfigError for what no settings need: aliases, which a few lines multiply for ever, and deep nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark is not None else 1
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{name}:{line}: *{event.anchor} repeats a value; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ConfigError(f"{name}:{line}: nested more than {DEEPEST} deep; a setting is a value or a list")


def _value(node: yaml.Node, origin: str) -> object:
    """What a node stands for.

    Raises: ConfigError: it looks like a number or date and is none, or has a tag that is not read.
    """
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except NOT_OURS:
        raise
    except Exception as error:
        shown = repr(node.value) if isinstance(node, yaml.ScalarNode) else node.tag
        raise ConfigError(f"{origin}: {shown[:60]} cannot be read ({reason(error)}); put a text in quotes") from error


def _entries(node: yaml.Node, path: Path) -> Iterator[tuple[str, yaml.Node, int]]:
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise ConfigError(
            f"{path}:{line}: a config holds sections of `key: value` lines, such as\ntrain:\n  steps: 100"
        )
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise ConfigError(f"{path}:{line}: {name} was already given in line {seen[name]}; keep one of them")
        seen[name] = line
        yield name, value, line
