"""The demo's shortest form, end to end on the real model: every stage runs, learns, saves, and is reported."""

import json
from pathlib import Path

import pytest
import torch

from longfit.demo import Stage, demo_model, run_demo
from longfit.errors import ConfigError, ModelError, RunError
from longfit.evaluation.demo_report import table
from longfit.model.load import auto_dtype
from longfit.training.prepare import open_run


@pytest.fixture
def _installed() -> None:
    try:
        demo_model()
    except ModelError as error:
        pytest.skip(str(error))


@pytest.mark.model
@pytest.mark.usefixtures("_installed")
def test_the_demo_end_to_end(tmp_path: Path) -> None:
    run_dir = tmp_path / "demo"
    result = run_demo(run_dir=run_dir, context=256, steps=4)
    base, extended, trained = result.stages
    assert base.perplexity == extended.perplexity  # 256 tokens are inside the native context: nothing to extend
    assert trained.perplexity != base.perplexity
    assert result.pass_losses[1] < result.pass_losses[0]  # the second pass over the same two windows
    # 106 of 135 million parameters in 4.127 bits, embeddings and norms in the dtype this processor computes in.
    element = auto_dtype(torch.device("cpu"))[0].itemsize
    linear = 30 * 576 * (576 * 2 + 192 * 2 + 1536 * 3)
    expected = linear * 4.127 / 8 + (result.half_bytes // 2 - linear) * element
    assert result.quantized_bytes == pytest.approx(expected, rel=1e-3)
    page = (run_dir / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")  # self-contained: only names of XML vocabularies
    assert (run_dir / "perplexity.png").stat().st_size > 10_000
    stored = json.loads((run_dir / "demo.json").read_text())
    assert len(table(stored)) == 1 + len(base.by_position) + 1
    model, _, config = open_run(run_dir, device=torch.device("cpu"))
    assert config.context.attention == "shifted"
    assert model(input_ids=torch.arange(16)[None]).logits.isfinite().all()
    with pytest.raises(RunError, match="exists"):
        run_demo(run_dir=run_dir, context=256)


@pytest.mark.model
@pytest.mark.usefixtures("_installed")
def test_a_context_longer_than_the_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose at most that"):
        run_demo(run_dir=tmp_path / "demo", context=1_000_000)
    assert not (tmp_path / "demo").exists()


@pytest.mark.model
@pytest.mark.usefixtures("_installed")
def test_the_extended_stage_is_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage is measured on a model in the state that its name says."""
    seen = {}

    def look(name, model, token_ids, *, context):
        seen[name] = (model.config.rope_parameters["rope_type"], model.config.max_position_embeddings)
        if len(seen) == 2:
            raise InterruptedError
        return Stage(name, 1.0, (1.0,))

    monkeypatch.setattr("longfit.demo.measure_stage", look)
    with pytest.raises(InterruptedError):
        run_demo(run_dir=tmp_path / "demo", context=10_240)
    assert list(seen.values()) == [("default", 8192), ("yarn", 10_240)]
