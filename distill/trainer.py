"""The training loop on one device: turns of student and critic, clipping, averages, logging, checkpoints, the bundle.

Knows no mathematics of the methods (methods.py and what it names) and no command line (train_cli.py). A run is a
function of its config: the random numbers of iteration n are drawn from (seed, n), so there is no generator state to
save.
"""

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from codmd_serve.errors import CheckpointError, CodmdError, ConfigError
from distill.checkpoint import (
    CONFIG_FILE,
    check_resumable,
    list_checkpoints,
    load_checkpoint,
    read_config,
    save_checkpoint,
    write_bundle,
    write_config,
    write_pipeline,
)
from distill.config import DistillConfig
from distill.curves import CURVES_FILE, plot_curves
from distill.data import PromptData, batch_indices, cached_prompt_data
from distill.latents import TeacherLatents, cached_teacher_latents
from distill.methods import METHODS
from distill.networks import Ema, Networks, build_networks, compile_blocks, latent_shape, transformer_config
from distill.previews import Previews
from distill.step import StepResult

ROLES = ("student", "critic")
LOG_FILE = "log.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Where and for how long a run goes; none of it changes what an iteration computes."""

    out: Path
    device: torch.device
    minutes: float | None = None  # of training, over all resumptions together
    cache_dir: Path | None = None  # of prompt embeddings; None is OUT/cache
    compiled: bool = False  # torch.compile the blocks of all networks
    preview_every_steps: int = 200  # pictures of the averaged student, and one at the end; 0 makes none


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOutcome:
    """How a run ended; `bundle` is None and `signal_number` set when it was interrupted and can be resumed."""

    step: int
    num_student_updates: int
    num_skipped: int
    elapsed_s: float
    bundle: Path | None
    signal_number: int | None


