"""Damages files of a kind many times and judges what a command makes of them.

Two ends are right: the result is that of the sound file, or exit 2 with a message that names the file. Exit 1, a
traceback, more than 30 s, more than 2 GB, control characters on the terminal and a damaged file that is taken for a
sound one are wrong.

``python -m tests.border.fuzz --mutants 10000 [KIND]...`` prints a table; a mutant is named by its kind and the seed.
"""

import argparse
import itertools
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
    cpu_s: float = 0.0
    largest_bytes: int = 0

    @property
    def total(self) -> int:
        return self.refused + self.equal + self.other + len(self.wrong)


@dataclass(frozen=True)
class Workshop:
    """Sound materials, a warm server, and a place for mutants."""

    folder: Path
    mutants: Path
    server: Server
    known: dict[tuple[str, tuple[str, ...]], object]

    def sound(self, kind: Kind, file: str) -> object:
        """The result of a kind's command where nothing is damaged."""
        command = kind.folder, words_for(kind, file)
        if command not in self.known:
            reply, place = self.run(kind, file, lambda path: None)
            assert reply.code == 0, f"{kind.name} {file}: {reply.err}"
            self.known[command] = kind.result(reply, place)
            shutil.rmtree(place.parent)
        return self.known[command]

    def run(self, kind: Kind, file: str, damage: Callable[[Path], object]) -> tuple[Reply, Path]:
        """Copy a kind's folder, let ``damage`` change a file of it, run its command there."""
        place = Path(tempfile.mkdtemp(dir=self.mutants)) / kind.folder
        shutil.copytree(self.folder / kind.folder, place)
        damaged = next(place.glob(file), None)
        assert damaged is not None, f"{kind.name}: {file} was not made"
        damage(damaged)
        cache = None if kind.cache is None else place / kind.cache
        return self.server.run(*words_for(kind, file), cwd=place, cache=cache), place

    def judge(self, kind: Kind, mutation: Mutation, tally: Tally) -> None:
        """Add what becomes of a mutant to the tally."""
        file = kind.files[mutation.file % len(kind.files)]
        self.sound(kind, file)
        reply, place = self.run(kind, file, lambda path: apply(mutation, path))
        tally.cpu_s += reply.cpu_s
        tally.slowest_s = max(tally.slowest_s, reply.seconds)
        tally.largest_bytes = max(tally.largest_bytes, reply.grown_bytes)
        try:
            problem = self._problem(kind, mutation, file, reply, place, tally)
        except Exception as error:  # exit 0, and no result that can be read
            problem = f"the result cannot be read: {type(error).__name__}: {error}"
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
        if found := CONTROL.search(reply.err + reply.out):
            return f"control character {found[0]!r} printed"
        if reply.code == 2:
            tally.refused += 1
            holders = {
                Path(file).name,
                *kind.named,
                *(str(parent) for parent in Path(file).parents if parent != Path()),
            }
            return None if any(name in reply.err for name in holders) else "the message does not name the file"
        if kind.result(reply, place) == self.sound(kind, file):
            tally.equal += 1
            return None
        if mutation.steps[0][0] in PLACE_OPS and mutation.steps[0][0] != "missing" and not kind.tells:
            return "accepted, and the result differs"
        if kind.may_differ(mutation, place / file, self.folder / kind.folder / file):
            tally.other += 1
            return None
        return "accepted, and the result differs"


@contextmanager
def workshop(materials: Path | None = None) -> Iterator[Workshop]:
    """Make the materials, or take those that an earlier workshop has left in a folder."""
    with tempfile.TemporaryDirectory(prefix="longfit-fuzz-") as name:
        folder = Path(name) if materials is None else materials
        (mutants := Path(name) / "mutants").mkdir()
        with Server(cwd=Path(name)) as server:
            make(server, folder)
            yield Workshop(folder, mutants, server, {})


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--mutants", type=int, default=10000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="all kinds so many times, each time with the next seed")
    parser.add_argument("--materials", type=Path, help="a folder for the sound files, kept for the next time")
    parser.add_argument("--json", type=Path, help="add the counts of each kind to this file, a line each")
    asked = parser.parse_args()
    chosen = [kind for kind in kinds() if kind.name in asked.kinds or not asked.kinds]
    wrong = total = 0
    with workshop(asked.materials) as shop:
        print("kind          mutants  refused  equal  other  wrong  slowest s  most MiB  CPU s", flush=True)
        for number, kind in itertools.product(range(asked.seed, asked.seed + asked.rounds), chosen):
            tally = fuzz(shop, kind, count=-(-asked.mutants // len(chosen) // asked.rounds), number=number)
            wrong, total = wrong + len(tally.wrong), total + tally.total
            print(
                f"{kind.name:<14}{tally.total:>7}{tally.refused:>9}{tally.equal:>7}{tally.other:>7}"
                f"{len(tally.wrong):>7}{tally.slowest_s:>11.1f}{tally.largest_bytes / 2**20:>10.0f}{tally.cpu_s:>7.0f}",
                flush=True,
            )
            seen: Counter[str] = Counter()
            for what, mutation, said in tally.wrong:
                sign = f"{what} {said.strip().splitlines()[0][:60] if said.strip() else ''}"
                seen[sign] += 1
                if seen[sign] == 1:
                    print(f"  {what}\n    {mutation}\n    " + said.strip().replace("\n", "\n    "), flush=True)
            if asked.json is not None:
                counts = {**asdict(tally), "wrong": dict(seen), "kind": kind.name, "seed": number}
                with asked.json.open("a") as file:
                    file.write(json.dumps({**counts, "mutants": tally.total}) + "\n")
    print(f"{total} mutants, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
