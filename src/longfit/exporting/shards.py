"""Write safetensors files tensor by tensor, so that only one tensor is in memory at a time.

A safetensors file is eight bytes (the length of the header), the header (JSON: name to dtype, shape and place), and the
tensors' bytes one after the other. All of the header follows from names, shapes and dtypes, so the tensors can be made
when their turn comes. The library's own ``save_file`` wants all of them at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int64: "I64",
}
MAX_SHARD_BYTES = 5_000_000_000  # what transformers calls a shard


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path,
    planned: Sequence[Planned],
    make: Callable[[Planned], Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: Callable[[int, int], object] | None = None,
) -> list[Path]:
    """Write ``model.safetensors``, or several files and their index.

    Args:
        planned: the tensors, in order.
        make: called once for each, in order; must return what was planned.
        max_shard_bytes: a file ends before the tensor that would exceed it.
        on_tensor: called with tensors written and tensors in all.
    Returns: the files.
    Raises: OSError: the disk is full.
    """
    shards = list(_split(planned, max_shard_bytes))
    single = len(shards) == 1
    paths, weight_map, done = [], {}, 0
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            _write_header(file, shard)
            for item in shard:
                tensor = make(item)
                assert tuple(tensor.shape) == item.shape and tensor.dtype == item.dtype, item  # noqa: PT018
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                del tensor
                done += 1
                if on_tensor is not None:
                    on_tensor(done, len(planned))
        weight_map.update(dict.fromkeys((item.name for item in shard), name))
        paths.append(folder / name)
    if not single:
        index = {"metadata": {"total_size": sum(item.num_bytes for item in planned)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return paths


def _split(planned: Iterable[Planned], max_shard_bytes: int) -> Iterable[list[Planned]]:
    shard: list[Planned] = []
    size = 0
    for item in planned:
        if shard and size + item.num_bytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += item.num_bytes
    yield shard


def _write_header(file: BinaryIO, shard: Sequence[Planned]) -> None:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for item in shard:
        stop = start + item.num_bytes
        entries[item.name] = {"dtype": DTYPES[item.dtype], "shape": list(item.shape), "data_offsets": [start, stop]}
        start = stop
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of eight, as the library's own files do
    file.write(len(header).to_bytes(8, "little") + header)
