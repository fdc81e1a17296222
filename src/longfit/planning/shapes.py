"""What of a model's configuration decides its bytes: widths, heads, layers, what is tied, which layers see a window.

A configuration is enough: a folder, a GGUF header, a hub id (``config.json`` alone is fetched) or a dict. Weights are
never read. transformers' own configuration classes fill in what a ``config.json`` leaves out, but importing them costs
seconds; the few defaults that matter stand in ``FAMILIES``.

A family is known or it is refused: a plan for an unknown layer would be a guess.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longfit.errors import ModelError
from longfit.files.reading import read_object, reading
from longfit.model.weight_files import require_sane_counts
from longfit.planning.gguf_config import gguf_config
from longfit.planning.layer_kinds import (
    HYBRIDS,
    MIXTURES,
    LayerShape,
    Matrix,
    gated_product,
    hybrid_kinds,
    mixture_kinds,
)


@dataclass(frozen=True)
class FamilyShape:
    """How the decoder layers of a model family are built, and what its ``config.json`` may leave out.

    Attributes:
        norms: normalisation layers of the hidden size in a layer; four: attention and MLP outputs have their own.
        wide_norms: norms multiply their weight in float32 (Gemma), not in the dtype of the model.
        qk_norm: queries and keys are normalised per head.
        qkv_bias: their projections have biases.
        o_bias: the output projection has one.
        fused: one matrix makes q, k, v, and one gate and up.
        gated: a second half of the queries' matrix makes a gate for what attention gives.
        rotary_per_kind: windowed and full layers have rotary tables of their own.
        defaults: keys and values that a configuration may leave out.
    """

    norms: int = 2
    wide_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    fused: bool = False
    gated: bool = False
    rotary_per_kind: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA: dict[str, Any] = {"norms": 4, "wide_norms": True}
FAMILIES = {
    "llama": FamilyShape(),
    "mistral": FamilyShape(),
    "qwen2": FamilyShape(qkv_bias=True),
    "qwen3": FamilyShape(qk_norm=True, defaults={"head_dim": 128}),
    "phi3": FamilyShape(fused=True),
    "gemma2": FamilyShape(
        **_GEMMA,
        defaults={
            **{"head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096},
            **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        },
    ),
    "gemma3_text": FamilyShape(
        **_GEMMA,
        qk_norm=True,
        rotary_per_kind=True,
        defaults={
            **{"head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096, "sliding_window_pattern": 6},
            **{"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208},
            "max_position_embeddings": 131_072,
        },
    ),
    "mixtral": FamilyShape(defaults={"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": FamilyShape(
        qk_norm=True,
        defaults={
            **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1},
            **{"sliding_window": 4096},
        },
    ),
    "gpt_oss": FamilyShape(
        qkv_bias=True,
        o_bias=True,
        defaults={"num_local_experts": 128, "num_experts_per_tok": 4, "head_dim": 64, "sliding_window": 128},
    ),
    "qwen3_5_text": FamilyShape(
        wide_norms=True,
        qk_norm=True,
        gated=True,
        defaults={
            **{"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128},
            **{"linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4},
            **{"head_dim": 256, "num_key_value_heads": 4, "vocab_size": 248_320},
        },
    ),
    "llama4_text": FamilyShape(
        defaults={
            **{"num_local_experts": 16, "num_experts_per_tok": 1, "head_dim": 128, "interleave_moe_layer_step": 1},
            **{"intermediate_size_mlp": 16_384, "attention_chunk_size": 8192, "no_rope_layer_interval": 4},
        },
    ),
}
"""By transformers' ``model_type``. A plain Llama covers SmolLM2, Yi, TinyLlama and many others."""

WRAPPERS = {"gemma3": "gemma3_text", "llama4": "llama4_text", "qwen3_5": "qwen3_5_text"}
"""Multimodal configurations, and the family of their decoder. Of Llama-4 and Qwen3.5 only the decoder is loaded."""

HUB_TIMEOUT_S = 10

ENCODERS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "distilbert",
    "deberta",
    "deberta-v2",
    "electra",
    "modernbert",
    "t5",
    "vit",
)


