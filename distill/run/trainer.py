"""The training loop of each rank: turns of student and critic, clipping, EMA, logging, checkpoints, the bundle.

Knows no mathematics of the methods (distill/methods) and no command line (run/command.py). A run is a function of its
config: the random numbers of iteration n are drawn from (seed, n), so there is no generator state to save.
"""

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from codmd_serve.errors import CheckpointError, CodmdError
from codmd_serve.files import first_line
from distill.config import DistillConfig
from distill.data.prompts import PromptData, cached_prompt_data
from distill.data.teacher_latents import TeacherLatents, cached_teacher_latents
from distill.methods.draws import ROLES, Turn
from distill.methods.registry import METHODS
from distill.networks.base import Base, open_base
from distill.networks.build import Networks, build_networks, compile_blocks, trained_parameters
from distill.networks.ema import Ema
from distill.parallel.processes import SINGLE_PROCESS, Processes
from distill.parallel.sharding import set_gradient_sync
from distill.run.adapters import begin_adapters, beginning
from distill.run.batches import load_batch
from distill.run.bundle import export_bundle, student_spec, write_pipeline
from distill.run.calls import Calls
from distill.run.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
)
from distill.run.checks import check_out, native_latents, start_folder
from distill.run.choice import Choice, choice_of
from distill.run.log import RunLog
from distill.run.optimizer import new_moment, new_optimizer
from distill.run.outputs import Outputs
from distill.run.saver import Saver
from distill.run.signals import stop_signal
from distill.run.trackers import DEFAULT
from distill.run.validation import Judge, open_judge

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Where and for how long a run goes; none of it changes what an iteration computes.

    Attributes:
        minutes: time budget of training, over all resumptions together.
        cache_dir: of prompt embeddings; None is OUT/cache.
        compiled: torch.compile the blocks of all networks.
        preview_every_iterations: between two pictures of the EMA student, the last of which comes at the end; 0 makes
            none.
        keep_best: a logged metric, of which lower is better, or one of validation; the checkpoint with its best value
            is kept beside the newest ones. Where it is None, that of validate.metric is.
        trackers: names of `trackers.TRACKERS` that show the run.
        has_pipeline: whether the run ends with a folder for diffusers beside the bundle.
        has_curves: whether each checkpoint comes with the curves so far; drawing them takes most of a second.
    """

    out: Path
    device: torch.device
    minutes: float | None = None
    cache_dir: Path | None = None
    compiled: bool = False
    preview_every_iterations: int = 200
    keep_best: str | None = None
    trackers: tuple[str, ...] = DEFAULT
    has_pipeline: bool = True
    has_curves: bool = True
    processes: Processes = SINGLE_PROCESS


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOutcome:
    """How a run ended; `bundle` is None and `signal_number` set when it was interrupted and can be resumed.

    Attributes:
        iteration: number of iterations done, over all resumptions together.
        num_skipped: updates left out because loss or gradient was not finite.
        choice: what validation found best; the bundle is of that iteration, where there was a validation.
    """

    iteration: int
    num_student_updates: int
    num_skipped: int
    elapsed_s: float
    bundle: Path | None
    signal_number: int | None
    choice: Choice


class Trainer:
    """The state of a run, and one iteration of it."""

    def __init__(
        self,
        config: DistillConfig,
        networks: Networks,
        data: PromptData,
        shape: tuple[int, ...],
        device: torch.device,
        latents: TeacherLatents | None = None,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self.config, self.networks, self.data, self.device = config, networks, data, device
        self.latents, self.processes = latents, processes
        self.shape = (config.batch_size, *shape)
        self.iteration = 0
        self.updates = dict.fromkeys(ROLES, 0)
        self.num_skipped = 0
        self.choice = Choice()
        self.nonfinite_in_row = dict.fromkeys(ROLES, 0)
        self.calls = Calls(networks)
        self.ema = Ema(networks.student, config.ema)
        kept = config.method_settings.memory(config).items()
        self.memory = {name: torch.tensor(values, device=device) for name, values in kept}
        self.trained: dict[str, nn.Module] = {"student": networks.student, "critic": networks.critic}
        self.parameters = {role: trained_parameters(self.trained[role]) for role in ROLES}
        self.learning_rates = {"student": config.optimizer.student_lr, "critic": config.optimizer.critic_lr}
        self.optimizers = {
            role: new_optimizer(self.parameters[role].values(), self.learning_rates[role], config) for role in ROLES
        }

    def iterate(self) -> dict[str, Tensor]:
        """Run one iteration: the turns that the method gives to student and critic; return metrics, on the device.

        Raises:
            CodmdError: updates of one network were not finite too often in a row.
            CheckpointError: samples of the teacher that the method needs cannot be read.
        """
        metrics: dict[str, Tensor] = {}
        for role in METHODS[self.config.method].turns(self.config, self.iteration):
            with self.calls:
                means = self._differentiate(role)
            metrics |= self._update(role, means)
        self.iteration += 1
        return metrics

    def _differentiate(self, role: str) -> dict[str, Tensor]:
        """Leave the gradient of the whole batch's loss, averaged over ranks, in the parameters of a role.

        Returns:
            The loss, as {role}_loss, and the step's metrics, means over micro-batches and ranks; equal on all ranks.
        """
        config, sums = self.config, dict[str, Tensor]()
        for index, result in enumerate(METHODS[config.method].losses(self._turn(role))):
            if config.accumulate > 1:
                # A method may yield more results than micro-batches, for graphs of their own: all late ones count.
                set_gradient_sync(self.trained[role], config.gradient_sync, is_last=index >= config.accumulate - 1)
            # Ranks that split their tokens hold a share of the gradient each, and gradients are averaged over ranks.
            share = self.processes.context_parallel / config.accumulate
            (result.loss if share == 1.0 else share * result.loss).backward()  # type: ignore[no-untyped-call]
            for name, value in {f"{role}_loss": result.loss.detach(), **result.metrics}.items():
                sums[name] = sums[name] + value if name in sums else value
        means = self.processes.all_reduce_mean(
            torch.stack([value.float() for value in sums.values()]) / config.accumulate
        )
        return dict(zip(sums, means.unbind(), strict=True))

    def _turn(self, role: str) -> Turn:
        return Turn(
            role=role,
            iteration=self.iteration,
            config=self.config,
            networks=self.networks,
            processes=self.processes,
            shape=self.shape,
            device=self.device,
            load=partial(load_batch, self.config, self.data, self.latents, role, self.iteration, self.device),
            memory=self.memory,
        )

    def _update(self, role: str, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters, optimizer, settings = self.parameters[role], self.optimizers[role], self.config.optimizer
        # A limit of infinity changes nothing and still returns the norm.
        clip_norm = math.inf if settings.clip_norm is None else settings.clip_norm
        grad_norm = nn.utils.clip_grad_norm_(parameters.values(), clip_norm)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        # The one synchronisation with the device per update: an update that is not finite must not reach the weights.
        is_finite = bool((metrics[f"{role}_loss"] + grad_norm).isfinite())
        if is_finite:
            warmup = min(1.0, (self.updates[role] + 1) / max(settings.warmup_updates, 1))
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rates[role] * warmup
            optimizer.step()
            self.updates[role] += 1
            if role == "student":
                self.ema.update(self.networks.student)
        # Now and not before the next backward, or the student's gradients stay in memory during all critic turns.
        optimizer.zero_grad(set_to_none=True)
        self._count_nonfinite(role, is_finite)
        return metrics | {f"{role}_grad_norm": grad_norm.detach()} if is_finite else {}

    def _count_nonfinite(self, role: str, is_finite: bool) -> None:
        self.nonfinite_in_row[role] = 0 if is_finite else self.nonfinite_in_row[role] + 1
        if is_finite:
            return
        self.num_skipped += 1
        logger.warning("update skipped role=%s iteration=%d reason=nonfinite", role, self.iteration)
        if self.nonfinite_in_row[role] >= self.config.max_nonfinite_in_row:
            raise CodmdError(
                f"loss or gradient of the {role} was not finite {self.nonfinite_in_row[role]} times in a row, "
                f"the last at iteration {self.iteration}: lower its learning rate or resume from an earlier checkpoint"
            )

    def state_tensors(self) -> dict[str, Tensor]:
        """Return all tensors that the next iteration depends on, as this rank holds them; they are not copies."""
        kept = {"ema": self.ema.shadow, "memory": self.memory}
        tensors = {f"{kind}/{name}": tensor for kind, one in kept.items() for name, tensor in one.items()}
        for role in ROLES:
            for name, parameter in self.parameters[role].items():
                tensors[f"networks/{role}/{name}"] = parameter.detach()
                for key, moment in self.optimizers[role].state.get(parameter, {}).items():
                    tensors[f"optimizers/{role}/{key}/{name}"] = moment
        return tensors

    def state_values(self) -> dict[str, Any]:
        """Return everything else that it depends on, as plain JSON values; equal on all ranks."""
        return {
            "method": self.config.method,
            "iteration": self.iteration,
            "updates": dict(self.updates),
            "num_skipped": self.num_skipped,
            "nonfinite_in_row": dict(self.nonfinite_in_row),
            "ema_updates": self.ema.num_updates,
            "choice": self.choice.values(),
            "calls": dict(self.calls.counts),
            "data": {"content": self.data.content, "samples": self.iteration * self.config.batch_size},
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, whatever number of ranks wrote it; every rank calls it.

        Raises:
            CheckpointError: it belongs to another method or to networks of another shape, or lacks a part.
        """
        values = checkpoint.values
        method = values.get("method", self.config.method)
        if method != self.config.method:
            raise CheckpointError(
                f"checkpoint {checkpoint.folder} is of method {method}, the run is of {self.config.method}"
            )
        content = values.get("data", {}).get("content", "")
        if content and self.data.content and content != self.data.content:
            raise CheckpointError(
                f"checkpoint {checkpoint.folder} was trained on other prompts than {self.config.prompts or 'these'}: "
                "they have changed since, so its place in them means nothing; bring them back, or start a new run"
            )
        try:
            self._make_moments(checkpoint.names())
            checkpoint.load_into(self.state_tensors(), self.processes)
            self.iteration, self.num_skipped = int(values["iteration"]), int(values["num_skipped"])
            self.updates, self.nonfinite_in_row = dict(values["updates"]), dict(values["nonfinite_in_row"])
            self.ema.num_updates = int(values["ema_updates"])
            self.choice = choice_of(values.get("choice", {}))
            self.calls.restore(values.get("calls", {}))
        except (KeyError, TypeError, ValueError, CheckpointError) as error:
            raise CheckpointError(f"{checkpoint.folder} does not fit this run: {first_line(error)}") from error

    def _make_moments(self, names: Iterable[str]) -> None:
        """Give the optimizers the moments that a checkpoint has, to be filled; AdamW makes them at its first update."""
        for role in ROLES:
            self.optimizers[role].state.clear()
        for name in names:
            kind, *rest = name.split("/", 3)
            if kind != "optimizers":
                continue
            role, key, parameter_name = rest
            parameter = self.parameters[role][parameter_name]
            self.optimizers[role].state[parameter][key] = new_moment(key, parameter)


