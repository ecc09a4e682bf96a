"""Devices and dtypes by name: the same names and the same refusals for both commands."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch

import codmd_serve
from codmd_serve.device import choose_device, choose_dtype, multiplies_bfloat16, on_device
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


def test_on_device_makes_a_cuda_device_the_current_one() -> None:
    entered = on_device(torch.device("cuda:1"))
    assert isinstance(entered, torch.cuda.device)
    assert entered.idx == 1
    assert isinstance(on_device(torch.device("cpu")), contextlib.nullcontext)


def is_launch(node: ast.AST) -> bool:
    """Whether a Triton kernel is called: `name_kernel[grid](...)`."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.endswith("_kernel")
    )


def test_every_triton_kernel_is_launched_on_the_device_of_its_tensors() -> None:
    """A worker on cuda:1 would otherwise launch on cuda:0, which cannot read its tensors."""
    guarded, launched = [], []
    for path in Path(codmd_serve.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        launched += [f"{path}:{node.lineno}" for node in ast.walk(tree) if is_launch(node)]
        for block in ast.walk(tree):
            if isinstance(block, ast.With) and "on_device(" in ast.unparse(block.items[0]):
                guarded += [f"{path}:{node.lineno}" for node in ast.walk(block) if is_launch(node)]
    assert launched
    assert sorted(guarded) == sorted(launched)
