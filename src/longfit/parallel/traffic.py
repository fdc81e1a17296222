"""Bytes that each device sends in one optimiser step, as formulas; the tests count them on the wire.

With P devices, C = N / P tokens of a window on each, L layers, K key/value heads of D dimensions, and elements of b
bytes, a layer has three exchanges: keys and values forward, again for backward, and their gradients on the way back.

    shifted       3 L x G/2 x K/2 x 2 D b        where borders lie between whole groups of G tokens: half a group of
                                                 half of the heads, whatever N and P
    exact         3 L x 3/4 N (P - 1)/P x K x 2 D b  on average: a device gets the keys before its last token, once
    around a ring 3 L x     N (P - 1)/P x K x 2 D b  and more if gradients travel in float32: never less than that
    replicas      2 (P - 1)/P x gradient bytes   a ring all-reduce of what trains (DDP)
    shards        (P - 1)/P x (2 weight + gradient bytes)   gathered forward and backward, reduced and scattered (FSDP2)

Source of the first two: the count of pieces that ``halo.py`` sends; of the others: the ring algorithms of NCCL.
"""


def shifted_bytes(
    *, num_layers: int, num_kv_heads: int, head_dim: int, group_size: int, element_bytes: int, batch_size: int = 1
) -> int:
    """Bytes that an inner device sends for a window when its borders lie between whole groups.

    A key/value head that both halves of the query heads read (an odd number of them) travels with the shifted half.
    """
    heads = num_kv_heads - num_kv_heads // 2
    return 3 * num_layers * batch_size * (group_size // 2) * heads * 2 * head_dim * element_bytes


def window_bytes(
    *, num_layers: int, num_kv_heads: int, head_dim: int, window: int, element_bytes: int, batch_size: int = 1
) -> int:
    """Bytes that an inner device sends for layers whose queries see ``window`` keys, their own included."""
    return 3 * num_layers * batch_size * (window - 1) * num_kv_heads * 2 * head_dim * element_bytes


def exact_bytes(
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    num_tokens: int,
    num_devices: int,
    element_bytes: int,
    batch_size: int = 1,
) -> int:
    """Mean bytes that a device sends for a window of exact attention whose work is balanced (``halo.py:cut``).

    Device r of P has the segments r and 2 P - 1 - r of 2 P, so it is sent the others before the latter: 2 P - 2 - r.
    """
    others = 3 * num_tokens * (num_devices - 1) // (4 * num_devices)
    return 3 * num_layers * batch_size * others * num_kv_heads * 2 * head_dim * element_bytes


def replica_bytes(gradient_bytes: int, *, num_devices: int) -> int:
    """Bytes that a device sends to add up the gradients of replicas: a ring all-reduce."""
    return 2 * gradient_bytes * (num_devices - 1) // num_devices


def shard_bytes(weight_bytes: int, gradient_bytes: int, *, num_devices: int, num_passes: int) -> int:
    """Bytes that a device sends where ``num_devices`` share one copy of the weights.

    Args:
        weight_bytes: of all that is gathered, frozen and trained: once forward and once backward in each pass.
        gradient_bytes: reduced and scattered once a pass.
        num_passes: micro-batches of the step.
    """
    share = num_devices - 1
    return num_passes * (2 * weight_bytes + gradient_bytes) * share // num_devices
