"""What happens to files on their way: bits flip, downloads stop, fields are lost, and somebody means harm.

A mutation is a handful of numbers, so that it is printed, kept and repeated. `apply` turns a sound file into a damaged
one; the same mutation of the same file always gives the same bytes.
"""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

BYTE_OPS = ("flip", "set", "cut", "delete", "repeat", "zero", "ones", "insert", "append", "empty", "swap")
JSON_OPS = ("drop", "replace", "rename", "add", "twice")
PLACE_OPS = ("missing", "folder", "pipe", "device", "dangling", "loop")
EVIL: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e9, 1e308, -0.5, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "0", "nan", "../../etc/passwd", "/dev/zero", "\x1b[31mred"),
    *("\x00", "\ud800", "a" * 5000, "é\u202e", "__import__('os')", [], {}, [[]], [None], {"": None}, [1] * 2000),
)
DEEP = object()
SNIPPETS = (
    "*a",
    "&a [*a]",
    "x: &x [1, 1]\ny: [*x, *x]",
    "[" * 3000,
    "{" * 3000,
    "- " * 500,
    "steps: 0x",
    "steps: 1_0:99",
    "steps: 2026-99-99",
    "steps: 99999999999999999999999999999999",
    "steps: 1e999",
    "!!python/object/apply:os.system [true]",
    "!!binary x",
    "!!timestamp x",
    "<<: 1",
    "? [a, b]\n: c",
    "%TAG ! x",
    "---\n...\n---",
    "\x1b]0;title\x07",
    "\x00",
    "\u202e",
    "\ufeff",
    "{% for i in range(999999999) %}x{% endfor %}",
    "{{ 'x' * 999999999 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.join(range(10)) }}",
    "{% include 'x' %}",
    "{{ raise_exception(messages) }}",
    "{{ 1 / 0 }}",
    "{{ 9 ** 9 ** 9 }}",
    '{"text": 1}',
    '{"text": ["a", 1]}',
    '{"messages": [{"role": "user"}]}',
    '{"messages": [{"role": 1, "content": {}}]}',
    '{"text": "\\ud800"}',
    '"a","b\n',
    "<!ENTITY x 'y'>",
    "<p" * 500,
    "<table><tr><td>" * 100,
)


@dataclass(frozen=True)
class Mutation:
    """Which file of a kind, and what happens to it: steps of an operation and two fractions in [0, 1)."""

    file: int
    steps: tuple[tuple[str, float, float], ...]

    @property
    def is_cut(self) -> bool:
        """Whether all that happens is that the end is missing."""
        return all(name in ("cut", "empty") for name, _, _ in self.steps)


def mutations(*, structured: bool, snippets: bool) -> st.SearchStrategy[Mutation]:
    """Draw mutations.

    Args:
        structured: the file is JSON, or has a JSON header: its values are changed too.
        snippets: it is a text that somebody may write into.
    """
    fraction = st.floats(0, 1, exclude_max=True, allow_nan=False, width=32)
    kinds = [*BYTE_OPS, *(JSON_OPS * 3 if structured else ()), *(["snippet"] * 8 if snippets else ())]
    step = st.tuples(st.sampled_from(kinds), fraction, fraction)
    place = st.tuples(st.sampled_from(PLACE_OPS), fraction, fraction).map(lambda found: (found,))
    steps = st.one_of(*[st.lists(step, min_size=1, max_size=3).map(tuple)] * 9, place)
    return st.builds(Mutation, st.integers(0, 1 << 16), steps)


def apply(mutation: Mutation, path: Path) -> None:
    """Damage a file where it lies."""
    for name, at, amount in mutation.steps:
        if name in PLACE_OPS:
            _replace_place(name, path)
            return
        data = path.read_bytes()
        if name in JSON_OPS:
            data = _in_json(name, at, amount, data)
        else:
            data = _in_bytes(name, at, amount, data)
        path.unlink()  # never through a link into the sound file
        path.write_bytes(data)


