"""Samples of the teacher: made once, whole or not at all, the same whoever asks."""

from pathlib import Path

import pytest
import torch
from runs import with_method
from safetensors.torch import load_file, save_file

from codmd_serve.errors import CheckpointError
from codmd_serve.sampler import rollout
from distill.config import DistillConfig, with_overrides
from distill.data import teacher_latents as latents
from distill.data.prompts import PromptData, cached_prompt_data
from distill.data.teacher_latents import TeacherLatents, TeacherSampling, cached_teacher_latents
from distill.networks.base import open_base
from distill.networks.build import Networks, denoiser, guided_teacher_flow
from distill.streams import named_rng

CPU = torch.device("cpu")
SHAPE = (4, 3, 4, 4)


@pytest.fixture
def config(tiny_config: DistillConfig) -> DistillConfig:
    return with_method(tiny_config, "rcm")


@pytest.fixture
def data(config: DistillConfig, tmp_path: Path) -> PromptData:
    return cached_prompt_data(config, open_base(config.base), tmp_path / "cache", CPU)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "SHARD_SIZE", 2)


def make(
    config: DistillConfig, networks: Networks, data: PromptData, cache: Path, num_steps: int = 3, shift: float = 3.0
) -> TeacherLatents:
    sampling = TeacherSampling(num_steps=num_steps, shift=shift)
    return cached_teacher_latents(config, sampling, open_base(config.base), networks, data, SHAPE, cache, CPU)


def test_samples_are_those_of_the_guided_teacher(
    config: DistillConfig, tiny_networks: Networks, data: PromptData, tmp_path: Path
) -> None:
    made = make(config, tiny_networks, data, tmp_path)
    assert sorted(path.name for path in made.folder.iterdir()) == [f"0000{shard}.safetensors" for shard in range(3)]
    got = made.batch([3, 0, 3], CPU)
    assert got.shape == (3, *SHAPE) and got.dtype == torch.float32
    assert torch.equal(got[0], got[2])
    batch = data.batch([2, 3], CPU)
    noise = torch.randn((2, *SHAPE), generator=named_rng(0, "teacher-latents", 1))

    def guided(x: torch.Tensor, timestep_B: torch.Tensor, embeds_BLD: torch.Tensor) -> torch.Tensor:
        teacher = denoiser(tiny_networks.teacher, "fp32")
        return guided_teacher_flow(teacher, x, timestep_B, embeds_BLD, batch.negative_prompt_embeds, 3.0)

    sigmas = [3 * u / (1 + 2 * u) for u in (1, 2 / 3, 1 / 3, 0)]
    with torch.no_grad():
        want = rollout(
            guided, noise[None], batch.prompt_embeds, sigmas, [1000 * sigma for sigma in sigmas[:-1]], sampler="ode"
        )
    torch.testing.assert_close(got[0], want[1])


def test_made_once_and_completed_after_an_interruption(
    config: DistillConfig,
    tiny_networks: Networks,
    data: PromptData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = make(config, tiny_networks, data, tmp_path)
    before = whole.batch(list(range(5)), CPU)
    last, damaged = whole.folder / "00002.safetensors", whole.folder / "00001.safetensors"
    last.unlink()
    damaged.write_bytes(damaged.read_bytes()[:20])
    sampled = []
    original = latents._sample_shard
    monkeypatch.setattr(latents, "_sample_shard", lambda *args: sampled.append(args[4]) or original(*args))
    assert torch.equal(make(config, tiny_networks, data, tmp_path).batch(list(range(5)), CPU), before)
    assert sampled == [1, 2]
    make(config, tiny_networks, data, tmp_path)
    assert sampled == [1, 2]


def test_other_settings_get_other_samples_and_other_seeds_the_same(
    config: DistillConfig, tiny_networks: Networks, data: PromptData, tmp_path: Path
) -> None:
    folders = {make(config, tiny_networks, data, tmp_path, *sampling).folder for sampling in ((4,), (3, 2.0), ())}
    folders.add(make(with_overrides(config, ["guidance_scale=2"]), tiny_networks, data, tmp_path).folder)
    assert len(folders) == 4
    other = with_overrides(with_method(config, "dcm"), ["seed=7"])
    assert make(other, tiny_networks, data, tmp_path).folder in folders


def test_another_seed_of_the_samples_gives_other_samples(
    config: DistillConfig, tiny_networks: Networks, data: PromptData, tmp_path: Path
) -> None:
    """samples_seed, for runs that are to differ in the teacher's samples too, as those of `eval compare`."""
    first = make(config, tiny_networks, data, tmp_path)
    other = make(with_overrides(config, ["samples_seed=1"]), tiny_networks, data, tmp_path)
    assert not torch.allclose(first.batch([0, 1], torch.device("cpu")), other.batch([0, 1], torch.device("cpu")))


def test_a_teacher_that_yields_no_numbers_is_refused(
    config: DistillConfig, tiny_networks: Networks, data: PromptData, tmp_path: Path
) -> None:
    with torch.no_grad():
        tiny_networks.teacher.proj_out.bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        make(config, tiny_networks, data, tmp_path)
    assert not list(tmp_path.glob("teacher-latents-*/*"))


def test_full_disk_leaves_no_shard(
    config: DistillConfig,
    tiny_networks: Networks,
    data: PromptData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(latents, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        make(config, tiny_networks, data, tmp_path)
    assert not list(tmp_path.glob("teacher-latents-*/*.safetensors"))


def test_a_shard_that_has_gone_is_named(
    config: DistillConfig, tiny_networks: Networks, data: PromptData, tmp_path: Path
) -> None:
    made = make(config, tiny_networks, data, tmp_path)
    path = made.folder / "00001.safetensors"
    save_file({"x0": load_file(path)["x0"][:1].clone()}, path)
    with pytest.raises(CheckpointError, match="teacher sample 3 cannot be read"):
        made.batch([3], CPU)
    path.unlink()
    with pytest.raises(CheckpointError, match="teacher sample 2 cannot be read"):
        made.batch([2], CPU)


def test_a_shard_with_values_that_are_no_numbers_is_named(
    config: DistillConfig, tiny_networks: Networks, data: PromptData, tmp_path: Path
) -> None:
    made = make(config, tiny_networks, data, tmp_path)
    path = made.folder / "00001.safetensors"
    x0 = load_file(path)["x0"].clone()
    x0[1, 0, 0, 0, 0] = float("nan")
    save_file({"x0": x0}, path)
    with pytest.raises(CheckpointError, match=r"teacher sample 3 in .*00001.safetensors is not finite"):
        made.batch([2, 3], CPU)
    assert bool(made.batch([2], CPU).isfinite().all())
