"""``longfit chat``: questions in, answers out; what does not fit is refused before anything is read."""

import io
import json
from pathlib import Path

import pytest
from tests.training.tiny import save_tiny_model

from longfit.cli.app import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("chat") / "model"))


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text("a short road.\n")
    return str(path)


def test_answers_are_printed_and_as_json(model: str, document: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["chat", model, "--document", document, "--quant", "none", "--max-new-tokens", "3"]
    assert main([*words, "--question", "who", "--json"]) == 0
    out, err = capsys.readouterr()
    (turn,) = json.loads(out)
    assert turn["question"] == "who"
    assert f"{document}: 33 of 64 tokens" in err  # 13 characters, two line breaks, "Question: ", "\nAnswer:"
    assert main([*words, "--question", "who"]) == 0
    assert capsys.readouterr().out.strip() == turn["answer"]


def test_questions_come_from_a_pipe(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n\nb\n"))
    words = ["chat", model, "--quant", "none", "--max-new-tokens", "2", "--temperature", "1", "--json"]
    assert main(words) == 0
    assert [turn["question"] for turn in json.loads(capsys.readouterr().out)] == ["a", "b"]


def test_what_cannot_be_talked_about_is_refused(
    model: str, document: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, chats = tmp_path / "long.txt", tmp_path / "chat.jsonl"
    long.write_text("on and on. " * 50)
    chats.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    (tmp_path / "two").mkdir()
    for name in ("one.txt", "two.txt"):
        (tmp_path / "two" / name).write_text(f"text {name}")
    for arguments, message in [
        (["--document", str(long)], "nothing is cut in silence"),
        (["--document", str(tmp_path / "two")], "holds 2 documents"),
        (["--document", str(chats)], "holds a chat"),
        (["--document", str(tmp_path / "none.txt")], "none.txt"),
        (["--max-new-tokens", "many"], "--max-new-tokens many: must be a number of tokens"),
        (["--document", document, "--temperature", "-1", "--max-new-tokens", "3"], "temperature -1.0"),
    ]:
        assert main(["chat", model, "--quant", "none", "--question", "q", *arguments]) == 2
        assert message in capsys.readouterr().err