@dataclass(frozen=True)
class ModelShape:
    """A decoder as numbers.

    Attributes:
        family: how its layers are built.
        model_type: transformers' name of the family.
        windows: for each layer the keys that a query sees, or None for all.
        softcap: whether logits are capped (Gemma-2).
        tied: the output matrix is the embedding matrix.
        native_context: tokens the model was made for.
        tower: linear layers of a vision tower that is loaded beside the decoder (Gemma-3).
        tower_params: its other parameters.
        kinds: of layers, where they are not all alike.
    """

    family: FamilyShape
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    windows: tuple[int | None, ...]
    softcap: bool
    tied: bool
    native_context: int
    tower: tuple[Matrix, ...] = ()
    tower_params: int = 0
    kinds: tuple[LayerShape, ...] = ()

    @property
    def layer_kinds(self) -> tuple[LayerShape, ...]:
        """What the layers are made of; counts add up to the number of layers."""
        return self.kinds or (LayerShape(self.num_layers, self.layer_matrices, self.intermediate_size),)

    @property
    def hybrid(self) -> bool:
        """Whether some layers have a recurrence in place of attention."""
        return any(kind.delta is not None for kind in self.kinds)

    @property
    def all_matrices(self) -> tuple[Matrix, ...]:
        """Every kind of linear layer and of expert's weight in the decoder."""
        experts = (kind.experts.matrices for kind in self.layer_kinds if kind.experts is not None)
        return (*(m for kind in self.layer_kinds for m in kind.matrices), *(m for pair in experts for m in pair))

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.windows)

    @property
    def query_width(self) -> int:
        """Numbers in the queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers in the keys of a token, and in its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def rotary_tables(self) -> int:
        """Pairs of cos and sin tables that live during a step."""
        return len(set(self.windows)) if self.family.rotary_per_kind else 1

    @property
    def attention_matrices(self) -> tuple[Matrix, ...]:
        """The linear layers of one layer's attention, where they are not fused."""
        hidden, queries, keys, bias = self.hidden_size, self.query_width, self.kv_width, self.family.qkv_bias
        return (
            Matrix(queries * (2 if self.family.gated else 1), hidden, bias, names=("q_proj",)),
            Matrix(keys, hidden, bias, count=2, names=("k_proj", "v_proj")),
            Matrix(hidden, queries, self.family.o_bias, names=("o_proj",)),
        )

    @property
    def layer_matrices(self) -> tuple[Matrix, ...]:
        """The linear layers of one decoder layer, where all are alike."""
        hidden, inner, queries, keys = self.hidden_size, self.intermediate_size, self.query_width, self.kv_width
        if self.family.fused:
            return (
                Matrix(queries + 2 * keys, hidden, names=("qkv_proj",)),
                Matrix(hidden, queries, names=("o_proj",)),
                Matrix(2 * inner, hidden, names=("gate_up_proj",)),
                Matrix(hidden, inner, names=("down_proj",)),
            )
        return (*self.attention_matrices, *gated_product(hidden, inner))

    @property
    def norm_params(self) -> int:
        """Weights of all normalisation layers of the decoder."""
        per_head = 2 * self.head_dim if self.family.qk_norm and not self.hybrid else 0  # of some layers only: in kinds
        per_layer = self.family.norms * self.hidden_size + per_head
        return self.num_layers * per_layer + self.hidden_size

    @property
    def vocab_params(self) -> int:
        """Weights of the embedding matrix, and of the output matrix if it is another."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def linear_params(self) -> int:
        """Weights of the decoder layers' matrices."""
        return sum(kind.count * kind.linear_params for kind in self.layer_kinds)

    @property
    def num_params(self) -> int:
        """All parameters."""
        layers = sum(kind.count * kind.num_params for kind in self.layer_kinds)
        tower = sum((m.numel + m.out_features * m.bias) * m.count for m in self.tower) + self.tower_params
        return layers + self.norm_params + self.vocab_params + tower

    @classmethod
    def of(cls, config: Mapping[str, Any], *, name: str = "config") -> "ModelShape":
        """Read a configuration as ``config.json`` holds it.

        Args:
            config: its keys; a multimodal one is read through its ``text_config``.
            name: of the model, for errors.
        Raises: ModelError: an encoder, an unknown family, or missing or absurd values.
        """
        require_sane_counts(name, config)
        tower, tower_params = _vision_tower(config)
        keys, model_type = _text_keys(config, name)
        values = {**FAMILIES[model_type].defaults, **{key: value for key, value in keys.items() if value is not None}}

        def size(key: str, default: int | None = None) -> int:
            value = values.get(key, default)
            if value is None:
                raise ModelError(f"{name}: the configuration has no {key!r}; a plan needs it: is the file complete?")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name}: {key}={value!r}: must be a whole number, at least 1")
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ModelError(f"{name}: {heads} attention heads on {kv_heads} key/value heads: must be a multiple")
        if "head_dim" not in values and hidden % heads:
            raise ModelError(f"{name}: hidden_size={hidden} on {heads} heads: must be a multiple, or give head_dim")
        num_layers = size("num_hidden_layers")
        shape = cls(
            family=FAMILIES[model_type],
            model_type=model_type,
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=size("head_dim", hidden // heads),
            vocab_size=size("vocab_size"),
            windows=_windows(values, model_type, num_layers),
            softcap=values.get("final_logit_softcapping") is not None,
            tied=bool(values.get("tie_word_embeddings", False)),
            native_context=size("max_position_embeddings"),
            tower=tower,
            tower_params=tower_params,
        )
        attention = shape.attention_matrices
        if model_type in HYBRIDS:
            kinds = hybrid_kinds(values, attention, hidden=hidden, head_dim=shape.head_dim, num_layers=num_layers)
            return replace(shape, kinds=kinds)
        if model_type not in MIXTURES:
            return shape
        kinds = mixture_kinds(model_type, values, attention, hidden=hidden, num_layers=num_layers)
        return replace(shape, kinds=kinds)


def _text_keys(config: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], str]:
    """The keys of the decoder, and the family they belong to."""
    model_type = config.get("model_type")
    if model_type is None:
        raise ModelError(f"{name}: the configuration has no 'model_type'; give the config.json of a transformers model")
    if model_type in WRAPPERS:
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise ModelError(f"{name}: a {model_type} configuration without 'text_config'; a plan needs it")
        return text, WRAPPERS[model_type]
    if model_type in ENCODERS or config.get("is_encoder_decoder"):
        raise ModelError(f"{name}: a {model_type} model is not a causal language model; longfit trains decoders only")
    if model_type not in MIXTURES and (config.get("num_local_experts") or config.get("num_experts")):
        raise ModelError(
            f"{name}: {model_type} is a mixture of experts of a kind that is not planned (planned are "
            f"{', '.join(MIXTURES)}); training does not need a plan"
        )
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ModelError(
            f"{name}: a plan knows the model types {known}; got {model_type!r}; training does not need one"
        )
    return config, model_type


