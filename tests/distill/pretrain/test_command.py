"""`codmd-distill teacher` on the tiny preset: a real WanPipeline folder, resumable, with clear refusals."""

import dataclasses
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file

from codmd_serve.errors import ConfigError
from distill.cli import main
from distill.pretrain import stage
from distill.pretrain.clips import ClipSource
from distill.pretrain.config import PRETRAIN_PRESETS, VaeConfig, VaePhase, tiny
from distill.pretrain.latents import encode_clips
from distill.pretrain.pool import render_clips, to_pixels


def teacher(*arguments: str) -> int:
    return main(["teacher", "--preset", "tiny", "--device", "cpu", "--precision", "fp32", *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    assert teacher("--out", str(out)) == 0
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((run / "pipeline").glob("*/*.safetensors")):
        found |= {f"{path.parent.name}.{key}": value for key, value in load_file(path).items()}
    return found


def test_pipeline_is_complete_for_diffusers(finished: Path) -> None:
    pipeline = WanPipeline.from_pretrained(finished / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert next(pipeline.transformer.parameters()).dtype == torch.float32
    assert next(pipeline.vae.parameters()).dtype == torch.float32
    frames = pipeline(
        "a red circle moves right quickly on a black background",
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert np.asarray(frames).shape == (1, 17, 64, 64, 3)
    assert np.isfinite(np.asarray(frames)).all()


def test_the_vae_of_the_pipeline_encodes_to_white_latents(finished: Path) -> None:
    vae = AutoencoderKLWan.from_pretrained(finished / "pipeline" / "vae", torch_dtype=torch.float32)
    assert (vae.config.latents_mean, vae.config.latents_std) == ([0.0] * 16, [1.0] * 16)
    clips = render_clips(ClipSource(0), range(6), torch.device("cpu"))[0].pixels
    with torch.no_grad():
        rows = vae.encode(to_pixels(clips)).latent_dist.mean.permute(0, 2, 3, 4, 1).flatten(0, 3)
    # Within what storing the weights as float16 leaves of it.
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(16), rtol=0, atol=0.05)
    torch.testing.assert_close(rows.mean(0), torch.zeros(16), rtol=0, atol=0.05)


def test_latents_left_as_they_are_come_with_their_statistics(finished: Path) -> None:
    options = stage.StageOptions(
        folder=finished, device=torch.device("cpu"), precision="fp32", budget_s=None, stop=lambda: False
    )
    # The parts are there, so no VAE is asked for.
    encoded = encode_clips(None, tiny().transformer, ClipSource(0), options, whiten=False)  # type: ignore[arg-type]
    assert encoded is not None
    raw = torch.cat([load_file(path)["latents"] for path in sorted((finished / "latents").glob("*.safetensors"))])
    np.testing.assert_allclose(raw.float().mean((0, 2, 3, 4)), encoded.mean, atol=1e-5)
    np.testing.assert_allclose(raw.float().std((0, 2, 3, 4)), encoded.std, rtol=1e-4)
    assert abs(float(encoded.latents.float().std()) - 1) < 1e-3


def test_interrupted_run_resumes_to_the_same_weights(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert teacher("--out", str(out), "--until", "vae") == 0
    (out / "vae.pt").rename(tmp_path / "kept.pt")
    # Once more, but stopped in the middle of the VAE as by a signal, then resumed twice.
    checks = iter([False, True])
    original = stage.run_stage
    monkeypatch.setattr(
        "distill.pretrain.vae.run_stage",
        lambda *args, **options: original(
            *args[:-1], dataclasses.replace(args[-1], stop=lambda: next(checks)), **options
        ),
    )
    assert teacher("--out", str(out), "--resume") == 0
    assert torch.load(out / "vae.pt", weights_only=True)["step"] == 1
    monkeypatch.undo()
    assert teacher("--out", str(out), "--resume", "--until", "text") == 0
    assert teacher("--out", str(out), "--resume") == 0
    expected, got = weights(finished), weights(out)
    assert expected.keys() == got.keys() and len(got) > 100
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def test_start_goes_on_from_the_weights_of_a_pipeline(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = dataclasses.replace(tiny(), vae=VaeConfig(base_dim=8, phases=(), whiten=False))
    still = dataclasses.replace(still, text=dataclasses.replace(still.text, num_steps=0))
    still = dataclasses.replace(still, transformer=dataclasses.replace(still.transformer, num_steps=0))
    monkeypatch.setitem(PRETRAIN_PRESETS, "tiny", lambda: still)
    assert teacher("--out", str(tmp_path / "run"), "--start", str(finished / "pipeline")) == 0
    expected, got = weights(finished), weights(tmp_path / "run")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        if name.startswith(("transformer.patch_embedding.weight", "transformer.proj_out")):
            # They follow the scale of the latents, which is measured anew; here it is 1 but for float16.
            torch.testing.assert_close(got[name], tensor, rtol=0.02, atol=1e-3, msg=name)
        else:
            assert torch.equal(tensor, got[name]), name


def test_decoder_only_keeps_the_encoder_and_the_latent_statistics(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = (VaePhase(num_frames=5, batch_size=1, num_steps=2),)
    config = dataclasses.replace(tiny(), vae=VaeConfig(base_dim=8, phases=phases, decoder_only=True))
    monkeypatch.setitem(PRETRAIN_PRESETS, "tiny", lambda: config)
    start = finished / "pipeline"
    assert teacher("--out", str(tmp_path / "run"), "--start", str(start), "--until", "vae") == 0
    before, after = (
        load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
        for folder in (start, tmp_path / "run" / "pipeline")
    )
    changed = {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {"post_quant_conv", "decoder"}
    kept, made = (json.loads((f / "vae/config.json").read_text()) for f in (start, tmp_path / "run" / "pipeline"))
    assert {key: value for key, value in made.items() if key != "_name_or_path"} == kept
    assert teacher("--out", str(tmp_path / "alone"), "--until", "vae") == 2
    assert "--start" in capsys.readouterr().err


def test_start_of_another_layout_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert teacher("--out", str(tmp_path / "a"), "--start", str(tmp_path / "nowhere")) == 2
    assert "no pipeline at" in capsys.readouterr().err
    assert teacher("--out", str(tmp_path / "b"), "--preset", "shapeworld", "--start", str(finished / "pipeline")) == 2
    assert "another layout" in capsys.readouterr().err


def test_time_budget_ends_every_stage_early(tmp_path: Path) -> None:
    assert teacher("--out", str(tmp_path / "run"), "--minutes", "0.0001") == 0
    for name in ("vae", "text", "transformer"):
        assert torch.load(tmp_path / "run" / f"{name}.pt", weights_only=True)["step"] == 1


def test_time_budget_ends_the_latents_with_the_parts_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.pretrain.latents.CLIPS_PER_FILE", 2)
    out = tmp_path / "run"
    assert teacher("--out", str(out), "--minutes", "0.0001") == 0
    assert [path.name for path in sorted((out / "latents").iterdir())] == ["00000000.safetensors"]
    assert set(json.loads((out / "elapsed.json").read_text())) == {"other", "text", "vae", "latents", "transformer"}
    # With time again, the run goes on where it was: the transformer has had its share and is done.
    assert teacher("--out", str(out), "--resume", "--minutes", "10") == 0
    assert len(list((out / "latents").iterdir())) == 3


def test_a_signal_in_the_middle_of_a_part_ends_the_latents_at_once(finished: Path, tmp_path: Path) -> None:
    vae = AutoencoderKLWan.from_pretrained(finished / "pipeline" / "vae", torch_dtype=torch.float32)
    config = dataclasses.replace(tiny().transformer, encode_batch=1)
    answers = iter([False, False, True])
    options = stage.StageOptions(
        folder=tmp_path, device=torch.device("cpu"), precision="fp32", budget_s=None, stop=lambda: next(answers, True)
    )
    assert encode_clips(vae, config, ClipSource(0), options, whiten=True) is None
    assert list((tmp_path / "latents").iterdir()) == []


def test_processes_render_and_snapshots_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    transformer = dataclasses.replace(
        config.transformer, num_clips=20, keep_latents=False, num_steps=2, snapshot_s=1e-6, curve_seeds=2, curve_steps=2
    )
    config = dataclasses.replace(config, transformer=transformer, render_processes=1)
    monkeypatch.setitem(PRETRAIN_PRESETS, "tiny", lambda: config)
    out = tmp_path / "run"
    assert teacher("--out", str(out)) == 0
    assert not (out / "latents").exists()
    curve = json.loads((out / "curve.json").read_text())
    assert [row["step"] for row in curve["rows"]] == [1, 2, None]
    assert all(0 <= row["tau_error"] <= 2 and row["marginal_error"] > 0 for row in curve["rows"])
    assert len(curve["captions"]) == 4
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--preset", "huge"],
            "--preset must be one of shapeworld, tiny, more, decoder, next, gpu, gpu-more, gpu-tiny",
        ),
        (["--minutes", "0"], "--minutes must be positive"),
        (["--precision", "int4"], "--precision must be auto, fp32 or bf16"),
        (["--device", "cuda:77"], "no device cuda:77"),
        (["--resume"], "holds no run to resume"),
    ],
)
def test_bad_settings_are_one_line_and_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert teacher("--out", str(tmp_path / "run"), *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("codmd-distill: ") and message in error and "\n" not in error


def test_a_used_folder_other_settings_and_a_damaged_state_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert teacher("--out", str(finished)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert teacher("--out", str(finished), "--resume", "--seed", "1") == 2
    assert "other settings" in capsys.readouterr().err
    assert teacher("--out", str(tmp_path / "run"), "--until", "vae") == 0
    (tmp_path / "run" / "vae.pt").write_bytes(b"half")
    assert teacher("--out", str(tmp_path / "run"), "--resume") == 2
    assert "delete it to start this stage anew" in capsys.readouterr().err


def test_gpu_more_leaves_the_vae_of_the_start_alone_and_gives_its_time_to_the_transformer() -> None:
    gpu, more = PRETRAIN_PRESETS["gpu"](), PRETRAIN_PRESETS["gpu-more"]()
    assert gpu.vae.phases and more.vae.phases == ()
    assert dataclasses.replace(more.transformer, num_clips=gpu.transformer.num_clips) == gpu.transformer
    assert more.transformer.num_clips > gpu.transformer.num_clips > gpu.pool_clips
    assert more.text == gpu.text


def test_a_pool_too_small_for_the_encoder_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="pool_clips must hold two batches"):
        dataclasses.replace(PRETRAIN_PRESETS["gpu"](), pool_clips=128)


def test_a_vae_that_is_not_trained_keeps_its_basis_and_its_students(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    kept = dataclasses.replace(
        config,
        vae=dataclasses.replace(config.vae, phases=()),
        transformer=dataclasses.replace(config.transformer, num_steps=0),
    )
    monkeypatch.setitem(PRETRAIN_PRESETS, "kept", lambda: kept)
    start, out = finished / "pipeline", tmp_path / "run"
    assert teacher("--out", str(out), "--preset", "kept", "--start", str(start), "--seed", "5") == 0
    for name in ("vae", "transformer"):
        before, after = (
            load_file(folder / name / "diffusion_pytorch_model.safetensors") for folder in (start, out / "pipeline")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    first, second = (json.loads((folder / "vae" / "config.json").read_text()) for folder in (start, out / "pipeline"))
    assert (first["latents_mean"], first["latents_std"]) == (second["latents_mean"], second["latents_std"])
