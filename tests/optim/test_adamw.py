"""PagedAdamW: torch's AdamW in every respect, one trajectory whatever the budget, and the promises beyond torch's."""

import copy
import gc
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longfit.errors import ConfigError, PagingError
from longfit.kernels.dispatch import use_backend
from longfit.optim.adamw import PagedAdamW

PAGE_BYTES = 65_536
SMALL = {"page_bytes": PAGE_BYTES, "budget_bytes": 3 * PAGE_BYTES}
HYPER = {"lr": 1e-2, "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """All that is awkward: many pages, a few elements, a transposed and a strided one, none at all, a scalar."""
    tensors = [
        torch.randn(300, 700),
        torch.randn(5),
        torch.randn(640, 90).t(),
        torch.randn(200, 700)[:, ::7],
        torch.empty(0, 3),
        torch.randn(()),
    ]
    return [nn.Parameter(tensor.to(dtype)) for tensor in tensors]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def equal(some: list[nn.Parameter], others: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def clones(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


# --- the mathematics -------------------------------------------------------------------------------------------------


def test_fifty_steps_paged_equal_resident_bit_for_bit_and_torch_within_rounding(tmp_path: Path) -> None:
    params = parameters()
    paged, peers = clones(params), clones(params)
    train(params, PagedAdamW(params, **HYPER), range(50))
    train(paged, PagedAdamW(paged, **HYPER, **SMALL, path=tmp_path / "pages"), range(50))
    train(peers, torch.optim.AdamW(peers, **HYPER), range(50))
    assert equal(params, paged)
    for param, peer in zip(params, peers, strict=True):
        # As derived in tests/numerics/test_adamw.py: 50 steps, values below 8, updates below 32 lr.
        atol = 50 * torch.finfo(torch.float32).eps * (2 * 8 + 10 * 32 * HYPER["lr"])
        torch.testing.assert_close(param, peer, rtol=0, atol=atol)


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize(
    ("dtype", "master_weights"),
    [
        (torch.float32, "fp32"),
        (torch.float64, "fp32"),
        (torch.float16, "fp32"),
        (torch.bfloat16, "fp32"),
        (torch.bfloat16, "stochastic"),
    ],
)
def test_one_trajectory_for_every_budget_and_backend(
    tmp_path: Path, dtype: torch.dtype, state_bits: int, master_weights: str
) -> None:
    options = {**HYPER, "state_bits": state_bits, "master_weights": master_weights, "page_bytes": PAGE_BYTES}
    params = parameters(dtype)
    paged, slow = clones(params), clones(params)
    train(params, PagedAdamW(params, **options), range(4))
    budget = {"budget_bytes": 2 * PAGE_BYTES, "path": tmp_path / "pages"}
    train(paged, PagedAdamW(paged, **options, **budget), range(4))
    with use_backend("reference"):
        train(slow, PagedAdamW(slow, **options), range(4))
    assert equal(params, paged)
    assert equal(params, slow)


def test_groups_have_their_own_settings_and_can_be_added() -> None:
    params = parameters()
    peers = clones(params)

    def groups(p: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": p[:2], "lr": 1e-3}, {"params": p[2:4], "weight_decay": 0.5, "betas": (0.5, 0.9)}]

    mine, theirs = (
        PagedAdamW(groups(params), lr=1e-2, weight_decay=0.0),
        torch.optim.AdamW(groups(peers), lr=1e-2, weight_decay=0.0),
    )
    for side, optimizer in ((params, mine), (peers, theirs)):
        train(side[:4], optimizer, range(3))
        optimizer.add_param_group({"params": side[4:], "eps": 1e-3})
        train(side, optimizer, range(3, 6))
    for param, peer in zip(params, peers, strict=True):
        torch.testing.assert_close(param, peer, rtol=0, atol=6 * torch.finfo(torch.float32).eps * 20)


def test_parameters_without_gradients_wait(tmp_path: Path) -> None:
    params = parameters()
    peers = clones(params)
    mine = PagedAdamW(params, **HYPER, **SMALL, path=tmp_path / "pages")
    theirs = torch.optim.AdamW(peers, **HYPER)
    for step in range(6):
        for side, optimizer in ((params, mine), (peers, theirs)):
            set_gradients(side, step)
            side[step % 3].grad = None
            optimizer.step()
    for param, peer in zip(params, peers, strict=True):
        torch.testing.assert_close(param, peer, rtol=0, atol=6 * torch.finfo(torch.float32).eps * 20)
    PagedAdamW(clones(params)).step()  # no gradient at all


def test_8_bit_state_follows_torch_as_closely_as_bitsandbytes_asks() -> None:
    """bitsandbytes' test of its own CUDA optimiser: 50 steps, weights set equal after each, mean error of a step."""
    for dtype, limit in ((torch.float32, 6e-5), (torch.float16, 6e-5), (torch.bfloat16, 1.7e-4)):
        exact = nn.Parameter(torch.randn(512, 128) * 0.1)
        param = nn.Parameter(exact.detach().clone().to(dtype))
        mine, theirs = PagedAdamW([param], lr=1e-3, state_bits=8), torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.0)
        for _ in range(50):
            grad = torch.randn(512, 128) * 0.01
            exact.grad, param.grad = grad.clone(), grad.to(dtype)
            mine.step()
            theirs.step()
            assert (param.float() - exact).abs().mean() < limit
            with torch.no_grad():
                exact.copy_(exact.to(dtype))
                param.copy_(exact)