def _windows(values: Mapping[str, Any], model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, as the family's configuration class decides it."""
    window = values.get("sliding_window")
    types = values.get("layer_types")
    if model_type == "llama4_text":
        chunk, step = values.get("attention_chunk_size"), int(values["no_rope_layer_interval"])
        if isinstance(types, list):
            return tuple(chunk if kind == "chunked_attention" else None for kind in types[:num_layers])
        given = values.get("no_rope_layers") or [(layer + 1) % step != 0 for layer in range(num_layers)]
        return tuple(chunk if rope else None for rope in given)
    if model_type == "gpt_oss" and not isinstance(types, list):
        return tuple(window if (layer + 1) % 2 else None for layer in range(num_layers))
    if isinstance(types, list):
        return tuple(window if kind == "sliding_attention" else None for kind in types[:num_layers])
    if model_type == "gemma2":
        return tuple(window if layer % 2 == 0 else None for layer in range(num_layers))
    if model_type == "gemma3_text":
        pattern = int(values["sliding_window_pattern"])
        return tuple(window if (layer + 1) % pattern else None for layer in range(num_layers))
    if model_type in ("qwen2", "qwen3"):
        full = int(values.get("max_window_layers", 28))
        used = bool(values.get("use_sliding_window"))
        return tuple(window if used and layer >= full else None for layer in range(num_layers))
    if model_type == "qwen3_moe":
        return (window if values.get("use_sliding_window") else None,) * num_layers
    if model_type in ("mistral", "phi3", "mixtral"):
        return (window,) * num_layers
    return (None,) * num_layers


def _vision_tower(config: Mapping[str, Any]) -> tuple[tuple[Matrix, ...], int]:
    """Linear layers and other parameters of Gemma-3's SigLIP tower, which is loaded with the model, and not trained."""
    vision = config.get("vision_config")
    if config.get("model_type") != "gemma3" or not isinstance(vision, Mapping):
        return (), 0
    width, inner, layers = (int(vision[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    patch, image = int(vision.get("patch_size", 14)), int(vision.get("image_size", 896))
    matrices = (
        Matrix(width, width, bias=True, count=4 * layers, names=("q_proj", "k_proj", "v_proj", "out_proj")),
        Matrix(inner, width, bias=True, count=layers, names=("fc1",)),
        Matrix(width, inner, bias=True, count=layers, names=("fc2",)),
    )
    text = config["text_config"]
    patches = width * 3 * patch**2 + width + (image // patch) ** 2 * width  # convolution and its positions
    norms = layers * 4 * width + 2 * width + width  # of the layers, behind them, and before the projection
    return matrices, patches + norms + width * int(text["hidden_size"])


def read_shape(model: str | Path | Mapping[str, Any]) -> ModelShape:
    """Read the shape of a model.

    Args:
        model: a configuration, a folder with ``config.json``, a ``.json`` or ``.gguf`` file, or a hub id.
    Raises: ModelError: nothing there, or as :meth:`ModelShape.of`.
    """
    if isinstance(model, Mapping):
        return ModelShape.of(model)
    with reading(model, "the configuration", ModelError, do="fetch it again, or give another model"):
        return ModelShape.of(_configuration(str(model)), name=str(model))


def _configuration(model: str) -> dict[str, Any]:
    path = Path(model)
    if path.is_file() and path.suffix != ".json":
        return gguf_config(path)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ModelError(f"{model}: no config.json in this folder; give a model folder, a .gguf file or a hub id")
    if path.exists():
        return read_object(path, ModelError, what="the configuration")
    return _from_hub(model)


def _from_hub(name: str) -> dict[str, Any]:
    """Read ``config.json`` of a hub id: from the local cache, else over the network."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
        path = found if isinstance(found, str) else hf_hub_download(name, "config.json", etag_timeout=HUB_TIMEOUT_S)
        return read_object(Path(path), ModelError, what="the configuration")
    except (HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{name}: neither a folder, nor a .gguf file, nor a reachable hub id ({first})") from error
