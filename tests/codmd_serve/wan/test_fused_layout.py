"""Layouts that the fused norm of the VAE takes; its kernel needs a device, see tests/gpu/test_fused.py."""

import pytest
import torch
from torch import Tensor

from codmd_serve.wan.fused import channels_last, row_strides

SHAPES = [(1, 32, 1, 32, 32), (2, 32, 3, 4, 5), (1, 1, 2, 4, 4), (1, 32, 1, 1, 1), (2, 8, 1, 1, 6), (1, 3, 4, 1, 1)]


def lies_apart(shape: tuple[int, ...]) -> Tensor:
    """Channels before places, as cuDNN returned one frame of 32 x 32 on an H200."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tensor_of_any_layout_becomes_rows_of_channels(shape: tuple[int, ...]) -> None:
    given = lies_apart(shape)
    taken = channels_last(given)
    batch, channels, *places = shape
    assert torch.equal(taken, given)
    between, row = row_strides(taken)
    assert row >= channels and (batch == 1 or between >= row * torch.Size(places).numel())
    # What the kernel reads: place after place at the distance `row`, channels side by side.
    rows = torch.as_strided(taken, (batch, torch.Size(places).numel(), channels), (between, row, 1))
    assert torch.equal(rows, given.flatten(2).mT)


def test_a_tensor_that_lies_right_is_not_copied() -> None:
    wide = torch.randn(1, 2, 4, 5, 48)
    right = wide[..., :32].movedim(-1, 1)  # more channels are stored than there are
    assert channels_last(right) is right
    assert row_strides(right)[1] == 48


def test_channels_apart_are_refused_by_name_where_they_are_written() -> None:
    with pytest.raises(ValueError, match=r"expected channels last, got strides \(32768, 1024, 1024, 32, 1\)"):
        row_strides(lies_apart((1, 32, 1, 32, 32)))
