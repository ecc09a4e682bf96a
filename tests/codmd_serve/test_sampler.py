"""The rollout against closed forms; the network is a linear function whose every step can be written down."""

from typing import Any

import pytest
import torch
from torch import Tensor

from codmd_serve.errors import CancelledError, ConfigError
from codmd_serve.grid import wan_1_3b_grid, wan_14b_grid
from codmd_serve.sampler import rollout
from codmd_serve.schedule import add_noise

SIGMAS = (1.0, 0.75, 0.5, 0.25, 0.0)
TIMESTEPS = (1000.0, 750.0, 500.0, 250.0)
EMBEDS = torch.zeros(2, 3, 4)


def draws(num_steps: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_steps, 2, 3, 2, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


def flow_towards(x0: Tensor, noise: Tensor) -> Any:
    return lambda latents, timestep, embeds: noise - x0


def test_sde_renoises_the_prediction_with_its_own_draw() -> None:
    noise, seen = draws(), []

    def denoise(latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        seen.append(latents)
        return 0.5 * latents

    result = rollout(denoise, noise, EMBEDS, SIGMAS, TIMESTEPS)
    expected = noise[0]
    for k in range(4):
        torch.testing.assert_close(seen[k], expected)
        x0_pred = expected - SIGMAS[k] * 0.5 * expected
        expected = add_noise(x0_pred, noise[k + 1], SIGMAS[k + 1]) if k < 3 else x0_pred
    torch.testing.assert_close(result, x0_pred)


def test_ode_recovers_x0_exactly_when_the_flow_is_straight() -> None:
    noise = draws()[:1]
    x0 = torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(9))
    result = rollout(flow_towards(x0, noise[0]), noise, EMBEDS, SIGMAS, TIMESTEPS, sampler="ode")
    torch.testing.assert_close(result, x0, rtol=0, atol=1e-6)


def test_ode_with_many_steps_approaches_the_exact_solution() -> None:
    # For N(0, s^2) data the flow is linear and the ODE scales the start by s exactly.
    scale, num_steps = 0.3, 400
    sigmas = [1 - k / num_steps for k in range(num_steps)] + [0.0]

    def denoise(latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        sigma = float(timestep[0]) / 1000
        variance = (1 - sigma) ** 2 * scale**2 + sigma**2
        return latents * (sigma - (1 - sigma) * scale**2) / variance

    noise = draws(1)
    timesteps = [1000 * sigma for sigma in sigmas[:-1]]
    result = rollout(denoise, noise, EMBEDS, sigmas, timesteps, sampler="ode")
    torch.testing.assert_close(result, scale * noise[0], rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_network_is_fed_the_grid_as_float32(sampler: str) -> None:
    seen = []

    def denoise(latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        assert timestep.dtype == torch.float32 and timestep.shape == (2,) and embeds is EMBEDS
        seen.append(timestep.tolist())
        return torch.zeros_like(latents)

    grid = wan_1_3b_grid()
    rollout(denoise, draws(), EMBEDS, grid.sigmas, grid.timesteps, sampler=sampler)
    assert seen == [[1000.0] * 2, [900.0] * 2, [757.0] * 2, [522.0] * 2]


def test_state_stays_float32_around_a_half_precision_network() -> None:
    def denoise(latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        assert latents.dtype == torch.float32
        return latents.to(torch.bfloat16)

    assert rollout(denoise, draws(dtype=torch.bfloat16), EMBEDS, SIGMAS, TIMESTEPS).dtype == torch.float32


def test_first_level_below_one_scales_the_start() -> None:
    starts = []

    def denoise(latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        starts.append(latents)
        return torch.zeros_like(latents)

    noise = draws(1)
    rollout(denoise, noise, EMBEDS, (0.9, 0.0), (900.0,))
    torch.testing.assert_close(starts[0], 0.9 * noise[0])


@pytest.mark.parametrize("exit_step", [0, 2, 3])
def test_only_the_exit_step_carries_gradient_and_nothing_runs_after_it(exit_step: int) -> None:
    weights = [torch.tensor(0.5, requires_grad=True) for _ in range(4)]
    modes = []

    def denoise(latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return weights[len(modes) - 1] * latents

    result = rollout(denoise, draws(), EMBEDS, SIGMAS, TIMESTEPS, exit_step=exit_step, grad_exit_step=True)
    result.sum().backward()
    assert modes == [False] * exit_step + [True]
    assert [weight.grad is not None for weight in weights] == [k == exit_step for k in range(4)]


def test_no_gradient_unless_asked_for() -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    result = rollout(lambda latents, timestep, embeds: weight * latents, draws(), EMBEDS, SIGMAS, TIMESTEPS)
    assert not result.requires_grad and torch.is_grad_enabled()


def test_early_exit_needs_only_the_noise_it_uses() -> None:
    full = rollout(lambda x, t, e: 0.1 * x, draws(), EMBEDS, SIGMAS, TIMESTEPS, exit_step=1)
    short = rollout(lambda x, t, e: 0.1 * x, draws()[:2], EMBEDS, SIGMAS, TIMESTEPS, exit_step=1)
    assert torch.equal(full, short)


def test_on_step_sees_each_prediction_and_may_cancel() -> None:
    seen: list[int] = []

    def on_step(step_index: int, x0_pred: Tensor) -> None:
        assert x0_pred.shape == (2, 3, 2, 4, 5) and not x0_pred.requires_grad
        seen.append(step_index)
        if step_index == 1:
            raise CancelledError("stop")

    with pytest.raises(CancelledError):
        rollout(lambda x, t, e: x, draws(), EMBEDS, SIGMAS, TIMESTEPS, on_step=on_step)
    assert seen == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigmas": (1.0, 0.5, 0.0)}, "one entry more than timesteps"),
        ({"sigmas": (1.0, 0.5, 0.75, 0.25, 0.0)}, "sigmas must descend"),
        ({"sigmas": (1.0, 0.75, 0.5, 0.25, 0.01)}, "exactly 0.0"),
        ({"sigmas": (float("nan"), 0.75, 0.5, 0.25, 0.0)}, "sigmas must descend"),
        ({"timesteps": (float("inf"), 1.0, 1.0, 1.0)}, "timesteps must be finite"),
        ({"sampler": "euler"}, "sampler must be one of sde, ode"),
        ({"exit_step": 4}, "exit_step must be in 0..3"),
        ({"exit_step": -1}, "exit_step must be in 0..3"),
        ({"noise": draws(3)}, "noise must be"),
        ({"noise": draws()[0]}, "noise must be"),
    ],
)
def test_rollout_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "noise": draws(),
        "prompt_embeds": EMBEDS,
        "sigmas": SIGMAS,
        "timesteps": TIMESTEPS,
        **change,
    }
    with pytest.raises(ConfigError, match=message):
        rollout(lambda x, t, e: x, **arguments)


def test_published_grids_are_pinned() -> None:
    # Upstream rounds its shift-8 table to float32; these are the six digits that its authors' code prints.
    assert [round(sigma, 6) for sigma in wan_1_3b_grid().sigmas] == [1.0, 0.899851, 0.756757, 0.521739, 0.0]
    assert [round(timestep, 1) for timestep in wan_14b_grid().timesteps] == [1000.0, 937.5, 833.3, 625.0]
    grid = wan_14b_grid()
    assert all(sigma == pytest.approx(t / 1000) for sigma, t in zip(grid.sigmas, grid.timesteps, strict=False))
