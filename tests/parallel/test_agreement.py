"""What processes of a run see differently is found before they begin, by all of them."""

from tests.parallel.forked import run_in_processes

from longfit.errors import ProcessesError
from longfit.parallel.agreement import differences, least, require_agreement, versions


def test_differences_are_named_with_who_has_what() -> None:
    descriptions: list[dict[str, object]] = [
        {"seed": 1, "file": "ab"},
        {"seed": 1, "file": "cd"},
        {"seed": 1, "file": "ab", "extra": True},
    ]
    assert differences(descriptions) == [
        "file: process 0, 2 has ab; process 1 has cd",
        "extra: process 0, 1 has nothing; process 2 has True",
    ]
    assert differences(descriptions[:1]) == []


def _disagree(rank: int) -> str:
    require_agreement(versions())
    try:
        require_agreement({"data a.txt": rank})
    except ProcessesError as error:
        return str(error)
    return "no error"


def test_every_process_hears_of_a_difference() -> None:
    told = run_in_processes(_disagree, 2)
    assert told[0] == told[1]
    assert "data a.txt: process 0 has 0; process 1 has 1" in told[0]


def test_alone_there_is_nobody_to_disagree_with() -> None:
    require_agreement({"seed": 1})


def _free(rank: int) -> dict[str, int]:
    return least({"host": 100 - rank, "disk": 7 + rank})


def test_processes_choose_by_the_same_numbers() -> None:
    assert run_in_processes(_free, 2) == [{"host": 99, "disk": 7}] * 2
    assert least({"host": 5}) == {"host": 5}
