"""The sweep against plain autograd: every family, attention, tile and layout; what falls back; who owns what."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tests.exact_norms import exact_norms
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model
from torch import nn

from longfit.attention.hf_attention import attention_key
from longfit.engine.hf_model import base_model, hidden_states
from longfit.engine.loss.training_loss import TrainingLoss, training_loss
from longfit.engine.sweep import layer, sweeper
from longfit.engine.sweep.evaluation import swept_evaluation
from longfit.engine.sweep.install import choose_tile, disable_sweep, enable_sweep
from longfit.engine.sweep.sweeper import sweeper_of
from longfit.errors import ModelError

# float64: some thousand terms in another order. The routers of a mixture of experts work in float32, where a last-bit
# difference can flip a rounding (6e-8) of one element among several hundred.
EXACT, MIXED = 1e-12, 1e-8


class CopiedActivations:
    """Keeps copies, so that the sweep may write a layer's output over its input; counts what it holds."""

    aliases = False
    place = "copied"

    def __init__(self):
        self.held = 0

    def open(self, num_tiles):
        return CopiedInput(self)


class CopiedInput:
    def __init__(self, offload):
        self.offload, self.tiles = offload, {}

    def put(self, index, tile):
        self.tiles[index] = tile.clone()
        self.offload.held += 1

    def settle(self, index):
        assert index in self.tiles

    def prefetch(self, index):
        pass

    def get(self, index):
        return self.tiles[index].clone()

    def close(self):
        self.offload.held -= len(self.tiles)
        self.tiles = {}


def gradients(model, ids, *, loss=training_loss, **inputs):
    model.zero_grad()
    value = loss(model, ids, **inputs)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(model, ids, **inputs):
    return gradients(model, ids, engine="plain", **inputs)


def worst(got, expected):
    assert got[1].keys() == expected[1].keys()
    errors = {name: ((got[1][name] - g).norm() / g.norm().clamp_min(1e-300)).item() for name, g in expected[1].items()}
    errors["loss"] = abs(got[0] - expected[0]).item()
    return max(errors.items(), key=lambda item: item[1])


def batch(num_rows=2, num_tokens=40):
    return torch.randint(3, VOCABULARY, (num_rows, num_tokens))


def lora(model, **options):
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)


# ------------------------------------------------------------------------------------------------ exactness
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", [("exact", None), ("shifted", 12)])
@pytest.mark.parametrize("offload", [None, CopiedActivations()], ids=["kept", "copied-recomputed"])
def test_every_family_equals_plain_autograd(family, attention, offload):
    """All parameters trained: embeddings (through dx of the first layer), norms, biases, experts, output matrix."""
    model, ids = exact_norms(tiny_model(family, attn_implementation=attention_key(*attention))), batch()
    expected = plain(model, ids)
    report = enable_sweep(model, tile=7, offload=offload, saved_attention_bytes=None if offload is None else 0)
    assert report.layers == ("model.layers.0", "model.layers.1")
    assert not report.fallback
    name, error = worst(gradients(model, ids), expected)
    assert error < (MIXED if family == "mixtral" else EXACT), name
    assert offload is None or offload.held == 0


@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "tile"), [(1, 2, 4), (3, 3, 1), (1, 41, 8), (2, 16, 16), (2, 17, 16), (1, 33, 100)]
)
def test_tiles_that_divide_nothing(num_rows, num_tokens, tile):
    heads = {"num_heads": 9, "num_kv_heads": 3, "hidden_size": 72}
    model = exact_norms(tiny_model("llama", **heads, attn_implementation=attention_key("shifted", 6)))
    ids = batch(num_rows, num_tokens)
    inputs = {"num_items": 7}
    expected = plain(model, ids, **inputs)
    enable_sweep(model, tile=tile)
    assert worst(gradients(model, ids, **inputs), expected)[1] < EXACT


