"""The teacher beside the student: it is diffusers' WanPipeline on the student's noise, and its settings are judged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from codmd_serve.config import GenerateParams, default_bundle_path
from codmd_serve.engine import Engine, draw_noise
from codmd_serve.errors import CancelledError, CheckpointError, GenerationError
from codmd_serve.loading import load_engine
from codmd_serve.wan.teacher import TeacherSpec, read_teacher_spec

PROMPT = "a red circle moves right quickly on a black background"
SHAPE = {"height": 64, "width": 64, "num_frames": 9}
NUM_STEPS = 10


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded pipeline and student, whose teacher takes ten steps."""
    folder = tmp_path_factory.mktemp("weights")
    embedded = default_bundle_path().parent
    shutil.copytree(embedded / "shapeworld", folder / "shapeworld")
    shutil.copytree(embedded / "shapeworld-dmd", folder / "shapeworld-dmd")
    spec = json.loads((folder / "shapeworld" / "teacher.json").read_text())
    (folder / "shapeworld" / "teacher.json").write_text(json.dumps({**spec, "num_steps": NUM_STEPS}))
    return folder


@pytest.fixture(scope="module")
def engine(weights: Path) -> Engine:
    return load_engine(weights / "shapeworld-dmd", "cpu", "float32", teacher=True)


def params_of(engine: Engine, seed: int = 3, **changes: object) -> GenerateParams:
    assert engine.teacher is not None
    values = {"prompt": PROMPT, "seed": seed, "fps": 16, "crf": 18, "teacher": engine.teacher.fingerprint, **SHAPE}
    return GenerateParams(**{**values, **changes})  # type: ignore[arg-type]


def pipeline_latents(weights: Path, seed: int, scheduler: object = None) -> torch.Tensor:
    pipeline = WanPipeline.from_pretrained(weights / "shapeworld")
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = scheduler
    made = pipeline(
        PROMPT,
        **SHAPE,
        num_inference_steps=NUM_STEPS,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    )
    latents: torch.Tensor = made.frames
    return latents


def test_teacher_is_the_stock_pipeline_on_the_noise_of_the_same_seed(engine: Engine, weights: Path) -> None:
    expected = pipeline_latents(weights, seed=3)
    made = engine.denoised(params_of(engine))
    assert made.shape == expected.shape
    # Two products in place of three, fused: rounding, which ten guided steps grow.
    assert float((made - expected).abs().max()) < 2e-3 * float(expected.abs().max())


def test_frames_of_the_teacher_are_those_of_the_stock_pipeline(engine: Engine, weights: Path) -> None:
    pipeline = WanPipeline.from_pretrained(weights / "shapeworld")
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(3)
    frames = pipeline(
        PROMPT, **SHAPE, num_inference_steps=NUM_STEPS, guidance_scale=3.0, generator=rng, output_type="np"
    ).frames[0]
    expected = np.rint(255 * np.asarray(frames)).astype(np.int16)
    x0_pred = engine.denoised(params_of(engine))
    made = torch.cat(list(engine.decoder.frames(x0_pred)), dim=1)[0].numpy().astype(np.int16)
    assert made.shape == expected.shape and np.abs(made - expected).max() <= 2


def test_a_multistep_scheduler_forgets_the_video_before(engine: Engine, weights: Path) -> None:
    """Published Wan pipelines have UniPC, which keeps the outputs of earlier steps."""
    assert engine.teacher is not None
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=4.0)
    expected = pipeline_latents(weights, 3, unipc)
    from diffusers import WanTransformer3DModel

    from codmd_serve.wan.checkpoint import load_bundle
    from codmd_serve.wan.teacher import Teacher, load_module
    from codmd_serve.wan.transformer import sdpa

    bundle = load_bundle(weights / "shapeworld-dmd")
    transformer = load_module(WanTransformer3DModel, weights / "shapeworld", "transformer", torch_dtype=torch.float32)
    teacher = Teacher("t", engine.teacher.spec, transformer, unipc, sdpa)
    prompt = teacher.encode(engine.embedder(PROMPT), engine.embedder(""))
    noise = engine.draw(params_of(engine))
    for _ in range(2):
        made = teacher(noise, prompt)
        assert float((made - expected).abs().max()) < 2e-3 * float(expected.abs().max())
    assert bundle.spec.base_model == "shapeworld"


def test_teacher_and_student_begin_with_the_same_noise(engine: Engine) -> None:
    noise = engine.draw(params_of(engine))
    student = engine.draw(params_of(engine, teacher=""))
    assert noise.shape[0] == 1 and student.shape[0] == 4
    assert torch.equal(noise[0], student[0]) and torch.equal(noise, draw_noise(3, tuple(noise.shape)))


