"""Validation: samples of the EMA student for held-out prompts, scored by a suite; it never changes or ends training.

All ranks sample, each its share; rank 0 scores. Noise has a stream of its own and is the same each time, so the scores
of two iterations differ by the weights alone.

RUN/validation.jsonl               one line per validation: its values, or why it failed
RUN/validation/videos/             videos, prompts.json and output of the last validation by a command

Legend: K samples of this rank, C channels, F latent frames, H and W rows and columns, T pixel frames.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from codmd_serve.config import DEFAULT_CRF
from codmd_serve.errors import ConfigError
from codmd_serve.files import first_line, write_json
from codmd_serve.sampler import rollout
from codmd_serve.video import write_video
from codmd_serve.wan.vae import StreamingDecoder
from distill.config import DistillConfig
from distill.data.prompts import embed_texts
from distill.networks.base import Base
from distill.networks.build import denoiser
from distill.parallel.processes import Processes
from distill.run.choice import Choice
from distill.run.log import ITERATION_KEY, VALIDATION_FILE, keep_lines_up_to
from distill.run.previews import averaged_weights
from distill.streams import named_rng
from distill.validate.command import PROMPTS_FILE
from distill.validate.registry import Metric, is_metric, open_suite, parse_metric
from distill.validate.suites import CLIPS, LATENTS, VIDEOS, Samples, Suite

VIDEOS_DIR = Path("validation") / "videos"
STREAM = "validation"
MAX_BATCH = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """The suite of a run and the metric that chooses its best checkpoint."""

    suite: Suite
    metric: Metric


def open_judge(config: DistillConfig, base: Base, keep_best: str | None = None) -> Judge | None:
    """Build the suite that a run is validated by; None where it has no validation.

    Args:
        config: of the run.
        base: its teacher's pipeline.
        keep_best: --keep-best; a metric of validation takes the place of validate.metric.

    Raises:
        ConfigError: as `parse_metric` and `open_suite`; or --keep-best names a metric that could not choose.
    """
    settings = config.validate
    if not settings.every_iterations:
        if is_metric(keep_best):
            raise ConfigError(f"--keep-best {keep_best} needs validation: --set validate.every_iterations=N")
        return None
    if keep_best in (None, settings.metric):
        metric = parse_metric(settings.metric, settings.better)
    elif is_metric(keep_best):
        metric = parse_metric(str(keep_best))
    else:
        raise ConfigError(
            f"--keep-best {keep_best}: in a run with validation its metric chooses, {settings.metric}; name another "
            "metric of validation, or leave --keep-best out"
        )
    suite, metric = open_suite(config, base, metric)
    return Judge(suite=suite, metric=metric)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One validation; equal on all ranks.

    Attributes:
        values: by name without the suite's.
        failure: in one line why there is no value to choose by; empty where there is one.
        is_interrupted: the run is ending; this validation is made when it goes on.
    """

    values: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    is_interrupted: bool = False


