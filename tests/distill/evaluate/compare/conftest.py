"""A cache whose start network is untrained."""

from pathlib import Path

import pytest

from distill.networks.analytic import PRETRAIN, AnalyticBase
from distill.networks.base import open_base
from distill.worlds.analytic.pretrain import new_network


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the start network of ties is there, so that no test trains it."""
    folder = tmp_path_factory.mktemp("compare-cache")
    base = open_base("analytic:ties")
    assert isinstance(base, AnalyticBase)
    network = new_network(base.world, PRETRAIN.width)
    network.save_pretrained(base.start_folder(folder) / "transformer")
    return folder
