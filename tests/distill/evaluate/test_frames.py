"""Correlations between frames see what ties frames together, and its loss, whatever the margins are."""

import numpy as np

from distill.evaluate.frames import frame_correlations, frame_distance


def clips(seed: int, size: int = 256) -> np.ndarray:
    """Flat quadrants whose brightness is drawn per clip and, with less weight, per frame."""
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(0, 30, (size, 1, 2, 2, 3)), rng.normal(0, 15, (size, 9, 2, 2, 3))
    return np.clip(128 + shared + own, 0, 255).astype(np.uint8).repeat(8, axis=2).repeat(8, axis=3)


def test_frames_that_share_a_factor_are_correlated_in_every_pattern() -> None:
    rho = frame_correlations(clips(0))
    assert rho.shape == (12, 3, 3)
    np.testing.assert_allclose(rho[:, range(3), range(3)], 1.0)
    # 30^2 / (30^2 + 15^2) is .8 for the normal, a little less in ranks.
    assert rho[:, 0, 1:].min() > 0.65 and rho[:, 0, 1:].max() < 0.88


def test_shuffled_frames_lose_dependence_and_keep_margins() -> None:
    whole, other = clips(1), clips(2)
    mixed = whole.copy()
    rng = np.random.default_rng(3)
    for frame in range(mixed.shape[1]):
        mixed[:, frame] = mixed[rng.permutation(len(mixed)), frame]
    reference = [frame_correlations(whole)]
    same, lost = (frame_distance([frame_correlations(own)], reference) for own in (other, mixed))
    assert same.frame_rho < 0.1 and abs(same.kept - 1.0) < 0.1
    assert lost.frame_rho > 0.6 and abs(lost.kept) < 0.1
    # Frames that repeat the first overstate it.
    frozen = np.repeat(other[:, :1], other.shape[1], axis=1)
    assert frame_distance([frame_correlations(frozen)], reference).kept > 1.1


def test_clips_that_do_not_vary_have_no_correlation() -> None:
    still = np.full((4, 9, 16, 16, 3), 7, dtype=np.uint8)
    assert not frame_correlations(still).any()
