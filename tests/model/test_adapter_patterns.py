"""Expressions that adapters name their layers with: those of the field's tools are read, endless ones are not."""

from pathlib import Path

import pytest

from longfit.errors import ModelError
from longfit.model.adapter_patterns import require_quick_patterns

PROJECTIONS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
LAYERS = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"


@pytest.mark.parametrize(
    "pattern",
    [
        rf".*\.({PROJECTIONS})",
        rf"^(?!.*vision).*(?:{PROJECTIONS}).*$",
        rf"model\.layers\.\d+\.self_attn\.(?:{PROJECTIONS})",
        rf"(?:.*?(?:language|text).*?(?:{LAYERS}).*?(?:{PROJECTIONS}).*?)"
        rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{LAYERS})\.(?:(?:{PROJECTIONS})))",
    ],
)
def test_what_tools_write_is_read(pattern: str) -> None:
    require_quick_patterns({"target_modules": pattern}, Path("adapter"))


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(a+)+\s", "repeats a repetition"),
        (r"(?:x|y+)*z", "repeats a repetition"),
        (r"(?:a|a.*)+", "repeats a repetition"),
        (r".*a.*b.*c.*d.*e", "with 5 repetitions"),
        (r"(?:.*a.*b|c).*d.*e.*f", "with 5 repetitions"),
        (r"(unclosed", "which is not one"),
        ("x" * 10_001, "10,001 characters"),
    ],
)
def test_what_may_be_matched_for_ever_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        require_quick_patterns({"rank_pattern": {pattern: 2}}, Path("adapter"))
