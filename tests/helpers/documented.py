"""Judges commands that stand in the documentation by the real parsers, without running them."""

import argparse
import contextlib
import importlib.util
import io
import json
import re
import tomllib
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import reference_commands
import reference_http

from codmd_serve.api.schemas import GenerateBody
from codmd_serve.config import ServeConfig
from codmd_serve.errors import CodmdError
from distill.config import DistillConfig, with_overrides
from distill.methods.registry import recipe_config

ROOT = Path(__file__).resolve().parent.parent.parent
GPU_GIB = 80.0
# Programs that are not ours; their arguments are not judged.
FOREIGN = {
    "aiperf", "cat", "cd", "chmod", "cp", "cut", "df", "docker", "du", "echo", "export", "git", "grep", "head",
    "helm", "hf", "install", "journalctl", "jq", "kill", "kubectl", "ls", "mkdir", "nvidia-smi", "openssl", "pg_dump",
    "pkill", "printf", "promtool", "psql", "rm", "rsync", "scontrol", "scp", "sed", "set", "sha256sum", "sleep",
    "source", "ssh", "sudo", "systemctl", "tail", "tar", "tee", "true", "umask", "uname", "useradd", "wget",
}  # fmt: skip
EXTERNAL = ("zero_to_fp32.py",)  # DeepSpeed writes it beside its checkpoints


class MisprintError(AssertionError):
    """A command that would not do what its page says."""


def judge(words: list[str], processes: int = 1) -> None:
    """Check one command.

    Args:
        words: program and arguments.
        processes: that it runs in; torchrun says how many.

    Raises:
        MisprintError: says what is wrong.
    """
    program = words[0].rpartition("/")[2]
    if program in FOREIGN:
        return
    judges: dict[str, Callable[[list[str]], None]] = {
        "codmd-serve": _judge_serve,
        "codmd-distill": lambda rest: _judge_distill(rest, processes),
        "torchrun": _judge_torchrun,
        "srun": _judge_srun,
        "sbatch": _judge_sbatch,
        "make": _judge_make,
        "curl": _judge_curl,
        "python": _judge_python,
        "python3": _judge_python,
        "pip": _judge_pip,
        "pytest": _judge_pytest,
        "timeout": lambda rest: judge(rest[1:], processes),
    }
    if program not in judges:
        raise MisprintError(f"{program}: neither a program of ours nor one of tests/helpers/documented.py")
    try:
        judges[program](words[1:])
    except CodmdError as error:
        raise MisprintError(f"{' '.join(words)}: {error}") from None


def judge_flags(words: list[str]) -> None:
    """Check that the subcommand and the flags of an inline `codmd-...` exist; its arguments may be left out."""
    parser = _serve_parser() if words[0] == "codmd-serve" else _distill_parser()
    rest = words[1:]
    while True:
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not groups:
            break
        named = [word for word in rest if word in groups[0].choices]
        if not named or rest[0] != named[0]:
            if rest and re.fullmatch(r"[a-z][a-z-]*", rest[0]):
                raise MisprintError(f"{' '.join(words)}: there is no command {rest[0]}")
            parser = groups[0].choices.get("serve", parser)
            break
        parser, rest = groups[0].choices[named[0]], rest[1:]
    known = {name for action in parser._actions for name in action.option_strings} | {"--version"}
    for word in rest:
        name = word.partition("=")[0]
        if re.fullmatch(r"--[a-z][\w-]*", name) and name not in known:
            raise MisprintError(f"{' '.join(words)}: there is no flag {name}")


@cache
def _serve_parser() -> argparse.ArgumentParser:
    return reference_commands.serve_parser()


@cache
def _distill_parser() -> argparse.ArgumentParser:
    return reference_commands.distill_parser()


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return parser.parse_args(words)
    except SystemExit as end:
        if end.code in (0, None):  # --help, --version
            return argparse.Namespace(command="")
        raise MisprintError(f"{' '.join(words)}: {said.getvalue()}") from None


def _judge_serve(words: list[str]) -> None:
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words = ["serve", *words]
    options = _parse(_serve_parser(), words)
    if options.command in ("serve", "work"):
        ServeConfig(**{name: getattr(options, name) for name in ServeConfig.__dataclass_fields__ if name in options})
    if options.command == "bench":
        from codmd_serve.bench.options import BenchConfig

        BenchConfig(**{name: getattr(options, name) for name in BenchConfig.__dataclass_fields__})


