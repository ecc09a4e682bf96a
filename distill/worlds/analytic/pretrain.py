"""The network that student and critic start from in an analytic world: regressed on the exact flow.

Legend: B batch, P captions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, add_noise, shift_sigma
from distill.worlds.analytic.network import AnalyticNetwork
from distill.worlds.analytic.world import GaussianWorld

LEAST_SIGMA = 0.01
WARMUP_UPDATES = 200
EMA_WEIGHT, EMA_FROM = 0.004, 300


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Settings of the regression.

    Attributes:
        updates: of AdamW.
        batch_size: samples of an update; one in 16 of them is pure noise.
        learning_rate: highest; it falls linearly to 1% over the last two fifths.
        shift: of the noise levels.
        uncaptioned: share of samples without caption, which guidance needs.
        width: of the network.
        seed: of all random numbers.
    """

    updates: int = 3300
    batch_size: int = 128
    learning_rate: float = 1e-3
    shift: float = 3.0
    uncaptioned: float = 0.1
    width: int = 128
    seed: int = 0


def new_network(world: GaussianWorld, width: int) -> AnalyticNetwork:
    """Return an untrained network for a world."""
    network: AnalyticNetwork = AnalyticNetwork(world.means.shape[1], world.num_captions + 1, width)
    return network


def pretrain(world: GaussianWorld, config: PretrainConfig) -> tuple[AnalyticNetwork, float]:
    """Regress a network on the exact flow of a world, with and without caption.

    Returns:
        The moving average of the network, and the mean squared error of its flow on the last batch.
    """
    rng = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = new_network(world, config.width)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = [parameter.detach().clone() for parameter in network.parameters()]
    for update in range(config.updates):
        left = 1 - update / config.updates
        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, (update + 1) / WARMUP_UPDATES, left * 2.5)
        loss = flow_error(network, world, config, rng)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(
            average,
            [parameter.detach() for parameter in network.parameters()],
            EMA_WEIGHT if update > EMA_FROM else 1.0,
        )
    with torch.no_grad():
        for parameter, mean in zip(network.parameters(), average, strict=True):
            parameter.copy_(mean)
        return network, float(flow_error(network, world, config, rng))


def flow_error(network: AnalyticNetwork, world: GaussianWorld, config: PretrainConfig, rng: torch.Generator) -> Tensor:
    """Return the mean squared error of the flow on one batch of fresh samples."""
    size = config.batch_size
    caption_B = torch.randint(world.num_captions, (size,), generator=rng)
    x0 = world.sample(caption_B, rng)
    sigma_B = shift_sigma(torch.rand(size, generator=rng), config.shift).clamp(LEAST_SIGMA, 1.0)
    sigma_B[: size // 16] = 1.0
    latents = add_noise(x0, torch.randn(x0.shape, generator=rng), sigma_B)
    is_free = torch.rand(size, generator=rng) < config.uncaptioned
    embeds = world.embeds(torch.where(is_free, world.num_captions, caption_B))
    (flow,) = network(latents, NUM_TRAIN_TIMESTEPS * sigma_B, embeds)
    error: Tensor = (flow - world.flow(latents, sigma_B, embeds)).square().mean()
    return error
