"""The ladder: climbed as far as needed, cheapest first, and the longest context that fits."""

import pytest
from tests.planning.configs import config

from longfit.config import load_config
from longfit.errors import ConfigError, ContextError
from longfit.planning.ladder import KEYS, LEVERS, climb, excess, longest_context, step_down
from longfit.planning.memory import memory_plan
from longfit.planning.plan import ladder_lines, plan
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import ModelShape

GIB = 2**30
LLAMA = ModelShape.of(config("Llama-3.1-8B"))


def test_a_run_that_fits_needs_no_ladder() -> None:
    found = plan(config("Llama-3.1-8B"), context=4096, vram=24 * GIB, ram=32 * GIB, rank=32)
    assert found.fits
    assert found.suggestions == ()
    assert ladder_lines(found) == []


@pytest.mark.parametrize("vram", [8, 12, 16, 24])
def test_a_ladder_makes_a_long_run_fit_and_is_no_longer_than_needed(vram: int) -> None:
    found = plan(config("Llama-3.1-8B"), context=102_400, vram=vram * GIB, ram=64 * GIB, rank=32)
    assert not found.fits
    assert [suggestion.fits for suggestion in found.suggestions] == [False] * (len(found.suggestions) - 1) + [True]
    names = [lever.name for lever in LEVERS]
    order = [names.index(suggestion.name) for suggestion in found.suggestions]
    assert order == sorted(order)
    settings = found.settings
    for suggestion in found.suggestions:
        before = memory_plan(LLAMA, settings)
        settings = settings.changed(suggestion.changes)
        after = memory_plan(LLAMA, settings)
        for place, freed in suggestion.frees.items():
            assert before.peak(place) - after.peak(place) == freed
    assert not excess(memory_plan(LLAMA, settings), {"accelerator": vram * GIB, "host": 64 * GIB})


def test_what_is_pasted_is_accepted_by_a_run() -> None:
    found = plan(
        config("Llama-3.1-8B"), context=200_000, vram=6 * GIB, ram=16 * GIB, disk=10**13, train_embeddings=True
    )
    assert len(found.suggestions) >= 4
    words = [word for suggestion in found.suggestions for word in suggestion.paste.split()]
    read = load_config(overrides=["model.name=m", "data.path=d", *words])
    for suggestion in found.suggestions:
        for name, value in suggestion.changes.items():
            if (name, value) != ("file", False):
                assert KEYS[name] in read.given()
    assert all(word in "\n".join(ladder_lines(found)) for word in words)


def test_where_nothing_helps_the_longest_context_is_named() -> None:
    found = plan(config("Llama-3.1-8B"), context=4_000_000, vram=8 * GIB, ram=32 * GIB, disk=100 * GIB)
    assert found.context_that_fits is not None
    assert 1024 <= found.context_that_fits < 4_000_000
    nothing = plan(config("Llama-3.1-70B"), context=8192, vram=1 * GIB, ram=2 * GIB, disk=1 * GIB)
    assert nothing.context_that_fits == 0
    assert "larger machine" in ladder_lines(nothing)[-1]


def test_what_is_given_is_left_alone() -> None:
    limits = {"accelerator": 8 * GIB, "host": 256 * GIB}
    suggestions, _ = climb(LLAMA, PlanSettings(102_400), limits, fixed=frozenset({"offload", "tile"}))
    assert suggestions
    assert not any({"offload", "tile"} & suggestion.changes.keys() for suggestion in suggestions)
    silent, _ = climb(LLAMA, PlanSettings(102_400), limits, silent=True)
    assert {name for suggestion in silent for name in suggestion.changes} <= {
        "offload",
        "tile",
        "saved_attention",
        "batch_size",
    }
    assert all(suggestion.exact for suggestion in silent)


def test_after_running_out_of_memory_there_is_one_step_down() -> None:
    suggestion = step_down(LLAMA, PlanSettings(65_536), "accelerator")
    assert suggestion is not None
    assert suggestion.changes == {"offload": "ram"}
    on_cpu = step_down(ModelShape.of(config("SmolLM2-135M")), PlanSettings(16_384, device="cpu"), "host")
    assert on_cpu is not None
    assert on_cpu.frees["host"] > 0
    smallest = PlanSettings(256, device="cpu", tile=128, saved_attention=0)
    assert step_down(ModelShape.of(config("SmolLM2-135M")), smallest, "host") is None


@pytest.mark.parametrize("vram", [12, 24, 80])
def test_the_longest_context_fits_and_the_next_does_not(vram: int) -> None:
    settings, limits = PlanSettings(1024, offload="ram", rank=32), {"accelerator": vram * GIB, "host": 512 * GIB}
    longest = longest_context(LLAMA, settings, limits)
    assert longest % 1024 == 0
    assert not excess(memory_plan(LLAMA, settings.changed({"context": longest})), limits)
    assert excess(memory_plan(LLAMA, settings.changed({"context": longest + 1024})), limits)
    assert longest_context(LLAMA, settings, {"accelerator": GIB}) == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"context": 0}, "context 0"),
        ({"context": 4096, "rank": -1}, "rank -1"),
        ({"context": 4096, "tile": 0}, "tile 0"),
        ({"context": 4096, "saved_attention": -1}, "saved_attention"),
        ({"context": 4096, "saved_products": -1}, "saved_products"),
        ({"context": 4096, "optim": "sgd"}, "adamw8bit"),
        ({"context": 4096, "offload": "disk"}, "device, ram, pinned, file"),
        ({"context": 4096, "wheels": 4}, "no such setting"),
        ({"context": 4096, "vram": -5}, "vram -5"),
        ({"context": 4096, "device": "cpu", "offload": "pinned"}, "for accelerators"),
        ({"context": 4096, "device": "cpu", "stream": "ram"}, "already"),
        ({"context": 4096, "engine": "plain"}, "only swept"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        plan(config("Llama-2-7B"), **settings)  # type: ignore[arg-type]


def test_groups_are_checked() -> None:
    with pytest.raises(ContextError, match="even"):
        PlanSettings(4096, attention="shifted", group_size=3)
    with pytest.raises(ContextError, match="no groups"):
        PlanSettings(4096, group_size=512)
