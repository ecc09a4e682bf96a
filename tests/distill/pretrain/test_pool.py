"""Clip tensors: windows show what they should; a pool holds the clips of its source in order, and ends its workers."""

import multiprocessing
import time

import numpy as np
import pytest
import torch

from codmd_serve.errors import CodmdError, ConfigError
from distill.pretrain.clips import CLIP_SHAPE, ClipSource
from distill.pretrain.pool import ClipPool, ClipTensors, cut_windows, render_clips, to_pixels
from distill.pretrain.render_worker import CLIP_BYTES, split_slot

CPU = torch.device("cpu")


def test_pixels_map_black_to_minus_one_and_white_to_one() -> None:
    clip = torch.zeros((1, 1, 2, 2, 3), dtype=torch.uint8)
    clip[..., 1, :] = 255
    pixels = to_pixels(clip)
    assert pixels.shape == (1, 3, 1, 2, 2)
    assert pixels[..., 0].eq(-1).all() and pixels[..., 1].eq(1).all()


@pytest.fixture(scope="module")
def clips() -> ClipTensors:
    return render_clips(ClipSource(4, 0.75), range(3), CPU)[0]


@pytest.mark.parametrize(("num_frames", "window"), [(1, 32), (5, 64), (25, 64), (25, None)])
def test_windows_are_parts_of_their_clips_and_show_an_object(
    clips: ClipTensors, num_frames: int, window: int | None
) -> None:
    indices = torch.tensor([0, 1, 2, 2, 1, 0])
    pixels, is_object = cut_windows(clips, indices, num_frames, window, torch.Generator().manual_seed(1))
    side = window or CLIP_SHAPE[1]
    assert pixels.shape == (6, 3, num_frames, side, side)
    assert is_object.shape == (6, 1, num_frames, side, side)
    assert is_object.flatten(1).any(1).all()
    whole = to_pixels(clips.pixels)
    mask = np.unpackbits(clips.object_bits.numpy(), axis=-1).astype(bool)
    for piece, where, index in zip(pixels, is_object, indices.tolist(), strict=True):
        # Where the piece lies is not told, so it is looked for.
        unfolded = whole[index].unfold(1, num_frames, 1).unfold(2, side, 1).unfold(3, side, 1)
        corner = piece[:, 0, 0, 0, None, None, None]
        places = (unfolded[..., 0, 0, 0] == corner).all(0).nonzero().tolist()
        found = [(t, y, x) for t, y, x in places if torch.equal(unfolded[:, t, y, x], piece)]
        assert found
        wanted = [mask[index, t : t + num_frames, y : y + side, x : x + side] for t, y, x in found]
        assert any(np.array_equal(where[0].numpy(), part) for part in wanted)


def test_windows_depend_on_the_generator_alone(clips: ClipTensors) -> None:
    indices = torch.arange(3)
    first, again, other = (
        cut_windows(clips, indices, 5, 48, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_pool_holds_the_clips_of_its_source_in_order() -> None:
    source = ClipSource(2, 0.5)
    wanted, captions = render_clips(source, range(40), CPU)
    with ClipPool(source, 40, 2, CPU) as pool:
        assert pool.wait(40, lambda: False, time.monotonic() + 120) == 40
        for name in ("pixels", "object_bits", "points"):
            assert torch.equal(getattr(pool.clips, name), getattr(wanted, name)), name
        assert pool.captions == captions
    assert multiprocessing.active_children() == []


def test_a_pool_with_a_window_holds_later_clips_once_the_first_are_released() -> None:
    source = ClipSource(2, 0.5)
    wanted, captions = render_clips(source, range(80), CPU)
    with ClipPool(source, 80, 2, CPU, window=32) as pool:
        assert pool.clips.pixels.shape[0] == 32
        assert pool.wait(32, lambda: False, time.monotonic() + 120) == 32
        # Nobody has released a clip: the 33rd waits, however long.
        assert pool.wait(33, lambda: False, time.monotonic() + 0.5) == 32
        assert torch.equal(pool.clips.pixels, wanted.pixels[:32])
        for start in range(0, 80, 8):
            pool.release(start)
            assert pool.wait(start + 8, lambda: False, time.monotonic() + 120) >= start + 8
            assert torch.equal(pool.pixels(range(start, start + 8)), wanted.pixels[start : start + 8])
        with pytest.raises(ValueError, match="not in the window: 72 released"):
            pool.pixels(range(64, 72))
        assert pool.captions == captions


def test_a_full_pool_that_nobody_reads_is_left_at_once() -> None:
    with ClipPool(ClipSource(2), 10_000, 1, CPU, window=16) as pool:
        assert pool.wait(10_000, lambda: pool.num_ready == 16, time.monotonic() + 120) == 16
        start = time.monotonic()
    assert time.monotonic() - start < 30
    assert multiprocessing.active_children() == []


def test_a_window_is_a_whole_number_of_parts() -> None:
    with pytest.raises(ConfigError, match="a multiple of 16 clips at once, got 20"):
        ClipPool(ClipSource(2), 100, 1, CPU, window=20)


def test_leaving_a_pool_early_ends_its_workers() -> None:
    start = time.monotonic()
    with ClipPool(ClipSource(2), 100_00, 1, CPU) as pool:
        assert pool.wait(10_000, lambda: pool.num_ready > 0, time.monotonic() + 120) < 10_000
    pool.close()
    assert multiprocessing.active_children() == []
    assert time.monotonic() - start < 60


def test_a_failed_worker_is_an_error_where_the_clips_are_waited_for() -> None:
    with (
        ClipPool(ClipSource(-1), 4, 1, CPU) as pool,  # numpy takes no negative seed
        pytest.raises(CodmdError, match="rendering of training clips failed"),
    ):
        pool.wait(4, lambda: False, time.monotonic() + 120)


def test_a_slot_is_split_without_overlap() -> None:
    slot = np.zeros(2 * CLIP_BYTES, np.uint8)
    parts = split_slot(slot, 2)
    for number, part in enumerate(parts, start=1):
        part.view(np.uint8)[...] = number
    assert [int((slot == number).sum()) for number in (1, 2, 3)] == [part.nbytes for part in parts]
