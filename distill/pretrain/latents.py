"""The latents stage: training clips rendered, encoded and normalised; knows no transformer.

Legend: P clips, C channels, F latent frames, H and W latent rows and columns.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from codmd_serve.errors import CheckpointError
from codmd_serve.files import atomic_file
from distill.pretrain.clips import ClipSource
from distill.pretrain.config import TransformerConfig
from distill.pretrain.pool import ClipPool, render_clips, to_pixels
from distill.pretrain.stage import StageOptions, autocast
from distill.pretrain.whiten import Whitening, fit_whitening
from distill.pretrain.whole_clip import encode_clip

CLIPS_PER_FILE = 256
APPLY_BATCH = 2048

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """Normalised latents of the training clips, and how they came to be so.

    Attributes:
        latents: (P, C, F, H, W) float16; on a GPU where one trains.
        captions: of the P clips.
        mean, std: for the VAE's config; with `whitening` they are 0 and 1.
        whitening: (C, C) and (C,), or None.
    """

    latents: Tensor
    captions: list[str]
    mean: list[float]
    std: list[float]
    whitening: Whitening | None

    def basis(self) -> Tensor:
        """(C, C) linear part of the map from raw to normalised latents."""
        return torch.diag(1 / torch.tensor(self.std)) if self.whitening is None else self.whitening.matrix


def encode_clips(
    vae: AutoencoderKLWan,
    config: TransformerConfig,
    source: ClipSource,
    options: StageOptions,
    *,
    whiten: bool,
    pool: ClipPool | None = None,
    kept: tuple[list[float], list[float]] | None = None,
) -> Latents | None:
    """Encode the training clips by whole-clip forward passes in the precision of `options`.

    Args:
        vae: on the device.
        config: how many clips, how many at once, whether parts go to disk.
        source: of the clips.
        options: its time budget ends the stage with the clips encoded by then, at least one part.
        whiten: normalise by principal components, not channel by channel.
        pool: that renders the clips; None renders them between the batches.
        kept: mean and standard deviation of the channels, of a VAE that was not trained: measured anew, or whitened
            anew, they would be another basis, in which its other networks are wrong.

    Returns:
        The latents; None when told to stop. Parts on disk are found again by a resumed run.

    Raises:
        CheckpointError: a part on disk is damaged.
        CodmdError: rendering failed.
    """
    folder = options.folder / "latents"
    if config.keep_latents:
        folder.mkdir(parents=True, exist_ok=True)
    start_s = time.monotonic()
    parts: list[Tensor] = []
    captions: list[str] = []
    with tqdm(total=config.num_clips, desc="latents", disable=None, dynamic_ncols=True) as bar:
        for start in range(0, config.num_clips, CLIPS_PER_FILE):
            if options.stop():
                return None
            deadline = None if options.budget_s is None else start_s + options.budget_s
            path = folder / f"{start:08d}.safetensors" if config.keep_latents else None
            is_over = deadline is not None and time.monotonic() > deadline
            if parts and is_over and not (path is not None and path.is_file()):
                logger.info("stage=latents the time budget ends it at clips=%d of=%d", start, config.num_clips)
                break
            indices = range(start, min(start + CLIPS_PER_FILE, config.num_clips))
            encoded = _encode_part(vae, path, indices, _PartReader(config, source, options, pool, deadline))
            if encoded is None:
                if options.stop():
                    return None
                break
            parts.append(encoded)
            captions += pool.captions[start : indices.stop] if pool is not None else source_captions(source, indices)
            bar.update(len(indices))
            logger.info("stage=latents clips=%d of=%d", indices.stop, config.num_clips)
    return _normalise(torch.cat(parts), captions, whiten, kept)


def source_captions(source: ClipSource, indices: range) -> list[str]:
    """Captions of some clips, without rendering them."""
    return [source.draw(index)[0] for index in indices]


@dataclass(frozen=True, slots=True)
class _PartReader:
    """Where the pixels of a part come from."""

    config: TransformerConfig
    source: ClipSource
    options: StageOptions
    pool: ClipPool | None
    deadline: float | None

    def pixels(self, indices: range) -> Tensor | None:
        """uint8 (P, T, H, W, 3) on the device; None when told to stop or, past the first clips, out of time."""
        if self.pool is None:
            return None if self.options.stop() else render_clips(self.source, indices, self.options.device)[0].pixels
        # Those before, encoded or found on disk, make room: else the clips waited for may never come.
        self.pool.release(indices.start)
        # The first batches are worth waiting for: without a clip there is nothing to train on.
        deadline = self.deadline if indices.start >= CLIPS_PER_FILE else None
        ready = self.pool.wait(indices.stop, self.options.stop, deadline)
        return self.pool.pixels(indices) if ready >= indices.stop else None


def _encode_part(vae: AutoencoderKLWan, path: Path | None, indices: range, reader: _PartReader) -> Tensor | None:
    if path is not None and path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                saved: Tensor = file.get_tensor("latents")
                return saved
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged, delete it to encode these clips anew") from error
    encoded, batch = [], reader.config.encode_batch
    for first in range(indices.start, indices.stop, batch):
        pixels = reader.pixels(range(first, min(first + batch, indices.stop)))
        if pixels is None:
            return None
        with torch.no_grad(), autocast(reader.options):
            encoded.append(encode_clip(vae, to_pixels(pixels))[0].half().contiguous())
    latents = torch.cat(encoded)
    if path is not None:
        latents = latents.cpu()
        with atomic_file(path) as temporary:
            save_file({"latents": latents}, temporary)
    return latents


def _normalise(
    raw_PCFHW: Tensor, captions: list[str], whiten: bool, kept: tuple[list[float], list[float]] | None
) -> Latents:
    """Replace raw latents by normalised ones, in place."""
    num_channels = raw_PCFHW.shape[1]
    whitening, mean, std = None, [0.0] * num_channels, [1.0] * num_channels
    if kept is not None:
        mean, std = kept
    elif whiten:
        whitening = fit_whitening(raw_PCFHW)
    else:
        mean, std = channel_statistics(raw_PCFHW)
    mean_C, std_C = (torch.tensor(values, device=raw_PCFHW.device)[:, None, None, None] for values in (mean, std))
    for start in range(0, len(raw_PCFHW), APPLY_BATCH):
        part = raw_PCFHW[start : start + APPLY_BATCH]
        part.copy_((part.float() - mean_C) / std_C if whitening is None else whitening.apply(part))
    return Latents(latents=raw_PCFHW, captions=captions, mean=mean, std=std, whitening=whitening)


def channel_statistics(raw_PCFHW: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel."""
    count = raw_PCFHW[:, 0].numel()
    sums = torch.zeros(raw_PCFHW.shape[1], dtype=torch.float64, device=raw_PCFHW.device)
    squares = torch.zeros_like(sums)
    for start in range(0, len(raw_PCFHW), APPLY_BATCH):
        part = raw_PCFHW[start : start + APPLY_BATCH]
        sums += part.double().sum((0, 2, 3, 4))
        squares += part.double().square().sum((0, 2, 3, 4))
    mean_C = sums / count
    std_C = (squares / count - mean_C.square()).clamp(min=1e-12).sqrt()
    return mean_C.tolist(), std_C.tolist()