class Validator:
    """Samples and scores the student of a run; every rank has one and calls it at the same iterations.

    Args:
        config: of the run.
        base: whose text encoder, tokenizer and VAE are used.
        judge: suite and metric.
        out: folder of the run, seen by all ranks.
        cache_dir: of prompt embeddings.
        shape: (C, F, H, W) of the latents.
        processes: of the run.
        is_stopping: whether this rank has received a signal that ends the run.
        iteration: iterations done; later lines of the record are dropped.

    Raises:
        CheckpointError: the base has no complete text encoder or VAE.
    """

    def __init__(
        self,
        config: DistillConfig,
        base: Base,
        judge: Judge,
        out: Path,
        cache_dir: Path,
        shape: tuple[int, ...],
        processes: Processes,
        is_stopping: Callable[[], bool],
        iteration: int = 0,
    ) -> None:
        self.config, self.judge, self.out, self.shape = config, judge, out, shape
        self.processes, self.is_stopping, self.device = processes, is_stopping, processes.device
        self.requests = judge.suite.requests
        texts = list(dict.fromkeys(request.prompt for request in self.requests))
        self.places = {text: place for place, text in enumerate(texts)}
        self.data = embed_texts(texts, config, base, cache_dir, self.device, processes)
        self.vae: Any = None
        if judge.suite.needs != LATENTS and self._keeps_samples:
            self.vae = base.load(AutoencoderKLWan, "vae", torch_dtype=torch.float32)
            self.vae.requires_grad_(False).eval()
        if processes.is_rank0:
            keep_lines_up_to(out / VALIDATION_FILE, iteration)

    @property
    def _keeps_samples(self) -> bool:
        """Whether this rank is the first of those that compute the same samples."""
        return self.processes.rank % self.processes.context_parallel == 0

    def run(
        self, iteration: int, student: nn.Module, average: Mapping[str, Tensor], choice: Choice
    ) -> tuple[Outcome, bool]:
        """Sample, score, choose and record.

        Args:
            iteration: iterations done.
            student: the network in training; it keeps its own weights.
            average: its moving average by parameter name.
            choice: of the run, by the judge's metric; it gets the value, unless the validation was interrupted.

        Returns:
            What came of it, and whether it is the best so far.
        """
        start = time.monotonic()
        self._release()
        outcome = self._outcome(student, average)
        self._release()
        if outcome.is_interrupted:
            logger.info("validation left out iteration=%d reason=the run is ending", iteration)
            return outcome, False
        is_best = choice.add(iteration, None if outcome.failure else outcome.values[self.judge.metric.value])
        if self.processes.is_rank0:
            self._record(iteration, outcome, choice, time.monotonic() - start)
        return outcome, is_best

    @torch.no_grad()
    def _outcome(self, student: nn.Module, average: Mapping[str, Tensor]) -> Outcome:
        suite, own = self.judge.suite, dict[int, Any]()
        if suite.needs == VIDEOS:
            failure = self._agree(lambda: self.processes.on_rank0(self._empty_videos))
            if failure:
                return Outcome(failure=failure)
        for batch in self._batches():
            failure = self._agree(lambda: own.update(self._sampled(student, average, batch)))  # noqa: B023
            (stopping,) = self.processes.all_reduce_max(int(self.is_stopping()))
            if failure or stopping:
                return Outcome(failure=failure, is_interrupted=not failure)
        failure = self._agree(lambda: own.update(self._finished(own)))
        if failure:
            return Outcome(failure=failure)
        gathered = [own] if suite.needs == VIDEOS else self._gather(own)
        return self.processes.broadcast_from_rank0(lambda: self._scored(gathered))

    def _batches(self) -> Iterator[tuple[range, bool]]:
        """Yield indices of requests, and whether they count; every rank gets as many batches.

        Where weights are sharded, ranks call the network together: one that has nothing left repeats a batch. For the
        same reason a rank that alone runs out of memory inside the network would leave the others waiting. It does not
        come to that: a batch is no larger than that of a training step, which keeps gradients and activations as well.
        """
        processes, config = self.processes, self.config
        share = config.batch_size // (processes.data_parallel * config.accumulate)
        size = max(1, min(share, MAX_BATCH))
        batches = [range(first, min(first + size, len(self.requests))) for first in range(0, len(self.requests), size)]
        group = processes.rank // processes.context_parallel
        for first in range(0, len(batches), processes.data_parallel):
            place = first + group
            yield batches[min(place, len(batches) - 1)], place < len(batches)

    def _sampled(
        self, student: nn.Module, average: Mapping[str, Tensor], batch: tuple[range, bool]
    ) -> dict[int, Tensor]:
        """Return latents (C, F, H, W), float32 on the CPU, by index of their request."""
        indices, is_counted = batch
        grid = self.config.grid()
        size = (len(grid.timesteps), *self.shape)
        noise = [torch.randn(size, generator=named_rng(self.config.seed, STREAM, index)) for index in indices]
        prompts = [self.places[self.requests[index].prompt] for index in indices]
        # Eager: another batch size would recompile the blocks, for training as well.
        with averaged_weights(student, average), torch.compiler.set_stance("force_eager"):
            x0_BCFHW = rollout(
                denoiser(student, self.config.precision),
                torch.stack(noise, dim=1).to(self.device),
                self.data.batch(prompts, self.device).prompt_embeds,
                grid.sigmas,
                grid.timesteps,
                sampler=self.config.sampler,
            )
        if not (is_counted and self._keeps_samples):
            return {}
        return dict(zip(indices, x0_BCFHW.float().cpu(), strict=True))

    def _finished(self, own: Mapping[int, Tensor]) -> dict[int, Any]:
        """Turn latents into what the suite needs: clips (T, H, W, 3), or videos on disk, of which nothing is kept."""
        needs, native = self.judge.suite.needs, self.config.native
        if needs == LATENTS or not own:
            return {}
        finished: dict[int, Any] = {}
        self.vae.to(self.device)
        try:
            decoder = StreamingDecoder(self.vae)
            for index, latents_CFHW in own.items():
                # One by one: decoding a batch of large videos takes more memory than a training step.
                parts = [part.cpu() for part in decoder.frames(latents_CFHW[None].to(self.device))]
                clip: np.ndarray = torch.cat(parts, dim=1)[0].numpy()
                finished[index] = clip
                if needs == VIDEOS:
                    finished[index] = None
                    path = self.out / VIDEOS_DIR / video_name(index)
                    height, width = clip.shape[1:3]
                    write_video([clip.tobytes()], path, height=height, width=width, fps=native.fps, crf=DEFAULT_CRF)
        finally:
            self.vae.to("cpu")
        return finished

    def _empty_videos(self) -> None:
        folder = self.out / VIDEOS_DIR
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        entries = [
            {"file": video_name(index), "prompt": request.prompt, "seed": request.seed}
            for index, request in enumerate(self.requests)
        ]
        write_json(folder / PROMPTS_FILE, entries)

    def _scored(self, gathered: list[dict[int, Any]]) -> Outcome:
        """Score on rank 0; a suite that fails in any way is a failure of this validation alone."""
        suite, metric = self.judge.suite, self.judge.metric
        merged = {index: sample for part in gathered for index, sample in part.items()}
        ordered = [merged[index] for index in sorted(merged)]
        try:
            samples = Samples(
                latents=torch.stack(ordered) if suite.needs == LATENTS else None,
                clips=np.stack(ordered) if suite.needs == CLIPS else None,
                videos=self.out / VIDEOS_DIR if suite.needs == VIDEOS else None,
                is_stopping=self.is_stopping,
            )
            values = {name: float(value) for name, value in suite.score(samples).items() if math.isfinite(value)}
        except Exception as error:  # a suite may raise anything
            return Outcome(failure=first_line(error), is_interrupted=self.is_stopping())
        failure = ""
        if metric.value not in values:
            failure = f"no finite {metric.name} among {', '.join(values) or 'no values'}"
        return Outcome(values=values, failure=failure)

    def _agree(self, action: Callable[[], object]) -> str:
        """Run `action` on every rank; return why it failed on the first rank that it failed on, or nothing."""
        failure = ""
        try:
            action()
        except Exception as error:  # out of memory, VAE, codecs and the file system each raise their own kinds
            failure = first_line(error)
        told = [failure]
        if self.processes.mesh is not None:
            everyone: list[Any] = [None] * self.processes.world_size
            dist.all_gather_object(everyone, failure, group=self.processes.files_group)
            told = [f"rank {rank}: {text}" if text else "" for rank, text in enumerate(everyone)]
        return next(filter(None, told), "")

    def _gather(self, own: dict[int, Any]) -> list[dict[int, Any]]:
        """Return the samples of all ranks, on rank 0."""
        if self.processes.mesh is None:
            return [own]
        parts: list[Any] | None = [None] * self.processes.world_size if self.processes.is_rank0 else None
        dist.gather_object(own, parts, dst=0, group=self.processes.files_group)
        return parts or []

    def _release(self) -> None:
        """Give back what the allocator keeps: a command on the same GPU needs it, and so does the next iteration."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _record(self, iteration: int, outcome: Outcome, choice: Choice, seconds: float) -> None:
        suite, metric = self.judge.metric.suite, self.judge.metric
        record: dict[str, Any] = {ITERATION_KEY: iteration, "seconds": round(seconds, 3)}
        record |= {f"{suite}.{name}": value for name, value in outcome.values.items()}
        if outcome.failure:
            record["failed"] = outcome.failure
            logger.warning("validation failed iteration=%d reason=%s", iteration, outcome.failure)
        else:
            record |= {"best_iteration": choice.best_iteration, "num_worse": choice.num_worse}
            logger.info(
                "validation iteration=%d %s=%.4g best=%.4g best_iteration=%d seconds=%.1f",
                iteration,
                metric.name,
                outcome.values[metric.value],
                choice.best,
                choice.best_iteration,
                seconds,
            )
        try:
            with (self.out / VALIDATION_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            logger.warning("no record of validation iteration=%d reason=%s", iteration, first_line(error))


def video_name(index: int) -> str:
    """Return the file name of a sample's video; numbers alone, a prompt never becomes a path."""
    return f"{index:05d}.mp4"
