"""`codmd-distill train` and `export`: what they print, what they return, what they refuse."""

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import reference_formats
import torch
from diffusers import WanTransformer3DModel

from codmd_serve.student_scheduler import StudentScheduler
from codmd_serve.wan.checkpoint import read_spec
from distill.cli import main
from distill.config import DistillConfig, config_to_dict
from distill.parallel import shard_files
from distill.run import trainer


@pytest.fixture
def settings(tiny_config: DistillConfig) -> list[str]:
    """The settings in which the tiny run differs from the recipe."""
    keys = ("base", "prompts", "native", "batch_size", "student_every_iterations", "precision", "optimizer")
    data = config_to_dict(tiny_config)
    return [f"{key}={data[key] if isinstance(data[key], str) else json.dumps(data[key])}" for key in keys]


def train(*arguments: str) -> int:
    return main(["train", *arguments])


def export(*arguments: str) -> int:
    return main(["export", *arguments])


def explain_everything(run: Path) -> None:
    """Check that docs/reference names every file of a run, every key of its log and every file of its bundle."""
    words = " ".join(name for name, _ in reference_formats.folder_lines("distill/run", "RUN"))
    assert {path.name for path in run.iterdir()} <= set(re.findall(r"[\w.]+", words))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert lines and {key for line in lines for key in line} <= reference_formats.LOG_KEYS.keys()
    names = {path.name for path in (run / "bundle").iterdir()}
    words = " ".join(name for name, _ in reference_formats.folder_lines("codmd_serve", "BUNDLE"))
    assert names <= set(re.findall(r"[\w.]+", words))


