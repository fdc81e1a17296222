"""What is printed: no text from outside is obeyed by a terminal."""

import pytest
from tests.test_words import NASTY

from longfit.cli.output import (
    print_error,
    print_lines,
    print_note,
    print_piece,
    print_spans,
    print_table,
    show_progress,
)
from longfit.notice import notify
from longfit.training.metrics import Event
from longfit.words import visible


def test_no_way_of_printing_lets_a_control_character_through(capfd: pytest.CaptureFixture[str]) -> None:
    print_error(NASTY)
    print_note(NASTY)
    print_lines(NASTY)
    print_piece(NASTY)
    print_spans([(NASTY, True), (NASTY, False)])
    print_table([NASTY], [[NASTY]])
    notify(NASTY)
    with show_progress() as on_event:
        on_event(Event("phase", NASTY))
        on_event(Event("warning", NASTY))
    said = "".join(capfd.readouterr())
    assert said.count(visible(NASTY)) == 10  # pytest has set logging up, so that the notice goes there
    assert visible(said) == said
