"""llama.cpp itself, through its C interface: the library that the npm package ``@node-llama-cpp/linux-x64`` carries.

    make llama-cpp

puts it where it is looked for: the repository's ``.llama-cpp``, or where the variable LONGFIT_LLAMA_CPP points to. Only
calls that have been the same for years are used. The two parameter structs are taken from llama.cpp's own defaults,
handed back as they are but for the context size, which is their first field, so that their later fields need not be
known; they are declared longer than they are, which a callee that takes them on the stack does not see.
"""

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
PACKAGE = Path("node_modules") / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64"

ROUNDING = {"F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 2.0**-7, "Q4_0": 2.0**-7}
"""What llama.cpp rounds the input of a product with a matrix of each type to, as a share of the input's largest
values: F16 and BF16 as they are, to 11 and 8 bits; for the block types to Q8_0, whose step is amax / 127."""


class Parameters(ctypes.Structure):
    _fields_ = [("fields", ctypes.c_uint32 * 256)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def library() -> ctypes.CDLL:
    """llama.cpp, with its CPU backends; skips the test where it is not installed."""
    folder = Path(os.environ.get("LONGFIT_LLAMA_CPP", ROOT / ".llama-cpp")) / PACKAGE
    found = sorted(folder.glob("libllama.*so*"))
    if not found:
        pytest.skip("llama.cpp is not installed; run: make llama-cpp")
    ggml = ctypes.CDLL(str(next(folder.glob("libggml.*so*"))), mode=ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(found[0]))
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    pointer = ctypes.c_void_p
    llama.llama_model_default_params.restype = Parameters
    llama.llama_context_default_params.restype = Parameters
    llama.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Parameters]
    llama.llama_init_from_model.argtypes = [pointer, Parameters]
    llama.llama_adapter_lora_init.argtypes = [pointer, ctypes.c_char_p]
    llama.llama_set_adapters_lora.argtypes = [pointer, pointer, ctypes.c_size_t, pointer]
    llama.llama_model_get_vocab.argtypes = [pointer]
    llama.llama_tokenize.argtypes = [
        pointer, ctypes.c_char_p, ctypes.c_int32, pointer, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool
    ]  # fmt: skip
    llama.llama_decode.argtypes = [pointer, Batch]
    llama.llama_get_logits.argtypes = [pointer]
    llama.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    for name in ("llama_free", "llama_model_free", "llama_vocab_n_tokens"):
        getattr(llama, name).argtypes = [pointer]
    llama.llama_set_n_threads.argtypes = [pointer, ctypes.c_int32, ctypes.c_int32]
    llama.llama_model_chat_template.argtypes = [pointer, ctypes.c_char_p]
    llama.llama_model_chat_template.restype = ctypes.c_char_p
    for name in ("llama_vocab_is_eog",):
        getattr(llama, name).argtypes = [pointer, ctypes.c_int32]
        getattr(llama, name).restype = ctypes.c_bool
    for name in (
        "llama_model_load_from_file", "llama_init_from_model", "llama_adapter_lora_init", "llama_model_get_vocab"
    ):  # fmt: skip
        getattr(llama, name).restype = pointer
    _silence(llama)
    return llama


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_quiet = _LOG(lambda level, text, data: None)


def _silence(llama: ctypes.CDLL) -> None:
    if not os.environ.get("LONGFIT_LLAMA_CPP_LOG"):
        llama.llama_log_set(_quiet, None)


class LlamaCpp:
    """A model, with an adapter or without."""

    def __init__(self, path: Path, *, lora: Path | None = None, context: int = 1024) -> None:
        self.llama = library()
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), self.llama.llama_model_default_params())
        assert self.model, f"llama.cpp does not open {path}"
        parameters = self.llama.llama_context_default_params()
        for field in range(3):  # n_ctx, n_batch, n_ubatch
            parameters.fields[field] = context
        self.context = self.llama.llama_init_from_model(self.model, parameters)
        assert self.context, "llama.cpp makes no context"
        self.llama.llama_set_n_threads(self.context, 1, 1)
        self.vocab = self.llama.llama_model_get_vocab(self.model)
        if lora is not None:
            adapter = self.llama.llama_adapter_lora_init(self.model, str(lora).encode())
            assert adapter, f"llama.cpp does not open {lora}"
            adapters, scales = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(1.0)
            assert self.llama.llama_set_adapters_lora(self.context, adapters, 1, scales) == 0

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        count = self.llama.llama_tokenize(self.vocab, raw, len(raw), room, len(room), special, True)
        assert count >= 0
        return list(room[:count])

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """float32 ``[T, V]``; a model reads one text."""
        count = len(token_ids)
        sequence = (ctypes.c_int32 * 1)(0)
        batch = Batch(
            count,
            (ctypes.c_int32 * count)(*token_ids),
            None,
            (ctypes.c_int32 * count)(*range(count)),
            (ctypes.c_int32 * count)(*[1] * count),
            (ctypes.POINTER(ctypes.c_int32) * count)(*[ctypes.cast(sequence, ctypes.POINTER(ctypes.c_int32))] * count),
            (ctypes.c_int8 * count)(*[1] * count),
        )
        assert self.llama.llama_decode(self.context, batch) == 0
        vocab_size = self.llama.llama_vocab_n_tokens(self.vocab)
        found = np.ctypeslib.as_array(self.llama.llama_get_logits(self.context), shape=(count, vocab_size))
        return torch.from_numpy(found.copy())

    def chat_template(self) -> str | None:
        found = self.llama.llama_model_chat_template(self.model, None)
        return found.decode() if found else None

    def ends(self, token: int) -> bool:
        """Whether llama.cpp stops at a token."""
        return bool(self.llama.llama_vocab_is_eog(self.vocab, token))

    def close(self) -> None:
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Error of the logits as a share of their size, both about their mean, which no probability depends on."""
    found, expected = (x - x.mean(-1, keepdim=True) for x in (found, expected))
    return float((found - expected).norm() / expected.norm())


def assert_as_rounded(found: torch.Tensor, expected: torch.Tensor, file_type: str, num_layers: int) -> None:
    """Roundings add in quadrature: four products' inputs a layer, keys and values in F16, and the head's."""
    assert distance(found, expected) < rounding_bound(file_type, num_layers)


def rounding_bound(file_type: str, num_layers: int) -> float:
    """What the roundings of a decoder add up to, as a share of the logits; twice: norms divide, so that errors grow."""
    return 2 * ROUNDING[file_type] * (6 * num_layers + 1) ** 0.5
