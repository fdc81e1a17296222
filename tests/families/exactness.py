"""What longfit does with a family, held against the family's own eager attention in float64: exact, or refused by name.

    exact      loss and the gradient of every parameter, 29 tokens in tiles of 8
    packed     two documents in one window: the sum of what each gives alone
    padded     two rows, one shorter: the sum of what each gives alone
    tiles      the same in tiles of 5 tokens and of 14, which leave four tokens and one
    shifted    LongLoRA's attention, against the same model with a dense mask per head
    cached     logits of a text read in chunks with a cache, against the whole
    adapters   LoRA on all linear layers: swept gradients against plain autograd; the file gives the same in plain PEFT
    nf4        loaded in NF4, saved and loaded again: the same logits

An outcome is ``exact``, ``refused: <message>`` (an error of longfit's own), or something that must not be:
``wrong: ...``, ``crash: ...``. What transformers itself cannot do is ``not in transformers: ...``.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tests.exact_float64 import exact_float64
from tests.families.tiny_family import Family, tiny_family
from torch import Tensor, nn

from longfit.errors import LongfitError

TOKENS, TILE, CUT = 29, 8, 12
"""Tokens of a window, of a tile, and of the first of two documents: none divides another."""

RELATIVE = 1e-6
"""Error allowed, relative to the largest gradient of the model. Rotary tables, and what some families make float32 by
other means than a cast, round to 6e-8 in each of a few layers. A wrong mask, a state that leaks or a gradient that is
lost shows from 1e-3 up."""


class NotInTransformers(Exception):
    """The family's own code cannot do it."""


def outcome(check: Callable[[Family, Path], None], kind: str, folder: Path) -> str:
    """Run a check and say in a line what came of it."""
    family = tiny_family(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(family, folder)
        except NotInTransformers as error:
            return f"not in transformers: {error}"
        except LongfitError as error:
            return f"refused: {_line(error)}"
        except AssertionError as error:
            return f"wrong: {_line(error)}"
        except Exception as error:
            return f"crash: {type(error).__name__}: {_line(error)}"
    return "exact"


# ------------------------------------------------------------------------------------------------ the two sides
def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that trains, zero where none came."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def plain(model: nn.Module, rows: list[Tensor], **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss and gradients of documents, each alone, by the model as it is."""
    try:
        with exact_float64():
            losses = [_plain_loss(model, row, **inputs) for row in rows]
            loss = torch.stack(losses).sum()
            return loss.detach(), gradients(model, loss)
    except Exception as error:
        raise NotInTransformers(f"{type(error).__name__}: {_line(error)}") from error


def _plain_loss(model: nn.Module, row: Tensor, **inputs: Any) -> Tensor:
    logits = model(input_ids=row, use_cache=False, **inputs).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), row[:, 1:].flatten(), reduction="sum")


def swept(
    model: nn.Module, input_ids: Tensor, num_items: int, *, tile: int = TILE, **inputs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from longfit."""
    from longfit.engine.loss.training_loss import training_loss
    from longfit.engine.sweep.install import enable_sweep

    enable_sweep(model, tile=tile)
    with exact_float64():
        loss = training_loss(model, input_ids, num_items=num_items, **inputs) * num_items
        return loss.detach(), gradients(model, loss)


def require_equal(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Compare losses and gradients; AssertionError names the worst."""
    error = abs(float(found[0] - expected[0])) / max(1.0, abs(float(expected[0])))
    assert error <= RELATIVE, f"loss off by {error:.1e}"
    size = max(float(g.norm()) for g in expected[1].values())
    worst = max(expected[1], key=lambda name: float((found[1][name] - expected[1][name]).norm()))
    error = float((found[1][worst] - expected[1][worst]).norm()) / size
    assert error <= RELATIVE, f"gradient of {worst} off by {error:.1e} of the largest"


# ------------------------------------------------------------------------------------------------ the checks
def check_exact(family: Family, folder: Path) -> None:
    ids = family.tokens(1, TOKENS)
    expected = plain(family.model, [ids])
    require_equal(swept(family.model, ids, TOKENS - 1), expected)


def check_tiles(family: Family, folder: Path) -> None:
    ids = family.tokens(1, TOKENS)
    expected = plain(family.model, [ids])
    for tile in (5, 14):
        require_equal(swept(family.model, ids, TOKENS - 1, tile=tile), expected)


def check_packed(family: Family, folder: Path) -> None:
    ids = family.tokens(1, TOKENS)
    expected = plain(family.model, [ids[:, :CUT], ids[:, CUT:]])
    positions = torch.cat([torch.arange(CUT), torch.arange(TOKENS - CUT)])[None]
    require_equal(swept(family.model, ids, TOKENS - 2, position_ids=positions), expected)


def check_padded(family: Family, folder: Path) -> None:
    ids = family.tokens(2, TOKENS)
    short = TOKENS - 10
    expected = plain(family.model, [ids[:1], ids[1:, :short]])
    _require_future_unseen(family, ids[1:], short)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, short:] = 0
    ids[1, short:] = 0
    require_equal(swept(family.model, ids, TOKENS + short - 2, attention_mask=mask), expected)


def _require_future_unseen(family: Family, ids: Tensor, short: int) -> None:
    """Some sparse attentions choose keys among later ones too: what follows a text then changes it, in transformers."""
    with torch.no_grad():
        whole, alone = (family.model(input_ids=part, use_cache=False).logits for part in (ids, ids[:, :short]))
    if (whole[:, :short] - alone).abs().max() > 1e-5 * alone.abs().max():
        raise NotInTransformers("tokens that follow change a text's logits")


