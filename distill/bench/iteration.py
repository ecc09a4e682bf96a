"""`codmd-distill bench-step`: times our training iteration against the authors', with the share of each difference.

Within each trial the variants run in a rotating order, so that load on the machine affects all alike. Reported are CPU
time of the one thread, which other processes do not affect, and wall-clock time. Exit steps are stratified: over 4
trials student and critic stop at each of the 4 steps equally often.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codmd_serve.errors import CodmdError, ConfigError
from codmd_serve.files import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.config import DistillConfig
    from distill.data.prompts import PromptData
    from distill.networks.base import Base
    from distill.networks.build import Networks
    from distill.networks.ema import Ema

# From the authors' iteration to ours: each variant removes one more difference.
VARIANT_NAMES = ("authors", "prompts trimmed", "rollout stops at its exit", "one teacher call", "ours")
LOSS_TOLERANCE = 1e-3  # relative: losses sum a million float32 products in another order


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One variant with its own networks and optimizers.

    Attributes:
        losses: (role, iteration, exit step) -> loss.
        ema: None for the authors' variants, which have no moving average.
    """

    name: str
    networks: "Networks"
    losses: Callable[[str, int, int], "Tensor"]
    optimizers: dict[str, Any]
    ema: "Ema | None"


def add_bench_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-distill bench-step`."""
    parser.add_argument("--base", default="weights/shapeworld", help="the teacher's diffusers folder")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--trials", type=int, default=4, help="of 5 iterations per variant; a multiple of 4 (default 4)"
    )
    parser.add_argument("--json", type=Path, help="write the numbers here as well")


def run_bench_step(args: argparse.Namespace) -> int:
    """Measure and print a table; return 0.

    Raises:
        ConfigError, CheckpointError: bad input.
        CodmdError: losses differ from those of the authors' iteration.
    """
    if args.trials < 4 or args.trials % 4:
        raise ConfigError(f"--trials must be a multiple of 4, got {args.trials}: each exit step has to come as often")
    report = measure_iterations(bench_config(args.base, args.batch_size), args.trials)
    if args.json is not None:
        write_json(args.json, report)
    print(report_text(report))
    return 0


def bench_config(base: str, batch_size: int) -> "DistillConfig":
    """Return the shapeworld recipe under the authors' conventions, so that all variants compute the same losses."""
    from distill.config import with_overrides
    from distill.methods.registry import recipe_config

    settings = [f"base={base}", f"batch_size={batch_size}", "copula.reference_compat=true", "score_window=full"]
    return with_overrides(recipe_config(), [*settings, "num_captions=64", "precision=fp32"])


def measure_iterations(config: "DistillConfig", num_trials: int) -> dict[str, Any]:
    """Check that all variants give the same losses, then time them in turn on one CPU thread.

    Returns:
        cpu_s and wall_s, seconds per iteration by variant and trial; ratio, ours over the authors' of all trials and
        of each block of 4; shares, part of the saved time by reason; loss_error, the largest relative difference.

    Raises:
        CodmdError: losses differ by more than rounding.
        CheckpointError: the base cannot be loaded.
    """
    import tempfile

    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cache = tempfile.TemporaryDirectory()
    try:
        arms = build_arms(config, Path(cache.name))
        loss_error = check_losses(arms)
        for arm in arms:
            _cycle(arm, config, 0)  # warm-up
        cpu_s: dict[str, list[float]] = {arm.name: [] for arm in arms}
        wall_s: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for trial in range(num_trials):
            for place in range(len(arms)):
                arm = arms[(place + trial) % len(arms)]
                starts = time.process_time(), time.perf_counter()
                _cycle(arm, config, trial)
                cpu_s[arm.name].append((time.process_time() - starts[0]) / config.student_every_iterations)
                wall_s[arm.name].append((time.perf_counter() - starts[1]) / config.student_every_iterations)
    finally:
        torch.set_num_threads(threads)
        cache.cleanup()
    return {"batch_size": config.batch_size, "trials": num_trials, "loss_error": loss_error, **summary(cpu_s, wall_s)}


def summary(cpu_s: dict[str, list[float]], wall_s: dict[str, list[float]]) -> dict[str, Any]:
    """Return ratio, ratio_of_blocks, ratio_wall and shares of times by variant, first the authors' and last ours."""
    names = list(cpu_s)
    means = {name: statistics.fmean(times) for name, times in cpu_s.items()}
    first, last = names[0], names[-1]
    saved = means[first] - means[last]
    blocks = [slice(start, start + 4) for start in range(0, len(cpu_s[first]), 4)]
    pairs = pairwise(names)
    return {
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "ratio": means[last] / means[first],
        "ratio_of_blocks": [sum(cpu_s[last][block]) / sum(cpu_s[first][block]) for block in blocks],
        "ratio_prompts_trimmed": means[last] / means[names[1]],
        "ratio_wall": sum(wall_s[last]) / sum(wall_s[first]),
        "shares": {name: (means[before] - means[name]) / saved for before, name in pairs},
    }


def build_arms(config: "DistillConfig", cache: Path) -> list[Arm]:
    """Build the variants of VARIANT_NAMES from the same weights; they read prompts from `cache` while they live."""
    import torch

    from distill.bench.authors import Ablation
    from distill.data.prompts import cached_prompt_data
    from distill.networks.base import open_base
    from distill.run.checks import native_latents

    base = open_base(config.base)
    data = cached_prompt_data(config, base, cache, torch.device("cpu"))
    shape = (config.batch_size, *native_latents(config, base))
    ablations = (
        Ablation(),
        Ablation(padded_prompts=False),
        Ablation(padded_prompts=False, full_rollout=False),
        Ablation(padded_prompts=False, full_rollout=False, two_teacher_calls=False),
        None,
    )
    return [
        _arm(name, config, base, data, shape, ablation) for name, ablation in zip(VARIANT_NAMES, ablations, strict=True)
    ]


def _arm(
    name: str, config: "DistillConfig", base: "Base", data: "PromptData", shape: tuple[int, ...], ablation: Any
) -> Arm:
    import torch

    from distill.bench.authors import authors_critic_step, authors_student_step, padded_batch
    from distill.data.prompts import batch_indices
    from distill.methods.draws import StepResult
    from distill.methods.matching import draw_sample, student_step
    from distill.methods.scores import critic_step
    from distill.networks.build import Networks, build_networks
    from distill.networks.ema import Ema
    from distill.streams import named_rng

    device, num_steps = torch.device("cpu"), len(config.grid().timesteps)
    if ablation is not None and ablation.padded_prompts:
        # The stock network: ours reads trimmed prompts only.
        student, critic, teacher = (base.load_transformer(torch.float32).eval() for _ in range(3))
        networks = Networks(
            student=student, critic=critic, teacher=teacher.requires_grad_(False), precision=config.precision
        )
    else:
        networks = build_networks(config, base, device)
    ours: dict[str, Callable[..., StepResult]] = {"student": student_step, "critic": critic_step}
    theirs = {"student": authors_student_step, "critic": authors_critic_step}

    def losses(role: str, iteration: int, exit_step: int) -> "Tensor":
        batch = data.batch(batch_indices(iteration, data.num_prompts, config.batch_size, config.seed), device)
        # Noise is drawn for all steps, whatever the exit step, so that every variant gets the same numbers.
        draws = draw_sample(config, named_rng(config.seed, role, iteration), shape, num_steps - 1, device)
        draws = replace(draws, exit_step=exit_step)
        if ablation is None:
            return ours[role](networks, batch, draws, config).loss
        given = padded_batch(batch) if ablation.padded_prompts else batch
        return theirs[role](networks, given, draws, config, ablation).loss

    rates = {"student": config.optimizer.student_lr, "critic": config.optimizer.critic_lr}
    optimizers = {
        role: torch.optim.AdamW(getattr(networks, role).parameters(), lr=rate, betas=config.optimizer.betas)
        for role, rate in rates.items()
    }
    ema = Ema(networks.student, config.ema) if ablation is None else None
    return Arm(name=name, networks=networks, losses=losses, optimizers=optimizers, ema=ema)


def check_losses(arms: list[Arm]) -> float:
    """Return the largest relative difference of any loss from the first variant's, at every exit step.

    Raises:
        CodmdError: it is above LOSS_TOLERANCE.
    """
    worst = 0.0
    for role in ("student", "critic"):
        for exit_step in range(4):
            values = [float(arm.losses(role, exit_step, exit_step).detach()) for arm in arms]
            error = max(abs(value - values[0]) / abs(values[0]) for value in values)
            worst = max(worst, error)
            if not error < LOSS_TOLERANCE:
                raise CodmdError(f"losses of the {role} at exit step {exit_step} differ by {error:.2g}: {values}")
    return worst


def _cycle(arm: Arm, config: "DistillConfig", trial: int) -> None:
    """Run the iterations of one trial: a student update in the first, a critic update in each."""
    every = config.student_every_iterations
    for iteration in range(trial * every, (trial + 1) * every):
        for role in ("student", "critic") if iteration % every == 0 else ("critic",):
            _update(arm, role, arm.losses(role, iteration, iteration % 4), config.optimizer.clip_norm)


def _update(arm: Arm, role: str, loss: "Tensor", clip_norm: float | None) -> None:
    import torch

    network: nn.Module = getattr(arm.networks, role)
    loss.backward()  # type: ignore[no-untyped-call]
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
    arm.optimizers[role].step()
    arm.optimizers[role].zero_grad(set_to_none=True)
    if arm.ema is not None and role == "student":
        arm.ema.update(network)


def report_text(report: dict[str, Any]) -> str:
    """Return the report as Markdown: seconds by variant, shares by reason, the ratio with its spread."""
    lines = ["| variant | CPU s per iteration | clock s | share of the saving |", "|---|---|---|---|"]
    for name, times in report["cpu_s"].items():
        share = report["shares"].get(name)
        clock = statistics.fmean(report["wall_s"][name])
        cell = "" if share is None else f"{share:.0%}"
        lines.append(f"| {name} | {statistics.fmean(times):.3f} | {clock:.3f} | {cell} |")
    blocks = report["ratio_of_blocks"]
    lines += [
        "",
        f"ours / authors: {report['ratio']:.3f} of the CPU time (blocks of 4 trials {min(blocks):.3f} to "
        f"{max(blocks):.3f}), {report['ratio_wall']:.3f} by the clock; {report['ratio_prompts_trimmed']:.3f} against "
        "the authors' iteration with trimmed prompts.",
        f"batch {report['batch_size']}, {report['trials']} trials of 5 iterations; losses equal to "
        f"{report['loss_error']:.1g} relative.",
    ]
    return "\n".join(lines)
