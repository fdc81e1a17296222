"""What a step costs on many devices: predicted from bytes, compute per tile and link speeds, and checked here.

    python benchmarks/scale.py             2 and 4 processes over links of 10 Gbit, 1 Gbit and 100 Mbit/s; predict
    python benchmarks/scale.py --render    the tables from the JSON

Each process has a network namespace of its own; ``tc`` holds its link to a rate (Linux, root). Without them, say
``--links localhost``: one link, as fast as it is. A small model is trained by gloo processes in float32, every process
with one thread. Per cell:

    compute   all processes take steps side by side that exchange nothing: of as many tokens as each will have, with
              shifted and with exact attention, and exact of four times as many. From these, seconds a token, and a
              token and key: the tile's cost. And a window that each shares with itself: what projecting keys costs
    link      an all-to-all and an all-reduce of a few bytes and of many: seconds a message, bytes a second
    step      the sharings themselves, in turn with the others, as other work on the machine changes all of them

    predicted = tokens x (a + keys x b) + projections x c + messages x latency + bytes / rate

with the bytes of ``parallel/traffic.py``, which the cell also counts. The large table takes the same formula for
Llama-3.1-8B on 8 to 1,024 devices; its compute and links are assumptions that stand above it, not measurements.

Results: benchmarks/results/scale.json, .md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from longfit.parallel import traffic
from machine import ROOT, commit, machine

RESULTS = Path(__file__).resolve().parent / "results"
NAME = "scale"
RATES = {"10 Gbit/s": "10gbit", "1 Gbit/s": "1gbit", "100 Mbit/s": "100mbit", "localhost": None}
PROCESSES = (2, 4)
TOKENS = 512
"""Of each process."""
LONG = 4
"""Times as many in a longer window, which tells what a key costs."""
GROUP, TILE, LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, RANK = 256, 256, 4, 256, 8, 4, 32, 8
STEPS = 7
SHARINGS = ("replicas", "shifted", "exact", "shards")
ALONE = ("shifted", "exact", "with itself", "long")
LARGE = 1 << 19  # bytes of the message that tells a link's rate: about what a layer sends here


# ------------------------------------------------------------------------------------------------ one process
def model_of(attention: str) -> Any:
    """A small Llama with adapters, swept."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from longfit.attention.hf_attention import attention_key
    from longfit.engine.sweep.install import enable_sweep
    from longfit.layers.linear4bit import Linear4bit
    from longfit.model.adapters import add_adapters

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=DIM, vocab_size=512, max_position_embeddings=1 << 20,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and "lm_head" not in name:
            model.set_submodule(name, Linear4bit.from_linear(module))
    model.set_attn_implementation(attention_key(attention, GROUP if attention == "shifted" else None))
    model = add_adapters(model, rank=RANK)
    enable_sweep(model, tile=TILE, saved_attention_bytes=0)
    return model.train()


