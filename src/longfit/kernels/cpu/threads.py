"""How many threads computing takes: one for each core that this process may use, found before torch is imported.

Counted are physical cores (two hyper-threads share the units that multiply), of those that the process may run on
(``taskset``, cpusets), and no more than its control group's quota buys (``cpu.max`` of cgroup v2, in containers):
threads beyond the quota are stopped in the middle of a product, and all others wait for them. Efficient cores count as
cores: kernels here deal their work in parts, and a fast core takes those that a slow one has not begun.

torch reads ``OMP_NUM_THREADS`` when it is imported, and by itself counts neither quotas nor, everywhere, hyper-threads.
"""

import os
from collections.abc import Iterable
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def limit_threads() -> None:
    """Set ``OMP_NUM_THREADS`` for torch, which must not be imported yet, unless the user has set it."""
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def usable_cores() -> int:
    """Physical cores that this process may use, at least 1."""
    quota = cgroup_quota()
    cores = physical_cores(allowed_cpus())
    return max(1, cores if quota is None else min(cores, int(quota)))


def allowed_cpus() -> set[int]:
    """Logical processors that the process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def physical_cores(cpus: Iterable[int], *, root: Path = CPUS) -> int:
    """Count the cores that the logical processors ``cpus`` belong to; each is one where the system does not tell."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add((root / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def cgroup_quota(*, own: Path = OWN_CGROUP, root: Path = CGROUPS) -> float | None:
    """Processors that the control groups of this process (version 2) may use at once; None where nothing limits them.

    Args:
        own: the file that names the process's group, ``0::/path``.
        root: where the groups are mounted.
    """
    try:
        lines = own.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    if path is None:
        return None
    found: list[float] = []
    group = root / path.strip("/")
    while group.is_relative_to(root):  # every group above has a quota of its own; the smallest binds
        try:
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
            if quota != "max":
                found.append(int(quota) / int(period))
        except (OSError, ValueError):
            pass  # the root group has none
        group = group.parent
    return min(found, default=None)
