"""Recall asks for what stands once in the sequence; the experiment's counts are what they are called."""

import pytest
import torch
from benchmarks.experiments import context_use
from benchmarks.experiments.recall_task import BOS, FIRST_FREE, IGNORED, QUESTIONS, Task, corrupt, draw

TASK = Task(pairs=5, keys=9, values=7, fillers=11)


@pytest.mark.parametrize("length", [22, 23, 64, 129])
def test_every_question_is_answered_once_and_nowhere_else(length):
    sequences = draw(TASK, batch=20, length=length, generator=torch.Generator().manual_seed(1))
    first_value = FIRST_FREE + TASK.keys
    for row in range(20):
        ids, labels = sequences.ids[row].tolist(), sequences.labels[row].tolist()
        begin = ids.index(QUESTIONS)
        assert ids[0] == BOS
        assert begin == length - 1 - 2 * TASK.pairs
        needles = {}
        for at in sequences.needles[row].tolist():
            assert 1 < at < begin
            needles[ids[at - 1]] = ids[at]
        assert len(needles) == TASK.pairs, "keys are distinct, pairs do not overlap"
        fillers = [token for token in ids[1:begin] if token >= first_value + TASK.values]
        assert len(fillers) == begin - 1 - 2 * TASK.pairs
        for at in sequences.answers[row].tolist():
            assert labels[at] == ids[at] == needles[ids[at - 1]]
        assert sum(label != IGNORED for label in labels) == TASK.pairs
    assert torch.all(sequences.distance > 0)
    assert torch.all((sequences.depth > 0) & (sequences.depth < 1))


def test_places_and_answers_are_uniform():
    sequences = draw(TASK, batch=4000, length=129, generator=torch.Generator().manual_seed(1))
    counts = torch.bincount((sequences.depth.flatten() * 4).long(), minlength=4)
    # 20,000 needles, a quarter each: 7 standard deviations of sqrt(20,000 * 3 / 16). The last needle ends before <?>.
    assert torch.all((counts - 5000).abs() < 7 * 61)
    values = sequences.ids.gather(1, sequences.answers).flatten() - FIRST_FREE - TASK.keys
    assert torch.all((torch.bincount(values, minlength=7) - 20_000 / 7).abs() < 7 * 50)


def test_corruption_changes_every_needle_and_no_question():
    sequences = draw(TASK, batch=50, length=64, generator=torch.Generator().manual_seed(1))
    changed = corrupt(sequences, TASK, generator=torch.Generator().manual_seed(2))
    differs = changed.ids != sequences.ids
    assert torch.equal(differs.nonzero()[:, 1].view(50, -1), sequences.needles.sort(dim=1).values)
    assert torch.equal(changed.labels, sequences.labels)


def test_too_short_a_sequence_is_refused():
    with pytest.raises(ValueError, match="need 22 tokens"):
        draw(TASK, batch=1, length=21, generator=torch.Generator())


def test_a_model_that_knows_the_answers_is_right_and_one_that_guesses_is_not(monkeypatch):
    size = context_use.Size(layers=1, hidden=32, heads=1, native=64, pairs=4, keys=8, values=8, asked=30)
    model = context_use.fresh_model(size, 0)
    guessed = context_use.ask(model, size, length=128, seed=0)
    assert guessed["right"][1] == 30 * 4 == sum(asked for _, asked in guessed["by_depth"])
    assert 0 < guessed["beyond"][1] < 120
    assert guessed["right"][0] < 40

    def oracle(base, sequences):
        at = sequences.answers[0] - 1
        expected = sequences.ids[0].gather(0, sequences.needles[0])
        return torch.nn.functional.one_hot(expected, size.task.vocab_size).float(), sequences.labels[0, at + 1]

    monkeypatch.setattr(context_use, "answers", oracle)
    assert context_use.ask(model, size, length=128, seed=0)["right"] == [120, 120]
    assert context_use.ask(model, size, length=128, seed=0, corrupted=True)["right"] == [0, 120]


@pytest.mark.parametrize("arm", [arm for arm in context_use.ARMS if arm.trained], ids=lambda arm: arm.name)
def test_every_arm_trains_and_leaves_the_base_alone(arm):
    size = context_use.Size(layers=1, hidden=64, heads=2, native=32, pairs=3, keys=8, values=8, batch=4, arm_steps=4)
    base = context_use.fresh_model(size, 0)
    model, losses = context_use.extended(base, size, arm, 0)
    assert len(losses) == 4
    assert all(torch.isfinite(torch.tensor(losses)))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_" in name for name in trained)
    assert any("embed_tokens" in name for name in trained) == arm.whole