def test_facts_name_the_teacher_and_what_it_takes(engine: Engine) -> None:
    facts = engine.facts.teacher
    assert facts is not None and engine.teacher is not None
    assert (facts.name, facts.num_steps, facts.guidance_scale) == ("shapeworld", NUM_STEPS, 3.0)
    assert facts.fingerprint == engine.teacher.fingerprint and facts.service_s > engine.facts.service_s


def test_video_of_the_teacher_reports_its_own_steps_and_previews(engine: Engine, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    previews: list[bytes] = []
    video = engine.begin(
        params_of(engine), tmp_path / "a.mp4", lambda *said: told.append(said), lambda image: previews.append(image)
    )
    assert video.result().timings_ms["denoise"] > 0 and (tmp_path / "a.mp4").stat().st_size > 0
    assert [said for said in told if said[0] == "denoise"] == [("denoise", k + 1, NUM_STEPS) for k in range(NUM_STEPS)]
    assert len(set(previews)) == NUM_STEPS


def test_cancelled_teacher_stops_between_two_steps_and_the_next_video_is_right(engine: Engine, tmp_path: Path) -> None:
    before = engine.denoised(params_of(engine))

    def stop(stage: str, done: int, _total: int) -> None:
        if (stage, done) == ("denoise", 2):
            raise CancelledError("enough")

    with pytest.raises(CancelledError):
        engine.generate(params_of(engine), tmp_path / "a.mp4", stop)
    assert not (tmp_path / "a.mp4").exists()
    assert torch.equal(engine.denoised(params_of(engine)), before)


def test_an_engine_without_that_teacher_says_so(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="not served any more") as caught:
        engine.generate(params_of(engine, teacher="another"), tmp_path / "a.mp4")
    assert caught.value.code == "no_teacher"


def test_student_is_untouched_by_the_teacher_beside_it(engine: Engine, weights: Path, tmp_path: Path) -> None:
    alone = load_engine(weights / "shapeworld-dmd", "cpu", "float32")
    assert alone.teacher is None and alone.facts.teacher is None
    params = params_of(engine, teacher="")
    engine.generate(params, tmp_path / "a.mp4")
    alone.generate(params, tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_fingerprint_changes_with_weights_and_settings(engine: Engine) -> None:
    from codmd_serve.wan.teacher import Teacher

    assert engine.teacher is not None
    made = {engine.teacher.fingerprint}
    for spec in (replace(engine.teacher.spec, num_steps=9), replace(engine.teacher.spec, negative_prompt="a ring")):
        source = small_transformer(0)
        made.add(Teacher("t", spec, source, engine.teacher._scheduler, lambda *_: None).fingerprint)  # type: ignore[arg-type,return-value]
    made.add(Teacher("t", engine.teacher.spec, small_transformer(1), engine.teacher._scheduler, None).fingerprint)  # type: ignore[arg-type]
    assert len(made) == 4


def small_transformer(seed: int) -> object:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=8,
        num_layers=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "teacher.json"),
        ("[]", "teacher.json"),
        ('{"steps": 5}', "steps"),
        ('{"num_steps": 0}', "num_steps must be in 1..1000, got 0"),
        ('{"num_steps": true}', "num_steps must be in 1..1000"),
        ('{"num_steps": 2.5}', "num_steps must be in 1..1000"),
        ('{"guidance_scale": -1}', "guidance_scale must be in 0..100"),
        ('{"guidance_scale": "3"}', "guidance_scale must be in 0..100"),
        ('{"guidance_scale": 1e999}', "guidance_scale must be in 0..100"),
        ('{"negative_prompt": 3}', "negative_prompt must be text"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "teacher.json").write_text(content)
    with pytest.raises(CheckpointError, match=words.replace(".", r"\.")):
        read_teacher_spec(tmp_path)


def test_without_settings_they_are_those_that_wan_published(tmp_path: Path) -> None:
    assert read_teacher_spec(tmp_path) == TeacherSpec(num_steps=50, guidance_scale=5.0, negative_prompt="")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"scheduler": ["diffusers", "NoSuchScheduler"]}, "no scheduler of diffusers"),
        ({"scheduler": None}, "no scheduler of diffusers"),
        ({"scheduler": ["diffusers", "EulerDiscreteScheduler"]}, "not one of a flow"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "two transformers"),
    ],
)
def test_a_base_that_cannot_be_a_teacher_is_refused_at_start(
    weights: Path, tmp_path: Path, index: dict[str, object], words: str
) -> None:
    shutil.copytree(weights, tmp_path / "weights")
    path = tmp_path / "weights" / "shapeworld" / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **index}))
    with pytest.raises(CheckpointError, match=words):
        load_engine(tmp_path / "weights" / "shapeworld-dmd", "cpu", teacher=True)
