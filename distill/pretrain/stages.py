"""The stages of `codmd-distill teacher` in order: text, VAE, latents, transformer; what each leaves in RUN/pipeline."""

import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace

from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from distill.networks.base import open_base
from distill.pretrain.clips import CLIP_SHAPE, ClipSource
from distill.pretrain.clock import LAST_STAGE, Clock
from distill.pretrain.compiling import BlockCompiler, CompileJob, compile_ahead
from distill.pretrain.config import PretrainConfig
from distill.pretrain.curve import FactorCurve, step_levels
from distill.pretrain.latents import Latents, encode_clips
from distill.pretrain.pipeline import save_scheduler, save_text, save_transformer, save_vae
from distill.pretrain.pool import ClipPool
from distill.pretrain.prompts import MIN_POSITIONS, PromptTable, build_prompt_table
from distill.pretrain.stage import Snapshots, StageOptions
from distill.pretrain.teacher import averaged_transformer, prepare_transformer, train_transformer
from distill.pretrain.text import train_text_encoder
from distill.pretrain.vae import train_vae
from distill.pretrain.whiten import fold_into_vae

CURVE_FILE = "curve.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PretrainRun:
    """One run: its settings, its clock, and options that all stages share.

    Attributes:
        config: what is computed.
        options: where; each stage gets its own time budget.
        clock: of that budget.
        until: stop after this stage; None runs them all.
    """

    config: PretrainConfig
    options: StageOptions
    clock: Clock
    until: str | None

    def stage_options(self, stage: str) -> StageOptions:
        """The options with what the clock leaves for a stage."""
        return replace(self.options, budget_s=self.clock.budget_s(stage))


def run_stages(run: PretrainRun) -> str:
    """Run every stage that is not done; return the name of the last one entered.

    Raises:
        ConfigError, CheckpointError, CodmdError: as the stages.
    """
    config, pipeline = run.config, run.options.folder / "pipeline"
    source = ClipSource(config.seed, config.transformer.two_object_share)
    with ExitStack() as stack:
        # First of all: workers render and a child compiles from here on, whatever the device does.
        pool, compiler = _start_helpers(run, source, stack)
        options = run.stage_options("text")
        with run.clock.stage("text"):
            text = train_text_encoder(config.text, config.seed, options, config.start)
        if text is None:
            return "text"
        save_text(pipeline, *text)
        if run.until == "text":
            return "text"
        options = run.stage_options("vae")
        with run.clock.stage("vae"):
            vae = train_vae(config.vae, source, options, config.start, pool)
        if vae is None:
            return "vae"
        _save_unwhitened(run, vae)
        if run.until == "vae":
            return "vae"
        options = run.stage_options("latents")
        kept = None if config.vae.phases or not config.start else _kept_statistics(config.start)
        with run.clock.stage("latents"):
            encoded = encode_clips(
                vae, config.transformer, source, options, whiten=config.vae.whiten, pool=pool, kept=kept
            )
        if encoded is None:
            return "latents"
        if encoded.whitening is not None:
            fold_into_vae(vae, encoded.whitening)
        save_vae(pipeline, vae, encoded.mean, encoded.std)
        save_scheduler(pipeline, config.transformer.sigma_shift)
        if run.until == "latents":
            return "latents"
        if pool is not None:
            pool.close()  # its clips are what fills the device's memory
        _train_teacher(run, encoded, vae, text, compiler)
    return LAST_STAGE


def num_render_processes(config: PretrainConfig) -> int:
    """Resolve -1: one less than there are cores, which are left to the training process."""
    if config.render_processes >= 0:
        return config.render_processes
    return max(len(os.sched_getaffinity(0)) - 1, 1)


def _start_helpers(
    run: PretrainRun, source: ClipSource, stack: ExitStack
) -> tuple[ClipPool | None, BlockCompiler | None]:
    """Start the rendering processes and, on a GPU, the process that compiles ahead, as far as they are needed."""
    config, options, settings = run.config, run.options, run.config.transformer
    pool = None
    if config.render_processes and run.until != "text":
        workers = num_render_processes(config)
        pool = stack.enter_context(ClipPool(source, settings.num_clips, workers, options.device, config.pool_clips))
    if not options.compiled or run.until is not None:
        return pool, None
    if options.device.type == "cpu":
        return pool, BlockCompiler()
    job = CompileJob(
        config=settings,
        latent_shape=(settings.batch_size, config.vae.z_dim, *_latent_size(config)),
        prompt_shape=(settings.batch_size, MIN_POSITIONS, config.text.d_model),
        precision=options.precision,
        device=str(options.device),
    )
    return pool, stack.enter_context(compile_ahead(job))


