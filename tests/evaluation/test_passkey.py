"""Passkey trials against a scorer that knows no cache, no draft and no sharing, and the arithmetic of shares."""

import re

import pytest
import torch
from tests.model_folders import byte_tokenizer, llama

from longfit.errors import ConfigError, DataError
from longfit.evaluation import passkey as module
from longfit.evaluation import passkey_prompts as prompts
from longfit.evaluation.passkey import passkey, wilson
from longfit.evaluation.passkey_prompts import Haystack, Needle

# bytes: introduction, needle and question alone take 268 tokens, 475 with three keys together
LENGTHS = {False: (300, 420), True: (520, 600)}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    return llama(dtype=torch.float64, tied=True).eval()


@torch.no_grad()
def by_brute_force(model, tokenizer, text: str, key: str) -> tuple[str, float]:
    """Continue a text with one full forward a token; the loss of the key likewise."""
    ids = torch.tensor(tokenizer(text).input_ids)
    answer: list[int] = []
    while len(answer) < len(f" {key}") + 8:
        logits = model(
            input_ids=torch.cat([ids, torch.tensor(answer, dtype=torch.int64)])[None], use_cache=False
        ).logits
        answer.append(int(logits[0, -1].argmax()))
        number = re.search(r"\d+", tokenizer.decode(answer))
        if number and (number.end() < len(tokenizer.decode(answer)) or not key.startswith(number[0])):
            break
    whole = torch.tensor(tokenizer(f"{text} {key}").input_ids)
    logits = model(input_ids=whole[None], use_cache=False).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1].double(), whole[1:], reduction="none")
    return tokenizer.decode(answer), float(losses[len(ids) - 1 :].sum())


def watch_prompts(monkeypatch: pytest.MonkeyPatch) -> list:
    """Collect the prompts in the order in which they are read."""
    seen, run_trial = [], module.run_trial

    def watched(reader, tokenizer, prompt):
        seen.append(prompt)
        return run_trial(reader, tokenizer, prompt)

    monkeypatch.setattr(module, "run_trial", watched)
    return seen


DOCUMENTS = ["A first line of a document.\n\nAnother line, " + "which is long. " * 40, "x" * 700 + " end"]


@pytest.mark.parametrize(("documents", "together"), [(None, False), (DOCUMENTS, False), (None, True)])
def test_trials_are_those_of_brute_force(
    model, tokenizer, documents, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, calls, read = watch_prompts(monkeypatch), [], []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda layer, args: read.append(args[0].shape[1]))
    trials = 2 if together else (3, 1, 2)
    settings = {"lengths": LENGTHS[together], "depths": (0, 0.4, 1), "trials": trials, "documents": documents}
    settings["together"] = together
    result = passkey(model, tokenizer, **settings, on_progress=lambda *call: calls.append(call))
    hook.remove()
    assert calls == [(done, 12) for done in range(1, 13)]
    # together, each of the four texts is read once, and its question and answer, at most 80 bytes, for each key
    assert sum(read) < (
        sum(2 * length for length in LENGTHS[True]) + 12 * 80 if together else sum(p.length for p in seen)
    )
    texts = {(p.length, p.depth, p.key): tokenizer.decode(p.token_ids) for p in seen}
    assert [(cell.length, cell.depth, cell.num_trials) for cell in result.cells] == [
        (n, d, count)
        for n in settings["lengths"]
        for d, count in zip((0, 0.4, 1), (2, 2, 2) if together else trials, strict=True)
    ]
    for cell in result.cells:
        own = [trial for trial in result.trials if (trial.length, trial.depth) == (cell.length, cell.depth)]
        assert cell.num_correct == sum(trial.correct for trial in own)
        assert cell.key_nll == pytest.approx(sum(trial.key_nll for trial in own) / cell.num_trials, rel=1e-12)
    for trial in result.trials:
        text = texts[trial.length, trial.depth, trial.key]
        assert len(tokenizer(text).input_ids) == trial.num_tokens <= trial.length
        assert text.startswith(prompts.INTRODUCTION)
        assert text.count(trial.key) == 2
        thing = re.search(rf"The (pass key[a-z ]*) is {trial.key}. Remember it. {trial.key} is the \1", text)[1]
        assert text.endswith(f"What is the {thing}? The {thing} is")
        assert text.count("Remember it.") == (3 if together else 1)
        answer, key_nll = by_brute_force(model, tokenizer, text, trial.key)
        assert trial.answer == answer
        assert trial.key_nll == pytest.approx(key_nll, rel=1e-9)  # float64 in other orders
        assert trial.correct == (re.findall(r"\d+", answer)[:1] == [trial.key])
    assert len({trial.key for trial in result.trials}) == 12
    assert (result.haystack, result.together) == ("filler" if documents is None else "documents", together)
    if not together:  # the same cell alone has the same keys, and the same numbers
        alone = passkey(model, tokenizer, **{**settings, "lengths": (420,), "depths": (0.4,), "trials": 1})
        kept = [trial for trial in result.trials if (trial.length, trial.depth) == (420, 0.4)]
        assert [trial.key for trial in alone.trials] == [trial.key for trial in kept]
        assert [trial.key_nll for trial in alone.trials] == pytest.approx([t.key_nll for t in kept], rel=1e-9)


