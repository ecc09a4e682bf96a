"""Makes the videos of an arm that is a student bundle, with the serving engine in a process of its own; resumable.

All arms get the same seed for the same prompt, so that students of one network start from the same noise.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from codmd_serve.bundle import bundle_hash
from codmd_serve.errors import ConfigError, GenerationError
from distill.evaluate.study.design import Item
from distill.evaluate.study.media import CRF

BUNDLE_FILE = "student.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions:
    """How bundles are run.

    Attributes:
        folder: where videos are made and kept, for the next `make`.
        device, dtype: as of codmd-serve.
        seed: of the study; the seed of a video comes from it and from the name of the item.
    """

    folder: Path
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0


def is_bundle(folder: Path) -> bool:
    """Whether an arm is a student bundle, not a folder of videos."""
    return (folder / BUNDLE_FILE).is_file()


def video_seed(study_seed: int, item: Item) -> int:
    """Return the seed of an item's videos, the same for all arms: 0..2^31-1."""
    digest = hashlib.sha256(f"{study_seed}/{item.name}/{item.prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def generate_arm(
    bundle: Path, items: tuple[Item, ...], options: GenerateOptions, on_video: Callable[[], object] | None = None
) -> Path:
    """Make the videos of a bundle for all items.

    A video is kept under bundle, prompt and seed, so a changed prompt is drawn anew and all others are not.

    Returns:
        A folder that holds exactly the videos of the items, by name.

    Raises:
        ConfigError: the folder cannot be written.
        GenerationError: the engine failed; it has said why on standard error.
    """
    store = options.folder / bundle_hash(bundle)[:16]
    jobs = [
        {"prompt": item.prompt, "seed": (seed := video_seed(options.seed, item)), "path": str(_path(store, item, seed))}
        for item in items
    ]
    try:
        store.mkdir(parents=True, exist_ok=True)
        order = {"bundle": str(bundle), "device": options.device, "dtype": options.dtype, "crf": CRF, "jobs": jobs}
        _run_batch(order, bundle, on_video)
        return _linked(store, items, [Path(str(job["path"])) for job in jobs])
    except OSError as error:
        raise ConfigError(f"{store} cannot be written: {error.strerror}") from error


def _path(store: Path, item: Item, seed: int) -> Path:
    return store / f"{hashlib.sha256(json.dumps([item.prompt, seed, CRF]).encode()).hexdigest()[:24]}.mp4"


def _run_batch(order: dict[str, object], bundle: Path, on_video: Callable[[], object] | None) -> None:
    command = [sys.executable, "-m", "codmd_serve.batch"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(order))
        process.stdin.close()
        for _ in process.stdout:
            if on_video is not None:
                on_video()
    if process.returncode:
        raise GenerationError(f"the videos of {bundle} could not be made; those that are there will be kept")


def _linked(store: Path, items: tuple[Item, ...], paths: list[Path]) -> Path:
    """Return a folder with a link to each video under the name of its item."""
    key = hashlib.sha256(json.dumps([[item.name, path.name] for item, path in zip(items, paths, strict=True)]).encode())
    folder = store / f"items-{key.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    for item, path in zip(items, paths, strict=True):
        link = folder / f"{item.name}.mp4"
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(path.absolute())
    return folder
