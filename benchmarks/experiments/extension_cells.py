"""The cells of experiment 2 (``extension.py``), the most telling first: what there is no time for stands last."""

from collections.abc import Iterator, Sequence

from benchmarks.experiments.cells import Settings

NATIVE, BUCKET = 8192, 2048
ROPES = ("none", "yarn", "linear", "ntk", "theta")
TRAINED_READ = 12_288  # of the document, after a training: two thirds of the price of 16,384
LORA, NORMS, EMBEDDINGS = "LoRA", "LoRA + norms", "LoRA + norms + embeddings"  # what is trained
FINISHED = "shifted, then exact"  # the last quarter of the steps


def positions(context: int, document: str) -> Iterator[Settings]:
    """Every scaling of the positions, without training."""
    for rope in ROPES:
        yield {"part": "positions", "rope": rope, "context": context, "document": document}


def short_context(context: int, document: str) -> Iterator[Settings]:
    """What a scaling costs where none is needed, without reading farther."""
    for rope in ROPES:
        yield {"part": "positions", "rope": rope, "context": context, "document": document, "tokens": BUCKET}


def training(*, context: int, window: int, steps: int, document: str, tokens: int) -> Iterator[Settings]:
    """Ingredients of a training, the most telling first."""
    size = {"context": context, "window": window, "steps": steps, "document": document, "tokens": tokens}
    for rope, trained, attention, seed in (
        ("linear", LORA, "exact", 0),
        ("linear", LORA, "shifted", 0),
        ("linear", NORMS, "exact", 0),
        ("yarn", LORA, "exact", 0),
        ("yarn", NORMS, "exact", 0),
        ("linear", LORA, "exact", 1),
        ("linear", NORMS, "exact", 1),
        ("linear", LORA, "shifted", 1),
        ("linear", EMBEDDINGS, "exact", 0),
        ("linear", LORA, FINISHED, 0),
        ("yarn", LORA, "shifted", 0),
        ("linear", EMBEDDINGS, "exact", 1),
        ("linear", EMBEDDINGS, "shifted", 0),
        ("yarn", EMBEDDINGS, "exact", 0),
        ("linear", LORA, FINISHED, 1),
    ):
        yield {"part": "training", "rope": rope, "trained": trained, "attention": attention, "seed": seed, **size}


def retrieval(rope: str, context: int, length: int, depths: Sequence[float], trials: Sequence[int]) -> Settings:
    """Pass keys; fewer trials where one must read the whole text again."""
    return {
        "part": "passkey",
        "rope": rope,
        "context": context,
        "length": length,
        "depths": list(depths),
        "trials": list(trials),
    }


def all_cells() -> Iterator[Settings]:
    """All of it, the most telling first: a run may be broken off at any time."""
    near, far = 2 * NATIVE, 4 * NATIVE
    trainings = list(training(context=near, window=2048, steps=8, document="tarfile", tokens=TRAINED_READ))
    yield from short_context(near, "tarfile")
    yield from short_context(far, "tarfile")
    yield from trainings[:7]
    yield from positions(near, "tarfile")
    yield from (retrieval(rope, near, 12_288, (0.5, 1.0), (1, 5)) for rope in ("yarn", "none"))
    yield from trainings[7:10]
    yield from (retrieval(rope, near, 4096, (0.0, 0.5, 1.0), (2, 2, 5)) for rope in ("yarn", "none", "linear"))
    yield from trainings[10:]
    yield from positions(far, "turtle")
    yield from positions(near, "turtle")
    yield retrieval("linear", near, 12_288, (0.5, 1.0), (1, 5))


def quick_cells() -> Iterator[Settings]:
    yield {"part": "positions", "rope": "yarn", "context": 2 * NATIVE, "document": "tarfile", "tokens": 512}
    size = {"context": 2 * NATIVE, "window": 256, "steps": 2, "document": "tarfile", "tokens": 512}
    recipe = {"rope": "linear", "trained": EMBEDDINGS, "attention": FINISHED, "seed": 0}
    yield {"part": "training", **recipe, **size}
    yield retrieval("yarn", 2 * NATIVE, 256, (0.5,), (1,))
