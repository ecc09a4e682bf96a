"""The VAE of the ShapeWorld pipeline: training on renders; knows nothing of captions' meaning.

Legend: B pieces, T frames, H, W pixels, P clips.
"""

import math

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from torch import Tensor, nn
from torch.nn import functional

from codmd_serve.errors import ConfigError
from distill.pretrain.clips import ClipSource
from distill.pretrain.config import VaeConfig, VaePhase
from distill.pretrain.pool import ClipPool, ClipTensors, cut_windows, render_clips
from distill.pretrain.stage import LrSchedule, StageOptions, autocast, load_weights, run_stage, step_generator
from distill.pretrain.whole_clip import decode_clip, encode_clip

PIECES_PER_CLIP = 2
INITIAL_LOGVAR = -10.0
EDGE_WEIGHT = 0.5
OBJECT_MARGIN = 2  # pixels about an object that count as its own
SCHEDULE = LrSchedule(warmup_steps=20, decay_share=0.5)
_VAE_STAGE = 1


def build_vae(config: VaeConfig) -> AutoencoderKLWan:
    """A fresh AutoencoderKLWan: pixels in patches of 2, then two halvings of space and of time."""
    levels = len(config.dim_mult) - 1
    return AutoencoderKLWan(
        base_dim=config.base_dim,
        decoder_base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=[True] * levels,
        is_residual=True,
        in_channels=3 * config.patch_size**2,
        out_channels=3 * config.patch_size**2,
        patch_size=config.patch_size,
        latents_mean=[0.0] * config.z_dim,
        latents_std=[1.0] * config.z_dim,
        scale_factor_temporal=2**levels,
        scale_factor_spatial=config.patch_size * 2**levels,
    )


def _initialise(vae: AutoencoderKLWan) -> None:
    """Let the image through from the first step on: Kaiming weights, silent residual branches, a sure posterior.

    With the classes' defaults an image moves the latents by .025 while the posterior adds noise of 1, so that the
    decoder spends its first hundreds of steps learning to ignore its input: PSNR stays at that of a constant.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
    nn.init.constant_(vae.quant_conv.bias[vae.config.z_dim :], INITIAL_LOGVAR)


def train_vae(
    config: VaeConfig,
    source: ClipSource,
    options: StageOptions,
    start: str = "",
    pool: ClipPool | None = None,
) -> AutoencoderKLWan | None:
    """Train, or go on training, the VAE.

    Args:
        config: layout, phases, loss.
        source: of the clips.
        options: device, precision, budget.
        start: pipeline whose weights to go on from; empty trains from nothing.
        pool: that renders the clips; None renders them between the steps.

    Returns:
        The VAE, frozen, on the device; None when told to stop.

    Raises:
        CheckpointError: `start` has no VAE of this layout.
        ConfigError: `decoder_only` without `start`.
        CodmdError: training diverged, or rendering failed.
    """
    torch.manual_seed(source.seed)
    vae = build_vae(config)
    _initialise(vae)
    if start:
        load_weights(vae, start, "vae")
    vae.to(options.device)
    if not config.phases:
        return vae.eval().requires_grad_(False)
    if config.decoder_only:
        if not start:
            raise ConfigError("decoder_only keeps a trained encoder: name its pipeline with --start")
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    ends = np.cumsum([phase.num_steps for phase in config.phases])
    clips = _Clips(config, source, options, pool)

    def compute_loss(step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        # By progress and not by step: a run that a time budget shortens must still end on full-length clips.
        phase = config.phases[int(np.searchsorted(ends, round(progress * ends[-1]), side="right"))]
        generator = step_generator(options.device, source.seed, _VAE_STAGE, step)
        pixels, is_object = clips.draw(step, phase, generator)
        with autocast(options):
            mean = encode_clip(vae, pixels)[0].float()
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            spread = mean.detach().std((0, 2, 3, 4), keepdim=True)
            output = decode_clip(vae, mean + config.latent_noise * spread * noise).float()
        loss = reconstruction_loss(output - pixels, is_object, config.object_weight)
        squared, latents = (output.detach() - pixels).square(), mean.square().mean()
        metrics = {"psnr_db": _psnr(squared.mean()), "object_db": _psnr(_mean_over(squared, is_object))}
        return loss + config.kl_weight * latents, metrics

    trained = run_stage("vae", vae, int(ends[-1]), config.learning_rate, compute_loss, options, schedule=SCHEDULE)
    return None if trained is None else vae.eval().requires_grad_(False)


class _Clips:
    """Pieces for step n: of clips rendered for it, or of those that a pool has ready by then."""

    def __init__(self, config: VaeConfig, source: ClipSource, options: StageOptions, pool: ClipPool | None) -> None:
        self.config, self.source, self.options, self.pool = config, source, options, pool

    def draw(self, step: int, phase: VaePhase, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, T, h, w) and where objects are (B, 1, T, h, w)."""
        device = self.options.device
        clips: ClipTensors
        if self.pool is None:
            per_step = max(-(-phase.batch_size // PIECES_PER_CLIP), 1)
            clips, _ = render_clips(self.source, range(step * per_step, (step + 1) * per_step), device)
            indices = torch.arange(phase.batch_size, device=device) % per_step
        else:
            # A number that the step decides, not the speed of rendering: the run stays a function of its settings.
            wanted = min(self.config.clips_per_step * (step + 1), self.pool.window)
            ready = self.pool.wait(wanted, self.options.stop)
            clips = self.pool.clips
            num_clips = max(min(wanted, ready), 1)
            indices = torch.randint(num_clips, (phase.batch_size,), generator=generator, device=device)
        return cut_windows(clips, indices, phase.num_frames, phase.window, generator)


def reconstruction_loss(error: Tensor, is_object: Tensor, object_weight: float) -> Tensor:
    """Weighted L1 and L2 of an error and L1 of its edges, float32.

    Args:
        error: (B, 3, T, H, W).
        is_object: bool (B, 1, T, H, W); these pixels and their margin weigh 1 + object_weight, others 1, all scaled to
            a mean of 1.
        object_weight: 0 weighs all pixels alike.
    """
    size = 2 * OBJECT_MARGIN + 1
    near = functional.max_pool3d(is_object.float(), (1, size, size), 1, (0, OBJECT_MARGIN, OBJECT_MARGIN))
    weight = 1.0 + object_weight * near
    weight = weight / weight.mean()
    magnitude = error.abs()
    rows = (error[..., 1:, :] - error[..., :-1, :]).abs()
    columns = (error[..., :, 1:] - error[..., :, :-1]).abs()
    edges = (weight[..., 1:, :] * rows).mean() + (weight[..., :, 1:] * columns).mean()
    return (weight * magnitude).mean() + EDGE_WEIGHT * edges + (weight * error.square()).mean()


def _mean_over(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / (where.sum() * values.shape[1]).clamp(min=1)


def _psnr(squared: Tensor) -> Tensor:
    """In dB, of a mean squared error of pixels in [-1, 1]."""
    return -10 * torch.log10(squared / 4)


def psnr_db(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays of one shape, in dB; infinite when equal."""
    squared = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    return math.inf if squared == 0 else 10 * math.log10(255.0**2 / squared)