def test_small_steps_move_bfloat16_weights_with_either_choice_and_not_with_torch() -> None:
    results = {}
    for name in ("fp32", "stochastic", "torch"):
        norm = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        if name == "torch":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW([norm], lr=2e-5, weight_decay=0.0)
        else:
            optimizer = PagedAdamW([norm], lr=2e-5, master_weights=name)
        for _ in range(200):
            norm.grad = torch.ones_like(norm)
            optimizer.step()
        results[name] = norm.float().mean().item()
    assert results["torch"] == 1.0
    assert results["fp32"] == torch.tensor(1 - 200 * 2e-5).bfloat16().item()
    # 200 roundings, each up or down by 1/256: the mean of 4,096 elements is within five standard deviations.
    assert results["stochastic"] == pytest.approx(1 - 200 * 2e-5, abs=5 / 256 * (200 * 0.01 / 4096) ** 0.5)


def test_making_an_optimiser_draws_no_random_number() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    PagedAdamW([nn.Parameter(torch.zeros(3))], master_weights="stochastic")
    assert torch.equal(torch.rand(3), expected)


# --- a torch.optim.Optimizer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"state_bits": 32}),
        (torch.bfloat16, {"state_bits": 8}),
        (torch.bfloat16, {"state_bits": 32, "master_weights": "stochastic"}),
    ],
)
def test_state_dict_round_trip(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = parameters(dtype)
    optimizer = PagedAdamW(params, **HYPER, **options)
    train(params, optimizer, range(3))
    torch.save({"params": [p.data for p in params], "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)

    torch.manual_seed(77)  # a resumed process has another seed
    resumed = [nn.Parameter(tensor) for tensor in saved["params"]]
    other = PagedAdamW(resumed, lr=5.0, **options, **SMALL, path=tmp_path / "pages")
    train(resumed, other, range(90, 91))  # state that the load must replace
    with torch.no_grad():
        for param, tensor in zip(resumed, params, strict=True):
            param.copy_(tensor)
    other.load_state_dict(saved["optimizer"])
    assert other.paging_statistics().resident_bytes <= SMALL["budget_bytes"], "a resumed state keeps to the budget"
    train(params, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    assert equal(params, resumed)


def test_state_dicts_are_exchanged_with_torch() -> None:
    params = parameters()
    mine, peers = clones(params), clones(params)
    theirs = torch.optim.AdamW(peers, **HYPER)
    train(peers, theirs, range(3))
    optimizer = PagedAdamW(mine, **HYPER)
    optimizer.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for param, peer in zip(mine, peers, strict=True):
            param.copy_(peer)
    fresh = clones(peers)
    back = torch.optim.AdamW(fresh, **HYPER)
    back.load_state_dict({key: value for key, value in optimizer.state_dict().items() if key != "seed"})
    train(mine, optimizer, range(3, 5))
    train(fresh, back, range(3, 5))
    for param, peer in zip(mine, fresh, strict=True):
        torch.testing.assert_close(param, peer, rtol=0, atol=5 * torch.finfo(torch.float32).eps * 20)


def test_the_state_keeps_its_precision_and_shape() -> None:
    params = parameters(torch.bfloat16)
    optimizer = PagedAdamW(params, state_bits=8)
    train(params, optimizer, range(1))
    state = optimizer.state_dict()["state"]
    assert state[0]["exp_avg"].dtype == torch.uint8
    assert state[0]["exp_avg"].shape == params[0].shape
    assert state[0]["exp_avg_absmax"].shape == (-(-params[0].numel() // 256),)
    assert state[0]["master"].dtype == torch.float32
    assert state[1]["exp_avg"].dtype == torch.float32, "small parameters keep 32 bits"
    assert 4 not in state, "an empty parameter has no state"
    assert optimizer.state == {}, "the state lives in pages"


def test_a_state_of_another_form_is_refused() -> None:
    params = parameters()
    optimizer = PagedAdamW(params)
    train(params, optimizer, range(1))
    with pytest.raises(ConfigError, match=r"parameter 0, exp_avg: got torch.float32.*state_bits"):
        PagedAdamW(clones(params), state_bits=8).load_state_dict(optimizer.state_dict())
    shorter = [nn.Parameter(torch.zeros(3)) for _ in params]
    with pytest.raises(ConfigError, match=r"got torch.float32 \[300, 700\]; this optimiser keeps 3 values"):
        PagedAdamW(shorter).load_state_dict(optimizer.state_dict())


def test_closures_schedulers_and_hooks() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = PagedAdamW([param], lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    seen: list[str] = []
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(f"state {sorted(saved['state'])}"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    scheduler.step()
    before = param.detach().clone()
    optimizer.step(closure)
    assert scheduler.get_last_lr() == [pytest.approx(0.05)]
    torch.testing.assert_close(before - param, torch.full((3,), 0.05), rtol=1e-2, atol=0)
    optimizer.state_dict()
    assert seen == ["step", "step", "state [0]"]


def test_accelerate_and_the_trainer(tmp_path: Path) -> None:
    """Resuming a Trainer from its checkpoint ends where the uninterrupted run ends, bit for bit."""
    transformers = pytest.importorskip("transformers")

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.layer = nn.Linear(40, 200).bfloat16()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.layer(x.bfloat16()).float().mean(-1) - labels).square().mean()}

    rows = [{"x": torch.randn(40), "labels": torch.randn(())} for _ in range(16)]

    def trainer(folder: str, name: str) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=4, save_steps=2, per_device_train_batch_size=4, seed=1,
            report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, learning_rate=1e-3,
        )  # fmt: skip
        options = {"state_bits": 8, **SMALL, "path": tmp_path / name}
        return transformers.Trainer(
            Regression(), arguments, train_dataset=rows, optimizer_cls_and_kwargs=(PagedAdamW, options)
        )

    whole = trainer("whole", "a")
    whole.train()
    resumed = trainer("whole", "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert equal(list(whole.model.parameters()), list(resumed.model.parameters()))
    assert not torch.equal(whole.model.layer.weight, Regression().layer.weight)


def test_copies_are_refused_and_say_what_to_do() -> None:
    optimizer = PagedAdamW([nn.Parameter(torch.ones(3))])
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"use state_dict\(\)"):
            attempt(optimizer)


# --- paging ----------------------------------------------------------------------------------------------------------


def test_statistics_and_release(tmp_path: Path) -> None:
    params = [nn.Parameter(torch.zeros(100_000)) for _ in range(3)]
    path = tmp_path / "pages"
    optimizer = PagedAdamW(params, **SMALL, path=path)
    train(params, optimizer, range(2))
    statistics = optimizer.paging_statistics()
    assert statistics.resident_bytes == SMALL["budget_bytes"]
    assert 2_400_000 <= statistics.resident_bytes + statistics.paged_bytes < 2_400_000 + PAGE_BYTES
    assert optimizer.state_bytes == 3 * 2 * 4 * 100_000
    assert statistics.moved_bytes > 0
    assert statistics.moved_s > 0

    assert optimizer.evict() == SMALL["budget_bytes"]
    assert optimizer.paging_statistics().resident_bytes == 0
    del optimizer
    gc.collect()
    assert not path.exists()

    resident = PagedAdamW(params)
    train(params, resident, range(1))
    assert resident.paging_statistics().moved_bytes == 0
    assert resident.paging_statistics().paged_bytes == 0


def test_commit_lets_another_process_go_on(tmp_path: Path) -> None:
    params = parameters(torch.bfloat16)
    options = {**HYPER, **SMALL, "path": tmp_path / "pages", "run": "a run", "state_bits": 8}
    optimizer = PagedAdamW(params, **options)
    train(params, optimizer, range(3))
    optimizer.commit()
    others = clones(params)
    train(params, optimizer, range(3, 5))
    del optimizer
    gc.collect()
    resumed = PagedAdamW(others, **options)
    train(others, resumed, range(3, 5))
    assert equal(params, others)
    del resumed
    gc.collect()
    with pytest.raises(PagingError, match="other parameters or settings"):
        PagedAdamW(clones(params)[:2], **options).state_dict()


def test_the_mark_of_the_last_commit_is_found_again_and_a_discarded_file_is_gone(tmp_path: Path) -> None:
    params = parameters()
    optimizer = PagedAdamW(params, **HYPER, **SMALL, path=tmp_path / "pages", run="mine")
    train(params, optimizer, range(2))
    assert optimizer.committed_mark is None
    optimizer.commit("step 2")
    del optimizer
    gc.collect()
    optimizer = PagedAdamW(params, **HYPER, **SMALL, path=tmp_path / "pages", run="mine")
    assert optimizer.committed_mark == "step 2"
    saved = optimizer.state_dict()
    optimizer.discard()
    assert list(tmp_path.iterdir()) == []
    for use in (optimizer.step, optimizer.commit, lambda: optimizer.load_state_dict(saved)):
        with pytest.raises(PagingError, match=r"discard\(\) has removed its file"):
            use()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_whole_state_of_a_paged_optimiser_needs_no_memory(tmp_path: Path) -> None:
    param = nn.Parameter(torch.zeros(1 << 20))
    param.grad = torch.ones(1 << 20)
    optimizer = PagedAdamW([param], **HYPER, **SMALL, path=tmp_path / "pages")
    optimizer.step()
    state = optimizer.state_dict()["state"][0]
    assert state["exp_avg"].shape == param.shape
    assert torch.equal(state["exp_avg_sq"], state["exp_avg_sq"][:1].expand_as(param))
    address = f"{state['exp_avg'].data_ptr():x}-"
    [mapping] = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(address)]
    assert str(tmp_path) in mapping
    assert "(deleted)" in mapping


def test_relieve_evicts_and_tries_once_more(tmp_path: Path) -> None:
    params = parameters()
    optimizer = PagedAdamW(params, **SMALL, path=tmp_path / "pages")
    train(params, optimizer, range(1))
    calls = []

    def hungry(error: Exception) -> str:
        calls.append(optimizer.paging_statistics().resident_bytes)
        if len(calls) == 1:
            raise error
        return "done"

    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ):
        calls.clear()
        train(params, optimizer, range(1))
        assert optimizer.relieve(hungry, error) == "done"
        assert calls == [SMALL["budget_bytes"], 0]

    calls.clear()
    with pytest.raises(RuntimeError, match="a bug"):
        optimizer.relieve(hungry, RuntimeError("a bug"))
    calls.clear()
    resident = PagedAdamW(params)
    with pytest.raises(MemoryError):  # nothing can be moved out of the way
        resident.relieve(hungry, MemoryError())
    assert len(calls) == 1


def test_peak_memory_keeps_to_the_budget(tmp_path: Path) -> None:
    """16 M parameters, 128 MB of state, a budget of 8 MiB: the peak grows by less than budget + 64 MiB."""
    script = f"""
import resource, sys, torch
from longfit.optim.adamw import PagedAdamW
torch.optim.AdamW([torch.nn.Parameter(torch.ones(5000))])  # imports
small = torch.nn.Parameter(torch.ones(5000)); small.grad = torch.ones(5000)
PagedAdamW([small]).step()  # more imports, the kernels
param = torch.nn.Parameter(torch.ones(16_000_000)); param.grad = torch.ones(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
optimizer = PagedAdamW([param], page_bytes=1 << 20, budget_bytes=8 << 20, path={str(tmp_path / "pages")!r})
for _ in range(2):
    optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True)
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < (8 + 64) << 20


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is known to Linux")
def test_a_limit_on_the_address_space_is_a_paging_error(tmp_path: Path) -> None:
    """There is no room for the stack of the paging thread, nor for the mapping of a whole state."""
    script = f"""
import re, resource, torch
from longfit.errors import PagingError
from longfit.optim.adamw import PagedAdamW

def limited(call):
    size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    try:
        call()
    except PagingError as error:
        print(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

param = torch.nn.Parameter(torch.ones(1 << 20)); param.grad = torch.ones(1 << 20)
def made(name):
    path = {str(tmp_path)!r} + "/" + name
    return PagedAdamW([param], page_bytes=1 << 20, budget_bytes=2 << 20, path=path)
torn = made("torn")
torn.state_dict()
limited(torn.step)
whole = made("whole")
whole.step()
limited(whole.state_dict)
assert whole.state_dict()["state"][0]["exp_avg"].abs().sum() > 0
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "could not start the thread that moves pages" in done.stdout
    assert re.search(r"could not put the whole state beside it: .* raise the limit \(ulimit -v\)", done.stdout)


def test_a_model_moved_after_the_first_step_is_refused() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = PagedAdamW([param])
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does before it moves the model
    train([param], optimizer, range(1))
    moved = nn.Parameter(param.to("meta"))
    moved.grad = torch.ones(3, device="meta")
    optimizer.param_groups[0]["params"][0] = moved
    with pytest.raises(ConfigError, match=r"parameter 0 is on meta, its state on cpu.*make a new optimiser"):
        optimizer.step()


@pytest.mark.gpu
def test_an_accelerator_has_the_same_trajectory_under_any_budget() -> None:
    params = [nn.Parameter(param.detach().cuda()) for param in parameters(torch.bfloat16)]
    paged = clones(params)
    train_on = [PagedAdamW(params, **HYPER, state_bits=8), PagedAdamW(paged, **HYPER, **SMALL, state_bits=8)]
    for step in range(5):
        for side, optimizer in zip((params, paged), train_on, strict=True):
            generator = torch.Generator("cuda").manual_seed(step)
            for param in side:
                param.grad = torch.randn(param.shape, generator=generator, device="cuda").bfloat16()
            optimizer.step()
    assert equal(params, paged)
    assert train_on[1].paging_statistics().resident_bytes <= SMALL["budget_bytes"]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_bits": 16}, "state_bits: got 16; allowed: 32 or 8"),
        ({"master_weights": "none"}, "master_weights: got 'none'; allowed: 'fp32' or 'stochastic'"),
        ({"page_bytes": 5000}, "page_bytes: got 5000; allowed: multiples of 4096 from 65536"),
        ({"budget_bytes": 100_000, "path": "x"}, "budget_bytes: got 100000; allowed: at least 2 pages"),
        ({"budget_bytes": 1 << 30}, "give path="),
        ({"lr": -1.0}, "lr: got -1.0; allowed: at least 0"),
        ({"betas": (0.9, 1.0)}, "betas: got"),
        ({"eps": 0.0}, "eps: got 0.0; allowed: above 0"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PagedAdamW([nn.Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PagedAdamW([nn.Parameter(torch.ones(3, dtype=torch.complex64))]), "dtype torch.complex64; allowed"),
        (
            lambda: PagedAdamW([nn.Parameter(torch.ones(3, dtype=torch.float16))], master_weights="stochastic"),
            "allowed with master_weights='stochastic': float32, float64, bfloat16",
        ),
        (lambda: PagedAdamW([nn.Parameter(torch.ones(3))]).commit(), "commit: this optimiser has no file"),
    ],
)
def test_more_refusals(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_sparse_gradients_are_refused_before_anything_moves() -> None:
    dense, embedding = nn.Parameter(torch.ones(3)), nn.Embedding(10, 4, sparse=True)
    dense.grad = torch.ones(3)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = PagedAdamW([dense, embedding.weight])
    with pytest.raises(ConfigError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))
    embedding.weight.grad = None
    optimizer.step()
