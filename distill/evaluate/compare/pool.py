"""Runs cells in worker processes of one thread each; torch is imported once, by the server they are forked from."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

from codmd_serve.errors import CodmdError
from codmd_serve.files import first_line
from distill.evaluate.compare.cells import Cell, InterruptedCellError, run_cell
from distill.run.signals import stop_signal

PRELOAD = ["distill.evaluate.compare.cells"]
POLL_S = 0.5

# In a worker, whether the call is over; set by the parent.
_stopping: Event | None = None

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """How the cells of a call ended.

    Attributes:
        done: names of finished cells.
        failed: name and reason.
        signal_number: that ended the call, or None.
    """

    done: list[str]
    failed: dict[str, str]
    signal_number: int | None


def run_chains(
    chains: list[list[Cell]],
    runs: Path,
    cache_dir: Path,
    jobs: int,
    on_done: Callable[[str], object],
    device: str = "cpu",
) -> Report:
    """Run chains of cells, each chain in one worker, `jobs` at a time.

    Args:
        chains: budgets of one run, ascending.
        runs: folder of all runs.
        cache_dir: shared by all.
        jobs: worker processes.
        on_done: told the name of each finished cell.
        device: of all workers.

    Returns:
        What ended how. After a signal, the runs in progress have saved a checkpoint.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    report = Report(done=[], failed={}, signal_number=None)
    is_stopping = context.Event()
    with stop_signal() as received, ProcessPoolExecutor(jobs, context, _start_worker, (is_stopping,)) as pool:
        waiting = {pool.submit(run_chain, chain, runs, cache_dir, device): chain for chain in chains}
        while waiting:
            finished, _ = wait(waiting, timeout=POLL_S, return_when=FIRST_COMPLETED)
            for future in finished:
                _note(future, waiting.pop(future), report, on_done)
            if received:
                # The event before the signal: a worker that has saved its run must not begin another.
                is_stopping.set()
                for worker in multiprocessing.active_children():
                    worker.terminate()
                pool.shutdown(wait=True, cancel_futures=True)
                break
    number = received[0] if received else None
    return Report(done=report.done, failed=report.failed, signal_number=number)


def run_chain(chain: list[Cell], runs: Path, cache_dir: Path, device: str = "cpu") -> tuple[list[str], dict[str, str]]:
    """Run the cells of a chain one after the other, up to the first that fails or is interrupted.

    Returns:
        Names of those that are finished, and the reason of the one that failed.
    """
    done: list[str] = []
    for cell in chain:
        if _stopping is not None and _stopping.is_set():
            break
        folder = cell.folder(runs)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a", encoding="utf-8") as file, _logged_to(file):
            try:
                run_cell(cell, runs, cache_dir, device)
            except InterruptedCellError:
                return done, {}
            except CodmdError as error:
                return done, {cell.name: first_line(error)}
        done.append(cell.name)
    return done, {}


@contextlib.contextmanager
def _logged_to(file):  # type: ignore[no-untyped-def]
    """Send logs and progress bars of the block to a file."""
    handler, root = logging.StreamHandler(file), logging.getLogger()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root.addHandler(handler)
    try:
        with contextlib.redirect_stderr(file):
            yield
    finally:
        root.removeHandler(handler)


def _start_worker(is_stopping: Event) -> None:
    import torch

    global _stopping
    _stopping = is_stopping
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.INFO)
    # Ctrl-C reaches the whole group; the parent passes it on as SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _note(
    future: Future[tuple[list[str], dict[str, str]]],
    chain: list[Cell],
    report: Report,
    on_done: Callable[[str], object],
) -> None:
    try:
        done, failed = future.result()
    except Exception as error:  # whatever the worker died of; the other chains go on where they can
        done, failed = [], {chain[0].name: first_line(error)}
    report.done.extend(done)
    report.failed.update(failed)
    for name in done:
        on_done(name)
