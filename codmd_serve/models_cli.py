"""`codmd-serve models`, and what `--bundle` means: a folder, a published student, or a place on the hub.

A student of the hub is fetched once, converted once by a process of its own, and kept in the cache folder. Imports
nothing heavy: torch is for the converting process only.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from codmd_serve import __version__
from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import atomic_folder, write_json
from codmd_serve.textfiles import shown
from codmd_serve.wan.students import STUDENTS, Student, nearest_name, plain_table

if TYPE_CHECKING:
    from codmd_serve.wan.fetch import Fetched, HubName

STUDENT_FILE = "student.json"
ORIGIN_FILE = "origin.json"
WORLD_FILE = "world.json"
# Of what the importer writes: a new number converts every student again.
FORMAT = 1
GENERIC = ("model", "distill_model", "diffusion_pytorch_model")
MAX_NAME_CHARS = 300

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A student of the hub.

    Attributes:
        hub: where it is.
        name: of the bundle's folder, which is the name of the model.
        base: folder or hub id; empty is guessed from the width of the network.
        words: more of the command line that converts it.
    """

    hub: "HubName"
    name: str
    base: str
    words: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Return a name for all of this: two that differ in anything are two bundles."""
        base = str(Path(self.base).resolve()) if self.base and Path(self.base).is_dir() else self.base
        said = json.dumps([FORMAT, str(self.hub), self.name, base, self.words])
        return hashlib.sha256(said.encode(errors="surrogatepass")).hexdigest()[:12]


def add_models_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument of `codmd-serve models` that is no flag."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "examples:\n  codmd-serve models\n  codmd-serve models codmd-wan2.1-1.3b"
    parser.add_argument(
        "name", nargs="?", help="fetch and convert this one now, as --bundle would, and print its folder"
    )


def run_models(name: str | None, base: str, cache: Path) -> int:
    """Print the table of published students, or prepare one of them and print its folder; return 0.

    Raises:
        CheckpointError, ConfigError: it cannot be had, in one line.
    """
    print(plain_table() if name is None else resolve_bundle(name, base, cache))
    return 0


def resolve_bundle(text: str, base: str, cache: Path) -> str:
    """Return the folder of the bundle that `--bundle` names.

    Args:
        text: a folder, a name of the table, or `org/name[:file][@revision]`.
        base: folder or hub id of the Wan pipeline that a student of the hub was distilled from; empty is the table's,
            or guessed from the width of the network.
        cache: folder that keeps converted students.

    Returns:
        A folder; one that is a path and does not exist is returned as it is, for the loader to explain.

    Raises:
        CheckpointError, ConfigError: no such name, or the hub does not give it, in one sentence.
    """
    if _is_folder(text):
        return text
    wanted = _wanted(text, base)
    if wanted is None:
        return text
    if base and not _is_folder(base) and not _is_hub_id(base):
        raise ConfigError(f"there is no folder {shown(base)} for --base, and it is no hub id")
    place = cache / "students" / wanted.key
    bundle = place / wanted.name
    if _is_whole(bundle):
        return str(bundle)
    with _locked(place):
        if not _is_whole(bundle):  # another process may have made it meanwhile
            _make(wanted, bundle, "" if text in STUDENTS else f"there is no folder {Path(text).absolute()}")
    return str(bundle)


def _wanted(text: str, base: str) -> Wanted | None:
    """Return the student that `text` means; None for what is a path.

    Raises:
        ConfigError: it is a name, but of no student; or of one that cannot be served.
    """
    student = STUDENTS.get(text)
    if student is not None:
        return _of_table(student, base)
    from codmd_serve.wan.fetch import parse_hub_name

    hub = parse_hub_name(text) if len(text) <= MAX_NAME_CHARS else None
    if hub is not None:
        stem = Path(hub.file).stem
        parts = (hub.repository.partition("/")[2], "" if stem in GENERIC else stem)
        return Wanted(hub, "-".join(part for part in parts if part)[:100], base)
    is_path = "/" in text or os.sep in text or text.startswith((".", "~")) or len(text) > MAX_NAME_CHARS
    if is_path or not text.isprintable():
        return None
    raise ConfigError(
        f"no student bundle at {text[:60]}: name a folder that holds student.json, a hub id (org/name, org/name:file) "
        f"or a published student; the most similar name is {nearest_name(text)}, and `codmd-serve models` lists all"
    )


def _of_table(student: Student, base: str) -> Wanted:
    from codmd_serve.wan.fetch import HubName

    if student.refused:
        raise ConfigError(f"{student.name} ({student.repository}) cannot be served: {student.refused}")
    words = ["--method", student.method]
    if student.is_bidirectional:
        words.append("--bidirectional")
    return Wanted(HubName(student.repository, student.file), student.name, base or student.base, tuple(words))


def _make(wanted: Wanted, bundle: Path, missing: str) -> None:
    from codmd_serve.wan.fetch import fetch_student

    fetched = fetch_student(wanted.hub, missing)
    if fetched.path.is_dir() and (fetched.path / STUDENT_FILE).is_file():
        _link(fetched, bundle)
    else:
        logger.info("student=%s converting to %s, once", wanted.hub, bundle)
        _convert(fetched.path, wanted, bundle)
    origin = {
        "repository": wanted.hub.repository,
        "file": wanted.hub.file,
        "revision": wanted.hub.revision,
        "commit": fetched.commit,
        "package_version": __version__,
    }
    write_json(bundle / ORIGIN_FILE, origin)


def _link(fetched: "Fetched", bundle: Path) -> None:
    """Make a folder, named as the model is, of a bundle that lies in the hub's cache; its weights stay there."""
    with atomic_folder(bundle) as fresh:
        for name in (STUDENT_FILE, WORLD_FILE):
            if (fetched.path / name).is_file():
                shutil.copyfile(fetched.path / name, fresh / name)
        (fresh / "transformer").symlink_to((fetched.path / "transformer").resolve(), target_is_directory=True)


def _convert(source: Path, wanted: Wanted, bundle: Path) -> None:
    """Convert in a process of its own: its gigabytes end with it, and the server never imports torch.

    Raises:
        CheckpointError: what that process said.
    """
    base = ("--base", wanted.base) if wanted.base else ()
    command = [sys.executable, "-m", "codmd_serve.cli", "convert", str(source), *base, "-o", str(bundle), *wanted.words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        said, complained = process.communicate()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode != 0:
        last = next(iter(complained.strip().split("\n")[-1:]), f"exit code {process.returncode}")
        raise CheckpointError(f"{wanted.hub} cannot be converted: {last.partition('codmd-serve: ')[2] or last}")
    for line in said.rstrip("\n").split("\n")[:-1]:
        logger.info("%s", line.strip())


def _is_whole(bundle: Path) -> bool:
    # The origin is written last; a link to weights that the hub's cache dropped leads nowhere.
    return (bundle / ORIGIN_FILE).is_file() and (bundle / "transformer" / "config.json").is_file()


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Let one process at a time make a bundle; remove what a killed one left."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"the cache folder {place} cannot be written to: {error.strerror}; see --cache") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in place.iterdir():
            if leftover.is_dir() and not _is_whole(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        os.close(lock)


def _is_folder(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_dir()
    except (OSError, ValueError):  # too long for the file system, or a NUL in it
        return False


def _is_hub_id(name: str) -> bool:
    from codmd_serve.wan.hub import is_hub_id

    return is_hub_id(name)
