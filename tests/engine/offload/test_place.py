"""A place for layer inputs by its name: what each name is on this machine, and what is refused."""

from pathlib import Path

import pytest
import torch

from longfit.engine.offload.activations import DeviceActivations, FileActivations
from longfit.engine.offload.place import open_offload
from longfit.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize("place", [None, "device", "ram"])
def test_on_a_cpu_host_memory_is_the_device(place: str | None) -> None:
    assert isinstance(open_offload(place, CPU), DeviceActivations)


def test_a_file_lies_in_the_named_folder(tmp_path: Path) -> None:
    offload = open_offload("file", CPU, folder=tmp_path)
    assert isinstance(offload, FileActivations)
    assert offload.folder == tmp_path
    assert open_offload(offload, CPU) is offload


@pytest.mark.parametrize(
    ("place", "folder", "message"),
    [
        ("pinned", None, "offload 'pinned': no CUDA device is used here; use device, ram or file"),
        ("disk", None, "offload 'disk': must be one of device, ram, pinned, file"),
        ("ram", "/tmp", "offload_folder /tmp: only acts with offload 'file'"),
        ("file", "/not/there", "offload_folder: /not/there: No such file or directory; name a folder"),
    ],
)
def test_what_is_not_there_is_refused(place: str, folder: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_offload(place, CPU, folder=folder)
