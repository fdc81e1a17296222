"""What several devices change in the plan of one of them, and the bytes that it sends.

    sequence    a device has its part of the tokens, and for a while the keys and values that it sees of the others'
    shard       a device has its part of weights, gradients and optimiser state, and two gathered layers; what is
                outside of the layers is gathered for the whole pass. Quantised layers arrive as the own rows; what is
                dense is whole while loading

The plan is of the device that holds most: with exact attention that is the one with the last tokens of a window, which
sees all keys.
"""

from collections.abc import Sequence
from dataclasses import replace

from longfit.parallel import traffic
from longfit.planning import constant_bytes
from longfit.planning.components import Component
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import ModelShape

PASSES = ("forward", "loss", "backward", "last layer", "embedding", "evaluation")
"""Phases in which what is outside of the layers is gathered."""

LAYER_PASSES = ("forward", "backward", "last layer", "evaluation")
"""Phases in which layers are gathered, one in use and the next on its way."""

SHARED = (
    *("4-bit layers", "8-bit layers", "linear layers", "embedding and output matrix", "adapters"),
    *("trained copies of embeddings and norms", "gradients", "optimiser state", "optimiser state, paged out"),
)
"""Components of which a device has its part."""

LOADED_BY_ROWS = ("4-bit layers", "8-bit layers")
"""Those of which it never has more (``model/own_rows.py``), unless the checkpoint is quantised already."""


def own_part(settings: PlanSettings) -> PlanSettings:
    """The settings of a device's own tokens: a part of the context, groups as long as before."""
    if settings.sequence == 1:
        return settings
    context = -(-settings.context // settings.sequence)
    return replace(settings, context=context, sequence=1, group_size=settings.effective_group_size)


def seen_of_others(shape: ModelShape, settings: PlanSettings) -> int:
    """Tokens of other devices whose keys a device sees at most, in any layer."""
    if settings.sequence == 1:
        return 0
    others = settings.context - -(-settings.context // settings.sequence)
    group = settings.effective_group_size
    reach = [window or (others if group is None else group) for window in set(shape.windows)]
    return min(others, max(reach))


def halo(shape: ModelShape, settings: PlanSettings, device: str) -> list[Component]:
    """Keys and values of other devices, and in backward their gradients, summed in float32.

    Those that all own tokens see are held once, where attention reads them, and a second time only while they arrive.
    Those over which a window moves are held beside it, and their gradients again on their way back.
    """
    tokens = seen_of_others(shape, settings)
    if not tokens:
        return []
    whole = settings.effective_group_size is None and None in shape.windows
    if whole:  # the window of a device's second stretch holds its first one too
        tokens += settings.context // (2 * settings.sequence)
    numbers, element = tokens * settings.batch_size * 2 * shape.kv_width, settings.element_bytes
    forward, backward = 2 * element * numbers, (element + 4 if whole else 3 * element + 4) * numbers
    phases = {"forward": forward, "evaluation": forward, "backward": backward, "last layer": backward}
    return [Component("keys of other devices and their gradients", device, phases)]


def sharded(components: Sequence[Component], shape: ModelShape, settings: PlanSettings, device: str) -> list[Component]:
    """Divide what is shared, and add what is gathered."""
    if settings.shard == 1:
        return list(components)
    parts = []
    for component in components:
        by_phase = component.by_phase
        if component.name in SHARED:
            late = component.name not in LOADED_BY_ROWS
            by_phase = {p: size if p == "load" and late else -(-size // settings.shard) for p, size in by_phase.items()}
        parts.append(Component(component.name, component.place, by_phase))
    base, trained = constant_bytes.weights(shape, settings), constant_bytes.trained(shape, settings)
    layer = (base.layers + 4 * trained.adapter_params) // shape.num_layers
    whole = base.vocabulary + settings.element_bytes * trained.vocabulary
    layer_gradients = 4 * trained.adapter_params // shape.num_layers
    gathered = dict.fromkeys(PASSES, whole)
    for phase in LAYER_PASSES:
        gathered[phase] += 2 * layer
    for phase in ("backward", "last layer"):
        gathered[phase] += 2 * layer_gradients  # made, and on their way
    return [*parts, Component("gathered weights", device, gathered)]


def sent_bytes(shape: ModelShape, settings: PlanSettings) -> int:
    """Bytes that a device sends in a step: halos, gathered weights, gradients (``parallel/traffic.py``)."""
    if settings.processes == 1:
        return 0
    base, trained = constant_bytes.weights(shape, settings), constant_bytes.trained(shape, settings)
    gradients = 4 * trained.adapter_params + settings.element_bytes * trained.whole_params
    passes = settings.gradient_accumulation
    if settings.shard > 1:
        weights = base.layers + base.vocabulary + gradients
        total = traffic.shard_bytes(weights, gradients, num_devices=settings.shard, num_passes=passes)
        replicas = settings.processes // settings.shard
        total += passes * traffic.replica_bytes(gradients // settings.shard, num_devices=replicas)
    else:
        total = traffic.replica_bytes(gradients, num_devices=settings.processes)
    if settings.sequence == 1:
        return total
    common = {"head_dim": shape.head_dim, "element_bytes": settings.element_bytes, "batch_size": settings.batch_size}
    kv_heads = shape.kv_width // shape.head_dim
    group = settings.effective_group_size
    for window in shape.windows:
        if window is not None:
            sent = traffic.window_bytes(
                num_layers=1, num_kv_heads=kv_heads, window=min(window, settings.context), **common
            )
        elif group is not None:
            sent = traffic.shifted_bytes(num_layers=1, num_kv_heads=kv_heads, group_size=group, **common)
        else:
            sent = traffic.exact_bytes(
                num_layers=1,
                num_kv_heads=kv_heads,
                num_tokens=settings.context,
                num_devices=settings.sequence,
                **common,
            )
        total += passes * sent
    return total
