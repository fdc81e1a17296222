"""The page of families: a table of the survey's results."""

import re
from collections import Counter
from pathlib import Path

from tests.families.exactness import CHECKS
from tests.families.survey import Surveyed

PAGE = Path(__file__).parents[2] / "docs/reference/families.md"

CLASS = re.compile(r"(model\.layers\.\d+: )?\b[A-Z]\w+(ForCausalLM|LMHeadModel|LMHead|Model|Decoder|Layer|Block)\b")

HEAD = """# Model families

Every type of causal language model that transformers registers, tried with a tiny random model of two to four layers
against the type's own eager attention in float64. Written by `python -m tests.families`; {made} of {all} types can be
made that small.

| column | what was compared |
|---|---|
| exact | loss and the gradient of every parameter |
| packed | two documents in one window against each alone |
| padded | rows of two lengths against each alone |
| tiles | tiles that leave four tokens, and one |
| shifted | LongLoRA's attention against a dense mask for each head |
| cached | a text read in pieces with a cache against the whole |
| adapters | LoRA on all linear layers: gradients, and the saved adapter in plain PEFT |
| nf4 | loaded in NF4, saved, loaded again |

"yes" is equal, "-" refused by a message that says why (the last column, or the table of reasons), "n/a" what
transformers itself cannot do with the type, **no** a fault.

{counts}

"""


def families_page(results: dict[str, Surveyed]) -> str:
    """The page, in Markdown."""
    made = {kind: found for kind, found in results.items() if not found.made}
    columns = " | ".join(CHECKS)
    lines = [f"| type | {columns} | layers |", f"|---|{'---|' * (len(CHECKS) + 1)}"]
    for kind in sorted(made):
        found = made[kind]
        cells = " | ".join(_cell(found.checks[name]) for name in CHECKS)
        lines.append(f"| {kind} | {cells} | {_layers(found)} |")
    page = HEAD.format(made=len(made), all=len(results), counts=_counts(made)) + "\n".join(lines) + "\n"
    reasons = _reasons(made)
    page += "\n## Why not\n\n| what | types | the message |\n|---|---|---|\n" + "\n".join(reasons) + "\n"
    unmade = [f"| {kind} | {_plain(found.made)} |" for kind, found in sorted(results.items()) if found.made]
    if unmade:
        page += "\n## Types without a tiny model\n\n| type | why |\n|---|---|\n" + "\n".join(unmade) + "\n"
    return page


def num_exact(results: dict[str, Surveyed]) -> int:
    """Types that train exactly."""
    return sum(found.checks.get("exact") == "exact" for found in results.values())


def num_made(results: dict[str, Surveyed]) -> int:
    """Types of which there is a tiny model."""
    return sum(not found.made for found in results.values())


def _cell(outcome: str) -> str:
    if outcome == "exact":
        return "yes"
    if outcome.startswith("refused"):
        return "-"
    return "n/a" if outcome.startswith("not in transformers") else "**no**"


def _layers(found: Surveyed) -> str:
    if found.refused:
        return f"refused: {_plain(found.refused)}"
    words = []
    for module, count, how in found.layers:
        words.append(f"{count} {module} {'swept' if how == 'swept' else f'checkpointed ({_plain(how)})'}")
    return "; ".join(words) or "not checkpointed"


def _counts(made: dict[str, Surveyed]) -> str:
    lines = []
    for name in CHECKS:
        cells = Counter(_cell(found.checks[name]) for found in made.values())
        lines.append(f"{name} {cells['yes']} yes, {cells['-']} refused, {cells['n/a']} n/a, {cells['**no**']} no")
    return "; ".join(lines) + "."


def _reasons(made: dict[str, Surveyed]) -> list[str]:
    """Every message of checks that are not a yes, and the types that get it; classes are not told apart."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for kind, found in sorted(made.items()):
        checks: dict[str, list[str]] = {}
        for name, outcome in found.checks.items():
            if outcome != "exact":
                checks.setdefault(_plain(CLASS.sub("...", outcome)), []).append(name)
        for message, names in checks.items():
            kinds.setdefault((", ".join(names), message), []).append(kind)
    return [f"| {names} | {', '.join(types)} | {message} |" for (names, message), types in sorted(kinds.items())]


def _plain(text: str) -> str:
    """Without what would break a table."""
    text = " ".join(text.split()).replace("|", "/").replace("<", "(").replace(">", ")")
    return text if len(text) <= 160 else text[:157] + "..."
