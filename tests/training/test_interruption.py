"""A signal stops at once, or waits for what must be whole."""

import os
import signal
import threading

import pytest

from longfit.training.interruption import Interruptible


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_raises_at_once_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interruptible():
        interrupt()
        raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_held_finishes_first(number: signal.Signals) -> None:
    done = []
    with Interruptible() as interruptible:
        with pytest.raises(KeyboardInterrupt), interruptible.held():
            os.kill(os.getpid(), number)
            done.append("whole")
        interrupt()  # a second Ctrl-C does not break the saving that follows
        with interruptible.held():
            done.append("saved")
    assert done == ["whole", "saved"]


def test_an_error_inside_is_not_hidden_by_the_interruption() -> None:
    with Interruptible() as interruptible, pytest.raises(OSError, match="disk"), interruptible.held():
        interrupt()
        raise OSError("disk")


def test_another_thread_does_nothing_to_signals() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with Interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
