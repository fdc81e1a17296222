"""Frozen processes and those that wait for each other are told from those that work; threads stand in for processes."""

import json
import socket
import threading
import time
from collections.abc import Callable

import pytest

from longfit.errors import ProcessesError
from longfit.parallel.heartbeat import Heartbeat

TIMEOUT = 1.0


class Shelf:
    """A store in this process."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.kept[key] = value

    def get(self, key: str) -> bytes:
        return self.kept[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.kept for key in keys)


def compute(until: threading.Event) -> None:
    while not until.is_set():
        sum(range(1000))


def wait(until: threading.Event) -> None:
    until.wait()


def lives(*works: Callable[[threading.Event], None], seconds: float, silent: bool = False) -> list[str]:
    """Let threads live side by side, each watched; return why they were ended.

    Args: silent: count one process more, which never says anything.
    """
    store, reasons, over = Shelf(), [], threading.Event()

    def live(rank: int, work: Callable[[threading.Event], None]) -> None:
        heartbeat = Heartbeat(
            store, rank=rank, num_processes=len(works) + silent, timeout=TIMEOUT,
            end=lambda error: reasons.append(error),
        )  # fmt: skip
        heartbeat.start()
        work(over)
        heartbeat.stop()

    threads = [threading.Thread(target=live, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    over.set()
    for thread in threads:
        thread.join()
    assert all(isinstance(reason, ProcessesError) for reason in reasons)
    return [str(reason) for reason in reasons]


def test_one_that_works_keeps_those_that_wait_for_it() -> None:
    assert lives(compute, wait, seconds=2 * TIMEOUT) == []


def test_processes_that_all_wait_are_ended_and_it_is_said_where() -> None:
    reasons = lives(wait, wait, seconds=1.5 * TIMEOUT)
    assert len(reasons) == 2
    assert "no process has worked" in reasons[0]
    assert "process 1 of 2" in reasons[0]
    assert "wait > Event.wait > Condition.wait" in reasons[0]


def test_a_silent_process_is_named_within_the_time_out() -> None:
    began = time.monotonic()
    reasons = lives(compute, seconds=TIMEOUT, silent=True)
    assert reasons
    assert reasons[0].startswith("not heard of for")
    assert "process 1 of 2: frozen or gone" in reasons[0]
    assert time.monotonic() - began < 2 * TIMEOUT


def test_a_silent_process_of_this_machine_is_removed_before_the_others_end() -> None:
    store, happened = Shelf(), []
    silent = {"beat": 1, "worked": True, "done": False, "host": socket.gethostname(), "pid": 4711, "where": "sleep"}
    elsewhere = {**silent, "host": "elsewhere", "pid": 4712}
    for rank, about in ((1, silent), (2, elsewhere)):
        store.set(f"longfit/heartbeat/{rank}", json.dumps(about))
    heartbeat = Heartbeat(
        store, rank=0, num_processes=3, timeout=TIMEOUT, end=lambda _: happened.append("ended"), remove=happened.append
    )
    heartbeat.start()
    time.sleep(1.5 * TIMEOUT)
    heartbeat.stop()
    assert happened == [4711, "ended"]


def test_one_that_is_done_is_not_missed() -> None:
    assert lives(compute, lambda over: None, seconds=2 * TIMEOUT) == []


def test_a_slow_disk_is_no_fault() -> None:
    store, reasons = Shelf(), []
    heartbeat = Heartbeat(store, rank=0, num_processes=1, timeout=TIMEOUT, end=reasons.append)
    heartbeat.start()
    with heartbeat.patient():
        time.sleep(1.5 * TIMEOUT)
    heartbeat.stop()
    assert reasons == []


def test_a_store_that_has_gone_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    store, reasons = Shelf(), []
    heartbeat = Heartbeat(store, rank=0, num_processes=1, timeout=TIMEOUT, end=reasons.append)

    def gone(key: str, value: str) -> None:
        raise RuntimeError("Broken pipe\nfrom somewhere")

    monkeypatch.setattr(store, "set", gone)
    heartbeat.start()
    time.sleep(TIMEOUT / 2)
    heartbeat.stop()
    assert [str(reason) for reason in reasons] == [
        "the store of the run does not answer (Broken pipe): its process has gone"
    ]
