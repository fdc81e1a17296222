"""What several devices change in a plan: parts of weights and tokens, halos, bytes sent."""

from pathlib import Path

import pytest

from longfit.errors import ConfigError
from longfit.parallel import traffic
from longfit.planning.devices import sent_bytes
from longfit.planning.ladder import climb, longest_context
from longfit.planning.memory import MemoryPlan, memory_plan
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import ModelShape, read_shape

LLAMA_33B = {
    "model_type": "llama", "hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60,
    "num_attention_heads": 52, "num_key_value_heads": 52, "vocab_size": 32000, "max_position_embeddings": 2048,
}  # fmt: skip


ROOT = Path(__file__).parents[2]
LLAMA_70B = ROOT / "tests" / "data" / "configs" / "Llama-3.1-70B.json"


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return read_shape(LLAMA_33B)


def component(plan: MemoryPlan, name: str, phase: str) -> int:
    return sum(c.by_phase.get(phase, 0) for c in plan.components if c.name == name)


def test_two_devices_load_and_hold_half_of_the_layers_each_and_load_all_that_is_dense(shape: ModelShape) -> None:
    alone = memory_plan(shape, PlanSettings(context=8192, processes=2))
    shared = memory_plan(shape, PlanSettings(context=8192, processes=2, shard=2))
    for name in ("4-bit layers", "adapters", "optimiser state"):
        whole, part = component(alone, name, "forward"), component(shared, name, "forward")
        assert whole / 2 <= part <= whole / 2 + 1
    assert component(shared, "4-bit layers", "load") == component(shared, "4-bit layers", "forward")
    dense = "embedding and output matrix"
    assert component(shared, dense, "load") == component(alone, dense, "load")
    assert component(shared, "gradient buckets of all replicas", "forward") == 0
    layer = component(alone, "4-bit layers", "forward") / shape.num_layers
    assert component(shared, "gathered weights", "forward") > 2 * layer


def test_two_devices_that_share_a_window_wait_with_half_of_the_layer_inputs(shape: ModelShape) -> None:
    settings = PlanSettings(context=65_536, processes=2, attention="shifted", group_size=8192)
    alone, shared = memory_plan(shape, settings), memory_plan(shape, settings.changed({"sequence": 2}))
    for name in ("layer inputs", "hidden states and their gradient"):
        assert component(shared, name, "forward") * 2 == component(alone, name, "forward")
    halo = component(shared, "keys of other devices and their gradients", "forward")
    assert halo == 2 * 8192 * 2 * shape.kv_width * 2  # arrived and in the window, at most a group
    exact = memory_plan(shape, settings.changed({"sequence": 2, "attention": "exact", "group_size": None}))
    tokens = 65_536 // 2 + 65_536 // 4  # those of the other device, and the own first stretch before the second
    keys = tokens * 2 * shape.kv_width
    assert component(exact, "keys of other devices and their gradients", "forward") == 2 * 2 * keys
    assert component(exact, "keys of other devices and their gradients", "backward") == (2 + 4) * keys


def test_bytes_sent_are_those_of_the_formulas(shape: ModelShape) -> None:
    settings = PlanSettings(context=65_536, processes=2, attention="shifted", group_size=8192)
    replicas = sent_bytes(shape, settings)
    assert sent_bytes(shape, settings.changed({"processes": 1})) == 0
    halo = sent_bytes(shape, settings.changed({"sequence": 2})) - replicas
    formula = traffic.shifted_bytes(num_layers=60, num_kv_heads=52, head_dim=128, group_size=8192, element_bytes=2)
    assert halo == formula
    longer = settings.changed({"sequence": 2, "context": 131_072})
    assert sent_bytes(shape, longer) - replicas == formula  # whatever the context
    assert sent_bytes(shape, settings.changed({"shard": 2})) > 2 * 16e9 / 2