@pytest.mark.parametrize("attention", [("exact", None), ("shifted", 8)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_documents_and_padding(attention, family):
    model, ids = exact_norms(tiny_model(family, attn_implementation=attention_key(*attention))), batch(2, 40)
    lengths = ((5, 1, 17, 17), (22, 3, 8, 7))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    mask = torch.ones_like(ids)
    mask[0, :6] = mask[1, 29:] = 0
    for inputs in ({"position_ids": positions}, {"attention_mask": mask}):
        disable_sweep(model)
        expected = plain(model, ids, **inputs)
        enable_sweep(model, tile=6)
        assert worst(gradients(model, ids, **inputs), expected)[1] < EXACT


def test_low_precision_is_no_worse_than_plain_autograd():
    """Distance to float64 of the same bf16 weights, all parameters together; 1.1 for the luck of the draw."""
    distances = {}
    truth_model = tiny_model("llama", dtype=torch.bfloat16, attn_implementation=attention_key())
    ids = batch(2, 96)
    truth = plain(exact_norms(copy.deepcopy(truth_model).double()), ids)
    for tile in (None, 16):
        model = copy.deepcopy(truth_model)
        if tile:
            enable_sweep(model, tile=tile)
        got = gradients(model, ids) if tile else plain(model, ids)
        assert all(g.dtype == torch.bfloat16 for g in got[1].values())
        distances[tile] = sum((got[1][n].double() - g).norm() ** 2 / g.norm() ** 2 for n, g in truth[1].items()) ** 0.5
    assert distances[16] < 1.1 * distances[None]


def test_autocast_is_the_same_in_backward():
    model, ids = tiny_model("llama", dtype=torch.float32, attn_implementation=attention_key()), batch()
    truth = plain(exact_norms(copy.deepcopy(model).double()), ids)
    distances = []
    for swept in (False, True):
        if swept:
            enable_sweep(model, tile=7)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = training_loss(model, ids, engine="sweep" if swept else "plain")
        loss.backward()
        distances.append(
            sum(
                (p.grad.double() - truth[1][n]).norm() ** 2 / truth[1][n].norm() ** 2
                for n, p in model.named_parameters()
            )
        )
    assert distances[0] > 1e-6, "the plain run must show bf16 rounding"
    assert distances[1] < 1.1**2 * distances[0]


def test_dropout_drops_the_same_elements_when_a_tile_is_computed_again():
    """Against central differences of the swept loss itself, at a fixed seed: error ~ step^2 |f'''| ~ 1e-7."""
    model, ids = lora(exact_norms(tiny_model("llama")), lora_dropout=0.3), batch(2, 24)
    enable_sweep(model, tile=5)

    def loss():
        torch.manual_seed(7)
        return training_loss(model, ids)

    model.zero_grad()
    loss().backward()
    after = torch.get_rng_state()
    loss()
    assert torch.equal(after, torch.get_rng_state()), "backward leaves the random state as forward left it"
    trained = [p for p in model.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in trained]
    slope = sum((p.grad * d).sum() for p, d in zip(trained, directions, strict=True))
    values = []
    for step in (1e-4, -2e-4):
        with torch.no_grad():
            for p, d in zip(trained, directions, strict=True):
                p.add_(step * d)
        values.append(loss().detach())  # with gradients, without which a layer may run whole and draw otherwise
    assert abs((values[0] - values[1]) / 2e-4 - slope) < 1e-5 * abs(slope)
    # and in one tile the draws come in the order of plain autograd
    enable_sweep(model, tile=24)
    got = gradients(model, ids, loss=lambda *_: loss())
    disable_sweep(model)
    assert worst(got, gradients(model, ids, loss=lambda *_: loss()))[1] < EXACT


# ------------------------------------------------------------------------------------------------ training
def test_adapters_above_frozen_layers_accumulate_and_call_hooks_once():
    """Only the upper layer has adapters, so its input needs no gradient; two micro-batches make one step."""
    only_upper = {"target_modules": r".*layers\.1\..*_proj"}
    model = lora(exact_norms(tiny_model("llama", attn_implementation=attention_key())), **only_upper)
    parts = batch(1, 30), batch(2, 11)

    def step():
        model.zero_grad()
        for ids in parts:
            training_loss(model, ids, num_items=49).backward()
        return torch.zeros(()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = step()
    assert len(expected[1]) == 14
    enable_sweep(model, tile=7)
    calls = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(name))
    assert worst(step(), expected)[1] < EXACT
    assert sorted(calls) == sorted([*expected[1], *expected[1]])


def test_data_parallel_needs_no_special_mode():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, ids = lora(exact_norms(tiny_model("qwen3", attn_implementation=attention_key()))), batch()
        expected = plain(model, ids)
        enable_sweep(model, tile=7)
        wrapped = nn.parallel.DistributedDataParallel(TrainingLoss(model))
        for _ in range(3):
            model.zero_grad()
            wrapped(ids).backward()
        got = torch.as_tensor(expected[0]), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert worst(got, expected)[1] < EXACT
    finally:
        torch.distributed.destroy_process_group()


def test_without_gradient_tiles_leave_nothing_behind():
    model, ids = tiny_model("llama", attn_implementation=attention_key()), batch()
    expected = training_loss(model, ids).detach()
    offload = CopiedActivations()
    enable_sweep(model, tile=7, offload=offload)
    offload.open = None  # never called
    with torch.no_grad():
        assert abs(training_loss(model, ids) - expected) < EXACT


def test_evaluation_in_tiles_is_exact_attention_without_dropout():
    shifted = attention_key("shifted", 8)
    model, ids = lora(exact_norms(tiny_model("llama", attn_implementation=shifted)), lora_dropout=0.5), batch()
    enable_sweep(model, tile=7)
    model.eval()
    with torch.no_grad():
        expected = training_loss(model, ids)
    model.train()
    calls = []
    inner = sweeper_of(model).tile_for
    sweeper_of(model).tile_for = lambda hidden: calls.append(1) or inner(hidden)
    with swept_evaluation(model):
        assert abs(training_loss(model, ids) - expected) < EXACT
    assert len(calls) == 2
    assert all(module.training for module in model.modules())


def test_training_in_eval_mode_is_warned_about():
    model, ids = tiny_model("llama"), batch()
    enable_sweep(model)
    model.eval()
    with pytest.warns(UserWarning, match=r"call model\.train\(\) first"):
        training_loss(model, ids)


# ------------------------------------------------------------------------------------------------ ownership
@pytest.mark.parametrize("offload", [None, CopiedActivations()], ids=["kept", "copied"])
def test_shared_gradients_and_collected_hidden_states_stay_right(offload):
    """The gradient of ``h + z`` is one tensor for two; hidden states that a hook collects are all read later."""
    model, ids = exact_norms(tiny_model("llama", attn_implementation=attention_key())), batch()

    def run():
        model.zero_grad()
        hidden, _ = hidden_states(model, input_ids=ids, use_cache=False)
        shared = torch.zeros_like(hidden).requires_grad_()
        collected = model.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        loss = (hidden + shared).pow(3).sum() + sum((i + 1) * h.pow(2).sum() for i, h in enumerate(collected))
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return loss.detach() / 1e6, grads | {"shared": shared.grad}

    expected = run()
    enable_sweep(model, tile=7, offload=offload)
    assert worst(run(), expected)[1] < EXACT


def test_the_heap_is_trimmed_once_in_a_few_layers(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=5).train()
    enable_sweep(model, tile=16)
    trims = []
    monkeypatch.setattr(sweeper, "give_back", trims.append)
    monkeypatch.setattr(sweeper, "TRIMMED_LAYERS", 2)
    gradients(model, batch())
    assert [device.type for device in trims] == ["cpu", "cpu"]
    gradients(model, batch())  # ten layers in all
    assert len(trims) == 5


def test_a_second_backward_and_a_changed_input_raise():
    model, ids = tiny_model("llama", attn_implementation=attention_key()), batch()
    enable_sweep(model, tile=7)
    hidden, _ = hidden_states(model, input_ids=ids, use_cache=False)
    hidden.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        hidden.sum().backward()
    embedded = model.get_input_embeddings()(ids)
    hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    embedded.detach().mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        hidden.sum().backward()


# ------------------------------------------------------------------------------------------------ windows
def test_groups_and_windows_hold_few_keys(monkeypatch):
    """Shifted: at most a group and two tiles; sliding: a window and two tiles, rounded to tiles."""
    capacities = []
    right = layer.BackwardPass.gradient_sums

    def spy(self, seen, dtype):
        capacities.append(self.visible.capacity)
        return right(self, seen, dtype)

    monkeypatch.setattr(layer.BackwardPass, "gradient_sums", spy)
    for family, attention, most in (
        ("llama", ("exact", None), [400]),
        ("llama", ("shifted", 40), [40 + 2 * 10]),
        ("gemma3", ("exact", None), [9 + 2 * 10, 400]),
    ):
        capacities.clear()
        model, ids = exact_norms(tiny_model(family, attn_implementation=attention_key(*attention))), batch(1, 400)
        expected = plain(model, ids)
        enable_sweep(model, tile=10)
        assert worst(gradients(model, ids), expected)[1] < EXACT
        assert all(c <= most[-1] for c in capacities)
        assert min(capacities) <= most[0]


# ------------------------------------------------------------------------------------------------ by default
def lora_made_elsewhere():
    return lora(exact_norms(tiny_model("llama", attn_implementation=attention_key())))


@pytest.mark.parametrize("made", [lora_made_elsewhere, lambda: exact_norms(tiny_model("qwen3"))])
def test_training_sweeps_by_default_and_says_so_once(made, caplog):
    model, ids = made(), batch()
    base_model(model).set_attn_implementation(attention_key())
    expected = plain(model, ids)
    assert sweeper_of(model) is None
    caplog.set_level("INFO", "longfit")
    assert worst(gradients(model, ids), expected)[1] < EXACT
    gradients(model, ids)
    assert [record.message for record in caplog.records] == [
        "sweeping 2 layers, 4,096 tokens at a time, layer inputs on their device; enable_sweep(model, ...) chooses"
        " otherwise, engine='plain' is ordinary autograd"
    ]
    assert sweeper_of(model).report.layers == ("model.layers.0", "model.layers.1")


def test_a_swept_model_can_be_run_plainly_for_one_loss():
    model, ids = lora_made_elsewhere(), batch()
    enable_sweep(model, tile=7)
    tiles = []
    inner = sweeper_of(model).tile_for
    sweeper_of(model).tile_for = lambda hidden: tiles.append(1) or inner(hidden)
    expected = plain(model, ids)
    assert tiles == []
    assert worst(gradients(model, ids), expected)[1] < EXACT
    assert len(tiles) == 2


def test_who_disables_the_sweep_keeps_plain_autograd_until_it_is_enabled():
    model, ids = lora_made_elsewhere(), batch()
    disable_sweep(model)
    training_loss(model, ids).backward()
    assert sweeper_of(model) is None
    enable_sweep(model)
    training_loss(model, ids).backward()
    assert sweeper_of(model) is not None


def test_nothing_is_swept_where_nothing_trains():
    model, ids = tiny_model("llama"), batch()
    model.requires_grad_(False)
    training_loss(model, ids)
    with torch.no_grad():
        training_loss(model.requires_grad_(True), ids)
    with pytest.warns(UserWarning, match=r"call model\.train\(\) first"):
        training_loss(model.eval(), ids)
    assert sweeper_of(model) is None
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="engine 'fast': must be 'sweep' or 'plain'"):
        training_loss(model, ids, engine="fast")


def test_a_model_that_cannot_be_swept_is_left_as_it_was_and_the_way_out_is_named():
    model, ids = tiny_model("llama", attn_implementation=attention_key("shifted", 4)), batch()
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ModelError, match=r"both directions.* or train it plainly: training_loss\(\.\.\., engine="):
        training_loss(model, ids)
    assert model.config._attn_implementation == "longfit-shifted-4"
    assert sweeper_of(model) is None


