"""What ``gpu.py`` measures, as rows, and how they become a table and a JSON file."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Longest contexts published for an 8B model by the best known peer, by GiB of card (Unsloth, December 2024).
PEER_CONTEXTS = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475, 40: 153_977, 48: 191_728, 80: 342_733}


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        section, name: what was measured.
        value, unit: the result; None where it could not be measured, and ``note`` says why.
        target: what it is to reach, in words.
        met: whether it does; None without a target or a value.
    """

    section: str
    name: str
    value: float | None
    unit: str
    target: str = ""
    met: bool | None = None
    note: str = ""


@dataclass
class Report:
    """All rows, and the time they may take."""

    machine: dict[str, Any]
    limit_s: float
    rows: list[Row] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self.limit_s - (time.perf_counter() - self.began)

    def add(
        self, section: str, name: str, value: float, unit: str, *, least: float | None = None,
        most: float | None = None, note: str = "",
    ) -> None:  # fmt: skip
        """Add a number, with a target if it has one."""
        if least is not None:
            self.rows.append(Row(section, name, value, unit, f"at least {least:g}", value >= least, note))
        elif most is not None:
            self.rows.append(Row(section, name, value, unit, f"at most {most:g}", value <= most, note))
        else:
            self.rows.append(Row(section, name, value, unit, note=note))
        print(line(self.rows[-1]), flush=True)

    def skip(self, section: str, name: str, why: str) -> None:
        """Say that something was not measured."""
        self.rows.append(Row(section, name, None, "", note=f"not measured: {why}"))
        print(line(self.rows[-1]), flush=True)

    def allows(self, section: str, name: str, seconds: float) -> bool:
        """Whether there is time for what takes about so long; a skipped row where there is not."""
        if seconds <= self.left_s:
            return True
        self.skip(section, name, f"would take about {seconds:.0f} s, {max(0.0, self.left_s):.0f} s are left")
        return False

    def save(self, folder: Path) -> None:
        """Write gpu.json and gpu.md."""
        folder.mkdir(parents=True, exist_ok=True)
        results = {"machine": self.machine, "rows": [asdict(row) for row in self.rows]}
        (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "gpu.md").write_text(table(self.machine, self.rows))


def line(row: Row) -> str:
    """One row for a terminal."""
    value = "" if row.value is None else f"{row.value:,.4g} {row.unit}"
    return f"{row.section:<12}{row.name:<58}{value:>20}  {_target(row)} {row.note}".rstrip()


def table(machine: dict[str, Any], rows: list[Row]) -> str:
    """All rows in Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    lines = ["# On a GPU", "", f"Written by `python benchmarks/gpu.py`. {about}.", ""]
    lines += ["| section | what | value | unit | target | note |", "|---|---|---:|---|---|---|"]
    for row in rows:
        value = "-" if row.value is None else f"{row.value:,.4g}"
        lines.append(f"| {row.section} | {row.name} | {value} | {row.unit} | {_target(row)} | {row.note} |")
    return "\n".join(lines) + "\n"


def _target(row: Row) -> str:
    if row.met is None:
        return row.target
    return f"{row.target}: {'met' if row.met else '**not met**'}"


@dataclass(frozen=True)
class Line:
    """Memory as a straight line of the context: ``fixed + slope * tokens`` bytes."""

    fixed_bytes: float
    bytes_per_token: float

    @classmethod
    def through(cls, short: tuple[int, int], long: tuple[int, int]) -> "Line":
        """Fit two measurements (tokens, bytes)."""
        slope = (long[1] - short[1]) / (long[0] - short[0])
        return cls(short[1] - slope * short[0], slope)

    def longest(self, num_bytes: float, *, step: int = 1024) -> int:
        """The longest context that fits, in whole thousands (of 1,024); 0 if none does."""
        room = num_bytes - self.fixed_bytes
        return max(0, int(room / self.bytes_per_token) // step * step) if self.bytes_per_token > 0 else 0
