"""Every setting of `codmd-distill teacher`, as frozen dataclasses; computes nothing."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from codmd_serve.errors import ConfigError

NUM_FRAMES = 25
WINDOW = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class VaePhase:
    """One part of VAE training.

    Attributes:
        num_frames: of a piece.
        batch_size: pieces of a step.
        num_steps: of this phase; of a run that a time budget shortens, its share of all steps.
        window: side in pixels of a square about an object; None trains on whole frames.
    """

    num_frames: int
    batch_size: int
    num_steps: int
    window: int | None = WINDOW


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeConfig:
    """AutoencoderKLWan in the residual layout of Wan 2.2, time x4 and space x8, which trains 5 times faster than 2.1's.

    Short pieces come first because they are cheap; whole clips later, because a causal VAE that never saw all frames
    drifts over them; whole frames last, because windows never show it empty background alone. A window about an object
    costs a fourth of a frame and holds twice the share of object pixels.

    Attributes:
        kl_weight: of the mean square of the latents.
        object_weight: by how much an error in an object's pixels weighs more than one in the background.
        latent_noise: standard deviation of the noise on the latents, in that of their channel: the transformer will
            leave some, and the decoder learns to bear it.
        whiten: give the trained VAE uncorrelated latents of variance one, see whiten.py.
        decoder_only: keep the encoder: latents, and a transformer trained on them, stay valid.
        clips_per_step: with rendering processes, how many new clips may join those drawn from at each step.
    """

    base_dim: int = 32
    dim_mult: tuple[int, ...] = (1, 2, 2)
    z_dim: int = 16
    num_res_blocks: int = 1
    patch_size: int = 2
    phases: tuple[VaePhase, ...] = (
        VaePhase(num_frames=1, batch_size=32, num_steps=500),
        VaePhase(num_frames=5, batch_size=8, num_steps=2500),
        VaePhase(num_frames=NUM_FRAMES, batch_size=4, num_steps=4000),
        VaePhase(num_frames=NUM_FRAMES, batch_size=2, num_steps=500, window=None),
    )
    learning_rate: float = 1e-3
    kl_weight: float = 0.5e-4
    object_weight: float = 8.0
    latent_noise: float = 0.05
    whiten: bool = True
    decoder_only: bool = False
    clips_per_step: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """UMT5EncoderModel, trained to let linear heads read every attribute of a caption, then frozen."""

    d_model: int = 128
    d_ff: int = 256
    num_layers: int = 2
    num_heads: int = 4
    num_steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 2e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """WanTransformer3DModel, trained by flow matching with caption dropout.

    Attributes:
        num_clips: that it is trained on; fewer where a time budget ends the encoding.
        encode_batch: clips that the VAE encodes at once.
        keep_latents: write encoded clips to RUN/latents, where a resumed run finds them; else it encodes them anew.
        two_object_share: of the clips; the captions of the world have 0.4.
        sigma_shift: of the noise levels, drawn uniformly before the shift; the larger, the more of them are high, which
            is where radius, speed and shade, and what ties them, are decided.
        ema_decay: of the moving average that is kept.
        decay_share: of the training during which the learning rate falls.
        snapshot_s: seconds between two transformers written to RUN/pipeline while training goes on; 0 writes none.
        curve_seeds: clips per caption of the measurement at every snapshot, see curve.py; 0 measures nothing.
        curve_steps: denoising steps of these clips.
    """

    num_heads: int = 4
    head_dim: int = 64
    num_layers: int = 6
    ffn_dim: int = 768
    freq_dim: int = 64
    num_clips: int = 20480
    encode_batch: int = 8
    keep_latents: bool = True
    two_object_share: float = 0.4
    num_steps: int = 30000
    batch_size: int = 32
    learning_rate: float = 8e-4
    caption_dropout: float = 0.1
    sigma_shift: float = 3.0
    ema_decay: float = 0.998
    decay_share: float = 0.3
    snapshot_s: float = 0.0
    curve_seeds: int = 0
    curve_steps: int = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """One run of `codmd-distill teacher`.

    Attributes:
        start: pipeline whose weights every stage goes on from; a stage of 0 steps keeps them.
        render_processes: that render clips while the device trains; 0 renders in the training process, -1 is one
            less than the machine has cores.
        pool_clips: rendered clips that the device holds at once, .7 MB each; the VAE trains on the first of them.

    Raises:
        ConfigError: a value outside its range.
    """

    seed: int = 0
    start: str = ""
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: TextConfig = field(default_factory=TextConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    render_processes: int = 0
    pool_clips: int = 49152

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be in 0..2^63-1, got {self.seed}")
        if self.render_processes and self.pool_clips < 2 * self.transformer.encode_batch:
            raise ConfigError(
                f"pool_clips must hold two batches of transformer.encode_batch = {self.transformer.encode_batch} "
                f"clips, got {self.pool_clips}"
            )


def tiny() -> PretrainConfig:
    """Seconds instead of hours: every stage runs, nothing is learnt. For tests and for a look at the whole path."""
    return PretrainConfig(
        vae=VaeConfig(
            base_dim=8,
            phases=(
                VaePhase(num_frames=1, batch_size=2, num_steps=2),
                VaePhase(num_frames=NUM_FRAMES, batch_size=1, num_steps=2, window=32),
            ),
        ),
        text=TextConfig(d_model=16, d_ff=16, num_layers=1, num_heads=2, num_steps=4, batch_size=4),
        transformer=TransformerConfig(
            num_heads=1, head_dim=32, num_layers=1, ffn_dim=32, num_clips=6, num_steps=4, batch_size=2
        ),
    )


def more() -> PretrainConfig:
    """Go on with the transformer of the pipeline named by --start, on more clips; its other parts stay as they are."""
    return PretrainConfig(
        vae=VaeConfig(phases=()),
        text=TextConfig(num_steps=0),
        # Two objects are what takes longest to learn.
        transformer=TransformerConfig(two_object_share=0.75),
    )


def decoder() -> PretrainConfig:
    """Train only the VAE's decoder of the pipeline named by --start, for use with --until vae."""
    return PretrainConfig(
        vae=VaeConfig(phases=(VaePhase(num_frames=NUM_FRAMES, batch_size=4, num_steps=1200),), decoder_only=True),
        text=TextConfig(num_steps=0),
        transformer=TransformerConfig(num_steps=0),
    )


