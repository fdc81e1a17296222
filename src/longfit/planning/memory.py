"""The bytes of a run by component, phase and place.

    load        weights arrive, quantised one by one
    forward     layer inputs pile up where they are offloaded; one layer's keys and values
    loss        a tile of logits
    backward    its first layer: keys, values, their float32 gradients, a tile's local graph; all that forward left
    last layer  the same, when what forward left is gone and all gradients are there
    embedding   the end of backward, where the gradient of a trained embedding is made
    step        gradients and optimiser state
    evaluation  a forward pass that keeps nothing
    save        copies on their way to the disk
    merge       the dense model, in host memory

A place's peak is the sum over its components in its worst phase. On a CPU the accelerator *is* the host. The plan is of
what is allocated; what an allocator adds (caching, rounding, fragments) is one component of its own, so that it can be
measured and argued about.
"""

from dataclasses import dataclass, field

from longfit.planning import constant_bytes, devices, per_token_bytes
from longfit.planning.components import Component
from longfit.planning.disk_bytes import run_bytes
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import ModelShape

PHASES = ("load", "forward", "loss", "backward", "last layer", "embedding", "step", "evaluation", "save", "merge")
TRAINING = PHASES[1:-1]
LAYERS = ("backward", "last layer")
PLACES = ("accelerator", "host", "disk")

TILE = "activations of a tile"

CUDA_CONTEXT_BYTES = 750 << 20
"""CUDA context, libraries and the workspaces of matrix products; derived, not measured by this project."""

HOST_BASE_BYTES = 640 << 20
"""Python with torch, transformers and PEFT, the tokenizer, and what loads when first used: 580 MB were resident in one
script on Linux (``benchmarks/plan_cpu.py``); a run imports a little more, so this is an estimate on the safe side."""

FRAGMENTS = 0.03
"""Share of what is allocated that torch's CUDA allocator adds: it rounds and leaves gaps."""

HEAP_HOLES = 0.7
"""Share of a tile's activations that glibc's heap adds while layers are differentiated, in holes too small for the next
request. Measured apart from any plan: the backward pass of eight layers of SmolLM2-135M over one tile of 4,096 tokens
(activations of 118 MB) took 236 MB as it is, and 154 MB with each block of a mebibyte or more in a mapping of its own,
which leaves no holes and takes a quarter longer. Other phases begin with the holes given back
(``engine/host_memory.py``)."""

MODULE_BYTES = 60_000
"""Python's objects for the adapter of one layer: 12.4 MB for the 210 of SmolLM2-135M, whatever their rank."""


@dataclass(frozen=True)
class MemoryPlan:
    """All components of a run.

    Attributes:
        components: in the order in which they are explained.
        tile: tokens at once.
    """

    components: tuple[Component, ...]
    tile: int
    phases: tuple[str, ...] = field(default=TRAINING)

    def bytes_in(self, place: str, phase: str) -> int:
        """Bytes at a place in a phase."""
        return sum(c.by_phase.get(phase, 0) for c in self.components if c.place == place)

    def peak_phase(self, place: str) -> str:
        """The phase of training, loading included, in which a place holds most."""
        return max(("load", *self.phases), key=lambda phase: self.bytes_in(place, phase))

    def peak(self, place: str) -> int:
        """Most bytes at a place while training, loading included."""
        return self.bytes_in(place, self.peak_phase(place))

    def at_peak(self, place: str) -> list[tuple[str, int]]:
        """Names and bytes of what a place holds at its peak, largest first."""
        phase = self.peak_phase(place)
        held: dict[str, int] = {}
        for component in self.components:
            if component.place == place and component.by_phase.get(phase):
                held[component.name] = held.get(component.name, 0) + component.by_phase[phase]
        return sorted(held.items(), key=lambda pair: -pair[1])


def memory_plan(shape: ModelShape, settings: PlanSettings) -> MemoryPlan:
    """Count every byte of a run.

    Args:
        shape: of the model.
        settings: of the run.
    """
    device = "accelerator" if settings.device == "cuda" else "host"
    parts, own = constant_bytes.trained(shape, settings), devices.own_part(settings)
    constant = [*_weights(shape, settings, device), *_learning(shape, settings, parts, device)]
    components = [
        *devices.sharded(constant, shape, settings, device),
        *_sequence(shape, own, device),
        *devices.halo(shape, settings, device),
        *_tiles(shape, own, device),
        *_files(settings, parts),
        *_replicas(shape, settings, parts, device),
    ]
    components += _framework(components, settings)
    kept = [component for component in components if component.largest]
    phases = TRAINING if settings.evaluates else tuple(phase for phase in TRAINING if phase != "evaluation")
    return MemoryPlan(tuple(kept), own.tile_tokens(shape), phases)


