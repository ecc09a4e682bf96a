"""Step grids: the noise levels at which a student stops, and the published ones; knows no tensors.

Legend: sigma is the share of noise in a state, 1 is noise alone; a timestep is the number that the network is fed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from codmd_serve.errors import ConfigError

MAX_TIMESTEP = 1000.0
SAMPLERS = ("sde", "ode")


def check_step_grid(sigmas: Sequence[float], timesteps: Sequence[float], sampler: str) -> None:
    """Check that a step grid can be sampled.

    Args:
        sigmas: num_steps + 1 noise levels.
        timesteps: num_steps numbers fed to the network.
        sampler: `sde` or `ode`.

    Raises:
        ConfigError: unknown sampler, lengths that do not match, levels outside [0, 1], not strictly descending or not
            ending in 0, timesteps that are not finite.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if not timesteps or len(sigmas) != len(timesteps) + 1:
        raise ConfigError(
            f"sigmas must have one entry more than timesteps and at least two, got {len(sigmas)} and {len(timesteps)}"
        )
    descending = all(high > low for high, low in pairwise(sigmas))
    if not (descending and sigmas[0] <= 1.0 and sigmas[-1] == 0.0):
        raise ConfigError(f"sigmas must descend from at most 1.0 to exactly 0.0, got {list(sigmas)}")
    if not all(math.isfinite(timestep) for timestep in timesteps):
        raise ConfigError(f"timesteps must be finite, got {list(timesteps)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepGrid:
    """The denoising steps that a student was trained for.

    Attributes:
        sigmas: num_steps + 1 noise levels, descending, the last 0.0.
        timesteps: num_steps numbers fed to the network.

    Raises:
        ConfigError: as `check_step_grid`.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        check_step_grid(self.sigmas, self.timesteps, SAMPLERS[0])


def _table_sigmas(*entries: float) -> tuple[float, ...]:
    """Return entries of the shift-8 table in which the authors of CoDMD and CausVid look sigma up."""
    return tuple(8.0 * entry / (1.0 + 7.0 * entry) for entry in entries)


def wan_1_3b_grid() -> StepGrid:
    """Return the published 4 steps of CoDMD on Wan2.1-T2V-1.3B.

    The network is fed integers, but the state is at the nearest entry of a 1,000-entry shift-8 table. So sigma is not
    exactly timestep / 1000. A student must be sampled with the grid it was trained with.
    """
    return StepGrid(
        sigmas=(*_table_sigmas(1.0, 0.529, 0.280, 0.120), 0.0),
        timesteps=(1000.0, 900.0, 757.0, 522.0),
    )


def causvid_grid() -> StepGrid:
    """Return the published 3 steps of CausVid (bidirectional) and FastWan: `wan_1_3b_grid` without its second step."""
    full = wan_1_3b_grid()
    return StepGrid(
        sigmas=(full.sigmas[0], *full.sigmas[2:]),
        timesteps=(full.timesteps[0], *full.timesteps[2:]),
    )


def codmd_14b_grid() -> StepGrid:
    """Return the published 4 steps of CoDMD on Wan2.1-T2V-14B.

    As at 1.3B, the network is fed the integers of the config and the state is at the nearest entry of the shift-8
    table, whatever the size of the model. The integers are shift 5 of 1, 3/4, 1/2, 1/4, rounded down and the last one
    lower still.

    Source: JIA-Lab-research/CoDMD@aef0ec0: configs/wan_dmd_tar_14b.yaml (denoising_step_list, warp_denoising_step
    false), copula_dmd/models/wan/bidirectional_inference.py (the list as torch.long), copula_dmd/models/wan/
    wan_wrapper.py (FlowMatchScheduler of shift 8, argmin over its 1000 timesteps).
    """
    return StepGrid(
        sigmas=(*_table_sigmas(1.0, 0.650, 0.384, 0.172), 0.0),
        timesteps=(1000.0, 937.0, 833.0, 624.0),
    )


def wan_14b_grid() -> StepGrid:
    """Return shift 5 of 1, 3/4, 1/2, 1/4: the published 4 steps of Self-Forcing and LightX2V.

    The network is fed 1000 * sigma, not rounded.

    Source: ModelTC/LightX2V lightx2v/models/schedulers/wan/step_distill/scheduler.py@21ef47a, set_denoising_timesteps;
    guandeh17/Self-Forcing@33593df, denoising_step_list 1000, 750, 500, 250 with warp_denoising_step.
    """
    return StepGrid(
        sigmas=(1.0, 0.9375, 5 / 6, 0.625, 0.0),
        timesteps=(1000.0, 937.5, 5000 / 6, 625.0),
    )


def rcm_grid() -> StepGrid:
    """Return the published 4 steps of rCM: TrigFlow angles atan(80), 1.5, 1.4 and 1.

    cos(angle) * x0 + sin(angle) * noise is (cos + sin) times a state at sigma = sin / (cos + sin), and the network is
    fed 1000 * sigma. The first level is 80/81, not 1.

    Source: rCM (arXiv 2510.08431); NVlabs/rcm@5b41aa9, inference defaults.
    """
    angles = (math.atan(80.0), 1.5, 1.4, 1.0)
    sigmas = [math.sin(angle) / (math.cos(angle) + math.sin(angle)) for angle in angles]
    return StepGrid(sigmas=(*sigmas, 0.0), timesteps=tuple(1000.0 * sigma for sigma in sigmas))