class Trainer:
    """State of a run and one iteration of it."""

    def __init__(
        self,
        config: DistillConfig,
        networks: Networks,
        data: PromptData,
        shape: tuple[int, ...],
        device: torch.device,
        latents: TeacherLatents | None = None,
    ) -> None:
        self.config, self.networks, self.data, self.device = config, networks, data, device
        self.latents = latents
        self.shape = (config.batch_size, *shape)
        self.step = 0
        self.updates = dict.fromkeys(ROLES, 0)
        self.num_skipped = 0
        self.nonfinite_in_row = dict.fromkeys(ROLES, 0)
        self.ema = Ema(networks.student, config.ema)
        self.trained: dict[str, nn.Module] = {"student": networks.student, "critic": networks.critic}
        self.learning_rates = {"student": config.optimizer.student_lr, "critic": config.optimizer.critic_lr}
        self.optimizers = {
            role: torch.optim.AdamW(
                self.trained[role].parameters(),
                lr=self.learning_rates[role],
                betas=config.optimizer.betas,
                eps=config.optimizer.eps,
                weight_decay=config.optimizer.weight_decay,
            )
            for role in ROLES
        }

    def iterate(self) -> dict[str, Tensor]:
        """Do one iteration: the turns that the method gives to student and critic; return metrics, on the device.

        Raises:
            CodmdError: updates of one network were not finite too often in a row.
            CheckpointError: samples of the teacher that the method needs cannot be read.
        """
        config, step, method = self.config, self.step, METHODS[self.config.method]
        turns = method.turns(config, step)
        indices = batch_indices(step, self.data.num_prompts, config.batch_size, config.seed)
        batch = self.data.batch(indices, self.device)
        if self.latents is not None and "student" in turns:
            batch = replace(batch, x0=self.latents.batch(indices, self.device))
        metrics: dict[str, Tensor] = {}
        for role in turns:
            draws = method.draw(config, role, step, self.shape, self.device)
            metrics |= self._update(role, method.steps[role](self.networks, batch, draws, config))
        self.step += 1
        return metrics

    def _update(self, role: str, result: StepResult) -> dict[str, Tensor]:
        network, optimizer, settings = self.trained[role], self.optimizers[role], self.config.optimizer
        result.loss.backward()  # type: ignore[no-untyped-call]
        # Clipping to infinity multiplies by 1 and still measures the norm.
        clip_norm = math.inf if settings.clip_norm is None else settings.clip_norm
        grad_norm = nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        # The one wait for the device per update: a poisoned update must not reach the weights.
        is_finite = bool((result.loss.detach() + grad_norm).isfinite())
        if is_finite:
            warmup = min(1.0, (self.updates[role] + 1) / max(settings.warmup_updates, 1))
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rates[role] * warmup
            optimizer.step()
            self.updates[role] += 1
            if role == "student":
                self.ema.update(network)
        # At once, not before the next backward: the student's gradients would sit in memory for all critic turns.
        optimizer.zero_grad(set_to_none=True)
        self._count_nonfinite(role, is_finite)
        own = {f"{role}_loss": result.loss.detach(), f"{role}_grad_norm": grad_norm.detach()}
        return own | result.metrics if is_finite else {}

    def _count_nonfinite(self, role: str, is_finite: bool) -> None:
        self.nonfinite_in_row[role] = 0 if is_finite else self.nonfinite_in_row[role] + 1
        if is_finite:
            return
        self.num_skipped += 1
        logger.warning("update skipped role=%s step=%d reason=nonfinite", role, self.step)
        if self.nonfinite_in_row[role] >= self.config.max_nonfinite_in_row:
            raise CodmdError(
                f"loss or gradient of the {role} was not finite {self.nonfinite_in_row[role]} times in a row, "
                f"the last at step {self.step}: lower its learning rate or resume from an earlier checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {
            "step": self.step,
            "updates": dict(self.updates),
            "num_skipped": self.num_skipped,
            "nonfinite_in_row": dict(self.nonfinite_in_row),
            "ema": self.ema.state_dict(),
            "networks": {role: self.trained[role].state_dict() for role in ROLES},
            "optimizers": {role: self.optimizers[role].state_dict() for role in ROLES},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            CheckpointError: it belongs to networks of another shape, or lacks a part.
        """
        try:
            for role in ROLES:
                self.trained[role].load_state_dict(state["networks"][role])
                self.optimizers[role].load_state_dict(state["optimizers"][role])
            self.ema.load_state_dict(state["ema"])
            self.step, self.num_skipped = int(state["step"]), int(state["num_skipped"])
            self.updates, self.nonfinite_in_row = dict(state["updates"]), dict(state["nonfinite_in_row"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise CheckpointError(f"the checkpoint does not fit this run: {reason}") from error


def run_training(config: DistillConfig, options: RunOptions, *, resume: bool) -> RunOutcome:
    """Train until max_steps, the time budget or a signal; write checkpoints and, unless interrupted, the bundle.

    Args:
        config: its precision must be resolved.
        options: where to and for how long.
        resume: go on with the run in `options.out`; without it that folder must hold none.

    Raises:
        ConfigError: settings, prompts or folder that cannot work.
        CheckpointError: base or checkpoint broken, or a checkpoint that cannot be written.
        CodmdError: training diverged; the last good checkpoint stays.
    """
    _check_out(config, options.out, resume)
    shape = native_latents(config)
    cache_dir, device = options.cache_dir or options.out / "cache", options.device
    data = cached_prompt_data(config, cache_dir, device)
    networks = build_networks(config, device)
    if options.compiled:
        for network in (networks.student, networks.critic, networks.teacher):
            compile_blocks(network)
    latents = None
    if METHODS[config.method].needs_x0:
        latents = cached_teacher_latents(config, networks, data, shape, cache_dir, device)
    trainer = Trainer(config, networks, data, shape, device, latents)
    elapsed_s = 0.0
    checkpoints = list_checkpoints(options.out) if resume else []
    if checkpoints:
        state = load_checkpoint(checkpoints[-1])
        trainer.load_state_dict(state["trainer"])
        elapsed_s = float(state["elapsed_s"])
    options.out.mkdir(parents=True, exist_ok=True)
    write_config(options.out, config)
    signal_number, elapsed_s = _loop(trainer, options, elapsed_s)
    bundle = None
    if signal_number is None:
        bundle = options.out / "bundle"
        write_bundle(bundle, config, trainer.ema.shadow, trainer.updates["student"])
        write_pipeline(bundle, options.out / "pipeline")
    return RunOutcome(
        step=trainer.step,
        num_student_updates=trainer.updates["student"],
        num_skipped=trainer.num_skipped,
        elapsed_s=elapsed_s,
        bundle=bundle,
        signal_number=signal_number,
    )


def native_latents(config: DistillConfig) -> tuple[int, ...]:
    """Return (C, F, H, W) of the latents of the config's native video.

    Raises:
        CheckpointError: the base is missing or has no transformer.
        ConfigError: the size is off the grid of VAE and patches.
    """
    architecture = transformer_config(config.base)
    return latent_shape(config.base, config.native, architecture["in_channels"], tuple(architecture["patch_size"]))


def _check_out(config: DistillConfig, out: Path, resume: bool) -> None:
    holds_run = (out / CONFIG_FILE).is_file()
    if resume:
        check_resumable(read_config(out), config)
    elif holds_run:
        raise ConfigError(f"{out} already holds a run: resume it or name another folder")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"{out} cannot be written: {nearest} is no folder or is read-only")


def _loop(trainer: Trainer, options: RunOptions, elapsed_before_s: float) -> tuple[int | None, float]:
    """Iterate until done; return the signal that ended it, if one did, and the seconds trained so far."""
    config, start, every = trainer.config, time.monotonic(), options.preview_every_steps
    previews = Previews(config, options.out, trainer.data, trainer.shape[1:], trainer.device) if every else None
    budget_s = math.inf if options.minutes is None else 60 * options.minutes

    def elapsed_s() -> float:
        return elapsed_before_s + time.monotonic() - start

    def save() -> None:
        state = {"trainer": trainer.state_dict(), "elapsed_s": elapsed_s()}
        save_checkpoint(options.out, trainer.step, state, config.keep_last)
        plot_curves(options.out / LOG_FILE, options.out / CURVES_FILE)

    def preview() -> None:
        if previews is not None:
            log.show(previews.write(trainer.step, trainer.networks.student, trainer.ema.shadow), trainer.step)

    with stop_signal() as received, RunLog(options.out, config, trainer.step, budget_s) as log:
        saved_step, shown_step = trainer.step, -1
        while trainer.step < config.max_steps and elapsed_s() < budget_s and not received:
            log.add(trainer.iterate())
            is_last = trainer.step == config.max_steps or bool(received) or elapsed_s() >= budget_s
            if is_last or trainer.step % config.log_every_steps == 0:
                log.write(trainer, elapsed_s())
            if trainer.step % config.save_every_steps == 0:
                save()
                saved_step = trainer.step
            if every and trainer.step % every == 0 and not received:
                preview()
                shown_step = trainer.step
        if saved_step != trainer.step:
            save()
        if shown_step != trainer.step and not received:  # whoever sent a signal does not wait for pictures
            preview()
        return (received[0] if received else None), elapsed_s()


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of the first; a second one of a kind acts as it did before."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread only
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class RunLog:
    """Means of the metrics since the last line, to log.jsonl, TensorBoard and the progress bar."""

    def __init__(self, out: Path, config: DistillConfig, step: int, budget_s: float) -> None:
        self.config, self.budget_s = config, budget_s
        self.path = out / LOG_FILE
        _keep_lines_up_to(self.path, step)
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step)
        bar = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        # disable=None: no bar where nobody watches; the log lines stay.
        self.bar = tqdm(total=config.max_steps, initial=step, disable=None, bar_format=bar, dynamic_ncols=True)
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self.window_start, self.window_step = time.monotonic(), step

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.board.close()

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Take in one iteration's metrics, without waiting for the device."""
        for name, value in metrics.items():
            total, count = self.sums.get(name, (torch.zeros_like(value), 0))
            self.sums[name] = (total + value, count + 1)
        self.bar.update(1)

    def write(self, trainer: Trainer, elapsed_s: float) -> None:
        """Write one line of means and start the next window."""
        step = trainer.step
        num_iterations, now = step - self.window_step, time.monotonic()
        seconds = max(now - self.window_start, 1e-9)
        means = {name: float(total) / count for name, (total, count) in self.sums.items()}
        samples_per_s = num_iterations * self.config.batch_size / seconds
        remaining_s = min((self.config.max_steps - step) * seconds / num_iterations, self.budget_s - elapsed_s)
        record: dict[str, Any] = {
            "step": step,
            "student_updates": trainer.updates["student"],
            "num_skipped": trainer.num_skipped,
            "elapsed_s": round(elapsed_s, 3),
            "samples_per_s": round(samples_per_s, 3),
            "eta_s": round(max(remaining_s, 0.0), 1),
            **{name: value if math.isfinite(value) else None for name, value in means.items()},
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in means.items():
            self.board.add_scalar(name, value, step)
        self.board.add_scalar("samples_per_s", samples_per_s, step)
        shown = {name: means.get(name, math.nan) for name in ("student_loss", "student_grad_norm", "critic_loss")}
        text = " ".join(f"{name}={value:.4g}" for name, value in shown.items())
        line = f"{text} samples/s={samples_per_s:.3g} eta={tqdm.format_interval(record['eta_s'])}"
        self.bar.set_postfix_str(line)
        logger.info("step=%d %s", step, line)
        self.sums, self.window_start, self.window_step = {}, now, step

    def show(self, picture: np.ndarray | None, step: int) -> None:
        """Put a preview, uint8 (rows, columns, 3), on TensorBoard."""
        if picture is not None:
            self.board.add_image("preview", picture, step, dataformats="HWC")


def _keep_lines_up_to(path: Path, step: int) -> None:
    """Drop lines that a resumed run will write again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    partial.rename(path)
