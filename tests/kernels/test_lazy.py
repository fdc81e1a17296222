"""Nothing imports triton or starts CUDA before it is needed: in a process of its own, everything on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

WORK = r"""
import importlib, pkgutil, sys
import torch
import longfit
from longfit.kernels.dispatch import backends
from longfit.layers.linear4bit import Linear4bit
from longfit.optim.adamw import PagedAdamW

layer = Linear4bit.from_linear(torch.nn.Linear(64, 64))
x = torch.randn(2, 64, requires_grad=True)
layer(x).sum().backward()
backends("cpu"), backends("cuda")
print("triton" in sys.modules)
PagedAdamW([x], state_bits=8).step()  # torch's base class of optimisers imports triton itself

for room in ("kernels", "layers", "optim", "attention", "engine"):
    for module in pkgutil.walk_packages([f"{longfit.__path__[0]}/{room}"], f"longfit.{room}."):
        if not module.name.startswith(("longfit.kernels.triton", "longfit.kernels.cpu._longfit")):
            importlib.import_module(module.name)
print(sorted(name for name in sys.modules if name.startswith("longfit.kernels.triton.")), torch.cuda.is_initialized())
"""


def test_cpu_work_imports_no_kernel_of_a_card_and_starts_no_cuda() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", WORK], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines() == ["False", "['longfit.kernels.triton.device'] False"]
