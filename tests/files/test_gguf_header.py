"""Every number of a GGUF header is checked against the file: what cannot be is damage."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFWriter

from longfit.errors import ModelError
from longfit.files.gguf_header import read_header, require_whole_tensors

SIZES = {kind.value: GGML_QUANT_SIZES[kind] for kind in GGML_QUANT_SIZES}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two tensors, a nested array and a vocabulary longer than what is listed."""
    file = tmp_path / "small.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_float32("llama.rope.freq_base", 10_000.0)
    writer.add_token_list([f"token {number}" for number in range(2000)])
    writer.add_tensor("a", np.arange(70, dtype=np.float32).reshape(7, 10))
    writer.add_tensor("b", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def check(path: Path) -> None:
    require_whole_tensors(path, read_header(path), SIZES)


def replace(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))


def test_a_sound_file_is_read(path: Path) -> None:
    check(path)
    header = read_header(path)
    assert header.keys["llama.block_count"] == 2
    assert header.keys["tokenizer.ggml.tokens"] == 2000
    assert [(name, tensor.shape) for name, tensor in header.tensors.items()] == [("a", (10, 7)), ("b", (5,))]


def record(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return (
        struct.pack("<Q", len(name))
        + name.encode()
        + struct.pack("<I", len(shape))
        + sizes
        + struct.pack("<IQ", kind, offset)
    )


A, B = record("a", (10, 7), 0, 0), record("b", (5,), 1, 288)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (B, record("b", (5,), 1, 0), "b lies at byte 0 of the tensors, expected 288"),
        (B, record("b", (5,), 1, 2**64 - 32), "expected 288"),
        (B, record("b", (5,), 1, 320), "expected 288"),
        (B, record("b", (50,), 1, 288), "b ends at byte"),
        (B, record("b", (2**40,), 1, 288), "b ends at byte"),
        (B, record("b", (0,), 1, 288), "sizes"),
        (B, record("b", (5,), 77, 288), "type 77"),
        (B, record("b", (5,), 2, 288), "in blocks of 32"),
        (B, record("a", (5,), 1, 288), "the tensor 'a' is there twice"),
        (A, record("a", (2**33, 2**33), 0, 0), "a ends at byte"),
        (struct.pack("<QQ", 2, 4), struct.pack("<QQ", 2**60, 4), "tensors cannot be in"),
        (struct.pack("<QQ", 2, 4), struct.pack("<QQ", 2, 2**60), "keys cannot be in"),
        (struct.pack("<Q", 2000), struct.pack("<Q", 2**62), "values of 'tokenizer.ggml.tokens' cannot be in"),
        (struct.pack("<f", 10_000.0), struct.pack("<f", float("nan")), "freq_base' is nan"),
        (b"GGUF\x03", b"GGUF\x07", "GGUF version 7"),
        (b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03", "little-endian"),
        (b"block_count", b"block\xffcount", "utf-8"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(path: Path, old: bytes, new: bytes, told: str) -> None:
    replace(path, old, new)
    with pytest.raises(ModelError, match=told) as caught:
        check(path)
    assert str(path) in str(caught.value)


def test_every_length_of_a_cut_file_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for length in [*range(0, 300, 7), *range(300, len(whole) - 64, 997), len(whole) - 40]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"small\.gguf"):
            check(path)


def test_arrays_nested_for_ever_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.gguf"
    deep = struct.pack("<IQ", 9, 1) * 20_000
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9) + deep)
    with pytest.raises(ModelError, match="nested too deeply"):
        read_header(path)
