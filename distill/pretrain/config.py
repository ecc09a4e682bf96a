"""Every setting of `codmd-distill teacher`, as frozen dataclasses; computes nothing."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from codmd_serve.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class VaePhase:
    """One part of VAE training: clips of `num_frames` frames, `batch_size` at a time."""

    num_frames: int
    batch_size: int
    num_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeConfig:
    """AutoencoderKLWan in the residual layout of Wan 2.2, time x4 and space x8, which trains 5 times faster than 2.1's.

    Images come first because they are cheap; full-length clips last, because a causal VAE that never saw 17 frames
    drifts over them.
    """

    base_dim: int = 32
    dim_mult: tuple[int, ...] = (1, 2, 2)
    z_dim: int = 16
    num_res_blocks: int = 1
    patch_size: int = 2
    phases: tuple[VaePhase, ...] = (
        VaePhase(num_frames=1, batch_size=8, num_steps=500),
        VaePhase(num_frames=5, batch_size=4, num_steps=250),
        VaePhase(num_frames=17, batch_size=2, num_steps=750),
    )
    learning_rate: float = 1e-3
    kl_weight: float = 1e-4  # of the mean over latent elements, in nats
    whiten: bool = True  # give the trained VAE uncorrelated latents of variance one, see whiten.py
    decoder_only: bool = False  # keep the encoder: latents, and a transformer trained on them, stay valid


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
    """WanTransformer3DModel, trained by flow matching with caption dropout."""

    num_heads: int = 4
    head_dim: int = 64
    num_layers: int = 6
    ffn_dim: int = 768
    freq_dim: int = 64
    num_clips: int = 3072
    two_object_share: float = 0.4  # of the clips; the captions of the world have 0.4
    num_steps: int = 4400
    batch_size: int = 16
    learning_rate: float = 8e-4
    caption_dropout: float = 0.1
    sigma_shift: float = 3.0  # training noise levels: shift of a uniform draw
    ema_decay: float = 0.998


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """One run of `codmd-distill teacher`.

    Raises:
        ConfigError: a value outside its range.
    """

    seed: int = 0
    start: str = ""  # pipeline whose weights every stage goes on from; a stage of 0 steps keeps them
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: TextConfig = field(default_factory=TextConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be in 0..2^63-1, got {self.seed}")


def tiny() -> PretrainConfig:
    """Seconds instead of hours: every stage runs, nothing is learnt. For tests and for a look at the whole path."""
    return PretrainConfig(
        vae=VaeConfig(
            base_dim=8,
            phases=(
                VaePhase(num_frames=1, batch_size=2, num_steps=2),
                VaePhase(num_frames=17, batch_size=1, num_steps=2),
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
        transformer=TransformerConfig(num_clips=20480, two_object_share=0.75, num_steps=20000, batch_size=32),
    )


def decoder() -> PretrainConfig:
    """Train only the VAE's decoder of the pipeline named by --start, for use with --until vae."""
    return PretrainConfig(
        vae=VaeConfig(phases=(VaePhase(num_frames=17, batch_size=2, num_steps=1200),), decoder_only=True),
        text=TextConfig(num_steps=0),
        transformer=TransformerConfig(num_steps=0),
    )


PRESETS = {"shapeworld": PretrainConfig, "tiny": tiny, "more": more, "decoder": decoder}


def config_to_dict(config: PretrainConfig) -> dict[str, Any]:
    """The config as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain
