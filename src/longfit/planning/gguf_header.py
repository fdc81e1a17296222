"""The model configuration in a GGUF file's header, read without the file's tensors and without the ``gguf`` package.

That package turns the whole vocabulary into Python objects, which takes seconds; a plan needs a dozen numbers. The
format is four magic bytes, a version, two counts, then typed key-value pairs, then one record per tensor (name, sizes,
type, offset). Everything is little-endian.

It does not read weights (``model/gguf.py`` does).
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from longfit.errors import ModelError

MAGIC = b"GGUF"
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
_STRING, _ARRAY = 8, 9

# GGUF's name of an architecture -> transformers' model_type, for those whose shapes are planned.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}


class Length(int):
    """How many values an array holds; its values are skipped."""


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Read a header.

    Args:
        path: a ``.gguf`` file.
    Returns: its keys, arrays of more than 1,024 values as their ``Length``; the sizes of its tensors by name,
        innermost first.
    Raises: ModelError: not a GGUF file, or cut short.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ModelError(
                    f"{path}: does not start with GGUF's magic bytes; give a .gguf file, or a model folder"
                )
            _scalar(file, "<I")  # version: 2 and 3 are laid out alike
            num_tensors, num_keys = _scalar(file, "<Q"), _scalar(file, "<Q")
            keys = {}
            for _ in range(num_keys):
                name = _string(file)
                keys[name] = _value(file, _scalar(file, "<I"))
            tensors = {}
            for _ in range(num_tensors):
                name = _string(file)
                tensors[name] = tuple(_scalar(file, "<Q") for _ in range(_scalar(file, "<I")))
                _scalar(file, "<I"), _scalar(file, "<Q")  # type and offset
            return keys, tensors
    except (struct.error, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise ModelError(f"{path}: the GGUF header is cut short or damaged ({error}); fetch the file again") from error


def gguf_config(path: Path) -> dict[str, Any]:
    """Return the header as a Hugging Face configuration, as far as a plan needs it.

    Raises: ModelError: not a GGUF file, or of an architecture that is not planned.
    """
    keys, tensors = read_header(path)
    architecture = str(keys.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{path}: architecture {architecture!r} is not one that can be planned; allowed: {known}")

    def key(name: str) -> Any:
        return keys.get(f"{architecture}.{name}")

    vocab_size = key("vocab_size") or keys.get("tokenizer.ggml.tokens")
    config = {
        "model_type": ARCHITECTURES[architecture],
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": key("attention.key_length"),
        "vocab_size": int(vocab_size) if isinstance(vocab_size, int) else len(vocab_size or ()),
        "max_position_embeddings": key("context_length"),
        "sliding_window": key("attention.sliding_window"),
        "attn_logit_softcapping": key("attn_logit_softcapping"),
        "final_logit_softcapping": key("final_logit_softcapping"),
        "num_experts": key("expert_count"),  # Mixtral calls itself a llama
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return {name: value for name, value in config.items() if value is not None}


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_scalar(file, "<Q")).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _scalar(file, _SCALARS[kind])
    kind, length = _scalar(file, "<I"), _scalar(file, "<Q")
    if length <= 1024:
        return [_value(file, kind) for _ in range(length)]
    if kind in _SCALARS:
        file.seek(length * struct.calcsize(_SCALARS[kind]), 1)
    else:
        for _ in range(length):
            file.seek(_scalar(file, "<Q"), 1)
    return Length(length)
