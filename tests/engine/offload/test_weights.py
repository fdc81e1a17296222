"""Streamed weights: the same gradients, nothing written back, few pages in memory, slots that never mix two layers."""

import copy
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny_models import VOCABULARY, tiny_model

import longfit
from longfit.attention.hf_attention import attention_key
from longfit.engine.loss.training_loss import training_loss
from longfit.engine.offload.activations import FileActivations
from longfit.engine.offload.weights import WeightStream
from longfit.engine.sweep.evaluation import swept_evaluation
from longfit.engine.sweep.install import change_sweep, disable_sweep, enable_sweep, stream_weights
from longfit.engine.sweep.sweeper import sweeper_of
from longfit.errors import ConfigError
from longfit.layers.linear4bit import Linear4bit


def quantised(tied=True):
    """A model whose layers are in 4 bits, with adapters."""
    model = tiny_model("llama", num_hidden_layers=4, dtype=torch.float32, tie_word_embeddings=tied)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, Linear4bit.from_linear(child))
    model.set_attn_implementation(attention_key())
    return longfit.add_adapters(model, rank=4, alpha=8).train()


def gradients(model, ids):
    model.zero_grad()
    loss = training_loss(model, ids)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def frozen(module):
    """Weights that do not train, and the constants of 4-bit ones: what is streamed."""
    buffers = [b for b in module.buffers() if b.dtype == torch.uint8 and b.numel()]
    return [p for p in module.parameters() if not p.requires_grad] + buffers


def watch(stream, monkeypatch):
    """Check at each use of a module that it has its own weights; return the modules that were used."""
    used, use = [], stream.use

    @contextmanager
    def checked(module, **options):
        before = [tensor.clone() for tensor in frozen(module)]  # in the store
        with use(module, **options):
            assert all(map(torch.equal, frozen(module), before))
            yield
            assert all(map(torch.equal, frozen(module), before))
        used.append(module)

    monkeypatch.setattr(stream, "use", checked)
    return used


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("place", ["file", "slots", "file and slots"])
def test_gradients_and_stored_weights_stay_the_same(place, tied, tmp_path, monkeypatch):
    """Slots on the CPU have the logic of slots on an accelerator, without streams."""
    model, ids = quantised(tied), torch.randint(3, VOCABULARY, (2, 30))
    enable_sweep(model, tile=7)
    expected = gradients(model, ids)
    before = copy.deepcopy(model.state_dict())
    folder = tmp_path if "file" in place else None
    slots_on = torch.device("cpu") if "slots" in place else None
    sweeper = sweeper_of(model)
    sweeper.weights = WeightStream(model.get_base_model(), sweeper.swept, folder=folder, slots_on=slots_on)
    watch(sweeper.weights, monkeypatch)
    for _ in range(2):
        got = gradients(model, ids)
        assert torch.equal(got[0], expected[0])
        assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert list(tmp_path.iterdir()) == []  # the file has no name
    assert sweeper.weights.report.num_bytes >= sum(p.nbytes for p in model.parameters() if not p.requires_grad)


