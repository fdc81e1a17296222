"""``longfit doctor``: what this machine can do, on one screen."""

import os
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from longfit.cli.output import print_json, print_lines
from longfit.compat import TESTED
from longfit.words import format_bytes

PACKAGES = ("longfit", "torch", "transformers", "peft", "accelerate", "safetensors", "datasets", "gguf")
# Instruction sets that the kernels or torch choose between.
ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "neon",
    "asimd",
    "sve",
)


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A model to understand instead of the machine: folder, .gguf, hub id."),
    ] = None,
    quant: Annotated[str, typer.Option(help="What MODEL is loaded in: nf4, fp4, int4, int8 or none.")] = "nf4",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine's rates, for the time of a plan.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show versions, processor, memory, GPUs, which kernels run and why, and disk space; or what a model is."""
    if model is not None:
        _print_model(model, quant, as_json=as_json)
        return
    if measure:
        _print_rates(as_json=as_json)
        return
    facts = inspect_machine()
    if as_json:
        print_json(facts)
        return
    cpu, memory, disk = facts["cpu"], facts["memory"], facts["disk"]
    print_lines(
        f"python {facts['python']} on {facts['platform']}",
        "  ".join(f"{name} {number or 'not installed'}" for name, number in facts["packages"].items()),
        f"tested with {'  '.join(f'{name} {number}' for name, number in facts['tested'].items())}",
        "",
        f"processor  {cpu['model']}, {cpu['cores']} cores, torch uses {cpu['torch_threads']} threads",
        f"           {' '.join(cpu['flags']) or 'no known instruction sets'}; torch: {cpu['torch_capability']}",
        f"dtype      auto is {facts['dtype']['auto']}: {facts['dtype']['reason']}",
        f"memory     {format_bytes(memory['available_bytes'])} free of {format_bytes(memory['total_bytes'])}",
        f"disk       {format_bytes(disk['free_bytes'])} free of {format_bytes(disk['total_bytes'])} at {disk['path']}",
    )
    for gpu in facts["gpus"]:
        bf16 = "bfloat16" if gpu["bfloat16"] else "no bfloat16: float16 is used"
        print_lines(
            f"gpu {gpu['index']}      {gpu['name']}, {format_bytes(gpu['total_bytes'])}, {gpu['capability']}, {bf16}"
        )
    if not facts["gpus"]:
        print_lines("gpu        none: everything runs on the processor")
    elif facts["allocator"]["advice"]:
        print_lines(f"allocator  {facts['allocator']['advice']}")
    print_lines("", "kernels")
    for row in facts["kernels"]:
        dtypes = ", ".join(row["dtypes"]) or "any dtype"
        print_lines(f"  {row['op']:<24}{row['device']:<6}{row['backend']:<11}{dtypes}: {row['reason']}")
    print_lines("", "next:", "  longfit demo")


def _print_model(name: str, quant: str, *, as_json: bool) -> None:
    """What longfit understands of a model, how it is read in chat, and what is swept."""
    from longfit.engine.sweep.attention_choice import take_exact_attention
    from longfit.evaluation.reader import WAYS, Reader
    from longfit.model.family import understand
    from longfit.model.load import load

    loaded, _ = load(name, quant=quant)
    family = understand(loaded, nature=take_exact_attention(loaded))
    way = Reader(loaded).way if family.head_known else None
    if as_json:
        print_json(asdict(family) | {"reads": way})
        return
    print_lines(str(family), f"chat       {'not possible' if way is None else WAYS[way]}")
    if family.head_known and family.causal is None:
        print_lines("", "next:", f"  longfit plan {name}")


def inspect_machine() -> dict[str, Any]:
    """Collect what decides how fast and how far this machine can train; every value is plain JSON."""
    import psutil  # type: ignore[import-untyped]
    import torch

    from longfit.model.load import auto_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, reason = auto_dtype(device)
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "tested": TESTED,
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "flags": _cpu_flags(),
            "torch_threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "dtype": {"auto": str(dtype).removeprefix("torch."), "reason": reason},
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available},
        "disk": {"path": str(Path.cwd()), "total_bytes": disk.total, "free_bytes": disk.free},
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "allocator": {"settings": _allocator_settings(), "advice": allocator_advice(_allocator_settings())},
        "kernels": _kernels(),
    }


