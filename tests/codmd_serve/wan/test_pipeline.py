"""A bundle written as a diffusers folder is sampled by the stock WanPipeline as by our sampler."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from codmd_serve.config import default_bundle_path
from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.sampler import rollout
from codmd_serve.student_scheduler import StudentScheduler
from codmd_serve.wan.attention import compact_prompt_embeds, use_compact_cross_attention
from codmd_serve.wan.checkpoint import StudentSpec, load_bundle, read_spec, save_bundle
from codmd_serve.wan.pipeline import save_pipeline
from codmd_serve.wan.text import encode_prompts
from codmd_serve.wan.vae import StreamingDecoder, latent_shape

PROMPT = "a red circle moves right quickly on a black background"


def our_frames(path: Path, seed: int) -> np.ndarray:
    """Frames of the sampler that serves and trains, uint8 (T, H, W, 3), from the noise that the engine draws."""
    bundle = load_bundle(path)
    use_compact_cross_attention(bundle.transformer)
    spec, native = bundle.spec, bundle.spec.native
    embeds = compact_prompt_embeds(encode_prompts(bundle.tokenizer, bundle.text_encoder, [PROMPT]))
    shape = latent_shape(bundle.vae, native.height, native.width, native.num_frames)
    noise = torch.randn((len(spec.timesteps), 1, *shape), generator=torch.Generator().manual_seed(seed))

    def denoise(latents: torch.Tensor, timestep_B: torch.Tensor, embeds_BLD: torch.Tensor) -> torch.Tensor:
        return bundle.transformer(latents, timestep_B, embeds_BLD, return_dict=False)[0]

    with torch.no_grad():
        x0_pred = rollout(denoise, noise, embeds, spec.sigmas, spec.timesteps, sampler=spec.sampler)
        return torch.cat(list(StreamingDecoder(bundle.vae).frames(x0_pred)), dim=1)[0].numpy()


def stock_frames(folder: Path, spec: StudentSpec, seed: int, *, with_generator: bool = False) -> np.ndarray:
    """Frames of the stock pipeline, float (T, H, W, 3) in 0..255."""
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(seed) if with_generator else None
    pipeline.scheduler.generator = rng
    torch.manual_seed(99 if with_generator else seed)
    native = spec.native
    size = {"height": native.height, "width": native.width, "num_frames": native.num_frames}
    steps = len(spec.timesteps)
    video = pipeline(PROMPT, num_inference_steps=steps, guidance_scale=1.0, generator=rng, **size).frames[0]
    return 255 * np.asarray(video)


@pytest.mark.parametrize("with_generator", [False, True])
def test_stock_pipeline_makes_the_video_of_our_sampler(tmp_path: Path, with_generator: bool) -> None:
    """The embedded student in float32. The stock network attends to zero padding that ours leaves out, and sums in
    another order: pixels may differ by rounding, 1 of 255, and not one in a thousand does.
    """
    bundle = default_bundle_path()
    save_pipeline(bundle, tmp_path / "pipeline")
    stock = stock_frames(tmp_path / "pipeline", read_spec(bundle), 7, with_generator=with_generator)
    ours = our_frames(bundle, 7)
    assert stock.shape == ours.shape == (25, 96, 96, 3)
    assert ours.std() > 10
    assert np.abs(stock - ours).max() < 0.51  # half of a level is the rounding of `ours` itself
    assert (np.rint(stock) != ours).mean() < 1e-3
    assert np.abs(stock - our_frames(bundle, 8)).max() > 50


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_folder_is_whole_and_survives_being_saved_again(
    tiny_bundle: Path, tiny_base: Path, tmp_path: Path, sampler: str
) -> None:
    shutil.copytree(tiny_base, tmp_path / "tiny")
    bundle = load_bundle(tiny_bundle)
    spec = dataclasses.replace(bundle.spec, sampler=sampler)
    save_bundle(tmp_path / "student", bundle.transformer, spec)
    for _ in range(2):  # the second replaces the first
        save_pipeline(tmp_path / "student", tmp_path / "pipeline")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline", "student", "tiny"]
    shutil.rmtree(tmp_path / "tiny")
    first = stock_frames(tmp_path / "pipeline", spec, 3)
    pipeline = WanPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(pipeline.scheduler, StudentScheduler)
    assert pipeline.scheduler.config.sampler == sampler
    pipeline.save_pretrained(tmp_path / "again")
    assert np.array_equal(stock_frames(tmp_path / "again", spec, 3), first)
    card = (tmp_path / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert "num_inference_steps=4" in card and "height=32" in card


def test_student_that_starts_below_sigma_1_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    spec = dataclasses.replace(bundle.spec, base=str(tiny_bundle.parent / "tiny"), sigmas=(0.99, 0.9, 0.8, 0.6, 0.0))
    save_bundle(tmp_path / "student", bundle.transformer, spec)
    with pytest.raises(ConfigError, match=r"starts at sigma 0\.99"):
        save_pipeline(tmp_path / "student", tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: shutil.rmtree(base / "vae"), "it has no vae"),
        (lambda base: (base / "model_index.json").write_text("{"), "cannot be read"),
        (lambda base: (base / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'), "of a WanPipeline"),
        (
            lambda base: (base / "model_index.json").write_text(
                json.dumps({"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]})
            ),
            "two transformers",
        ),
    ],
)
def test_incomplete_base_is_refused_by_name(
    tiny_bundle: Path, tiny_base: Path, tmp_path: Path, damage: object, message: str
) -> None:
    shutil.copytree(tiny_base, tmp_path / "tiny")
    shutil.copytree(tiny_bundle, tmp_path / "student")
    damage(tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=message):
        save_pipeline(tmp_path / "student", tmp_path / "pipeline")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "tiny"]


def test_full_disk_leaves_the_folder_that_was_there(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pipeline(tiny_bundle, tmp_path / "pipeline")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StudentScheduler, "save_pretrained", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        save_pipeline(tiny_bundle, tmp_path / "pipeline")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
