"""A signal stops at once, or waits for what must be whole."""

import os
import signal
import threading

import pytest

from longfit.training.interruption import Interruptible


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_raises_at_once_and_the_handlers_come_back() -> None:
    before, reached = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with Interruptible():
            interrupt()
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == []
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_held_finishes_first(number: signal.Signals) -> None:
    done = []

    def step() -> None:
        with interruptible.held():
            os.kill(os.getpid(), number)
            done.append("whole")

    with Interruptible() as interruptible:
        with pytest.raises(KeyboardInterrupt):
            step()
        interrupt()  # a second Ctrl-C does not break the saving that follows
        with interruptible.held():
            done.append("saved")
    assert done == ["whole", "saved"]


def test_an_error_inside_is_not_hidden_by_the_interruption() -> None:
    def save() -> None:
        with interruptible.held():
            interrupt()
            raise OSError("disk")

    with Interruptible() as interruptible, pytest.raises(OSError, match="disk"):
        save()


def test_another_thread_does_nothing_to_signals() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with Interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
