"""Kills runs at random moments, fills their disk and breaks it; each run must end as if nothing had been.

    python -m tests.border.campaign --kills 200 --fills 50 --breaks 50

A run is killed, resumed, killed again, until it is finished: its adapter and its losses are then those of a run that
nobody disturbed, bit for bit. A disk that fills, and one that an error of its file system makes read-only, must end the
command with exit 2 and a message that says what stays; with room again, or mounted anew, the run goes on to the same
end. Filling wants a small tmpfs and breaking an ext4 in a file, which only root may mount.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.border.materials import FLAGS, make_base, resumed
from tests.border.server import FILLER, Reply, Server

TRAIN = (
    "train", "model", "text.txt", "--run-dir", "run", "--steps", "6", "--rank", "4", *FLAGS, "train.save_every=2",
    "--validation", "held_out.txt", "train.eval_every=2",
)  # fmt: skip
TMPFS_BYTES = 400 << 20


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def _ext4(image: Path, folder: Path) -> Iterator[tuple[Path, Path, Callable[[], None]]]:
    """A file system that becomes read-only at its first error: its folder, what makes an error, what repairs it."""
    subprocess.run(["truncate", "-s", str(TMPFS_BYTES), str(image)], check=True)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    folder.mkdir()

    def mount() -> None:
        subprocess.run(["mount", "-o", "loop,errors=remount-ro", str(image), str(folder)], check=True)

    def device() -> str:
        found = subprocess.run(["findmnt", "-no", "SOURCE", str(folder)], check=True, capture_output=True, text=True)
        return Path(found.stdout.strip()).name

    def repair() -> None:
        subprocess.run(["umount", str(folder)], check=True)
        subprocess.run(["e2fsck", "-fy", str(image)], capture_output=True, check=False)  # 1: repaired
        mount()

    mount()
    try:
        yield folder, Path("/sys/fs/ext4") / device() / "trigger_fs_error", repair
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Campaign:
    """Counts what happens to runs in ``place``, which holds a model and texts."""

    def __init__(self, server: Server, place: Path, sound: object, seconds: float, draw: random.Random) -> None:
        self.server, self.place, self.sound, self.seconds, self.draw = server, place, sound, seconds, draw
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def words(self) -> tuple[str, ...]:
        """The command that a user would give now: start, or go on."""
        is_run = (self.place / "run" / "config.yaml").exists()
        return ("train", "--run-dir", "run", "--resume", "--json") if is_run else (*TRAIN, "--json")

    def kill(self) -> None:
        """Start or go on, and kill at a random moment, or be late."""
        reply = self.server.run(
            *self.words(), cwd=self.place, limits=False, kill_after=self.draw.uniform(0, self.seconds)
        )
        if reply.code is None:
            self.counts["kills"] += 1
        else:
            self.ended(reply)

    def fill(self) -> None:
        """Start or go on, fill the disk at a random moment, make room, and go on."""
        reply = self.server.run(
            *self.words(), cwd=self.place, limits=False, fill_after=self.draw.uniform(0, self.seconds)
        )
        self.counts["fills"] += (self.place / FILLER).exists()
        (self.place / FILLER).unlink(missing_ok=True)
        self.stopped(reply, "disk is full", "the disk has")  # the second before the first step

    def break_disk(self, breaker: Path, repair: Callable[[], None]) -> None:
        """Start or go on, make the disk read-only at a random moment, repair it, and go on."""
        after = self.draw.uniform(0, self.seconds)
        reply = self.server.run(*self.words(), cwd=self.place, limits=False, break_after=after, breaker=breaker)
        self.counts["breaks"] += 1
        repair()
        self.stopped(reply, "may not be written", "Input/output error")  # the second while it is found out

    def stopped(self, reply: Reply, *said: str) -> None:
        """A command met a disk that takes nothing; it must say so, and the next one must finish the run."""
        if reply.code != 2:  # it was done before
            self.ended(reply)
            return
        self.counts["refused, exit 2"] += 1
        text = " ".join(reply.err.split())
        if not any(words in text for words in said):
            self.faults.append(f"does not say {said!r}: {reply.err[-2000:]}")
        if (self.place / "run" / "config.yaml").exists():
            self.counts["said how to go on"] += "--resume" in text
        self.ended(self.server.run(*self.words(), cwd=self.place, limits=False))

    def ended(self, reply: Reply) -> None:
        """A command has ended by itself: it must have finished the run, as if nothing had been."""
        if reply.code != 0:
            self.faults.append(f"exit {reply.code}: {reply.err[-2000:]}")
        else:
            self.counts["runs finished"] += 1
            self.counts["bit-equal"] += resumed(reply, self.place) == self.sound
            if resumed(reply, self.place) != self.sound:
                self.faults.append("the result differs")
            if left := [path.name for path in (self.place / "run").rglob(".*")]:
                self.faults.append(f"left behind: {left}")
        shutil.rmtree(self.place / "run", ignore_errors=True)


def main() -> int:
    """Run both campaigns and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--fills", type=int, default=50)
    parser.add_argument("--breaks", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw, faults = random.Random(asked.seed), []
    with tempfile.TemporaryDirectory(prefix="longfit-campaign-") as name:
        base = Path(name) / "base"
        make_base(base)
        (base / "held_out.txt").write_text("and the rivers went on and on, past the road.\n" * 3)
        with Server(cwd=base) as server:
            server.warm((*TRAIN[:4], Path(name) / "warm", *TRAIN[5:]), cwd=base)
            reply = server.run(*TRAIN, "--json", cwd=base, limits=False)
            assert reply.code == 0, reply.err
            sound, seconds = resumed(reply, base), reply.seconds
            shutil.rmtree(base / "run")
            shutil.copytree(base, place := Path(name) / "killed")
            killed = Campaign(server, place, sound, seconds, draw)
            while killed.counts["kills"] < asked.kills and not killed.faults:
                killed.kill()
            if (place / "run").exists():
                killed.ended(server.run(*killed.words(), cwd=place, limits=False))
            print(f"killed: {dict(killed.counts)}", flush=True)
            faults += killed.faults
            if asked.fills:
                with _small_disk(Path(name) / "disk") as disk:
                    shutil.copytree(base, disk, dirs_exist_ok=True)
                    filled = Campaign(server, disk, sound, seconds, draw)
                    while filled.counts["fills"] < asked.fills and not filled.faults:
                        filled.fill()
                    print(f"filled: {dict(filled.counts)}", flush=True)
                    faults += filled.faults
            if asked.breaks:
                with _ext4(Path(name) / "image", Path(name) / "ext4") as (disk, breaker, repair):
                    shutil.copytree(base, disk, dirs_exist_ok=True)
                    os.sync()  # what was there before the error is there after it
                    broken = Campaign(server, disk, sound, seconds, draw)
                    while broken.counts["breaks"] < asked.breaks and not broken.faults:
                        broken.break_disk(breaker, repair)
                    print(f"broken: {dict(broken.counts)}", flush=True)
                    faults += broken.faults
    print(*faults[:5], sep="\n")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