def test_train_resume_and_export(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["--method", "dmd", "--seed", "3", "--device", "cpu", "--threads", "1"]
    assert train("--out", str(out), *arguments, "--max-iterations", "2", "--set", *settings) == 0
    printed = capsys.readouterr().out
    assert f"bundle {out / 'bundle'}" in printed
    assert "2 iterations, 1 student updates, 0 skipped" in printed
    assert train("--out", str(out), "--resume", "--max-iterations", "4") == 0
    assert read_spec(out / "bundle").step == 2
    assert read_spec(out / "bundle").method == "dmd"
    explain_everything(out)
    assert export("--run", str(out), "--out", str(tmp_path / "student"), "--step", "2") == 0
    assert read_spec(tmp_path / "student").step == 1
    assert export("--run", str(out), "--out", str(tmp_path / "exported"), "--format", "pipeline") == 0
    assert "pipeline" in capsys.readouterr().out
    # The folder at the end of a run and the exported one are the same, and nothing else is left.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "run", "student"]
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (out / "pipeline" / weights).samefile(out / "bundle" / weights), "the weights are written once"
    for name in ("model_index.json", "scheduler/scheduler_config.json", "README.md"):
        assert (tmp_path / "exported" / name).read_text() == (out / "pipeline" / name).read_text()
    steps = StudentScheduler.from_pretrained(tmp_path / "exported", subfolder="scheduler").config.timesteps
    assert tuple(steps) == read_spec(tmp_path / "student").timesteps


def test_the_best_checkpoint_by_a_logged_metric_is_kept_and_exported(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    often = ["save_every_iterations=1", "log_every_iterations=1", "keep_last=1"]
    arguments = ["--max-iterations", "4", "--preview-every", "0", "--keep-best", "critic_loss"]
    assert train("--out", str(out), *arguments, "--set", *settings, *often) == 0
    losses = [json.loads(line)["critic_loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    best = min(range(4), key=losses.__getitem__) + 1
    kept = {f"step-{iteration:08d}" for iteration in (best, 4)}
    assert {path.name for path in (out / "checkpoints").iterdir()} == kept
    assert json.loads((out / "best.json").read_text())["iteration"] == best
    capsys.readouterr()
    assert export("--run", str(out), "--out", str(tmp_path / "student"), "--iteration", "best") == 0
    assert f"from iteration {best}" in capsys.readouterr().out
    (out / "best.json").unlink()
    assert export("--run", str(out), "--out", str(tmp_path / "student"), "--best") == 2
    assert "neither validation nor --keep-best has chosen a checkpoint" in capsys.readouterr().err


def test_method_brings_its_settings_and_those_on_the_command_line_win(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [setting for setting in settings if not setting.startswith("optimizer")]
    arguments = ["--out", str(tmp_path / "run"), "--method", "rcm", "--dry-run"]
    assert train(*arguments, "--set", "rcm.sigma_max=200", *others) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["config"]["method"], shown["config"]["optimizer"]["clip_norm"]) == ("rcm", None)
    assert shown["config"]["ema"]["kind"] == "power"
    assert shown["derived"]["sigmas"][0] == pytest.approx(200 / 201)


def test_resuming_with_the_method_named_keeps_the_runs_settings(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    quick = ["rcm.data_steps=1", "rcm.warmup_iterations=1", "ema.length=0.2"]
    assert train("--out", out, "--method", "rcm", "--max-iterations", "1", "--set", *settings, *quick) == 0
    assert train("--out", out, "--method", "rcm", "--resume", "--max-iterations", "2") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["ema"]["length"] == 0.2
    assert train("--out", out, "--method", "dcm", "--resume", "--max-iterations", "3") == 2
    assert "another method" in capsys.readouterr().err


def test_a_run_of_a_newer_version_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"format": 99, "method": "unheard of"}))
    assert train("--out", str(tmp_path), "--resume") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a newer version wrote them, so update this one" in error


def test_max_steps_is_still_taken_for_max_iterations(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--set", "student_every_steps=7", *(one for one in settings if not one.startswith("student_every"))]
    assert train("--out", str(tmp_path / "run"), "--dry-run", "--max-steps", "9", *given) == 0
    shown = json.loads(capsys.readouterr().out)["config"]
    assert (shown["max_iterations"], shown["student_every_iterations"]) == (9, 7)


def test_dry_run_prints_the_settings_and_writes_nothing(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--out", str(tmp_path / "run"), "--dry-run", "--set", "step_shift=5", *settings) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["derived"]["latents"] == [4, 3, 4, 4]
    assert shown["derived"]["prompts"] == 5
    assert shown["derived"]["timesteps"] == pytest.approx([1000.0, 937.5, 5000 / 6, 625.0])
    assert shown["config"]["precision"] in ("fp32", "bf16")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--recipe", "wan_9b"], "wan_9b"),
        (["--method", "gan"], "method"),
        (["--set", "colour=1"], "colour"),
        (["--set", "batch_size=0"], "batch_size"),
        (["--set", "base=/nowhere/at/all"], "no pipeline at /nowhere/at/all"),
        (["--set", "prompts=nothing.txt"], "nothing.txt"),
        (["--set", "optimizer.momentum=1"], "unknown setting 'optimizer.momentum'"),
        (["--set", "context_parallel=2"], "context_parallel 2 needs a multiple of 2 processes, got 1"),
        (["--set", "batch_size=3", "accumulate=2"], "batch_size must be a multiple of 2"),
        (["--set", "native.height=20"], "native.height"),
        (["--seed", "-1"], "seed"),
        (["--max-iterations", "0"], "max_iterations"),
        (["--set", "method=rcm"], "use --method rcm"),
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
        (["--threads", "0"], "--threads"),
        (["--preview-every", "-1"], "--preview-every"),
        (["--device", "tpu9"], "--device"),
        (["--device", "cuda:99"], "no device cuda:99"),
        (["--resume"], "holds no run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    given = arguments[1:] if arguments[0] == "--set" else []
    others = [] if arguments[0] == "--set" else arguments
    code = train("--out", str(tmp_path / "run"), *others, "--set", *settings, *given)
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith("codmd-distill: ")
    assert named in error
    assert not (tmp_path / "run").exists()


def write_shard(path: Path, embeds: object) -> None:
    data = io.BytesIO()
    torch.save(embeds, data)
    with tarfile.open(path, "w") as archive:
        for name, content in (("000.prompt.txt", b"a red circle"), ("000.embed.pt", data.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


class Trap:
    """An object whose unpickling would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("empty", "holds no prompt"),
        ("nan", "bad.tar: 000.embed.pt has values that are not finite"),
        ("pickle", "bad.tar: 000.embed.pt is no plain tensor; nothing else in it is loaded or run"),
    ],
)
def test_bad_prompts_are_one_line_and_exit_code_2(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, named: str
) -> None:
    path, trace = tmp_path / ("bad.txt" if kind == "empty" else "bad.tar"), tmp_path / "trace"
    if kind == "empty":
        path.write_text("\n \n", encoding="utf-8")
    else:
        embeds = torch.randn(3, 16)
        embeds[1, 2] = torch.nan
        write_shard(path, embeds if kind == "nan" else Trap(trace))
    assert train("--out", str(tmp_path / "run"), "--set", *settings, f"prompts={path}") == 2
    error = capsys.readouterr().err
    assert error.startswith("codmd-distill: ") and error.count("\n") == 1
    assert named in error
    assert not (tmp_path / "run").exists() and not trace.exists()


def test_checkpoint_of_another_architecture_is_exit_code_2_and_stays(
    settings: list[str], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_base, runs = tmp_path / "wide", (tmp_path / "run", tmp_path / "other")
    shutil.copytree(tiny_base, other_base)
    transformer = WanTransformer3DModel.from_pretrained(tiny_base, subfolder="transformer")
    WanTransformer3DModel.from_config({**transformer.config, "ffn_dim": 48}).save_pretrained(other_base / "transformer")
    for run, base in zip(runs, (tiny_base, other_base), strict=True):
        quick = ["--max-iterations", "1", "--preview-every", "0", "--cache", str(tmp_path / "cache")]
        assert train("--out", str(run), *quick, "--set", *settings, f"base={base}") == 0
    name = Path("checkpoints", "step-00000001")
    shutil.rmtree(runs[0] / name)
    shutil.copytree(runs[1] / name, runs[0] / name)
    before = content(runs[0] / name)
    capsys.readouterr()
    assert train("--out", str(runs[0]), "--resume", "--max-iterations", "2", "--preview-every", "0") == 2
    error = capsys.readouterr().err
    assert error.startswith("codmd-distill: ") and error.count("\n") == 1
    assert "step-00000001 does not fit this run: it belongs to another network: " in error
    assert content(runs[0] / name) == before


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("full", ["shard", "log.jsonl"])
def test_full_disk_is_exit_code_2_and_spares_the_checkpoint_before(
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    full: str,
) -> None:
    """The kernel's own error, of a device that is always full."""
    run, quick = tmp_path / "run", ["--preview-every", "0"]
    assert train("--out", str(run), *quick, "--max-iterations", "1", "--set", *settings, "keep_last=1") == 0
    kept = run / "checkpoints" / "step-00000001"
    before = content(kept)
    capsys.readouterr()
    if full == "shard":

        def write_to_full_disk(_file: object, view: memoryview) -> None:
            with Path("/dev/full").open("wb", buffering=0) as device:
                device.write(view)

        monkeypatch.setattr(shard_files, "write_all", write_to_full_disk)
    else:
        (run / "log.jsonl").unlink()
        (run / "log.jsonl").symlink_to("/dev/full")
    assert train("--out", str(run), "--resume", "--max-iterations", "2", *quick) == 2
    error = capsys.readouterr().err
    assert error.startswith("codmd-distill: ") and error.count("\n") == 1
    assert "cannot be written" in error and "No space left on device" in error
    assert content(kept) == before


def test_export_without_a_run_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("--run", str(tmp_path), "--out", str(tmp_path / "student")) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_stock_folder_of_a_student_that_starts_below_sigma_1_is_refused(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = str(tmp_path / "run")
    quick = ["rcm.data_steps=1", "rcm.warmup_iterations=1"]
    assert train("--out", out, "--method", "rcm", "--max-iterations", "1", "--set", *settings, *quick) == 0
    assert "no diffusers folder written" in caplog.text
    assert (tmp_path / "run" / "bundle").is_dir()
    assert export("--run", out, "--out", str(tmp_path / "exported"), "--format", "pipeline") == 2
    assert "only the bundle can be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_divergence_is_exit_code_1(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer.Trainer._count_nonfinite
    monkeypatch.setattr(trainer.Trainer, "_count_nonfinite", lambda self, role, _is_finite: original(self, role, False))
    assert train("--out", str(tmp_path / "run"), "--set", "max_nonfinite_in_row=2", *settings) == 1
    assert "was not finite 2 times in a row" in capsys.readouterr().err


def test_resume_refuses_another_recipe(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--out", str(tmp_path / "run"), "--max-iterations", "1", "--set", *settings) == 0
    assert train("--out", str(tmp_path / "run"), "--resume", "--recipe", "wan_14b") == 2
    assert "recipe shapeworld" in capsys.readouterr().err
