"""The closed form against the real thing: models on the meta device, row format, optimiser layout, engine."""

from dataclasses import replace

import pytest
import torch
from tests.planning.configs import NAMES, config
from tests.planning.meta_run import meta_model, step_peaks

from longfit.attention.visibility import build_schedule, document_starts
from longfit.engine.sweep.visible_keys import VisibleKeys
from longfit.engine.working_memory import DEVICE_LOGITS
from longfit.layers.linear8bit import Linear8bit
from longfit.numerics.adamw import BLOCK_SIZE
from longfit.numerics.row_format import RowFormat
from longfit.optim.checks import default_page_bytes
from longfit.optim.page_layout import PageLayout, format_of
from longfit.planning import constant_bytes, per_token_bytes
from longfit.planning.layer_kinds import Matrix
from longfit.planning.memory import PHASES, MemoryPlan, memory_plan
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import ModelShape

WEIGHTS = (
    *("4-bit layers", "linear layers", "embedding and output matrix", "norms and the rest", "adapters"),
    "trained copies of embeddings and norms",
)
NOT_SIMULATED = (
    *("Python and its libraries", "CUDA context and libraries", "gaps of the allocator"),  # outside of torch's tensors
    *("holes of the heap", "modules of adapters"),
    "optimiser state",  # there was no optimiser step
    "de-quantised weight",  # inside an operator
)


def planned(plan: MemoryPlan, place: str, phases: tuple[str, ...], *, weights: bool) -> int:
    parts = [c for c in plan.components if c.place == place and c.name not in NOT_SIMULATED]
    chosen = [c for c in parts if (c.name in WEIGHTS) == weights]
    return max(sum(c.by_phase.get(phase, 0) for c in chosen) for phase in phases)


