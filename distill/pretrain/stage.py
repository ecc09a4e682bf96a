"""The loop all pre-training stages share: schedule, clipping, checkpoints, resume, progress; knows no model.

A stage is a function of its settings: the random numbers of step n are drawn from (seed, stage, n), so a run that was
stopped and resumed equals one that was not. Only a time budget, which ends the annealing early, breaks that.
"""

import logging
import time
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

WARMUP_STEPS = 50
FINAL_LR_SHARE = 0.02
DECAY_SHARE = 0.3
CLIP_NORM = 1.0
MIN_MATRIX_SIDE = 16
SAVE_EVERY_S = 120.0
LOG_EVERY_STEPS = 50

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOptions:
    """Where a stage runs and for how long: nothing here but `budget_s` changes what is computed.

    Args:
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


def autocast(options: StageOptions) -> torch.autocast:
    """The precision of forward passes."""
    return torch.autocast(options.device.type, torch.bfloat16, enabled=options.precision == "bf16")


class MatrixOptimizer:
    """Muon for weights that are matrices, convolutions taken as (out, in * kernel), AdamW for everything else.

    Muon orthogonalises a matrix's momentum, so that all directions of it learn alike. On this VAE it needs a fourth of
    AdamW's steps: 22.6 dB after 140 image steps, where AdamW at its best rate had 22.2 after 400.

    Source: torch.optim.Muon, scaled to AdamW's update size after arXiv 2502.16982, so one learning rate serves both.
    """

    def __init__(self, module: nn.Module, learning_rate: float, use_muon: bool = True) -> None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # A row of an embedding is a word: orthogonal updates would move words that the batch does not hold.
        tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
        self.matrices = [
            p
            for p in parameters
            if use_muon and p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= MIN_MATRIX_SIDE and id(p) not in tables
        ]
        taken = {id(parameter) for parameter in self.matrices}
        self.others = [parameter for parameter in parameters if id(parameter) not in taken]
        # Views: a step on them is a step on the parameters. Muon refuses anything but two dimensions.
        self.flat = [nn.Parameter(parameter.data.flatten(1)) for parameter in self.matrices]
        self.optimizers: list[torch.optim.Optimizer] = []
        if self.others:
            self.optimizers.append(
                torch.optim.AdamW(self.others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
            )
        if self.flat:
            muon = torch.optim.Muon(
                self.flat, lr=learning_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            )
            self.optimizers.append(muon)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Take this rate from now on."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

    def clip_gradients(self) -> Tensor:
        """Clip AdamW's gradients; return the norm of all. Muon's step does not depend on the size of its gradients."""
        clipped = nn.utils.clip_grad_norm_(self.others, CLIP_NORM)
        gradients = [parameter.grad for parameter in self.matrices if parameter.grad is not None]
        rest = nn.utils.get_total_norm(gradients).to(clipped.device)
        norm: Tensor = torch.linalg.vector_norm(torch.stack([clipped, rest]))
        return norm

    def step(self) -> None:
        """Update the parameters and drop their gradients."""
        for view, parameter in zip(self.flat, self.matrices, strict=True):
            view.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for optimizer in self.optimizers:
            optimizer.step()
        for parameter in (*self.flat, *self.matrices, *self.others):
            parameter.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        """Everything `load_state_dict` needs."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Go on from a saved state."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


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
) -> dict[str, Tensor] | None:
    """Train `module` by MatrixOptimizer with linear warm-up, a constant rate and a linear decay.

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

    Returns:
        The final parameters by name (the moving average where there is one), or None when it was told to stop.

    Raises:
        CodmdError: the loss stopped being finite.
        CheckpointError: the saved state does not fit.
    """
    path = options.folder / f"{name}.pt"
    optimizer = MatrixOptimizer(module, learning_rate, use_muon)
    average = {key: value.detach().clone() for key, value in module.named_parameters()} if ema_decay else None
    step, elapsed_before_s, progress = _restore(path, module, optimizer, average)
    start = time.monotonic()
    last_save = start
    sums: dict[str, Tensor] = {}
    logged_step = step
    bar = tqdm(total=num_steps, initial=step, desc=name, disable=None, dynamic_ncols=True)

    def elapsed_s() -> float:
        return elapsed_before_s + time.monotonic() - start

    def save() -> None:
        state = {"step": step, "elapsed_s": elapsed_s(), "progress": progress, "module": module.state_dict()}
        _write(path, {**state, "optimizer": optimizer.state_dict(), "average": average})

    with bar:
        while step < num_steps and progress < 1.0:
            if options.stop():
                save()
                return None
            optimizer.set_learning_rate(learning_rate * _schedule(step, progress))
            loss, metrics = compute_loss(step, progress)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = optimizer.clip_gradients()
            if not bool((loss.detach() + norm).isfinite()):
                raise CodmdError(f"{name}: the loss was not finite at step {step}; lower its learning rate")
            optimizer.step()
            if average is not None and ema_decay is not None:
                _follow(average, module, ema_decay, step)
            step += 1
            progress = step / num_steps
            if options.budget_s is not None:
                progress = max(progress, elapsed_s() / options.budget_s)
            for key, value in {"loss": loss.detach(), **metrics}.items():
                sums[key] = sums.get(key, torch.zeros_like(value)) + value
            bar.update(1)
            if step % LOG_EVERY_STEPS == 0:
                text = " ".join(f"{key}={float(value) / (step - logged_step):.4g}" for key, value in sums.items())
                bar.set_postfix_str(text)
                logger.info("stage=%s step=%d elapsed_s=%.0f %s", name, step, elapsed_s(), text)
                sums, logged_step = {}, step
            if time.monotonic() - last_save > SAVE_EVERY_S:
                save()
                last_save = time.monotonic()
    save()
    return average if average is not None else {key: value.detach() for key, value in module.named_parameters()}


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


def _schedule(step: int, progress: float) -> float:
    # Constant, then straight down: unlike a cosine, what was trained so far stays valid when the length is changed.
    decay = min(1.0, (1.0 - min(progress, 1.0)) / DECAY_SHARE)
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(decay, FINAL_LR_SHARE)


def _follow(average: dict[str, Tensor], module: nn.Module, decay: float, step: int) -> None:
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


def _write(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Through an open file: given a path, torch would write the random temporary name into the archive.
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)
