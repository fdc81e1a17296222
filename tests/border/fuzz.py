"""Damages files of a kind many times and judges what a command makes of them.

Two ends are right: the result is that of the sound file, or exit 2 with a message that names the file. Exit 1, a
traceback, more than 30 s, more than 2 GB, control characters on the terminal and a damaged file that is taken for a
sound one are wrong.

``LONGFIT_FUZZ=10000 python -m tests.border.fuzz [KIND]...`` prints a table; a mutant is named by its kind and the
seed.
"""

import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from tests.border.materials import Kind, kinds, make, words_for
from tests.border.mutations import PLACE_OPS, Mutation, apply, mutations
from tests.border.server import MOST_BYTES, Reply, Server

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SOMEWHERE = "asks for more memory than there is"


@dataclass
class Tally:
    """What became of the mutants of a kind."""

    refused: int = 0
    equal: int = 0
    other: int = 0  # accepted, and another sound file of the same form
    wrong: list[tuple[str, Mutation, str]] = field(default_factory=list)
    slowest_s: float = 0.0
    largest_bytes: int = 0

    @property
    def total(self) -> int:
        return self.refused + self.equal + self.other + len(self.wrong)


@dataclass(frozen=True)
class Workshop:
    """Sound materials, a warm server, and a place for mutants."""

    folder: Path
    server: Server
    sound: dict[tuple[str, str], object]

    def run(self, kind: Kind, file: str, damage: Callable[[Path], object]) -> tuple[Reply, Path]:
        """Copy a kind's folder, let ``damage`` change a file of it, run its command there."""
        place = Path(tempfile.mkdtemp(dir=self.folder / "mutants")) / kind.folder
        shutil.copytree(self.folder / kind.folder, place)
        damage(place / file)
        return self.server.run(*words_for(kind, file), cwd=place), place

    def judge(self, kind: Kind, mutation: Mutation, tally: Tally) -> None:
        """Add what becomes of a mutant to the tally."""
        file = kind.files[mutation.file % len(kind.files)]
        reply, place = self.run(kind, file, lambda path: apply(mutation, path))
        tally.slowest_s = max(tally.slowest_s, reply.seconds)
        tally.largest_bytes = max(tally.largest_bytes, reply.grown_bytes)
        try:
            problem = self._problem(kind, mutation, file, reply, place, tally)
        finally:
            shutil.rmtree(place.parent)
        if problem:
            tally.wrong.append((f"{file}: {problem}", mutation, reply.err[-1500:] or reply.out[-300:]))

    def _problem(
        self, kind: Kind, mutation: Mutation, file: str, reply: Reply, place: Path, tally: Tally
    ) -> str | None:
        if reply.code is None:
            return "hangs"
        if reply.grown_bytes > MOST_BYTES or SOMEWHERE in reply.err:
            return "takes too much memory"
        if reply.code not in (0, 2):
            return f"exit {reply.code}"
        if "Traceback" in reply.err:
            return "traceback"
        if CONTROL.search(reply.err):
            return f"control character {CONTROL.findall(reply.err)[0]!r} printed"
        if reply.code == 2:
            tally.refused += 1
            holders = {file, *kind.named, *(str(parent) for parent in Path(file).parents if parent != Path())}
            return None if any(name in reply.err for name in holders) else "the message does not name the file"
        if kind.result(reply, place) == self.sound[kind.name, file]:
            tally.equal += 1
            return None
        if mutation.steps[0][0] in PLACE_OPS and mutation.steps[0][0] != "missing":
            return "accepted, and the result differs"
        if kind.may_differ(mutation, place / file, self.folder / kind.folder / file):
            tally.other += 1
            return None
        return "accepted, and the result differs"


@contextmanager
def workshop() -> Iterator[Workshop]:
    """Make the materials and the results of the sound ones."""
    with tempfile.TemporaryDirectory(prefix="longfit-fuzz-") as name:
        folder = Path(name)
        make(folder)
        (folder / "mutants").mkdir()
        base = folder / "base"
        warm = (
            ("eval", base / "model", "ppl", "--data", base / "text.txt", "--json", "--max-tokens", "48"),
            (
                "train",
                base / "model",
                base / "text.txt",
                "--run-dir",
                folder / "warm",
                "--steps",
                "1",
                "--context",
                "64",
            ),
        )
        with Server(*warm, cwd=folder) as server:
            sound: dict[tuple[str, str], object] = {}
            commands: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {}
            made = Workshop(folder, server, sound)
            for kind in kinds():
                for file in dict.fromkeys(kind.files):
                    known = [sound[key] for key in sound if (kind.folder, words_for(kind, file)) == commands.get(key)]
                    if known:
                        sound[kind.name, file] = known[0]
                        continue
                    commands[kind.name, file] = kind.folder, words_for(kind, file)
                    reply, place = made.run(kind, file, lambda path: None)
                    assert reply.code == 0, f"{kind.name} {file}: {reply.err}"
                    sound[kind.name, file] = kind.result(reply, place)
                    shutil.rmtree(place.parent)
            yield made


def fuzz(shop: Workshop, kind: Kind, *, count: int, number: int = 0) -> Tally:
    """Try mutants of one kind.

    Args:
        count: of mutants.
        number: the seed; the same one gives the same mutants.
    """
    tally = Tally()

    @seed(number)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(mutations(structured=kind.structured, snippets=kind.snippets))
    def judge(mutation: Mutation) -> None:
        shop.judge(kind, mutation, tally)

    judge()
    return tally


def main() -> int:
    """Fuzz the kinds named on the command line, or all."""
    chosen = [kind for kind in kinds() if kind.name in sys.argv[1:] or not sys.argv[1:]]
    count, number = int(os.environ.get("LONGFIT_FUZZ", "10000")), int(os.environ.get("LONGFIT_FUZZ_SEED", "0"))
    wrong = total = 0
    with workshop() as shop:
        print("kind          mutants  refused  equal  other  wrong  slowest s  most MiB", flush=True)
        for kind in chosen:
            tally = fuzz(shop, kind, count=-(-count // len(chosen)), number=number)
            wrong, total = wrong + len(tally.wrong), total + tally.total
            print(
                f"{kind.name:<14}{tally.total:>7}{tally.refused:>9}{tally.equal:>7}{tally.other:>7}"
                f"{len(tally.wrong):>7}{tally.slowest_s:>11.1f}{tally.largest_bytes / 2**20:>10.0f}",
                flush=True,
            )
            seen: Counter[str] = Counter()
            for what, mutation, said in tally.wrong:
                sign = f"{what} {said.strip().splitlines()[0][:60] if said.strip() else ''}"
                seen[sign] += 1
                if seen[sign] == 1:
                    print(f"  {what}\n    {mutation}\n    " + said.strip().replace("\n", "\n    "), flush=True)
    print(f"{total} mutants, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