def run_training(
    config: DistillConfig,
    options: RunOptions,
    *,
    resume: bool,
    started: Path | None = None,
    elapsed_s: float = 0.0,
) -> RunOutcome:
    """Train until max_iterations, the time budget or a signal; write checkpoints and, unless interrupted, the bundle.

    Args:
        config: its precision must be resolved. Its regressed start is run/start.py's.
        options: where to and for how long.
        resume: continue the run in `options.out`; without it that folder must hold none.
        started: the student's weights after the start, in place of config.student_from.
        elapsed_s: seconds of the budget that the start took.

    Raises:
        ConfigError: settings, prompts or folder that cannot work.
        CheckpointError: base or checkpoint broken, or a checkpoint that cannot be written.
        CodmdError: training diverged; the last good checkpoint stays.
    """
    processes = options.processes
    processes.on_rank0(lambda: check_out(config, options.out, resume))
    base = open_base(config.base).prepared(options.cache_dir or options.out / "cache")
    base.check_run(config, processes.world_size, compiled=options.compiled)
    # What the bundle at the end could not say is an error now.
    student_spec(options.out / "bundle", config, base, 0)
    judge = processes.on_all_ranks(lambda: open_judge(config, base, options.keep_best))
    checkpoints = processes.broadcast_from_rank0(lambda: list_checkpoints(options.out)) if resume else []
    trainer = _build_trainer(config, beginning(config, started, is_resumed=bool(checkpoints)), base, options)
    if checkpoints:
        elapsed_s = _resume(trainer, checkpoints[-1])
    elif started is not None and config.lora_student_rank:
        begin_adapters(trainer.parameters["student"], trainer.ema, started.parent, processes)
    processes.on_rank0(lambda: start_folder(options.out, config))
    signal_number, elapsed_s = _loop(trainer, base, options, judge, elapsed_s, is_saved=bool(checkpoints))
    bundle = None
    if signal_number is None:
        bundle = options.out / "bundle"
        # What validation chose; a run without one ends with its last student.
        exported = trainer.choice.best_iteration if judge and trainer.choice.best_iteration else trainer.iteration

        def export() -> None:
            # From the checkpoint, tensor by tensor: rank 0 needs the memory of the bundle alone.
            export_bundle(options.out, bundle, exported, base)
            if options.has_pipeline and base.has_vae:
                write_pipeline(bundle, options.out / "pipeline")

        processes.on_rank0(export)
    return RunOutcome(
        iteration=trainer.iteration,
        num_student_updates=trainer.updates["student"],
        num_skipped=trainer.num_skipped,
        elapsed_s=elapsed_s,
        bundle=bundle,
        signal_number=signal_number,
        choice=trainer.choice,
    )


