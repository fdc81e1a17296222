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
class DeltaNet:
    """A gated delta net (Qwen3.5), in place of attention.

    What a token of a tile holds was counted on the meta device with fourteen sets of widths in bfloat16 and fitted: the
    coefficients below meet them within three per cent. It is transformers' own code in torch, which computes in float32
    and in pieces of 64 tokens; kernels that a card may have hold less.
    """

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    kernel: int

    @property
    def matrices(self) -> tuple[tuple[int, str], ...]:
        """Widths of what the hidden state is projected to, and the layers' names."""
        values = self.value_heads * self.value_width
        return (
            (self.conv_width, "in_proj_qkv"),
            (values, "in_proj_z"),
            (self.value_heads, "in_proj_b"),
            (self.value_heads, "in_proj_a"),
        )

    @property
    def conv_width(self) -> int:
        """Channels of the convolution."""
        return 2 * self.key_heads * self.key_width + self.value_heads * self.value_width

    @property
    def dense_params(self) -> int:
        """The convolution, decay and step of each head, and the norm of its values."""
        return self.conv_width * self.kernel + 2 * self.value_heads + self.value_width

    def state_bytes(self, element: int) -> int:
        """What a tile hands to the next: the state of each head in float32, and the convolution's last inputs."""
        states = self.value_heads * self.key_width * self.value_width
        return 4 * states + element * self.conv_width * (self.kernel - 1)

    def forward_bytes(self, hidden: int, element: int) -> int:
        """What a token of a tile holds at most in a forward pass."""
        return self._fitted((4.0, 21.2, 21.6, 3.2, 924, 3400), hidden, element)

    def saved_bytes(self, hidden: int, element: int) -> int:
        """What a token of a tile keeps for backward, norms included, adapters not."""
        return self._fitted((12.9, 42.0, 45.7, 0.6, 268, 8100), hidden, element)

    def _fitted(self, each: tuple[float, ...], hidden: int, element: int) -> int:
        values, repeated = self.value_heads * self.value_width, self.value_heads * self.key_width
        sizes = (hidden, values, repeated, self.key_heads * self.key_width, self.value_heads, 1)
        # in float32 what was narrow is twice as wide: a third of it, as most is float32 anyway
        return int(sum(a * b for a, b in zip(each, sizes, strict=True)) * (4 + element) / 6)


BACKWARD_SHARE = 0.15
"""What the backward pass of a gated delta net makes at once, of what it kept."""


@dataclass(frozen=True)
class LayerShape:
    """Layers that are alike.

    Attributes:
        count: how many.
        matrices: linear layers.
        inner: width of the widest gated product of linear layers; 0 where there is none.
        experts: stacked experts, if it has any.
        dense_params: other parameters, in the model's dtype: routers, sinks; norms are not among them.
        delta: a recurrence in place of attention, if it has one.
    """

    count: int
    matrices: tuple[Matrix, ...]
    inner: int
    experts: Experts | None = None
    dense_params: int = 0
    delta: DeltaNet | None = None

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


def hybrid_kinds(
    values: Mapping[str, Any], attention: tuple[Matrix, ...], *, hidden: int, head_dim: int, num_layers: int
) -> tuple[LayerShape, ...]:
    """The kinds of layers of a Qwen3.5: gated delta nets, and attention whose output is gated."""
    types = values.get("layer_types")
    if not isinstance(types, list):
        interval = int(values["full_attention_interval"])
        types = ["full_attention" if (layer + 1) % interval == 0 else "linear" for layer in range(num_layers)]
    full, inner = types[:num_layers].count("full_attention"), int(values["intermediate_size"])
    delta = DeltaNet(
        key_heads=int(values["linear_num_key_heads"]),
        value_heads=int(values["linear_num_value_heads"]),
        key_width=int(values["linear_key_head_dim"]),
        value_width=int(values["linear_value_head_dim"]),
        kernel=int(values["linear_conv_kernel_dim"]),
    )
    into = tuple(Matrix(width, hidden, names=(name,)) for width, name in delta.matrices)
    out = Matrix(hidden, delta.value_heads * delta.value_width, names=("out_proj",))
    product = gated_product(hidden, inner)
    kinds = (
        LayerShape(num_layers - full, (*into, out, *product), inner, None, delta.dense_params, delta),
        LayerShape(full, (*attention, *product), inner, None, 2 * head_dim),
    )
    return tuple(kind for kind in kinds if kind.count)


HYBRIDS = ("qwen3_5_text",)
