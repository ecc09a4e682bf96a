"""`codmd-distill sample-teacher`: the teacher's samples that a run trains on, made before it and for other runs too."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from codmd_serve.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from distill.config import DistillConfig
    from distill.parallel.processes import Processes


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-distill sample-teacher`."""
    parser.add_argument(
        "--recipe", help="shapeworld (default), analytic_ties, analytic_orbit, analytic_switch, wan_1_3b or wan_14b"
    )
    parser.add_argument("--method", help="rcm, dcm, regression, or a method whose run has start.updates above 0")
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="extend",
        nargs="+",
        default=[],
        help="settings of the run that will train on the samples",
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder to fill; runs read it with the same --cache")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")


def run_sample_teacher(args: argparse.Namespace) -> int:
    """Run `codmd-distill sample-teacher`; started by torchrun, all processes sample, each its share.

    Stopped at any moment, it goes on with the shard that it was at when it is started again.

    Returns:
        0 when all samples are on disk.

    Raises:
        ConfigError: settings that cannot work, or a run that needs no samples.
        CheckpointError: the base is missing or broken, or the folder cannot be written.
    """
    import torch

    from codmd_serve.device import choose_device
    from codmd_serve.wan.checkpoint import silence_libraries
    from distill.data.prompts import require_prompts
    from distill.parallel.processes import out_of_memory_in_one_line, process_group
    from distill.run.command import resolve_config

    silence_libraries()
    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"--threads must be 1 or more, got {args.threads}")
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    args.resume, args.seed, args.max_iterations = False, None, None
    config = _sampled_run(resolve_config(args, device))
    require_prompts(config)
    with process_group(device, config, args.find_launch()) as processes, out_of_memory_in_one_line(processes):
        folder, num_samples = _sample(config, args.cache, device, processes)
        if processes.is_rank0:
            print(f"{num_samples:,} samples of the teacher in {folder}")
    return 0


def _sampled_run(config: "DistillConfig") -> "DistillConfig":
    """Return the run, or its start, that trains on samples of the teacher."""
    from distill.methods.registry import METHODS, recipe_config
    from distill.methods.regression import start_of

    for run in (start_of(config), config):
        if run is not None and METHODS[run.method].teacher_sampling(run) is not None:
            return run
    needing = [name for name in METHODS if METHODS[name].teacher_sampling(recipe_config(None, name)) is not None]
    raise ConfigError(
        f"a run of method {config.method} trains on prompts alone: name --method {', '.join(needing[:-1])} or "
        f"{needing[-1]}, or give the run a start with --set start.updates=N"
    )


def _sample(config: "DistillConfig", cache: Path, device: "torch.device", processes: "Processes") -> tuple[Path, int]:
    from distill.data.prompts import cached_prompt_data
    from distill.data.teacher_latents import cached_teacher_latents
    from distill.methods.registry import METHODS
    from distill.networks.base import open_base
    from distill.networks.build import build_networks
    from distill.run.checks import native_latents

    base, device = open_base(config.base).prepared(cache), processes.device
    shape = native_latents(config, base)
    data = cached_prompt_data(config, base, cache, device, processes)
    networks = build_networks(config, base, device, processes)
    sampling = METHODS[config.method].teacher_sampling(config)
    assert sampling is not None
    latents = cached_teacher_latents(config, sampling, base, networks, data, shape, cache, device, processes)
    return latents.folder, latents.num_samples
