"""A worker process with a fake engine: the real message loop of codmd_serve.worker, no torch, prompts that are orders.

    die             the process is killed, as the kernel kills one that wants too much memory
    die-once FILE   the same, unless FILE exists; leaves it, and half a video
    segfault        touches memory that is not its own
    take SECONDS    takes that long, with progress all the time; more words may follow
    big MIB         makes a file of that size
    wait FILE       asks whether to go on, until FILE exists
    busy FILE       the same, and seems to make progress
    tail FILE       leaves the device at once, and is being encoded until FILE exists
    decode FILE     lets the next one begin at once, and is being decoded until FILE exists
    stop            stops itself, as `kill -STOP` does
    deaf FILE       sends no progress, and so sees no cancellation, until FILE exists
    child FILE      starts a process that does not end by itself, writes its id to FILE, and is deaf for ever
    device          fails as every call does after a CUDA error
    oom, bug        fails, with an error on purpose and with an unexpected one
    anything else   is made at once; the words in capitals become warnings

The bundle is an order too: its folder is the fake's memory. `fatal` in it makes loading fail, `deaths` holds how often
the process is killed while it loads, `starts` collects one line per start, `prepared` the prompts that were prepared
while they waited. With `gpu` in it there are two GPUs; `service_s` holds what a video is said to take.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from codmd_serve.config import GenerateParams, ModelFacts
from codmd_serve.errors import CheckpointError, GenerationError
from codmd_serve.files import TEMPORARY_PREFIX

FACTS = ModelFacts(
    name="fake",
    device="cpu",
    dtype="float32",
    attention="none",
    execution="eager",
    num_steps=4,
    height=64,
    width=64,
    num_frames=17,
    fps=16,
    size_multiple=16,
    max_side_px=1024,
    frame_multiple=4,
    max_num_frames=101,
    service_s=2.5,
    load_s=0.1,
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class FakeEngine:
    """Obeys the prompt and writes its parameters where a video would be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = replace(FACTS, device="a GPU", num_devices=2) if (folder / "gpu").exists() else FACTS
        if (folder / "service_s").exists():
            self.facts = replace(self.facts, service_s=float((folder / "service_s").read_text()))
        self.tail = threading.Thread()
        self.tail.start()

    def prepare(self, prompt: str) -> None:
        with (self.folder / "prepared").open("a") as prepared:
            prepared.write(prompt + "\n")

    def begin(
        self, params: GenerateParams, path: Path, on_progress: Any, on_preview: Any = None
    ) -> "Future[SimpleNamespace]":
        if on_preview is not None:
            on_preview(b"a picture")
        video: Future[SimpleNamespace] = Future()
        order, _, rest = params.prompt.partition(" ")

        def finish() -> None:
            while not Path(rest).exists():
                time.sleep(0.002)
            video.set_result(self.generate(params, path, lambda *_: None))

        if order in ("tail", "decode"):
            on_progress("decode", 17 if order == "tail" else 5, 17)
            self.tail = threading.Thread(target=finish, daemon=True)
            self.tail.start()
        else:
            video.set_result(self.generate(params, path, on_progress, self.tail.join))
        return video

    def take(self, seconds: float, on_progress: Any) -> None:
        """Take that long on the device, four steps."""
        for step in range(1, 5):
            end_s = time.monotonic() + seconds / 4
            while seconds and (left_s := end_s - time.monotonic()) > 0:
                time.sleep(min(0.01, left_s))
                on_progress("denoise", step, 4)

    def generate(
        self, params: GenerateParams, path: Path, on_progress: Any, wait_for_encoder: Any = lambda: None
    ) -> SimpleNamespace:
        order, _, rest = params.prompt.partition(" ")
        on_progress("text", 1, 1)
        if order == "die" or (order == "die-once" and not Path(rest).exists()):
            path.with_name(f"{TEMPORARY_PREFIX}1.partial").write_bytes(b"half")
            if rest:
                Path(rest).touch()
            die()
        if order == "segfault":
            ctypes.string_at(0)
        self.take(float(rest.split()[0]) if order == "take" else 0.0, on_progress)
        num_done = 0
        while order in ("wait", "busy") and not Path(rest).exists():
            num_done += 1
            on_progress("denoise", 1 if order == "wait" else num_done, 4)
            time.sleep(0.002)
        if order == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if order == "child":
            child = subprocess.Popen(["sleep", "1000"], process_group=0)
            Path(rest).write_text(str(child.pid))
        while order in ("deaf", "child") and (order == "child" or not Path(rest).exists()):
            time.sleep(0.002)
        if order == "device":
            raise GenerationError("the device failed", "device_error")
        if order == "oom":
            raise GenerationError("out of memory at this shape", "out_of_memory")
        if order == "bug":
            raise RuntimeError("a secret of the inside")
        wait_for_encoder()
        video = b"mp4 " + json.dumps(asdict(params)).encode()
        path.write_bytes(video if order != "big" else video.ljust(int(rest) * 2**20))
        timings_ms = {"text": 1.0, "denoise": 20.25, "decode": 3.0, "encode": 4.0}
        return SimpleNamespace(
            timings_ms=timings_ms,
            warnings=[word for word in params.prompt.split() if word.isupper()],
            peak_memory_mb=12.5,
        )


def load_engine(bundle: Path, device: str, dtype: str, threads: int, **_settings: str) -> FakeEngine:
    with (bundle / "starts").open("a") as starts:
        starts.write(f"{os.getpid()} {device} {dtype} {threads}\n")
    if (bundle / "fatal").exists():
        raise CheckpointError("the bundle is truncated")
    deaths = bundle / "deaths"
    if deaths.exists() and (left := int(deaths.read_text())) > 0:
        deaths.write_text(str(left - 1))
        die()
    return FakeEngine(bundle)


def main() -> None:
    fakes: dict[str, dict[str, Any]] = {
        "codmd_serve.loading": {"load_engine": load_engine},
        "codmd_serve.wan": {},
        "codmd_serve.wan.checkpoint": {"silence_libraries": lambda: None},
    }
    for name, content in fakes.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module
    from codmd_serve import worker

    worker.main()


if __name__ == "__main__":
    main()
