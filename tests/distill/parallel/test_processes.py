"""Several gloo processes compute what one computes; parts of a batch compute what the whole does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import with_method

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig, config_to_dict, with_overrides
from distill.parallel.processes import SINGLE_PROCESS, Processes, check_world_size
from distill.parallel.sharding import check_token_split

ROOT = Path(__file__).resolve().parents[3]
ITERATIONS = 3
# name: (processes, settings); each is compared with the one-process run of the same method named after the slash.
SCENARIOS: dict[str, tuple[int, list[str]]] = {
    "whole": (1, []),
    "two": (2, []),
    "four": (4, []),
    "parts": (1, ["accumulate=2"]),
    # The term as it is in use: enlarged twenty times, the control's rounding errors reach 1.2e-5 of the gradient.
    "control": (1, ["copula.scale=1", "copula.control=matched", "copula.features=spatial"]),
    "control-two": (2, ["copula.scale=1", "copula.control=matched", "copula.features=spatial", "accumulate=2"]),
    "recomputed-two": (2, ["activation_checkpointing=true"]),
    "lora": (1, ["lora_critic_rank=2"]),
    "lora-two": (2, ["lora_critic_rank=2", "activation_checkpointing=true"]),
    # Adapters of student and critic; BIG is a teacher of another architecture.
    "adapted": (1, ["teacher=BIG", "lora_student_rank=2", "lora_critic_rank=2"]),
    "adapted-two": (
        2,
        ["teacher=BIG", "lora_student_rank=2", "lora_critic_rank=2", "activation_checkpointing=true"],
    ),
    "teacher": (1, ["teacher=BIG", "method=dcm"]),
    "teacher-two": (2, ["teacher=BIG", "method=dcm"]),
    "dcm": (1, ["method=dcm"]),
    "dcm-two": (2, ["method=dcm"]),
    "rcm": (1, ["method=rcm"]),
    "rcm-two": (2, ["method=rcm"]),
    "dp-dmd": (1, ["method=dp-dmd"]),
    "dp-dmd-two": (2, ["method=dp-dmd"]),
    "exits": (1, ["exit_per_sample=true"]),
    "exits-two": (2, ["exit_per_sample=true", "accumulate=2"]),
    "arms": (1, ["method=f-distill"]),
    "arms-two": (2, ["method=f-distill", "accumulate=2", "activation_checkpointing=true"]),
    "arms-last": (2, ["method=f-distill", "accumulate=2", "gradient_sync=last"]),
    "lora-arms": (1, ["method=f-distill", "lora_critic_rank=2"]),
    "lora-arms-two": (2, ["method=f-distill", "lora_critic_rank=2"]),
    "split-two": (2, ["context_parallel=2"]),
    "split-four": (4, ["context_parallel=2", "accumulate=2", "activation_checkpointing=true"]),
    # Two replicas of two shards; rows of the mesh are replicas, and groups that split tokens may lie as they like.
    "hsdp-four": (4, ["shard_group=2"]),
    "hsdp-split": (4, ["shard_group=2", "context_parallel=2", "accumulate=2"]),
    "hsdp-lora": (4, ["shard_group=2", "lora_critic_rank=2", "activation_checkpointing=true"]),
    # Gradients are reduced in the last of two micro-batches alone.
    "each-two": (2, ["accumulate=2"]),
    "last-two": (2, ["accumulate=2", "gradient_sync=last", "activation_checkpointing=true"]),
    "hsdp-last": (4, ["shard_group=2", "context_parallel=2", "accumulate=2", "gradient_sync=last"]),
    "bf16-each": (2, ["precision=bf16", "copula.scale=1", "accumulate=2"]),
    "bf16-last": (2, ["precision=bf16", "copula.scale=1", "accumulate=2", "gradient_sync=last"]),
    # Both compute two parts of two samples, so that bfloat16 rounds the same sums.
    # The relational term as it is in use: enlarged, it turns the last bit of bfloat16 into a tenth of the third update.
    "bf16-parts": (1, ["precision=bf16", "copula.scale=1", "accumulate=2"]),
    "bf16-two": (2, ["precision=bf16", "copula.scale=1", "activation_checkpointing=true"]),
    "bf16-lora-parts": (
        1,
        ["precision=bf16", "teacher_dtype=bf16", "copula.scale=1", "lora_critic_rank=2", "accumulate=2"],
    ),
    "bf16-lora-two": (2, ["precision=bf16", "teacher_dtype=bf16", "copula.scale=1", "lora_critic_rank=2"]),
    "bf16-adapted-parts": (
        1,
        ["precision=bf16", "teacher_dtype=bf16", "copula.scale=1", "lora_student_rank=2", "accumulate=2"],
    ),
    "bf16-adapted-two": (2, ["precision=bf16", "teacher_dtype=bf16", "copula.scale=1", "lora_student_rank=2"]),
    "bf16-rcm-parts": (1, ["method=rcm", "precision=bf16", "accumulate=2"]),
    "bf16-rcm-two": (2, ["method=rcm", "precision=bf16"]),
}
SAME = [
    ("two", "whole"),
    ("four", "whole"),
    ("parts", "whole"),
    ("control-two", "control"),
    ("recomputed-two", "whole"),
    ("lora-two", "lora"),
    ("adapted-two", "adapted"),
    ("teacher-two", "teacher"),
    ("dcm-two", "dcm"),
    ("rcm-two", "rcm"),
    ("dp-dmd-two", "dp-dmd"),
    ("arms-two", "arms"),
    ("arms-last", "arms"),
    ("lora-arms-two", "lora-arms"),
    ("exits-two", "exits"),
    ("split-two", "whole"),
    ("split-four", "whole"),
    ("hsdp-four", "whole"),
    ("hsdp-split", "whole"),
    ("hsdp-lora", "lora"),
    ("each-two", "whole"),
    ("last-two", "whole"),
    ("hsdp-last", "whole"),
    ("bf16-last", "bf16-each"),
    ("bf16-two", "bf16-parts"),
    ("bf16-lora-two", "bf16-lora-parts"),
    ("bf16-adapted-two", "bf16-adapted-parts"),
    ("bf16-rcm-two", "bf16-rcm-parts"),
]
RESUMED = ("two", "lora-two", "adapted-two", "hsdp-four", "arms-two")


def scenario_config(tiny_config: DistillConfig, settings: list[str], big_teacher: Path) -> DistillConfig:
    settings = [setting.replace("BIG", str(big_teacher)) for setting in settings]
    methods = [setting.removeprefix("method=") for setting in settings if setting.startswith("method=")]
    config = with_method(tiny_config, methods[0]) if methods else tiny_config
    own = {
        # The relational term is most of the loss, so that an error in its gradient cannot hide behind the rest.
        "copula": ["student_every_iterations=1", "copula.scale=20"],
        "rcm": ["student_every_iterations=2", "rcm.data_steps=2", "rcm.warmup_iterations=0"],
        # All terms at once, loud enough to be seen beside DMD.
        "terms": [
            "student_every_iterations=1",
            "terms.data_steps=2",
            "terms.gan.weight=1",
            "terms.gan.critic_weight=1",
            "terms.avd.regression_weight=1",
            "terms.avd.motion_weight=0.1",
            "terms.avd.motion_threshold=-9",
            "terms.transport.weight=1",
            "terms.transport.over=batch",
        ],
        "dp_dmd": ["student_every_iterations=2", "dp_dmd.teacher_steps=4", "dp_dmd.match_step=2"],
    }
    # Keys have a bias whose gradient is 0 but for rounding, and Adam would make updates of full size of that.
    # The seed is one whose three iterations stop at the first, a middle and the last step.
    common = ["seed=3", "batch_size=4", "optimizer.eps=0.01", *own[config.method_settings.group]]
    return with_overrides(config, [*common, *(setting for setting in settings if not setting.startswith("method="))])


@pytest.fixture(scope="module")
def results(
    tiny_config: DistillConfig, big_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """What every process of every scenario saw."""
    out = tmp_path_factory.mktemp("processes")
    wanted = [
        {
            "name": name,
            "config": config_to_dict(scenario_config(tiny_config, settings, big_teacher)),
            "world_size": world_size,
            "iterations": ITERATIONS,
            "resumes": name in RESUMED,
        }
        for name, (world_size, settings) in SCENARIOS.items()
    ]
    (out / "scenarios.json").write_text(json.dumps(wanted))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("run_processes.py")
    command = [sys.executable, str(script), str(out / "scenarios.json"), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: [torch.load(out / f"{name}-{rank}.pt", weights_only=True) for rank in range(world_size)]
        for name, (world_size, _) in SCENARIOS.items()
    }


def relative_error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    assert got.keys() == want.keys()
    joined = [torch.cat([items[name].flatten().double() for name in want]) for items in (got, want)]
    return float((joined[0] - joined[1]).norm() / joined[1].norm())


@pytest.mark.parametrize(("name", "reference"), SAME)
def test_losses_gradients_and_parameters_equal_the_whole_batch_in_one_process(
    results: dict[str, list[dict[str, Any]]], name: str, reference: str
) -> None:
    got, want = results[name][0], results[reference][0]
    if name.startswith("bf16"):
        # The last bit of a float32 sum decides here and there which way bfloat16 rounds, which is off by 4e-3.
        assert relative_error(got["gradient"], want["gradient"]) < 2e-3
        # Small differences of logarithms, which the student's loss has in it too.
        relational = ("loss_frame", "loss_batch")
        for step in range(ITERATIONS):
            losses = [
                {k: v for k, v in seen["metrics"][step].items() if "loss" in k and k not in relational}
                for seen in (got, want)
            ]
            assert losses[0]
            assert losses[0] == pytest.approx(losses[1], rel=1e-2)
        for role in ("student", "critic"):
            updates = [
                {key: seen["networks"][role][key] - tensor for key, tensor in want["start"][role].items()}
                for seen in (got, want)
            ]
            assert relative_error(*updates) < 0.05
        return
    assert relative_error(got["gradient"], want["gradient"]) < 1e-5
    for step in range(ITERATIONS):
        losses = [{k: v for k, v in seen["metrics"][step].items() if "loss" in k} for seen in (got, want)]
        # The relational terms are differences of logarithms of about 1, so float32 leaves 1e-7 of them uncertain.
        assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=20 * 2e-7)
    for role in ("student", "critic"):
        assert relative_error(got["networks"][role], want["networks"][role]) < 1e-5
        for key, tensor in want["networks"][role].items():
            torch.testing.assert_close(got["networks"][role][key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    assert relative_error(got["shadow"], want["shadow"]) < 1e-5


@pytest.mark.parametrize("name", [name for name, (world_size, _) in SCENARIOS.items() if world_size > 1])
def test_processes_agree_and_do_equally_many_collectives(results: dict[str, list[dict[str, Any]]], name: str) -> None:
    first, *others = results[name]
    assert sum(first["collectives"].values()) > 0
    for other in others:
        assert other["collectives"] == first["collectives"]
        assert other["exit_steps"] == first["exit_steps"]
        assert other["metrics"] == first["metrics"]


def test_exit_steps_are_those_of_one_process(results: dict[str, list[dict[str, Any]]]) -> None:
    assert results["four"][3]["exit_steps"] == results["whole"][0]["exit_steps"]
    assert set(results["whole"][0]["exit_steps"]) == {0, 1, 3}


def test_weights_are_sharded_not_copied(results: dict[str, list[dict[str, Any]]]) -> None:
    whole = results["whole"][0]["sharded"]
    shares = [seen["sharded"] for seen in results["four"]]
    assert sum(shares) == whole
    assert max(shares) < 0.4 * whole
    # Two replicas: each rank holds half, and the two ranks of a replica hold all.
    replicas = [seen["sharded"] for seen in results["hsdp-four"]]
    assert sum(replicas[:2]) == sum(replicas[2:]) == whole
    assert max(replicas) < 0.7 * whole


def reductions(results: dict[str, list[dict[str, Any]]], name: str) -> tuple[int, int]:
    """Reduce-scatters of gradients, and all-reduces, which are those of replicas and of a few scalars."""
    counts = results[name][0]["collectives"]
    scattered, reduced = (
        sum(number for key, number in counts.items() if word in key) for word in ("reduce_scatter", "allreduce_")
    )
    return scattered, reduced


def test_gradients_are_reduced_in_the_last_micro_batch_alone(results: dict[str, list[dict[str, Any]]]) -> None:
    whole, each, last = (reductions(results, name) for name in ("two", "each-two", "last-two"))
    assert each[0] == 2 * whole[0] and last[0] == whole[0] > 0
    # Shards of earlier micro-batches wait for the last, where replicas meet.
    plain, split, once = (reductions(results, name) for name in ("hsdp-four", "hsdp-split", "hsdp-last"))
    assert split[0] == 2 * plain[0] and once[0] == plain[0] > 0
    assert split[1] == once[1] == plain[1] > whole[1]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_from_the_whole_state_goes_on_as_it_would_have(
    results: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for seen in results[name]:
        assert seen["next_resumed"] == seen["next"]


@pytest.mark.parametrize("name", sorted({reference for _, reference in SAME}))
def test_the_updates_that_are_compared_move_the_networks(results: dict[str, list[dict[str, Any]]], name: str) -> None:
    """So that equal parameters are not simply the initial ones: by 10 times what they may differ by."""
    seen = results[name][0]
    for role in ("student", "critic"):
        assert relative_error(seen["networks"][role], seen["start"][role]) > 1e-4


def test_the_control_arm_has_another_gradient(results: dict[str, list[dict[str, Any]]]) -> None:
    gradients = [results[name][0]["gradient"] for name in ("whole", "control")]
    assert relative_error(*gradients) > 1e-2


def test_split_tokens_are_exchanged(results: dict[str, list[dict[str, Any]]]) -> None:
    """Or the test of their equality would be one of whole videos."""
    counts = {name: results[name][0]["collectives"] for name in ("two", "split-two")}
    exchanges = {name: sum(n for key, n in seen.items() if "all_to_all" in key) for name, seen in counts.items()}
    assert exchanges["two"] == 0 < exchanges["split-two"]


def test_positions_share_out_the_batch_once() -> None:
    taken = []
    for part in range(2):
        for rank in range(6):
            processes = Processes(rank=rank, world_size=6, context_parallel=2)
            taken.append(list(processes.positions(12, 2, part)))
    assert taken[0] == taken[1] == [0, 1]
    assert [place for places in taken[::2] for place in places] == list(range(12))
    assert SINGLE_PROCESS.positions(3, 1, 0) == range(3)


@pytest.mark.parametrize(
    ("settings", "world_size", "named"),
    [
        (["batch_size=4"], 3, "batch_size must be a multiple of 3"),
        (["batch_size=4", "accumulate=4"], 2, "batch_size must be a multiple of 8 .*accumulate=4"),
        (["batch_size=4", "accumulate=3"], 1, "batch_size must be a multiple of 3"),
        (["context_parallel=4"], 2, "context_parallel 4 needs a multiple of 4 processes, got 2: start .*torchrun"),
        (["context_parallel=2"], 3, "context_parallel 2 needs a multiple of 2 processes"),
        (["batch_size=4", "shard_group=3"], 4, "shard_group 3 needs a multiple of 3 processes, got 4: use 0 to shard"),
        (["batch_size=4", "shard_group=4"], 2, "shard_group 4 needs a multiple of 4 processes, got 2"),
    ],
)
def test_a_run_that_cannot_be_shared_out_is_refused_by_key(
    tiny_config: DistillConfig, settings: list[str], world_size: int, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        check_world_size(with_overrides(tiny_config, settings), world_size)


def test_tokens_and_heads_have_to_divide(tiny_config: DistillConfig) -> None:
    eight = with_overrides(tiny_config, ["context_parallel=8"])
    with pytest.raises(ConfigError, match="must divide the 32764 tokens"):
        check_token_split(eight, 16, 32764)
    with pytest.raises(ConfigError, match="context_parallel must divide the 12 attention heads, got 8"):
        check_token_split(eight, 12, 32760)
    check_token_split(eight, 40, 32760)


def test_rcm_cannot_split_tokens(tiny_config: DistillConfig) -> None:
    with pytest.raises(ConfigError, match="context_parallel must be 1 for method rcm"):
        with_overrides(with_method(tiny_config, "rcm"), ["context_parallel=2"])
