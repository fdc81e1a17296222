"""What was found under a path, in lines: files not read, bad rows, unread columns, empty and repeated documents."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from longfit.data.extraction import Extraction

PROBLEMS_SHOWN = 10  # of possibly thousands: enough to see the pattern


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What was found under a path: read, skipped, empty and repeated. Nothing is left out without a line here."""

    num_files: int
    num_bytes: int
    skipped: tuple[tuple[str, str], ...] = ()  # (file, why)
    empty: tuple[str, ...] = ()  # documents without text
    duplicates: tuple[str, ...] = ()  # documents equal to an earlier one; they are kept
    bad_rows: tuple[str, ...] = ()  # rows that were left out, each with why
    unread: tuple[tuple[str, int], ...] = ()  # columns that say something nobody reads, and in how many rows
    extractions: tuple[tuple[str, Extraction], ...] = ()  # of documents that are no plain text
    num_words: int = 0
    num_decomposed: int = 0  # words written with decomposed characters (NFD)

    def warnings(self, *, extra_tokens: float | None = None) -> list[str]:
        """One line per kind of finding, with its number and first example.

        Args: extra_tokens: how many more tokens decomposed Unicode takes than composed, as a share; None if not known.
        """
        lines = []
        if self.skipped:
            reasons = Counter(reason for _, reason in self.skipped)
            counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
            lines.append(f"{len(self.skipped):,} files not read ({counts}); the first: {self.skipped[0][0]}")
        if self.bad_rows:
            lines.append(f"{len(self.bad_rows):,} bad rows are skipped; the first: {self.bad_rows[0]}")
        if self.unread:
            named = ", ".join(f"{column or repr(column)} ({count:,})" for column, count in self.unread)
            lines.append(f"columns that nothing reads: {named}")
        for name, extraction in self.extractions:
            if extraction.empty:
                shown = ", ".join(map(str, extraction.empty[:10])) + ", ..." * (len(extraction.empty) > 10)
                pictures = "; a scanned page is a picture, and is not read" * (extraction.unit == "pages")
                lines.append(
                    f"{name}: {len(extraction.empty):,} of {extraction.num_units:,} {extraction.unit} hold no text "
                    f"({shown}){pictures}"
                )
        left_out: Counter[str] = Counter()
        for _, extraction in self.extractions:
            left_out.update(dict(extraction.left_out))
        if left_out:
            named = ", ".join(f"{what} ({count:,})" for what, count in left_out.most_common())
            lines.append(f"left out of documents that are no plain text: {named}")
        if self.num_decomposed:
            lines.append(
                f"{self.num_decomposed:,} of {self.num_words:,} words are decomposed Unicode (NFD), which costs "
                f"{'more' if extra_tokens is None else f'{extra_tokens:.0%} more'} tokens; set data.normalise=nfc"
            )
        if self.empty:
            lines.append(f"{len(self.empty):,} empty documents left out; the first: {self.empty[0]}")
        if self.duplicates:
            lines.append(
                f"{len(self.duplicates):,} documents repeat an earlier one and are trained on again; "
                f"the first: {self.duplicates[0]}"
            )
        return lines

    def notes(self) -> list[str]:
        """What was taken out of documents that are no plain text, a line for each kind."""
        by_unit: dict[str, list[Extraction]] = {}
        for _, extraction in self.extractions:
            by_unit.setdefault(extraction.unit, []).append(extraction)
        return [
            f"extracted {sum(found.num_chars for found in each):,} characters from {sum(e.num_units for e in each):,} "
            f"{unit} of {len(each):,} files, {sum(len(e.empty) for e in each):,} {unit} without text"
            for unit, each in by_unit.items()
        ]


def listing(problems: Sequence[str], things: str) -> str:
    """Show the first problems, a line each, and count the others."""
    hidden = len(problems) - PROBLEMS_SHOWN
    return "\n".join([*problems[:PROBLEMS_SHOWN], *([f"... and {hidden:,} more {things}"] if hidden > 0 else [])])