def _judge_distill(words: list[str], processes: int) -> None:
    options = _parse(_distill_parser(), words)
    if options.command in ("plan", "sample-teacher"):
        recipe_settings(options)
    if options.command == "train" and not options.resume:
        config = recipe_settings(options)
        if config.recipe.startswith("wan") and not options.dry_run and options.device != "cpu":
            judge_fit(config, processes)
    if options.command == "teacher":
        from distill.pretrain.config import PRETRAIN_PRESETS

        if options.preset not in PRETRAIN_PRESETS:
            raise MisprintError(f"there is no preset {options.preset}")


def recipe_settings(options: argparse.Namespace) -> DistillConfig:
    """Return the config that a command trains or plans."""
    return with_overrides(recipe_config(options.recipe, options.method), options.settings)


def judge_fit(config: DistillConfig, gpus: int) -> None:
    """Check that a run fits GPUs of 80 GiB, by `plan`.

    Raises:
        MisprintError: by how much it does not.
    """
    from distill.plan.architecture import read_subject
    from distill.plan.options import GIB, LAYOUT, PlanOptions
    from distill.plan.planner import make_plan

    layout = {name: getattr(config, name) for name in LAYOUT}
    plan = make_plan(read_subject(config), PlanOptions(gpus=gpus, gpu_gib=GPU_GIB, **layout))
    if not plan.fits:
        lacking = -plan.headroom_bytes / GIB
        raise MisprintError(f"{config.recipe} on {gpus} GPUs of {GPU_GIB:g} GiB lacks {lacking:.1f} GiB, says plan")


def _judge_srun(words: list[str]) -> None:
    first = next(place for place, word in enumerate(words) if word.endswith(("codmd-distill", "codmd-serve")))
    given = {name: int(value) for name, value in pairwise(words[:first]) if value.isdigit()}
    judge(words[first:], given.get("--nodes", 1) * given.get("--ntasks-per-node", 1))


def _judge_sbatch(words: list[str]) -> None:
    place = next(place for place, word in enumerate(words) if word.endswith(".sbatch"))
    script = ROOT / words[place]
    if not script.is_file():
        raise MisprintError(f"there is no {words[place]}")
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script.read_text(encoding="utf-8"), re.MULTILINE))
    asked |= {name.removeprefix("--"): value for name, value in pairwise(words[:place])}
    judge(["codmd-distill", "train", *words[place + 1 :]], int(asked["nodes"]) * int(asked["ntasks-per-node"]))


def _judge_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    options = _parse(get_args_parser(), words)
    nodes = int(str(options.nnodes).rpartition(":")[2])
    judge([options.training_script, *options.training_script_args], nodes * int(options.nproc_per_node))


def _judge_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        if "=" not in word and not re.search(rf"^{re.escape(word)}:", text, re.MULTILINE):
            raise MisprintError(f"make has no target {word}")


def _judge_curl(words: list[str]) -> None:
    urls = [word for word in words if re.match(r"(https?://)?(localhost|127\.0\.0\.1):8000", word)]
    if not urls:
        return
    given = dict(pairwise(words))
    method = given.get("-X", "POST" if {"-d", "--data", "-F"} & set(words) else "GET").lower()
    path = re.sub(r"^(https?://)?[^/]*", "", urls[0]).partition("?")[0] or "/"
    routes = reference_http.document()["paths"]
    found = [route for route in routes if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", route), path)]
    if path not in ("/", "/docs", "/openapi.json") and not any(method in routes[route] for route in found):
        raise MisprintError(f"there is no route {method.upper()} {path}")
    if "-d" in given and path == "/generate":
        try:
            GenerateBody.model_validate(json.loads(given["-d"]))
        except ValueError as error:
            raise MisprintError(f"the body of {' '.join(words)}: {error}") from None


def _judge_python(words: list[str]) -> None:
    if words[:1] == ["-m"]:
        if importlib.util.find_spec(words[1]) is None:
            raise MisprintError(f"there is no module {words[1]}")
        if words[1] == "pip":
            _judge_pip(words[2:])
    elif words[:1] == ["-c"]:
        compile(words[1], "<documentation>", "exec")
    elif words and words[0].endswith(".py") and words[0] not in EXTERNAL and not (ROOT / words[0]).is_file():
        raise MisprintError(f"there is no file {words[0]}")


def _judge_pytest(words: list[str]) -> None:
    for word in words:
        path = word.partition("::")[0]
        if path.startswith("tests") and not (ROOT / path).exists():
            raise MisprintError(f"there is no {path}")


def _judge_pip(words: list[str]) -> None:
    project: Any = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words:
        match = re.fullmatch(r"(?:\.|codmd-serve|.*\.whl)\[([\w,-]+)\]", word)
        for extra in match[1].split(",") if match else []:
            if extra not in project["optional-dependencies"]:
                raise MisprintError(f"there is no extra {extra}")
