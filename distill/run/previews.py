"""Previews: pictures of the EMA student for a few fixed prompts during training; they never change the training.

The noise is the same each time, so the pictures of two iterations differ by the weights alone.

RUN/previews/step-00000200.png     one row of frames per prompt
RUN/previews/prompts.txt           the prompts, row by row

Legend: B prompts, C channels, F latent frames, H and W rows and columns, T pixel frames.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor, nn

from codmd_serve.files import atomic_file, first_line, write_text
from codmd_serve.sampler import rollout
from codmd_serve.wan.vae import StreamingDecoder
from distill.config import DistillConfig
from distill.data.prompts import PromptData
from distill.networks.base import Base
from distill.networks.build import denoiser, trained_parameters
from distill.parallel.processes import SINGLE_PROCESS, Processes
from distill.parallel.state import local_part
from distill.streams import named_rng

PREVIEW_DIR = "previews"
NUM_PROMPTS = 4
PREVIEW_FRAMES = 6

logger = logging.getLogger(__name__)


class Previews:
    """The prompts, the noise and the VAE of a run's previews.

    Args:
        config: of the run.
        base: whose VAE decodes.
        out: folder of the run.
        data: embeddings; the previews show the first prompts.
        shape: (C, F, H, W) of the latents.
        device: where the student is; the VAE is there only while it decodes.
        processes: of the run. All ranks must call `write`, because they sample together; rank 0 writes.

    Raises:
        CheckpointError: the base has no complete VAE.
    """

    def __init__(
        self,
        config: DistillConfig,
        base: Base,
        out: Path,
        data: PromptData,
        shape: tuple[int, ...],
        device: torch.device,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self.processes = processes
        self.config, self.folder, self.device = config, out / PREVIEW_DIR, device
        self.prompts = [data.text(index) for index in range(min(NUM_PROMPTS, data.num_prompts))]
        self.embeds_BLD = data.batch(list(range(len(self.prompts))), device).prompt_embeds
        size = (len(config.grid().timesteps), len(self.prompts), *shape)
        self.noise = torch.randn(size, generator=named_rng(config.seed, "preview", 0))
        if processes.is_rank0:
            self.vae = base.load(AutoencoderKLWan, "vae", torch_dtype=torch.float32)
            self.vae.requires_grad_(False).eval()

    @torch.no_grad()
    def sample(self, student: nn.Module, average: Mapping[str, Tensor]) -> Tensor:
        """Return latents (B, C, F, H, W) of the student with the weights of `average`; it keeps its own."""
        grid = self.config.grid()
        # Eager: another batch size would recompile the blocks, for training as well.
        with averaged_weights(student, average), torch.compiler.set_stance("force_eager"):
            return rollout(
                denoiser(student, self.config.precision),
                self.noise.to(self.device),
                self.embeds_BLD,
                grid.sigmas,
                grid.timesteps,
                sampler=self.config.sampler,
            )

    @torch.no_grad()
    def clips(self, latents_BCFHW: Tensor) -> np.ndarray:
        """Decode to uint8 (B, T, H, W, 3), on rank 0."""
        self.vae.to(self.device)
        # One by one: decoding a batch of large videos takes more memory than a training step.
        decoder = StreamingDecoder(self.vae)
        decoded = [torch.cat([part.cpu() for part in decoder.frames(x0[None])], dim=1) for x0 in latents_BCFHW]
        self.vae.to("cpu")
        clips: np.ndarray = torch.cat(decoded).numpy()
        return clips

    def write(self, iteration: int, student: nn.Module, average: Mapping[str, Tensor]) -> np.ndarray | None:
        """Write the preview of an iteration.

        Args:
            iteration: iterations done.
            student: the network in training.
            average: its moving average by parameter name.

        Returns:
            The picture, uint8 (rows, columns, 3). None on other ranks, and where it could not be made: a failure of any
            kind is logged and training goes on.
        """
        latents_BCFHW = self._sample_or_none(iteration, student, average)
        if latents_BCFHW is None or not self.processes.is_rank0:
            return None
        try:
            picture = filmstrips(self.clips(latents_BCFHW))
            self.folder.mkdir(exist_ok=True)
            write_text(self.folder / "prompts.txt", "".join(f"{text}\n" for text in self.prompts))
            with atomic_file(self.folder / f"step-{iteration:08d}.png") as temporary:
                Image.fromarray(picture).save(temporary, format="png")
        except Exception as error:  # VAE, codecs and the file system each raise their own kinds
            logger.warning("no preview iteration=%d reason=%s", iteration, first_line(error))
            self.vae.to("cpu")
            return None
        return picture

    def _sample_or_none(self, iteration: int, student: nn.Module, average: Mapping[str, Tensor]) -> Tensor | None:
        """Sample; None on all ranks when any of them failed, as when its memory is full."""
        latents_BCFHW: Tensor | None = None
        try:
            latents_BCFHW = self.sample(student, average)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            logger.warning(
                "no preview iteration=%d rank=%d reason=%s", iteration, self.processes.rank, first_line(error)
            )
        (has_failed,) = self.processes.all_reduce_max(int(latents_BCFHW is None))
        return None if has_failed else latents_BCFHW


@contextmanager
def averaged_weights(network: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the block with `average` in place of the network's trained parameters, then restore the same bits."""
    # This rank's shards: sharded tensors have no foreach_copy_ of their own.
    parameters = {name: local_part(parameter)[0] for name, parameter in trained_parameters(network).items()}
    own, targets = [parameter.clone() for parameter in parameters.values()], list(parameters.values())
    try:
        torch._foreach_copy_(targets, [local_part(average[name])[0] for name in parameters])
        yield
    finally:
        torch._foreach_copy_(targets, own)


def filmstrips(clips: np.ndarray) -> np.ndarray:
    """Arrange each clip as a row of evenly spaced frames, including the first and the last.

    Args:
        clips: uint8 (B, T, H, W, 3).

    Returns:
        uint8 (B * H, N * W, 3), N the smaller of T and PREVIEW_FRAMES.
    """
    num_frames = clips.shape[1]
    picks = np.linspace(0, num_frames - 1, min(PREVIEW_FRAMES, num_frames)).round().astype(int)
    return np.concatenate([np.concatenate(list(clip[picks]), axis=1) for clip in clips])
