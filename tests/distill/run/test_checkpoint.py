"""Checkpoints are there whole or not at all; bundles load in codmd_serve and carry the averaged weights."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.wan.checkpoint import load_bundle, read_spec
from distill.config import DistillConfig, with_overrides
from distill.networks.base import open_base
from distill.networks.build import Networks
from distill.run import checkpoint
from distill.run.checkpoint import (
    check_resumable,
    export_bundle,
    list_checkpoints,
    load_checkpoint,
    read_config,
    save_checkpoint,
    write_bundle,
    write_config,
)
from distill.run.trainer import RunOptions, run_training
from distill.worlds.shapeworld.captions import grammar


def averaged(networks: Networks) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() + 0.01 for name, tensor in networks.student.named_parameters()}


def test_state_survives_with_its_kinds(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0), "b": {"n": 3, "x": 0.1, "t": (1, 2)}, "c": [torch.tensor(2, dtype=torch.int64)]}
    folder = save_checkpoint(tmp_path, 7, state, keep_last=1)
    again = load_checkpoint(folder)
    assert folder.name == "step-00000007"
    assert torch.equal(again["a"], state["a"])
    assert again["b"] == state["b"]


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        save_checkpoint(tmp_path, step, {"step": step}, keep_last=2)
    assert [load_checkpoint(folder)["step"] for folder in list_checkpoints(tmp_path)] == [100, 1000]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000100", "step-00001000"]


def test_failed_save_leaves_older_checkpoints_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1}, keep_last=1)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path, 2, {"step": 2}, keep_last=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_unfinished_checkpoint_is_not_listed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1}, keep_last=1)
    (tmp_path / "checkpoints" / ".step-00000002.partial").mkdir()
    (tmp_path / "checkpoints" / ".tmp-0123456789ab.partial").mkdir()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000001"]


def test_save_removes_what_killed_saves_left(tmp_path: Path) -> None:
    for name in (".step-00000002.partial", ".tmp-0123456789ab.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    save_checkpoint(tmp_path, 3, {"step": 3}, keep_last=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 3, {"a": torch.zeros(1000)}, keep_last=1)
    path = folder / "state.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="delete step-00000003"):
        load_checkpoint(folder)


def test_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    torch.save({"call": os.getcwd}, folder / "state.pt")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(folder)


def test_config_survives_and_damage_is_named(tmp_path: Path, tiny_config: DistillConfig) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        read_config(tmp_path)
    write_config(tmp_path, tiny_config)
    assert read_config(tmp_path) == tiny_config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    data = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(data | {"colour": 1}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json: unknown setting colour"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


def test_resuming_may_change_the_length_of_a_run_and_nothing_that_was_computed(tiny_config: DistillConfig) -> None:
    check_resumable(tiny_config, with_overrides(tiny_config, ["max_iterations=9", "keep_last=1", "bundle_dtype=bf16"]))
    for setting in ("seed=1", "copula.temperature=0.2", "guidance_scale=2", "batch_size=4"):
        with pytest.raises(ConfigError, match=setting.split("=")[0].split(".")[0]):
            check_resumable(tiny_config, with_overrides(tiny_config, [setting]))


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("fp16", 1e-3), ("bf16", 1e-2)])
def test_bundle_loads_in_the_server_with_the_averaged_weights(
    tmp_path: Path, tiny_config: DistillConfig, tiny_networks: Networks, dtype: str, tolerance: float
) -> None:
    config = with_overrides(tiny_config, [f"bundle_dtype={dtype}", "vocabulary_note=Few words."])
    weights = averaged(tiny_networks)
    write_bundle(tmp_path / "student", config, open_base(config.base), weights, 12)
    bundle = load_bundle(tmp_path / "student")
    for name, tensor in bundle.transformer.named_parameters():
        assert tensor.dtype == torch.float32
        assert float((tensor - weights[name]).abs().max()) <= tolerance
    spec = bundle.spec
    assert (spec.method, spec.step, spec.ema, spec.base_model) == ("codmd", 12, True, "tiny")
    assert spec.sigmas == config.grid().sigmas
    assert spec.config_sha256 == config.sha256()
    assert (spec.native.height, spec.native.num_frames, spec.native.fps) == (32, 9, 16)
    assert spec.vocabulary_note == "Few words."
    assert len(spec.preview_map) == 5, "four latent channels and a constant"
    assert bundle.grammar is None  # its prompts came from a file


def test_bundle_of_a_run_on_the_captions_of_the_world_carries_their_grammar(
    tmp_path: Path, tiny_config: DistillConfig, tiny_networks: Networks
) -> None:
    config = with_overrides(tiny_config, ["prompts="])
    write_bundle(tmp_path / "student", config, open_base(config.base), averaged(tiny_networks), 12)
    assert load_bundle(tmp_path / "student").grammar == grammar()


def test_bundle_names_its_base_relative_to_itself(
    tmp_path: Path, tiny_config: DistillConfig, tiny_networks: Networks
) -> None:
    write_bundle(tmp_path / "deep" / "student", tiny_config, open_base(tiny_config.base), averaged(tiny_networks), 1)
    base = read_spec(tmp_path / "deep" / "student").base
    assert not Path(base).is_absolute()
    assert (tmp_path / "deep" / "student" / base).resolve() == Path(tiny_config.base).resolve()


def test_export_takes_the_wanted_checkpoint(
    tmp_path: Path, tiny_config: DistillConfig, tiny_networks: Networks
) -> None:
    write_config(tmp_path, tiny_config)
    with pytest.raises(CheckpointError, match="kept are: none"):
        export_bundle(tmp_path, tmp_path / "student")
    for step in (2, 4):
        shadow = {name: tensor + step for name, tensor in averaged(tiny_networks).items()}
        trainer = {"ema": {"shadow": shadow}, "updates": {"student": step // 2}}
        save_checkpoint(tmp_path, step, {"trainer": trainer}, keep_last=5)
    assert export_bundle(tmp_path, tmp_path / "student") == 4
    assert export_bundle(tmp_path, tmp_path / "student", iteration=2) == 2
    assert read_spec(tmp_path / "student").step == 1
    with pytest.raises(CheckpointError, match="kept are: 2, 4"):
        export_bundle(tmp_path, tmp_path / "student", iteration=3)


def test_weights_of_another_network_make_no_bundle(
    tmp_path: Path, tiny_config: DistillConfig, tiny_networks: Networks
) -> None:
    weights = averaged(tiny_networks)
    weights.popitem()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_bundle(tmp_path / "student", tiny_config, open_base(tiny_config.base), weights, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("native.fps=500", "native.fps must be at most 120, got 500"),
        ('vocabulary_note="two\\nlines"', "vocabulary_note must be one line of text"),
    ],
)
def test_what_the_bundle_could_not_say_is_refused_before_anything_is_computed(
    tiny_config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the run went on")

    monkeypatch.setattr("distill.run.trainer.cached_prompt_data", refuse)
    options = RunOptions(out=tmp_path / "run", device=torch.device("cpu"), preview_every_iterations=0)
    with pytest.raises(ConfigError, match=message):
        run_training(with_overrides(tiny_config, [setting]), options, resume=False)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_needs_the_file_no_more_that_it_started_from(tiny_config: DistillConfig, tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    weights = open_base(tiny_config.base).load_transformer(torch.float32).state_dict()
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, start)
    config = with_overrides(tiny_config, [f"student_from={start}", "max_iterations=2"])
    options = RunOptions(out=tmp_path / "run", device=torch.device("cpu"))
    run_training(config, options, resume=False)
    start.unlink()
    outcome = run_training(with_overrides(config, ["max_iterations=3"]), options, resume=True)
    assert outcome.iteration == 3
