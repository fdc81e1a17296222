"""Reading in chunks and with a cache is reading at once; what two texts share is read once."""

import pytest
import torch
from tests.families.tiny_family import tiny_family
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model

from longfit.attention.hf_attention import attention_key
from longfit.errors import DataError
from longfit.evaluation.reader import Reader, shared_prefix
from longfit.model.adapters import add_adapters


def text(num_tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (num_tokens,))


@torch.no_grad()
def at_once(model, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids[None], use_cache=False).logits[0]


@pytest.mark.parametrize("family", FAMILIES)  # gemma: windows of nine tokens, shorter than what is forgotten here
def test_reading_in_chunks_is_reading_at_once(family: str) -> None:
    model = tiny_model(family, attn_implementation=attention_key())
    reader = Reader(model, chunk_tokens=7)
    first = text(40)
    texts = [first, torch.cat([first[:25], text(11)]), first[:25], first[:1], text(3), torch.cat([first, text(30)])]
    for ids in texts:
        for keep in (1, min(9, len(ids))):
            logits = reader.read(ids, keep=keep)
            # float64; rotary tables are float32, whatever the positions are cut into
            torch.testing.assert_close(logits, at_once(model, ids)[-keep:], rtol=0, atol=1e-10)


def test_only_what_is_new_is_read() -> None:
    model, seen = tiny_model("llama"), []
    reader, document = Reader(model, chunk_tokens=16), text(50)
    model.model.embed_tokens.register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[1]))
    reader.read(document)
    assert seen == [16, 16, 16, 2]
    seen.clear()
    reader.read(torch.cat([document, text(5)]))
    assert seen == [5]
    seen.clear()
    reader.read(document)  # its last token again, for its logits
    assert seen == [1]
    reader.read(torch.cat([document[:30], text(1)]))
    storage = [part.data_ptr() for part in reader.cache.layers[0].storage]
    reader.read(torch.cat([document[:30], text(2)]))
    assert storage == [part.data_ptr() for part in reader.cache.layers[0].storage]  # room, not a copy a token


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("llama", "roomy"),
        ("falcon", "roomy"),  # takes no attention but its own
        ("minimax", "own"),  # a class of cache of its own, which it makes itself
        ("lfm2", "own"),  # convolutions with a state
        ("mamba", "single"),  # goes on from its state by one token only
        ("xlstm", "none"),  # its cache does not fit these sizes
    ],
)
def test_the_fastest_way_that_gives_the_same_is_used(kind: str, way: str) -> None:
    family = tiny_family(kind)
    ids = family.tokens(30)
    expected = at_once(family.model, ids)
    reader = Reader(family.model, chunk_tokens=7)
    assert reader.way == way
    other = torch.cat([ids[:17], family.tokens(5, seed=1)])
    for asked in (ids[:11], ids, other, ids):
        reader.read(asked)
    reader.read(ids[:20])
    # softmax and norms of transformers work in float32
    torch.testing.assert_close(reader.read(ids, keep=9), expected[-9:], rtol=1e-6, atol=1e-6)


def test_a_model_in_training_is_read_exactly_and_left_so() -> None:
    model = add_adapters(tiny_model("llama", attn_implementation=attention_key("shifted", 4)), rank=2, alpha=4)
    model.train()
    ids = text(30)
    logits = Reader(model).read(ids, keep=30)
    assert model.training
    assert model.get_base_model().config._attn_implementation == "longfit-shifted-4"
    torch.testing.assert_close(logits, at_once(model, ids), rtol=0, atol=1e-10)
    plain = tiny_model("llama", attn_implementation="sdpa")
    Reader(plain).read(ids)
    assert plain.config._attn_implementation == "sdpa"


def test_errors() -> None:
    reader = Reader(tiny_model("llama"))
    for ids, keep, message in [
        (text(0), 1, "0 tokens: too few"),
        (text(3), 4, "3 tokens: too few to read and to predict 4"),
        (torch.tensor([1, VOCABULARY]), 1, "the model knows 0 to 96"),
    ]:
        with pytest.raises(DataError, match=message):
            reader.read(ids, keep=keep)


def test_shared_prefix() -> None:
    one = torch.tensor([1, 2, 3])
    assert shared_prefix(one, torch.tensor([1, 2, 4, 5])) == 2
    assert shared_prefix(one, one) == shared_prefix(one, torch.tensor([1, 2, 3, 4])) == 3
    assert shared_prefix(one, torch.tensor([5])) == shared_prefix(one, one[:0]) == 0
