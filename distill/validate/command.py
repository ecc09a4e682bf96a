"""Scores by a command of the user's: it gets a folder of videos and a JSON file of prompts, and prints numbers.

The command runs on rank 0, in a process group of its own that ends with it. Whatever it does wrong, `score` raises one
sentence and the run goes on. It must not take itself for a rank of the run, so the launcher's variables are unset.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from codmd_serve.errors import CodmdError, ConfigError
from codmd_serve.video import cause_of
from distill.config import DistillConfig
from distill.data.prompts import CAPTIONED_RECIPES, load_prompts
from distill.data.texts import read_prompt_file
from distill.networks.base import Base
from distill.validate.shapebench import validation_captions
from distill.validate.suites import VIDEOS, Request, Samples

PROMPTS_FILE, METRICS_FILE, OUTPUT_FILE = "prompts.json", "metrics.json", "command.log"
MAX_OUTPUT_BYTES = 2**20
POLL_S = 0.1
KILL_WAIT_S = 5.0
# Of torchrun, srun and mpirun.
LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE", "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID",
)  # fmt: skip


def command_suite(config: DistillConfig, base: Base) -> "CommandSuite":
    """Choose the prompts of a run's validation and check its command.

    Raises:
        ConfigError: no command, one that cannot be found, or no prompts to score.
    """
    del base
    settings = config.validate
    if not settings.command.strip():
        raise ConfigError(
            "validate.command is not set: suite command needs a program that scores a folder of videos, "
            "for example --set 'validate.command=python score.py'"
        )
    try:
        words = shlex.split(settings.command)
    except ValueError as error:
        raise ConfigError(f"validate.command cannot be read: {error}, got {settings.command!r}") from error
    if shutil.which(words[0]) is None:
        raise ConfigError(f"validate.command: there is no program {words[0]!r}")
    texts = _prompts(config)
    if not texts:
        raise ConfigError("validate.prompts holds no prompt that the run does not train on")
    return CommandSuite(command=tuple(words), timeout_s=settings.timeout_s, texts=tuple(texts[: settings.num_prompts]))


def _prompts(config: DistillConfig) -> list[str]:
    """Return held-out prompts: those of the file that the run does not train on, or captions of ShapeWorld."""
    if config.validate.prompts:
        trained = set(load_prompts(config))
        return [
            text for text in dict.fromkeys(read_prompt_file(Path(config.validate.prompts)).texts) if text not in trained
        ]
    if config.recipe not in CAPTIONED_RECIPES:
        raise ConfigError(
            f"validate.prompts is not set: recipe {config.recipe} needs a txt or jsonl file of held-out prompts"
        )
    return validation_captions(config.validate.num_prompts, load_prompts(config))


@final
@dataclass(frozen=True, kw_only=True)
class CommandSuite:
    """The prompts of a validation and the command that scores their videos.

    Attributes:
        command: words of the command line. {videos}, {prompts} and {metrics} stand for the folder of mp4s, the JSON
            file of prompts and a file that the command may write; without any of them, folder and prompts are
            appended.
        timeout_s: after which the command is killed.
        texts: one video of each.
        better: empty, a command may print any value.
    """

    command: tuple[str, ...]
    timeout_s: float
    texts: tuple[str, ...]
    needs: str = VIDEOS
    better: dict[str, str] = field(default_factory=dict)

    @property
    def requests(self) -> tuple[Request, ...]:
        """The samples."""
        return tuple(Request(text) for text in self.texts)

    def score(self, samples: Samples) -> dict[str, float]:
        """Run the command; return the numbers of the JSON object that it wrote or printed.

        Raises:
            CodmdError: it failed, took too long, printed something else, or the run is ending.
        """
        assert samples.videos is not None
        folder = samples.videos.absolute()
        paths = {"videos": folder, "prompts": folder / PROMPTS_FILE, "metrics": folder / METRICS_FILE}
        words = [_filled(word, paths) for word in self.command]
        if words == list(self.command):
            words += [str(paths["videos"]), str(paths["prompts"])]
        paths["metrics"].unlink(missing_ok=True)
        unset = [word for name in LAUNCHER_VARIABLES for word in ("-u", name)]
        log = folder / OUTPUT_FILE
        printed = run_command(["env", *unset, *words], log, self.timeout_s, samples.is_stopping)
        text = _read(paths["metrics"]) if paths["metrics"].is_file() else printed
        return parse_metrics(text)


def run_command(words: list[str], log: Path, timeout_s: float, is_stopping: Callable[[], bool]) -> str:
    """Run a command in a process group of its own and return what it printed.

    Args:
        words: of the command line.
        log: file for its stdout; its stderr goes beside it, to a file that ends in .err.
        timeout_s: after which the whole group is killed.
        is_stopping: asked while it runs; once true, the group is killed.

    Raises:
        CodmdError: it cannot be started, failed, took too long, or the run is ending.
    """
    errors = log.with_suffix(".err")
    try:
        with log.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
            try:
                reason = _wait(process, timeout_s, is_stopping)
            finally:
                # Also after a normal end: what the command left in the background goes with it.
                _kill(process)
    except OSError as error:
        raise CodmdError(f"the command cannot be run: {error.strerror or error}") from error
    if reason:
        raise CodmdError(reason)
    if process.returncode:
        cause = cause_of(_read(errors))
        raise CodmdError(f"the command ended with {process.returncode}{f': {cause[:200]}' if cause else ''}")
    return _read(log)


def _wait(process: "subprocess.Popen[bytes]", timeout_s: float, is_stopping: Callable[[], bool]) -> str:
    """Wait for the end of the process; return why it must be killed, or nothing."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            process.wait(POLL_S)
            return ""
        except subprocess.TimeoutExpired:
            if is_stopping():
                return "the run is ending, the command was killed"
            if time.monotonic() >= deadline:
                return f"the command took longer than validate.timeout_s={timeout_s:g} and was killed"


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel, as on dead storage
        process.wait(KILL_WAIT_S)


def parse_metrics(text: str) -> dict[str, float]:
    """Read a JSON object of numbers, the whole text or its last line; values that are no finite numbers are left out.

    Raises:
        CodmdError: there is no such object, or no number in it.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    for candidate in (text, lines[-1] if lines else ""):
        try:
            found: Any = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            values = {name: float(value) for name, value in found.items() if _is_number(value)}
            if values:
                return values
            break
    raise CodmdError(f"the command printed no JSON object of numbers, but {text[-80:].strip()!r}")


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _filled(word: str, paths: dict[str, Path]) -> str:
    # Not str.format: other braces of a command are its own.
    for name, path in paths.items():
        word = word.replace(f"{{{name}}}", str(path))
    return word


def _read(path: Path) -> str:
    """Return a file, or the end of a long one, as text."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - MAX_OUTPUT_BYTES, 0))
        return file.read().decode("utf-8", errors="replace")
