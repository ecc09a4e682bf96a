"""The suites of validation by name, and the metric that a run is chosen by; computes nothing.

A new suite is a file beside this one and a line in SUITES.
"""

from collections.abc import Callable
from dataclasses import dataclass

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig
from distill.networks.base import Base
from distill.validate.analytic import analytic_suite
from distill.validate.command import command_suite
from distill.validate.shapebench import shapebench_suite
from distill.validate.suites import LATENTS, Suite

# Called once at the start of a run. Raises ConfigError for settings or a base that cannot work.
SUITES: dict[str, Callable[[DistillConfig, Base], Suite]] = {
    "analytic": analytic_suite,
    "command": command_suite,
    "shapebench": shapebench_suite,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A value of a suite.

    Attributes:
        suite, value: the two parts of its name.
        better: high or low; empty where it stands in the suite.
    """

    suite: str
    value: str
    better: str = ""

    @property
    def name(self) -> str:
        """SUITE.VALUE, as in the logs and in best.json."""
        return f"{self.suite}.{self.value}"


def parse_metric(name: str, better: str = "") -> Metric:
    """Read SUITE.VALUE.

    Raises:
        ConfigError: no such suite, or no value is named.
    """
    suite, _, value = name.partition(".")
    if suite not in SUITES or not value:
        raise ConfigError(
            f"validate.metric must be SUITE.VALUE with a suite of {', '.join(SUITES)}, got {name!r}; "
            "for example shapebench.all"
        )
    return Metric(suite=suite, value=value, better=better)


def is_metric(name: str | None) -> bool:
    """Whether a name, as of --keep-best, is a metric of validation and not one of the log."""
    return name is not None and name.partition(".")[0] in SUITES and "." in name


def open_suite(config: DistillConfig, base: Base, metric: Metric) -> tuple[Suite, Metric]:
    """Build the suite of a metric.

    Args:
        config: of the run.
        base: its teacher's pipeline.
        metric: of `parse_metric`.

    Returns:
        The suite, and the metric with its direction.

    Raises:
        ConfigError: the suite cannot work here, it has no such value, or nobody says which direction is better.
    """
    suite = SUITES[metric.suite](config, base)
    if suite.needs != LATENTS and not base.has_vae:
        raise ConfigError(f"suite {metric.suite} needs {suite.needs}, and {base.source} has no VAE")
    known = suite.better
    if known and metric.value not in known:
        raise ConfigError(f"suite {metric.suite} cannot choose by {metric.value!r}, expected {', '.join(known)}")
    better = metric.better or known.get(metric.value, "")
    if not better:
        raise ConfigError(f"validate.better must be high or low: suite {metric.suite} does not say it of its values")
    if known and better != known[metric.value]:
        raise ConfigError(f"validate.better is {better}, but of {metric.name} {known[metric.value]} is better")
    return suite, Metric(suite=metric.suite, value=metric.value, better=better)
