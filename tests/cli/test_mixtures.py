"""A tiny model of each shape of mixture that people train, from the command line: plan, train, eval, merge."""

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from tests.evaluation.finished_run import prose
from tests.model_folders import byte_tokenizer
from tests.moe_models import mixture
from tests.planning.test_layer_kinds import LLAMA_4
from torch import nn

from longfit.cli.app import main

QWEN35 = {
    **{"vocab_size": 258, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "max_position_embeddings": 64},
    **{"layer_types": ["linear_attention", "full_attention"], "bos_token_id": 256, "eos_token_id": 257},
}


def llama_4() -> nn.Module:
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**LLAMA_4))


def qwen35() -> nn.Module:
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**QWEN35))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt_oss": lambda: mixture("gpt_oss"),
    "qwen3_moe": lambda: mixture("qwen3_moe"),
    "llama4": llama_4,
    "qwen3_5": qwen35,
}


@pytest.mark.parametrize("name", list(MODELS))
def test_it_goes_from_end_to_end(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    MODELS[name]().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    (tmp_path / "book.txt").write_text(prose(1500))

    def call(*words: object) -> int:
        return main([str(word) for word in words])

    assert call("plan", base, "--context", "64", "--cpu", "--ram", "64GiB") == 0
    options = ("train.steps=2", "adapter.rank=2", "model.dtype=float32")
    trained = call("train", base, tmp_path / "book.txt", "--context", "64", *options, f"output.run_dir={run}")
    assert trained == 0, capsys.readouterr()
    assert call("eval", run, "ppl", "--data", tmp_path / "book.txt", "--window", "64", "--max-tokens", "192") == 0, (
        capsys.readouterr()
    )
    capsys.readouterr()
    assert call("merge", run, "--out", tmp_path / "merged", "--onto", "4bit", "--no-measure") == 0, capsys.readouterr()
