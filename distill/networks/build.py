"""Student, teacher and critic: loading, freezing, calling them in mixed precision, and the student's moving average.

Knows neither losses nor the training loop. Layout: B batch, C channels, F latent frames, H, W latent pixels,
L prompt positions, D text width.
"""

import functools
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from codmd_serve.config import default_bundle_path
from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.sampler import Denoise
from codmd_serve.wan.attention import use_compact_cross_attention
from codmd_serve.wan.checkpoint import load_module
from distill.config import DistillConfig, EmaConfig, NativeConfig, gather_precision
from distill.losses.dmd import guided_flow
from distill.networks.lora import AdaptedCritic, Switch, add_adapters, checkpoint_activations
from distill.parallel.processes import ALONE, Processes
from distill.parallel.sharding import load_sharded, sharded_like, split_tokens

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Networks:
    """The three networks of distribution matching, same architecture, same starting weights.

    student and critic train in float32; teacher is frozen, float32 or bfloat16. `precision` is what all of them are
    called in: fp32, or bf16 autocast. A critic of low rank holds the teacher itself, with adapters that only its own
    calls switch on.
    """

    student: WanTransformer3DModel
    critic: WanTransformer3DModel | AdaptedCritic
    teacher: WanTransformer3DModel
    precision: str

    def transformers(self) -> list[WanTransformer3DModel]:
        """Return the transformers there are: two when the critic holds the teacher."""
        own = [] if isinstance(self.critic, AdaptedCritic) else [self.critic]
        return [self.student, self.teacher, *own]


def build_networks(config: DistillConfig, device: torch.device, processes: Processes = ALONE) -> Networks:
    """Load the base three times: trainable student and critic, frozen teacher; or twice, with a critic of low rank.

    Args:
        config: names base and dtypes; its precision must be resolved.
        device: where the networks go.
        processes: over which they are sharded, if there are several, and groups of which split tokens.

    Raises:
        CheckpointError: the base is missing or broken.
        ConfigError: the base is not text to video.
    """
    switch = Switch()

    def build(role: str, dtype: torch.dtype, is_trained: bool, has_adapters: bool = False) -> WanTransformer3DModel:
        def load() -> WanTransformer3DModel:
            return load_transformer(config.base, dtype)

        def prepare(transformer: WanTransformer3DModel) -> None:
            # Wan has no dropout; eval makes that independent of a base whose config says otherwise.
            transformer.eval().requires_grad_(is_trained)
            keep_sensitive_parts_float32(use_compact_cross_attention(transformer))
            if config.context_parallel == 1:  # which brings an attention of its own
                choose_attention(transformer, config.precision, device)
            if has_adapters:
                add_adapters(transformer, switch, config.lora_critic_rank, config.lora_critic_alpha)

        if processes.mesh is None:
            network = load()
            prepare(network)
            network.to(device)
        else:
            gathered = gather_precision(config.method, role, config.precision)
            network = load_sharded(load, prepare, transformer_config(config.base), processes, gathered)
        if config.activation_checkpointing and (is_trained or has_adapters):
            checkpoint_activations(network, switch)
        return network

    is_low_rank = config.lora_critic_rank > 0
    teacher = build("teacher", TORCH_DTYPES[config.teacher_dtype], is_trained=False, has_adapters=is_low_rank)
    student = build("student", torch.float32, is_trained=True)
    critic = AdaptedCritic(teacher, switch) if is_low_rank else build("critic", torch.float32, is_trained=True)
    networks = Networks(student=student, critic=critic, teacher=teacher, precision=config.precision)
    if config.context_parallel > 1:
        split_tokens(networks.transformers(), config, processes)
    return networks


def compile_blocks(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    """Compile every block of `transformer` in place by torch.compile, at its first call; names of weights stay.

    On two CPU cores a training step of the embedded teacher takes 0.77 of its eager time.

    Raises:
        ConfigError: it is on a CPU and this machine has no C++ compiler.
    """
    on_cpu = next(transformer.parameters()).device.type == "cpu"
    compiler = os.environ.get("CXX", "g++")
    if on_cpu and shutil.which(compiler) is None:
        raise ConfigError(f"--compile needs a C++ compiler, {compiler} is not there; install it or leave --compile out")
    for block in transformer.blocks:
        block.compile()
    return transformer


def denoiser(transformer: WanTransformer3DModel | AdaptedCritic, precision: str) -> Denoise:
    """Wrap a network as the sampler's `denoise`, in bf16 autocast when `precision` is "bf16".

    Each call opens its own autocast region: a longer one would reuse bf16 weights that were cast without gradient by
    the no-grad steps of a rollout, and the exit step would silently train nothing.
    """

    # Sharded weights are there for the time of their block; autocast's cache would keep the casts of them all.
    keeps_casts = not isinstance(
        transformer.base if isinstance(transformer, AdaptedCritic) else transformer, FSDPModule
    )

    def denoise(latents: Tensor, timestep_B: Tensor, prompt_embeds_BLD: Tensor) -> Tensor:
        is_on, device_type = precision == "bf16", latents.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=is_on, cache_enabled=keeps_casts):
            output: Tensor = transformer(latents, timestep_B, prompt_embeds_BLD, return_dict=False)[0]
        return output

    return denoise


