"""Which byte of which page holds the state of which element: pure arithmetic, no memory.

The state of all parameters, the smallest included, is cut into pages of one size. A parameter's elements go into the
current page while they fit and continue in the next, so a page holds runs of elements of one or many parameters, and a
large embedding spans many pages. One run is laid out field after field, each at a multiple of 64 bytes:

    [ exp_avg [n] | exp_avg_sq [n] | exp_avg_absmax | exp_avg_sq_absmax (8-bit) | master [n] (16-bit parameters) ]

Runs begin at multiples of 256 elements of their parameter, so that no 8-bit block is cut by a page's end.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.numerics.adamw import BLOCK_SIZE, AdamwState
from longfit.optim.state_sizes import SMALLEST_8BIT_NUMEL

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register

# A run shorter than this at a page's end costs a kernel call for next to no work; the next page takes it instead.
SMALLEST_RUN = 4096


@dataclass(frozen=True)
class Field:
    """One tensor of a run's state: its name, its dtype and how many elements share one value."""

    name: str
    dtype: torch.dtype
    elements_per_value: int = 1

    def count(self, num_elements: int) -> int:
        return -(-num_elements // self.elements_per_value)

    def num_bytes(self, num_elements: int) -> int:
        """Bytes for ``num_elements`` elements, rounded up to the alignment."""
        return -(-self.count(num_elements) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class StateFormat:
    """The form of one parameter's state.

    Attributes:
        bits: 8, 32 or 64 bits per moment.
        master: whether a float32 copy of the parameter is part of the state.
    """

    bits: int
    master: bool

    @property
    def fields(self) -> tuple[Field, ...]:
        if self.bits == 8:
            fields = [
                Field("exp_avg", torch.uint8),
                Field("exp_avg_sq", torch.uint8),
                Field("exp_avg_absmax", torch.float32, BLOCK_SIZE),
                Field("exp_avg_sq_absmax", torch.float32, BLOCK_SIZE),
            ]
        else:
            dtype = torch.float64 if self.bits == 64 else torch.float32
            fields = [Field("exp_avg", dtype), Field("exp_avg_sq", dtype)]
        if self.master:
            fields.append(Field("master", torch.float32))
        return tuple(fields)

    def num_bytes(self, num_elements: int) -> int:
        return sum(field.num_bytes(num_elements) for field in self.fields)

    def capacity(self, num_bytes: int) -> int:
        """The largest multiple of 256 elements whose state fits into ``num_bytes``."""
        per_block = self.num_bytes(1 << 20) / ((1 << 20) // BLOCK_SIZE)  # at 2 ** 20 elements alignment adds nothing
        blocks = int(num_bytes // per_block)
        while blocks > 0 and self.num_bytes(blocks * BLOCK_SIZE) > num_bytes:
            blocks -= 1
        return max(blocks, 0) * BLOCK_SIZE


def format_of(param: Tensor, *, state_bits: int, master_weights: str) -> StateFormat:
    """Choose the form of a parameter's state.

    Args:
        param: fp32, fp64, bf16 or fp16.
        state_bits: 32 or 8; an fp64 parameter keeps fp64 moments, and one below 4,096 elements keeps 32 bits.
        master_weights: "fp32" or "stochastic".
    """
    if param.dtype == torch.float64:
        return StateFormat(bits=64, master=False)
    bits = 8 if state_bits == 8 and param.numel() >= SMALLEST_8BIT_NUMEL else 32
    return StateFormat(bits=bits, master=param.dtype != torch.float32 and master_weights == "fp32")


@dataclass(frozen=True)
class ParameterRun:
    """Elements ``start`` to ``stop`` of parameter number ``param``; their state begins at byte ``offset`` of a page."""

    param: int
    start: int
    stop: int
    offset: int
    format: StateFormat

    def views(self, page: Tensor) -> dict[str, Tensor]:
        """Return the run's fields as tensors on the page's memory. ``page``: uint8 ``[page_bytes]``."""
        views = {}
        offset = self.offset
        for field in self.format.fields:
            size = field.count(self.stop - self.start) * field.dtype.itemsize
            views[field.name] = page[offset : offset + size].view(field.dtype)
            offset += field.num_bytes(self.stop - self.start)
        return views

    def state(self, page: Tensor) -> AdamwState:
        """Return the run's state on the page's memory."""
        return AdamwState(**self.views(page))


@dataclass(frozen=True)
class Page:
    """A page's number, the device its parameters are on, and its runs."""

    number: int
    device: torch.device
    runs: tuple[ParameterRun, ...]


class PageLayout:
    """The pages of an optimiser; grows as parameters are added, and never moves what it has placed.

    Args:
        page_bytes: size of every page; a multiple of 64.
    """

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.pages: list[Page] = []
        self.state_bytes = 0  # without what is left free at the ends of pages
        self._added: list[tuple[str, list[int], str, int, bool]] = []

    def add(self, params: list[tuple[int, Tensor, StateFormat]]) -> None:
        """Place parameters, given as (number, parameter, format), in new pages; pages are not shared across devices."""
        for device in dict.fromkeys(param.device for _, param, _ in params):
            here = [entry for entry in params if entry[1].device == device]
            for runs in _fill_pages(here, self.page_bytes):
                self.pages.append(Page(len(self.pages), device, tuple(runs)))
                self.state_bytes += sum(run.format.num_bytes(run.stop - run.start) for run in runs)
        self._added += [
            (str(param.device.type), list(param.shape), str(param.dtype), form.bits, form.master)
            for _, param, form in params
        ]

    def fingerprint(self) -> str:
        """Return a hash of everything that decides where a byte lies; equal for equal models and settings."""
        text = json.dumps([self.page_bytes, self._added])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fill_pages(params: list[tuple[int, Tensor, StateFormat]], page_bytes: int) -> Iterator[list[ParameterRun]]:
    runs: list[ParameterRun] = []
    used = 0
    for number, param, form in params:
        start = 0
        while start < param.numel():
            rest = param.numel() - start
            if form.num_bytes(rest) > page_bytes - used:
                rest = form.capacity(page_bytes - used)
                if rest < SMALLEST_RUN and runs:
                    yield runs
                    runs, used = [], 0
                    continue
            runs.append(ParameterRun(number, start, start + rest, used, form))
            used += form.num_bytes(rest)
            start += rest
    if runs:
        yield runs
