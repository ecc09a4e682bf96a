"""How many cores a process may use, and threads that wait without taking a core from whoever needs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from codmd_serve.cpu import PASSIVE_WAITING, prepare_threads, usable_cpus

CORES = len(os.sched_getaffinity(0))
DEADLINE_S = 240.0


def cgroups(folder: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A tree of control groups as the kernel shows it, and the file that names those of this process."""
    (folder / "membership").write_text(membership)
    for name, content in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder / "cgroup", folder / "membership"


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        (
            "4:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000", "cpu,cpuacct/x/cpu.cfs_period_us": "1"},
            64,
        ),
        (
            "4:cpu,cpuacct:/x\n1:name=systemd:/\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "400000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("1:cpu:/docker/1\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("0::/\n", {"cpu.max": "nonsense"}, 64),
        ("0::/\n", {}, 64),
        ("nonsense", {}, 64),
    ],
    ids=[
        "v2",
        "v2 none",
        "v2 fraction",
        "v2 tenth",
        "v2 parent",
        "v1 much",
        "v1",
        "v1 host path",
        "v1 none",
        "x",
        "y",
        "z",
    ],
)
def test_the_cpu_quota_bounds_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert usable_cpus(*cgroups(tmp_path, membership, files)) == cores


def test_affinity_bounds_the_cores(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path, tmp_path / "none") == CORES
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); from codmd_serve.cpu import *; "
    done = subprocess.run([sys.executable, "-c", code + "print(usable_cpus())"], capture_output=True, check=True)
    assert done.stdout.strip() == b"1"


def test_what_the_user_has_set_stays() -> None:
    environment = {"OMP_NUM_THREADS": "7", "KMP_BLOCKTIME": "9"}
    prepare_threads(environment, 3)
    assert environment["OMP_NUM_THREADS"] == "7" and environment["KMP_BLOCKTIME"] == "9"
    assert environment["MKL_NUM_THREADS"] == "3" and environment["GOMP_SPINCOUNT"] == "1000"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("module", ["codmd_serve.worker", "codmd_serve.cli", "distill.cli"])
def test_processes_set_it_before_they_import_torch(module: str, tmp_path: Path) -> None:
    """torch is replaced by a module that says what the environment was when it was imported, and ends the process."""
    (tmp_path / "torch.py").write_text(
        "import os\n"
        f"names = {sorted(PASSIVE_WAITING)!r}\n"
        "os.write(2, ('torch saw ' + ' '.join(os.environ.get(name, '-') for name in names)).encode())\n"
        "os._exit(0)\n"
    )
    arguments = {
        "codmd_serve.worker": [],
        "codmd_serve.cli": ["generate", "a red circle"],
        "distill.cli": ["bench-step", "--base", "/nowhere"],
    }[module]
    environment = {name: value for name, value in os.environ.items() if name not in PASSIVE_WAITING}
    path = os.pathsep.join([str(tmp_path), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**environment, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "torch saw 1000 1 PASSIVE" in done.stderr


# Two threads as in a worker, pinned to two cores of which another process keeps one busy. The work is that of a small
# network: products too short for a thread that was taken off its core to be waited for. Prints the CPU seconds of a
# request: unlike its wall time they hardly change with what else the machine does, and a thread that spins uses them.
CONTENDED = """
import os, sys, time
cores = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, cores)
if sys.argv[1] == "prepared":
    from codmd_serve.cpu import prepare_threads
    prepare_threads(os.environ, 2)
import torch
torch.set_num_threads(2)
torch.set_grad_enabled(False)
layers = [torch.randn(256, 256) for _ in range(4)]
def request():
    start_s = time.process_time()
    rows = torch.ones(192, 256)
    for _ in range(150):
        for layer in layers:
            rows = torch.nn.functional.silu(rows @ layer)
    return time.process_time() - start_s
request()
print("ready", cores[1], flush=True)
for line in sys.stdin:
    print(min(request() for _ in range(3)), flush=True)
"""
BUSY = "import os, sys; os.sched_setaffinity(0, [int(sys.argv[1])]); print('busy', flush=True)\nwhile True: pass"


@pytest.mark.skipif(CORES < 2, reason="there is no second core to be busy")
def test_s18_with_one_of_two_cores_busy_a_request_needs_the_cpu_time_of_an_idle_machine() -> None:
    """Threads that wait for one another do not spin: without `prepare_threads` about eight times as many CPU seconds.

    The wall time is held to twice the idle one by tests/timing, on a machine that does nothing else.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    with subprocess.Popen(
        [sys.executable, "-c", CONTENDED, "prepared"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        core = process.stdout.readline().split()[1]

        def cpu_seconds() -> float:
            process.stdin.write("go\n")  # type: ignore[union-attr]
            return float(process.stdout.readline())  # type: ignore[union-attr]

        idle_s = min(cpu_seconds() for _ in range(3))
        with subprocess.Popen([sys.executable, "-c", BUSY, core], stdout=subprocess.PIPE) as busy:
            try:
                assert busy.stdout is not None and busy.stdout.readline()
                busy_s = min(cpu_seconds() for _ in range(3))
            finally:
                busy.kill()
        process.stdin.close()
    assert busy_s <= 2.0 * idle_s
