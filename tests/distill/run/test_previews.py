"""Previews show the averaged student, and a run with them is a run without them."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import whole_state
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codmd_serve.sampler import rollout
from codmd_serve.wan.attention import use_compact_cross_attention
from codmd_serve.wan.checkpoint import load_bundle
from codmd_serve.wan.vae import StreamingDecoder
from distill.config import DistillConfig, with_overrides
from distill.data.prompts import cached_prompt_data
from distill.networks.base import open_base
from distill.networks.build import Networks, compile_blocks
from distill.run.checkpoint import list_checkpoints
from distill.run.checks import native_latents
from distill.run.previews import Previews, averaged_weights, filmstrips
from distill.run.trainer import RunOptions, run_training

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(cache_dir: Path) -> Callable[..., Path]:
    def start(config: DistillConfig, out: Path, every: int, resume: bool = False) -> Path:
        options = RunOptions(out=out, device=CPU, cache_dir=cache_dir, preview_every_iterations=every)
        run_training(config, options, resume=resume)
        return out

    return start


@pytest.fixture
def previews(tiny_config: DistillConfig, tmp_path: Path, cache_dir: Path) -> Previews:
    base = open_base(tiny_config.base)
    data = cached_prompt_data(tiny_config, base, cache_dir, CPU)
    return Previews(tiny_config, base, tmp_path, data, native_latents(tiny_config, base), CPU)


def shifted(networks: Networks) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() + 0.05 for name, tensor in networks.student.named_parameters()}


def test_parameters_are_the_same_bits_with_and_without_previews(
    tiny_config: DistillConfig, tmp_path: Path, train: Callable[..., Path]
) -> None:
    runs = [train(tiny_config, tmp_path / str(every), every) for every in (0, 1)]
    states = [whole_state(list_checkpoints(out)[-1]) for out in runs]
    for role in ("student", "critic"):
        without, with_them = (state["networks"][role] for state in states)
        assert all(torch.equal(without[name], with_them[name]) for name in without)
        moments = [state["optimizers"][role] for state in states]
        for key, entry in moments[0].items():
            assert entry and all(torch.equal(value, moments[1][key][name]) for name, value in entry.items())
    assert all(
        torch.equal(value, states[1]["ema"]["shadow"][name]) for name, value in states[0]["ema"]["shadow"].items()
    )
    assert not (runs[0] / "previews").exists()
    assert len(list((runs[1] / "previews").glob("*.png"))) == 6


def test_last_preview_is_what_the_bundle_makes_of_the_same_noise(
    tiny_config: DistillConfig, tmp_path: Path, train: Callable[..., Path], previews: Previews
) -> None:
    out = train(with_overrides(tiny_config, ["max_iterations=3"]), tmp_path / "run", 2)
    names = sorted(path.name for path in (out / "previews").iterdir())
    assert names == ["prompts.txt", "step-00000002.png", "step-00000003.png"]
    bundle = load_bundle(out / "bundle")
    use_compact_cross_attention(bundle.transformer)  # the embeddings are trimmed

    def denoise(latents: torch.Tensor, timestep_B: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return bundle.transformer(latents, timestep_B, embeds, return_dict=False)[0]

    spec = bundle.spec
    with torch.no_grad():
        x0 = rollout(denoise, previews.noise, previews.embeds_BLD, spec.sigmas, spec.timesteps, sampler=spec.sampler)
        clips = torch.cat(list(StreamingDecoder(bundle.vae).frames(x0)), dim=1).numpy()
    shown = np.asarray(Image.open(out / "previews" / "step-00000003.png"))
    assert shown.shape == (4 * 32, 6 * 32, 3)
    # The same sums, but decoding one by one may take other kernels: at most one level apart.
    assert np.abs(shown.astype(int) - filmstrips(clips)).max() <= 1
    assert shown.std() > 1
    prompts = (out / "previews" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == Path(tiny_config.prompts).read_text(encoding="utf-8").splitlines()[:4]


def test_tensorboard_has_the_scalars_and_the_pictures(
    tiny_config: DistillConfig, tmp_path: Path, train: Callable[..., Path]
) -> None:
    out = train(with_overrides(tiny_config, ["max_iterations=4"]), tmp_path / "run", 2)
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    assert {"student_loss", "critic_loss", "samples_per_s"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("critic_loss")] == [2, 4]
    assert [event.step for event in board.Images("preview")] == [2, 4]


def test_writing_touches_neither_global_random_state_nor_weights(
    previews: Previews, tiny_networks: Networks, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_networks.student.state_dict().items()}
    rng_state, average = torch.get_rng_state(), shifted(tiny_networks)
    pictures = [previews.write(step, tiny_networks.student, average) for step in (1, 2)]
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_networks.student.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_networks.student.parameters())
    assert pictures[0] is not None and np.array_equal(pictures[0], pictures[1])
    own = previews.write(3, tiny_networks.student, before)
    assert own is not None and not np.array_equal(own, pictures[0])


def test_weights_come_back_when_the_block_fails(tiny_networks: Networks) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_networks.student.state_dict().items()}
    average = shifted(tiny_networks)

    def fail() -> None:
        with averaged_weights(tiny_networks.student, average):
            inside = dict(tiny_networks.student.named_parameters())
            assert all(torch.equal(inside[name], average[name]) for name in average)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_networks.student.state_dict().items())


def test_compiled_blocks_are_not_run(
    previews: Previews, tiny_networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that only counts: a preview compiles nothing, a call outside of it does."""
    compiled = []

    def count(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setenv("CXX", "true")
    student = tiny_networks.student
    for block in student.blocks:
        monkeypatch.setattr(block, "compile", functools.partial(block.compile, backend=count))
    compile_blocks(student)
    torch._dynamo.reset()
    assert previews.write(1, student, shifted(tiny_networks)) is not None
    assert not compiled
    with torch.no_grad():
        student(previews.noise[0], torch.full((4,), 500.0), previews.embeds_BLD)
    assert compiled
    torch._dynamo.reset()


def test_folder_that_cannot_be_written_is_logged_and_training_goes_on(
    previews: Previews, tiny_networks: Networks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "previews").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert previews.write(7, tiny_networks.student, shifted(tiny_networks)) is None
    assert "no preview iteration=7" in caplog.text


@pytest.mark.parametrize("part", ["sample", "clips"])
def test_a_preview_that_fails_in_any_way_is_logged_and_training_goes_on(
    previews: Previews,
    tiny_networks: Networks,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")

    before = {name: tensor.clone() for name, tensor in tiny_networks.student.state_dict().items()}
    monkeypatch.setattr("distill.run.previews.rollout" if part == "sample" else "distill.run.previews.filmstrips", fail)
    with caplog.at_level(logging.WARNING):
        assert previews.write(7, tiny_networks.student, shifted(tiny_networks)) is None
    assert "no preview iteration=7" in caplog.text and "CUDA out of memory." in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_networks.student.state_dict().items())


def test_filmstrips_show_first_and_last_frame_row_by_row() -> None:
    clips = np.zeros((2, 11, 2, 3, 3), np.uint8)
    clips += np.arange(11, dtype=np.uint8)[None, :, None, None, None]
    clips[1] += 100
    picture = filmstrips(clips)
    assert picture.shape == (4, 18, 3)
    assert picture[0, ::3, 0].tolist() == [0, 2, 4, 6, 8, 10]
    assert picture[2, ::3, 0].tolist() == [100, 102, 104, 106, 108, 110]
    assert filmstrips(clips[:, :2]).shape == (4, 6, 3)
