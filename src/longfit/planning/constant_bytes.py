"""Bytes that do not grow with the context: weights, adapters, their gradients and optimiser state, and their copies.

QLoRA, section 3: the base in 4 bits with its constants quantised again (4.127 bits a parameter), adapters and their
state in the precision that learning needs. Each function follows the file that allocates, named in its docstring.
"""

from dataclasses import dataclass

from longfit.engine.working_memory import GRADIENT_ROWS
from longfit.kernels.dense_weight_bytes import HELD_BYTES, TILE_BYTES
from longfit.optim.state_sizes import PAGE_BYTES, SMALLEST_8BIT_NUMEL
from longfit.planning.layer_kinds import LayerShape, Matrix, last_parts
from longfit.planning.settings import PlanSettings, UnplannedError
from longfit.planning.shapes import ModelShape

ABSMAX_BLOCK_SIZE = 256
MOMENT_BLOCK_SIZE = 256  # BLOCK_SIZE of numerics/adamw.py, which imports torch


def _blocks(numel: int, block_size: int) -> int:
    return -(-numel // block_size)


def packed_bytes(matrix: Matrix, settings: PlanSettings) -> int:
    """Bytes of one quantised weight.

    In 4 bits: codes, block constants and what all rows share (``numerics/row_format.py``). In 8 bits: codes and a
    constant a row (``layers/linear8bit.py``).
    """
    if settings.quant == "int8":
        return matrix.numel + 4 * matrix.out_features
    whole_rows = matrix.in_features % settings.block_size == 0
    rows = matrix.out_features if whole_rows else 1
    columns = matrix.numel // rows
    blocks = _blocks(columns, settings.block_size)
    row = (columns + 1) // 2 + blocks * (1 if settings.double_quant else 4)
    shared = 4 * (_blocks(rows * blocks, ABSMAX_BLOCK_SIZE) + 1) if settings.double_quant else 0
    return rows * row + shared


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a loaded model.

    Attributes:
        layers: 4-bit (or dense) linear layers and experts, with their biases; routers.
        vocabulary: embedding and output matrix.
        rest: norms, and what of a vision tower is not linear.
        largest_unit: the largest thing that comes and goes at once when weights are streamed.
    """

    layers: int
    vocabulary: int
    rest: int
    largest_unit: int


def weights(shape: ModelShape, settings: PlanSettings) -> WeightBytes:
    """Count the base model's bytes (``model/hf_quantizer.py``: the output matrix stays dense)."""
    element = settings.element_bytes

    def stored(matrix: Matrix) -> int:
        bias = matrix.out_features * element if matrix.bias else 0
        packed = settings.quant != "none" and matrix.in_features % 2 == 0
        return (packed_bytes(matrix, settings) if packed else matrix.numel * element) + bias

    def layer(kind: LayerShape) -> int:
        found = sum(stored(matrix) * matrix.count for matrix in kind.matrices) + element * kind.dense_params
        if (experts := kind.experts) is None:
            return found
        if not experts.packed:
            return found + element * (experts.numel + experts.biases)
        return found + experts.count * sum(stored(m) for m in experts.matrices) + element * experts.biases

    tower = sum(stored(matrix) * matrix.count for matrix in shape.tower)
    vocabulary = shape.vocab_params * element
    return WeightBytes(
        layers=sum(kind.count * layer(kind) for kind in shape.layer_kinds) + tower,
        vocabulary=vocabulary,
        rest=(shape.norm_params + shape.tower_params) * element,
        largest_unit=max(*map(layer, shape.layer_kinds), shape.vocab_size * shape.hidden_size * element),
    )


BROADCAST_BYTES = 250 << 20
"""What torch's DistributedDataParallel sends at once when it makes all replicas alike."""


@dataclass(frozen=True)
class TrainedParameters:
    """What is trained.

    Attributes:
        adapters: sizes of the decoder's adapter matrices, all float32.
        vocabulary, norms: parameters trained whole, in the dtype of the base.
        norm_sizes: of each norm that learns.
        head: whether the output matrix is among them, because it is the embedding matrix.
        rows_only: few rows of it learn: PEFT makes a copy and a gradient of all, the optimiser has no state.
    """

    adapters: tuple[int, ...]
    vocabulary: int
    norm_sizes: tuple[int, ...]
    head: bool
    rows_only: bool = False

    @property
    def adapter_params(self) -> int:
        """Adapter parameters that learn."""
        return sum(self.adapters)

    @property
    def whole_params(self) -> int:
        """Parameters that learn and are trained whole."""
        return self.vocabulary + sum(self.norm_sizes)

    @property
    def num_params(self) -> int:
        """Parameters that learn."""
        return self.adapter_params + self.whole_params


def require_known_targets(shape: ModelShape, settings: PlanSettings) -> None:
    """Raise UnplannedError for an adapter on the output matrix, or on what is no linear layer of the model."""
    if isinstance(settings.targets, str):
        return
    known = dict.fromkeys(name for kind in shape.layer_kinds for matrix in kind.matrices for name in matrix.names)
    unknown = sorted(last_parts(settings.targets) - known.keys())
    if unknown:
        raise UnplannedError(
            f"targets {', '.join(unknown)}: an adapter there is not planned; planned are {', '.join(known)}"
        )


def trained(shape: ModelShape, settings: PlanSettings) -> TrainedParameters:
    """Count trained parameters (``model/adapters.py``: adapters on every linear layer but the output matrix).

    Raises: UnplannedError: ``targets`` names a layer that a plan does not know.
    """
    require_known_targets(shape, settings)
    adapters = tuple(
        size * settings.rank
        for kind in shape.layer_kinds
        for matrix in kind.matrices
        for size in (matrix.in_features, matrix.out_features)
        for _ in range(matrix.adapted(settings.targets) * kind.count)
    )
    if settings.experts:
        adapters += tuple(
            kind.experts.count * size * settings.rank
            for kind in shape.layer_kinds
            if kind.experts is not None
            for matrix in kind.experts.matrices
            for size in (matrix.in_features, matrix.out_features)
            for _ in range(kind.count)
        )
    norms: tuple[int, ...] = ()
    if settings.train_norms:
        per_head = (shape.head_dim,) * (2 if shape.family.qk_norm else 0)
        norms = ((shape.hidden_size,) * shape.family.norms + per_head) * shape.num_layers + (shape.hidden_size,)
    rows_only = settings.train_new_tokens
    vocabulary = shape.vocab_params if rows_only else shape.vocab_size * shape.hidden_size * settings.train_embeddings
    head = rows_only or (shape.tied and settings.train_embeddings)
    return TrainedParameters(adapters, vocabulary, norms, head=head, rows_only=rows_only)


def state_bytes(parts: TrainedParameters, settings: PlanSettings) -> int:
    """Bytes of all optimiser state, as a checkpoint has it (``optim/page_layout.py``)."""

    def bytes_of(numel: int, master: int) -> int:
        eight_bit = settings.optim == "adamw8bit" and numel >= SMALLEST_8BIT_NUMEL
        moments = 2 * numel + 8 * _blocks(numel, MOMENT_BLOCK_SIZE) if eight_bit else 8 * numel
        return moments + master * numel

    master = 0 if settings.element_bytes == 4 else 4
    whole = (*(() if parts.rows_only else (parts.vocabulary,)), *parts.norm_sizes)
    return sum(bytes_of(numel, 0) for numel in parts.adapters) + sum(bytes_of(numel, master) for numel in whole)


def page_bytes(parts: TrainedParameters, settings: PlanSettings) -> int:
    """Bytes of all optimiser state in whole pages, wherever they are."""
    return _blocks(state_bytes(parts, settings), PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True)
class Gradients:
    """Bytes of gradients at the moments when they are most.

    Attributes:
        loss: in the loss, that of an output matrix which is the trained embedding: a float32 sum, and what is added to
            it or becomes of it.
        first: while the first layer is differentiated: its adapters and norms, and the output matrix' share waiting.
        tiles: while the last one is: those of all layers.
        whole: when backward ends: the embedding's own share has come, before the two are one.
        kept: ``.grad`` of everything, until the next step begins.
    """

    loss: int
    first: int
    tiles: int
    whole: int
    kept: int


def gradients(shape: ModelShape, parts: TrainedParameters, settings: PlanSettings, *, loss_tile: int) -> Gradients:
    """Count gradients: adapters in float32, the rest in the dtype of the base, or in float32 where that is float16.

    Args:
        loss_tile: bytes of a tile of logits, which are gone when the output matrix' float32 sum becomes narrow.
    """
    e = settings.element_bytes
    collected, narrow = (4, e) if settings.dtype == "float16" else (e, 0)  # training/loss_scale.py
    product = min(GRADIENT_ROWS, shape.vocab_size) * shape.hidden_size * (e + (4 if settings.device == "cpu" else 0))
    steady = 4 * parts.adapter_params + collected * sum(parts.norm_sizes)
    share = collected * parts.vocabulary
    waiting = share if parts.head else 0
    return Gradients(
        loss=(4 * parts.vocabulary + max(product, share - loss_tile)) if parts.head else 0,
        first=steady // shape.num_layers + waiting,
        tiles=steady + waiting,
        whole=steady + waiting + share + narrow * parts.vocabulary,
        kept=steady + share,
    )


def matmul_bytes(shape: ModelShape, settings: PlanSettings) -> int:
    """Bytes of de-quantised weights while they multiply.

    In 4 bits a tile on a CPU, a layer elsewhere (kernels/workspace.py); in 8 bits one weight at a time.
    """
    if settings.quant == "none":
        return 0
    if settings.quant == "int8":
        return settings.element_bytes * max(matrix.numel for matrix in shape.all_matrices)
    if settings.device == "cpu":
        return TILE_BYTES
    e, largest = settings.element_bytes, max(matrix.numel for matrix in shape.all_matrices)
    layer = e * max(
        kind.linear_params + (0 if kind.experts is None else kind.experts.numel) for kind in shape.layer_kinds
    )
    return layer if layer <= HELD_BYTES else HELD_BYTES + e * largest
