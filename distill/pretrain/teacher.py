"""The 50-step teacher: flow matching with caption dropout on encoded clips; knows no file layout.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns, P clips, L prompt positions, D width.
"""

import logging
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

from codmd_serve.device import multiplies_bfloat16
from codmd_serve.sampler import Denoise
from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, add_noise, shift_sigma
from codmd_serve.wan.attention import use_compact_cross_attention
from distill.networks.base import open_base
from distill.networks.build import denoiser
from distill.networks.precision import keep_sensitive_parts_float32, unfuse_bf16_attention
from distill.pretrain.compiling import BlockCompiler
from distill.pretrain.config import TransformerConfig
from distill.pretrain.latents import Latents
from distill.pretrain.prompts import PromptTable
from distill.pretrain.stage import LrSchedule, Snapshots, StageOptions, load_weights, run_stage, step_generator
from distill.pretrain.whiten import fold_into_transformer

_TRANSFORMER_STAGE = 4

logger = logging.getLogger(__name__)


def build_transformer(config: TransformerConfig, latent_channels: int, text_dim: int) -> WanTransformer3DModel:
    """A fresh WanTransformer3DModel in the layout of Wan2.1 T2V."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    )


def prepare_transformer(
    transformer: WanTransformer3DModel, precision: str, device: torch.device
) -> WanTransformer3DModel:
    """Let `transformer` take compact prompts in `precision` on `device`, in place."""
    keep_sensitive_parts_float32(use_compact_cross_attention(transformer))
    unfuse_bf16_attention(transformer, precision, device)
    return transformer.to(device)


@dataclass(frozen=True, slots=True)
class _FlowMatching:
    """Draws of one step of flow matching, a function of (seed, step), on the training device."""

    config: TransformerConfig
    latents: Tensor
    prompts: PromptTable
    seed: int
    device: torch.device

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clean latents, noise, noise levels (B,) and embeddings (B, L, D)."""
        generator, size = step_generator(self.device, self.seed, _TRANSFORMER_STAGE, step), self.config.batch_size
        rows_B = torch.randint(len(self.latents), (size,), generator=generator, device=self.device)
        x0 = self.latents[rows_B.to(self.latents.device)].to(self.device).float()
        is_dropped_B = torch.rand(size, generator=generator, device=self.device) < self.config.caption_dropout
        embeds_BLD = self.prompts.rows(rows_B, is_dropped_B)
        noise = torch.randn(x0.shape, generator=generator, device=self.device)
        # One stratum per sample: every batch sees all noise levels, so the loss is less noisy.
        jitter_B = torch.rand(size, generator=generator, device=self.device)
        levels_B = (torch.arange(size, device=self.device) + jitter_B) / size
        return x0, noise, shift_sigma(levels_B, self.config.sigma_shift), embeds_BLD

    def loss(self, step: int, denoise: Denoise) -> Tensor:
        """Mean squared error of the flow that `denoise` predicts."""
        x0, noise, sigma_B, embeds_BLD = self.draw(step)
        flow_pred = denoise(add_noise(x0, noise, sigma_B), NUM_TRAIN_TIMESTEPS * sigma_B, embeds_BLD)
        return (flow_pred.float() - (noise - x0)).square().mean()


def load_start(transformer: WanTransformer3DModel, encoded: Latents, start: str) -> None:
    """Load the transformer of the pipeline `start`, moved to the basis of the new latents.

    That is right as far as the VAE's raw latents have not changed since.

    Raises:
        CheckpointError: `start` has no transformer of this layout.
    """
    load_weights(transformer, start, "transformer")
    start_std = torch.tensor(open_base(start).load(AutoencoderKLWan, "vae").config.latents_std)
    fold_into_transformer(transformer, encoded.basis() @ torch.diag(start_std))


def train_transformer(
    config: TransformerConfig,
    encoded: Latents,
    prompts: PromptTable,
    seed: int,
    options: StageOptions,
    start: str = "",
    compiler: BlockCompiler | None = None,
    snapshots: Snapshots | None = None,
) -> WanTransformer3DModel | None:
    """Train, or go on training, the teacher by flow matching.

    Args:
        config: size, steps, dropout.
        encoded: the P clips.
        prompts: embeddings of the P captions; the empty one stands in for a dropped caption, and guidance uses it.
        seed: of everything random.
        options: device, precision, budget.
        start: pipeline whose weights to go on from; empty trains from nothing.
        compiler: of the blocks; None runs them eager.
        snapshots: what to do with the moving average while training goes on.

    Returns:
        The moving average of the weights, or None when it was told to stop.

    Raises:
        CheckpointError: `start` has no transformer of this layout.

    Source: rectified flow, arXiv 2209.03003, with the noise levels shifted as in arXiv 2403.03206, section 5.3.2.
    """
    torch.manual_seed(seed + 2)
    transformer = build_transformer(config, encoded.latents.shape[1], prompts.width)
    if start:
        load_start(transformer, encoded, start)
    prepare_transformer(transformer, options.precision, options.device).train()
    denoise = denoiser(transformer, options.precision)
    matching = _FlowMatching(config, encoded.latents, prompts, seed, options.device)

    def call(latents: Tensor, timestep_B: Tensor, embeds_BLD: Tensor) -> Tensor:
        if compiler is None:
            return denoise(latents, timestep_B, embeds_BLD)
        return compiler.call(transformer, lambda: denoise(latents, timestep_B, embeds_BLD))

    average = run_stage(
        "transformer",
        transformer,
        config.num_steps,
        config.learning_rate,
        lambda step, _progress: (matching.loss(step, call), {}),
        options,
        # Muon orthogonalises in bfloat16: on a CPU without it that costs twice the step itself (2.0 s against 0.7 s).
        # With it, 4 min from the same weights lower the loss by .0030 (462 steps), AdamW's by .0000 (521 steps).
        use_muon=multiplies_bfloat16(options.device),
        ema_decay=config.ema_decay,
        schedule=LrSchedule(decay_share=config.decay_share),
        snapshots=snapshots,
    )
    if average is None:
        return None
    return averaged_transformer(config, average, encoded.latents.shape[1], prompts.width)


def averaged_transformer(
    config: TransformerConfig, average: dict[str, Tensor], latent_channels: int, text_dim: int
) -> WanTransformer3DModel:
    """A frozen transformer on the CPU with the weights of a moving average."""
    teacher = build_transformer(config, latent_channels, text_dim)
    teacher.load_state_dict({key: value.cpu() for key, value in average.items()})
    return teacher.eval().requires_grad_(False)
