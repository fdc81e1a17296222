"""What decoder layers are made of, where they are not all alike: linear layers, stacked experts, and the rest.

A mixture of experts has layers with experts and layers without. Its experts are most of its bytes, and of their
activations a token has as many rows as experts it is sent to (all of them, in Llama-4).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def last_parts(targets: tuple[str, ...]) -> set[str]:
    """Names of layers without the path before them, as adapters are told where to go."""
    return {target.rsplit(".", 1)[-1] for target in targets}


@dataclass(frozen=True)
class Matrix:
    """Some linear layers of one shape: how many, ``out`` x ``in``, with a bias or not.

    Attributes:
        names: what they are called, the last part of their path; each as often as the others.
    """

    out_features: int
    in_features: int
    bias: bool = False
    count: int = 1
    names: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Weights of one of them."""
        return self.out_features * self.in_features

    def adapted(self, targets: str | tuple[str, ...]) -> int:
        """How many get an adapter: all, or those of the names in ``targets``."""
        if isinstance(targets, str):
            return self.count
        return self.count // len(self.names) * len(set(self.names) & last_parts(targets))


@dataclass(frozen=True)
class Activations:
    """What a row of a family's experts holds at most, in hidden and in inner widths of numbers.

    Counted on one layer, whose tensors were weighed while they lived, with four pairs of widths: the routing weights of
    Mixtral are float32, so that its results and their gradients are.

    Attributes:
        forward_hidden, forward_inner: without a graph; whichever of the two is more, beside one hidden width.
        hidden, inner: in backward.
    """

    forward_hidden: float
    forward_inner: float
    hidden: float
    inner: float


ACTIVATIONS = {
    "mixtral": Activations(5.8, 4, 9.5, 4),
    "qwen3_moe": Activations(3.5, 4, 5.5, 4),
    "gpt_oss": Activations(4.5, 7, 5.5, 7),
    "llama4_text": Activations(4.5, 4, 5.5, 6),
}


@dataclass(frozen=True)
class Experts:
    """The stacked experts of a layer: a gated product each.

    Attributes:
        count: E.
        top_k: of them, a token is sent to.
        hidden, inner: widths.
        activations: what a row costs.
        transposed: stored ``[E, in, out]``.
        biased: both products have a bias an expert.
        packed: stored in few bits where linear layers are; False for a family that multiplies them by itself.
    """

    count: int
    top_k: int
    hidden: int
    inner: int
    activations: Activations
    transposed: bool = False
    biased: bool = False
    packed: bool = True

    @property
    def matrices(self) -> tuple[Matrix, Matrix]:
        """The two weights of an expert, as they are stored."""
        sizes = ((2 * self.inner, self.hidden), (self.hidden, self.inner))
        return tuple(Matrix(*(size[::-1] if self.transposed else size)) for size in sizes)  # type: ignore[return-value]

    @property
    def numel(self) -> int:
        """Weights of all experts, without biases."""
        return self.count * sum(matrix.numel for matrix in self.matrices)

    @property
    def biases(self) -> int:
        """Biases of all experts."""
        return self.count * (2 * self.inner + self.hidden) if self.biased else 0

    @property
    def rows(self) -> int:
        """Rows of activations that a token has in the experts."""
        return self.top_k if self.packed else self.count

    def forward_numbers(self) -> float:
        """Numbers that a token of a tile holds at most in a forward pass that keeps nothing."""
        rows, widths = self.rows, self.activations
        return rows * max(widths.forward_hidden * self.hidden, self.hidden + widths.forward_inner * self.inner)

    def backward_numbers(self) -> float:
        """Numbers that a token of a tile holds at most in backward: what is kept, and gradients."""
        return self.rows * (self.activations.hidden * self.hidden + self.activations.inner * self.inner)


@dataclass(frozen=True)
class LayerShape:
    """Layers that are alike.

    Attributes:
        count: how many.
        matrices: linear layers.
        inner: width of the widest gated product of linear layers; 0 where there is none.
        experts: stacked experts, if it has any.
        dense_params: other parameters, in the model's dtype: routers, sinks; norms are not among them.
    """

    count: int
    matrices: tuple[Matrix, ...]
    inner: int
    experts: Experts | None = None
    dense_params: int = 0

    @property
    def linear_params(self) -> int:
        """Weights of the linear layers of one of them."""
        return sum(matrix.numel * matrix.count for matrix in self.matrices)

    @property
    def num_params(self) -> int:
        """All parameters of one of them, without norms."""
        biases = sum(matrix.out_features * matrix.count for matrix in self.matrices if matrix.bias)
        experts = 0 if self.experts is None else self.experts.numel + self.experts.biases
        return self.linear_params + biases + experts + self.dense_params


def gated_product(hidden: int, inner: int) -> tuple[Matrix, ...]:
    """The three linear layers of a gated product."""
    return (
        Matrix(inner, hidden, count=2, names=("gate_proj", "up_proj")),
        Matrix(hidden, inner, names=("down_proj",)),
    )


def mixture_kinds(
    model_type: str, values: Mapping[str, Any], attention: tuple[Matrix, ...], *, hidden: int, num_layers: int
) -> tuple[LayerShape, ...]:
    """The kinds of layers of a mixture of experts.

    Args:
        model_type: one of ``MIXTURES``.
        values: of its configuration, defaults included.
        attention: the linear layers of its attention.
    """
    inner, top_k = int(values.get("intermediate_size") or 0), int(values["num_experts_per_tok"])
    if model_type in ("mixtral", "gpt_oss"):
        count, oss = int(values["num_local_experts"]), model_type == "gpt_oss"
        experts = Experts(count, top_k, hidden, inner, ACTIVATIONS[model_type], transposed=oss, biased=oss)
        dense = count * hidden + (count + int(values["num_attention_heads"]) if oss else 0)  # its bias and sinks
        return (LayerShape(num_layers, attention, 0, experts, dense),)
    if model_type == "qwen3_moe":
        count, step = int(values.get("num_local_experts") or values["num_experts"]), int(values["decoder_sparse_step"])
        only = set(values.get("mlp_only_layers") or ())
        sparse = sum(layer not in only and count > 0 and (layer + 1) % step == 0 for layer in range(num_layers))
        experts = Experts(count, top_k, hidden, int(values["moe_intermediate_size"]), ACTIVATIONS[model_type])
        kinds = (
            LayerShape(sparse, attention, 0, experts, count * hidden),
            LayerShape(num_layers - sparse, (*attention, *gated_product(hidden, inner)), inner),
        )
    else:
        assert model_type == "llama4_text", model_type
        count, step = int(values["num_local_experts"]), int(values["interleave_moe_layer_step"])
        chosen = values.get("moe_layers")
        sparse = len(chosen if chosen is not None else range(step - 1, num_layers, step))
        experts = Experts(count, top_k, hidden, inner, ACTIVATIONS[model_type], transposed=True, packed=False)
        wide = int(values["intermediate_size_mlp"])
        kinds = (
            LayerShape(sparse, (*attention, *gated_product(hidden, inner)), inner, experts, count * hidden),
            LayerShape(num_layers - sparse, (*attention, *gated_product(hidden, wide)), wide),
        )
    return tuple(kind for kind in kinds if kind.count)


MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text")
