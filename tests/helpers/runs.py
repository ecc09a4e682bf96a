"""Runs of the tests: the same tiny run by another method."""

from typing import Any

from distill.config import DistillConfig, config_to_dict
from distill.methods.registry import config_from_dict, recipe_config


def with_method(config: DistillConfig, method: str) -> DistillConfig:
    """Return the run of a recipe by another method; settings in which `config` differs from its recipe stay."""
    before = config_to_dict(recipe_config(config.recipe, config.method))
    after = config_to_dict(recipe_config(config.recipe, method))
    return config_from_dict(_changed(config_to_dict(config), before, after))


def _changed(own: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    merged = dict(after)
    for key in own.keys() & before.keys() & after.keys() - {"method"}:
        if isinstance(own[key], dict):
            merged[key] = _changed(own[key], before[key], after[key])
        elif own[key] != before[key]:
            merged[key] = own[key]
    return merged
