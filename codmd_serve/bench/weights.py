"""Student bundles of random weights at the sizes of published models: speed does not depend on weight values."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from codmd_serve import __version__
from codmd_serve.bench.floor import num_parameters
from codmd_serve.errors import ConfigError
from codmd_serve.grid import StepGrid, wan_1_3b_grid, wan_14b_grid
from codmd_serve.wan.checkpoint import NativeShape, StudentSpec, save_bundle

PROMPT_COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white")
PROMPT_SHAPES = ("circle", "square", "triangle", "cross", "ring")
PROMPT_DIRECTIONS = ("left", "right", "up", "down")
# Captions that the embedded student knows, all of one length: a request costs the same with every one of them.
PROMPTS = tuple(
    f"a {colour} {shape} moves {direction} slowly on a black background"
    for colour in PROMPT_COLOURS
    for shape in PROMPT_SHAPES
    for direction in PROMPT_DIRECTIONS
)


NOISE = 0.1  # of what random weights decode to, in the pixels


@dataclass(frozen=True, slots=True)
class Preset:
    """Arguments of the three networks, and how the student is sampled."""

    transformer: dict[str, Any]
    text_encoder: dict[str, Any]
    vae: dict[str, Any]
    grid: StepGrid
    native: NativeShape
    base: str


_WAN_CONFIG = {"attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}
_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_WAN_480P = NativeShape(height=480, width=832, num_frames=81, fps=16)


def preset(name: str) -> Preset:
    """Find a preset: wan-1.3b and wan-14b as published (Wan2.1-T2V, 480p), tiny for tests.

    Raises:
        ConfigError: no such preset.
    """
    if name == "wan-1.3b":
        small = {**_WAN_CONFIG, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
        return Preset(small, _UMT5_XXL, {}, wan_1_3b_grid(), _WAN_480P, "wan")
    if name == "wan-14b":
        large = {**_WAN_CONFIG, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
        return Preset(large, _UMT5_XXL, {}, wan_14b_grid(), _WAN_480P, "wan")
    if name == "tiny":
        heads = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "num_layers": 2}
        text = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        vae = {"base_dim": 8, "num_res_blocks": 1}
        native = NativeShape(height=32, width=32, num_frames=9, fps=16)
        return Preset({**heads, "text_dim": 16, "freq_dim": 16}, text, vae, wan_14b_grid(), native, "tiny")
    raise ConfigError(f"no preset {name!r}: expected wan-1.3b, wan-14b or tiny")


@contextmanager
def random_bundle(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Iterator[Path]:
    """Write a bundle of random weights and its base, unless the folder has them, and yield the bundle.

    Args:
        name: of a preset.
        folder: keeps bundles and bases side by side; 1.3B and 14B share one base.
        device: where the numbers are drawn.
        dtype: of transformer and text encoder; the VAE is float32.

    Raises:
        ConfigError: no such preset, sizes that a CPU would take hours for, or a disk with too little room.
    """
    plan = preset(name)
    if name != "tiny" and device.type != "cuda":
        raise ConfigError(
            f"{name} needs a CUDA device, this would run on {device.type}: measure the embedded bundle instead, by "
            "leaving --random-weights out"
        )
    suffix = str(dtype).removeprefix("torch.")
    base, bundle = folder / f"{plan.base}-base-{suffix}", folder / f"{name}-random-{suffix}"
    _check_room(plan, folder, dtype, has_base=_is_whole(base), has_bundle=_is_whole(bundle))
    torch.manual_seed(0)
    if not _is_whole(base):
        _write_base(plan, base, device, dtype)
    if not _is_whole(bundle):
        transformer = built(WanTransformer3DModel, plan.transformer, device, dtype)
        save_bundle(bundle, transformer, _preset_spec(plan, name, base))
        _mark_whole(bundle)
    yield bundle


def _preset_spec(plan: Preset, name: str, base: Path) -> StudentSpec:
    return StudentSpec(
        base=f"../{base.name}",
        sigmas=plan.grid.sigmas,
        timesteps=plan.grid.timesteps,
        sampler="sde",
        native=replace(plan.native),
        method="random",
        base_model=name,
        step=0,
        ema=False,
        config_sha256="",
        package_version=__version__,
    )


def _write_base(plan: Preset, base: Path, device: torch.device, dtype: torch.dtype) -> None:
    shutil.rmtree(base, ignore_errors=True)
    random_tokenizer().save_pretrained(base / "tokenizer")
    with _defaults(device, dtype):
        encoder = UMT5EncoderModel(UMT5Config(**plan.text_encoder))
    encoder.save_pretrained(base / "text_encoder")
    del encoder
    vae = built(AutoencoderKLWan, plan.vae, device, torch.float32)
    with torch.no_grad():
        # Random weights decode to noise, which costs x264 four times what a video does; a tenth of it costs the same.
        vae.decoder.conv_out.weight.mul_(NOISE)
    vae.save_pretrained(base / "vae")
    _mark_whole(base)


def random_tokenizer() -> PreTrainedTokenizerFast:
    """Build a whole-word tokenizer; the encoder is given 512 positions in any case."""
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(" ".join(PROMPTS).split())]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def built(kind: Any, arguments: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Build a module of random weights directly on the device and in the dtype."""
    with _defaults(device, dtype):
        return kind(**arguments)


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Create modules directly on the device in that dtype: no float32 copy of 14 billion parameters."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _check_room(plan: Preset, folder: Path, dtype: torch.dtype, *, has_base: bool, has_bundle: bool) -> None:
    meta = torch.device("meta")
    needed = 0
    if not has_bundle:
        needed += num_parameters(built(WanTransformer3DModel, plan.transformer, meta, dtype)) * dtype.itemsize
    if not has_base:
        with meta:
            encoder = UMT5EncoderModel(UMT5Config(**plan.text_encoder))
        needed += num_parameters(encoder) * dtype.itemsize
        needed += num_parameters(built(AutoencoderKLWan, plan.vae, meta, dtype)) * torch.float32.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"random weights need {needed / 2**30:.1f} GiB, {folder} has {free / 2**30:.1f}; name another with --work"
        )


# An interrupted call must not leave half a model that the next one measures.
def _is_whole(folder: Path) -> bool:
    return (folder / "whole").is_file()


def _mark_whole(folder: Path) -> None:
    (folder / "whole").touch()