def test_attention_dropout_is_trained_with_zero_and_said():
    ids = batch()
    expected = plain(exact_norms(tiny_model("llama", attn_implementation=attention_key())), ids)
    model = exact_norms(tiny_model("llama", attention_dropout=0.1))
    with pytest.warns(UserWarning, match=r"attention dropout 0\.1 of LlamaAttention is trained with 0"):
        assert worst(gradients(model, ids), expected)[1] < EXACT


def test_a_model_that_does_not_run_with_longfits_attention_keeps_its_own_and_says_so():
    model, ids = exact_norms(tiny_model("llama", attn_implementation=attention_key())), batch()
    expected = plain(model, ids)
    model.model.layers[1].self_attn.is_causal = False  # which transformers' eager attention does not ask
    with pytest.warns(
        UserWarning, match=r"both directions.*; attention 'sdpa' is used instead, and layers are not swept"
    ):
        report = enable_sweep(model, tile=7)
    assert report.layers == ()
    model.model.layers[1].self_attn.is_causal = True
    assert worst(gradients(model, ids), expected)[1] < EXACT


# ------------------------------------------------------------------------------------------------ what is not swept
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_without_a_checkpointing_function_is_named_and_still_right():
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY)
    model = transformers.BloomForCausalLM(config).double()
    ids = batch()
    expected = plain(model, ids)
    with pytest.warns(
        UserWarning, match=r"transformer\.h\.0 and 1 more are not swept but checkpointed in the ordinary way"
    ):
        report = enable_sweep(model)
    assert report.layers == ()
    assert [name for name, _ in report.fallback] == ["transformer.h.0", "transformer.h.1"]
    assert worst(gradients(model, ids), expected)[1] < EXACT