def _in(phases: tuple[str, ...], num_bytes: int) -> dict[str, int]:
    return dict.fromkeys(phases, num_bytes)


def _weights(shape: ModelShape, settings: PlanSettings, device: str) -> list[Component]:
    base = constant_bytes.weights(shape, settings)
    always = ("load", *TRAINING)
    whole = [kind.experts for kind in shape.layer_kinds if kind.experts is not None]
    stacked = [experts.count * matrix.numel for experts in whole for matrix in experts.matrices]  # arrive as one
    largest = max(*(matrix.numel for matrix in (*shape.all_matrices, *shape.tower)), *stacked)
    vocabulary = shape.vocab_size * shape.hidden_size
    arriving = settings.element_bytes * max(vocabulary, largest) + 4 * largest  # a tensor read, and quantised
    layers = {"none": "linear layers", "int8": "8-bit layers"}.get(settings.quant, "4-bit layers")
    transient = [
        Component("tensors being loaded", device, {"load": arriving}),
        Component("dense model being merged", "host", {"merge": 2 * shape.num_params + 4 * largest}),
    ]
    if settings.stream != "none":
        outside = "disk" if settings.stream == "file" else "host"
        frozen = base.layers + base.vocabulary
        slots = min(2 * base.largest_unit, frozen)
        return [
            Component("slots for streamed weights", device, _in(TRAINING, slots)),
            Component("streamed weights", outside, _in(TRAINING, frozen)),
            Component("weights before they are streamed", device, {"load": frozen}),
            Component("norms and the rest", device, _in(always, base.rest)),
            *transient,
        ]
    return [
        Component(layers, device, _in(always, base.layers)),
        Component("embedding and output matrix", device, _in(always, base.vocabulary)),
        Component("norms and the rest", device, _in(always, base.rest)),
        *transient,
    ]


def _learning(
    shape: ModelShape, settings: PlanSettings, parts: constant_bytes.TrainedParameters, device: str
) -> list[Component]:
    loss_tile = per_token_bytes.loss_bytes(shape, settings, gradient=True)
    grads = constant_bytes.gradients(shape, parts, settings, loss_tile=loss_tile)
    early = grads.kept if settings.gradient_accumulation > 1 else 0
    made = {
        **{"forward": early, "loss": early + grads.loss, "backward": early + grads.first},
        **{
            "last layer": early + grads.tiles,
            "embedding": early + grads.whole,
            **_in(("step", "evaluation", "save"), grads.kept),
        },
    }
    state = constant_bytes.page_bytes(parts, settings)
    resident = state if settings.budget is None else min(state, settings.budget)
    below = "disk" if settings.file or settings.device == "cpu" else "host"
    adapters = 4 * parts.adapter_params
    whole = settings.element_bytes * parts.whole_params
    return [
        Component("adapters", device, _in(TRAINING, adapters)),
        Component("modules of adapters", "host", _in(TRAINING, MODULE_BYTES * _num_adapted(shape, settings))),
        Component("trained copies of embeddings and norms", device, _in(TRAINING, whole)),
        Component("gradients", device, made),
        Component("optimiser state", device, _in(TRAINING, resident)),
        Component("optimiser state, paged out", below, _in(TRAINING, state - resident)),
        Component("optimiser state being saved", "host", {"save": constant_bytes.state_bytes(parts, settings)}),
    ]


def _num_adapted(shape: ModelShape, settings: PlanSettings) -> int:
    linears = sum(
        kind.count * matrix.adapted(settings.targets) for kind in shape.layer_kinds for matrix in kind.matrices
    )
    experts = sum(2 * kind.count for kind in shape.layer_kinds if kind.experts is not None and settings.experts)
    return linears + experts


def _replicas(
    shape: ModelShape, settings: PlanSettings, parts: constant_bytes.TrainedParameters, device: str
) -> list[Component]:
    """What torch's DistributedDataParallel adds: buckets as large as all gradients, and a first broadcast."""
    if settings.processes == 1 or settings.shard > 1:
        return []
    buckets = 4 * parts.adapter_params
    buckets += settings.element_bytes * parts.whole_params
    base = constant_bytes.weights(shape, settings)
    sent = min(constant_bytes.BROADCAST_BYTES, base.layers + base.vocabulary + base.rest)
    return [Component("gradient buckets of all replicas", device, {"load": buckets + sent, **_in(TRAINING, buckets)})]


