"""What longfit takes for granted of transformers' weight conversions; else mixtures could not be merged."""

import pytest
import torch
from tests.families.tiny_family import tiny_family
from transformers import AutoModelForCausalLM

from longfit.compat.transformers_conversions import conversions, converted_back


@pytest.mark.parametrize("kind", ["qwen3_moe", "sarvam_moe", "llama"])
def test_files_become_a_model_and_files_again(kind: str) -> None:
    model = tiny_family(kind).model
    names = dict(model.state_dict())
    files = converted_back(model, names)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    made = {}
    for group in conversions(empty, list(files)):
        sources = {source: files[source] for source, _ in group.sources}
        made |= {group.first: files[group.sources[0][0]]} if group.converter is None else group.convert(empty, sources)
    assert made.keys() == names.keys()
    assert all(torch.equal(made[name], names[name]) for name in names)
    assert (files.keys() == names.keys()) == (kind == "llama")
