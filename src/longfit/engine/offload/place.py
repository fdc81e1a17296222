"""The place where layer inputs wait, by its name: ``device``, ``ram``, ``pinned`` or ``file``."""

import os

import torch

from longfit.engine.offload.activations import ActivationOffload, DeviceActivations, FileActivations
from longfit.engine.offload.pinned_activations import PinnedActivations
from longfit.errors import ConfigError

PLACES = ("device", "ram", "pinned", "file")


def open_offload(
    place: str | ActivationOffload | None, device: torch.device, *, folder: str | os.PathLike[str] | None = None
) -> ActivationOffload:
    """Open the place where layer inputs wait for backward.

    Args:
        place: ``"device"`` (where they are made), ``"ram"`` (host memory, pinned for a CUDA device; on a CPU that is
            the device), ``"pinned"`` (CUDA only), ``"file"``, or a place that is open already; None is the device.
        device: where the model computes.
        folder: of the file, on a real disk; default: the system's folder for temporary files.
    Raises: ConfigError: an unknown place, one that this device does not have, a folder that cannot be written, or a
        folder without a file.
    """
    if folder is not None and place != "file":
        raise ConfigError(f"offload_folder {folder}: only acts with offload 'file'; add that or drop it")
    if place is None or place == "device" or (place == "ram" and device.type == "cpu"):
        return DeviceActivations()
    if not isinstance(place, str):
        return place
    if place in ("ram", "pinned"):
        if device.type != "cuda":
            raise ConfigError(f"offload {place!r}: no CUDA device is used here; use device, ram or file")
        return PinnedActivations(device)
    if place != "file":
        raise ConfigError(f"offload {place!r}: must be one of {', '.join(PLACES)}")
    try:
        return FileActivations(folder)
    except OSError as error:
        where = f"{folder}: " if folder is not None else ""
        raise ConfigError(f"offload_folder: {where}{error.strerror}; name a folder that can be written") from error
