"""Who trains what: windows, tokens of a window, rows of the weights.

    devices = data x sequence      ``data`` windows at once, each cut into ``sequence`` stretches of tokens
    shard                          devices that hold one copy of the weights between them; a divisor of devices

The devices of a window are neighbours, and so are those that hold one copy of the weights, as neighbours have the
fastest links. The two cuts are independent: gradients add up over all devices whatever either of them is.
"""

from dataclasses import dataclass

from longfit.errors import ConfigError


@dataclass(frozen=True)
class DeviceLayout:
    """The sizes of both cuts.

    Attributes:
        devices: processes of the run.
        sequence: devices that share one window.
        shard: devices that share one copy of the weights.
    """

    devices: int = 1
    sequence: int = 1
    shard: int = 1

    @property
    def data(self) -> int:
        """Windows trained at once."""
        return self.devices // self.sequence

    def window_of(self, rank: int) -> int:
        """Which of the windows trained at once a device works on."""
        return rank // self.sequence

    def stretch_of(self, rank: int) -> int:
        """Which stretch of its window a device has."""
        return rank % self.sequence

    def sharers_of_window(self) -> list[list[int]]:
        """The devices of each window, in the order of its stretches."""
        return [list(range(first, first + self.sequence)) for first in range(0, self.devices, self.sequence)]

    def __str__(self) -> str:
        """Say it in words."""
        parts = [f"{self.devices} processes", f"{self.data} windows at once" if self.data > 1 else "one window at once"]
        if self.sequence > 1:
            parts.append(f"each cut into {self.sequence} stretches")
        parts.append(f"weights in {self.shard} shards" if self.shard > 1 else "whole weights on each")
        return ", ".join(parts)


def choose_layout(
    devices: int, *, asked: int | None = None, data: int | None = None, sequence: int = 1, shard: int = 1
) -> DeviceLayout:
    """Check that the cuts fit the devices.

    Args:
        devices: processes that there are.
        asked: processes that the settings say; None says nothing.
        data: windows at once; None: as many as ``sequence`` leaves.
        sequence, shard: as in `DeviceLayout`.
    Raises: ConfigError: something does not divide; the message names the nearest that does.
    """
    problems = []
    if asked not in (None, devices):
        problems.append(
            f"parallel.devices={asked}, but this run has {devices} of them; start it with longfit train --devices"
            f" {asked}, with torchrun --nproc-per-node {asked}, or with parallel.devices={devices}"
        )
    for name, value in (("sequence", sequence), ("shard", shard)):
        if devices % value:
            problems.append(
                f"parallel.{name}={value} does not divide {devices} devices; try {_nearest(devices, value)}"
            )
    if not problems and data is not None and data * sequence != devices:
        problems.append(
            f"parallel.data={data} x parallel.sequence={sequence} is {data * sequence} devices, there are {devices};"
            f" try parallel.data={devices // sequence}, or parallel.devices={data * sequence}"
        )
    if problems:
        raise ConfigError("\n  ".join(problems))
    return DeviceLayout(devices, sequence, shard)


def _nearest(devices: int, value: int) -> str:
    divisors = [number for number in range(1, devices + 1) if devices % number == 0]
    below = max(number for number in divisors if number <= value)
    above = min((number for number in divisors if number > value), default=below)
    return " or ".join(map(str, dict.fromkeys((below, above))))
