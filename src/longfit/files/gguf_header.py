"""The header of a GGUF file, read strictly: every number in it is checked against the file before it is believed.

The format is four magic bytes, a version, two counts, then typed key-value pairs, then one record per tensor (name,
sizes, type, offset), then, aligned, the tensors one after the other in the order of their records. Everything is
little-endian. A count or a length that the file cannot hold, a tensor that overlaps another or ends beyond the file, a
type that nobody knows: each is damage, and is told before anything is allocated or mapped.

What this is not: it reads no weights, and does not know what a key means.
"""

import math
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from longfit.errors import ModelError
from longfit.files.reading import reading, require_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # laid out alike
LARGEST_DIMENSIONS = 4
DEEPEST_ARRAY = 4
DEFAULT_ALIGNMENT = 32
SMALLEST_KEY_BYTES, SMALLEST_TENSOR_BYTES = 13, 24  # with an empty name
LISTED_VALUES = 1024  # of an array; longer ones are the vocabulary and are passed over
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
_STRING, _ARRAY = 8, 9


class Length(int):
    """How many values an array holds; its values are passed over."""


@dataclass(frozen=True)
class TensorRecord:
    """What the header says about a tensor: its sizes (innermost first), GGML's number of its type, its offset."""

    shape: tuple[int, ...]
    type: int
    offset: int  # from the beginning of the tensors' part


@dataclass(frozen=True)
class GgufHeader:
    """A header; arrays of more than 1,024 values are there as their ``Length``."""

    keys: dict[str, Any]
    tensors: dict[str, TensorRecord]
    data_offset: int  # where the tensors' bytes begin
    alignment: int


def read_header(path: Path) -> GgufHeader:
    """Read a header.

    Raises: ModelError: not a GGUF file, cut short, or a number in it that the file cannot hold.
    """
    require_regular(path, ModelError)
    size = path.stat().st_size
    with reading(path, "the GGUF header", ModelError), path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ModelError(f"{path}: does not start with GGUF's magic bytes; give a .gguf file, or a model folder")
        return _Reader(file, size).header()


def require_whole_tensors(path: Path, header: GgufHeader, type_sizes: dict[int, tuple[int, int]]) -> None:
    """Raise ModelError unless the tensors lie one behind the other, as the format demands, and within the file.

    Args:
        type_sizes: for GGML's number of a type: elements in a block, and bytes of one.
    """
    end, size = 0, path.stat().st_size
    for name, tensor in header.tensors.items():
        if tensor.type not in type_sizes:
            raise ModelError(f"{path}: {name} is of type {tensor.type}, which nobody knows; fetch it again")
        elements, block_bytes = type_sizes[tensor.type]
        if tensor.shape[0] % elements:
            raise ModelError(f"{path}: {name} has rows of {tensor.shape[0]:,}, in blocks of {elements}; fetch it again")
        if tensor.offset != end:
            raise ModelError(
                f"{path}: {name} lies at byte {tensor.offset:,} of the tensors, expected {end:,}: it overlaps another "
                "or leaves a gap; the file is damaged: fetch it again"
            )
        stop = end + prod(tensor.shape) // elements * block_bytes
        if header.data_offset + stop > size:
            raise ModelError(
                f"{path}: {name} ends at byte {header.data_offset + stop:,}, the file at {size:,}; the download is not "
                "complete: fetch it again"
            )
        end = -(-stop // header.alignment) * header.alignment


class _Reader:
    """Reads values of a file of known size; what does not fit into the rest of it is damage."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def header(self) -> GgufHeader:
        version = self.scalar("<I")
        if version not in VERSIONS:
            raise ModelError(f"GGUF version {version}: known are {VERSIONS[0]} and {VERSIONS[1]}, little-endian")
        num_tensors = self.count(SMALLEST_TENSOR_BYTES, "tensors")
        num_keys = self.count(SMALLEST_KEY_BYTES, "keys")
        keys: dict[str, Any] = {}
        for _ in range(num_keys):
            name = self.string()
            if name in keys:
                raise ModelError(f"the key {name!r} is there twice; the file is damaged: fetch it again")
            keys[name] = self.value(self.scalar("<I"), name)
        tensors: dict[str, TensorRecord] = {}
        for _ in range(num_tensors):
            name = self.string()
            if name in tensors:
                raise ModelError(f"the tensor {name!r} is there twice; the file is damaged: fetch it again")
            tensors[name] = self.tensor(name)
        alignment = keys.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ModelError(f"general.alignment is {alignment}: must be a power of two; fetch it again")
        return GgufHeader(keys, tensors, -(-self.file.tell() // alignment) * alignment, alignment)

    def tensor(self, name: str) -> TensorRecord:
        dimensions = self.scalar("<I")
        if not 1 <= dimensions <= LARGEST_DIMENSIONS:
            raise ModelError(f"{name} has {dimensions} dimensions: allowed are 1 to {LARGEST_DIMENSIONS}")
        shape = tuple(self.scalar("<Q") for _ in range(dimensions))
        if not all(1 <= size <= 2**48 for size in shape):
            raise ModelError(f"{name} has the sizes {list(shape)}; the file is damaged: fetch it again")
        return TensorRecord(shape, self.scalar("<I"), self.scalar("<Q"))

    def count(self, smallest_bytes: int, what: str) -> int:
        """A number of things, each of which takes some bytes of what is left of the file."""
        number = self.scalar("<Q")
        left = self.size - self.file.tell()
        if number * smallest_bytes > left:
            raise ModelError(f"{number:,} {what} cannot be in the {left:,} bytes that follow; fetch it again")
        return int(number)

    def value(self, kind: int, name: str, *, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            value = self.scalar(self.form(kind, name))
            if isinstance(value, float) and not math.isfinite(value):
                raise ModelError(f"the key {name!r} is {value}; the file is damaged: fetch it again")
            return value
        if depth == DEEPEST_ARRAY:
            raise ModelError(f"the key {name!r} is nested too deeply; the file is damaged: fetch it again")
        kind = self.scalar("<I")
        smallest = 8 if kind == _STRING else 12 if kind == _ARRAY else struct.calcsize(self.form(kind, name))
        length = self.count(smallest, f"values of {name!r}")
        if length <= LISTED_VALUES or kind == _ARRAY:
            return [self.value(kind, name, depth=depth + 1) for _ in range(length)]
        if kind == _STRING:
            for _ in range(length):
                self.skip(self.count(1, f"characters in {name!r}"))
        else:
            self.skip(length * smallest)
        return Length(length)

    def form(self, kind: int, name: str) -> str:
        if kind not in _SCALARS:
            raise ModelError(f"the key {name!r} is of type {kind}, which nobody knows; fetch it again")
        return _SCALARS[kind]

    def string(self) -> str:
        length = self.count(1, "characters")
        return self.file.read(length).decode("utf-8")

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.file.read(struct.calcsize(form)))[0]

    def skip(self, num_bytes: int) -> None:
        self.file.seek(num_bytes, 1)