def _allocator_settings() -> str | None:
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")  # the older name


def allocator_advice(settings: str | None) -> str | None:
    """Return what to set before a long run on a card, or None if it is set.

    Growing segments leave no gaps where blocks of other sizes were: 5 to 15 % of a card's memory is reported. Torch
    reads the setting when it first allocates, so it has to be in the environment.

    Args:
        settings: of torch's CUDA allocator, as in its environment variable.
    """
    if settings is not None and "expandable_segments:true" in settings.lower().replace(" ", ""):
        return None
    joined = ",".join([*([settings] if settings else []), "expandable_segments:True"])
    return f"export PYTORCH_ALLOC_CONF={joined}  leaves fewer gaps in the card's memory"


def _print_rates(*, as_json: bool) -> None:
    """Measure the device that a run would use, keep its rates and show them."""
    import torch

    from longfit.model.load import auto_dtype
    from longfit.planning.machines import save_rates
    from longfit.planning.measure import measure_dtypes, measure_rates

    on_card = torch.cuda.is_available()
    device = torch.device("cuda" if on_card else "cpu")
    name = torch.cuda.get_device_name(device) if on_card else _cpu_model()
    found, reason = auto_dtype(device)
    dtype, dtypes = str(found).removeprefix("torch."), measure_dtypes(device)
    rates = measure_rates(device, name=name, folder=Path.cwd(), dtype=dtype, dtypes=dtypes)
    path = save_rates(rates)
    fastest = max(dtypes, key=lambda each: dtypes[each].matmul_flops)
    share = dtypes[dtype].matmul_flops / dtypes[fastest].matmul_flops
    if as_json:
        each = {name: asdict(rate) for name, rate in dtypes.items()}
        print_json({**asdict(rates), "dtypes": each, "fastest": fastest, "share_of_fastest": share})
        return
    print_lines(f"{rates.name} ({rates.device})")
    for kind, rate in dtypes.items():
        print_lines(
            f"{kind:<10} matrix products {rate.matmul_flops / 1e9:,.1f} GFLOP/s,"
            f" attention forward and backward {rate.attention_flops / 1e9:,.1f} GFLOP/s"
        )
    print_lines(
        f"dtype auto is {dtype} ({reason}): {share:.0%} of the fastest, {fastest}, in matrix products",
        f"copies     {rates.copy_bytes / 1e9:.1f} GB/s",
        f"disk       {rates.disk_bytes / 1e9:.2f} GB/s written, at {Path.cwd()}",
        f"kept in {path}; longfit plan uses them",
    )


def package_version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_info(*keys: str) -> str:
    """Return the first entry of /proc/cpuinfo with one of the names; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpu_info("model name", "Model") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    present = set(_cpu_info("flags", "Features").split())
    return [flag for flag in ISA_FLAGS if flag in present]


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "total_bytes": properties.total_memory,
        "capability": f"sm_{properties.major}{properties.minor}",
        "bfloat16": properties.major >= 8,
    }


DTYPES = ("float32", "bfloat16", "float16")


def _kernels() -> list[dict[str, Any]]:
    """Return ``{op, device, backend, reason, dtypes}`` of every operation on the devices of this machine.

    One row for all dtypes that are computed alike; no dtype where it does not matter.
    """
    import torch

    from longfit.attention import backends as attention
    from longfit.kernels import elementwise
    from longfit.kernels.dispatch import backends

    rows = []
    for device in ("cpu", *["cuda"] * torch.cuda.is_available()):
        for op, choice in backends(device).items():
            rows.append({"op": op, "device": device, **asdict(choice), "dtypes": []})
        for op in ("attention", *elementwise.OPS):
            alike: dict[Any, list[str]] = {}
            for name in DTYPES:
                dtype = getattr(torch, name)
                if op == "attention":
                    choice = attention.choice(torch.device(device), dtype)
                else:
                    choice = elementwise.choice(op, device, dtype)
                alike.setdefault(choice, []).append(name)
            rows += [{"op": op, "device": device, **asdict(c), "dtypes": dtypes} for c, dtypes in alike.items()]
    return rows