def _sequence(shape: ModelShape, settings: PlanSettings, device: str) -> list[Component]:
    """What every token of the context costs."""
    tokens, e = settings.context * settings.batch_size, settings.element_bytes
    hidden = tokens * shape.hidden_size * e
    place = {"device": device, "ram": "host", "pinned": "host", "file": "disk"}[settings.offload]
    inputs = shape.num_layers * hidden
    attends = any(kind.delta is None for kind in shape.layer_kinds)
    keys = max(per_token_bytes.layer_windows(shape, settings)) * settings.batch_size * 2 * shape.kv_width * attends
    several = settings.context > settings.tile_tokens(shape)
    saved = per_token_bytes.saved_attention_bytes(shape, settings)
    products, last = per_token_bytes.saved_products_bytes(shape, settings)
    # The embedding's output stays until the decoder returns; layers write over their input unless it is that input that
    # waits for backward.
    passing = {
        "forward": (1 if settings.aliases else 2) * hidden,
        "loss": hidden,
        **_in((*LAYERS, "embedding"), hidden),
    }
    return [
        Component("layer inputs", place, {**_in(("forward", "loss", "backward"), inputs), "last layer": hidden}),
        Component(
            "states at the borders of tiles",
            place,
            _in(("forward", "loss", "backward"), per_token_bytes.border_state_bytes(shape, settings)),
        ),
        Component("hidden states and their gradient", device, {**passing, "evaluation": 3 * hidden}),
        Component("keys and values", device, _in(("forward", *LAYERS, "evaluation"), keys * e)),
        Component("gradients of keys and values", device, _in(LAYERS, keys * 4 if several else 0)),
        Component(
            "positions, labels, rotary tables",
            device,
            _in(
                ("forward", "loss", *LAYERS, "embedding", "evaluation"),
                per_token_bytes.bookkeeping_bytes(shape, settings),
            ),
        ),
        Component(
            "attention saved for backward",
            device,
            {**_in(("forward", "loss", "backward"), sum(saved)), "last layer": saved[0]},
        ),
        Component(
            "products saved for backward", device, {**_in(("forward", "loss"), products), "backward": products - last}
        ),
    ]


def _tiles(shape: ModelShape, settings: PlanSettings, device: str) -> list[Component]:
    """What exists for one tile."""
    tile = settings.tile_tokens(shape)
    several = settings.context > tile
    bytes_of = per_token_bytes.tile_bytes(shape, settings, tokens=tile * settings.batch_size)
    attention = bytes_of.attention + per_token_bytes.attention_kernel_bytes(shape, settings)
    if not several:  # one tile: the gradients of keys and values are made when the MLP has been let go
        attention += 4 * max(per_token_bytes.layer_windows(shape, settings)) * settings.batch_size * 2 * shape.kv_width
    backward = max(bytes_of.mlp, attention)
    tile_loss = per_token_bytes.loss_bytes(shape, settings, gradient=True)
    evaluated = per_token_bytes.loss_bytes(shape, settings, gradient=False)
    matmul = constant_bytes.matmul_bytes(shape, settings)
    return [
        Component(
            TILE,
            device,
            {"forward": bytes_of.forward, **_in(LAYERS, backward), "evaluation": bytes_of.forward},
        ),
        Component("a tile of logits", device, {"loss": tile_loss, "evaluation": evaluated}),
        Component("de-quantised weight", device, _in(("forward", *LAYERS, "evaluation"), matmul)),
    ]


def _files(settings: PlanSettings, parts: constant_bytes.TrainedParameters) -> list[Component]:
    saved = 4 * parts.adapter_params
    whole = parts.whole_params - (parts.vocabulary if parts.rows_only else 0)
    saved += settings.element_bytes * whole
    state = constant_bytes.state_bytes(parts, settings)
    written = run_bytes(trained=saved, state=state, keep=settings.keep_checkpoints, best=settings.keeps_best)
    return [
        Component("tensors being saved", "host", {"save": saved}),
        Component("checkpoints and adapter", "disk", _in(TRAINING, written)),
    ]


def _framework(components: list[Component], settings: PlanSettings) -> list[Component]:
    always = ("load", *TRAINING, "merge")
    found = [Component("Python and its libraries", "host", _in(always, HOST_BASE_BYTES))]
    if settings.device == "cpu":
        tile = next(component for component in components if component.name == TILE)
        holes = {phase: int(HEAP_HOLES * tile.by_phase[phase]) for phase in LAYERS}
        return [*found, Component("holes of the heap", "host", holes)]
    here = [component for component in components if component.place == "accelerator"]
    gaps = {phase: int(FRAGMENTS * sum(c.by_phase.get(phase, 0) for c in here)) for phase in PHASES}
    return [
        *found,
        Component("CUDA context and libraries", "accelerator", _in(always, CUDA_CONTEXT_BYTES)),
        Component("gaps of the allocator", "accelerator", gaps),
    ]
