"""Devices and dtypes by name: the same names and the same refusals for both commands."""

import pytest
import torch

from codmd_serve.device import choose_device, choose_dtype, multiplies_bfloat16
from codmd_serve.errors import ConfigError


def test_choose_device_auto_is_one_that_is_there() -> None:
    device = choose_device("auto")
    assert torch.zeros(1, device=device).device.type == device.type
    assert choose_device("cpu:0").type == "cpu"


@pytest.mark.parametrize("device", ["xpu", "gpu", "cpu:x", "cpu:1", "meta", ""])
def test_choose_device_refuses_what_is_none(device: str) -> None:
    with pytest.raises(ConfigError, match="device must be auto, cpu, cuda or cuda:N, got"):
        choose_device(device)


def test_choose_device_refuses_one_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no device cuda:99: this torch sees"):
        choose_device("cuda:99")


def test_choose_dtype() -> None:
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(ConfigError, match="dtype must be one of auto, float32"):
        choose_dtype("int8", torch.device("cpu"))


def test_multiplies_bfloat16_is_false_for_a_device_without_such_instructions() -> None:
    assert not multiplies_bfloat16(torch.device("meta"))
