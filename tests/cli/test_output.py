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


def test_a_terminal_shows_time_left_of_steps_that_take_minutes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("rich.console.monotonic", lambda: now)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with show_progress() as on_event:
        for done in range(1, 9):  # as many documents as steps: a bar that is full before the first step
            on_event(Event("count", "tokenised", {"done": done, "of": 8}))
            now += 1.0
        on_event(Event("phase", "training", {"total_steps": 8, "step": 0}))
        for step in range(1, 4):
            now += 300.0
            on_event(Event("step", "", {"step": step, "loss": 3.0, "tokens_per_s": 100.0}))
    last = capfd.readouterr().err.rpartition("loss 3.0000")[2]
    assert "3/8" in last
    assert "0:15:00" in last  # since the first step began
    assert "0:25:00" in last  # five steps of five minutes are left
