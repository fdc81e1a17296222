"""What every test may rely on: one thread per worker, fixed seeds, no network, signals that arrive, a reason for every
skipped test.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import_module("longfit")  # before torch, which LONGFIT_ISA holds to the same instruction set only if it comes later

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # read when triton is first imported: its kernels run in Python then, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


# A shell starts what runs in its background, and nohup what it runs, with signals ignored, which a run respects.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (getattr(signal, "SIGHUP", None), signal.SIG_DFL),
):
    if _number is not None and signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> Iterator[None]:
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, a tiny base model, and ``texts``; only read."""
    from tests.training.tiny import save_tiny_model, write_texts

    folder = tmp_path_factory.mktemp("workplace")
    save_tiny_model(folder / "model")
    write_texts(folder / "texts")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
