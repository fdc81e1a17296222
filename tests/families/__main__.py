"""Survey types of causal language models and write the page of them: ``python -m tests.families [TYPE ...] [--again]``.

Types that have a result are left out unless ``--again`` is given, so a survey may be broken off and taken up again.
"""

import argparse

from tests.families.page import PAGE, families_page
from tests.families.survey import read_results, survey_missing
from tests.families.tiny_family import KINDS


def main() -> None:
    """Survey, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.families")
    parser.add_argument("kinds", nargs="*", metavar="TYPE", help="types; default: all that transformers registers")
    parser.add_argument("--again", action="store_true", help="survey types that have a result, too")
    given = parser.parse_args()
    for kind in survey_missing(tuple(given.kinds) or KINDS, again=given.again):
        print(kind, flush=True)
    PAGE.write_text(families_page(read_results()))


if __name__ == "__main__":
    main()