def guided_teacher_flow(
    denoise: Denoise,
    latents: Tensor,
    timestep_B: Tensor,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor,
    guidance_scale: float,
) -> Tensor:
    """Guided flow of the teacher, prompt and negative prompt in one call of twice the batch.

    Args:
        denoise: the teacher.
        latents: (B, C, F, H, W).
        timestep_B: (B,).
        prompt_embeds: (B, L, D).
        negative_prompt_embeds: (B, L, D), same L.
        guidance_scale: 1.0 skips the negative prompt.

    Returns:
        (B, C, F, H, W), float32 or wider.
    """
    if guidance_scale == 1.0:
        flow = denoise(latents, timestep_B, prompt_embeds)
        return guided_flow(flow, flow, 1.0)
    both = denoise(
        torch.cat([latents, latents]),
        torch.cat([timestep_B, timestep_B]),
        torch.cat([prompt_embeds, negative_prompt_embeds]),
    )
    cond_flow, uncond_flow = both.chunk(2)
    return guided_flow(cond_flow, uncond_flow, guidance_scale)


class _Float32Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return functional.linear(input.float(), self.weight.float(), bias)


class _Float32Conv3d(nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            output: Tensor = self._conv_forward(input.float(), self.weight.float(), bias)
        return output


class _Float32RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        return functional.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


def keep_sensitive_parts_float32(transformer: WanTransformer3DModel) -> None:
    """Keep under autocast in float32 what costs nothing there: time path, patch embedding, QK norms, last projection.

    A float32 patch embedding makes the residual stream float32, since every Wan block returns the dtype it got. The
    error of the flow against full float32 falls from .0077 to .0006 (dim 256, 6 layers) at the same speed, and the
    bf16 rounding of the flow, which distribution matching would difference, is gone. Parameters and their names stay.
    """
    embedder = transformer.condition_embedder
    linears = [embedder.time_embedder.linear_1, embedder.time_embedder.linear_2, embedder.time_proj]
    for linear in (*linears, transformer.proj_out):
        linear.__class__ = _Float32Linear
    transformer.patch_embedding.__class__ = _Float32Conv3d
    for block in transformer.blocks:
        for attention in (block.attn1, block.attn2):
            attention.norm_q.__class__ = attention.norm_k.__class__ = _Float32RMSNorm


def choose_attention(transformer: WanTransformer3DModel, precision: str, device: torch.device) -> None:
    """Let attention of `transformer` on a CPU in bf16 be two products and a softmax; torch's choice anywhere else.

    The fused kernel's bf16 backward takes 177 of the 380 ms of a compiled training step (dim 256, 80 tokens, batch 32,
    2 cores with AMX); unfused, the whole step takes 203 ms.
    """
    if precision == "bf16" and device.type == "cpu":
        # Not by set_attention_backend, which changes the default of every other network in the process too.
        for block in transformer.blocks:
            for attention in (block.attn1, block.attn2):
                attention.processor._attention_backend = AttentionBackendName._NATIVE_MATH


def resolve_precision(precision: str, device: torch.device) -> str:
    """Turn "auto" into "bf16" where the device multiplies bfloat16 natively, else "fp32"."""
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bfloat16(device) else "fp32"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` has instructions for matrix products in bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_base(base: str) -> tuple[str, bool]:
    """Find the teacher's pipeline: a folder, one of the bundled weights, or a hub id.

    Returns:
        A folder and True, or a hub id and False.

    Raises:
        CheckpointError: no such folder, and the text cannot be a hub id.
    """
    folder, bundled = Path(base), default_bundle_path().parent / Path(base).name
    if folder.is_dir():
        return str(folder), True
    is_bundled_name = folder.parent == Path("weights")
    if is_bundled_name and bundled.is_dir():
        return str(bundled), True
    if is_bundled_name or base.count("/") != 1 or base.startswith((".", "/")) or base.endswith("/"):
        raise CheckpointError(f"no pipeline at {base}: name a diffusers Wan folder or a hub id")
    return base, False


def load_transformer(base: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """Load the transformer of a pipeline, complete or not at all.

    Raises:
        CheckpointError: missing, truncated or of another kind.
    """
    transformer: WanTransformer3DModel = load_part(WanTransformer3DModel, base, "transformer", torch_dtype=dtype)
    return transformer


def load_part(kind: Any, base: str, subfolder: str, **options: Any) -> Any:
    """Load one module of a pipeline with `kind.from_pretrained`.

    Raises:
        CheckpointError: missing, truncated or of another kind; missing tensors count, which the libraries only log.
    """
    return load_module(kind, resolve_base(base)[0], subfolder, **options)


def transformer_config(base: str) -> dict[str, Any]:
    """Read the architecture of a pipeline's transformer, without its weights.

    Raises:
        CheckpointError: the base or its config is missing or damaged.
    """
    return _read_part_config(WanTransformer3DModel, base, "transformer")


def _read_part_config(kind: Any, base: str, subfolder: str) -> dict[str, Any]:
    folder, is_local = resolve_base(base)
    try:
        config: dict[str, Any] = kind.load_config(folder, subfolder=subfolder, local_files_only=is_local)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{subfolder} of {folder} has no readable config") from error
    return config


def latent_shape(base: str, native: NativeConfig, num_channels: int, patch_size: tuple[int, ...]) -> tuple[int, ...]:
    """Return (C, F, H, W) of the latents of one native video.

    Raises:
        ConfigError: the size is not on the grid of VAE and patches.
        CheckpointError: the VAE's config cannot be read.
    """
    vae = _read_part_config(AutoencoderKLWan, base, "vae")
    # Published Wan2.1 folders leave these out; they are the defaults of the class.
    temporal, spatial = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    return latent_grid(native, num_channels, patch_size, temporal, spatial)


def latent_grid(
    native: NativeConfig, num_channels: int, patch_size: tuple[int, ...], temporal: int, spatial: int
) -> tuple[int, ...]:
    """Return (C, F, H, W) of the latents of one native video, for a VAE that shrinks by `temporal` and `spatial`.

    Raises:
        ConfigError: the size is not on the grid of VAE and patches.
    """
    for name, size, cell in (("height", native.height, patch_size[1]), ("width", native.width, patch_size[2])):
        if size % (spatial * cell):
            raise ConfigError(f"native.{name} must be a multiple of {spatial * cell}, got {size}")
    if (native.num_frames - 1) % temporal:
        raise ConfigError(f"native.num_frames must be 1 more than a multiple of {temporal}, got {native.num_frames}")
    num_latent_frames = (native.num_frames - 1) // temporal + 1
    return num_channels, num_latent_frames, native.height // spatial, native.width // spatial


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def load_parameters(parameters: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    """Set parameters to saved whole tensors, in place.

    Raises:
        CheckpointError: names or shapes differ.
    """
    if parameters.keys() != saved.keys():
        unmatched = sorted(parameters.keys() ^ saved.keys())
        raise CheckpointError(f"the saved network is another one: {len(unmatched)} names differ, as {unmatched[0]}")
    for name, parameter in parameters.items():
        if parameter.shape != saved[name].shape:
            raise CheckpointError(
                f"the saved network is another one: {name} has shape {tuple(saved[name].shape)}, "
                f"expected {tuple(parameter.shape)}"
            )
        parameter.copy_(sharded_like(saved[name], parameter))


def ema_decay(config: EmaConfig, update: int) -> float:
    """Return the share of the average that stays at update number `update`, counted from 1.

    kind "power": (1 - 1 / n)^(gamma + 1) at the n-th update after the start, which averages with weights that grow as
    n^gamma. Such weights have the standard deviation sqrt(gamma + 1) / ((gamma + 2) * sqrt(gamma + 3)) over n, and
    gamma is the number for which that is `length`: 6.94 for .1, 16.97 for .05.

    Source: EDM2 (arXiv 2312.02696), section 3.1, as rCM (arXiv 2510.08431) uses it.
    """
    num_averaged = update - config.start_update
    if num_averaged <= 0:
        return 0.0
    if config.kind == "constant":
        return config.decay
    return math.pow(1.0 - 1.0 / num_averaged, _power_exponent(config.length) + 1.0)


@functools.cache
def _power_exponent(length: float) -> float:
    low, high = 0.0, 1.0 / length  # the spread falls with gamma and is below 1 / gamma
    for _ in range(100):
        middle = 0.5 * (low + high)
        spread = math.sqrt(middle + 1.0) / ((middle + 2.0) * math.sqrt(middle + 3.0))
        low, high = (middle, high) if spread > length else (low, middle)
    return low


class Ema:
    """Moving average of a network's parameters in float32; before `start_update` it is a plain copy."""

    def __init__(self, network: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self.num_updates = 0
        self.shadow = {name: tensor.detach().float().clone() for name, tensor in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the network's current parameters; call once after each of its updates."""
        self.num_updates += 1
        # lerp towards the network; weight 1 copies.
        weight = 1.0 - ema_decay(self.config, self.num_updates)
        sources = [tensor.detach().float() for tensor in network.parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), sources, weight)

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs: the average and the count of updates."""
        return {"num_updates": self.num_updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved average, in place.

        Raises:
            CheckpointError: it belongs to another network.
        """
        if state["shadow"].keys() != self.shadow.keys():
            raise CheckpointError("the saved moving average belongs to another network")
        self.num_updates = int(state["num_updates"])
        for name, tensor in self.shadow.items():
            tensor.copy_(sharded_like(state["shadow"][name], tensor))
