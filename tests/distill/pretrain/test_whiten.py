"""White latents: uncorrelated, of variance one, and nothing that is decoded from them changes."""

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn

from distill.pretrain.config import TransformerConfig, VaeConfig
from distill.pretrain.pool import to_pixels
from distill.pretrain.teacher import build_transformer
from distill.pretrain.vae import build_vae
from distill.pretrain.whiten import fit_whitening, fold_into_transformer, fold_into_vae
from distill.worlds.shapeworld.captions import sample_scene
from distill.worlds.shapeworld.render import sample_clip


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return build_vae(VaeConfig(base_dim=8, z_dim=6)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    rng = np.random.default_rng(0)
    return to_pixels(torch.from_numpy(np.stack([sample_clip(sample_scene(rng), rng)[:5] for _ in range(6)])))


def test_latents_become_white_and_reconstructions_stay(vae: AutoencoderKLWan, pixels: torch.Tensor) -> None:
    raw = vae.encode(pixels).latent_dist.mean
    whitening = fit_whitening(raw)
    changed = copy.deepcopy(vae)
    fold_into_vae(changed, whitening)
    white = changed.encode(pixels).latent_dist.mean
    torch.testing.assert_close(white, whitening.apply(raw), rtol=1e-3, atol=1e-3)
    rows = white.permute(0, 2, 3, 4, 1).flatten(0, 3)
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(6), rtol=0, atol=1e-3)
    assert rows.mean(0).abs().max() < 1e-3
    torch.testing.assert_close(changed.decode(white).sample, vae.decode(raw).sample, rtol=1e-4, atol=1e-4)
    assert changed.encode(pixels).latent_dist.logvar.isfinite().all()


def test_the_fit_does_not_depend_on_the_sign_of_eigenvectors(
    vae: AutoencoderKLWan, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = vae.encode(pixels).latent_dist.mean
    want = fit_whitening(raw).matrix
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (eigh(matrix)[0], -eigh(matrix)[1]))
    torch.testing.assert_close(fit_whitening(raw).matrix, want)


def test_the_transformer_predicts_the_same_flow_in_the_new_basis() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(num_heads=2, head_dim=12, num_layers=2, ffn_dim=32)
    old = build_transformer(config, latent_channels=6, text_dim=16).eval().requires_grad_(False)
    nn.init.normal_(old.proj_out.bias)
    new = copy.deepcopy(old)
    matrix = torch.randn(6, 6) + 3 * torch.eye(6)
    fold_into_transformer(new, matrix)
    latents, time, text = torch.randn(2, 6, 2, 4, 4), torch.tensor([900.0, 300.0]), torch.randn(2, 7, 16)
    want = torch.einsum("ij,bjfhw->bifhw", matrix, old(latents, time, text, return_dict=False)[0])
    moved = torch.einsum("ij,bjfhw->bifhw", matrix, latents)
    torch.testing.assert_close(new(moved, time, text, return_dict=False)[0], want, rtol=1e-4, atol=1e-4)