def test_the_ladder_shares_weights_before_it_shares_a_window(shape: ModelShape) -> None:
    limits = {"accelerator": 24 << 30, "host": 64 << 30}
    settings = PlanSettings(context=49_152, processes=2)
    suggestions, changed = climb(shape, settings, limits)
    assert [s.changes.get("shard") or s.changes.get("sequence") for s in suggestions][-1] == 2
    assert suggestions[-1].fits
    assert (changed.shard, changed.sequence) == (2, 1)
    assert "parallel.shard=2" in suggestions[-1].paste
    suggestions, changed = climb(shape, settings.changed({"context": 90_000}), limits)
    assert suggestions[-1].fits
    assert (changed.shard, changed.sequence, changed.gradient_accumulation) == (2, 2, 2)
    assert climb(shape, settings, limits, silent=True)[1].shard == 1  # a run does not choose this by itself


def test_what_does_not_divide_or_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="shard 3: must divide the number of devices, 2"):
        PlanSettings(context=1024, processes=2, shard=3)
    with pytest.raises(ConfigError, match="shards are gathered, not streamed"):
        PlanSettings(context=1024, processes=2, shard=2, stream="ram")


def planned(card: str, ways: str, attention: str) -> tuple[int, float, float, float]:
    """The longest context on two cards with layer inputs in 128 GiB, and GiB on a card, in the host, sent."""
    model, vram = {"33B, 24 GiB each": (LLAMA_33B, 24), "70B, 48 GiB each": (LLAMA_70B, 48)}[card]
    shape, limits = read_shape(model), {"accelerator": vram << 30, "host": (128 << 30) // 2}
    chosen = {"sequence": 2 if "sequence 2" in ways else 1, "shard": 2 if "shard 2" in ways else 1}
    settings = PlanSettings(context=1024, processes=2, attention=attention, offload="ram", **chosen)
    longest = longest_context(shape, settings, limits)
    settings = settings.changed({"context": longest})
    memory = memory_plan(shape, settings)
    sizes = memory.peak("accelerator"), 2 * memory.peak("host"), sent_bytes(shape, settings)
    return longest, *(size / (1 << 30) for size in sizes)


def cells_of(path: str, begin: str) -> list[list[str]]:
    """The cells of the rows of a page's tables that begin so."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(begin)]


def is_printed(text: str, value: float) -> bool:
    """Whether a number of three figures is the value, rounded."""
    shown = text.removesuffix(" GiB")
    places = len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.5 * 10**-places + 1e-9


def test_what_the_readme_says_waits_in_the_host_of_two_cards_is_planned() -> None:
    """Its other columns are what the command prints: ``tests/cli/test_plan.py``."""
    rows = cells_of("README.md", "| 33B, ") + cells_of("README.md", "| 70B, ")
    assert len(rows) == 6
    for card, ways, context, _, in_host, _ in rows:
        longest, attention = context.split(", ")
        found, _, host, _ = planned(card, ways, attention)
        assert longest == f"{found:,}"
        assert is_printed(in_host, host)


def test_what_the_page_of_many_devices_says_of_two_cards_is_what_is_planned() -> None:
    ways = [("shard 1", "exact"), ("shard 2", "exact"), *(("shard 2, sequence 2", a) for a in ("exact", "shifted"))]
    models = {"| Llama-33B": "33B, 24 GiB each", "| Llama-70B": "70B, 48 GiB each"}
    page = "docs/explanation/many-devices.md"
    on_each, sent = cells_of(page, "| on each card, GiB"), cells_of(page, "| sent a step by each, GiB")
    for number, (begin, card) in enumerate(models.items()):
        (contexts,) = cells_of(page, begin)
        for column, (way, attention) in enumerate(ways, start=1):
            longest, on_card, _, sent_by_each = planned(card, way, attention)
            assert contexts[column] == f"{longest:,}"
            assert is_printed(on_each[number][column], on_card)
            assert is_printed(sent[number][column], sent_by_each)
