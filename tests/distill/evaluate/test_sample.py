"""Sampling of every arm with the tiny pipeline: equal to diffusers, paired by noise, deterministic."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.wan.checkpoint import load_bundle
from codmd_serve.wan.vae import latent_shape
from distill.evaluate.sample import (
    Canvas,
    Request,
    SampledModel,
    draw_bench_noise,
    embed_captions,
    load_student,
    load_teacher,
    render_truth,
    sample_student,
    sample_teacher,
    teacher_latents,
    through_vae,
)

CPU = torch.device("cpu")
CANVAS = Canvas(32, 32, 9)
CAPTIONS = ("a red circle moves right quickly on a black background", "a blue ring stays still")
REQUESTS = [Request(CAPTIONS[0], 0, 0), Request(CAPTIONS[1], 1, 0), Request(CAPTIONS[0], 0, 1)]


@pytest.fixture(scope="module")
def teacher(tiny_base: Path) -> SampledModel:
    return load_teacher(str(tiny_base), CPU)


@pytest.fixture(scope="module")
def student(tiny_bundle: Path) -> SampledModel:
    return load_student(tiny_bundle, CPU)


@pytest.mark.parametrize(("num_steps", "guidance"), [(5, 3.0), (4, 1.0)])
def test_sample_teacher_equals_diffusers(
    teacher: SampledModel, tiny_pipeline: WanPipeline, num_steps: int, guidance: float
) -> None:
    shape = latent_shape(teacher.vae, 32, 32, 9)
    noise = draw_bench_noise(REQUESTS, shape, 1, bench_seed=3)
    tiny_pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": num_steps, "guidance_scale": guidance, "latents": noise[0].clone()}
    prompts = [request.caption for request in REQUESTS]
    sizes = {"height": 32, "width": 32, "num_frames": 9}
    expected = tiny_pipeline(prompts, negative_prompt="", output_type="latent", **options, **sizes).frames
    rows, embeds = embed_captions(teacher, prompts)
    with torch.inference_mode():
        latents = teacher_latents(teacher, noise, embeds[[rows[p] for p in prompts]], embeds[:1], num_steps, guidance)
    assert embeds.shape[1] < 32  # trimmed, or the comparison would prove nothing about it
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    options["latents"] = noise[0].clone()
    video = tiny_pipeline(prompts, negative_prompt="", output_type="np", **options, **sizes).frames
    clips = sample_teacher(teacher, REQUESTS, num_steps=num_steps, guidance_scale=guidance, bench_seed=3, canvas=CANVAS)
    assert np.abs(clips.astype(int) - np.rint(video * 255).astype(int)).max() <= 1


def test_sample_student_equals_its_own_rollout(student: SampledModel, tiny_bundle: Path) -> None:
    spec = load_bundle(tiny_bundle).spec
    assert (student.sigmas, student.timesteps, student.sampler) == (spec.sigmas, spec.timesteps, spec.sampler)
    clips = sample_student(student, REQUESTS, bench_seed=3, canvas=CANVAS)
    assert clips.shape == (3, 9, 32, 32, 3) and clips.dtype == np.uint8
    again = sample_student(student, REQUESTS[1:], bench_seed=3, canvas=CANVAS)
    assert np.abs(clips[1:].astype(int) - again.astype(int)).max() <= 1  # the batch around a clip does not matter
    assert not np.array_equal(clips[0], clips[2])


def test_draw_noise_pairs_arms_and_tells_seeds_apart() -> None:
    one = draw_bench_noise(REQUESTS, (4, 3, 4, 4), 1, bench_seed=0)
    four = draw_bench_noise(REQUESTS, (4, 3, 4, 4), 4, bench_seed=0)
    assert torch.equal(one[0], four[0])
    distinct = [one[0, 0], one[0, 1], one[0, 2], four[1, 0], four[2, 0]]
    distinct.append(draw_bench_noise(REQUESTS, (4, 3, 4, 4), 1, bench_seed=0, repeat=1)[0, 0])
    distinct.append(draw_bench_noise(REQUESTS, (4, 3, 4, 4), 1, bench_seed=1)[0, 0])
    for index, first in enumerate(distinct):
        for second in distinct[:index]:
            assert not torch.equal(first, second)
    many = draw_bench_noise([Request("", 0, seed) for seed in range(200)], (4, 3, 4, 4), 1, bench_seed=0)
    assert abs(float(many.mean())) < 0.02 and abs(float(many.std()) - 1) < 0.02


def test_sample_batches_alike(teacher: SampledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    options = {"num_steps": 2, "guidance_scale": 2.0, "bench_seed": 0, "canvas": CANVAS}
    whole = sample_teacher(teacher, REQUESTS, **options, on_clips=done.append)
    monkeypatch.setattr("distill.evaluate.sample.BATCH_SIZE", 2)
    parts = sample_teacher(teacher, REQUESTS, **options, on_clips=done.append)
    assert done == [3, 2, 1]
    assert np.abs(whole.astype(int) - parts.astype(int)).max() <= 1


def test_render_truth_is_the_world(teacher: SampledModel) -> None:
    requests = [Request("a red circle moves right quickly on a black background", 0, seed) for seed in range(2)]
    clips = render_truth(requests, 0)
    assert clips.shape == (2, 25, 96, 96, 3)
    assert np.array_equal(clips, render_truth(requests, 0))
    assert not np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips, render_truth(requests, 0, repeat=1))


def test_through_vae_equals_encode_and_decode(teacher: SampledModel) -> None:
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (2, 9, 32, 32, 3)).astype(np.uint8)
    shown = through_vae(teacher, clips)
    pixels = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        direct = teacher.vae.decode(teacher.vae.encode(pixels).latent_dist.mode()).sample
    expected = ((direct.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 4, 1).numpy()
    assert np.abs(shown.astype(int) - expected.astype(int)).max() <= 1


def test_load_teacher_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no pipeline"):
        load_teacher(str(tmp_path / "nowhere"), CPU)


def test_sample_teacher_refuses_no_steps(teacher: SampledModel) -> None:
    with pytest.raises(ConfigError, match="steps"):
        sample_teacher(teacher, REQUESTS, num_steps=0, guidance_scale=1.0, bench_seed=0)
