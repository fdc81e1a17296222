"""The data-type table against rounding by hand, and a model that is left as it was."""

import math

import pytest
import torch
from tests.tiny_models import VOCABULARY, tiny_model

from longfit.attention.hf_attention import attention_key
from longfit.errors import ConfigError, ModelError
from longfit.evaluation.perplexity import perplexity
from longfit.evaluation.quant_error import DataType, data_types, quant_error, quantized_weights, round_to
from longfit.layers.linear4bit import Linear4bit
from longfit.model.adapters import add_adapters
from longfit.numerics.codebooks import codebook


def by_hand(weight: torch.Tensor, data_type: DataType) -> torch.Tensor:
    """Every block alone, every value against every level, in a plain loop."""
    rounded = []
    for block in weight.flatten().float().split(data_type.block_size):
        absmax = block.abs().max()
        if data_type.name == "int8":
            rounded.append((block / absmax * 127).round() * absmax / 127)
            continue
        levels = codebook(data_type.name)
        nearest = (block[:, None] / absmax - levels).abs().argmin(1)
        rounded.append(levels[nearest] * absmax)
    return torch.cat(rounded).view(weight.shape)


@pytest.mark.parametrize("name", ["int8", "int4", "fp4", "nf4"])
@pytest.mark.parametrize("shape", [(3, 43), (5, 64)])  # 129 values: the last block holds one
def test_rounding_is_that_of_a_plain_loop(name: str, shape: tuple[int, int]) -> None:
    weight, data_type = torch.randn(shape), DataType(name, 32)
    rounded, num_bytes = round_to(weight, data_type)
    # the order of two fp32 operations differs: a few units in the last place of values up to 4
    torch.testing.assert_close(rounded, by_hand(weight, data_type), rtol=0, atol=4e-6)
    blocks = math.ceil(weight.numel() / 32)
    codes = weight.numel() if name == "int8" else math.ceil(weight.numel() / 2)
    assert num_bytes == codes + 4 * blocks


def test_bits_count_everything_that_is_stored() -> None:
    weight = torch.randn(256, 64)  # 16,384 weights: one nested constant, where the paper counts 4.127 bits
    bits = {data_type: 8 * round_to(weight, data_type)[1] / weight.numel() for data_type in data_types()}
    assert bits[DataType("nf4")] == 4.5
    assert bits[DataType("nf4", double_quant=True)] == 4 + 8 / 64 + 32 / 16384 + 32 / 16384  # and the offset
    assert bits[DataType("int8")] == 8.5
    assert bits[DataType("quantile")] == 4.5 + 16 * 32 / 16384
    assert bits[DataType("int8_rows")] == 8 + 32 / 64
    assert bits[DataType("mxfp4")] == 4.25
    assert bits[DataType("nvfp4")] == 4.5 + 32 / 16384
    assert len(bits) == 5 * 2 + 3


def test_the_order_of_errors_on_normal_weights() -> None:
    weight = torch.randn(512, 512)
    error = {str(kind): float((round_to(weight, kind)[0] - weight).square().mean()) for kind in data_types()}
    assert error["INT8, blocks of 64"] < error["NF4, blocks of 64"] < error["FP4, blocks of 64"]
    assert error["NF4, blocks of 64"] < error["INT4, blocks of 64"]
    assert error["INT8, one constant a row"] < error["NF4, blocks of 64"] < error["NVFP4"] < error["MXFP4"]
    double = error["NF4, blocks of 64, double quantisation"]
    assert error["NF4, blocks of 64"] < double < 1.01 * error["NF4, blocks of 64"]  # it costs next to nothing


def text(num_tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (num_tokens,))


def test_rows_are_those_of_a_model_with_rounded_weights() -> None:
    model = tiny_model("llama", dtype=torch.float32, attn_implementation=attention_key())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids, kinds, calls = text(60), [DataType("nf4", 32), DataType("int8", 64, True)], []
    rows = quant_error(model, ids, types=kinds, window=30, on_progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert [row.data_type for row in rows] == [None, *kinds]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    assert rows[0].perplexity == perplexity(model, ids, window=30, stride=30).perplexity
    assert (rows[0].bits_per_param, rows[0].relative_error) == (32, 0)
    squares = errors = numel = absolute = 0.0
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            rounded = by_hand(parameter.detach(), kinds[0])
            squares += float(parameter.detach().double().square().sum())
            errors += float((rounded.double() - parameter.detach().double()).square().sum())
            absolute += float((rounded - parameter.detach()).abs().sum())
            numel += parameter.numel()
            parameter.data.copy_(rounded)
    # sums of some 4e4 squares in float64 from values that agree to 4e-6
    assert rows[1].relative_error == pytest.approx(math.sqrt(errors / squares), rel=1e-4)
    assert rows[1].mean_abs_error == pytest.approx(absolute / numel, rel=1e-4)
    assert rows[1].bits_per_param == 5.0  # 32 / 32 for the constants
    # an ulp in a weight moves the loss by about 1e-6
    assert rows[1].nll == pytest.approx(perplexity(model, ids, window=30, stride=30).nll, abs=1e-5)


def test_adapters_and_the_output_head_are_not_rounded() -> None:
    model = add_adapters(tiny_model("qwen2", dtype=torch.bfloat16), rank=2, alpha=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with quantized_weights(model, DataType("int4")) as cost:
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith("proj.base_layer.weight")}
    assert cost.numel == sum(before[name].numel() for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_come_back_when_the_measurement_fails() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), quantized_weights(model, DataType("int4")):
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_errors() -> None:
    with pytest.raises(ConfigError, match="allowed are int8, int8_rows, int4, fp4, mxfp4, nvfp4"):
        DataType("nf5")
    with pytest.raises(ConfigError, match="block_size: got 0"):
        DataType("nf4", 0)
    with pytest.raises(ConfigError, match="mxfp4: its scales are part of it"):
        DataType("mxfp4", double_quant=True)
    model = tiny_model("llama", dtype=torch.float32)
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Linear4bit.from_linear(mlp.up_proj)
    with pytest.raises(ModelError, match="load it with quant='none'"):
        quant_error(model)


def test_a_low_rank_part_repairs_the_error_and_is_not_counted() -> None:
    weight = torch.randn(96, 128)
    plain, repaired = data_types(names=["nf4"], low_rank=8)[0:2]
    rounded, nbytes = round_to(weight, plain)
    left = torch.linalg.svdvals(weight - rounded)[8:].square().sum().sqrt()
    found, same = round_to(weight, repaired)
    assert same == nbytes
    assert str(repaired) == "NF4, blocks of 64, and rank 8 of the error"
    assert 0.999 * left <= (weight - found).norm() <= 1.01 * left  # subspace iteration misses at most 1 %
    assert round_to(weight, data_types(names=["mxfp4"], low_rank=8)[1])[0].shape == weight.shape
