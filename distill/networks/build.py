"""Student, teacher and critic: built from the base, frozen or trained, sharded, and called in mixed precision.

Knows no method and no training loop.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns, L prompt positions, D text width.
"""

import shutil
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from codmd_serve.device import DTYPES_BY_NAME
from codmd_serve.errors import ConfigError
from codmd_serve.sampler import Denoise
from codmd_serve.wan.attention import use_compact_cross_attention
from distill.config import DistillConfig
from distill.losses.dmd import guided_flow
from distill.networks.base import Base
from distill.networks.lora import (
    AdaptedCritic,
    Adapters,
    add_adapters,
    checkpoint_activations,
    critic_adapters,
    student_adapters,
)
from distill.networks.precision import keep_sensitive_parts_float32, unfuse_bf16_attention
from distill.networks.teacher import open_teacher
from distill.parallel.processes import SINGLE_PROCESS, Processes
from distill.parallel.sharding import load_sharded, split_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Networks:
    """The three networks of distribution matching; unless the config names others, all begin as the base.

    Attributes:
        student: trained, parameters in float32; of a LoRA student the adapters alone, which are always on.
        critic: trained, parameters in float32; a LoRA critic is the teacher with adapters that only its calls enable.
        teacher: frozen, float32 or bfloat16, of the base's architecture or another.
        precision: fp32, or bf16 for autocast in every call.
    """

    student: WanTransformer3DModel
    critic: WanTransformer3DModel | AdaptedCritic
    teacher: WanTransformer3DModel
    precision: str

    def transformers(self) -> list[WanTransformer3DModel]:
        """Return the distinct transformers: two with a LoRA critic, which shares the teacher's."""
        own = [] if isinstance(self.critic, AdaptedCritic) else [self.critic]
        return [self.student, self.teacher, *own]


def build_networks(
    config: DistillConfig, base: Base, device: torch.device, processes: Processes = SINGLE_PROCESS
) -> Networks:
    """Load trained student and critic, which begin as the base, and the frozen teacher.

    With `student_from` or `critic_from` that network then takes the weights of that file. A LoRA critic is of the
    teacher's architecture, any other of the base's.

    Args:
        config: dtypes and the options of sharding; its precision must be resolved.
        base: of the run.
        device: where the networks go.
        processes: the ranks that parameters are sharded over; groups of them split the tokens.

    Raises:
        CheckpointError: the base is missing or broken, or the weights to start from are or do not fit it.
        ConfigError: the base is not text to video.
    """
    origin = open_teacher(config, base)

    def build(role: str, dtype: str, is_trained: bool, adapters: Adapters | None = None) -> WanTransformer3DModel:
        def load() -> WanTransformer3DModel:
            transformer = (origin.load if role == "teacher" else base.load_transformer)(DTYPES_BY_NAME[dtype])
            source = {"student": config.student_from, "critic": config.critic_from}.get(role, "")
            return base.load_start(transformer, source, f"{role}_from") if source else transformer

        def prepare(transformer: WanTransformer3DModel) -> None:
            # Wan has no dropout; eval makes that independent of a base whose config says otherwise.
            transformer.eval().requires_grad_(is_trained)
            if base.has_blocks:
                _prepare_blocks(transformer, config, device, adapters)
            _add_head(transformer, config, base, role)

        if processes.mesh is None:
            network = load()
            prepare(network)
            network.to(device)
        else:
            gathered = config.gather_precision(role, config.precision)
            # Of rank 0 alone: to know the architecture of a file, it has to be read.
            architecture = processes.broadcast_from_rank0(
                lambda: origin.architecture if role == "teacher" else base.transformer_config
            )
            network = load_sharded(load, prepare, architecture, processes, gathered)
        if config.activation_checkpointing and (is_trained or adapters is not None):
            checkpoint_activations(network, None if adapters is None else adapters.switch)
        return network

    of_critic, of_student = critic_adapters(config), student_adapters(config)
    teacher = build("teacher", config.frozen_dtype("teacher"), is_trained=False, adapters=of_critic)
    if of_student is None:
        student = build("student", "fp32", is_trained=True)
    else:
        student = build("student", config.frozen_dtype("student"), is_trained=False, adapters=of_student)
    critic: WanTransformer3DModel | AdaptedCritic
    critic = build("critic", "fp32", is_trained=True) if of_critic is None else AdaptedCritic(teacher, of_critic.switch)
    networks = Networks(student=student, critic=critic, teacher=teacher, precision=config.precision)
    if config.context_parallel > 1:
        split_tokens(networks.transformers(), config, processes)
    return networks


def _add_head(transformer: WanTransformer3DModel, config: DistillConfig, base: Base, role: str) -> None:
    """Give the critic a discriminator's head where the method wants one; a LoRA critic is the teacher's module."""
    head = config.method_settings.critic_head()
    if head is not None and role == ("teacher" if config.lora_critic_rank else "critic"):
        base.add_head(transformer, head)


def _prepare_blocks(
    transformer: WanTransformer3DModel, config: DistillConfig, device: torch.device, adapters: Adapters | None
) -> None:
    keep_sensitive_parts_float32(use_compact_cross_attention(transformer), config.residual_dtype)
    if config.context_parallel == 1:  # context parallelism has an attention of its own
        unfuse_bf16_attention(transformer, config.precision, device)
    if adapters is not None:
        add_adapters(transformer, adapters.switch, adapters.rank, adapters.alpha, adapters.role)


def compile_blocks(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    """Apply torch.compile to every block in place; compilation happens at the first call, parameter names stay.

    On two CPU cores an iteration of the embedded teacher takes 0.77 of its eager time.
    """
    for block in transformer.blocks:
        block.compile()
    return transformer


def check_compiler(compiler: str, device: torch.device) -> None:
    """Check before a run starts that `compile_blocks` will work on `device`.

    Args:
        compiler: name of the C++ compiler that torch.compile calls on a CPU.
        device: where the networks will be.

    Raises:
        ConfigError: `device` is a CPU and there is no such compiler.
    """
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(f"--compile needs a C++ compiler, {compiler} is not there; install it or leave --compile out")


def denoiser(transformer: WanTransformer3DModel | AdaptedCritic, precision: str) -> Denoise:
    """Wrap a network as the sampler's `denoise`, in bf16 autocast when `precision` is "bf16".

    Each call opens an autocast region of its own. One region around a rollout would reuse the bf16 casts that its
    no-grad steps made without gradient, and the exit step would silently train nothing.
    """
    return _called(transformer, precision)


def classifier(critic: WanTransformer3DModel | AdaptedCritic, precision: str) -> Denoise:
    """Wrap a critic with a head as the discriminator: arguments as `denoise`, returns logits (B,) float32."""
    return _called(critic, precision, classify=True)


def _called(transformer: WanTransformer3DModel | AdaptedCritic, precision: str, **options: bool) -> Denoise:
    # FSDP2 frees gathered weights after each block; autocast's cache would keep the bf16 casts of all of them.
    keeps_casts = not isinstance(
        transformer.base if isinstance(transformer, AdaptedCritic) else transformer, FSDPModule
    )

    def denoise(latents: Tensor, timestep_B: Tensor, prompt_embeds_BLD: Tensor) -> Tensor:
        is_on, device_type = precision == "bf16", latents.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=is_on, cache_enabled=keeps_casts):
            output: Tensor = transformer(latents, timestep_B, prompt_embeds_BLD, return_dict=False, **options)[0]
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
    """Return the guided flow of the teacher; prompt and negative prompt are one call of twice the batch.

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


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradient, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
