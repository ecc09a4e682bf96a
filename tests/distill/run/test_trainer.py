"""The loop: turns, exact resume, signals, poisoned updates, logs, and the bundle at the end."""

import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import as_single_file, save, whole_state
from runs import with_method

from codmd_serve.errors import CheckpointError, CodmdError, ConfigError
from codmd_serve.wan.checkpoint import load_bundle, read_spec
from distill.config import DistillConfig, settings_digest, with_overrides
from distill.data.prompts import cached_prompt_data
from distill.formats import RENAMED
from distill.methods.draws import StepResult, Turn
from distill.methods.matching import MatchingMethod
from distill.methods.registry import recipe_config
from distill.networks.base import open_base
from distill.networks.build import build_networks
from distill.run.bundle import export_bundle
from distill.run.checkpoint import list_checkpoints, load_checkpoint, read_config
from distill.run.checks import native_latents
from distill.run.trainer import RunOptions, RunOutcome, Trainer, run_training

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache_dir: Path) -> Callable[..., RunOutcome]:
    def start(config: DistillConfig, out: Path, resume: bool = False, minutes: float | None = None) -> RunOutcome:
        # Previews have tests of their own.
        options = RunOptions(out=out, device=CPU, minutes=minutes, cache_dir=cache_dir, preview_every_iterations=0)
        return run_training(config, options, resume=resume)

    return start


@pytest.fixture
def new_trainer(cache_dir: Path) -> Callable[[DistillConfig], Trainer]:
    def build(config: DistillConfig) -> Trainer:
        base = open_base(config.base)
        data = cached_prompt_data(config, base, cache_dir, CPU)
        return Trainer(config, build_networks(config, base, CPU), data, native_latents(config, base), CPU)

    return build


def final_state(out: Path) -> dict:
    return whole_state(list_checkpoints(out)[-1])


def flat(state: object, prefix: str = "") -> dict[str, object]:
    if isinstance(state, dict):
        pairs = [(str(key), value) for key, value in state.items()]
    elif isinstance(state, list | tuple):
        pairs = [(str(index), value) for index, value in enumerate(state)]
    else:
        return {prefix: state}
    return {name: leaf for key, value in pairs for name, leaf in flat(value, f"{prefix}/{key}").items()}