def prompt_of(tokenizer, length: int, depth: float, key: str = "48213"):
    haystack, needle = Haystack.filler(1000), Needle(key, None, depth)
    most = prompts._most_units(tokenizer, haystack, length, [needle])
    return prompts._prompt(tokenizer, haystack, most, length, 0, [needle], needle)


def test_the_needle_lies_at_its_depth(tokenizer) -> None:
    needle = Needle("48213", None, 0.5)
    room = 2000 - len(prompts.INTRODUCTION + needle.put_into(prompts.NEEDLE) + needle.put_into(prompts.QUESTION))
    for depth in (0.0, 0.3, 0.77, 1.0):
        prompt = prompt_of(tokenizer, 2000, depth)
        # half a sentence of 23 bytes, of haystack that may leave most of one unused
        assert abs(prompt.shared - depth * room) < 12 + 23
        assert 2000 - 23 < len(prompt.token_ids) <= 2000


class Parrot:
    """Stands in for a model that has read a prompt: predicts the bytes of a given continuation."""

    def __init__(self, tokenizer, continuation: str) -> None:
        self.tokenizer, self.continuation = tokenizer, tokenizer(continuation).input_ids
        self.question = tokenizer("The pass key is").input_ids

    def read(self, token_ids: torch.Tensor, *, keep: int = 1) -> torch.Tensor:
        ids = token_ids.tolist()
        prompt = max(end for end in range(len(ids) + 1) if ids[:end][-len(self.question) :] == self.question)
        logits = torch.zeros(keep, 258)
        for row, end in enumerate(range(len(ids) - keep + 1, len(ids) + 1)):
            made = ids[prompt:end]
            agrees = self.continuation[: len(made)] == made
            logits[row, self.continuation[len(made)] if agrees else 0] = 30
        return logits


@pytest.mark.parametrize(
    ("continuation", "answer", "correct"),
    [
        (" 48213. And on", " 48213.", True),
        (" 48213\n", " 48213\n", True),
        (" 482134 it is", " 482134", False),  # another number that begins with the key
        (" 48217", " 48217", False),
        (": it's 48213, I'd say", ": it's 48213,", True),  # words first, within the extra tokens
        (" well, I think it is 48213", " well, I think", False),  # too long an answer
        (" 7 or 48213", " 7", False),  # the first number counts
        (" 4 8213 ...", " 4 ", False),
    ],
)
def test_digits_are_judged_not_tokens(tokenizer, continuation: str, answer: str, correct: bool) -> None:
    prompt = prompt_of(tokenizer, 500, 0.5)
    trial = module.run_trial(Parrot(tokenizer, continuation), tokenizer, prompt)
    assert (trial.answer, trial.correct) == (answer, correct)


def test_wilson_is_the_published_interval() -> None:
    # Newcombe (1998), Statistics in Medicine 17, 857, table I, method 3 (the score interval)
    for correct, trials, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        assert wilson(correct, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1), abs=5e-5)
    assert wilson(5, 10, confidence=0.5)[0] > wilson(5, 10)[0]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lengths": []}, ConfigError, "an empty grid"),
        ({"depths": [0.5, 1.5]}, ConfigError, "depth 1.5: must lie between 0"),
        ({"trials": 0}, ConfigError, "at least 1"),
        ({"trials": (1, 2)}, ConfigError, "2 numbers for 5 depths"),
        ({"trials": (1, 2), "depths": (0, 1), "together": True}, ConfigError, "give one number"),
        ({"confidence": 95}, ConfigError, "try 0.95"),
        ({"lengths": [200]}, ConfigError, r"length 200: the shortest prompt has \d+ tokens"),
        ({"lengths": [0]}, ConfigError, "length 0"),
        ({"depths": [i / 30 for i in range(30)], "together": True}, ConfigError, "at most 22 keys"),
        ({"documents": ["short"]}, DataError, r"the whole haystack makes a prompt of \d+ tokens"),
        ({"documents": ["", "\n"]}, DataError, "2 documents without text"),
        ({"documents": ["Hide it: THE PASS KEY IS 5."]}, DataError, "the haystack itself says"),
    ],
)
def test_errors(model, tokenizer, settings, error, message: str) -> None:
    with pytest.raises(error, match=message):
        passkey(model, tokenizer, **{"lengths": [400], **settings})


def test_another_tokenizer_is_noticed(tokenizer) -> None:
    small = llama(dtype=torch.float32)
    small.resize_token_embeddings(100)
    with pytest.raises(DataError, match="the model knows 0 to 99; use its own tokenizer"):
        passkey(small, tokenizer, lengths=[400], trials=1)