def _build_trainer(config: DistillConfig, begin: DistillConfig, base: Base, options: RunOptions) -> Trainer:
    """Build what a run trains with; `begin` is its config with the weights that its networks begin from."""
    processes, device = options.processes, options.device
    shape = native_latents(config, base)
    cache_dir = options.cache_dir or options.out / "cache"
    sampling = METHODS[config.method].teacher_sampling(config)
    # Latents of the samples take the place of the teacher's, where the states on the way to them are not needed.
    wanted = shape if sampling is not None and not sampling.kept_sigmas else ()
    data = cached_prompt_data(config, base, cache_dir, device, processes, wanted)
    if processes.is_rank0:
        logger.info("trains on %s from=%s", data.report, config.prompts or "captions")
    networks = build_networks(begin, base, device, processes)
    if options.compiled:
        for network in networks.transformers():
            compile_blocks(network)
    latents = None
    if sampling is not None and data.latents is None:
        latents = cached_teacher_latents(config, sampling, base, networks, data, shape, cache_dir, device, processes)
    return Trainer(config, networks, data, shape, device, latents, processes)


def _resume(trainer: Trainer, folder: Path) -> float:
    """Load a checkpoint into the trainer; return the seconds trained before it."""
    checkpoint = trainer.processes.on_all_ranks(lambda: load_checkpoint(folder))
    trainer.load(checkpoint)
    return float(checkpoint.values.get("elapsed_s", 0.0))


