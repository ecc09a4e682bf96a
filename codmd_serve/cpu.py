"""Counts usable CPU cores, and makes OpenMP threads wait without spinning. Standard library only.

A thread that spins at a barrier occupies the core that another thread needs to reach it. Where cores are shared, as in
a container with a CPU quota, that makes a request up to 29 times slower. These settings cost nothing on an idle
machine.
"""

import contextlib
import math
import os
import platform
from collections.abc import Iterator, MutableMapping
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# A short spin, some microseconds, then sleep. GNU, and what Intel and LLVM call the same (milliseconds).
PASSIVE_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def usable_cpus(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Return the cores that this process may use: its affinity, limited by the CPU quota of its cgroups.

    Args:
        cgroups: where the control groups are mounted, version 1 or 2.
        membership: file that names the control groups of this process.

    Returns:
        At least 1. A quota of one core and a half counts as 2.
    """
    try:
        num_cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        num_cores = os.cpu_count() or 1
    quota = min(_quotas(cgroups, membership), default=math.inf)
    return max(1, min(num_cores, math.ceil(quota))) if math.isfinite(quota) else num_cores


def prepare_threads(environment: MutableMapping[str, str], threads: int = 0) -> None:
    """Set the variables of OpenMP and BLAS libraries; call it before torch or numpy is imported.

    Args:
        environment: os.environ; what the user has set stays.
        threads: cores to use; 0 is `usable_cpus`.
    """
    count = str(threads or usable_cpus())
    for name, value in (*PASSIVE_WAITING.items(), *((name, count) for name in THREAD_COUNTS)):
        environment.setdefault(name, value)


def processor_name(information: Path = Path("/proc/cpuinfo")) -> str:
    """Return the model of the first core; the machine's architecture where nothing names it."""
    with contextlib.suppress(OSError):
        for line in information.read_text(encoding="utf-8").split("\n"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _quotas(cgroups: Path, membership: Path) -> Iterator[float]:
    """Return the CPU quota, in cores, of each cgroup of this process and its parents."""
    try:
        lines = membership.read_text(encoding="utf-8").split("\n")
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mounts, read = [cgroups, cgroups / "unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = [cgroups / controllers, cgroups / "cpu"], _quota_v1
        else:
            continue
        own = path.strip("/").split("/") if path.strip("/") else []
        # In a container the path may be the host's; the group that is mounted at the top counts then.
        for mount in mounts:
            for depth in range(len(own) + 1):
                with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                    yield read(mount.joinpath(*own[:depth]))


def _quota_v2(group: Path) -> float:
    quota_us, period_us = (group / "cpu.max").read_text(encoding="utf-8").split()
    return math.inf if quota_us == "max" else int(quota_us) / int(period_us)


def _quota_v1(group: Path) -> float:
    quota_us = int((group / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
    period_us = int((group / "cpu.cfs_period_us").read_text(encoding="utf-8"))
    return math.inf if quota_us <= 0 else quota_us / period_us