def test_a_layer_that_attends_otherwise_falls_back_alone():
    model, ids = exact_norms(tiny_model("llama", attn_implementation=attention_key())), batch()
    expected = plain(model, ids)
    own = model.model.layers[0].self_attn.forward
    model.model.layers[0].self_attn.forward = lambda **kw: own(**{k: v for k, v in kw.items() if k != "sweep"})
    with pytest.warns(UserWarning, match="attends 0 times through the attention interface"):
        report = enable_sweep(model, tile=7)
    assert report.layers == ("model.layers.1",)
    assert worst(gradients(model, ids), expected)[1] < EXACT


def test_the_attention_becomes_ours_and_a_later_change_is_noticed():
    model, ids = tiny_model("llama"), batch()
    assert enable_sweep(model).attention == "longfit-exact"
    model.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="call enable_sweep"):
        training_loss(model, ids)
    disable_sweep(model)
    training_loss(model, ids)
    assert sweeper_of(model) is None


def test_the_tile_is_chosen_from_the_workspace_or_forced():
    llama_8b = transformers.LlamaConfig(hidden_size=4096, intermediate_size=14336)
    assert choose_tile(llama_8b, 2, "cuda") == 2048
    assert choose_tile(llama_8b, 2, "cpu") == 512
    small = transformers.LlamaConfig(hidden_size=576, intermediate_size=1536)
    assert choose_tile(small, 2, "cpu") == choose_tile(small, 2, "cuda") == 4096
    assert choose_tile(small, 4, "cpu") == 2048
    model = tiny_model("llama")
    enable_sweep(model)
    assert sweeper_of(model).tile_for(torch.empty(1, 1, 1)) == sweeper_of(model).tile == 4096
    assert sweeper_of(model).tile_for(torch.empty(16, 1, 1)) == 256
    with pytest.raises(ValueError, match="tile 0"):
        enable_sweep(model, tile=0)
