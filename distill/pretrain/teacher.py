"""The 50-step teacher: latents of captioned clips, then flow matching with caption dropout; knows no file layout.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns, P clips.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from codmd_serve.device import multiplies_bfloat16
from codmd_serve.errors import CheckpointError
from codmd_serve.files import atomic_file
from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, add_noise, shift_sigma
from codmd_serve.wan.attention import use_compact_cross_attention
from distill.data.prompts import PromptData
from distill.networks.base import open_base
from distill.networks.build import compile_blocks, denoiser
from distill.networks.precision import keep_sensitive_parts_float32, unfuse_bf16_attention
from distill.pretrain.config import TransformerConfig
from distill.pretrain.stage import StageOptions, load_weights, run_stage
from distill.pretrain.vae import to_pixels
from distill.pretrain.whiten import Whitening, fit_whitening, fold_into_transformer
from distill.worlds.shapeworld.captions import TWO_OBJECT_SHARE, canonical_caption, free_caption, sample_scene
from distill.worlds.shapeworld.render import sample_clip
from distill.worlds.shapeworld.schema import Scene

CLIPS_PER_PART = 256
ENCODE_BATCH = 8
FREE_SHARE = 0.6

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """Normalised latents (P, C, F, H, W) float16 of the training clips, and how they came to be so.

    With `whitening` that is (C, C) and (C,); `mean` and `std`, which the VAE's config takes, are then 0 and 1.
    """

    latents: Tensor
    mean: list[float]
    std: list[float]
    whitening: Whitening | None

    def basis(self) -> Tensor:
        """(C, C) linear part of the map from raw to normalised latents."""
        return torch.diag(1 / torch.tensor(self.std)) if self.whitening is None else self.whitening.matrix


@dataclass(frozen=True, slots=True)
class ClipSource:
    """The training clips of one run: clip `index` is the same for the same source.

    Attributes:
        seed: of captions and pixels.
        two_object_share: probability that a clip shows two objects.
    """

    seed: int
    two_object_share: float = TWO_OBJECT_SHARE

    def draw(self, index: int) -> tuple[str, Scene, np.random.Generator]:
        """Caption and scene of clip `index`, and the generator that goes on to draw its pixels."""
        rng = np.random.default_rng([self.seed, 3, index])
        scene = sample_scene(rng, two_object_share=self.two_object_share)
        caption = free_caption(scene, rng) if rng.random() < FREE_SHARE else canonical_caption(scene)
        return caption, scene, rng

    def clip(self, index: int) -> tuple[str, np.ndarray]:
        """Caption and uint8 (17, 64, 64, 3) pixels of clip `index`."""
        caption, scene, rng = self.draw(index)
        return caption, sample_clip(scene, rng)

    def captions(self, num_clips: int) -> list[str]:
        """Captions of the first clips, without rendering them."""
        return [self.draw(index)[0] for index in range(num_clips)]


def encode_clips(
    vae: AutoencoderKLWan, num_clips: int, source: ClipSource, options: StageOptions, *, whiten: bool
) -> Latents | None:
    """Render and encode the training clips, in parts that a resumed run finds again; None when told to stop."""
    folder = options.folder / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, num_clips, CLIPS_PER_PART)
    parts = []
    with tqdm(total=num_clips, desc="latents", disable=None, dynamic_ncols=True) as bar:
        for start in starts:
            if options.stop():
                return None
            count = min(CLIPS_PER_PART, num_clips - start)
            parts.append(_encode_part(vae, folder / f"{start:08d}.safetensors", source, start, count, options))
            bar.update(count)
            logger.info("stage=latents clips=%d of=%d", start + count, num_clips)
    raw = torch.cat(parts).float()
    if whiten:
        whitening = fit_whitening(raw)
        num_channels = raw.shape[1]
        white = whitening.apply(raw).half()
        return Latents(latents=white, mean=[0.0] * num_channels, std=[1.0] * num_channels, whitening=whitening)
    mean_C, std_C = raw.mean((0, 2, 3, 4)), raw.std((0, 2, 3, 4))
    normalised = (raw - mean_C[:, None, None, None]) / std_C[:, None, None, None]
    return Latents(latents=normalised.half(), mean=mean_C.tolist(), std=std_C.tolist(), whitening=None)


def _encode_part(
    vae: AutoencoderKLWan, path: Path, source: ClipSource, start: int, count: int, options: StageOptions
) -> Tensor:
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                saved: Tensor = file.get_tensor("latents")
                return saved
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged, delete it to encode these clips anew") from error
    encoded = []
    for first in range(start, start + count, ENCODE_BATCH):
        indices = range(first, min(first + ENCODE_BATCH, start + count))
        clips = np.stack([source.clip(index)[1] for index in indices])
        with torch.no_grad():
            encoded.append(vae.encode(to_pixels(clips).to(options.device)).latent_dist.mean.half().cpu())
    latents = torch.cat(encoded)
    with atomic_file(path) as temporary:
        save_file({"latents": latents}, temporary)
    return latents


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


def train_transformer(
    config: TransformerConfig,
    encoded: Latents,
    prompts: PromptData,
    text_dim: int,
    seed: int,
    options: StageOptions,
    start: str = "",
) -> WanTransformer3DModel | None:
    """Train, or go on training, the teacher by flow matching.

    Args:
        config: size, steps, dropout.
        encoded: the P clips.
        prompts: embeddings of the P captions; its negative prompt stands in for a dropped caption, so it has to be
            the one that guidance will use.
        text_dim: D of the embeddings.
        seed: of everything random.
        options: device, precision, budget.
        start: pipeline whose weights to go on from; empty trains from nothing. They are moved to the basis of the
            new latents, as if the VAE's own had not changed since.

    Returns:
        The moving average of the weights, or None when it was told to stop.

    Raises:
        CheckpointError: `start` has no transformer of this layout.

    Source: rectified flow, arXiv 2209.03003, with the noise levels shifted as in arXiv 2403.03206, section 5.3.2.
    """
    torch.manual_seed(seed + 2)
    latents = encoded.latents
    transformer = build_transformer(config, latents.shape[1], text_dim)
    if start:
        load_weights(transformer, start, "transformer")
        start_std = torch.tensor(open_base(start).load(AutoencoderKLWan, "vae").config.latents_std)
        fold_into_transformer(transformer, encoded.basis() @ torch.diag(start_std))
    keep_sensitive_parts_float32(use_compact_cross_attention(transformer))
    unfuse_bf16_attention(transformer, options.precision, options.device)
    transformer.to(options.device).train()
    if options.compiled:
        compile_blocks(transformer)
    denoise = denoiser(transformer, options.precision)

    def compute_loss(step: int, _progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        rng = np.random.default_rng([seed, 4, step])
        indices = rng.integers(len(latents), size=config.batch_size)
        x0 = latents[torch.from_numpy(indices)].to(options.device).float()
        dropped = rng.random(config.batch_size) < config.caption_dropout
        shown = np.where(dropped, prompts.num_prompts, indices).tolist()
        embeds = prompts.batch(shown, options.device).prompt_embeds
        noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32)).to(options.device)
        # One stratum per sample: every batch sees all noise levels, so the loss is less noisy.
        levels = (np.arange(config.batch_size) + rng.random(config.batch_size)) / config.batch_size
        sigma_B = shift_sigma(torch.from_numpy(levels.astype(np.float32)), config.sigma_shift).to(options.device)
        flow_pred = denoise(add_noise(x0, noise, sigma_B), NUM_TRAIN_TIMESTEPS * sigma_B, embeds)
        return (flow_pred.float() - (noise - x0)).square().mean(), {}

    average = run_stage(
        "transformer",
        transformer,
        config.num_steps,
        config.learning_rate,
        compute_loss,
        options,
        # Muon orthogonalises in bfloat16: on a CPU without it that costs twice the step itself (2.0 s against 0.7 s).
        # With it, 4 min from the same weights lower the loss by .0030 (462 steps), AdamW's by .0000 (521 steps).
        use_muon=multiplies_bfloat16(options.device),
        ema_decay=config.ema_decay,
    )
    if average is None:
        return None
    teacher = build_transformer(config, latents.shape[1], text_dim)
    teacher.load_state_dict({key: value.cpu() for key, value in average.items()})
    return teacher.eval().requires_grad_(False)