def check_shifted(family: Family, folder: Path) -> None:
    from longfit.attention.hf_attention import attention_key

    group_size = 10
    ids = family.tokens(1, TOKENS)
    dense = copy.deepcopy(family.model)
    reference = plain(dense, [ids])
    try:
        dense.set_attn_implementation(_dense_shifted(group_size))
    except Exception as error:
        raise NotInTransformers(f"takes no attention but its own: {_line(error)}") from error
    expected = plain(dense, [ids])
    family.model.set_attn_implementation(attention_key("shifted", group_size))
    found = swept(family.model, ids, TOKENS - 1)
    if abs(float(expected[0] - reference[0])) < 1e-6:  # no layer takes it
        require_equal(found, reference)
        return
    require_equal(found, expected)


def check_cached(family: Family, folder: Path) -> None:
    from longfit.attention.hf_attention import attention_key
    from longfit.evaluation.reader import Reader

    model = family.model.eval()
    ids = family.tokens(1, TOKENS)
    try:
        with torch.no_grad(), exact_float64():
            expected = model(input_ids=ids, use_cache=False).logits[0]
    except Exception as error:
        raise NotInTransformers(f"{type(error).__name__}: {_line(error)}") from error
    for end in (TILE, CUT, *range(CUT + TILE, TOKENS, TILE)):  # of the chunks that are read
        _require_future_unseen(family, ids, end)
    model.set_attn_implementation(attention_key())
    reader = Reader(model, chunk_tokens=TILE)
    with exact_float64():
        first = reader.read(ids[0, :CUT], keep=3)
        again = reader.read(ids[0], keep=TOKENS - CUT)
    found = torch.cat([first, again])
    error = float((found - expected[CUT - 3 :]).abs().max() / expected.abs().max())
    assert error <= RELATIVE, f"logits off by {error:.1e}"


def check_adapters(family: Family, folder: Path) -> None:
    from peft import PeftModel

    from longfit.model.adapters import add_adapters

    base = copy.deepcopy(family.model)
    ids = family.tokens(1, TOKENS)
    model = add_adapters(family.model, rank=2, alpha=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    model.train()
    expected = plain(model, [ids])
    require_equal(swept(model, ids, TOKENS - 1), expected)
    model.save_pretrained(str(folder / "adapter"))
    again = PeftModel.from_pretrained(base, str(folder / "adapter"))
    assert any("lora_B" in name for name, _ in again.named_parameters()), "nothing was loaded"
    with torch.no_grad(), exact_float64():
        loss = _plain_loss(again.train(), ids)
    error = abs(float(loss - expected[0])) / max(1.0, abs(float(expected[0])))
    assert error <= RELATIVE, f"loss in plain PEFT off by {error:.1e}"


def check_nf4(family: Family, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from longfit.model.description import read_config
    from longfit.model.load import prequantized, quantization_block
    from longfit.model.quantization_config import LongfitQuantizationConfig

    model = family.model.float().eval()
    ids = family.tokens(1, TOKENS)
    try:
        model.save_pretrained(str(folder / "dense"))
        dense = AutoModelForCausalLM.from_pretrained(str(folder / "dense"), dtype=torch.float32)
        dense(input_ids=ids, use_cache=False)
    except Exception as error:
        raise NotInTransformers(
            f"does not run, or load what it saved: {type(error).__name__}: {_line(error)}"
        ) from error
    quantized = AutoModelForCausalLM.from_pretrained(
        str(folder / "dense"), dtype=torch.float32, quantization_config=LongfitQuantizationConfig(dtype="float32")
    ).eval()
    quantized.save_pretrained(str(folder / "nf4"))
    config = read_config(folder / "nf4")
    block = quantization_block(config)
    assert block is not None, "nothing was quantised"
    config.quantization_config = prequantized(block).settings()
    again = AutoModelForCausalLM.from_pretrained(
        str(folder / "nf4"), config=config, dtype=torch.float32, quantization_config=None
    ).eval()
    with torch.no_grad():
        one, other = (m(input_ids=ids, use_cache=False).logits for m in (quantized, again))
    error = float((one - other).abs().max() / one.abs().max())
    assert error <= 1e-5, f"logits off by {error:.1e}"  # float32, products in another blocking


CHECKS: dict[str, Callable[[Family, Path], None]] = {
    "exact": check_exact,
    "packed": check_packed,
    "padded": check_padded,
    "tiles": check_tiles,
    "shifted": check_shifted,
    "cached": check_cached,
    "adapters": check_adapters,
    "nf4": check_nf4,
}


def _dense_shifted(group_size: int) -> str:
    """Register eager attention with LongLoRA's mask, a whole matrix per head, and name it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    from longfit.numerics import shifted_attention

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        heads, tokens = query.shape[1], query.shape[2]
        repeats = heads // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        scores = query @ key.transpose(-1, -2) * scaling
        if options.get("softcap"):
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        t = torch.arange(tokens)
        causal = t <= t[:, None]
        visible = causal.expand(heads, -1, -1).clone()
        whole = attention_mask is None or bool(((attention_mask == 0) == causal).all())
        if not whole:  # a window or chunks of the layer's own, which stay
            visible &= attention_mask[0] == 0
        elif module.training:
            start = torch.zeros(1, tokens, dtype=torch.int64)
            for half, shift in ((slice(0, heads // 2), 0), (slice(heads // 2, heads), group_size // 2)):
                first = shifted_attention.first_key(start, group_size=group_size, shift=shift)[0]
                visible[half] &= t >= first[:, None]
        scores = scores.masked_fill(~visible, float("-inf"))
        if options.get("s_aux") is not None:
            sinks = options["s_aux"].reshape(1, -1, 1, 1).expand(scores.shape[0], -1, tokens, 1).to(scores.dtype)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    key = f"dense-shifted-{group_size}"
    AttentionInterface.register(key, attend)
    AttentionMaskInterface.register(key, eager_mask)
    return key


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