def _latent_size(config: PretrainConfig) -> tuple[int, int, int]:
    """(F, H, W) of the latents of a clip."""
    levels = len(config.vae.dim_mult) - 1
    time, space = 2**levels, config.vae.patch_size * 2**levels
    return (CLIP_SHAPE[0] - 1) // time + 1, CLIP_SHAPE[1] // space, CLIP_SHAPE[2] // space


def _save_unwhitened(run: PretrainRun, vae: AutoencoderKLWan) -> None:
    """Write the VAE as soon as it is trained; a run that is cut before its latents are whitened has this one.

    A kept encoder has the start's statistics of its latents.
    """
    channels = vae.config.z_dim
    mean, std = [0.0] * channels, [1.0] * channels
    if run.config.vae.decoder_only:
        mean, std = _kept_statistics(run.config.start)
    save_vae(run.options.folder / "pipeline", vae, mean, std)


def _kept_statistics(start: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the channels by which the pipeline `start` normalises its latents."""
    config = open_base(start).load(AutoencoderKLWan, "vae").config
    return list(config.latents_mean), list(config.latents_std)


def _train_teacher(
    run: PretrainRun,
    encoded: Latents,
    vae: AutoencoderKLWan,
    text: tuple[PreTrainedTokenizerFast, UMT5EncoderModel],
    compiler: BlockCompiler | None,
) -> None:
    config, settings, pipeline = run.config, run.config.transformer, run.options.folder / "pipeline"
    device = run.options.device
    prompts = build_prompt_table(*text, encoded.captions, device)
    with ExitStack() as stack:
        curve = None
        if settings.curve_seeds:
            curve = stack.enter_context(
                FactorCurve(
                    run.options.folder / CURVE_FILE, settings.curve_seeds, num_render_processes(config), config.seed
                )
            )
        measure = (
            None if curve is None else _Measurement(curve, run, vae, build_prompt_table(*text, curve.captions, device))
        )

        def take(step: int, progress: float, average: dict[str, Tensor]) -> None:
            transformer = averaged_transformer(settings, average, config.vae.z_dim, prompts.width)
            save_transformer(pipeline, transformer)
            if measure is not None:
                measure(step, progress, average)
            logger.info("stage=transformer snapshot step=%d progress=%.2f", step, progress)

        snapshots = Snapshots(every_s=settings.snapshot_s, take=take) if settings.snapshot_s else None
        # Asked as late as can be: the last stage gets what is left.
        options = run.stage_options(LAST_STAGE)
        with run.clock.stage(LAST_STAGE):
            trained = train_transformer(
                settings, encoded, prompts, config.seed, options, config.start, compiler, snapshots
            )
        if trained is None:
            return
        save_transformer(pipeline, trained)
        if measure is not None:
            measure(None, 1.0, dict(trained.named_parameters()))


@dataclass(frozen=True, slots=True)
class _Measurement:
    """Hands snapshots of the moving average to a FactorCurve."""

    curve: FactorCurve
    run: PretrainRun
    vae: AutoencoderKLWan
    prompts: PromptTable

    def __call__(self, step: int | None, progress: float, average: dict[str, Tensor]) -> None:
        """Draw and submit the clips of one snapshot; None is the end, whose step is in the log."""
        run, settings, device = self.run, self.run.config.transformer, self.run.options.device
        precision = run.options.precision
        teacher = averaged_transformer(settings, average, run.config.vae.z_dim, self.prompts.width)
        prepare_transformer(teacher, precision, device)
        levels = step_levels(settings.curve_steps, settings.sigma_shift)
        head: dict[str, float | None] = {
            "step": step,
            "progress": progress,
            "clips_seen": step and step * settings.batch_size,
        }
        self.curve.measure(head, teacher, self.vae, self.prompts, precision, levels, run.options.stop)
