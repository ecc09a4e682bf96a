"""The curve of what captions leave open: distances are zero for the truth, levels those of the sampler, stop stops."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.evaluate.joint import FACTORS
from distill.pretrain.config import VaeConfig
from distill.pretrain.curve import _stoppable, _StoppedError, draw_clips, factor_distances, step_levels
from distill.pretrain.curve_worker import measure_clip, measure_truth
from distill.pretrain.prompts import PromptTable
from distill.pretrain.vae import build_vae
from distill.worlds.shapeworld.captions import parse_caption
from distill.worlds.shapeworld.render import sample_clip

CAPTION = "a red circle left of a blue ring move up quickly on a black background"


def test_the_truth_has_no_distance_from_itself_and_another_law_has() -> None:
    rng = np.random.default_rng(0)
    factors = rng.random((40, len(FACTORS)))
    same = factor_distances([factors, factors], [factors, factors])
    assert same["tau_error"] == 0.0 and same["marginal_error"] == 0.0
    shifted = factors.copy()
    shifted[:, FACTORS.index("radius")] += 0.5
    shifted[:, FACTORS.index("fade")] = factors[:, FACTORS.index("growth")]
    other = factor_distances([shifted], [factors])
    assert other["marginal"]["radius"] > 1.0 > other["marginal"]["speed"]
    assert other["tau"]["growth-fade"] == pytest.approx(1.0)
    assert other["tau_error"] > 0.1


def test_workers_measure_renders_as_true() -> None:
    clip = sample_clip(parse_caption(CAPTION), np.random.default_rng([1, 2]))
    factors, is_right = measure_clip(CAPTION, clip)
    assert is_right
    np.testing.assert_array_equal(factors, measure_truth(CAPTION, [1, 2]))


def test_levels_descend_from_one() -> None:
    assert step_levels(4, 1.0) == [1.0, 0.75, 0.5, 0.25]
    assert step_levels(2, 3.0) == [1.0, pytest.approx(0.75)]


def test_clips_of_a_perfect_denoiser_are_its_latents_decoded_and_stop_ends_the_drawing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae(VaeConfig(base_dim=8)).eval()
    wanted = torch.randn(16, 7, 12, 12)
    prompts = PromptTable(torch.zeros(3, 8, 4))

    def denoise(latents: torch.Tensor, timestep_B: torch.Tensor, _embeds: torch.Tensor) -> torch.Tensor:
        return (latents - wanted) / (timestep_B / 1000)[:, None, None, None, None]

    clips = draw_clips(denoise, vae, prompts, 1, step_levels(2, 3.0), "fp32", 0)
    assert clips.shape == (2, 1, 25, 96, 96, 3)
    assert np.abs(clips[0].astype(int) - clips[1]).max() <= 1  # two noises, one end, rounded
    with torch.no_grad():
        pixels = vae.decode(wanted[None]).sample[0]
    assert np.abs(clips[0, 0].astype(float) - ((pixels + 1) * 127.5).movedim(0, -1).numpy()).max() < 1.01
    calls = iter([False, True])
    with pytest.raises(_StoppedError):
        draw_clips(_stoppable(denoise, lambda: next(calls)), vae, prompts, 1, step_levels(3, 3.0), "fp32", 0)
