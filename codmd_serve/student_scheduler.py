"""A diffusers scheduler with a student's steps: the stock WanPipeline then samples a student as sampler.py does.

Not in codmd_serve.wan: diffusers takes any class from a package named like one of its pipelines (wan) for its own. A
pipeline saved again would then name a class that diffusers does not have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from codmd_serve.errors import ConfigError
from codmd_serve.grid import check_step_grid
from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, add_noise, flow_to_x0


@dataclass
class StudentSchedulerOutput(BaseOutput):
    """The state after a step.

    Attributes:
        prev_sample: (B, C, F, H, W), float32 or wider; after the last step the clean latents.
    """

    prev_sample: Tensor


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """The fixed step grid of a student; equals `codmd_serve.sampler.rollout` for the same noise.

    Stock pipelines do not pass their generator to a scheduler. So the noise of the later steps comes from the attribute
    `generator`, and while that is None from torch's global generator, as does the initial noise of a pipeline that is
    called without a generator. `torch.manual_seed(seed)`, or one CPU generator for both, gives the server's noise.

    Args:
        sigmas: num_steps + 1 levels, descending, the last 0.0.
        timesteps: num_steps numbers fed to the network.
        sampler: `sde` or `ode`.

    Raises:
        ConfigError: a step grid that cannot be sampled.

    Source: scheduler_config.json of a folder that `codmd-distill export --format pipeline` wrote.
    """

    order = 1
    _compatibles: list[str] = []  # noqa: RUF012 - the mixin's own attribute

    def __init__(self, sigmas: Sequence[float], timesteps: Sequence[float], sampler: str = "sde") -> None:
        check_step_grid(sigmas, timesteps, sampler)
        self.register_to_config(
            sigmas=list(sigmas),
            timesteps=list(timesteps),
            sampler=sampler,
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        )
        # Pipelines that scale their first noise multiply by this; WanPipeline does not.
        self.init_noise_sigma = float(sigmas[0])
        self.generator: torch.Generator | list[torch.Generator] | None = None
        self.set_timesteps(len(timesteps))

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Restart at the first step.

        Args:
            num_inference_steps: must be the student's number of steps.
            device: of `timesteps`, (num_steps,) float32; `sigmas` stays on the CPU.

        Raises:
            ConfigError: another number of steps.
        """
        num_steps = len(self.config.timesteps)
        if num_inference_steps != num_steps:
            raise ConfigError(f"this student has {num_steps} steps: pass num_inference_steps={num_steps}")
        self.num_inference_steps = num_steps
        self.timesteps = torch.tensor(self.config.timesteps, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor(self.config.sigmas, dtype=torch.float32)
        self.step_index: int | None = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the index of the next step; pipelines call it to avoid the search by timestep."""
        self.step_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the state unchanged: flow matching scales no input."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> StudentSchedulerOutput | tuple[Tensor]:
        """Take one denoising step.

        Args:
            model_output: flow_pred (B, C, F, H, W), any floating dtype.
            timestep: an entry of `timesteps`; read only while the index of the next step is not set.
            sample: the input of the network, same shape.
            generator: of the fresh noise of `sde`; None is the attribute `generator`.
            return_dict: False returns a tuple.

        Returns:
            The next state, float32 or wider; after the last step x0_pred.

        Raises:
            ConfigError: the timestep is not in the grid.
        """
        step_index = self._index_of(float(timestep)) if self.step_index is None else self.step_index
        # Python floats of the config, as in the sampler; the tensor `sigmas` is rounded to float32.
        sigma, next_sigma = self.config.sigmas[step_index : step_index + 2]
        latents = flow_to_x0(sample, model_output, sigma)
        if next_sigma > 0.0:
            if self.config.sampler == "sde":
                drawn_by = self.generator if generator is None else generator
                noise = randn_tensor(tuple(sample.shape), generator=drawn_by, device=sample.device, dtype=torch.float32)
                latents = add_noise(latents, noise, next_sigma)
            else:
                latents = sample.to(latents.dtype) + (next_sigma - sigma) * model_output.to(latents.dtype)
        self.step_index = step_index + 1
        return StudentSchedulerOutput(prev_sample=latents) if return_dict else (latents,)

    def _index_of(self, timestep: float) -> int:
        fed = self.timesteps.tolist()
        if timestep not in fed:
            raise ConfigError(f"timestep must be one of {fed}, got {timestep}")
        return int(fed.index(timestep))

    def __len__(self) -> int:
        return NUM_TRAIN_TIMESTEPS
