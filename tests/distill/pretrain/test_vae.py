"""VAE stage: the layout is the real class's, the loss weighs what it says, first steps lower the error."""

import numpy as np
import pytest
import torch

from distill.pretrain.clips import ClipSource
from distill.pretrain.config import VaeConfig, VaePhase
from distill.pretrain.pool import ClipPool
from distill.pretrain.stage import StageOptions
from distill.pretrain.vae import build_vae, psnr_db, reconstruction_loss, train_vae

SMALL = VaeConfig(base_dim=8)


def options(folder) -> StageOptions:
    return StageOptions(folder=folder, device=torch.device("cpu"), precision="fp32", budget_s=None, stop=lambda: False)


def test_layout_compresses_time_by_4_and_space_by_8() -> None:
    vae = build_vae(SMALL).eval()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 17, 64, 64)).latent_dist.mean
    assert latents.shape == (1, 16, 5, 8, 8)


def test_psnr_is_the_textbook_value() -> None:
    first = np.zeros((4, 4), np.uint8)
    assert psnr_db(first, first) == float("inf")
    assert psnr_db(first, first + 16) == pytest.approx(20 * np.log10(255 / 16))


def test_loss_of_a_constant_error_has_no_edges() -> None:
    nowhere = torch.zeros(1, 1, 2, 8, 8, dtype=torch.bool)
    assert reconstruction_loss(torch.full((1, 3, 2, 8, 8), 0.5), nowhere, 8.0).item() == pytest.approx(0.5 + 0.25)


def test_an_error_in_an_object_or_its_margin_weighs_more() -> None:
    is_object = torch.zeros(1, 1, 1, 16, 16, dtype=torch.bool)
    is_object[..., 4, 4] = True
    losses = {}
    for name, (row, column) in {"inside": (4, 4), "margin": (6, 4), "beside": (7, 4), "far": (12, 12)}.items():
        error = torch.zeros(1, 3, 1, 16, 16)
        error[..., row, column] = 0.5
        losses[name] = reconstruction_loss(error, is_object, 8.0).item()
    assert losses["beside"] == pytest.approx(losses["far"])
    assert losses["far"] < losses["margin"] < losses["inside"]
    assert losses["inside"] == pytest.approx(9 * losses["far"])


def test_first_steps_already_lower_the_error(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    phases = (VaePhase(num_frames=1, batch_size=8, num_steps=100),)
    config = VaeConfig(base_dim=8, learning_rate=2e-3, phases=phases)
    with caplog.at_level("INFO", logger="distill.pretrain.stage"):
        assert train_vae(config, ClipSource(0), options(tmp_path)) is not None
    gains = [float(message.split("psnr_db=")[1].split()[0]) for message in caplog.messages]
    assert gains[-1] > gains[0] + 1.0


def test_a_pool_trains_as_far_as_its_clips_go_and_twice_the_same(tmp_path) -> None:
    phases = (
        VaePhase(num_frames=5, batch_size=2, num_steps=3, window=32),
        VaePhase(num_frames=5, batch_size=1, num_steps=1, window=None),
    )
    config = VaeConfig(base_dim=8, phases=phases, clips_per_step=2)
    weights = []
    for name in ("a", "b"):
        with ClipPool(ClipSource(3), 6, 1, torch.device("cpu")) as pool:
            vae = train_vae(config, ClipSource(3), options(tmp_path / name), pool=pool)
        assert vae is not None
        weights.append(vae.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
