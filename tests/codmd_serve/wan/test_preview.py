"""Previews: a linear VAE is found exactly, and a preview is an animation of all latent frames."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from codmd_serve.wan.preview import animate, fit_preview, preview_frames, preview_map_of_base
from codmd_serve.wan.vae import to_uint8

C = 4


class LinearDecoder:
    """Decodes a latent to 4 x 4 pixels of the colour that a matrix gives, in 1 frame and then 4."""

    latents_mean = torch.zeros(1, C, 1, 1, 1)

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def frames(self, latents_BCFHW: Tensor) -> Iterator[Tensor]:
        rgb = latents_BCFHW.permute(0, 2, 3, 4, 1) @ self.weights[:-1] + self.weights[-1]
        rgb = rgb.repeat_interleave(4, 2).repeat_interleave(4, 3)
        yield to_uint8(rgb[:, :1])
        yield to_uint8(rgb[:, 1:].repeat_interleave(4, 1))


def test_a_linear_decoder_is_found() -> None:
    weights = torch.tensor([[0.05, 0.0, -0.1], [0.1, 0.02, 0.0], [0.0, 0.0, 0.0], [-0.03, 0.1, 0.04], [0.1, -0.2, 0.0]])
    found = fit_preview(LinearDecoder(weights))  # type: ignore[arg-type]
    # Colours come in 255 levels of 2/255 each.
    torch.testing.assert_close(torch.tensor(found), weights, atol=2 / 255, rtol=0.0)
    assert fit_preview(LinearDecoder(weights)) == found  # type: ignore[arg-type]


def test_a_channel_that_carries_nothing_and_saturated_colours_do_no_harm() -> None:
    found = fit_preview(LinearDecoder(torch.tensor([[0.0] * 3] * C + [[9.0, -9.0, 0.0]])))  # type: ignore[arg-type]
    frames = preview_frames(torch.randn(1, C, 2, 3, 3), found)
    assert frames[..., 0].min() >= 254 and frames[..., 1].max() <= 1


def test_a_preview_has_the_latents_frames_rows_and_columns() -> None:
    frames = preview_frames(torch.randn(2, C, 3, 5, 6), ((0.1, 0.2, 0.3),) * (C + 1))
    assert frames.shape == (3, 5, 6, 3) and frames.dtype == torch.uint8
    with Image.open(io.BytesIO(animate(frames, seconds=1.5))) as image:
        assert image.format == "WEBP" and image.size == (6, 5)
        assert image.n_frames == 3  # type: ignore[attr-defined]
        assert image.info["loop"] == 0


def test_a_base_without_a_usable_vae_has_no_map(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(preview_map_of_base(tiny_base)) == C + 1
    assert preview_map_of_base(tmp_path) == ()
    assert "preview_map=none reason=" in caplog.text and "has no vae/ folder" in caplog.text
