"""What a run leaves on the way: checkpoints, curves, previews and validations; every rank calls it, rank 0 writes."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from distill.networks.base import Base
from distill.run.checkpoint import Score
from distill.run.curves import write_curves
from distill.run.log import RunLog
from distill.run.previews import Previews
from distill.run.saver import Saver
from distill.run.validation import Judge, Validator

if TYPE_CHECKING:
    from distill.run.trainer import RunOptions, Trainer


class Outputs:
    """The outputs of a run.

    Args:
        trainer: where it stands.
        base: of the run.
        options: of the run.
        judge: of its validation; None makes none.
        log: gets scores and pictures.
        saver: of the checkpoints.
        is_stopping: whether this rank has received a signal.

    Raises:
        CheckpointError: the base has no complete text encoder or VAE.
    """

    def __init__(
        self,
        trainer: "Trainer",
        base: Base,
        options: "RunOptions",
        judge: Judge | None,
        log: RunLog,
        saver: Saver,
        is_stopping: Callable[[], bool],
    ) -> None:
        self.trainer, self.out, self.log, self.saver = trainer, options.out, log, saver
        self.preview_every = options.preview_every_iterations if base.has_vae else 0
        self.keep_best, self.has_curves = options.keep_best, options.has_curves
        config, shape = trainer.config, trainer.shape[1:]
        self.validate_every = config.validate.every_iterations
        self.previews: Previews | None = None
        if self.preview_every:
            self.previews = Previews(config, base, options.out, trainer.data, shape, trainer.device, trainer.processes)
        self.validator: Validator | None = None
        if judge is not None:
            trainer.choice.follow(judge.metric.name, judge.metric.better)
            cache_dir = options.cache_dir or options.out / "cache"
            self.validator = Validator(
                config, base, judge, options.out, cache_dir, shape, trainer.processes, is_stopping, trainer.iteration
            )

    def write_log(self, elapsed_s: float) -> None:
        """Write the means since the last line to the log."""
        trainer, log = self.trainer, self.log
        trainer.processes.on_rank0(
            lambda: log.write(trainer.iteration, trainer.updates["student"], trainer.num_skipped, elapsed_s)
        )

    def save(self, elapsed_s: float) -> None:
        """Start to save a checkpoint, and write the curves where the run has them."""
        trainer = self.trainer
        values = {**trainer.state_values(), "elapsed_s": elapsed_s}
        self.saver.save(trainer.iteration, trainer.state_tensors(), values, self._score())
        if self.has_curves:
            trainer.processes.on_rank0(lambda: write_curves(self.out))

    def _score(self) -> Score | None:
        """Return what tells whether this checkpoint is the best; None where there is nothing to tell it by."""
        choice = self.trainer.choice
        if self.validator is not None:
            is_best = choice.best is not None and choice.best_iteration == self.trainer.iteration
            return Score(choice.metric, choice.best, choice.better) if is_best else None  # type: ignore[arg-type]
        if self.keep_best is not None and self.keep_best in self.log.latest:
            return Score(self.keep_best, self.log.latest[self.keep_best])
        return None

    def is_preview_due(self, is_last: bool) -> bool:
        """Whether there is a picture of this iteration."""
        return self.preview_every > 0 and (is_last or self.trainer.iteration % self.preview_every == 0)

    def preview(self) -> None:
        """Write a picture of the EMA student."""
        if self.previews is not None:
            trainer = self.trainer
            iteration = trainer.iteration
            self.log.show(self.previews.write(iteration, trainer.networks.student, trainer.ema.shadow), iteration)

    def is_validation_due(self) -> bool:
        """Whether this iteration is to be validated and has not been."""
        iteration = self.trainer.iteration
        return (
            self.validator is not None
            and iteration > 0
            and iteration % self.validate_every == 0
            and self.trainer.choice.iteration != iteration
        )

    def validate(self) -> bool:
        """Validate the EMA student; return whether it is the best so far, and so is to be saved."""
        assert self.validator is not None
        trainer, start = self.trainer, time.monotonic()
        outcome, is_best = self.validator.run(
            trainer.iteration, trainer.networks.student, trainer.ema.shadow, trainer.choice
        )
        suite = self.validator.judge.metric.suite
        scores = {f"{suite}.{name}": value for name, value in outcome.values.items()}
        self.log.validated(scores, trainer.iteration, time.monotonic() - start)
        return is_best

    def make_up_validation(self, elapsed_s: Callable[[], float]) -> None:
        """Validate the iteration that a run goes on from, when a signal came before that could be done."""
        if self.is_validation_due() and self.validate():
            self.save(elapsed_s())
