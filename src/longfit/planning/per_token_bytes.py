"""Bytes that grow with the context, and the tiles that keep most of them from growing.

The sweep (``engine/sweep``) holds, per token of context, the layer input, its gradient, and one layer's keys, values
and their float32 gradients; everything else exists for one tile. What a tile's local graph holds is counted here tensor
by tensor, at the two moments when it is largest.

    D hidden size, I intermediate size, Q and K numbers in a token's queries and keys, R rank; e bytes of a number
"""

from collections.abc import Iterator
from dataclasses import dataclass

from longfit.attention.limits import KEY_BLOCK
from longfit.engine.working_memory import CPU_LOGITS, CPU_SAVED_ATTENTION_BYTES, DEVICE_LOGITS
from longfit.planning.layer_kinds import BACKWARD_SHARE, LayerShape
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import ModelShape

LOGITS = {"cpu": CPU_LOGITS, "cuda": DEVICE_LOGITS}
SAVED_ATTENTION_BYTES = {"cpu": CPU_SAVED_ATTENTION_BYTES, "cuda": 0}


def window_tokens(context: int, tile: int, *, group_size: int | None = None, sliding_window: int | None = None) -> int:
    """Tokens whose keys and values exist at once: the widest range of whole tiles that a tile sees.

    ``engine/sweep/tile_pass.py:Visible.capacity``, for one document that fills the window.
    """
    if sliding_window is None and group_size is None:
        return context
    widest = 0
    for start in range(0, context, tile):
        if sliding_window is not None:
            first = max(0, start - (sliding_window - 1))
        else:
            assert group_size is not None
            plain = start // group_size * group_size
            shifted = max(0, (start + group_size // 2) // group_size * group_size - group_size // 2)
            first = min(plain, shifted)
        widest = max(widest, min(start + tile, context) - first // tile * tile)
    return widest


def layer_windows(shape: ModelShape, settings: PlanSettings) -> Iterator[int]:
    """Yield the tokens whose keys exist at once, for each different kind of layer."""
    tile, group = settings.tile_tokens(shape), settings.effective_group_size
    for window in set(shape.windows):
        yield window_tokens(settings.context, tile, group_size=None if window else group, sliding_window=window)


@dataclass(frozen=True)
class TileBytes:
    """Bytes of one tile's activations at different moments.

    Attributes:
        forward: without a graph, between gate and down.
        mlp: in backward, in the MLP, where most is alive.
        attention: in backward, in the attention, after the MLP has been let go.
    """

    forward: int
    mlp: int
    attention: int


def tile_bytes(shape: ModelShape, settings: PlanSettings, *, tokens: int) -> TileBytes:
    """Count the activations of a tile of ``tokens`` tokens, all rows of the batch together, in the layers with most."""
    kinds = [_kind_bytes(shape, kind, settings, tokens=tokens) for kind in shape.layer_kinds]
    return TileBytes(*(max(getattr(kind, name) for kind in kinds) for name in ("forward", "mlp", "attention")))


def _kind_bytes(shape: ModelShape, kind: LayerShape, settings: PlanSettings, *, tokens: int) -> TileBytes:
    e, hidden, inner = settings.element_bytes, shape.hidden_size, kind.inner
    queries, keys, family = shape.query_width, shape.kv_width, shape.family
    fused_norms = settings.fuses and not family.wide_norms  # engine/sweep/fused_modules.py
    copies = e < 4 and not fused_norms
    norm_input = 4 * hidden if copies else 0  # the float32 copy that a norm keeps; of float32 there is none
    trained_norm = 0 if fused_norms or not settings.train_norms else (4 if family.wide_norms else e) * hidden
    per_head = (4 if copies else 0) * (queries + keys) if family.qk_norm else 0
    adapters = sum(matrix.adapted(settings.targets) for matrix in kind.matrices)

    # act, up (with gate, if one matrix makes both) and their product; residual, its norm, the last tile's output
    forward = (4 if family.fused else 3) * e * inner + 3 * e * hidden
    held = (
        *(family.norms * (norm_input + trained_norm), 2 * e * hidden),  # norms: what they keep, what two of them make
        *((1 if settings.aliases else 2) * e * hidden, 2 * e * queries),  # input (a copy), output; queries, attention
        4 * shape.num_heads,  # log-sum-exp
        *(per_head, adapters * e * settings.rank, _dropped_bytes(kind, settings)),
    )
    saved = sum(held) + (2 * e * queries if family.gated else 0)  # the gate, and what it makes of attention
    # gate, up, act, product; the gradients of the product and of up. Fused: gate, up; gradients of all three
    product = (5 if settings.fuses and not (family.wide_norms or family.fused) else 6) * e * inner
    if family.norms == 4:  # the norm behind the MLP: five float32 and two narrow temporaries before anything is let go
        after_norm = 4 * e * inner + (5 * 4 + 2 * e) * hidden - 2 * e * hidden
        mlp = saved + max(product - norm_input, after_norm)
    else:
        mlp = saved + product
    if kind.experts is not None:  # a shared product beside them keeps its own
        forward = 3 * e * hidden + int(e * (kind.experts.forward_numbers() + inner))
        mlp = saved + int(e * (kind.experts.backward_numbers() + 4 * inner))
    if kind.delta is not None:
        saved = kind.delta.saved_bytes(hidden, e) + adapters * e * settings.rank + _dropped_bytes(kind, settings)
        forward = max(forward, kind.delta.forward_bytes(hidden, e))
        return TileBytes(tokens * forward, tokens * (saved + max(product, int(BACKWARD_SHARE * saved))), 0)
    attention = norm_input + 5 * e * hidden + (4 * e + 4) * queries + per_head
    return TileBytes(tokens * forward, tokens * mlp, tokens * attention)


def _dropped_bytes(kind: LayerShape, settings: PlanSettings) -> int:
    """Bytes a token of what dropout keeps for each adapter: its input, and what was dropped (a byte, or a factor).

    Those of the last matrix, down, are gone when most is alive.
    """
    if not settings.dropout:
        return 0
    kept = settings.element_bytes + (1 if settings.device == "cuda" else settings.element_bytes)
    return kept * sum(matrix.in_features * matrix.adapted(settings.targets) for matrix in kind.matrices[:-1])


def border_state_bytes(shape: ModelShape, settings: PlanSettings) -> int:
    """Bytes of the states that tiles hand on, saved at each border until backward (``recurrent_state.py``)."""
    borders = -(-settings.context // settings.tile_tokens(shape)) - 1
    recurrent = [kind for kind in shape.layer_kinds if kind.delta is not None]
    states = sum(kind.count * kind.delta.state_bytes(settings.element_bytes) for kind in recurrent if kind.delta)
    return borders * settings.batch_size * states


def attention_kernel_bytes(shape: ModelShape, settings: PlanSettings) -> int:
    """Bytes that a CUDA kernel's backward adds: gradients of a block of keys and values, once per query head."""
    if settings.device == "cpu":
        return 0
    return min(KEY_BLOCK, settings.context) * settings.batch_size * 2 * shape.query_width * settings.element_bytes


def loss_bytes(shape: ModelShape, settings: PlanSettings, *, gradient: bool) -> int:
    """Bytes of a tile of logits and of its temporaries (``engine/loss/logits.py``)."""
    e, words = settings.element_bytes, shape.vocab_size
    elements = LOGITS[settings.device]
    tokens = max(128, min(1024, elements // words))
    words = min(words, elements // tokens)
    tokens = min(tokens, settings.context * settings.batch_size)
    narrow = e if e < 4 else 0
    if not gradient:
        per_word = 8  # float32 logits and the exponentials of their sum
    elif shape.softcap:
        per_word = 8 + narrow  # probabilities, the cap's slope, the narrow copy that meets the matrix
    else:
        per_word = e if settings.fuses else 4 + narrow
    # beside the logits the last norm: what it is given and makes, in both directions, and float32 copies of that
    return tokens * (words * per_word + shape.hidden_size * (4 * e + 6 * 4))


def saved_attention_bytes(shape: ModelShape, settings: PlanSettings) -> tuple[int, int]:
    """Bytes of attention outputs saved from forward to backward, as far as their budget goes (``saved_attention.py``).

    Returns: those of the first layer, which is served first and differentiated last; those of all others.
    """
    tokens = settings.context * settings.batch_size
    layer = tokens * (settings.element_bytes * shape.query_width + 4 * shape.num_heads)
    allowed = SAVED_ATTENTION_BYTES[settings.device] if settings.saved_attention is None else settings.saved_attention
    first = min(allowed, layer)
    return first, min(allowed, shape.num_layers * layer) - first


def saved_products_bytes(shape: ModelShape, settings: PlanSettings) -> tuple[int, int]:
    """Bytes of linear layers' results saved from forward to backward (``saved_products.py``), first layers first.

    Returns: all of them; the last layer's share, which is taken up by its tile when backward begins.
    """
    tokens = settings.context * settings.batch_size
    unread = 1 if shape.family.norms == 2 else 0  # the last of a layer (``unread_product.py``)
    widths = []
    for kind in shape.layer_kinds:
        saved = kind.matrices[: len(kind.matrices) - (0 if kind.experts is not None else unread)]
        widths.append(sum(matrix.out_features * matrix.count for matrix in saved if matrix.adapted(settings.targets)))
    layer = tokens * settings.element_bytes * max(widths)
    total = min(settings.saved_products, shape.num_layers * layer)
    return total, max(0, total - (shape.num_layers - 1) * layer)


def bookkeeping_bytes(shape: ModelShape, settings: PlanSettings) -> int:
    """Bytes of what describes the tokens: ids, labels, positions, rotary tables, the schedule."""
    tokens = settings.context * settings.batch_size
    rotary = shape.rotary_tables * 2 * settings.element_bytes * shape.head_dim * settings.context
    classes = 2 if settings.attention == "shifted" else 1
    return rotary + tokens * (3 * 8 + 3 * 8 + 4 * classes)
