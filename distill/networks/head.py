"""DMD2's discriminator: a head on the features of the critic's middle block, a part of the critic's own module.

So it is sharded, checkpointed and updated with the critic. Knows neither losses nor the training loop.

Legend: B batch, S tokens, d width of the transformer, Q queries, w width of the head.
"""

import math
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional

from distill.settings import HeadConfig

# Of the generator that draws the head's first weights: all ranks and all runs start with the same ones.
SEED = 20


class DiscriminatorHead(nn.Module):
    """Pools tokens by attention with Q learned queries, then a layer of w units, then one logit; in float32.

    Source: DMD2 (arXiv 2405.14867) has strided convolutions on the bottleneck of a UNet. A transformer has none: here
    learned queries pool the tokens of the middle block, as in the GAN of Self-Forcing (arXiv 2506.08009).
    """

    def __init__(self, dim: int, num_blocks: int, config: HeadConfig, device: torch.device) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        rng = torch.Generator().manual_seed(SEED)

        def drawn(*shape: int) -> nn.Parameter:
            # As nn.Linear, but from a generator of its own.
            values = (2.0 * torch.rand(shape, generator=rng) - 1.0) / math.sqrt(shape[-1])
            return nn.Parameter(values.to(device))

        self.queries = drawn(config.queries, dim)
        self.hidden_weight = drawn(config.width, config.queries * dim)
        self.hidden_bias = nn.Parameter(torch.zeros(config.width, device=device))
        self.logit_weight = drawn(1, config.width)
        self.logit_bias = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, features_BSd: Tensor) -> Tensor:
        """Return a logit of each sample, (B,) float32."""
        with torch.autocast(features_BSd.device.type, enabled=False):
            tokens = functional.layer_norm(features_BSd.float(), features_BSd.shape[-1:])
            attention_BSQ = functional.linear(tokens, self.queries).softmax(dim=1)
            pooled_BQd = attention_BSQ.mT @ tokens
            hidden = functional.linear(pooled_BQd.flatten(1), self.hidden_weight, self.hidden_bias)
            return functional.linear(functional.silu(hidden), self.logit_weight, self.logit_bias)[:, 0]


class HeadedTransformer(WanTransformer3DModel):  # type: ignore[misc]  # diffusers has no types
    """A transformer with a head; made by `add_head`.

    Attributes:
        gan_head: on the tokens after its first num_blocks blocks.
    """

    gan_head: DiscriminatorHead
    blocks: nn.ModuleList

    def forward(self, *args: Any, classify: bool = False, **options: Any) -> Any:
        """Call the transformer; with `classify`, return (logits (B,),) after the blocks that the head needs.

        The head runs inside this call, while FSDP holds the layers around the blocks gathered.
        """
        if not classify:
            return super().forward(*args, **options)
        features: list[Tensor] = []
        # The last norm sees what the last block returns.
        handle = self.norm_out.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0]))
        blocks, self.blocks = self.blocks, self.blocks[: self.gan_head.num_blocks]
        try:
            super().forward(*args, **options)
        finally:
            self.blocks = blocks
            handle.remove()
        return (self.gan_head(features[0]),)


def add_head(transformer: WanTransformer3DModel, config: HeadConfig) -> None:
    """Add a head with trained parameters to a transformer, in place; on the meta device too."""
    assert not hasattr(transformer, "gan_head")
    num_blocks = head_blocks(len(transformer.blocks), config)
    dim = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    device = transformer.scale_shift_table.device
    transformer.__class__ = HeadedTransformer
    transformer.gan_head = DiscriminatorHead(dim, num_blocks, config, device)


def head_blocks(num_layers: int, config: HeadConfig) -> int:
    """Return after how many of the blocks the head reads."""
    return max(1, round(config.depth * num_layers))


def head_parameters(dim: int, config: HeadConfig) -> int:
    """Return the number of parameters of a head on a transformer of width `dim`."""
    pooled = config.queries * dim
    return pooled + config.width * pooled + config.width + config.width + 1
