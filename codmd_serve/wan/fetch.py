"""Fetches a student from the hub: one file, or one folder, of one snapshot; converts nothing.

A student that is completely cached, as after `hf download`, needs no network; a hub that does not answer costs seconds.
"""

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from codmd_serve.errors import CheckpointError
from codmd_serve.files import first_line
from codmd_serve.textfiles import shown
from codmd_serve.wan.hub import HUB_TIMEOUT_S, INDEX_FILE, is_hub_id, lacking_file, within

STUDENT_FILE = "student.json"
WEIGHTS = (".pt", ".pth", ".safetensors")
MAX_LISTED = 8
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,99}", re.ASCII)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubName:
    """A place on the hub, written `org/name`, `org/name:file` or either with `@revision`.

    Attributes:
        repository: hub id.
        file: path of a file or folder in it; empty for the whole.
        revision: branch, tag or commit; empty for the default branch.
    """

    repository: str
    file: str = ""
    revision: str = ""

    def __str__(self) -> str:
        file = f":{self.file}" if self.file else ""
        return f"{self.repository}{file}{f'@{self.revision}' if self.revision else ''}"


@dataclass(frozen=True, slots=True)
class Fetched:
    """A student on disk.

    Attributes:
        path: file or folder.
        commit: of the snapshot that it is from.
    """

    path: Path
    commit: str


def parse_hub_name(text: str) -> HubName | None:
    """Read `org/name[:file][@revision]`; None for what cannot be one."""
    place, at, revision = text.rpartition("@") if "@" in text else (text, "", "")
    repository, colon, file = place.partition(":")
    if not is_hub_id(repository) or (at and _REVISION.fullmatch(revision) is None) or ".." in revision:
        return None
    path = PurePosixPath(file)
    is_inside = file.isprintable() and not path.is_absolute() and ".." not in path.parts and "\\" not in file
    if colon and (not file.strip("/.") or not is_inside or len(file) > 1000):
        return None
    return HubName(repository, str(path) if colon else "", revision)


def fetch_student(name: HubName, missing: str = "") -> Fetched:
    """Return a student on disk: the cached one when it is complete, else downloaded.

    Args:
        name: where it is. Without a file, the repository holds a student bundle, a diffusers pipeline, or one file of
            weights.
        missing: a sentence for messages about the folder that was looked for before the hub.

    Raises:
        CheckpointError: it is not cached, and the hub cannot be asked, is not reached within seconds, or has no such
            repository, revision or file.
    """
    snapshot = _cached(name)
    found = None if snapshot is None else _complete(snapshot, name)
    if snapshot is not None and found is not None:
        logger.info("student=%s commit=%s from the hub's cache", name, snapshot.name)
        return Fetched(found, snapshot.name)
    prefix = f"{missing}, and " if missing else ""
    state = "it is not in the cache" if snapshot is None else "its cached copy is not complete"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{prefix}the hub may not be asked for {name} (HF_HUB_OFFLINE): {state}; "
            f"run `hf download {name.repository}{f' {name.file}' if name.file else ''}` where there is a network"
        )
    logger.warning("%s; asking the hub for %s", missing or state, name)
    try:
        snapshot = _download(name)
    except CheckpointError:
        raise
    except Exception as error:  # the client, its HTTP library and the file system each raise their own kinds
        raise CheckpointError(f"{prefix}the hub does not give {name}: {first_line(error)}; {state}") from error
    found = _complete(snapshot, name)
    if found is None:
        raise CheckpointError(f"{name} on the hub is no complete student: its transformer lacks a file")
    logger.info("student=%s commit=%s downloaded", name, snapshot.name)
    return Fetched(found, snapshot.name)


def _cached(name: HubName) -> Path | None:
    try:
        return Path(snapshot_download(name.repository, revision=name.revision or None, local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError is an OSError
        return None


def _complete(snapshot: Path, name: HubName) -> Path | None:
    """Return what `name` means in a snapshot; None when a part of it is not there."""
    if name.file:
        path = snapshot / name.file
        return path if path.is_file() or (path.is_dir() and any(path.iterdir())) else None
    if (snapshot / STUDENT_FILE).is_file() or (snapshot / INDEX_FILE).is_file():
        return snapshot if lacking_file(snapshot, ("transformer",)) is None else None
    files = [path for path in snapshot.rglob("*") if path.suffix in WEIGHTS and path.is_file()]
    return files[0] if len(files) == 1 else None


def _download(name: HubName) -> Path:
    """Download what `name` means; return the folder of its snapshot.

    Raises:
        CheckpointError: the repository does not hold it.
    """
    revision = name.revision or None
    # Of its own and first: a name server that does not answer would hold the download for a minute.
    info = within(HUB_TIMEOUT_S, lambda: HfApi().model_info(name.repository, revision=revision, timeout=HUB_TIMEOUT_S))
    names = [sibling.rfilename for sibling in info.siblings or []]
    wanted = _wanted(names, name)
    if isinstance(wanted, str):
        file = Path(hf_hub_download(name.repository, wanted, revision=revision, etag_timeout=HUB_TIMEOUT_S))
        return file.parents[wanted.count("/")]
    return Path(
        snapshot_download(name.repository, revision=revision, allow_patterns=wanted, etag_timeout=HUB_TIMEOUT_S)
    )


def _wanted(names: Sequence[str], name: HubName) -> str | list[str]:
    """Return the file, or patterns of the files, that `name` means among the files of a repository."""
    if name.file in names:
        return name.file
    if name.file:
        if any(each.startswith(f"{name.file}/") for each in names):
            return [f"{name.file}/*"]
        like = difflib.get_close_matches(name.file, names, n=1, cutoff=0.0)
        nearest = f"; the most similar one is {shown(like[0])}" if like else ""
        raise CheckpointError(f"{name.repository} has no file {shown(name.file)}{nearest}")
    if STUDENT_FILE in names:
        return [STUDENT_FILE, "world.json", "transformer/*"]
    if INDEX_FILE in names:
        return [INDEX_FILE, "scheduler/*", "transformer/*"]
    weights = [each for each in names if each.endswith(WEIGHTS)]
    if len(weights) == 1:
        return weights[0]
    if not weights:
        raise CheckpointError(f"{name.repository} holds no weights ({', '.join(WEIGHTS)})")
    listed = ", ".join(shown(each) for each in weights[:MAX_LISTED])
    more = f" and {len(weights) - MAX_LISTED} more" if len(weights) > MAX_LISTED else ""
    raise CheckpointError(
        f"{name.repository} holds several files; name one as {name.repository}:FILE of {listed}{more}"
    )
