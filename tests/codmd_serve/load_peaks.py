"""Load bundles in a process of its own and print, per load, the weights kept and the most memory taken for it.

Arguments: a small bundle, which is loaded first so that libraries are there and warm, then pairs of bundle and dtype.
Prints one JSON object per pair: kept_bytes (tensors of the loaded networks) and peak_bytes (highest anonymous memory
above what was there before). Pages of mapped files are not in it: the kernel drops them when memory is short.
"""

import ctypes
import gc
import json
import sys
import threading
from pathlib import Path

import torch

from codmd_serve.engine import Engine
from codmd_serve.loading import load_engine
from codmd_serve.wan.checkpoint import silence_libraries

PERIOD_S = 0.005


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def peak_of(bundle: Path, dtype: str) -> tuple[Engine, int]:
    """Load; returns the engine and the highest memory above the start."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier load gave back shall not serve this one unseen
    before, highest, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(PERIOD_S):
            highest[0] = max(highest[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        engine = load_engine(bundle, "cpu", dtype)
    finally:
        done.set()
        watcher.join()
    return engine, max(highest[0], anonymous_bytes()) - before


def main() -> None:
    torch.set_num_threads(1)
    silence_libraries()
    small, *rest = sys.argv[1:]
    for dtype in set(rest[1::2]):
        load_engine(Path(small), "cpu", dtype)
    for bundle, dtype in zip(rest[::2], rest[1::2], strict=True):
        engine, peak_bytes = peak_of(Path(bundle), dtype)
        networks = (engine.transformer, engine.bundle.text_encoder, engine.bundle.vae)
        tensors = {t.data_ptr(): t.nbytes for network in networks for t in network.state_dict().values()}
        print(json.dumps({"kept_bytes": sum(tensors.values()), "peak_bytes": peak_bytes}), flush=True)
        del engine, networks


if __name__ == "__main__":
    main()