def agree(name: str, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Plan two layers of a model, run them on the meta device, and compare.

    Two per cent: what the closed form leaves out are log-sum-exp sums, adapter temporaries and tensors of a few bytes
    a token. The simulation has no kernels: their temporaries are left out of the plan as well.
    """
    monkeypatch.setattr(per_token_bytes, "attention_kernel_bytes", lambda shape, settings: 0)
    monkeypatch.setitem(per_token_bytes.LOGITS, "cpu", DEVICE_LOGITS)  # as in the simulation
    shape = ModelShape.of(config(name))
    shape = replace(shape, windows=shape.windows[:2])
    settings = PlanSettings(**{"context": 8192, "rank": 32, "offload": "pinned", **changes})  # type: ignore[arg-type]
    found = step_peaks(
        config(name),
        num_tokens=settings.context,
        tile=settings.tile_tokens(shape),
        offload="device" if settings.aliases else "host",
        group_size=settings.effective_group_size,
        rank=settings.rank,
        train_embeddings=settings.train_embeddings,
        train_norms=settings.train_norms,
        targets=settings.targets,
        dropout=settings.dropout,
    )
    plan = memory_plan(shape, settings)
    place = "accelerator" if settings.device == "cuda" else "host"
    weights = planned(plan, place, ("forward",), weights=True)
    forward = planned(plan, place, ("forward", "loss"), weights=False)
    backward = planned(plan, place, ("loss", "backward", "last layer", "embedding"), weights=False)
    assert weights == pytest.approx(found.weights, rel=1e-4)
    measured = max(found.forward, found.backward)
    assert weights + max(forward, backward) == pytest.approx(found.weights + measured, rel=0.02)
    if not settings.train_embeddings:  # there the peak of the loss is counted with forward, and begins backward
        assert forward == pytest.approx(found.forward, rel=0.03)
        assert backward == pytest.approx(
            max(found.backward, forward if found.forward > found.backward else 0), rel=0.03
        )


FAMILIES = (
    "Llama-3.1-8B",
    "Mistral-7B",
    "Qwen2-7B",
    "Qwen3-8B",
    "Gemma-2-9B",
    "Gemma-3-4B",
    "Phi-3-mini",
    "SmolLM2-135M",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_on_the_meta_device_holds_what_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agree(name, monkeypatch)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama-3.1-8B", {"context": 16_384, "attention": "shifted", "group_size": 4096}),
        ("Llama-2-7B", {"train_embeddings": True, "train_norms": True}),
        ("SmolLM2-135M", {"train_embeddings": True, "train_norms": True, "offload": "device"}),
        ("Llama-3.1-8B", {"context": 1024, "rank": 8, "offload": "device"}),
        ("Qwen3-8B", {"targets": ("q_proj", "self_attn.v_proj")}),
        ("SmolLM2-135M", {"dropout": 0.1, "device": "cpu", "offload": "file", "saved_attention": 0}),
    ],
)
def test_so_it_does_with_other_settings(name: str, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    agree(name, monkeypatch, **changes)


@pytest.mark.parametrize(("out", "into"), [(96, 576), (7, 33)])
def test_packed_bytes_of_8_bits_are_those_of_the_layer(out: int, into: int) -> None:
    layer = Linear8bit.from_linear(torch.nn.Linear(into, out))
    stored = layer.weight.nbytes + layer.constants.nbytes
    assert constant_bytes.packed_bytes(Matrix(out, into), PlanSettings(1024, quant="int8")) == stored


@pytest.mark.parametrize(("out", "into"), [(4096, 14336), (96, 100), (7, 63), (1, 1), (48, 4304)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_packed_bytes_are_those_of_the_row_format(out: int, into: int, double_quant: bool) -> None:
    settings = PlanSettings(1024, double_quant=double_quant)
    form = RowFormat(out, into, double_quant=double_quant)
    stored = form.rows * form.row_bytes + form.constant_bytes
    assert constant_bytes.packed_bytes(Matrix(out, into), settings) == stored


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Qwen3-8B"])
@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
def test_optimiser_state_is_that_of_its_pages(name: str, optim: str) -> None:
    settings = PlanSettings(1024, optim=optim, rank=8, train_embeddings=True, train_norms=True)
    model = meta_model(config(name), layers=None, rank=8, train_embeddings=True, train_norms=True)
    layout = PageLayout(default_page_bytes(None))
    bits = 8 if optim == "adamw8bit" else 32
    learned = [p for p in model.parameters() if p.requires_grad]
    forms = [format_of(p, state_bits=bits, master_weights="fp32") for p in learned]
    layout.add([(number, p, form) for number, (p, form) in enumerate(zip(learned, forms, strict=True))])
    parts = constant_bytes.trained(ModelShape.of(config(name)), settings)
    assert parts.num_params == sum(p.numel() for p in learned)
    # Ends of pages stay free, and small fields fill whole cache lines: well below one per cent.
    pages = len(layout.pages) * layout.page_bytes
    assert constant_bytes.page_bytes(parts, settings) == pytest.approx(pages, rel=0.01, abs=2 * layout.page_bytes)


def test_rows_of_new_tokens_cost_a_copy_and_a_gradient_of_all_rows_but_no_state() -> None:
    """PEFT writes the rows into a copy of the table, whose gradient is as large; the optimiser sees the rows alone."""
    shape = ModelShape.of(config("SmolLM2-135M"))
    frozen, rows = PlanSettings(1024), PlanSettings(1024, train_new_tokens=True)
    parts = constant_bytes.trained(shape, rows)
    assert parts.vocabulary == shape.vocab_params
    assert constant_bytes.state_bytes(parts, rows) == constant_bytes.state_bytes(
        constant_bytes.trained(shape, frozen), frozen
    )
    assert memory_plan(shape, rows).peak("accelerator") > memory_plan(shape, frozen).peak("accelerator")


def test_the_one_constant_that_cannot_be_imported_without_torch() -> None:
    assert constant_bytes.MOMENT_BLOCK_SIZE == BLOCK_SIZE


@pytest.mark.parametrize(("tokens", "tile"), [(1000, 128), (4096, 512), (777, 100)])
@pytest.mark.parametrize("rule", [{}, {"group_size": 256}, {"group_size": 700}, {"sliding_window": 300}])
def test_windows_are_as_wide_as_the_walk_makes_them(tokens: int, tile: int, rule: dict[str, int]) -> None:
    schedule = build_schedule(4, document_starts(1, tokens), **rule)
    assert per_token_bytes.window_tokens(tokens, tile, **rule) == VisibleKeys.of(schedule, tile).capacity


@pytest.mark.parametrize("name", NAMES)
def test_more_of_anything_never_takes_less(name: str) -> None:
    shape = ModelShape.of(config(name))
    start = PlanSettings(8192, offload="ram")
    larger: list[dict[str, object]] = [
        *({"context": 16_384}, {"rank": 64}, {"batch_size": 2}, {"train_embeddings": True}, {"quant": "none"}),
        {"train_new_tokens": True},
        *({"offload": "device"}, {"gradient_accumulation": 4}, {"dtype": "float32"}),
    ]
    least = memory_plan(shape, start)
    for change in larger:
        more = memory_plan(shape, start.changed(change))
        for phase in ("forward", "loss", "backward", "last layer", "step"):
            assert more.bytes_in("accelerator", phase) >= least.bytes_in("accelerator", phase), (change, phase)


def test_places_hold_what_is_sent_there() -> None:
    shape = ModelShape.of(config("Llama-3.1-8B"))
    inputs = 32 * 65_536 * 4096 * 2
    for offload, place in (("device", "accelerator"), ("ram", "host"), ("file", "disk")):
        plan = memory_plan(shape, PlanSettings(65_536, offload=offload))
        (component,) = [c for c in plan.components if c.name == "layer inputs"]
        assert (component.place, component.largest) == (place, inputs)
    streamed = memory_plan(shape, PlanSettings(65_536, offload="ram", stream="ram"))
    kept = memory_plan(shape, PlanSettings(65_536, offload="ram"))
    largest = 128_256 * 4096 * 2
    weights = constant_bytes.weights(shape, PlanSettings(65_536))
    saved = kept.bytes_in("accelerator", "backward") - streamed.bytes_in("accelerator", "backward")
    assert saved == pytest.approx(1.03 * (weights.layers + weights.vocabulary - 2 * largest), rel=1e-6)
    on_cpu = memory_plan(shape, PlanSettings(4096, device="cpu"))
    assert not any(c.place == "accelerator" for c in on_cpu.components)
    assert all(set(c.by_phase) <= set(PHASES) for c in on_cpu.components)


def test_float16_norms_and_embeddings_have_float32_gradients() -> None:
    shape = ModelShape.of(config("SmolLM2-135M"))
    settings = PlanSettings(1024, train_embeddings=True, train_norms=True)
    plans = [memory_plan(shape, settings.changed({"dtype": dtype})) for dtype in ("bfloat16", "float16")]
    kept = [next(c for c in plan.components if c.name == "gradients").by_phase["step"] for plan in plans]
    trained = 49_152 * 576 + (2 * 30 + 1) * 576
    assert kept[1] - kept[0] == 2 * trained


def test_kernels_of_a_cpu_keep_no_float32_copies() -> None:
    shape, settings = ModelShape.of(config("SmolLM2-135M")), PlanSettings(8192, device="cpu", fused_kernels=True)
    plain = settings.changed({"fused_kernels": False})
    tiles = [per_token_bytes.tile_bytes(shape, s, tokens=1).mlp for s in (plain, settings)]
    assert tiles[0] - tiles[1] == 2 * 4 * 576 + 2 * 1536  # the copies of two norms, and silu's output
    logits = [per_token_bytes.loss_bytes(shape, s, gradient=True) for s in (plain, settings)]
    assert logits[0] - logits[1] == 341 * 49_152 * 4
    wide = [per_token_bytes.tile_bytes(shape, s.changed({"dtype": "float32"}), tokens=1).mlp for s in (plain, settings)]
    assert wide[0] - wide[1] == 4 * 1536  # in float32 the norms make no copies anyway
    logits = [
        per_token_bytes.loss_bytes(shape, s.changed({"dtype": "float32"}), gradient=True) for s in (plain, settings)
    ]
    assert logits[0] == logits[1]  # nor does the loss
    for refused in ({"dtype": "float16"}, {"device": "cuda"}):
        changed = settings.changed(refused)
        assert memory_plan(shape, changed) == memory_plan(shape, changed.changed({"fused_kernels": False}))
    trained = [
        per_token_bytes.tile_bytes(shape, s.changed({"train_norms": True}), tokens=1).mlp for s in (plain, settings)
    ]
    assert trained == [tiles[0] + 2 * 2 * 576, tiles[1]]  # torch keeps the normed input of each norm for its weight


def test_replicas_hold_buckets_of_all_gradients() -> None:
    shape = ModelShape.of(config("SmolLM2-135M"))
    alone = PlanSettings(4096, train_embeddings=True, train_norms=True)
    plans = [memory_plan(shape, alone.changed({"processes": processes})) for processes in (1, 2)]
    gradients = next(c for c in plans[0].components if c.name == "gradients").by_phase["step"]
    # DDP lays every gradient into a bucket of its own dtype; the allocator's share of them comes on top.
    assert plans[1].peak("accelerator") - plans[0].peak("accelerator") == pytest.approx(1.03 * gradients, rel=1e-6)


def test_the_tile_is_the_engine_s_own() -> None:
    shape = ModelShape.of(config("Llama-3.1-8B"))
    assert PlanSettings(65_536).tile_tokens(shape) == 2048
    assert PlanSettings(65_536, batch_size=4).tile_tokens(shape) == 512
    assert PlanSettings(1000).tile_tokens(shape) == 1000
    assert PlanSettings(65_536, tile=300).tile_tokens(shape) == 300
    assert torch.bfloat16.itemsize == PlanSettings(1).element_bytes
