"""Samples the base of a student as diffusers.WanPipeline does: its own scheduler, many steps, with guidance.

Knows neither requests nor the student. Its text encoder and VAE are the student's.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns, L prompt positions, D width.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from codmd_serve.errors import CheckpointError
from codmd_serve.files import first_line
from codmd_serve.sampler import OnStep
from codmd_serve.schedule import flow_to_x0
from codmd_serve.textfiles import read_json_object, shown
from codmd_serve.wan.checkpoint import Bundle, load_module
from codmd_serve.wan.hub import INDEX_FILE, find_pipeline
from codmd_serve.wan.text import fingerprint
from codmd_serve.wan.transformer import Attend, FewStepTransformer, PromptCache

SPEC_FILE = "teacher.json"
PARTS = ("scheduler", "transformer", "vae")
MAX_STEPS = 1000
MAX_GUIDANCE_SCALE = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSpec:
    """The content of teacher.json in a base pipeline: how to sample it. Without the file: Wan's published settings.

    Attributes:
        num_steps: of the scheduler.
        guidance_scale: uncond + guidance_scale * (cond - uncond); 1 is no guidance.
        negative_prompt: of the unconditional branch.
    """

    num_steps: int = 50
    guidance_scale: float = 5.0
    negative_prompt: str = ""


@dataclass(frozen=True, slots=True)
class GuidedPrompt:
    """Cross-attention caches of a prompt and of the negative prompt; None without guidance."""

    prompt: PromptCache
    negative: PromptCache | None


def read_teacher_spec(base: Path) -> TeacherSpec:
    """Read teacher.json of a base pipeline.

    Raises:
        CheckpointError: malformed, with unknown fields or numbers out of range.
    """
    path = base / SPEC_FILE
    if not path.exists():
        return TeacherSpec()
    data = read_json_object(path, CheckpointError)
    try:
        spec = TeacherSpec(**data)
    except TypeError as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error
    if type(spec.num_steps) is not int or not 1 <= spec.num_steps <= MAX_STEPS:
        raise CheckpointError(f"{path}: num_steps must be in 1..{MAX_STEPS}, got {shown(spec.num_steps)}")
    scale = spec.guidance_scale
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
    if not is_number or not 0.0 <= scale <= MAX_GUIDANCE_SCALE:
        raise CheckpointError(f"{path}: guidance_scale must be in 0..{MAX_GUIDANCE_SCALE:g}, got {shown(scale)}")
    if not isinstance(spec.negative_prompt, str):
        raise CheckpointError(f"{path}: negative_prompt must be text, got {shown(spec.negative_prompt)}")
    return spec


class Teacher:
    """The transformer of a base pipeline with its scheduler. Eager; used from one thread.

    Args:
        name: as clients call it.
        spec: how to sample it.
        transformer: of the base; emptied.
        scheduler: of the base.
        attend: the attention kernel.

    Attributes:
        fingerprint: hash of weights and spec. The hash of the student's bundle covers scheduler, text encoder and VAE.

    Source: diffusers, WanPipeline.__call__, without its second transformer and its image conditioning.
    """

    def __init__(
        self, name: str, spec: TeacherSpec, transformer: WanTransformer3DModel, scheduler: Any, attend: Attend
    ) -> None:
        self.name, self.spec, self._scheduler = name, spec, scheduler
        self.fingerprint = hashlib.sha256(f"{fingerprint(transformer)}\n{spec}".encode()).hexdigest()[:32]
        self._fresh_scheduler()
        self.transformer = FewStepTransformer(transformer, self._scheduler.timesteps.tolist(), attend=attend)

    def encode(self, embeds_BLD: Tensor, negative_embeds_BLD: Tensor) -> GuidedPrompt:
        """Compute the cross-attention caches of a prompt.

        Args:
            embeds_BLD, negative_embeds_BLD: of PromptEmbedder.
        """
        encode = self.transformer.encode_prompt
        negative = encode(negative_embeds_BLD) if self.spec.guidance_scale != 1.0 else None
        return GuidedPrompt(encode(embeds_BLD), negative)

    @torch.inference_mode()
    def __call__(self, noise: Tensor, prompt: GuidedPrompt, on_step: OnStep | None = None) -> Tensor:
        """Denoise.

        Args:
            noise: (1, B, C, F, H, W) float32 on the device: a student's noise of the same seed begins with it.
            prompt: of the same B prompts.
            on_step: as in `sampler.rollout`.

        Returns:
            Clean latents, (B, C, F, H, W) float32.
        """
        scheduler = self._fresh_scheduler()
        latents = noise[0].float()
        for step_index, timestep in enumerate(scheduler.timesteps):
            flow = self._flow(latents, step_index, prompt)
            if on_step is not None:
                on_step(step_index, flow_to_x0(latents, flow, float(scheduler.sigmas[step_index])))
            latents = scheduler.step(flow, timestep, latents, return_dict=False)[0]
        return latents

    def _flow(self, latents: Tensor, step_index: int, prompt: GuidedPrompt) -> Tensor:
        flow: Tensor = self.transformer(latents, step_index, prompt.prompt).float()
        if prompt.negative is None:
            return flow
        negative: Tensor = self.transformer(latents, step_index, prompt.negative).float()
        return negative + self.spec.guidance_scale * (flow - negative)

    def _fresh_scheduler(self) -> Any:
        # A multistep scheduler keeps the outputs of earlier steps: every video starts with an empty one.
        self._scheduler = type(self._scheduler).from_config(self._scheduler.config)
        self._scheduler.set_timesteps(self.spec.num_steps)
        return self._scheduler


def load_teacher(bundle: Bundle, dtype: torch.dtype, device: torch.device, attend: Attend) -> Teacher:
    """Load the teacher of a student bundle: transformer and scheduler of its base.

    Args:
        bundle: loaded.
        dtype: of the transformer.
        device: where it goes.
        attend: the attention kernel.

    Raises:
        CheckpointError: the base has no such parts, two transformers, or a teacher.json that is malformed.
    """
    base, _ = find_pipeline(bundle.spec.base, [bundle.path.resolve()], PARTS)
    spec = read_teacher_spec(base)
    index = read_json_object(base / INDEX_FILE, CheckpointError)
    second = index.get("transformer_2")
    if second is not None and second != [None, None]:
        raise CheckpointError(f"{base} has two transformers: its teacher cannot be served")
    scheduler = _load_scheduler(base, index)
    transformer = load_module(WanTransformer3DModel, base, "transformer", torch_dtype=dtype)
    if transformer.config.in_channels != bundle.vae.config.z_dim:
        raise CheckpointError(f"the transformer of {base} does not fit its VAE")
    transformer.requires_grad_(False).eval().to(device)
    name = bundle.spec.base_model or base.name
    name = name if name != bundle.path.resolve().name else f"{name}-teacher"
    return Teacher(name, spec, transformer, scheduler, attend)


def _load_scheduler(base: Path, index: dict[str, Any]) -> Any:
    entry = index.get("scheduler")
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else ""
    kind = getattr(diffusers, name, None) if name.isidentifier() else None
    if kind is None or not hasattr(kind, "set_timesteps"):
        raise CheckpointError(f"{base / INDEX_FILE} names no scheduler of diffusers, got {shown(entry)}")
    try:
        scheduler = kind.from_pretrained(base, subfolder="scheduler", local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"scheduler of {base} cannot be used: {first_line(error)}") from error
    if not name.startswith("FlowMatch") and scheduler.config.get("prediction_type") != "flow_prediction":
        raise CheckpointError(f"scheduler of {base} is not one of a flow, which is what Wan's transformer predicts")
    return scheduler