def test_trained_embeddings_stay_where_they_are(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model, ids = get_peft_model(tiny_model("qwen3", dtype=torch.float32), config), torch.randint(3, VOCABULARY, (1, 20))
    enable_sweep(model, tile=7)
    expected = gradients(model, ids)
    stream_weights(model, folder=tmp_path)
    got = gradients(model, ids)
    assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    assert training_loss(model, ids) != expected[0]


def resident_bytes(start, end):
    """Bytes of this process's memory inside an address range, from the kernel's own account."""
    total, inside = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if "-" in line.split()[0]:
                low, high = (int(x, 16) for x in line.split()[0].split("-"))
                inside = low < end and high > start
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def test_a_mapped_layer_is_let_go_after_its_use(tmp_path):
    model, ids = quantised(), torch.randint(3, VOCABULARY, (1, 20))
    enable_sweep(model, tile=7)
    stream_weights(model, folder=tmp_path)
    training_loss(model, ids).backward()
    first = frozen(model.get_base_model().model.layers[0])
    start = min(tensor.data_ptr() for tensor in first)
    end = max(tensor.data_ptr() + tensor.nbytes for tensor in first)
    mapped = resident_bytes(start, end)
    for tensor in first:
        tensor.view(torch.uint8).sum()
    # one mapping holds all layers, so only the difference is this one's; its ends may share pages with others
    assert resident_bytes(start, end) - mapped >= end - start - 2 * 4096


def test_a_sweep_that_is_changed_goes_on_streaming(tmp_path):
    model, ids = quantised(), torch.randint(3, VOCABULARY, (1, 20))
    enable_sweep(model, tile=7)
    stream_weights(model, folder=tmp_path)
    expected, stream = gradients(model, ids), sweeper_of(model).weights
    change_sweep(model, tile=7, offload=FileActivations(tmp_path), saved_attention_bytes=0)
    assert sweeper_of(model).weights is stream
    got = gradients(model, ids)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())
    change_sweep(model, tile=3)
    assert sweeper_of(model).tile_for(torch.empty(1, 20, 1)) == 3
    with pytest.raises(ValueError, match="tile 0"):
        change_sweep(model, tile=0)
    with pytest.raises(ValueError, match="enable_sweep first"):
        change_sweep(quantised(), tile=3)


def test_a_swept_evaluation_streams_too(monkeypatch):
    """Validation of a run whose weights wait in host memory: every layer is brought in, the head and embedding too."""
    model, ids = quantised(), torch.randint(3, VOCABULARY, (1, 20))
    enable_sweep(model, tile=7)
    with swept_evaluation(model):
        expected = training_loss(model, ids)
    sweeper = sweeper_of(model)
    sweeper.weights = WeightStream(model.get_base_model(), sweeper.swept, folder=None, slots_on=torch.device("cpu"))
    used = watch(sweeper.weights, monkeypatch)
    with swept_evaluation(model):
        assert torch.equal(training_loss(model, ids), expected)
    base = model.get_base_model()
    assert set(used) == {base.get_input_embeddings(), *base.model.layers, base.get_output_embeddings()}


def test_streaming_again_moves_the_weights_and_leaves_nothing_of_the_first_stream(tmp_path):
    model, ids = quantised(), torch.randint(3, VOCABULARY, (1, 20))
    enable_sweep(model, tile=7)
    expected = gradients(model, ids)
    stream_weights(model, folder=tmp_path)
    first = weakref.ref(sweeper_of(model).weights)
    stream_weights(model, folder=tmp_path)
    gc.collect()
    assert first() is None
    got = gradients(model, ids)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())


def test_streaming_outlives_a_sweep_that_is_enabled_again_and_ends_with_it(monkeypatch):
    model, ids = quantised(), torch.randint(3, VOCABULARY, (1, 20))
    enable_sweep(model, tile=7)
    expected = gradients(model, ids)
    sweeper = sweeper_of(model)
    sweeper.weights = WeightStream(model.get_base_model(), sweeper.swept, folder=None, slots_on=torch.device("cpu"))
    watch(sweeper.weights, monkeypatch)
    enable_sweep(model, tile=7)
    assert sweeper_of(model).weights is sweeper.weights
    got = gradients(model, ids)
    assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())
    base = model.get_base_model()
    stored = [x.data for module in (base.get_input_embeddings(), *base.model.layers) for x in frozen(module)]
    disable_sweep(model)
    for tensor in stored:  # whoever reads the store now reads what is no weight
        tensor.view(torch.uint8).fill_(0xFF)
    assert torch.isfinite(training_loss(model, ids))


def test_what_cannot_be_streamed_is_refused(tmp_path):
    model = quantised()
    with pytest.raises(ConfigError, match="enable_sweep first"):
        stream_weights(model, folder=tmp_path)
    enable_sweep(model)
    with pytest.raises(ConfigError, match="name a folder"):
        stream_weights(model)
