"""VAE stage: the layout is the real class's, its unclamped decode is the class's decode, clips are what they say."""

import numpy as np
import pytest
import torch

from distill.pretrain.config import VaeConfig, VaePhase
from distill.pretrain.stage import StageOptions
from distill.pretrain.vae import build_vae, decode_unclamped, draw_clips, psnr_db, to_pixels, train_vae

SMALL = VaeConfig(base_dim=8)


def test_layout_compresses_time_by_4_and_space_by_8() -> None:
    vae = build_vae(SMALL).eval()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 17, 64, 64)).latent_dist.mean
    assert latents.shape == (1, 16, 5, 8, 8)


def test_unclamped_decode_equals_the_class_within_its_clamp() -> None:
    torch.manual_seed(0)
    vae = build_vae(SMALL).eval()
    latents = 3 * torch.randn(2, 16, 3, 4, 4)
    with torch.no_grad():
        ours = decode_unclamped(vae, latents)
        theirs = vae.decode(latents).sample
    torch.testing.assert_close(ours.clamp(-1, 1), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("num_frames", "batch_size"), [(1, 6), (5, 2), (17, 1)])
def test_clips_have_the_stated_shape_and_depend_on_the_seed_alone(num_frames: int, batch_size: int) -> None:
    clips = draw_clips(np.random.default_rng(3), num_frames, batch_size)
    assert clips.shape == (batch_size, 3, num_frames, 96, 96)
    assert -1.0 <= clips.min() < clips.max() <= 1.0
    assert torch.equal(clips, draw_clips(np.random.default_rng(3), num_frames, batch_size))


def test_pixels_map_black_to_minus_one_and_white_to_one() -> None:
    clip = np.zeros((1, 1, 2, 2, 3), np.uint8)
    clip[..., 1, :] = 255
    pixels = to_pixels(clip)
    assert pixels.shape == (1, 3, 1, 2, 2)
    assert pixels[..., 0].eq(-1).all() and pixels[..., 1].eq(1).all()


def test_psnr_is_the_textbook_value() -> None:
    first = np.zeros((4, 4), np.uint8)
    assert psnr_db(first, first) == float("inf")
    assert psnr_db(first, first + 16) == pytest.approx(20 * np.log10(255 / 16))


def test_first_steps_already_lower_the_error(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    config = VaeConfig(base_dim=8, learning_rate=2e-3, phases=(VaePhase(num_frames=1, batch_size=4, num_steps=100),))
    options = StageOptions(
        folder=tmp_path, device=torch.device("cpu"), precision="fp32", budget_s=None, stop=lambda: False
    )
    with caplog.at_level("INFO", logger="distill.pretrain.stage"):
        assert train_vae(config, 0, options) is not None
    gains = [float(message.split("psnr_db=")[1].split()[0]) for message in caplog.messages]
    assert gains[-1] > gains[0] + 1.0
