"""A mixture whose files hold each expert by itself is merged, adapters on experts included, for plain transformers."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.evaluation.finished_run import prose
from tests.families.tiny_family import tiny_family
from tests.model_folders import byte_tokenizer
from tests.moe_models import save_mixture
from torch import nn
from transformers import AutoModelForCausalLM

from longfit.config import RunConfig
from longfit.exporting.merge import merge
from longfit.model.adapters import add_adapters
from longfit.model.load import load
from longfit.model.save import save_adapter
from longfit.training.loop import train

IDS = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(2))


def with_adapter(base: Path, folder: Path, **options) -> Path:
    """An adapter of random values on every layer of a base, experts included."""
    model, tokenizer = load(base, dtype=torch.float32)
    torch.manual_seed(1)
    adapted = add_adapters(model, rank=2, alpha=4, **options)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    save_adapter(adapted, tokenizer, folder)
    return folder


def plain_peft(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(adapter)).eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_merged_experts_are_what_plain_peft_computes(family: str, tmp_path: Path) -> None:
    """Stacked both ways round, with a gate and without; the files have the tensors that the base's files have."""
    base = save_mixture(tmp_path / "base", family)
    adapter = with_adapter(base, tmp_path / "adapter", experts=True)
    merge(adapter, tmp_path / "merged", onto="16bit", dtype="float32", measure=False)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "merged"))
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    changed = [name for name in before if "expert" in name and not torch.equal(before[name], after[name])]
    assert changed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(input_ids=IDS, use_cache=False).logits
    expected = plain_peft(base, adapter)
    # float32, sums of at most 96 terms in another order, through 20 of them one after the other; u = 2^-24
    assert (found - expected).abs().max() <= 96 * 20 * 2.0**-24 * expected.abs().max()


def test_onto_4bit_every_expert_passes_through_its_bits(tmp_path: Path) -> None:
    base = save_mixture(tmp_path / "base", "qwen3_moe")
    (tmp_path / "book.txt").write_text(prose(1500))
    settings = {
        "model.name": str(base),
        "model.dtype": "float32",
        "data.path": str(tmp_path / "book.txt"),
        "context.context": 64,
        "adapter.rank": 2,
        "adapter.experts": True,
        "train.steps": 3,
        "train.learning_rate": 0.02,
        "output.run_dir": str(tmp_path / "run"),
    }
    assert train(RunConfig.of(settings)).finished
    result = merge(tmp_path / "run", tmp_path / "merged", tokens=256)
    rows = {row.name: row for row in result.drift}
    assert result.onto == "4bit"
    assert rows["merged onto 4bit"].kl < 1e-6 < rows["merged onto 16bit"].kl
    assert rows["the 4-bit base without the adapter"].kl > rows["merged onto 16bit"].kl / 100  # it was trained


@pytest.mark.parametrize("kind", ["sarvam_moe", "hrm_text"])
def test_files_that_fuse_layers_are_written_so_again(kind: str, tmp_path: Path) -> None:
    family = tiny_family(kind, vocab_size=258)
    family.model.float().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    adapter = with_adapter(tmp_path / "base", tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", onto="16bit", dtype="float32", measure=False)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "merged"))
    assert after.keys() == before.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(input_ids=IDS, use_cache=False).logits
    expected = plain_peft(tmp_path / "base", adapter)
    assert (found - expected).abs().max() <= 96 * 20 * 2.0**-24 * expected.abs().max()