def assert_identical(left: dict, right: dict) -> None:
    left, right = flat(left), flat(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        assert same, name


def change_losses(monkeypatch: pytest.MonkeyPatch, role: str, change: Callable[[int, StepResult], StepResult]) -> None:
    """Put change(number of the turn, result) in the place of what codmd yields for a role."""
    original, count = MatchingMethod.losses, itertools.count()

    def changed(method: MatchingMethod, turn: Turn) -> Iterator[StepResult]:
        results = original(method, turn)
        if turn.role != role:
            return results
        number = next(count)
        return (change(number, result) for result in results)

    monkeypatch.setattr(MatchingMethod, "losses", changed)


def poison(monkeypatch: pytest.MonkeyPatch, role: str, is_bad: Callable[[int], bool]) -> None:
    """Let the losses of a role for which is_bad(number of the turn) be NaN."""

    def poisoned(number: int, result: StepResult) -> StepResult:
        return dataclasses.replace(result, loss=result.loss * (float("nan") if is_bad(number) else 1.0))

    change_losses(monkeypatch, role, poisoned)


def test_a_run_ends_in_a_bundle_a_log_and_a_checkpoint(
    tiny_config: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    outcome = run(tiny_config, tmp_path / "run")
    assert (outcome.iteration, outcome.num_student_updates, outcome.num_skipped) == (6, 3, 0)
    assert outcome.signal_number is None
    assert outcome.bundle is not None
    bundle = load_bundle(outcome.bundle)
    shadow = final_state(tmp_path / "run")["ema"]["shadow"]
    assert all(torch.equal(tensor, shadow[name]) for name, tensor in bundle.transformer.named_parameters())
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [2, 4, 6]
    wanted = {"student_loss", "student_grad_norm", "critic_loss", "critic_grad_norm", "loss_dmd", "loss_frame"}
    assert wanted | {"samples_per_s", "eta_s", "elapsed_s", "student_updates", "num_skipped"} <= records[0].keys()
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_training_moves_student_critic_and_average_but_not_the_teacher(
    tiny_config: DistillConfig, new_trainer: Callable[[DistillConfig], Trainer]
) -> None:
    state = new_trainer(tiny_config)
    before = {name: tensor.clone() for name, tensor in state.networks.teacher.named_parameters()}
    name = "blocks.0.ffn.net.2.weight"
    state.iterate()
    state.iterate()
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.networks.teacher.named_parameters())
    for moved in (state.networks.student.get_parameter(name), state.networks.critic.get_parameter(name)):
        assert not torch.equal(moved, before[name])
    assert not torch.equal(state.ema.shadow[name], before[name])
    assert state.updates == {"student": 1, "critic": 2}
    assert state.ema.num_updates == 1


def test_turns_follow_the_ratio_after_the_critics_warm_up(
    tiny_config: DistillConfig, new_trainer: Callable[[DistillConfig], Trainer]
) -> None:
    state = new_trainer(with_overrides(tiny_config, ["critic_warmup_iterations=2", "student_every_iterations=3"]))
    turns = ["student_loss" in state.iterate() for _ in range(7)]
    assert turns == [False, False, True, False, False, True, False]


def test_learning_rate_warms_up_over_each_networks_own_updates(
    tiny_config: DistillConfig, new_trainer: Callable[[DistillConfig], Trainer]
) -> None:
    state = new_trainer(with_overrides(tiny_config, ["optimizer.warmup_updates=4"]))
    rates = []
    for _ in range(5):
        state.iterate()
        rates.append([state.optimizers[role].param_groups[0]["lr"] for role in ("student", "critic")])
    assert [critic for _, critic in rates] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    assert [student for student, _ in rates] == pytest.approx([0.25e-3, 0.25e-3, 0.5e-3, 0.5e-3, 0.75e-3])


@pytest.mark.parametrize("method", ["codmd", "dmd"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    tiny_config: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome], method: str
) -> None:
    config = with_overrides(with_method(tiny_config, method), ["copula.control=noise", "save_every_iterations=100"])
    run(config, tmp_path / "whole")
    run(with_overrides(config, ["max_iterations=3"]), tmp_path / "parts")
    outcome = run(config, tmp_path / "parts", resume=True)
    assert outcome.iteration == 6
    assert_identical(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
    for name in ("student.json", "transformer/diffusion_pytorch_model.safetensors"):
        whole, parts = ((tmp_path / kind / "bundle" / name).read_bytes() for kind in ("whole", "parts"))
        assert whole == parts, name


@pytest.fixture(params=["rcm", "dcm", "dp-dmd", "f-distill", "avd"])
def other_method(request: pytest.FixtureRequest, tiny_config: DistillConfig) -> DistillConfig:
    """A run of 7 iterations: for rcm and dcm 2 of warm-up, 3 of the student and 2 of the critic after it."""
    config = with_overrides(with_method(tiny_config, request.param), ["max_iterations=7", "save_every_iterations=100"])
    own = {
        "rcm": ["rcm.warmup_iterations=2", "rcm.data_steps=2"],
        "dp_dmd": ["dp_dmd.teacher_steps=3", "dp_dmd.match_step=2"],
        "terms": ["terms.data_steps=2", "accumulate=3"],
    }
    return with_overrides(config, own[config.method_settings.group])


def test_other_methods_train_resume_exactly_and_end_in_a_bundle_on_their_grid(
    other_method: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    whole = run(other_method, tmp_path / "whole")
    for cut in (1, 4):  # inside the warm-up of rcm and after it
        run(with_overrides(other_method, [f"max_iterations={cut}"]), tmp_path / "parts", resume=cut > 1)
    parts = run(other_method, tmp_path / "parts", resume=True)
    assert parts == dataclasses.replace(whole, elapsed_s=parts.elapsed_s, bundle=parts.bundle)
    assert (whole.iteration, whole.num_skipped) == (7, 0)
    assert whole.num_student_updates == {"rcm": 5, "dp_dmd": 3, "terms": 4}[other_method.method_settings.group]
    assert_identical(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
    for name in ("student.json", "transformer/diffusion_pytorch_model.safetensors"):
        one, other = ((tmp_path / kind / "bundle" / name).read_bytes() for kind in ("whole", "parts"))
        assert one == other, name
    assert whole.bundle is not None
    bundle = load_bundle(whole.bundle)
    assert bundle.spec.method == other_method.method
    assert bundle.spec.sigmas == other_method.grid().sigmas
    assert bundle.spec.timesteps == other_method.grid().timesteps
    base = open_base(other_method.base).load_transformer(torch.float32)
    weight = "blocks.0.ffn.net.2.weight"
    assert not torch.equal(bundle.transformer.get_parameter(weight), base.get_parameter(weight))


def test_other_methods_log_their_terms(
    other_method: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    run(other_method, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    names = {
        "dp-dmd": {"loss_trajectory"},
        "f-distill": {"loss_gan", "loss_discriminator", "logit_fake", "logit_real", "weight_max"},
        "avd": {"loss_regression", "regression_weight", "loss_motion"},
    }.get(other_method.method, {"loss_scm", "tangent_norm"})
    assert names | {"student_loss", "critic_loss", "loss_dmd", "score_gap_abs_mean"} <= records[1].keys()
    assert all(value is None or isinstance(value, int | float) for record in records for value in record.values())


def test_turns_of_rcm_leave_the_critic_alone_with_its_sample(
    tiny_config: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    config = with_overrides(
        with_method(tiny_config, "rcm"), ["rcm.warmup_iterations=2", "rcm.data_steps=2", "max_iterations=8"]
    )
    run(config, tmp_path / "run")
    state = final_state(tmp_path / "run")
    assert state["updates"] == {"student": 5, "critic": 3}
    assert state["ema"]["num_updates"] == 5


def test_without_clipping_the_gradient_is_used_as_it_is(
    tiny_config: DistillConfig, new_trainer: Callable[[DistillConfig], Trainer]
) -> None:
    """A limit that is never reached and none at all give the same update; a low one does not."""
    weights = {}
    for limit in ("null", "1e6", "1e-6"):
        # An eps above the gradients keeps AdamW from undoing the scale.
        state = new_trainer(with_overrides(tiny_config, [f"optimizer.clip_norm={limit}", "optimizer.eps=1"]))
        metrics = state.iterate()
        assert float(metrics["critic_grad_norm"]) > 1e-3
        weights[limit] = state.networks.critic.get_parameter("blocks.0.ffn.net.2.weight").detach().clone()
    assert torch.equal(weights["null"], weights["1e6"])
    assert not torch.equal(weights["null"], weights["1e-6"])


def test_another_seed_gives_another_student(
    tiny_config: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    for seed in (0, 1):
        run(with_overrides(tiny_config, [f"seed={seed}", "max_iterations=1"]), tmp_path / str(seed))
    weights = [final_state(tmp_path / str(seed))["networks"]["student"] for seed in (0, 1)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_equals_an_unbroken_one(
    tiny_config: DistillConfig,
    tmp_path: Path,
    run: Callable[..., RunOutcome],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    config = with_overrides(tiny_config, ["save_every_iterations=100"])
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:

        def interrupt(turn: int, result: StepResult) -> StepResult:
            if turn == 2:
                os.kill(os.getpid(), number)
            return result

        change_losses(patch, "critic", interrupt)
        outcome = run(config, tmp_path / "cut")
    assert (outcome.iteration, outcome.signal_number, outcome.bundle) == (3, number, None)
    assert not (tmp_path / "cut" / "bundle").exists()
    run(config, tmp_path / "cut", resume=True)
    assert_identical(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    logs = [
        [json.loads(line)["iteration"] for line in (tmp_path / kind / "log.jsonl").read_text().splitlines()]
        for kind in ("whole", "cut")
    ]
    assert logs == [[2, 4, 6], [2, 3, 4, 6]]


def test_a_crash_loses_nothing_before_the_last_checkpoint(
    tiny_config: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_config, tmp_path / "whole")
    with monkeypatch.context() as patch:

        def crash(turn: int, result: StepResult) -> StepResult:
            if turn == 5:
                raise MemoryError("crash")
            return result

        change_losses(patch, "critic", crash)
        with pytest.raises(MemoryError):
            run(tiny_config, tmp_path / "crashed")
    outcome = run(tiny_config, tmp_path / "crashed", resume=True)
    assert outcome.iteration == 6
    assert_identical(final_state(tmp_path / "whole"), final_state(tmp_path / "crashed"))
    lines = (tmp_path / "crashed" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [2, 4, 6]


@pytest.mark.parametrize("role", ["student", "critic"])
def test_a_poisoned_update_is_skipped_and_counted(
    tiny_config: DistillConfig,
    tmp_path: Path,
    run: Callable[..., RunOutcome],
    monkeypatch: pytest.MonkeyPatch,
    role: str,
) -> None:
    poison(monkeypatch, role, lambda call: call == 1)
    outcome = run(tiny_config, tmp_path / "run")
    assert outcome.num_skipped == 1
    assert outcome.num_student_updates == (2 if role == "student" else 3)
    state = final_state(tmp_path / "run")
    assert all(bool(tensor.isfinite().all()) for tensor in state["networks"][role].values())
    assert state["nonfinite_in_row"] == {"student": 0, "critic": 0}


def test_a_poisoned_update_leaves_weights_and_optimizer_alone(
    tiny_config: DistillConfig, new_trainer: Callable[[DistillConfig], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = new_trainer(tiny_config)
    state.iterate()
    before = {name: tensor.clone() for name, tensor in state.networks.critic.state_dict().items()}
    poison(monkeypatch, "critic", lambda call: True)
    metrics = state.iterate()
    assert metrics == {}
    assert_identical(before, state.networks.critic.state_dict())
    assert state.updates["critic"] == 1


def test_training_that_diverges_stops_and_keeps_the_last_good_checkpoint(
    tiny_config: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_overrides(tiny_config, ["max_nonfinite_in_row=2", "max_iterations=20"])
    poison(monkeypatch, "critic", lambda call: call >= 3)
    with pytest.raises(CodmdError, match="critic was not finite 2 times in a row, the last at iteration 4"):
        run(config, tmp_path / "run")
    state = final_state(tmp_path / "run")
    assert state["updates"]["critic"] == 3
    assert all(bool(tensor.isfinite().all()) for tensor in state["networks"]["critic"].values())
    assert not (tmp_path / "run" / "bundle").exists()


def test_time_budget_ends_the_run_with_a_bundle(
    tiny_config: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    config = with_overrides(tiny_config, ["max_iterations=100000"])
    outcome = run(config, tmp_path / "run", minutes=0.3 / 60)
    assert 0 < outcome.iteration < 100_000
    assert outcome.bundle is not None
    # The budget is the run's, not the command's: it is spent.
    assert run(config, tmp_path / "run", resume=True, minutes=0.1 / 60).iteration == outcome.iteration


def test_bf16_run_is_finite_and_trains(
    tiny_config: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    outcome = run(with_overrides(tiny_config, ["precision=bf16", "teacher_dtype=bf16"]), tmp_path / "run")
    assert outcome.num_skipped == 0
    assert outcome.num_student_updates == 3


@pytest.mark.parametrize(
    "settings",
    [
        ["sampler=ode"],
        ["copula.reference_compat=true"],
        ["copula.features=spatial", "score_shared_sigma=true"],
        ["guidance_scale=1"],
        ["batch_size=1", "copula.weight_batch=0"],
    ],
)
def test_every_arm_runs(
    tiny_config: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome], settings: list[str]
) -> None:
    outcome = run(with_overrides(tiny_config, [*settings, "max_iterations=2"]), tmp_path / "run")
    assert outcome.bundle is not None


def test_a_folder_that_holds_a_run_is_not_overwritten(
    tiny_config: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    run(with_overrides(tiny_config, ["max_iterations=1"]), tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tiny_config, tmp_path / "run")
    with pytest.raises(ConfigError, match="another seed"):
        run(with_overrides(tiny_config, ["seed=5"]), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="holds no run"):
        run(tiny_config, tmp_path / "other", resume=True)


def test_bad_input_leaves_no_folder_behind(
    tiny_config: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    with pytest.raises(CheckpointError):
        run(with_overrides(tiny_config, [f"base={tmp_path / 'nowhere'}"]), tmp_path / "run")
    with pytest.raises(ConfigError, match="num_frames"):
        run(with_overrides(tiny_config, ["native.num_frames=10"]), tmp_path / "run")
    with pytest.raises(ConfigError, match="prompts"):
        run(with_overrides(tiny_config, [f"prompts={tmp_path / 'none.txt'}"]), tmp_path / "run")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        run(tiny_config, tmp_path / "file" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_folder_of_format_1_is_resumed_exactly_and_exported_with_its_own_digest(
    tiny_config: DistillConfig, tmp_path: Path, run: Callable[..., RunOutcome]
) -> None:
    run(tiny_config, tmp_path / "whole")
    run(with_overrides(tiny_config, ["max_iterations=2"]), tmp_path / "old")
    calls_of_two = final_state(tmp_path / "old")["calls"]
    as_format_1(tmp_path / "old")
    assert read_config(tmp_path / "old") == with_overrides(tiny_config, ["max_iterations=2"])
    digest = settings_digest(json.loads((tmp_path / "old" / "config.json").read_text()))
    export_bundle(tmp_path / "old", tmp_path / "student")
    assert read_spec(tmp_path / "student").config_sha256 == digest
    outcome = run(tiny_config, tmp_path / "old", resume=True)
    assert outcome.iteration == 6
    whole, old = final_state(tmp_path / "whole"), final_state(tmp_path / "old")
    # Format 1 did not count evaluations of the networks, so those of the first two iterations are missing.
    assert {role: whole["calls"][role] - num for role, num in old.pop("calls").items()} == calls_of_two
    del whole["calls"]
    assert_identical(whole, old)
    assert read_config(tmp_path / "old") == tiny_config
    assert read_spec(tmp_path / "old" / "bundle").config_sha256 == tiny_config.sha256()


def as_format_1(out: Path) -> None:
    """Give the files of a run the names that they had in format 1."""
    path = out / "config.json"
    data = json.loads(path.read_text())
    del data["format"]
    for before, after in RENAMED.items():
        *group, leaf = after.split(".")
        source = data if not group else data.get(group[0], {})
        if leaf not in source:
            continue
        *group, name = before.split(".")
        (data[group[0]] if group else data)[name] = source.pop(leaf)
    path.write_text(json.dumps(data | {"rcm": {"warmup_steps": 0, "data_steps": 50}, "dp_dmd": {"weight": 0.05}}))
    as_single_file(out / "checkpoints" / "step-00000002", iteration_key="step")
    log = out / "log.jsonl"
    log.write_text(log.read_text().replace('"iteration"', '"step"'))


def test_checkpoint_of_another_base_or_method_is_refused(
    tiny_config: DistillConfig, tmp_path: Path, new_trainer: Callable[[DistillConfig], Trainer]
) -> None:
    trainer = new_trainer(tiny_config)
    tensors = trainer.state_tensors()
    tensors.popitem()
    values = trainer.state_values()
    folder = save(tmp_path, 1, tensors, **values)
    with pytest.raises(CheckpointError, match=r"step-00000001 does not fit this run: .* 1 names differ"):
        new_trainer(tiny_config).load(load_checkpoint(folder))
    folder = save(tmp_path, 2, trainer.state_tensors(), **{**values, "method": "rcm"})
    with pytest.raises(CheckpointError, match="is of method rcm, the run is of codmd"):
        new_trainer(tiny_config).load(load_checkpoint(folder))


def test_wan_1_3b_scaled_down_trains_to_a_bundle(
    run: Callable[..., RunOutcome], tiny_base: Path, prompt_file: Path, tmp_path: Path
) -> None:
    """The published recipe as it is, bf16 teacher, autocast and checkpointing included, on a smaller Wan and video."""
    small = [
        f"base={tiny_base}",
        f"prompts={prompt_file}",
        'native={"height":32,"width":32,"num_frames":9,"fps":16}',
        "batch_size=2",
        "max_iterations=2",
        "student_every_iterations=1",
    ]
    config = with_overrides(recipe_config("wan_1_3b"), small)
    outcome = run(config, tmp_path / "run")
    assert (outcome.iteration, outcome.num_student_updates, outcome.num_skipped) == (2, 2, 0)
    state = final_state(tmp_path / "run")
    start = open_base(config.base).load_transformer(torch.float32).state_dict()
    for role in ("student", "critic"):
        assert any(not torch.equal(tensor, start[name]) for name, tensor in state["networks"][role].items())
    bundle = load_bundle(tmp_path / "run" / "bundle", torch.float32, CPU)
    assert bundle.spec.timesteps == (1000.0, 900.0, 757.0, 522.0)
