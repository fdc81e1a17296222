"""The configuration in a model's files: bitsandbytes' own where its files can hold the data type, else longfit's."""

import pytest

from longfit.model.quantization_config import LongfitQuantizationConfig


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("skip", [None, ["lm_head"]])
def test_what_bitsandbytes_can_hold_is_written_as_its_own(quant_type: str, skip: list[str] | None) -> None:
    config = LongfitQuantizationConfig(quant_type=quant_type, skip_modules=skip, experts=False, double_quant=True)
    block = config.to_dict()
    assert block["quant_method"] == "bitsandbytes"
    again = LongfitQuantizationConfig.from_bitsandbytes(block)
    assert (again.quant_type, again.skip_modules, again.experts) == (quant_type, skip, False)
    assert again.double_quant


@pytest.mark.parametrize(
    "settings", [{"quant_type": "int4"}, {"block_size": 128}, {"int8_modules": ["a"]}, {"experts": True}]
)
def test_what_it_cannot_hold_is_written_as_longfit_s(settings: dict[str, object]) -> None:
    config = LongfitQuantizationConfig(**{"experts": False} | settings)
    block = config.to_dict()
    assert block["quant_method"] == "longfit"
    assert LongfitQuantizationConfig(**block).settings() == config.settings()
