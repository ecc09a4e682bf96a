"""Finds a Wan pipeline by folder or hub id, as one folder on disk; loads nothing from it.

A hub id is resolved to one snapshot. A completely cached snapshot, as after `hf download`, needs no network.
"""

import logging
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import HfApi, snapshot_download

from codmd_serve.errors import CheckpointError
from codmd_serve.files import first_line
from codmd_serve.textfiles import read_json_object, shown

# With the imports of a command, an answer that does not come costs five seconds.
HUB_TIMEOUT_S = 3.0
INDEX_FILE = "model_index.json"
# What a student takes from its base; the transformer is its own.
STUDENT_PARTS = ("tokenizer", "text_encoder", "vae")
WANTED = "name a diffusers Wan folder or a hub id"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_MAX_HUB_ID_CHARS = 96
_MAX_PATH_CHARS = 4096
_WEIGHTS = ("*.safetensors", "*.bin")

Value = TypeVar("Value")
logger = logging.getLogger(__name__)


def find_pipeline(
    name: str,
    places: Sequence[Path],
    parts: Sequence[str] = STUDENT_PARTS,
    wanted: str = WANTED,
    *,
    configs_only: bool = False,
) -> tuple[Path, bool]:
    """Find the folder of a diffusers pipeline.

    Args:
        name: a folder, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
        places: folders that a relative name may be relative to, the most likely one first.
        parts: subfolders that are needed of a hub id; only they are downloaded.
        wanted: what to name instead, for messages.
        configs_only: of a hub id, the weights are not needed.

    Returns:
        The folder, and whether `name` names a folder and not a hub id.

    Raises:
        CheckpointError: no such folder, and the name cannot be a hub id or the hub does not have it.
    """
    if len(name) > _MAX_PATH_CHARS or not name.isprintable():
        raise CheckpointError(f"there is no folder {shown(name)}: {wanted}")
    folders = [place / name for place in places]
    for folder in folders:
        if _is_folder(folder):
            return folder.resolve(), True
    missing = f"there is no folder {folders[0].absolute()}"
    if not is_hub_id(name):
        raise CheckpointError(f"{missing}: {wanted}")
    return hub_snapshot(name, parts, missing, configs_only=configs_only), False


def is_hub_id(name: str) -> bool:
    """Return whether a name is a valid hub repository id."""
    fits = _HUB_ID.fullmatch(name) is not None and len(name) <= _MAX_HUB_ID_CHARS
    return fits and "--" not in name and ".." not in name and not name.endswith((".", "-", ".git"))


def hub_snapshot(name: str, parts: Sequence[str], missing: str = "", *, configs_only: bool = False) -> Path:
    """Return one snapshot of a hub repository on disk: the cached one when it is complete, else downloaded.

    Args:
        name: hub id.
        parts: subfolders that are needed.
        configs_only: the weights are not needed.
        missing: a sentence for messages about the folder that was looked for before the hub.

    Raises:
        CheckpointError: it is not cached and the hub cannot be asked, is not reached within seconds, or has no such
            repository; or the repository lacks a part.
    """
    prefix = f"{missing}, and " if missing else ""
    cached = _cached(name)
    lacking = None if cached is None else lacking_file(cached, parts, configs_only=configs_only)
    if cached is not None and lacking is None:
        return cached
    state = "it is not in the cache" if cached is None else f"its cached copy lacks {lacking}"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{prefix}the hub may not be asked for {name} (HF_HUB_OFFLINE): {state}; "
            f"run `hf download {name}` where there is a network"
        )
    logger.warning("%s; asking the hub for %s", missing or state, name)
    try:
        # Of its own and first: a name server that does not answer would hold the download for a minute.
        within(HUB_TIMEOUT_S, lambda: HfApi().repo_info(name, timeout=HUB_TIMEOUT_S))
        patterns = [INDEX_FILE, *(f"{part}/{'*config.json' if configs_only else '*'}" for part in parts)]
        folder = Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT_S))
    except Exception as error:  # the client, its HTTP library and the file system each raise their own kinds
        raise CheckpointError(
            f"{prefix}the hub does not give {name}: {first_line(error)}; {state}, and no folder has that name"
        ) from error
    lacking = lacking_file(folder, parts, configs_only=configs_only)
    if lacking is not None:
        raise CheckpointError(f"{name} on the hub is no complete Wan pipeline: it lacks {lacking}")
    return folder


def lacking_file(folder: Path, parts: Sequence[str], *, configs_only: bool = False) -> str | None:
    """Name the first file that a pipeline folder needs for `parts` and does not have; None when it is complete."""
    for part in parts:
        if not any((folder / part).glob("*")):
            return f"{part}/"
        if part in ("tokenizer", "scheduler"):
            continue
        if not (folder / part / "config.json").exists():
            return f"{part}/config.json"
        if configs_only:
            continue
        for index in sorted((folder / part).glob("*.index.json")):
            names = read_json_object(index, CheckpointError).get("weight_map")
            for file in sorted(set(names.values())) if isinstance(names, dict) else ():
                if not (folder / part / Path(str(file)).name).exists():
                    return f"{part}/{Path(str(file)).name}"
        if not any(path.exists() for pattern in _WEIGHTS for path in (folder / part).glob(pattern)):
            return f"the weights of {part}/"
    return None


def _cached(name: str) -> Path | None:
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError is an OSError
        return None


def _is_folder(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:  # a name that is too long for the file system
        return False


def within(seconds: float, function: Callable[[], Value]) -> Value:
    """Call a function under a timeout that also covers a hanging DNS look-up; return its result.

    Raises:
        TimeoutError: it did not return in time; its thread goes on.
    """
    results: list[Value] = []
    raised: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True, name="hub")
    thread.start()
    thread.join(seconds + 0.2)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:g} s")
    if raised:
        raise raised[0]
    return results[0]
