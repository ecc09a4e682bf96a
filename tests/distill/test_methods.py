"""Every method has its entry."""

from distill import config as configuration
from distill.methods import METHODS
from distill.trainer import ROLES


def test_every_method_of_the_config_has_an_entry() -> None:
    assert tuple(METHODS) == configuration.METHODS
    assert all(set(method.steps) == set(ROLES) for method in METHODS.values())
