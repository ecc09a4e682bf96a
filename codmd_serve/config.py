"""Every default of serving, as frozen dataclasses and presets; reads no environment and imports nothing heavy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from codmd_serve.errors import ConfigError

SAMPLERS = ("sde", "ode")
MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARS = 4000


def check_step_grid(sigmas: Sequence[float], timesteps: Sequence[float], sampler: str) -> None:
    """Refuse a step grid that cannot be sampled.

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
    """Where a student was trained to stop on its way from noise: what the state holds and what the network is told."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        check_step_grid(self.sigmas, self.timesteps, SAMPLERS[0])


def wan_1_3b_grid() -> StepGrid:
    """The published 4 steps of CoDMD and CausVid on Wan2.1-T2V-1.3B.

    The network is fed integers, but the state is at the nearest entry of a 1,000-entry shift-8 table, which is why
    sigma is not exactly timestep / 1000. A student trained so has to be sampled so.
    """
    table_entries = (1.0, 0.529, 0.280, 0.120)
    return StepGrid(
        sigmas=(*(8.0 * u / (1.0 + 7.0 * u) for u in table_entries), 0.0),
        timesteps=(1000.0, 900.0, 757.0, 522.0),
    )


def wan_14b_grid() -> StepGrid:
    """The published 4 steps on Wan2.1-T2V-14B: shift 5 of 1, 3/4, 1/2, 1/4."""
    return StepGrid(
        sigmas=(1.0, 0.9375, 5 / 6, 0.625, 0.0),
        timesteps=(1000.0, 937.5, 5000 / 6, 625.0),
    )


def default_bundle_path() -> Path:
    """Folder of the student that ships with the project, in an installed wheel or in a checkout.

    Returns:
        The path, whether or not it exists: the loader reports what is missing.
    """
    package = Path(__file__).resolve().parent
    installed = package / "_weights"
    return (installed if installed.is_dir() else package.parent / "weights") / "shapeworld-codmd"
