"""Where settings come from: a YAML file with its line numbers, ``section.key=value`` texts, flags.

PyYAML's composed nodes are used instead of its loaded objects because only they know their lines, and because a loaded
dict has silently dropped the first of two equal keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from longfit.errors import ConfigError


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
        raise ConfigError(f"{text!r}: an override is written section.key=value, such as train.learning_rate=2e-4")
    value: object = raw
    if raw == "null":
        value = None
    elif raw.startswith(("[", "{")) and not raw.startswith(("{{", "{%", "{#")):  # Jinja text is a text
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            form = "a list; write {}=[first, second]" if raw[0] == "[" else "a map; write {}={{name: value}}"
            raise ConfigError(f"{text!r}: not {form.format(key)}") from error
    return Given(key.strip(), value, "override")


def read_yaml(path: Path) -> Iterator[Given]:
    """Yield every setting of a YAML file with its line."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read this config file ({error.strerror}); give the path of a .yaml file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file (byte {error.start} is not UTF-8); give a .yaml file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if root is None:
        return
    loader = yaml.SafeLoader("")
    for section, node, line in _entries(root, path):
        if not isinstance(node, yaml.MappingNode):
            value = loader.construct_object(node, deep=True)
            if value is not None:  # "train:" with nothing below it is an empty section
                yield Given(section, value, f"{path}:{line}")
            continue
        for key, value_node, key_line in _entries(node, path):
            yield Given(f"{section}.{key}", loader.construct_object(value_node, deep=True), f"{path}:{key_line}")


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
