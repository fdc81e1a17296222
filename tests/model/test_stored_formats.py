"""Settings of formats: each is followed or refused by name."""

from typing import Any

import pytest
from tests.stored_folders import FORMATS

from longfit.errors import ModelError
from longfit.model.stored_formats import stored_format


@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_format_is_known(kind: str) -> None:
    assert stored_format("model", FORMATS[kind][1]).words


GROUP = FORMATS["compressed-tensors"][1]["config_groups"]["group_0"]


def of_group(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": GROUP | {"weights": GROUP["weights"] | weights}}}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8", {"fmt": "e5m2"}, "fmt='e5m2': longfit reads e4m3"),
        ("fp8", {"weight_block_size": [128]}, r"weight_block_size=\[128\]: must be two numbers"),
        ("gptq", {"bits": 5}, "bits=5: longfit reads 2, 3, 4, 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "format 'marlin': longfit reads gptq and gptq_v2"),
        ("gptq", {"is_marlin_format": True}, "format 'gptq'"),
        ("gptq", {"dynamic": {".*": {"bits": 8}}}, "layers of different settings"),
        ("gptq", {"group_size": 0}, "group_size=0"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype='int16'"),
        ("awq", {"bits": 8}, "bits=8: longfit reads 4"),
        ("awq", {"version": "gemv"}, "version='gemv': longfit reads gemm"),
        ("awq", {"backend": "llm-awq"}, "backend='llm-awq'"),
        ("compressed-tensors", {"format": "marlin-24"}, "format 'marlin-24'"),
        ("compressed-tensors", {"quantization_status": "frozen"}, "quantization_status='frozen'"),
        ("compressed-tensors", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ("compressed-tensors", {"transform_config": {"config_groups": {"u": {}}}}, "weights that are rotated"),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ("compressed-tensors", {"config_groups": {}}, "no config_groups"),
        ("compressed-tensors", of_group(num_bits=3), "num_bits=3"),
        ("compressed-tensors", of_group(strategy="tensor"), "strategy='tensor'"),
        (
            "compressed-tensors",
            {"config_groups": {"a": GROUP, "b": of_group(num_bits=8)["config_groups"]["group_0"]}},
            "layers of different settings",
        ),
    ],
)
def test_a_setting_that_would_make_another_model_is_refused(kind: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        stored_format("model", FORMATS[kind][1] | change)


@pytest.mark.parametrize("method", ["hqq", "aqlm", "bitnet", "fbgemm_fp8", None])
def test_other_formats_are_refused_by_name(method: str | None) -> None:
    with pytest.raises(ModelError, match=rf"model: quantised with {method!r}; longfit reads dense checkpoints, .*gptq"):
        stored_format("model", {"quant_method": method})
