"""Converted bundles: the recorded output comes out again, guesses are told, and nothing is left half written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from codmd_serve.config import GenerateParams
from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.grid import causvid_grid, codmd_14b_grid, rcm_grid, wan_1_3b_grid, wan_14b_grid
from codmd_serve.loading import load_engine
from codmd_serve.student_scheduler import StudentScheduler
from codmd_serve.wan.checkpoint import NativeShape, load_bundle, read_spec
from codmd_serve.wan.convert import FAMILIES, METHOD_SAMPLING, ConvertOptions, convert
from codmd_serve.wan.names import original_name
from codmd_serve.wan.pipeline import save_pipeline
from codmd_serve.wan.students import STUDENTS, Student

Write = Callable[..., Path]
# Sums of 96 products in another order than in the authors' code; the recorded values go up to 2.
TOLERANCE = 1e-5


def converted(source: Path, base: Path, output: Path, **options: Any) -> Any:
    return convert(source, base, output, ConvertOptions(**options), "1.2.3")


def flow_of(bundle: Path, io: dict[str, Tensor]) -> Tensor:
    transformer = load_bundle(bundle).transformer
    with torch.no_grad():
        flow: Tensor = transformer(io["latents_BCFHW"], io["timestep"], io["prompt_embeds_BLD"]).sample
    return flow


@pytest.mark.parametrize("style", ["original", "generator", "generator_ema", "rcm"])
def test_convert_gives_the_output_that_the_authors_code_gave(
    write: Write, golden_base: Path, golden_io: dict[str, Tensor], tmp_path: Path, style: str
) -> None:
    done = converted(write(style), golden_base, tmp_path / "bundle", bidirectional=style == "generator_ema")
    assert (flow_of(tmp_path / "bundle", golden_io) - golden_io["flow_pred_BCFHW"]).abs().max() < TOLERANCE
    assert read_spec(tmp_path / "bundle") == done.spec
    assert done.looks == FAMILIES[style].looks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "weights.bin"]


def test_convert_keeps_the_dtype_of_the_weights(write: Write, golden_base: Path, tmp_path: Path) -> None:
    source = write("rcm", lambda state: {name: tensor.bfloat16() for name, tensor in state.items()})
    converted(source, golden_base, tmp_path / "bundle")
    stored = load_file(tmp_path / "bundle/transformer/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_convert_reads_the_folder_of_a_diffusers_pipeline(golden_base: Path, tmp_path: Path) -> None:
    weights = "transformer/diffusion_pytorch_model.safetensors"
    shutil.copytree(golden_base, tmp_path / "student")
    save_file(
        {name: 0.5 * tensor for name, tensor in load_file(golden_base / weights).items()},
        tmp_path / "student" / weights,
    )
    done = converted(tmp_path / "student", golden_base, tmp_path / "bundle")
    stored, given = load_file(tmp_path / "bundle" / weights), load_file(tmp_path / "student" / weights)
    assert stored.keys() == given.keys() and all(torch.equal(stored[name], given[name]) for name in given)
    assert done.spec.method == "fastwan" and "attention" not in done.spec.assumed


def test_convert_merges_a_lora_into_the_base(golden_base: Path, tmp_path: Path) -> None:
    down, up = torch.randn(4, 96), torch.randn(96, 4)
    prefix = "diffusion_model.blocks.1.self_attn.q"
    save_file({f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}, tmp_path / "lora")
    done = converted(tmp_path / "lora", golden_base, tmp_path / "bundle")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    stored, given = load_file(tmp_path / "bundle" / weights), load_file(golden_base / weights)
    changed = [name for name in given if not torch.equal(stored[name], given[name])]
    assert changed == ["blocks.1.attn1.to_q.weight"] and done.num_tensors == 2
    torch.testing.assert_close(stored[changed[0]], given[changed[0]] + up @ down)
    assert load_bundle(tmp_path / "bundle").spec.sampler == "sde"


def test_a_converted_bundle_makes_a_video(
    write: Write, golden_base: Path, tmp_path: Path, read_video: Callable[[Path], Any]
) -> None:
    converted(write("rcm"), golden_base, tmp_path / "bundle", height=32, width=48, num_frames=5, fps=8)
    engine = load_engine(tmp_path / "bundle", "cpu")
    assert engine.preview_map == read_spec(tmp_path / "bundle").preview_map != ()
    params = GenerateParams(prompt="a red circle", seed=1, height=32, width=48, num_frames=5, fps=8, crf=18)
    engine.generate(params, tmp_path / "a.mp4")
    assert read_video(tmp_path / "a.mp4").frames.shape == (5, 32, 48, 3)


# what is guessed


@pytest.mark.parametrize(
    ("style", "method", "sampler", "timesteps", "ema"),
    [
        ("generator", "codmd", "sde", wan_1_3b_grid().timesteps, False),
        ("generator_ema", "self-forcing", "sde", wan_14b_grid().timesteps, True),
        ("rcm", "rcm", "sde", rcm_grid().timesteps, True),
        ("original", "lightx2v", "sde", wan_14b_grid().timesteps, False),
    ],
)
def test_sampling_is_guessed_from_the_family_and_recorded_as_assumed(
    write: Write,
    golden_base: Path,
    tmp_path: Path,
    style: str,
    method: str,
    sampler: str,
    timesteps: tuple[float, ...],
    ema: bool,
) -> None:
    converted(write(style), golden_base, tmp_path / "bundle", bidirectional=style == "generator_ema")
    spec = read_spec(tmp_path / "bundle")
    assert (spec.method, spec.sampler, spec.timesteps, spec.ema) == (method, sampler, timesteps, ema)
    assert spec.native == NativeShape(height=480, width=832, num_frames=81, fps=16)
    assert (spec.base_model, spec.package_version, spec.step) == ("golden-base", "1.2.3", 0)
    assert (tmp_path / "bundle" / spec.base).resolve() == golden_base.resolve()
    guessed = {"sigmas", "timesteps", "sampler", "native", "method", "step", "ema", "attention"}
    told = {"generator": {"ema"}, "generator_ema": {"ema", "attention"}}
    assert set(spec.assumed) == guessed - told.get(style, set())


def test_what_the_user_says_is_not_assumed(write: Write, golden_base: Path, tmp_path: Path) -> None:
    done = converted(
        write("generator"),
        golden_base,
        tmp_path / "bundle",
        method="causvid",
        sampler="ode",
        timesteps=(1000.0, 500.0),
        height=32,
        width=48,
        num_frames=5,
        fps=8,
    )
    assert done.spec.sigmas == (1.0, 0.5, 0.0) and done.spec.timesteps == (1000.0, 500.0)
    assert (done.spec.method, done.spec.sampler) == ("causvid", "ode")
    assert done.spec.native == NativeShape(height=32, width=48, num_frames=5, fps=8)
    assert done.spec.assumed == ("step", "attention")


def test_a_named_method_brings_its_own_steps(write: Write, golden_base: Path, tmp_path: Path) -> None:
    done = converted(write("generator"), golden_base, tmp_path / "bundle", method="causvid")
    assert done.spec.timesteps == causvid_grid().timesteps == (1000.0, 757.0, 522.0)
    assert "timesteps" in done.spec.assumed and "method" not in done.spec.assumed


def test_codmd_has_other_steps_at_14b() -> None:
    assert METHOD_SAMPLING["codmd"].grid(1536) == wan_1_3b_grid()
    assert METHOD_SAMPLING["codmd"].grid(5120) == codmd_14b_grid()


def test_codmd_14b_keeps_its_integers_through_convert_and_export(
    write: Write, golden_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codmd_serve.wan.families.WIDTH_14B", 96)  # the golden network stands for one of 5120
    converted(write("generator"), golden_base, tmp_path / "bundle")
    spec = read_spec(tmp_path / "bundle")
    assert spec.timesteps == (1000.0, 937.0, 833.0, 624.0) == STUDENTS["codmd-wan2.1-14b"].timesteps
    assert spec.sigmas == codmd_14b_grid().sigmas
    save_pipeline(tmp_path / "bundle", tmp_path / "pipeline")
    scheduler = StudentScheduler.from_pretrained(tmp_path / "pipeline", subfolder="scheduler")
    assert tuple(scheduler.config.timesteps) == spec.timesteps and tuple(scheduler.config.sigmas) == spec.sigmas
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["dmd2_config"]["denoising_timesteps"] == [1000, 937, 833, 624]
    again = converted(tmp_path / "pipeline", golden_base, tmp_path / "again").spec
    assert (again.timesteps, again.sigmas, again.sampler) == (spec.timesteps, spec.sigmas, "sde")


@pytest.mark.parametrize("student", [student for student in STUDENTS.values() if not student.refused])
def test_table_of_students_and_convert_sample_alike(student: Student) -> None:
    """What a file of the family is taken to be, without options, is what the table of published students says."""
    width = 5120 if "14b" in student.name else 1536
    sampling = METHOD_SAMPLING[student.method]
    assert (student.sampling, student.timesteps) == (sampling.sampler, sampling.grid(width).timesteps)
    families = [family for family in FAMILIES.values() if family.method == student.method]
    assert families or student.method == "causvid"  # a file of CausVid looks like one of CoDMD
    assert student.sampling == "sde"  # every published Wan2.1 student is sampled with fresh noise


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method must be one of codmd, causvid, .*, got 'magic'"):
        ConvertOptions(method="magic")


# what cannot work


def test_an_output_that_exists_is_left_alone(write: Write, golden_base: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/mine").write_text("precious")
    with pytest.raises(ConfigError, match=r"bundle exists already: name another folder, or delete it first"):
        converted(write("rcm"), golden_base, tmp_path / "bundle")
    assert (tmp_path / "bundle/mine").read_text() == "precious"


def test_an_output_without_a_folder_is_refused(write: Write, golden_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere to write bundle to"):
        converted(write("rcm"), golden_base, tmp_path / "nowhere/bundle")


def test_a_full_disk_leaves_nothing(
    write: Write, golden_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write("rcm")

    def full(self: Any, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(bytes(100))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WanTransformer3DModel, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"bundle cannot be written: .*No space left.*; nothing was left there"):
        converted(source, golden_base, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.bin"]


def test_a_checkpoint_of_another_architecture_is_refused(write: Write, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has 3 blocks of width 96 .*, the base 2 blocks of width 24"):
        converted(write("generator"), tiny_base, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_folder_of_other_heads_is_refused(golden_base: Path, tmp_path: Path) -> None:
    shutil.copytree(golden_base / "transformer", tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text())
    (tmp_path / "student/config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    with pytest.raises(CheckpointError, match="num_attention_heads is 4, the base has 2"):
        converted(tmp_path / "student", golden_base, tmp_path / "bundle")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_a_base_without_a_part_is_refused(write: Write, golden_base: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(golden_base, tmp_path / "base", ignore=shutil.ignore_patterns(part))
    with pytest.raises(CheckpointError, match=rf"has no {part}/: expected the diffusers folder of a Wan pipeline"):
        converted(write("rcm"), tmp_path / "base", tmp_path / "bundle")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"transformer/config\.json of .* cannot be read"),
        ('{"_class_name": "UNet2DModel"}', "no text-to-video Wan pipeline: its transformer is UNet2DModel"),
        ('{"_class_name": "WanTransformer3DModel", "image_dim": 1280}', "is an image-to-video WanTransformer3DModel"),
    ],
)
def test_a_base_that_is_no_text_to_video_wan_is_refused(
    write: Write, golden_base: Path, tmp_path: Path, content: str, message: str
) -> None:
    shutil.copytree(golden_base, tmp_path / "base")
    (tmp_path / "base/transformer/config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        converted(write("rcm"), tmp_path / "base", tmp_path / "bundle")


def test_no_base_is_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*gone: expected the diffusers folder"):
        converted(write("rcm"), tmp_path / "gone", tmp_path / "bundle")


# what stands beside the weights


def halved(folder: Path, target: Path) -> Path:
    """A copy of a pipeline folder whose transformer has other weights."""
    shutil.copytree(folder, target)
    weights = target / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: 0.5 * tensor for name, tensor in load_file(weights).items()}, weights)
    return target


def test_steps_that_a_folder_states_are_taken_and_not_assumed(golden_base: Path, tmp_path: Path) -> None:
    student = halved(golden_base, tmp_path / "student")
    index = json.loads((student / "model_index.json").read_text())
    block = {"num_inference_steps": 2, "denoising_timesteps": [999, 624], "solver": "ode", "guidance_scale": 1.0}
    (student / "model_index.json").write_text(json.dumps({**index, "dmd2_config": block}))
    done = converted(student, golden_base, tmp_path / "bundle")
    assert (done.spec.timesteps, done.spec.sigmas, done.spec.sampler) == ((999.0, 624.0), (0.999, 0.624, 0.0), "ode")
    assert not {"timesteps", "sigmas", "sampler"} & set(done.spec.assumed)
    assert "sampled as dmd2_config of model_index.json says" in done.notes
    said = converted(student, golden_base, tmp_path / "said", timesteps=(1000.0, 500.0), sampler="sde")
    assert (said.spec.timesteps, said.spec.sampler) == ((1000.0, 500.0), "sde")


def test_an_exported_pipeline_converts_back_to_the_same_steps(
    tiny_bundle: Path, tiny_base: Path, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    shutil.copytree(tiny_bundle, student)
    weights = student / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: 0.5 * tensor for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    spec = json.loads((student / "student.json").read_text())
    spec |= {"base": str(tiny_base), "sigmas": [1.0, 0.9, 0.8, 0.6, 0.0]}
    (student / "student.json").write_text(json.dumps(spec))
    save_pipeline(student, tmp_path / "pipeline")
    assert json.loads((tmp_path / "pipeline/model_index.json").read_text())["dmd2_config"] == {
        "num_inference_steps": 4,
        "denoising_timesteps": [1000, 937.5, 833.3, 625],
        "solver": "sde",
        "guidance_scale": 1.0,
    }
    done = converted(tmp_path / "pipeline", tiny_base, tmp_path / "bundle")
    assert done.spec.sigmas == (1.0, 0.9, 0.8, 0.6, 0.0) and done.spec.timesteps == (1000.0, 937.5, 833.3, 625.0)
    assert done.spec.sampler == "sde" and "sigmas" not in done.spec.assumed


def lora_file(path: Path, metadata: dict[str, str] | None = None, up: float = 1.0) -> Path:
    prefix = "transformer.blocks.1.attn1.to_q"
    pair = {f"{prefix}.lora_A.weight": torch.randn(4, 96), f"{prefix}.lora_B.weight": up * torch.randn(96, 4)}
    save_file(pair, path, metadata=metadata)
    return path


def test_a_strength_that_nobody_states_is_assumed_until_it_is_said(golden_base: Path, tmp_path: Path) -> None:
    silent = lora_file(tmp_path / "silent")
    done = converted(silent, golden_base, tmp_path / "a")
    assert "lora_scale" in done.spec.assumed and "update of 1 modules at scale 1 (assumed)" in done.notes
    said = converted(silent, golden_base, tmp_path / "b", lora_scale=0.5)
    assert "lora_scale" not in said.spec.assumed and "update of 1 modules at scale 0.5 (--lora-scale)" in said.notes
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
    stated = converted(lora_file(tmp_path / "stated", header), golden_base, tmp_path / "c")
    assert "lora_scale" not in stated.spec.assumed
    assert "update of 1 modules at scale 0.5 (lora_adapter_metadata of its header)" in stated.notes
    weights = "transformer/diffusion_pytorch_model.safetensors"
    name, pair = "blocks.1.attn1.to_q.weight", load_file(tmp_path / "stated")
    down, up = (
        pair["transformer.blocks.1.attn1.to_q.lora_A.weight"],
        pair["transformer.blocks.1.attn1.to_q.lora_B.weight"],
    )
    change = load_file(tmp_path / "c" / weights)[name] - load_file(golden_base / weights)[name]
    torch.testing.assert_close(change, 0.5 * up @ down, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("style", ["original", "diffusers"])
def test_the_undistilled_base_is_refused(golden_base: Path, tmp_path: Path, dtype: torch.dtype, style: str) -> None:
    given = load_file(golden_base / "transformer/diffusion_pytorch_model.safetensors")
    renamed = {original_name(name) if style == "original" else name: tensor.to(dtype) for name, tensor in given.items()}
    save_file(renamed, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is the undistilled base itself: all of its weights equal the base's"):
        converted(tmp_path / "a.safetensors", golden_base, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_one_weight_that_differs_makes_a_student(golden_base: Path, tmp_path: Path) -> None:
    given = load_file(golden_base / "transformer/diffusion_pytorch_model.safetensors")
    given["proj_out.bias"][3] += 1e-3
    save_file(given, tmp_path / "a.safetensors")
    assert converted(tmp_path / "a.safetensors", golden_base, tmp_path / "bundle").num_tensors == len(given)


def test_an_update_of_nothing_is_the_base(golden_base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is the undistilled base itself: its updates are zero"):
        converted(lora_file(tmp_path / "a", up=0.0), golden_base, tmp_path / "bundle")


def test_weights_that_are_mostly_causal_need_the_users_word(write: Write, golden_base: Path, tmp_path: Path) -> None:
    for options in ({}, {"method": "self-forcing"}, {"method": "rcm"}):
        with pytest.raises(
            CheckpointError, match=r"most of them are causal .*; say --bidirectional if this one is not"
        ):
            converted(write("generator_ema"), golden_base, tmp_path / "bundle", **options)
    with pytest.raises(CheckpointError, match="say --bidirectional"):
        converted(write("generator"), golden_base, tmp_path / "bundle", method="self-forcing")
    done = converted(write("generator_ema"), golden_base, tmp_path / "bundle", bidirectional=True)
    assert "attention" not in done.spec.assumed


def test_a_file_that_says_causal_is_refused_whatever_the_user_says(
    write: Write, golden_base: Path, tmp_path: Path
) -> None:
    path = write("generator_ema", lambda state: {**state, "config": {"model": {"causal": True}}})
    with pytest.raises(CheckpointError, match="it is causal"):
        converted(path, golden_base, tmp_path / "bundle", bidirectional=True)


def test_a_network_is_named_by_key(
    golden_weights: dict[str, Tensor], golden_base: Path, golden_io: dict[str, Tensor], tmp_path: Path
) -> None:
    other = {name: 0.5 * tensor for name, tensor in golden_weights.items()}
    torch.save({"model": golden_weights, "ema": other}, tmp_path / "a.pt")
    done = converted(tmp_path / "a.pt", golden_base, tmp_path / "bundle", key="model")
    assert (flow_of(tmp_path / "bundle", golden_io) - golden_io["flow_pred_BCFHW"]).abs().max() < TOLERANCE
    assert done.notes == ("taken from 'model' of the file (--key)", "left out: 'ema'") and not done.spec.ema
    average = converted(tmp_path / "a.pt", golden_base, tmp_path / "average")
    assert average.spec.ema and "ema" not in average.spec.assumed


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), 1e6])
def test_a_senseless_strength_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match="lora_scale must be a number other than 0, at most 100"):
        ConvertOptions(lora_scale=scale)


def test_a_strength_for_a_whole_network_is_refused(write: Write, golden_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--lora-scale is for LoRA files"):
        converted(write("rcm"), golden_base, tmp_path / "bundle", lora_scale=0.5)


@pytest.mark.parametrize("name", ["x" * 256, "ä" * 128, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused_before_anything_is_read(golden_base: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"has 256 bytes, and names have at most 255 there|cannot be written"):
        converted(Path("nowhere.pt"), golden_base, Path(name))


def test_an_output_of_the_longest_name_is_written(write: Write, golden_base: Path, tmp_path: Path) -> None:
    output = tmp_path / ("x" * 255)
    converted(write("rcm"), golden_base, output)
    assert load_bundle(output).spec.method == "rcm"