def _replace_place(name: str, path: Path) -> None:
    path.unlink()
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "device":
        path.symlink_to("/dev/zero")
    elif name == "dangling":
        path.symlink_to(path.parent / "nowhere")
    elif name == "loop":
        path.symlink_to(path)


def _in_bytes(name: str, at: float, amount: float, data: bytes) -> bytes:
    # Half of all damage lies in the first kilobytes, where headers are.
    reach = len(data) if at >= 0.5 else min(len(data), 2048)
    place = int((at * 2 % 1) * reach)
    length = 1 + int(amount**4 * min(reach, 4096))
    before, there, after = data[:place], data[place : place + length], data[place + length :]
    if name == "flip":
        return before + bytes(byte ^ 1 << int(amount * 8) for byte in there[:1]) + data[place + 1 :]
    if name == "set":
        return before + bytes([int(amount * 256)] * len(there[:1])) + data[place + 1 :]
    if name == "snippet":
        lines = data.decode("utf-8", "surrogateescape").split("\n")
        spot = int(at * (len(lines) + 1))
        lines.insert(spot, SNIPPETS[int(amount * len(SNIPPETS))])
        return "\n".join(lines).encode("utf-8", "surrogateescape")
    made = {
        "cut": before,
        "delete": before + after,
        "repeat": before + there + there + after,
        "zero": before + bytes(len(there)) + after,
        "ones": before + b"\xff" * len(there) + after,
        "insert": before + bytes((place * 7 + number * 13) % 256 for number in range(length)) + there + after,
        "append": data + bytes((place + number * 31) % 256 for number in range(length)),
        "empty": b"",
        "swap": after + before + there if length > 8 else before + there[::-1] + after,
    }
    return made[name]


def _in_json(name: str, at: float, amount: float, data: bytes) -> bytes:
    """Change a value of a JSON file, of one line of it, or of a safetensors header."""
    if len(data) > 8 and 2 <= (length := struct.unpack("<Q", data[:8])[0]) <= len(data) - 8:
        changed = _in_json(name, at, amount, data[8 : 8 + length])
        return struct.pack("<Q", len(changed)) + changed + data[8 + length :]
    try:
        value = json.loads(data)
    except RecursionError:  # an earlier step has nested it
        return _in_bytes("flip", at, amount, data)
    except ValueError:
        lines = data.split(b"\n")
        spot = int(at * len(lines))
        try:
            value = json.loads(lines[spot])
        except (ValueError, RecursionError):
            return _in_bytes("flip", at, amount, data)
        lines[spot] = _changed(name, at * len(lines) % 1, amount, value)
        return b"\n".join(lines)
    return _changed(name, at, amount, value)


def _changed(name: str, at: float, amount: float, value: Any) -> bytes:
    places: list[tuple[Any, Any]] = []
    _collect(value, places)
    if not places:
        return b"[]"
    holder, key = places[int(at * len(places))]
    evil = EVIL[int(amount * len(EVIL))]
    if name == "drop":
        del holder[key]
    elif name == "replace":
        holder[key] = evil
    elif name == "rename" and isinstance(holder, dict):
        holder[f"{key[:-1]}_" if amount < 0.5 else key.upper()] = holder.pop(key)
    elif isinstance(holder, dict):
        holder[f"{key}_{int(amount * 9)}"] = evil
    else:
        holder.append(evil)
    text = json.dumps(value)
    if amount > 0.97:
        text = text.replace("null", "[" * 20000 + "]" * 20000, 1)
    if name == "twice" and isinstance(value, dict) and value:
        first = json.dumps(next(iter(value)))
        text = text[:-1] + f", {first}: {json.dumps(evil)}" + "}"
    return text.encode("utf-8", "surrogatepass")


def _collect(value: Any, places: list[tuple[Any, Any]]) -> None:
    if isinstance(value, dict):
        for key in value:
            places.append((value, key))
            _collect(value[key], places)
    elif isinstance(value, list):
        for index in range(min(len(value), 50)):
            places.append((value, index))
            _collect(value[index], places)
