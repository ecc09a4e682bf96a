"""The network of student and critic in an analytic world: a residual MLP on the flattened latents.

Legend: B batch, N numbers of one sample, P captions, E width of the condition.
"""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS

NUM_PHASES = 16
CAPTION_SCALE = 3.0
# Not a buffer: `from_pretrained` leaves buffers that are not in the file empty.
PHASES = torch.linspace(math.log(0.5), math.log(60.0), NUM_PHASES).exp()


class AnalyticNetwork(ModelMixin, ConfigMixin):
    """Predicts the flow, with the call of a Wan transformer; about 194,000 parameters at the default width.

    What a unit Gaussian's flow would be is added in closed form, (2 sigma - 1) / q x with q = (1 - sigma)^2 + sigma^2,
    so that the layers learn the rest; noise level and caption scale and shift every block's input.

    Args:
        size: N.
        num_embeds: P + 1, the width of the one-hot prompt embeddings.
        width: of the residual stream.
        num_blocks: residual blocks.
        condition_width: E.
    """

    @register_to_config
    def __init__(
        self, size: int, num_embeds: int, width: int = 128, num_blocks: int = 2, condition_width: int = 48
    ) -> None:
        super().__init__()
        self.first = nn.Linear(size, width)
        self.caption = nn.Linear(num_embeds, condition_width, bias=False)
        self.time = nn.Sequential(
            nn.Linear(2 * NUM_PHASES, condition_width), nn.SiLU(), nn.Linear(condition_width, condition_width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(num_blocks))
        self.modulations = nn.ModuleList(nn.Linear(condition_width, 2 * width) for _ in range(num_blocks))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(num_blocks))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(num_blocks))
        self.last = nn.Linear(width, size)
        for layer in (*self.modulations, self.last):
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Return (flow,) of latents (B, C, F, H, W) at timestep (B,) = 1000 sigma; prompts are (B, 1, P + 1)."""
        del return_dict
        sigma = (timestep / NUM_TRAIN_TIMESTEPS)[:, None]
        latents = hidden_states.flatten(1)
        variance = (1 - sigma).square() + sigma.square()
        angles = sigma * PHASES
        condition = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        condition = nn.functional.silu(condition + CAPTION_SCALE * self.caption(encoder_hidden_states[:, 0]))
        stream = self.first(latents / variance.sqrt())
        for norm, modulation, up, down in zip(self.norms, self.modulations, self.up, self.down, strict=True):
            scale, shift = modulation(condition).chunk(2, dim=1)
            stream = stream + down(nn.functional.silu(up(norm(stream) * (1 + scale) + shift)))
        flow = (2 * sigma - 1) / variance * latents + self.last(stream) / variance.sqrt()
        return (flow.reshape(hidden_states.shape),)
