"""AdamW for fine-tuning: 32- or 8-bit moments in pages, float32 masters for 16-bit parameters.

Why not torch.optim.AdamW: it moves bfloat16 parameters in bfloat16. LongLoRA trains embeddings and norms, at learning
rates where the step is below half a unit in the last place; such a weight never moves. Here the update runs in float32:

- ``master_weights="fp32"`` keeps a float32 copy of each 16-bit parameter; the parameter is its rounded shadow. A
  parameter that is changed from outside (loaded, clamped, averaged) wins over its master;
- ``master_weights="stochastic"`` keeps no copy (4 bytes a parameter less) and rounds each new bfloat16 value up or
  down at random, right on average.

The mathematics are in ``numerics/adamw.py``, where the state lies in ``page_layout.py``, how it moves in ``paging.py``,
how it survives a kill in ``page_file.py``. Here they become a ``torch.optim.Optimizer``.
"""

import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from longfit.compat.torch import is_out_of_memory
from longfit.errors import ConfigError, PagingError
from longfit.numerics.adamw import AdamwState, StepScalars
from longfit.numerics.stochastic_rounding import rounding_key
from longfit.optim.checks import (
    check_hyperparameters,
    check_parameter,
    check_saved,
    check_settings,
    default_page_bytes,
)
from longfit.optim.frames import Frames
from longfit.optim.mapped_frames import MappedFrames, can_map
from longfit.optim.page_file import PageFile
from longfit.optim.page_layout import Page, PageLayout, ParameterRun, StateFormat, format_of
from longfit.optim.paging import PageCache
from longfit.optim.parameter_step import ParameterStep, scalars_of, step_runs
from longfit.optim.saved_state import collect, scatter, whole_state, zeros_in_file

_TORN = "the last step stopped in the middle, some parameters have moved and others have not"


