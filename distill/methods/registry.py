"""The distillation methods by name, and the configs that they make of recipes and of files.

The mathematics is in the file of each family, the loop in run/trainer.py. A new method is a new file beside these and
an entry in METHODS.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from codmd_serve.errors import ConfigError
from distill.config import RECIPES, DistillConfig, MethodSettings, Recipe, parse_config
from distill.data.teacher_latents import TeacherSampling
from distill.methods.arms import AVD, DMD2, F_DISTILL, VDOT, ArmMethod
from distill.methods.consistency import DCM, RCM, ConsistencyMethod
from distill.methods.draws import Passes, StepResult, Turn
from distill.methods.matching import CODMD, DMD, MatchingMethod
from distill.methods.regression import NAME as REGRESSION
from distill.methods.regression import RegressionMethod
from distill.methods.trajectory import TrajectoryMethod

DEFAULT_RECIPE, DEFAULT_METHOD = "shapeworld", CODMD


class Method(Protocol):
    """What the trainer and the planner ask of a method; objects are immutable."""

    @property
    def name(self) -> str:
        """What `--method` calls it."""

    @property
    def settings(self) -> type[MethodSettings]:
        """The class of its own settings."""

    def configure(self, recipe: Recipe) -> DistillConfig:
        """Return a recipe's run by this method, with the settings published for it."""

    def turns(self, config: DistillConfig, iteration: int) -> tuple[str, ...]:
        """Return the roles that an iteration trains, student or critic, in order."""

    def draw(
        self,
        config: DistillConfig,
        role: str,
        iteration: int,
        shape: tuple[int, ...],
        device: torch.device,
        positions: range | None = None,
    ) -> object:
        """Return the random numbers of one turn for some places of the batch, a function of the arguments alone."""

    def losses(self, turn: Turn) -> Iterator[StepResult]:
        """Yield the loss of each micro-batch; the trainer calls backward on one before it asks for the next."""

    def passes(self, config: DistillConfig) -> dict[str, Passes]:
        """Count how often the networks run in a turn of each role, for `codmd-distill plan`."""

    def notes(self, config: DistillConfig) -> tuple[str, ...]:
        """Say what a plan's reader has to know about this method's numbers."""

    def authors_samples(self, config: DistillConfig) -> int | None:
        """Return how many samples a GPU of the authors' own run computes at once, None where a plan knows no layout."""

    def teacher_sampling(self, config: DistillConfig) -> TeacherSampling | None:
        """Return how samples of the teacher are made that it trains on, or None when it needs none."""


METHODS: dict[str, Method] = {
    CODMD: MatchingMethod(CODMD),
    DMD: MatchingMethod(DMD),
    RCM: ConsistencyMethod(RCM),
    DCM: ConsistencyMethod(DCM),
    "dp-dmd": TrajectoryMethod(),
    REGRESSION: RegressionMethod(),
    **{name: ArmMethod(name) for name in (DMD2, F_DISTILL, AVD, VDOT)},
}


def recipe_config(recipe: str | None = None, method: str | None = None) -> DistillConfig:
    """Return the config of a recipe by a method.

    Args:
        recipe: a key of RECIPES; None is shapeworld.
        method: a key of METHODS; None is codmd.

    Raises:
        ConfigError: no such recipe or method; the message names the option of the command line.
    """
    recipe = DEFAULT_RECIPE if recipe is None else recipe
    method = DEFAULT_METHOD if method is None else method
    if recipe not in RECIPES:
        raise ConfigError(f"--recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    if method not in METHODS:
        raise ConfigError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method].configure(RECIPES[recipe])


def config_from_dict(data: Mapping[str, Any]) -> DistillConfig:
    """Return the config that `config_to_dict` gave, in this format or an older one.

    Raises:
        ConfigError: as `distill.config.parse_config`.
    """
    return parse_config(data, {name: method.settings for name, method in METHODS.items()})
