"""The moving average of the student: constant and power decay, and its start."""

import pytest
import torch
from torch import nn

from distill.config import EmaConfig
from distill.networks.ema import Ema, ema_decay


def test_ema_copies_before_its_start_and_averages_after() -> None:
    network = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    ema = Ema(network, EmaConfig(decay=0.75, start_after_updates=1))
    for value in (4.0, 8.0, 0.0):
        nn.init.constant_(network.weight, value)
        ema.update(network)
    # copy 4, then 4 + (8 - 4) / 4 = 5, then 5 + (0 - 5) / 4 = 3.75
    assert float(ema.shadow["weight"]) == 3.75
    assert ema.shadow["weight"].dtype == torch.float32
    assert ema.num_updates == 3


@pytest.mark.parametrize(("length", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_power_ema_has_the_published_exponent(length: float, exponent: float) -> None:
    config = EmaConfig(decay=0.0, kind="power", length=length)
    assert ema_decay(config, 1) == 0.0  # the first update is copied
    assert ema_decay(config, 10) == pytest.approx(0.9 ** (exponent + 1), rel=2e-3)


def test_power_ema_weighs_a_fixed_share_of_all_updates() -> None:
    """After n updates their weights have the standard deviation length * n, early in a run and late."""
    config = EmaConfig(decay=0.0, kind="power", length=0.1)
    weights: list[float] = []
    for update in range(1, 2001):
        kept = ema_decay(config, update)
        weights = [kept * weight for weight in weights] + [1.0 - kept]
        if update in (400, 2000):
            assert sum(weights) == pytest.approx(1.0)
            mean = sum(index * weight for index, weight in enumerate(weights, 1))
            variance = sum((index - mean) ** 2 * weight for index, weight in enumerate(weights, 1))
            assert variance**0.5 / update == pytest.approx(0.1, rel=0.02)


def test_power_ema_counts_from_its_start() -> None:
    late = EmaConfig(decay=0.0, kind="power", length=0.1, start_after_updates=5)
    early = EmaConfig(decay=0.0, kind="power", length=0.1)
    assert [ema_decay(late, update) for update in range(1, 6)] == [0.0] * 5
    assert ema_decay(late, 8) == ema_decay(early, 3)