@dataclass(frozen=True)
class PagingStatistics:
    """Where the state is now, and what moving it has cost since the optimiser was made."""

    resident_bytes: int  # pages in the memory the budget counts
    paged_bytes: int  # pages elsewhere
    moved_bytes: int
    moved_s: float  # seconds of copying, most of them beside the update


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; the mathematics and the param groups of ``torch.optim.AdamW``.

    Args:
        params: parameters or param groups; bfloat16, float16, float32 or float64, any strides.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; each may be set per group.
        state_bits: 32, or 8 for block-wise 8-bit moments (2.03 bytes a parameter instead of 8). Parameters below 4,096
            elements keep 32 bits, float64 ones 64.
        master_weights: ``"fp32"`` or ``"stochastic"`` (bfloat16 only): how 16-bit parameters keep small updates.
        page_bytes: size of a page; a multiple of 4,096, at least 65,536; None: 4 MiB, or less for a small budget.
        budget_bytes: state that may stay in the memory of each parameter's device; None: all of it. The rest goes to
            host memory (accelerators) or to the file at ``path``.
        host_budget_bytes: for accelerators with a ``path``: state that may stay in host memory; None: all of it.
        path: file for the pages that exceed the budget. It belongs to this optimiser alone, and is removed when the
            optimiser goes, unless ``commit`` was called.
        run: a name under which ``path`` can be opened again; with the same name the state of the last ``commit`` is
            taken up. None makes one up, so that a file left behind is never taken for ours.
    Raises:
        ConfigError: a setting is out of its range, or a parameter has a dtype that cannot be trained.
        PagingError: the file cannot be used: unwritable, damaged, in use, or of another run.
    Source: arXiv 1711.05101, algorithm 2; QLoRA, section 3; arXiv 2110.02861 for 8-bit moments.

    A NaN or infinite gradient makes its weight NaN, as in torch, and no other. Pickling and deepcopy are refused, as
    two optimisers cannot own one file and one set of pages: ``state_dict`` carries everything.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_bits: int = 32,
        master_weights: str = "fp32",
        page_bytes: int | None = None,
        budget_bytes: int | None = None,
        host_budget_bytes: int | None = None,
        path: str | os.PathLike[str] | None = None,
        run: str | None = None,
    ) -> None:
        page_bytes = default_page_bytes(budget_bytes) if page_bytes is None else page_bytes
        check_settings(state_bits, master_weights, page_bytes, budget_bytes, path)
        self.state_bits = state_bits
        self.master_weights = master_weights
        self.budget_bytes = budget_bytes
        self.host_budget_bytes = host_budget_bytes
        self._seed = torch.initial_seed() & 0xFFFFFFFF  # read, not drawn: the caller's random numbers stay as they were
        self._layout = PageLayout(page_bytes)
        self._formats: list[StateFormat] = []  # of the parameters that have a place, by number
        self._devices: list[torch.device] = []  # likewise: where their state is
        self._steps: list[int] = []  # steps taken, likewise
        self._caches: dict[torch.device, PageCache] = {}
        self._host: PageCache | None = None  # below the accelerators' caches
        # page -> its frame and the state of its runs
        self._views: dict[int, tuple[Tensor, list[tuple[ParameterRun, AdamwState]]]] = {}
        self._unusable: str | None = None  # why, if it is
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._file = PageFile(path, run=run, page_bytes=page_bytes) if path is not None else None
        if self._file is not None:
            weakref.finalize(self, self._file.close)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its settings and dtypes are checked here."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_hyperparameters(group)
        for param in group["params"]:
            check_parameter(param, self.master_weights)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters whose ``grad`` is None keep their value and their state.

        Args:
            closure: re-evaluates the model and returns the loss.
        Returns: what ``closure`` returned, or None.
        Raises:
            ConfigError: a gradient is sparse, or a parameter has moved to another device.
            PagingError: the file failed. If it failed before anything changed, the optimiser can go on; in the middle
                of a step it cannot, and says so.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._prepare()
        parts = self._parts()
        if not parts:
            return loss
        pages = [page for page in self._layout.pages if any(run.param in parts for run in page.runs)]
        if self._file is not None:
            self._file.check()
        self._unusable = _TORN
        for batch in self._sweep(pages):
            states = [pair for page, frame in batch for pair in self._states(page, frame) if pair[0].param in parts]
            step_runs(states, parts)
        for number in parts:
            self._steps[number] += 1
        self._unusable = None
        return loss

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dictionary, the state copied to CPU tensors in its own precision.

        Per parameter: ``step``, ``exp_avg``, ``exp_avg_sq`` (uint8 codes with ``exp_avg_absmax`` and
        ``exp_avg_sq_absmax`` beside them where 8-bit) and ``master``. 32-bit state without masters is what
        ``torch.optim.AdamW`` writes.
        """
        if self._has_state():
            self._prepare()
            self.state.update(self._gather())
        try:
            saved = super().state_dict()
        finally:
            self.state.clear()
        saved["seed"] = self._seed
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, or the state of a ``torch.optim.AdamW``; tiers and budget stay as made.

        Unlike torch this never casts the state to the parameter's dtype, which would cut float32 moments to bfloat16,
        and never puts it on the accelerator as a whole.

        Raises: ConfigError: the state has another form (8-bit for 32-bit, another shape).
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._seed = state_dict.get("seed", self._seed)
        if not state_dict["state"] and not self._has_state():
            return
        if self._unusable == _TORN:
            self._unusable = None  # what the step left behind is replaced
        self._prepare()
        saved = {number: state_dict["state"].get(number, {}) for number in range(len(self._steps))}
        for number, param in enumerate(self._params()):
            check_saved(number, param, self._formats[number], saved[number])
        changed = {number for number in saved if saved[number] or self._steps[number]}
        pages = [page for page in self._layout.pages if any(run.param in changed for run in page.runs)]
        self._unusable = _TORN
        for batch in self._sweep(pages):
            for page, frame in batch:
                for run in page.runs:
                    scatter(run, saved[run.param], frame)
        self._steps = [int(saved[number].get("step", 0)) for number in saved]
        self._unusable = None

    def commit(self, mark: str | None = None) -> None:
        """Make the state of this moment the one a killed run finds in its file (call it with each checkpoint).

        Args:
            mark: a name for this moment; ``committed_mark`` says it, also when the file is opened again.
        Raises: ConfigError: there is no file. PagingError: it failed; the previous commit stands.
        """
        if self._file is None:
            raise ConfigError("commit: this optimiser has no file; give path=, or save state_dict()")
        self._prepare()
        for cache in self._tiers():
            cache.flush()
        self._file.commit(
            {"layout": self._layout.fingerprint(), "steps": self._steps, "seed": self._seed, "mark": mark}
        )
        for cache in self._tiers():
            cache.let_go_of_committed()

    @property
    def has_file(self) -> bool:
        """Whether there is a file, for ``commit``."""
        return self._file is not None

    @property
    def committed_mark(self) -> str | None:
        """The mark of the file's last commit, be it of this optimiser or of the one whose file it took up."""
        return self._file.record["mark"] if self._file is not None and self._file.record is not None else None

    def discard(self) -> None:
        """Remove the file and its commit, as their run is done; the optimiser cannot be used any more."""
        if self._file is not None:
            self._file.remove()
            self._unusable = "discard() has removed its file"

    def relieve(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function``; if memory runs out, move the state out of the way and call it once more.

        Wrap what allocates beside the optimiser, the forward and backward pass. It must be fit to be called again:
        set the gradients to None, or to what they were, inside it.

        Returns: what ``function`` returned.
        Raises: what ``function`` raised the second time, or the first time if there was nothing to move.
        """
        try:
            return function(*args, **kwargs)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or self.evict() == 0:
                raise
        return function(*args, **kwargs)

    def evict(self) -> int:
        """Move all state to the lower tiers and release its memory; the next step brings back what the budget allows.

        Returns: bytes released on the parameters' devices; 0 if there is no lower tier.
        """
        self._views.clear()  # they would keep the frames' memory
        released = sum(cache.evict() for cache in self._caches.values())
        if released and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return released

    def paging_statistics(self) -> PagingStatistics:
        """Return resident, paged and moved bytes and the time spent moving them."""
        pages = sum(any(self._steps[run.param] for run in page.runs) for page in self._layout.pages)
        resident = sum(cache.resident_bytes for cache in self._caches.values())
        return PagingStatistics(
            resident_bytes=resident,
            paged_bytes=max(pages * self._layout.page_bytes - resident, 0),
            moved_bytes=sum(cache.moved_bytes for cache in self._tiers()),
            moved_s=sum(cache.moved_s for cache in self._caches.values()),  # contains the tiers below
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of all parameters that have a place, wherever it is."""
        return self._layout.state_bytes

    def __getstate__(self) -> NoReturn:
        raise TypeError("PagedAdamW cannot be pickled or deep-copied: it owns its pages and file; use state_dict()")

    def _has_state(self) -> bool:
        return any(self._steps) or (self._file is not None and self._file.record is not None)

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _tiers(self) -> list[PageCache]:
        """Return all caches, those above before those below."""
        return [*self._caches.values(), *([self._host] if self._host is not None else [])]

    def _prepare(self) -> None:
        """Give new parameters their place. Done late, as Accelerate moves models after the optimiser was made."""
        if self._unusable is not None:
            raise PagingError(
                f"the optimiser cannot go on: {self._unusable}. Load model and optimiser from the last checkpoint"
            )
        params = self._params()
        placed = len(self._steps)
        if placed < len(params):
            self._formats += [
                format_of(param, state_bits=self.state_bits, master_weights=self.master_weights)
                for param in params[placed:]
            ]
            self._devices += [param.device for param in params[placed:]]
            self._steps += [0] * (len(params) - placed)
            self._layout.add([(n, params[n], self._formats[n]) for n in range(placed, len(params))])
        for device in {page.device for page in self._layout.pages} - self._caches.keys():
            self._caches[device] = self._new_cache(device)
        if self._file is not None:
            if placed == 0 and self._file.record is not None:
                self._resume(self._file.record)
            self._file.grow(len(self._layout.pages))

    def _new_cache(self, device: torch.device) -> PageCache:
        page_bytes = self._layout.page_bytes
        capacity = _capacity(self.budget_bytes, page_bytes)
        if device.type != "cpu":
            below: PageFile | PageCache | None = self._host_cache(pinned=device.type == "cuda")
        elif self._file is not None and can_map(self._file):
            return PageCache(MappedFrames(self._file), capacity=capacity)
        else:
            below = self._file
        return PageCache(Frames(device, page_bytes=page_bytes, below=below), capacity=capacity)

    def _host_cache(self, *, pinned: bool) -> PageCache:
        if self._host is None:
            page_bytes = self._layout.page_bytes
            frames = Frames(torch.device("cpu"), page_bytes=page_bytes, below=self._file, pinned=pinned)
            self._host = PageCache(frames, capacity=_capacity(self.host_budget_bytes, page_bytes))
        return self._host

    def _resume(self, record: dict[str, Any]) -> None:
        """Take up the committed state of the file."""
        assert self._file is not None
        if record["layout"] != self._layout.fingerprint():
            raise PagingError(
                f"{self._file.path}: holds the state of other parameters or settings (layout {record['layout']}, this "
                f"model's is {self._layout.fingerprint()}). Resume with the same model, state_bits, master_weights "
                "and page_bytes, or remove the file"
            )
        self._steps, self._seed = list(record["steps"]), record["seed"]

    def _parts(self) -> dict[int, ParameterStep]:
        """Return what each parameter with a gradient needs for its next step, by number; nothing has changed yet."""
        parts = {}
        known: dict[tuple[int, int], StepScalars] = {}  # of a group and a step
        pairs = [(param, group) for group in self.param_groups for param in group["params"]]
        for number, (param, group) in enumerate(pairs):
            if param.grad is None or param.numel() == 0:
                continue
            if param.grad.is_sparse:
                raise ConfigError("PagedAdamW takes dense gradients; build the embedding with sparse=False")
            if param.device != self._devices[number]:
                raise ConfigError(
                    f"parameter {number} is on {param.device}, its state on {self._devices[number]}: the model was "
                    "moved after the first step. Save state_dict(), make a new optimiser for the moved model, load it"
                )
            step = self._steps[number] + 1
            if (id(group), step) not in known:
                known[id(group), step] = scalars_of(group, step)
            stochastic = param.dtype == torch.bfloat16 and self.master_weights == "stochastic"
            key = rounding_key(self._seed, param=number, step=step) if stochastic else 0
            parts[number] = ParameterStep(param, param.grad, known[id(group), step], key)
        return parts

    def _sweep(self, pages: list[Page], *, change: bool = True) -> Iterator[list[tuple[Page, Tensor]]]:
        """Yield the pages with their frames in batches, device by device."""
        for device, cache in self._caches.items():
            here = [page.number for page in pages if page.device == device]
            for batch in cache.sweep(here, change=change):
                yield [(self._layout.pages[number], frame) for number, frame in batch]

    def _states(self, page: Page, frame: Tensor) -> list[tuple[ParameterRun, AdamwState]]:
        """Return the state of each run of a page; made once for a page that stays in its frame."""
        known = self._views.get(page.number)
        if known is None or known[0] is not frame:
            known = self._views[page.number] = (frame, [(run, run.state(frame)) for run in page.runs])
        return known[1]

    def _gather(self) -> dict[Tensor, dict[str, Tensor]]:
        """Copy the state of every parameter that has taken a step to CPU tensors of its shape."""
        gathered: dict[int, dict[str, Tensor]] = {}
        params = self._params()
        for number, step in enumerate(self._steps):
            if step:
                whole = whole_state(params[number].numel(), self._formats[number], new_values=self._new_values)
                gathered[number] = {"step": torch.tensor(float(step)), **whole}
        wanted = [page for page in self._layout.pages if any(run.param in gathered for run in page.runs)]
        for batch in self._sweep(wanted, change=False):
            for page, frame in batch:
                for run in page.runs:
                    if run.param in gathered:
                        collect(run, frame, gathered[run.param])
        for number, state in gathered.items():
            for name in ("exp_avg", "exp_avg_sq", "master"):
                if name in state:
                    state[name] = state[name].view(params[number].shape)
        return {params[number]: state for number, state in gathered.items()}

    def _new_values(self, count: int, dtype: torch.dtype) -> Tensor:
        if self._file is None:
            return torch.zeros(count, dtype=dtype)
        try:
            return zeros_in_file(self._file.path.parent, count, dtype)
        except OSError as error:
            self._file.explain(error, "put the whole state beside it")


def _capacity(budget_bytes: int | None, page_bytes: int) -> int | None:
    return None if budget_bytes is None else budget_bytes // page_bytes
