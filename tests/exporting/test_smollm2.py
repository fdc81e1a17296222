"""SmolLM2 trained a few steps and handed on: llama.cpp, longfit and the merged model in memory all say the same."""

import copy
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluation.finished_run import prose
from tests.exporting.llama_cpp import LlamaCpp, assert_as_rounded, distance, library, rounding_bound

from longfit.config import RunConfig
from longfit.evaluation.drift import Reference, read_reference
from longfit.exporting.base_weights import BaseWeights
from longfit.exporting.export import GgufExport, export
from longfit.exporting.merge_plan import MergePlan
from longfit.exporting.proof import expected_model, prove
from longfit.exporting.trained import Trained, open_trained
from longfit.model.load import load
from longfit.training.loop import train
from longfit.training.metrics import ignore

pytestmark = pytest.mark.model
CPU, RANK, NUM_LAYERS = torch.device("cpu"), 8, 30
TEXTS = (
    "The year 1984 was hot, said Zoë; def f(x):\n    return x ** 2  # 3.14159\n\n\tnaïve… 日本語 don't we'll",
    "<|im_start|>user\nWho slept in the town?<|im_end|>\n<|im_start|>assistant\n",
    "  two spaces\r\nand a road that went over hills",
)


@dataclass(frozen=True)
class Smol:
    """The run, what it is made of, and its ids to read; ``merged`` is in float32, merged by PEFT and not rounded."""

    trained: Trained
    tokenizer: Any
    plan: MergePlan
    ids: torch.Tensor
    before: Reference
    merged: Any


class ReadOnce:
    """A base that is de-quantised once for all types: each file is written from it, and compared with it."""

    def __init__(self, inner: BaseWeights) -> None:
        self.inner, self.read = inner, functools.cache(inner.read)

    def names(self) -> list[str]:
        return self.inner.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(name)


@pytest.fixture(scope="module")
def smol(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Smol:
    library()  # skips before any work where llama.cpp is missing
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "book.txt").write_text(prose(2000))
    config = RunConfig.of(
        {
            "model.name": str(demo_gguf),
            "model.device": "cpu",
            "data.path": str(folder / "book.txt"),
            "context.context": 64,
            "adapter.rank": RANK,
            "train.steps": 4,
            "train.learning_rate": 5e-3,
            "train.warmup_steps": 0,
            "output.run_dir": str(folder / "run"),
        }
    )
    trained = open_trained(train(config).run_dir)
    tokenizer = trained.tokenizer()
    ids = torch.tensor(tokenizer(TEXTS[0] + TEXTS[1]).input_ids)
    model, _ = trained.load(CPU, dtype=torch.float32)
    before = read_reference(model, [ids])
    with model.disable_adapter():
        base = logits_of(model, ids)
    # The largest of the bounds below: a file that lost the adapter would not be within it.
    assert distance(base, logits_of(model, ids)) > rounding_bound("Q8_0", NUM_LAYERS)
    del model
    merged = expected_model(trained, "4bit", lambda name, weight: weight, untied=False, device=CPU, dtype=torch.float32)
    plan = MergePlan.of(trained, dtype=torch.float32)
    plan = replace(plan, base=ReadOnce(plan.base))
    return Smol(trained, tokenizer, plan, ids, before, merged)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].float()


@pytest.mark.parametrize("file_type", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_llama_cpp_has_the_trained_model(file_type: str, smol: Smol, tmp_path: Path) -> None:
    """The same tokens, and the logits of the merged model whose weights are rounded as the type rounds them."""
    made = GgufExport(smol.plan, "4bit", tmp_path, file_type, ollama=False)
    path = made.write(tmp_path, ignore)
    expected = copy.deepcopy(smol.merged)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(made.rounding(name, parameter))
    theirs = LlamaCpp(path, context=len(smol.ids))
    for text in TEXTS:
        assert theirs.tokenize(text) == smol.tokenizer(text).input_ids
    assert_as_rounded(theirs.logits(smol.ids.tolist()), logits_of(expected, smol.ids), file_type, NUM_LAYERS)
    theirs.close()
    read_back, _ = load(path, quant="none", dtype=torch.float32)
    references = (read_reference(model, [smol.ids]) for model in (read_back, expected))
    proof = prove(*references, smol.before, num_layers=NUM_LAYERS, rank=RANK, levels=made.levels)
    assert proof.kl <= proof.bound


def test_llama_cpp_has_the_adapter(demo_gguf: Path, smol: Smol, tmp_path: Path) -> None:
    """On the base's own file, whose products round the inputs to 8 bits as those of Q8_0 do."""
    made = export(smol.trained.path, tmp_path / "lora", format="gguf-lora", measure=False)
    assert any("the file's own weights" in warning for warning in made.warnings)
    model, _ = replace(smol.trained, quant="none").load(CPU, dtype=torch.float32)
    theirs = LlamaCpp(demo_gguf, lora=tmp_path / "lora" / made.files[0], context=len(smol.ids))
    assert_as_rounded(theirs.logits(smol.ids.tolist()), logits_of(model, smol.ids), "Q8_0", NUM_LAYERS)
    theirs.close()
