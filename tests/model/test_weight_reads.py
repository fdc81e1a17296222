"""Weights that other code takes are noticed, in real families; what only multiplies is not."""

import pytest
import torch
from tests.families.tiny_family import tiny_family
from torch import nn
from transformers.pytorch_utils import Conv1D

from longfit.model.weight_reads import PLAIN, weight_reads


@pytest.mark.parametrize(
    ("kind", "last", "multiplies"),
    [
        ("mamba", "dt_proj", False),  # self.dt_proj.weight @ x
        ("deepseek_v32", "weights_proj", True),  # x.to(self.weights_proj.weight.dtype)
        ("longcat_flash", "classifier", False),  # F.linear(x, self.classifier.weight)
        ("rwkv", "value", True),  # self.value.weight.div_(2)
        ("gemma3n_text", "prediction_coefs", True),  # self.prediction_coefs.weight.data.clamp_(...), in training
    ],
)
def test_a_read_from_outside_is_noticed(kind: str, last: str, multiplies: bool) -> None:
    reads = weight_reads(tiny_family(kind).model)
    assert last in {name.rsplit(".", 1)[-1] for name in reads.read}
    assert {reads.past_adapter(name) for name in reads.read if name.endswith(last)} == {not multiplies}


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2", "mixtral", "qwen3_5_text", "falcon"])
def test_layers_that_only_multiply_are_all_seen_to(kind: str) -> None:
    model = tiny_family(kind).model
    reads = weight_reads(model)
    assert not reads.read
    assert not reads.failed
    assert reads.called == {name for name, module in model.named_modules() if isinstance(module, PLAIN)}


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_family("rwkv").model  # whose forward writes into weights in eval mode
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight_reads(model)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_asking_where_a_weight_lies_is_no_read() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), Conv1D(4, 4)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            x = torch.ones(*input_ids.shape, 4, device=self.first.weight.device)
            return self.second(self.first(x.to(self.second.weight.dtype)))

    reads = weight_reads(Asks())
    assert reads.read == {"second"}
    assert reads.called == {"first", "second"}


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_class_of_its_own_is_plain_if_it_multiplies_so(factor: float) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return factor * x @ self.weight.t() + self.bias

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(9, 6), Scaled(6, 2)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            return self.layer(self.embed(input_ids))

    assert weight_reads(Model()).plain == ({"layer"} if factor == 1 else set())