def _loop(
    trainer: Trainer, base: Base, options: RunOptions, judge: Judge | None, elapsed_before_s: float, *, is_saved: bool
) -> tuple[int | None, float]:
    """Iterate until done; return the signal that ended it, if one did, and the seconds trained so far.

    Ranks have clocks, signals and saving threads of their own, so they agree after each iteration whether to stop.

    Args:
        trainer: where it stands.
        base: of the run.
        options: of the run.
        judge: of its validation.
        elapsed_before_s: trained before this call.
        is_saved: there is a checkpoint of where it stands.
    """
    config, processes, start = trainer.config, trainer.processes, time.monotonic()
    budget_s = math.inf if options.minutes is None else 60 * options.minutes
    patience = 0 if judge is None else config.validate.patience

    def elapsed_s() -> float:
        return elapsed_before_s + time.monotonic() - start

    def stopped() -> tuple[int, bool]:
        number, is_over, has_failed = processes.all_reduce_max(
            received[0] if received else 0, int(elapsed_s() >= budget_s), int(saver.has_failed)
        )
        if has_failed:
            saver.wait()
        is_over |= trainer.iteration >= config.max_iterations or trainer.choice.is_over(patience)
        return number, bool(number or is_over)

    with (
        stop_signal() as received,
        RunLog(options.out, config, trainer.iteration, budget_s, processes.is_rank0, options.trackers) as log,
        Saver(options.out, config.keep_last, processes) as saver,
    ):
        outputs = Outputs(trainer, base, options, judge, log, saver, lambda: bool(received))
        outputs.make_up_validation(elapsed_s)
        signal_number, is_last = stopped()
        while not is_last:
            log.add(trainer.iterate())
            signal_number, is_last = stopped()
            has_best = False
            if outputs.is_validation_due() and not signal_number:
                has_best = outputs.validate()
                signal_number, is_last = stopped()
            if is_last or trainer.iteration % config.log_every_iterations == 0:
                outputs.write_log(elapsed_s())
            is_saved = trainer.iteration % config.save_every_iterations == 0 or is_last or has_best
            if is_saved:
                outputs.save(elapsed_s())
            # No preview after a signal: whoever sent it wants the process to end.
            if outputs.is_preview_due(is_last) and not signal_number:
                outputs.preview()
        if not is_saved:  # the time was over before the first iteration
            outputs.save(elapsed_s())
        saver.wait()
        return (signal_number or None), elapsed_s()
