"""The documented way into the lm-evaluation-harness: the lines of the page run, and hand over the right model.

The harness itself is used where it is installed; else stand-ins ask of the model what the harness asks: its device, its
logits without a cache, and ``generate`` with one.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from tests.evaluation.finished_run import CONTEXT, prose
from tests.model_folders import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

PAGE = Path(__file__).parent.parent.parent / "docs" / "how-to" / "lm-evaluation-harness.md"


def code() -> str:
    """The Python lines of the page."""
    (lines,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return lines


class StandIn:
    """What ``HFLM`` keeps of its arguments, and the three calls that it makes."""

    def __init__(self, *, pretrained, tokenizer, max_length: int, batch_size: int) -> None:
        self.model, self.tokenizer, self.max_length = pretrained, tokenizer, max_length
        assert batch_size == 1
        assert isinstance(pretrained.device, torch.device)
        assert pretrained.config.max_position_embeddings == max_length

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids.to(self.model.device)).logits

    def continuation(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.generate(input_ids=ids, max_new_tokens=5, use_cache=True, do_sample=False, pad_token_id=0)


@pytest.fixture
def handed_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Run the page's lines on a finished run; returns what ``simple_evaluate`` was given."""
    given: dict = {}
    package, models, huggingface = (ModuleType(f"lm_eval{rest}") for rest in ("", ".models", ".models.huggingface"))
    package.simple_evaluate = lambda **arguments: given.update(arguments) or {"results": {}}
    huggingface.HFLM = StandIn
    for module in (package, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code().replace('"runs/x"', repr(str(run))), str(PAGE), "exec"), {})
    return given


def test_the_page_hands_over_the_tuned_model(run: Path, handed_over: dict) -> None:
    lm = handed_over["model"]
    assert lm.max_length == CONTEXT
    assert handed_over["metadata"]["max_seq_lengths"]
    ids = torch.tensor([byte_tokenizer()(prose(300, start=3)).input_ids])
    assert lm.tokenizer(prose(300, start=3)).input_ids == ids[0].tolist()
    config = AutoConfig.from_pretrained(run / "adapter")
    base = AutoModelForCausalLM.from_pretrained(run.parent / "model", config=config, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
    # float32 logits of size 1 to 10, attention in another order
    torch.testing.assert_close(lm.logits(ids), expected, rtol=0, atol=2e-4)
    greedy = plain.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(lm.continuation(ids), greedy)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_the_harness_measures_it(run: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from longfit.training.prepare import open_run

    (tmp_path / "data.jsonl").write_text('{"text": "The road went to", "choices": [" town", " sea"], "label": 0}\n' * 2)
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{label}}'\n"
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]\n"
    )
    model, tokenizer, config = open_run(run, device=torch.device("cpu"))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=config.context.context, batch_size=1)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(model=lm, tasks=["toy"], task_manager=tasks)
    assert found["results"]["toy"]["acc,none"] in (0.0, 1.0)
