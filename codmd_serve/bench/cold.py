"""Measures a server's cold start from outside: seconds until /ready, and peak memory on the way."""

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from codmd_serve.errors import GenerationError

POLL_S = 0.05
ANSWER_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdStart:
    """Time and memory of one cold start.

    Attributes:
        ready_s: from the start of the process to the first 200 of /ready; files may have been in the page cache.
        host_peak_bytes: highest resident memory of the server and of its worker, added; None where /proc tells nothing.
        device_peak_bytes: most device memory in use beyond what was in use before; None on a CPU.
        weights_bytes: of the tensors on disk that were loaded.
    """

    ready_s: float
    host_peak_bytes: int | None
    device_peak_bytes: int | None
    weights_bytes: int


def measure_cold_start(
    bundle: Path, folders: list[Path], device: torch.device, dtype: torch.dtype | str, timeout_s: float
) -> ColdStart:
    """Start `codmd-serve serve`, wait for /ready, and end it.

    Args:
        bundle: to serve.
        folders: whose .safetensors files are what is loaded.
        device, dtype: to serve with.
        timeout_s: after which the start counts as failed.

    Raises:
        GenerationError: the server ended, or was not ready in time; code cold_start.
    """
    before, device_peak, host_peak = _device_used(device), 0, 0

    def look(process: int) -> None:
        nonlocal device_peak, host_peak
        device_peak = max(device_peak, _device_used(device) - before)
        host_peak = max(host_peak, host_peak_bytes(process))

    start_s = time.perf_counter()
    with running_server(bundle, device, dtype, timeout_s, look):
        ready_s = time.perf_counter() - start_s
    sizes = [file.stat().st_size for folder in folders for file in folder.glob("*.safetensors")]
    return ColdStart(
        ready_s=ready_s,
        host_peak_bytes=host_peak or None,
        device_peak_bytes=device_peak if device.type == "cuda" else None,
        weights_bytes=sum(sizes),
    )


@contextmanager
def running_server(
    bundle: Path,
    device: torch.device,
    dtype: torch.dtype | str,
    timeout_s: float,
    look: Callable[[int], None] = lambda _: None,
) -> Iterator[str]:
    """Start `codmd-serve serve`, yield its address once it is ready, and end it afterwards.

    Args:
        bundle, device, dtype: to serve, with what.
        timeout_s: after which the start counts as failed.
        look: is given the process every now and then until it is ready, and once then.

    Yields:
        Its address.

    Raises:
        GenerationError: the server ended, or was not ready in time; code cold_start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--bundle", str(bundle), "--device", str(device), "--dtype", str(dtype).removeprefix("torch.")]
    command = [sys.executable, "-m", "codmd_serve.cli", "serve", "--host", "127.0.0.1", "--port", str(port), *words]
    # A folder of its own: jobs of a measurement are not the user's.
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(prefix="codmd-bench-") as data:
        command += ["--data", data]
        start_s = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not _is_ready(port):
                look(process.pid)
                if process.poll() is not None or time.perf_counter() - start_s > timeout_s:
                    log.seek(0)
                    said = log.read().decode(errors="replace").strip().split("\n")
                    # Its own sentence where it has one; libraries may go on behind it.
                    own = [line for line in said if line.startswith("codmd-serve: ")]
                    reason = (own or said)[-1] or "it said nothing"
                    raise GenerationError(f"the server was not ready: {reason}", "cold_start")
                time.sleep(POLL_S)
            look(process.pid)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def host_peak_bytes(process: int) -> int:
    """Return the summed peak resident memory of a process and its living descendants; 0 without /proc."""
    folder = Path("/proc") / str(process)
    try:
        lines = (folder / "status").read_text(encoding="utf-8").split("\n")
        children = [int(word) for file in folder.glob("task/*/children") for word in file.read_text().split()]
    except OSError:  # gone, or no Linux
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return own + sum(host_peak_bytes(child) for child in children)


def _device_used(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _is_ready(port: int) -> bool:
    # A proxy of the environment must not answer for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/ready", timeout=ANSWER_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