def step_of(sharing: str) -> tuple[Callable[[], None], Callable[[], int]]:
    """A step with a kind of sharing, or with none; and the bytes of keys sent since it was asked last."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from longfit.engine.loss.training_loss import TrainingLoss, training_loss
    from longfit.parallel.device_layout import DeviceLayout
    from longfit.parallel.sequence import SequenceParallelLoss, sequence_group
    from longfit.parallel.shard import decoder_layers, mesh_of, shard_model

    processes = dist.get_world_size()
    shares_window = sharing in ("shifted", "exact")
    model = model_of("shifted" if "shifted" in sharing or sharing in ("replicas", "shards") else "exact")
    loss_of: Any = training_loss
    if shares_window:
        loss_of = SequenceParallelLoss(dist.group.WORLD, balanced=sharing == "exact")
    elif sharing == "alone with itself":
        group = sequence_group([[rank] for rank in range(processes)], dist.get_rank())
        loss_of = SequenceParallelLoss(group, balanced=True)
    module: Any = TrainingLoss(model, loss=loss_of)
    if sharing == "shards":
        shard_model(module, decoder_layers(model), mesh_of(DeviceLayout(processes, 1, processes), torch.device("cpu")))
    elif not sharing.startswith("alone"):
        module = DistributedDataParallel(module, broadcast_buffers=False)
    length = TOKENS * (processes if shares_window else LONG if sharing == "alone long" else 1)
    ids = torch.randint(512, (1, length), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        module(ids, num_items=length).backward()
        model.zero_grad(set_to_none=True)

    return step, loss_of.traffic.taken if shares_window else lambda: 0


def seconds_of(step: Callable[[], None]) -> float:
    """Seconds of a step that all processes begin together, of the slowest."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    step()
    taken = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def link() -> dict[str, float]:
    """Seconds of a message and bytes a second of what the sharings call.

    exchange    everybody sends to all others at once, as exact attention does: gloo sends slower while it receives
    hand_on     everybody sends to the next, as shifted attention does
    reduce      everybody adds up
    """
    import torch
    import torch.distributed as dist

    processes, rank = dist.get_world_size(), dist.get_rank()

    def to_others(size: int) -> list[int]:
        return [0 if other == rank else size // (processes - 1) for other in range(processes)]

    def send(out: list[int], into: list[int]) -> Callable[[], None]:
        sent, received = torch.zeros(sum(out), dtype=torch.uint8), torch.empty(sum(into), dtype=torch.uint8)
        return lambda: dist.all_to_all_single(received, sent, into, out)

    def hand_on(size: int) -> Callable[[], None]:
        places = [[size if other == near else 0 for other in range(processes)] for near in (rank + 1, rank - 1)]
        return send(*places)

    def reduce(size: int) -> Callable[[], None]:
        return lambda: dist.all_reduce(torch.zeros(size // 4))

    ways: dict[str, tuple[Callable[[int], Callable[[], None]], float]] = {
        "exchange": (lambda size: send(to_others(size), to_others(size)), 1.0),
        "hand_on": (hand_on, 1.0),
        "reduce": (reduce, 2 * (processes - 1) / processes),
    }
    found = {}
    for name, (make, share) in ways.items():
        small, large = make(64 * processes), make(LARGE)
        small()
        latency = statistics.median(seconds_of(small) for _ in range(9))
        taken = statistics.median(seconds_of(large) for _ in range(7))
        found |= {f"{name}_latency_s": latency, f"{name}_bytes_per_s": share * LARGE / max(taken - latency, 1e-9)}
    return found


def work(rank: int, processes: int, address: str) -> None:
    """Measure one cell as one of its processes; the first prints what was found."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}:29577", rank=rank, world_size=processes, timeout=timedelta(seconds=600)
    )
    found: dict[str, Any] = {"link": link()}
    steps = {name: step_of(name) for name in (*SHARINGS, *(f"alone {kind}" for kind in ALONE))}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1 + STEPS):
        for name, (step, sent) in steps.items():
            taken = seconds_of(step)
            if number:  # the first warms up
                times[name].append(taken)
            else:
                sent()
    found["times"] = times
    for name in SHARINGS:
        total = torch.tensor(float(steps[name][1]()) / STEPS)
        dist.all_reduce(total)
        found[name] = {"key_bytes": float(total) / processes}
    parameters = list(model_of("shifted").parameters())
    found["gradient_bytes"] = sum(p.nbytes for p in parameters if p.requires_grad)
    found["weight_bytes"] = sum(p.nbytes for p in parameters)
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ a cell
@contextmanager
def namespaces(processes: int, rate: str | None) -> Iterator[list[list[str]]]:
    """Network namespaces on one bridge, each sending at a rate; yields what to put before each command."""
    if rate is None:
        yield [[] for _ in range(processes)]
        return

    def call(*words: str) -> None:
        subprocess.run(words, check=True, capture_output=True)

    names = [f"lfscale{number}" for number in range(processes)]
    try:
        call("ip", "link", "add", "lfscale", "type", "bridge")
        call("ip", "link", "set", "lfscale", "up")
        for number, name in enumerate(names):
            call("ip", "netns", "add", name)
            call("ip", "link", "add", f"lfs{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            call("ip", "link", "set", f"lfs{number}", "master", "lfscale", "up")
            inside = ("ip", "netns", "exec", name)
            call(*inside, "ip", "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            call(*inside, "ip", "link", "set", "eth0", "up")
            call(*inside, "ip", "link", "set", "lo", "up")
            limit = ("rate", rate, "burst", "64kb", "latency", "50ms")  # of a bucket that fills while they compute
            call(*inside, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", "lfscale"], check=False, capture_output=True)


def measure(processes: int, rate: str | None) -> dict[str, Any]:
    """Run a cell."""
    address = "127.0.0.1" if rate is None else "10.77.0.1"
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT / "benchmarks"))),
        "GLOO_SOCKET_IFNAME": "lo" if rate is None else "eth0",
    }  # fmt: skip
    with namespaces(processes, rate) as prefixes:
        started = [
            subprocess.Popen(
                [*prefix, sys.executable, __file__, "--rank", str(rank), "--of", str(processes), "--at", address],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            )
            for rank, prefix in enumerate(prefixes)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=1200) for process in started]
    if any(process.returncode for process in started):
        sys.exit("\n".join(error[-2000:] for _, error in outputs))
    found: dict[str, Any] = json.loads(outputs[0][0].splitlines()[-1])
    return {**found, "load": os.getloadavg()[0], "before_other_work": before_other_work(), "commit": commit()}


def before_other_work() -> bool:
    """Whether other processes of this machine get next to nothing: Linux's own nice values of sessions, or of tasks."""
    nice = Path("/proc/self/autogroup")
    if nice.is_file() and Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1":
        return nice.read_text().split()[-1] == "-20"
    return hasattr(os, "getpriority") and os.getpriority(os.PRIO_PROCESS, 0) == -20


# ------------------------------------------------------------------------------------------------ the prediction
@dataclass(frozen=True)
class Link:
    """Seconds of a message, and bytes a second."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float, messages: int) -> float:
        return messages * self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Compute:
    """Seconds of a token, and of a token and a key that it sees."""

    token_s: float
    key_s: float
    projection_s: float

    @classmethod
    def of(cls, kind: str, *, shifted: float, exact: float, long: float, with_itself: float) -> "Compute":
        """From seconds of steps alone, of ``TOKENS`` tokens (or `LONG` times as many), for a kind of attention."""
        each, each_of_long = exact / TOKENS, long / (LONG * TOKENS)
        key_s = max(each_of_long - each, 0.0) / ((LONG - 1) * TOKENS / 2)
        projection_s = max(with_itself - exact, 0.0) / _projections(TOKENS, TOKENS // 2)
        if kind == "shifted":
            return cls(shifted / TOKENS - _shifted_keys(TOKENS, GROUP) * key_s, key_s, projection_s)
        return cls(each - (TOKENS + 1) / 2 * key_s, key_s, projection_s)

    def seconds(self, tokens: float, keys: float, projections: float = 0) -> float:
        return tokens * (self.token_s + keys * self.key_s) + projections * self.projection_s

    def tile_s(self, keys: float) -> float:
        return self.seconds(TILE, keys)


def _projections(tokens: int, sent: int) -> int:
    """How often a token's keys are projected on their own, over the tokens of a process, where it shares a window.

    Args:
        tokens: in the tiles that hold what is sent, or the last tile of a stretch: forward, and again for backward.
        sent: in the tiles whose keys others see: once more with a graph, and twice as much to differentiate it.
    """
    return 2 * tokens + 3 * sent


def _shifted_keys(tokens: int, group: int) -> float:
    """Mean keys of a query: half of the heads in groups, half in groups moved by half a group, cut at both ends."""
    plain = (min(group, tokens) + 1) / 2
    half, whole = group // 2, (tokens - group) // group if tokens >= group else 0
    moved = (2 * half * (half + 1) / 2 + whole * group * (group + 1) / 2) / tokens
    return (plain + moved) / 2


def median_s(cell: dict[str, Any], name: str) -> float:
    """Seconds of a step of this kind."""
    return statistics.median(cell["times"][name])


def predict(cell: dict[str, Any], sharing: str, processes: int) -> dict[str, float]:
    """Seconds of a step of this benchmark's model, by part."""
    alone = {kind.replace(" ", "_"): median_s(cell, f"alone {kind}") for kind in ALONE}
    compute = Compute.of("exact" if sharing == "exact" else "shifted", **alone)
    exchange, hand_on, reduce = (
        Link(cell["link"][f"{way}_latency_s"], cell["link"][f"{way}_bytes_per_s"])
        for way in ("exchange", "hand_on", "reduce")
    )
    gradients = traffic.replica_bytes(cell["gradient_bytes"], num_devices=processes)
    shapes = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "element_bytes": 4}
    keys, key_bytes, network = _shifted_keys(TOKENS, GROUP), 0.0, reduce.seconds(gradients, 1)
    projections = 0
    if sharing == "exact":
        whole = TOKENS * processes
        keys, projections = (whole + 1) / 2, _projections(TOKENS, TOKENS)
        key_bytes = traffic.exact_bytes(num_tokens=whole, num_devices=processes, **shapes)
    elif sharing == "shifted":
        keys = _shifted_keys(TOKENS * processes, GROUP)
        projected = -(-(GROUP // 2) // TILE) * TILE  # whole tiles
        projections = _projections(projected, projected)
        key_bytes = traffic.shifted_bytes(group_size=GROUP, **shapes)
    elif sharing == "shards":
        moved = traffic.shard_bytes(cell["weight_bytes"], cell["gradient_bytes"], num_devices=processes, num_passes=1)
        network = reduce.seconds(moved, 3 * (LAYERS + 1))
    if key_bytes:
        network += (exchange if sharing == "exact" else hand_on).seconds(key_bytes, 3 * LAYERS)
    computing = compute.seconds(TOKENS, keys, projections)
    if sharing == "shifted":
        key_bytes *= (processes - 1) / processes  # the mean, as those at both ends send half
    return {
        "compute_s": computing, "network_s": network, "predicted_s": computing + network, "key_bytes": key_bytes,
        "tile_s": compute.tile_s(keys),
    }  # fmt: skip


@dataclass(frozen=True)
class Large:
    """Llama-3.1-8B on many cards: assumptions, none of which is measured by this project."""

    flops: float = 400e12
    layers: int = 32
    kv_heads: int = 8
    heads: int = 32
    head_dim: int = 128
    linear: float = 6.98e9
    head: float = 0.525e9
    gradient_bytes: int = 4 * 41_943_040

    def step(self, devices: int, tokens: int, group: int | None, joint: Link) -> float:
        """Seconds of a step of one window: FLOPs of LoRA with full recomputation, plus exchanges."""
        keys = tokens / 2 if group is None else group / 2
        attention = 4.5 * self.layers * 2 * self.heads * self.head_dim * 2 * keys
        compute = tokens / devices * (6 * self.linear + 4 * self.head + attention) / self.flops
        shapes = {
            "num_layers": self.layers, "num_kv_heads": self.kv_heads, "head_dim": self.head_dim, "element_bytes": 2,
        }  # fmt: skip
        if group is None:
            sent = traffic.exact_bytes(num_tokens=tokens, num_devices=devices, **shapes)
        else:
            sent = traffic.shifted_bytes(group_size=group, **shapes)
            sent *= max(1, -(-group * devices // (2 * tokens)))  # stretches shorter than half a group: more hops
        network = joint.seconds(sent, 3 * self.layers)
        return (
            compute
            + network
            + joint.seconds(traffic.replica_bytes(self.gradient_bytes, num_devices=devices), 2 * (devices - 1))
        )


LINKS = {
    "300 GB/s, 5 us": Link(5e-6, 300e9),
    "45 GB/s, 10 us": Link(1e-5, 45e9),
    "10 Gbit/s, 50 us": Link(5e-5, 1.25e9),
}
DEVICES = (8, 32, 128, 1024)
WINDOWS = (1 << 20, 4 << 20, 16 << 20)
GROUPS = (8192, None)


# ------------------------------------------------------------------------------------------------ tables
def _priority(cells: dict[str, Any]) -> str:
    """What else the machine did."""
    if all(cell.get("before_other_work") for cell in cells.values()):
        return "The machine had other work, which got next to nothing: the processes ran at nice -20."
    return (
        "**The machine had other work**, as the load shows (runnable processes): times say little, and errors much of"
        " the waiting for a core. Exchanges wait for the slowest process, which the formula does not know."
    )


def tables(results: dict[str, Any]) -> str:
    """The page."""
    about = results["machine"]
    lines = [
        "# A step on many devices: predicted, and measured where it can be", "",
        f"`python benchmarks/scale.py`, {about['cpu']}; {LAYERS} layers, hidden {HIDDEN}, "
        f"{TOKENS:,} tokens a process in tiles of {TILE}, groups of {GROUP}, one thread a process on "
        f"{about['cores']} cores, medians of the steps of each row. Compute was measured between the steps. "
        + _priority(results["cells"]), "",
        "| processes | link | load | sharing | tile, s | compute, s | network, s | predicted, s | measured, s | "
        "error | key bytes, formula | key bytes, counted |",
        "|" + "---|" * 12,
    ]  # fmt: skip
    errors = []
    cells = [(n, rate, f"{n} x {rate}") for n in PROCESSES for rate in RATES if f"{n} x {rate}" in results["cells"]]
    for processes, rate, name in cells:
        cell = results["cells"][name]
        for sharing in SHARINGS:
            p, measured = predict(cell, sharing, processes), median_s(cell, sharing)
            errors.append(abs(p["predicted_s"] / measured - 1))
            numbers = [p["tile_s"], p["compute_s"], p["network_s"], p["predicted_s"], measured]
            lines.append(
                f"| {processes} | {rate} | {cell['load']:.0f} | {sharing} | " + " | ".join(f"{x:.3f}" for x in numbers)
                + f" | {p['predicted_s'] / measured - 1:+.0%} | {p['key_bytes']:,.0f} |"
                f" {cell[sharing]['key_bytes']:,.0f} |"
            )  # fmt: skip
    if errors:
        lines += ["", f"Median error {statistics.median(errors):.0%}, largest {max(errors):.0%}.", ""]
    lines += [
        "Key bytes are the mean of the processes. Of shifted attention, those at both ends send half.", "",
        "## Llama-3.1-8B, one window over many cards (predicted)", "",
        f"Seconds a step. Assumed, not measured: {Large().flops / 1e12:.0f} TFLOP/s a card, no overlap of exchanges"
        " with computing, rank 16, bf16 keys, the links in the columns.", "",
        "| tokens | attention | devices | " + " | ".join(LINKS) + " |", "|" + "---|" * (3 + len(LINKS)),
    ]  # fmt: skip
    for tokens in WINDOWS:
        for group in GROUPS:
            for devices in DEVICES:
                row = [Large().step(devices, tokens, group, joint) for joint in LINKS.values()]
                kind = "exact" if group is None else f"shifted, {group:,}"
                lines.append(
                    f"| {tokens >> 20}M | {kind} | {devices:,} | " + " | ".join(f"{x:,.1f}" for x in row) + " |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", default="10 Gbit/s,1 Gbit/s,100 Mbit/s")
    parser.add_argument("--processes", default=",".join(map(str, PROCESSES)))
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--at", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        work(given.rank, given.of, given.at)
        return
    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    if not given.render:
        results["machine"] = machine()
        results["assumed"] = asdict(Large())
        for processes in map(int, given.processes.split(",")):
            for rate in given.links.split(","):
                results["cells"][f"{processes} x {rate}"] = measure(processes, RATES[rate])
                path.write_text(json.dumps(results, indent=1) + "\n")
    text = tables(results)
    (RESULTS / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
