"""The loop all pre-training stages share: schedule, clipping, checkpoints, resume, progress; knows no model.

A stage is a function of its settings: the random numbers of step n are drawn from (seed, stage, n), so a run that was
stopped and resumed equals one that was not. Only a time budget, which ends the annealing early, breaks that.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from codmd_serve.errors import CheckpointError, CodmdError
from codmd_serve.files import atomic_file, first_line
from distill.networks.base import open_base
from distill.pretrain.optimizer import MatrixOptimizer

FINAL_LR_SHARE = 0.02
SAVE_EVERY_S = 120.0
LOG_EVERY_STEPS = 50
MAX_STEPS_IN_FLIGHT = 2
_NEVER = 2**62

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOptions:
    """Where a stage runs and for how long: nothing here but `budget_s` changes what is computed.

    Attributes:
        folder: of checkpoints and logs.
        device: cpu or cuda.
        precision: fp32 or bf16 (autocast).
        compiled: torch.compile the transformer's blocks.
        budget_s: seconds over all resumptions; None runs all steps.
        stop: asked between two steps.
    """

    folder: Path
    device: torch.device
    precision: str
    budget_s: float | None
    stop: Callable[[], bool]
    compiled: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LrSchedule:
    """Linear warm-up, a constant rate, a linear decay to FINAL_LR_SHARE over the last `decay_share` of the stage.

    Unlike a cosine, what was trained so far stays valid when the length is changed.
    """

    warmup_steps: int = 50
    decay_share: float = 0.3

    def factor(self, step: int, progress: float) -> float:
        """Share of the peak rate at `step`, `progress` in [0, 1] through the stage."""
        decay = min(1.0, (1.0 - min(progress, 1.0)) / self.decay_share)
        return min(1.0, (step + 1) / self.warmup_steps) * max(decay, FINAL_LR_SHARE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshots:
    """What is done with the weights so far while a stage trains on.

    Attributes:
        every_s: seconds between two calls.
        take: (step, progress, parameters by name: the moving average where there is one) -> None.
    """

    every_s: float
    take: Callable[[int, float, dict[str, Tensor]], None]


def autocast(options: StageOptions) -> torch.autocast:
    """The precision of forward passes."""
    return torch.autocast(options.device.type, torch.bfloat16, enabled=options.precision == "bf16")


def step_generator(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator on `device`, a function of `key` alone: (seed, stage, step)."""
    mixed = 0x9E3779B97F4A7C15
    for number in key:
        mixed = ((mixed ^ (number & (2**64 - 1))) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return torch.Generator(device).manual_seed(mixed % 2**63)


def run_stage(
    name: str,
    module: nn.Module,
    num_steps: int,
    learning_rate: float,
    compute_loss: Callable[[int, float], tuple[Tensor, dict[str, Tensor]]],
    options: StageOptions,
    *,
    use_muon: bool = True,
    ema_decay: float | None = None,
    schedule: LrSchedule | None = None,
    snapshots: Snapshots | None = None,
) -> dict[str, Tensor] | None:
    """Train `module` by MatrixOptimizer under an LrSchedule.

    Args:
        name: of the stage, in logs and file names.
        module: its parameters are trained in place, in float32.
        num_steps: updates.
        learning_rate: peak.
        compute_loss: (step, progress in [0, 1)) -> (loss, metrics); draws its randomness from the step. Progress is
            the share of the steps done, or of the time budget where that is further.
        options: device, budget, folder.
        use_muon: for matrices; otherwise AdamW trains everything.
        ema_decay: also keep a moving average of the parameters, in float32.
        schedule: of the learning rate; None is the default one.
        snapshots: what to do with the weights so far, and how often.

    Returns:
        The final parameters by name (the moving average where there is one), or None when it was told to stop.

    Raises:
        CodmdError: the loss stopped being finite. A GPU is asked every LOG_EVERY_STEPS steps: asking waits for it.
        CheckpointError: the saved state does not fit.
    """
    loop = _Loop(name, module, MatrixOptimizer(module, learning_rate, use_muon), num_steps, ema_decay, options)
    schedule = schedule or LrSchedule()
    last_snapshot = time.monotonic()
    with loop.bar:
        while loop.step < num_steps and loop.progress < 1.0:
            if options.stop():
                loop.save()
                return None
            loop.optimizer.set_learning_rate(learning_rate * schedule.factor(loop.step, loop.progress))
            loop.update(*compute_loss(loop.step, loop.progress))
            if snapshots is not None and time.monotonic() - last_snapshot > snapshots.every_s:
                loop.check()
                snapshots.take(loop.step, loop.progress, loop.parameters())
                last_snapshot = time.monotonic()
    loop.save()
    return loop.parameters()


class _Loop:
    """State of a stage: its step, its clock, its sums for the log."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        optimizer: MatrixOptimizer,
        num_steps: int,
        ema_decay: float | None,
        options: StageOptions,
    ) -> None:
        self.name, self.module, self.optimizer, self.num_steps = name, module, optimizer, num_steps
        self.options, self.ema_decay, self.path = options, ema_decay, options.folder / f"{name}.pt"
        self.average = None
        if ema_decay is not None:
            self.average = {key: value.detach().clone() for key, value in module.named_parameters()}
        self.step, self.elapsed_before_s, self.progress = _restore(self.path, module, optimizer, self.average)
        self.start = self.last_save = time.monotonic()
        self.first_bad = torch.full((), _NEVER, dtype=torch.int64, device=options.device)
        self.sums: dict[str, Tensor] = {}
        self.logged_step = self.step
        self.in_flight: deque[torch.cuda.Event] = deque()
        self.bar = tqdm(total=num_steps, initial=self.step, desc=name, disable=None, dynamic_ncols=True)

    def elapsed_s(self) -> float:
        return self.elapsed_before_s + time.monotonic() - self.start

    def parameters(self) -> dict[str, Tensor]:
        if self.average is not None:
            return self.average
        return {key: value.detach() for key, value in self.module.named_parameters()}

    def update(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Do one update from a loss; log, check and save when it is time."""
        loss.backward()  # type: ignore[no-untyped-call]
        norm = self.optimizer.clip_gradients()
        is_finite = (loss.detach() + norm).isfinite()
        self.first_bad = torch.where(is_finite, self.first_bad, self.first_bad.clamp(max=self.step))
        if self.options.device.type == "cpu":
            self.check()
        self.optimizer.step()
        if self.average is not None and self.ema_decay is not None:
            _update_average(self.average, self.module, self.ema_decay, self.step)
        self.step += 1
        self._wait()
        self.progress = self.step / self.num_steps
        if self.options.budget_s is not None:
            self.progress = max(self.progress, self.elapsed_s() / self.options.budget_s)
        for key, value in {"loss": loss.detach(), **metrics}.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.bar.update(1)
        if self.step % LOG_EVERY_STEPS == 0:
            self._log()
        if time.monotonic() - self.last_save > SAVE_EVERY_S:
            self.save()

    def check(self) -> None:
        """Raise when a loss or gradient has not been finite."""
        first_bad = int(self.first_bad)
        if first_bad != _NEVER:
            raise CodmdError(f"{self.name}: the loss was not finite at step {first_bad}; lower its learning rate")

    def save(self) -> None:
        self.check()
        state: dict[str, Any] = {"step": self.step, "elapsed_s": self.elapsed_s(), "progress": self.progress}
        state |= {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average}
        _write_state(self.path, state)
        self.last_save = time.monotonic()

    def _wait(self) -> None:
        """Let the device be few steps behind, so that the clock and a signal are those of the work done."""
        if self.options.device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self.in_flight.append(event)
        if len(self.in_flight) > MAX_STEPS_IN_FLIGHT:
            self.in_flight.popleft().synchronize()

    def _log(self) -> None:
        self.check()
        num = self.step - self.logged_step
        text = " ".join(f"{key}={float(value) / num:.4g}" for key, value in self.sums.items())
        self.bar.set_postfix_str(text)
        logger.info("stage=%s step=%d elapsed_s=%.0f %s", self.name, self.step, self.elapsed_s(), text)
        self.sums, self.logged_step = {}, self.step


def load_weights(module: nn.Module, pipeline: str, subfolder: str) -> None:
    """Copy the weights of one part of a pipeline folder into `module`.

    Raises:
        CheckpointError: it is missing, damaged or of another layout.
    """
    source = open_base(pipeline).load(type(module), subfolder)
    try:
        module.load_state_dict(source.float().state_dict())
    except RuntimeError as error:
        raise CheckpointError(f"{subfolder} of {pipeline} has another layout than this run's: {error}") from error


def _update_average(average: dict[str, Tensor], module: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the parameters; its memory is short at first, so that the start does not linger."""
    weight = 1.0 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.values()), [parameter.detach() for parameter in module.parameters()], weight)


def _restore(
    path: Path, module: nn.Module, optimizer: MatrixOptimizer, average: dict[str, Tensor] | None
) -> tuple[int, float, float]:
    if not path.is_file():
        return 0, 0.0, 0.0
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        for key, value in (average or {}).items():
            value.copy_(state["average"][key])
        return int(state["step"]), float(state["elapsed_s"]), float(state["progress"])
    except Exception as error:  # torch, pickle and zip each raise their own kinds
        raise CheckpointError(
            f"{path} cannot be resumed from, delete it to start this stage anew: {first_line(error)}"
        ) from error


def _write_state(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        torch.save(state, temporary)