def next_world() -> PretrainConfig:
    """Go on with all parts of the pipeline named by --start after the world has changed, in CPU hours."""
    return PretrainConfig(
        vae=VaeConfig(
            phases=(
                VaePhase(num_frames=5, batch_size=8, num_steps=3200),
                VaePhase(num_frames=NUM_FRAMES, batch_size=4, num_steps=4000),
                VaePhase(num_frames=NUM_FRAMES, batch_size=2, num_steps=800, window=None),
            )
        ),
        text=TextConfig(num_steps=1000, learning_rate=1e-3),
        transformer=TransformerConfig(two_object_share=0.75, sigma_shift=4.0, decay_share=0.4),
    )


def gpu() -> PretrainConfig:
    """As `next`, in 5 to 10 minutes of one H100; --minutes says in how many.

    The text encoder of --start stays: it has to know today's words, see `next` with --until text.
    """
    config = next_world()
    return dataclasses.replace(
        config,
        vae=dataclasses.replace(
            config.vae,
            phases=(
                VaePhase(num_frames=5, batch_size=160, num_steps=1600),
                VaePhase(num_frames=NUM_FRAMES, batch_size=48, num_steps=2000),
                VaePhase(num_frames=NUM_FRAMES, batch_size=20, num_steps=400, window=None),
            ),
            clips_per_step=16,
        ),
        text=dataclasses.replace(config.text, num_steps=0),
        transformer=dataclasses.replace(
            config.transformer,
            num_clips=131072,
            encode_batch=128,
            keep_latents=False,
            num_steps=20000,
            batch_size=512,
            learning_rate=1.5e-3,
            ema_decay=0.999,
            snapshot_s=50.0,
            curve_seeds=32,
        ),
        render_processes=-1,
    )


def gpu_more() -> PretrainConfig:
    """As `gpu`, for a --start whose VAE is as it should be: all minutes but those of encoding go to the transformer.

    The teacher of 49,152 clips, each seen 29 times, knew them by heart where the noise is high: a loss of .606 on them
    and of .667 on new ones at level .987. That is where radius, speed and shade are decided, so here are more.
    """
    config = gpu()
    return dataclasses.replace(
        config,
        vae=dataclasses.replace(config.vae, phases=()),
        transformer=dataclasses.replace(config.transformer, num_clips=262144),
    )


def gpu_tiny() -> PretrainConfig:
    """The path of `gpu` at the size of `tiny`, for a rehearsal: processes, snapshots and measurements included."""
    config, small = gpu(), tiny()
    return dataclasses.replace(
        config,
        vae=dataclasses.replace(
            config.vae,
            phases=tuple(dataclasses.replace(phase, batch_size=2, num_steps=2) for phase in config.vae.phases),
            clips_per_step=4,
        ),
        text=dataclasses.replace(config.text, num_steps=2, batch_size=small.text.batch_size),
        transformer=dataclasses.replace(
            config.transformer,
            num_clips=80,
            encode_batch=16,
            num_steps=4,
            batch_size=4,
            snapshot_s=20.0,
            curve_seeds=2,
            curve_steps=2,
        ),
        render_processes=2,
        pool_clips=48,
    )


PRETRAIN_PRESETS = {
    "shapeworld": PretrainConfig,
    "tiny": tiny,
    "more": more,
    "decoder": decoder,
    "next": next_world,
    "gpu": gpu,
    "gpu-more": gpu_more,
    "gpu-tiny": gpu_tiny,
}


def pretrain_config_to_dict(config: PretrainConfig) -> dict[str, Any]:
    """The config as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain
