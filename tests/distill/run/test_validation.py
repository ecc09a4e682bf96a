"""Validation changes no bit of the training, never ends it, chooses the best student, and is resumed exactly."""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from checkpoints import whole_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codmd_serve.errors import ConfigError
from codmd_serve.sampler import rollout
from codmd_serve.wan.attention import use_compact_cross_attention
from codmd_serve.wan.checkpoint import load_bundle, read_spec
from distill.config import DistillConfig, with_overrides
from distill.data.prompts import embed_texts
from distill.networks.base import open_base
from distill.networks.build import denoiser
from distill.run import curves, validation
from distill.run.checkpoint import list_checkpoints
from distill.run.trainer import RunOptions, RunOutcome, Trainer, run_training
from distill.streams import named_rng
from distill.validate import registry
from distill.validate.suites import LATENTS, Request, Samples

CPU = torch.device("cpu")
PROMPTS = ("a red ring", "a white triangle stays still", "a blue circle")


@dataclass
class Probe:
    """A suite that notes what it is given, and scores by a function of the number of the validation."""

    scores: Callable[[int], float] = lambda number: float(number)
    needs: str = LATENTS
    better: Mapping[str, str] = field(default_factory=lambda: {"score": "high", "loss": "low"})
    requests: tuple[Request, ...] = (*map(Request, PROMPTS), Request(PROMPTS[0], 1))
    given: list[Samples] = field(default_factory=list)

    def score(self, samples: Samples) -> dict[str, float]:
        self.given.append(samples)
        value = self.scores(len(self.given))
        return {"score": value, "loss": value, "broken": float("nan"), "spread": float(samples.latents.std())}  # type: ignore[union-attr]


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    probe = Probe()
    monkeypatch.setitem(registry.SUITES, "probe", lambda config, base: probe)
    return probe


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing curves takes longer than all else here, and has tests of its own."""
    monkeypatch.setattr(curves, "plot_curves", lambda *_: None)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny_config(tiny_config: DistillConfig) -> DistillConfig:
    return with_overrides(tiny_config, ["max_iterations=4", "save_every_iterations=100"])


@pytest.fixture
def validated(tiny_config: DistillConfig) -> DistillConfig:
    return with_overrides(tiny_config, ["validate.every_iterations=2", "validate.metric=probe.score"])


@pytest.fixture
def run(cache_dir: Path) -> Callable[..., RunOutcome]:
    def start(config: DistillConfig, out: Path, resume: bool = False, **changes: object) -> RunOutcome:
        options = RunOptions(
            out=out, device=CPU, cache_dir=cache_dir, preview_every_iterations=0, has_pipeline=False, **changes
        )
        return run_training(config, options, resume=resume)

    return start


def records(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_training(left: Path, right: Path) -> None:
    states = [whole_state(list_checkpoints(out)[-1]) for out in (left, right)]
    assert states[0]["iteration"] == states[1]["iteration"]
    pairs = [[states[0]["ema"]["shadow"], states[1]["ema"]["shadow"]]]
    for role in ("student", "critic"):
        pairs.append([state["networks"][role] for state in states])
        pairs += [[state["optimizers"][role][key] for state in states] for key in states[0]["optimizers"][role]]
    for before, after in pairs:
        assert before and all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_run_trains_the_same_bits_with_and_without_validation(
    tiny_config: DistillConfig, validated: DistillConfig, probe: Probe, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    states = []
    for config, name in (
        (tiny_config, "without"),
        (with_overrides(validated, ["validate.every_iterations=1"]), "with"),
    ):
        torch.manual_seed(0)  # building networks draws from it
        run(config, tmp_path / name)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert len(probe.given) == 4
    assert_same_training(tmp_path / "without", tmp_path / "with")
    assert not (tmp_path / "without" / "validation.jsonl").exists()


def test_the_samples_are_those_of_the_exported_student(
    validated: DistillConfig, probe: Probe, tmp_path: Path, cache_dir: Path, run: Callable[..., RunOutcome]
) -> None:
    """The EMA student in its own steps, from noise of the stream of validation, the same at each."""
    outcome = run(validated, tmp_path / "run")
    assert outcome.bundle is not None and outcome.choice.best_iteration == 4
    bundle = load_bundle(outcome.bundle, torch.float32, CPU)
    spec, base = bundle.spec, open_base(validated.base)
    data = embed_texts(list(PROMPTS), validated, base, cache_dir, CPU)
    shape = (len(spec.timesteps), *probe.given[0].latents.shape[1:])  # type: ignore[union-attr]
    noise = torch.stack([torch.randn(shape, generator=named_rng(0, "validation", index)) for index in range(4)], dim=1)
    denoise = denoiser(use_compact_cross_attention(bundle.transformer), "fp32")
    with torch.no_grad():
        embeds = data.batch([0, 1, 2, 0], CPU).prompt_embeds
        x0 = rollout(denoise, noise, embeds, spec.sigmas, spec.timesteps, sampler=spec.sampler)
    # The batch has three samples in training and so here, four in this check.
    torch.testing.assert_close(probe.given[-1].latents, x0, rtol=1e-4, atol=1e-5)
    assert not torch.equal(probe.given[0].latents, probe.given[-1].latents)  # type: ignore[arg-type]


def test_values_reach_the_record_the_curves_and_the_board(
    validated: DistillConfig, probe: Probe, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    out = tmp_path / "run"
    run(validated, out)
    told = records(out)
    assert [(line["iteration"], line["probe.score"], line["best_iteration"], line["num_worse"]) for line in told] == [
        (2, 1.0, 2, 0),
        (4, 2.0, 4, 0),
    ]
    assert not any("probe.broken" in line for line in told)
    table = [line.split(",") for line in (out / "curves.csv").read_text().splitlines()]
    column = table[0].index("probe.score")
    assert [(row[0], row[column]) for row in table[1:]] == [("2", "1.0"), ("4", "2.0")]
    assert {"student_loss", "probe.spread"} <= set(table[0])
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("probe.score")] == [(2, 1.0), (4, 2.0)]


@pytest.mark.parametrize(("metric", "best"), [("probe.score", 2), ("probe.loss", 3)])
def test_the_best_student_is_kept_and_becomes_the_bundle(
    validated: DistillConfig, probe: Probe, tmp_path: Path, run: Callable[..., RunOutcome], metric: str, best: int
) -> None:
    values = [0.0, 5.0, -3.0, 1.0]
    probe.scores = lambda number: values[number - 1]
    settings = [f"validate.metric={metric}", "validate.every_iterations=1", "keep_last=1"]
    out = tmp_path / "run"
    outcome = run(with_overrides(validated, settings), out)
    assert (outcome.iteration, outcome.choice.best_iteration, outcome.choice.best) == (4, best, values[best - 1])
    assert [folder.name for folder in list_checkpoints(out)] == [f"step-{best:08d}", "step-00000004"]
    kept = json.loads((out / "best.json").read_text())
    better = "high" if metric == "probe.score" else "low"
    assert kept == {"iteration": best, "metric": metric, "value": values[best - 1], "better": better}
    shadow = whole_state(list_checkpoints(out)[0])["ema"]["shadow"]
    student = load_bundle(out / "bundle").transformer
    assert all(torch.equal(tensor, shadow[name]) for name, tensor in student.named_parameters())


def test_keep_best_names_another_metric_of_the_suite(
    validated: DistillConfig, probe: Probe, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    outcome = run(validated, tmp_path / "run", keep_best="probe.loss")
    assert (outcome.choice.metric, outcome.choice.best_iteration) == ("probe.loss", 2)


def test_patience_ends_the_run_and_a_resumed_run_ends_at_the_same_iteration(
    validated: DistillConfig, probe: Probe, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    probe.scores = lambda number: 1.0 / number
    config = with_overrides(validated, ["validate.every_iterations=1", "validate.patience=3", "max_iterations=6"])
    whole = run(config, tmp_path / "whole")
    assert (whole.iteration, whole.choice.best_iteration, whole.choice.num_worse) == (4, 1, 3)
    assert whole.bundle is not None and read_spec(whole.bundle).step == 1
    probe.given.clear()
    run(with_overrides(config, ["max_iterations=3"]), tmp_path / "parts")
    parts = run(config, tmp_path / "parts", resume=True)
    assert parts.choice == whole.choice and parts.iteration == whole.iteration
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert (tmp_path / "parts" / "best.json").read_bytes() == (tmp_path / "whole" / "best.json").read_bytes()
    # Over is over, unless more patience is asked for, or another metric.
    assert run(config, tmp_path / "parts", resume=True).iteration == 4
    assert run(with_overrides(config, ["validate.patience=4"]), tmp_path / "parts", resume=True).iteration == 5
    other = run(with_overrides(config, ["validate.metric=probe.loss"]), tmp_path / "parts", resume=True)
    assert (other.iteration, other.choice.metric, other.choice.best_iteration) == (6, "probe.loss", 6)


@pytest.mark.parametrize("moment", ["scoring", "training"])
def test_a_validation_that_a_signal_interrupts_is_made_up_for(
    validated: DistillConfig,
    probe: Probe,
    tmp_path: Path,
    run: Callable[..., RunOutcome],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """As if the run had never been interrupted: record, best and weights are the same."""
    probe.scores = lambda number: float(probe.given[-1].latents.std())  # type: ignore[union-attr]
    validated = with_overrides(validated, ["max_iterations=6"])
    run(validated, tmp_path / "whole")
    with monkeypatch.context() as patch:
        original = validation.Validator.run

        def interrupt(self: validation.Validator, iteration: int, *rest: object) -> object:
            if iteration == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, iteration, *rest)  # type: ignore[arg-type]

        if moment == "scoring":
            patch.setattr(validation.Validator, "run", interrupt)
        else:
            iterate = Trainer.iterate

            def signalled(self: Trainer) -> dict[str, torch.Tensor]:
                if self.iteration == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                return iterate(self)

            patch.setattr(Trainer, "iterate", signalled)
        cut = run(validated, tmp_path / "cut")
    assert (cut.iteration, cut.signal_number, cut.choice.iteration) == (4, signal.SIGTERM, 2)
    assert [line["iteration"] for line in records(tmp_path / "cut")] == [2]
    run(validated, tmp_path / "cut", resume=True)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert (tmp_path / "cut" / "best.json").read_bytes() == (tmp_path / "whole" / "best.json").read_bytes()
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


def explode(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")


@pytest.mark.parametrize("part", ["sample", "score"])
def test_a_validation_that_fails_says_so_and_the_run_goes_on(
    tiny_config: DistillConfig,
    validated: DistillConfig,
    probe: Probe,
    tmp_path: Path,
    run: Callable[..., RunOutcome],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    run(tiny_config, tmp_path / "without")
    if part == "sample":
        monkeypatch.setattr(validation, "rollout", explode)
    else:
        monkeypatch.setattr(probe, "score", explode)
    with caplog.at_level(logging.WARNING):
        outcome = run(with_overrides(validated, ["validate.patience=1"]), tmp_path / "run")
    assert outcome.iteration == 4 and outcome.bundle is not None
    assert read_spec(outcome.bundle).step == outcome.num_student_updates == 2
    failures = [record.getMessage() for record in caplog.records if "validation failed" in record.getMessage()]
    assert len(failures) == 2 and "iteration=2 reason=OutOfMemoryError: CUDA out of memory." in failures[0]
    assert [line["failed"] for line in records(tmp_path / "run")] == ["OutOfMemoryError: CUDA out of memory."] * 2
    assert_same_training(tmp_path / "without", tmp_path / "run")


def test_a_metric_that_is_missing_or_not_finite_chooses_nothing(
    validated: DistillConfig, probe: Probe, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    probe.scores = lambda number: float("nan") if number < 2 else 0.5
    outcome = run(validated, tmp_path / "run")
    told = records(tmp_path / "run")
    assert [line.get("failed", "") for line in told] == ["no finite probe.score among spread", ""]
    assert all("probe.spread" in line for line in told)
    assert outcome.choice.best_iteration == 4


GOOD = "import json, os, sys; print(json.dumps({'total': sum(n.endswith('.mp4') for n in os.listdir(sys.argv[1]))}))"


def test_a_command_scores_videos_and_one_that_fails_ends_nothing(
    tiny_config: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome], caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["validate.every_iterations=2", "validate.metric=command.total", "validate.num_prompts=2"]
    settings += ["validate.better=low", "max_iterations=2"]

    def with_command(code: str) -> DistillConfig:
        command = shlex.join([sys.executable, "-S", "-c", code])
        return with_overrides(tiny_config, [*settings, f"validate.command={command}"])

    out = tmp_path / "good"
    outcome = run(with_command(GOOD), out)
    assert (outcome.choice.best, outcome.choice.better) == (2.0, "low")
    videos = out / "validation" / "videos"
    entries = json.loads((videos / "prompts.json").read_text())
    assert [entry["file"] for entry in entries] == ["00000.mp4", "00001.mp4"]
    assert not {entry["prompt"] for entry in entries} & set(Path(tiny_config.prompts).read_text().splitlines())
    assert all((videos / entry["file"]).read_bytes()[4:8] == b"ftyp" for entry in entries)
    with caplog.at_level(logging.WARNING):
        outcome = run(with_command("raise SystemExit('RuntimeError: no weights')"), tmp_path / "bad")
    assert outcome.bundle is not None and outcome.choice.best is None
    assert "validation failed iteration=2 reason=the command ended with 1: RuntimeError: no weights" in caplog.text
    assert records(tmp_path / "bad") == [
        {"iteration": 2, "failed": "the command ended with 1: RuntimeError: no weights"}
    ]


@pytest.mark.parametrize(
    ("settings", "keep_best", "message"),
    [
        (["validate.metric=loss_dmd"], None, "validate.metric must be SUITE.VALUE with a suite of"),
        (["validate.metric=probe.broken"], None, "suite probe cannot choose by 'broken', expected score, loss"),
        (["validate.better=low"], None, "validate.better is low, but of probe.score high is better"),
        (["validate.metric=command.total", "validate.command=env"], None, "validate.better must be high or low"),
        ([], "critic_loss", "--keep-best critic_loss: in a run with validation its metric chooses, probe.score"),
        (["validate.every_iterations=0"], "shapebench.all", "--keep-best shapebench.all needs validation"),
    ],
)
def test_a_metric_that_cannot_choose_is_refused_before_anything_is_written(
    validated: DistillConfig,
    probe: Probe,
    tmp_path: Path,
    run: Callable[..., RunOutcome],
    settings: list[str],
    keep_best: str | None,
    message: str,
) -> None:
    with pytest.raises(ConfigError) as told:
        run(with_overrides(validated, settings), tmp_path / "run", keep_best=keep_best)
    assert message in str(told.value)
    assert not (tmp_path / "run").exists()


def test_two_processes_share_the_samples_and_score_as_one(tiny_config: DistillConfig, tmp_path: Path) -> None:
    """ShapeBench on the tiny network, five samples on two processes: one has a batch less."""
    settings = [f"base={tiny_config.base}", f"prompts={tiny_config.prompts}", "precision=fp32", "bundle_dtype=fp32"]
    settings += ['native={"height":32,"width":32,"num_frames":9,"fps":16}', "batch_size=2", "max_iterations=2"]
    settings += ["student_every_iterations=1", "validate.every_iterations=2", "validate.metric=shapebench.imaging"]
    settings += ["validate.num_prompts=5", "validate.deep_prompts=0"]
    runs = []
    for world_size in (1, 2):
        arguments = ["--out", str(tmp_path / f"run-{world_size}"), "--device", "cpu", "--preview-every", "2"]
        arguments += ["--recipe", "shapeworld", "--threads", "1", "--set", *settings]
        runs.append(
            {"name": f"told-{world_size}", "world_size": world_size, "arguments": arguments}
            | {"accident": "", "copy_of": ""}
        )
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    program = Path(__file__).with_name("run_restarts.py")
    subprocess.run([sys.executable, str(program), str(tmp_path / "runs.json"), str(tmp_path)], check=True, timeout=600)
    for path in tmp_path.glob("told-*.json"):
        told = json.loads(path.read_text())
        assert told["code"] == 0, told["error"]
    (one,), (two,) = (records(tmp_path / f"run-{world_size}") for world_size in (1, 2))
    assert one.keys() == two.keys() and one["best_iteration"] == 2
    # Equal up to rounding, which can move a pixel by a level.
    assert {name: pytest.approx(value, abs=0.02) for name, value in one.items()} == two
    assert len(list(tmp_path.glob("told-*.json"))) == 3
    # The averaged weights are set shard by shard there too.
    assert (tmp_path / "run-2" / "previews" / "step-00000002.png").is_file()
