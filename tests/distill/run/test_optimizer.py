"""AdamW by torch's fused kernel: the default's numbers but for the last bit, and its state."""

import torch
from torch import nn

from distill.config import DistillConfig, with_overrides
from distill.run.optimizer import new_moment, new_optimizer

NUM_UPDATES = 20


def updated(config: DistillConfig, *, is_fused: bool) -> tuple[nn.Parameter, torch.optim.AdamW]:
    """A parameter after some updates with gradients of the same random numbers."""
    rng = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 100, generator=rng))
    optimizer = new_optimizer([parameter], 1e-4, config)
    assert optimizer.defaults["fused"] is True
    if not is_fused:
        settings = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
        optimizer = torch.optim.AdamW([parameter], **settings)
    for _ in range(NUM_UPDATES):
        parameter.grad = torch.randn(parameter.shape, generator=rng)
        optimizer.step()
    return parameter, optimizer


def test_fused_updates_are_those_of_the_default_but_for_the_last_bit(tiny_config: DistillConfig) -> None:
    for betas in ("[0.9,0.999]", "[0.0,0.999]"):
        config = with_overrides(tiny_config, [f"optimizer.betas={betas}"])
        (got, fused), (want, plain) = (updated(config, is_fused=is_fused) for is_fused in (True, False))
        error = float((got - want).detach().norm() / want.detach().norm())
        # Measured: 6e-10 and 1e-9; the parameters moved by 2e-3.
        assert error < 1e-8
        assert float((got - want).detach().abs().max()) <= 2.0**-22
        states = [one.state[parameter] for one, parameter in ((fused, got), (plain, want))]
        assert states[0].keys() == states[1].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert float(states[0]["step"]) == float(states[1]["step"]) == NUM_UPDATES


def test_moments_of_a_checkpoint_are_made_as_the_optimizer_makes_them(tiny_config: DistillConfig) -> None:
    parameter, optimizer = updated(tiny_config, is_fused=True)
    for key, value in optimizer.state[parameter].items():
        made = new_moment(key, parameter)
        assert (made.shape, made.dtype, made.device) == (value.shape, value.dtype, value.device), key
        assert not made.requires_grad and not made.any()
