"""Checkpoints are there whole or not at all; bundles load in codmd_serve and carry the averaged weights."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import as_single_file, save
from safetensors.torch import load_file, save_file

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.wan.checkpoint import load_bundle, read_spec
from distill.config import DistillConfig, with_overrides
from distill.networks.base import open_base
from distill.networks.build import Networks
from distill.parallel import shard_files
from distill.parallel.processes import SINGLE_PROCESS
from distill.parallel.state import stage
from distill.run.bundle import export_bundle, write_bundle
from distill.run.checkpoint import (
    Score,
    best_iteration,
    check_resumable,
    list_checkpoints,
    load_checkpoint,
    read_config,
    save_checkpoint,
    write_config,
)
from distill.run.trainer import RunOptions, run_training
from distill.worlds.shapeworld.captions import grammar


def averaged(networks: Networks) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() + 0.01 for name, tensor in networks.student.named_parameters()}


def kept(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_state_survives_with_its_kinds(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5),
        "scalar": torch.tensor(2.0),
        "half": torch.randn(7).bfloat16(),
        "count": torch.arange(4),
        "transposed": torch.randn(4, 3).t(),
        "empty": torch.zeros(0, 3),
    }
    folder = save(tmp_path, 7, tensors, nested={"n": 3, "x": 0.1})
    again = load_checkpoint(folder)
    assert folder.name == "step-00000007"
    assert again.values == {"nested": {"n": 3, "x": 0.1}}
    assert again.names() == tensors.keys()
    targets = {name: torch.full_like(tensor, 9) for name, tensor in tensors.items()}
    again.load_into(targets, SINGLE_PROCESS)
    for name, tensor in tensors.items():
        for got in (again.read(name), targets[name]):
            assert got.dtype == tensor.dtype and torch.equal(got, tensor), name


def test_shards_are_safetensors_files(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0)})
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "shard-00000.safetensors"]
    found = load_file(folder / "shard-00000.safetensors")
    assert found.keys() == {"a@0,0", "b@"}
    assert torch.equal(found["a@0,0"], torch.arange(6.0).reshape(2, 3))


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        save(tmp_path, step, {"a": torch.zeros(1)}, keep_last=2, step=step)
    assert [load_checkpoint(folder).values["step"] for folder in list_checkpoints(tmp_path)] == [100, 1000]
    assert kept(tmp_path) == ["step-00000100", "step-00001000"]


def test_the_best_checkpoint_stays_until_a_better_one_comes(tmp_path: Path) -> None:
    def scored(step: int, value: float, metric: str = "loss") -> None:
        save_checkpoint(tmp_path, step, stage({"a": torch.zeros(1)}), {}, 1, score=Score(metric, value))

    for step, value in ((1, 3.0), (2, 1.0), (3, 2.0), (4, math.nan)):
        scored(step, value)
    assert best_iteration(tmp_path) == 2
    assert kept(tmp_path) == ["step-00000002", "step-00000004"]
    scored(5, 0.5)
    assert kept(tmp_path) == ["step-00000005"]
    scored(6, 7.0, metric="other")
    assert kept(tmp_path) == ["step-00000006"], "another metric chooses anew"
    (tmp_path / "best.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"best\.json is damaged"):
        best_iteration(tmp_path)


def test_failed_save_leaves_older_checkpoints_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, {"a": torch.zeros(1)}, keep_last=1)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_files, "write_all", full_disk)
    with pytest.raises(CheckpointError, match=r"step-00000002 cannot be written: .*No space left"):
        save(tmp_path, 2, {"a": torch.zeros(1)}, keep_last=1)
    assert kept(tmp_path) == ["step-00000001"]


def test_unfinished_checkpoint_is_not_listed(tmp_path: Path) -> None:
    save(tmp_path, 1, {"a": torch.zeros(1)})
    (tmp_path / "checkpoints" / ".step-00000002.partial").mkdir()
    (tmp_path / "checkpoints" / ".tmp-0123456789ab.partial").mkdir()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000001"]


def test_save_removes_what_killed_saves_left(tmp_path: Path) -> None:
    for name in (".step-00000002.partial", ".tmp-0123456789ab.partial", ".tmp-step-00000001.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    save(tmp_path, 3, {"a": torch.zeros(1)})
    assert kept(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shard-00000.safetensors", None, r"step-00000003 lacks shard-00000\.safetensors; delete step-00000003"),
        ("shard-00000.safetensors", 500, r"shard-00000\.safetensors is truncated: it has 500 bytes, expected 4\d\d\d"),
        ("index.json", None, r"step-00000003 is incomplete: it has no index\.json; delete step-00000003"),
        ("index.json", 20, r"index\.json"),
    ],
)
def test_damaged_checkpoint_is_refused_by_name(tmp_path: Path, name: str, damage: int | None, message: str) -> None:
    path = save(tmp_path, 3, {"a": torch.zeros(1000)}) / name
    data = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(data[:damage])
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format=9), "update this version"),
        (lambda index: index.pop("tensors"), "is damaged"),
        (lambda index: index["tensors"]["a"].update(parts=[]), "a is not complete"),
        (lambda index: index["tensors"]["a"]["parts"][0].__setitem__(3, 10**9), "damaged at a"),
        (lambda index: index["tensors"]["a"]["parts"][0].__setitem__(2, "../secret"), "damaged at a"),
        (lambda index: index["tensors"]["a"].update(dtype="F4"), "is damaged"),
        (lambda index: index["tensors"]["a"].update(size=[-5]), "is damaged"),
    ],
)
def test_index_that_says_what_cannot_be_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = save(tmp_path, 3, {"a": torch.zeros(10)}) / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path.parent)


def test_single_file_of_older_versions_is_read(tmp_path: Path) -> None:
    parameter = torch.randn(3, 2)
    tensors = {f"networks/{role}/w": parameter + n for n, role in enumerate(("student", "critic"))}
    tensors |= {"ema/w": parameter + 2, "optimizers/critic/exp_avg/w": parameter + 3}
    tensors |= {"optimizers/critic/step/w": torch.tensor(4.0)}
    updates = {"student": 0, "critic": 4}
    own = {"iteration": 4, "updates": updates, "num_skipped": 1, "nonfinite_in_row": updates, "ema_updates": 0}
    folder = save(tmp_path, 4, tensors, **own, elapsed_s=1.5)
    path = as_single_file(folder)
    old = load_checkpoint(folder)
    assert old.index is None and old.values == {**own, "elapsed_s": 1.5}
    assert old.names() == tensors.keys()
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    old.load_into(targets, SINGLE_PROCESS)
    assert all(torch.equal(targets[name], tensor) for name, tensor in tensors.items())
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="delete step-00000004"):
        load_checkpoint(folder)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="is not a training checkpoint"):
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
        shadow = {f"ema/{name}": tensor + step for name, tensor in averaged(tiny_networks).items()}
        save(tmp_path, step, shadow, updates={"student": step // 2})
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
