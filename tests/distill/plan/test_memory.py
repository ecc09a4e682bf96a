"""A plan's memory, part by part and at its peak, against a real trainer of a small model on one device."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import with_method
from torch import Tensor

from distill.config import DistillConfig, with_overrides
from distill.data.prompts import PromptData, prompts_in_memory
from distill.methods.registry import METHODS
from distill.networks.base import open_base
from distill.networks.build import build_networks
from distill.plan.architecture import Subject, read_subject
from distill.plan.memory import MEMORY_PARTS, copy_bytes, state_bytes
from distill.plan.options import PlanOptions
from distill.plan.planner import Plan, make_plan
from distill.run.checks import native_latents
from distill.run.trainer import Trainer

CPU = torch.device("cpu")
# Every method there is, so that a new one cannot be forgotten; and the residual stream in either dtype.
LAYOUTS = [(method, precision, "fp32") for method in sorted(METHODS) for precision in ("fp32", "bf16")]
LAYOUTS.append(("codmd", "bf16", "bf16"))
PROMPT_TOKENS = 16
LONG = 'native={"height":128,"width":128,"num_frames":9,"fps":16}'


@pytest.fixture(scope="module")
def prompts() -> PromptData:
    """Five prompts and the negative one, of 15 positions each: 16 when trimmed."""
    rng = torch.Generator().manual_seed(3)
    return prompts_in_memory(torch.randn(6 * 15, 16, generator=rng), 15 * torch.arange(7))


@pytest.fixture
def long_config(tiny_config: DistillConfig) -> DistillConfig:
    """The tiny pipeline on a longer video, so that activations count: 3 x 16 x 16 latents, 192 tokens."""
    return with_overrides(tiny_config, [LONG, "batch_size=4", "student_every_iterations=1"])


def new_trainer(config: DistillConfig, prompts: PromptData) -> Trainer:
    """A trainer whose attention is fused, as the plan counts it, also in bf16 on a CPU."""
    networks = build_networks(config, open_base(config.base), CPU)
    for network in networks.transformers():
        network.reset_attention_backend()
    shape = native_latents(config, open_base(config.base))
    sampling = METHODS[config.method].teacher_sampling(config)
    latents = RandomLatents(shape, 0 if sampling is None else len(sampling.kept_sigmas))
    return Trainer(config, networks, prompts, shape, CPU, latents)  # type: ignore[arg-type]


class RandomLatents:
    """Samples of the teacher that nobody made."""

    num_samples = 10**6

    def __init__(self, shape: tuple[int, ...], num_levels: int) -> None:
        self.shape, self.num_levels, self.has_states = shape, num_levels, num_levels > 0

    def batch(self, indices: list[int], device: torch.device) -> Tensor:
        return torch.randn(len(indices), *self.shape, device=device)

    def states(self, indices: list[int], device: torch.device) -> Tensor:
        return torch.randn(len(indices), self.num_levels, *self.shape, device=device)


def size(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def optimizer_bytes(trainer: Trainer) -> int:
    states = [state for optimizer in trainer.optimizers.values() for state in optimizer.state.values()]
    return size(value for state in states for value in state.values() if isinstance(value, Tensor) and value.ndim)


def planned(config: DistillConfig, **options: Any) -> Plan:
    return make_plan(read_subject(config), PlanOptions(prompt_tokens=PROMPT_TOKENS, reserve_gib=0.0, **options))


@pytest.mark.parametrize("teacher_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("roles", [{}, {"lora_critic_rank": 3, "lora_student_rank": 2}])
def test_states_are_those_of_a_real_trainer(
    tiny_config: DistillConfig, big_teacher: Path, prompts: PromptData, teacher_dtype: str, roles: dict[str, int]
) -> None:
    settings = ["optimizer.betas=[0.9,0.999]", "precision=bf16", f"teacher_dtype={teacher_dtype}"]
    if roles:
        settings += [f"teacher={big_teacher}", *(f"{name}={rank}" for name, rank in roles.items())]
    config = with_overrides(tiny_config, settings)
    trainer = new_trainer(config, prompts)
    gradients = {}
    for role, optimizer in trainer.optimizers.items():
        network = trainer.trained[role]

        def note(*_: object, role: str = role, network: torch.nn.Module = network) -> None:
            gradients[role] = size(parameter.grad for parameter in network.parameters() if parameter.requires_grad)

        optimizer.register_step_pre_hook(note)
    trainer.iterate()
    plan = planned(config, **roles)
    memory, networks = plan.memory["student update"], trainer.networks
    assert memory["student weights"] == size(networks.student.parameters())
    # A LoRA critic is the teacher's network.
    shared = size(trainer.parameters["critic"].values()) if roles else 0
    assert memory["critic weights"] == (shared or size(networks.critic.parameters()))
    assert memory["teacher weights"] == size(networks.teacher.parameters()) - shared
    assert memory["EMA"] == size(trainer.ema.shadow.values())
    assert memory["optimizer"] == optimizer_bytes(trainer)
    assert gradients == {role: plan.memory[f"{role} update"]["gradients"] for role in ("student", "critic")}


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_both_moments_are_counted_as_torch_keeps_them(
    tiny_config: DistillConfig, prompts: PromptData, beta: float
) -> None:
    config = with_overrides(tiny_config, [f"optimizer.betas=[{beta},0.999]"])
    trainer = new_trainer(config, prompts)
    trainer.iterate()
    assert optimizer_bytes(trainer) == planned(config).memory["student update"]["optimizer"]


def peak_of_iterations(trainer: Trainer, live_bytes: Callable, count: int) -> int:
    """The most bytes alive at once in some iterations, weights and optimizer state included."""
    networks = trainer.networks
    with live_bytes() as live:
        for network in (networks.student, networks.critic, networks.teacher):
            for tensor in network.parameters():
                live.add(tensor)
        for optimizer in trainer.optimizers.values():
            for state in optimizer.state.values():
                for tensor in state.values():
                    live.add(tensor)
        for tensor in trainer.ema.shadow.values():
            live.add(tensor)
        for _ in range(count):
            trainer.iterate()
    return int(live.peak)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("method", "precision", "residual"), LAYOUTS)
def test_peak_of_an_iteration_is_within_15_percent(
    tiny_config: DistillConfig,
    prompts: PromptData,
    live_bytes: Callable,
    checkpointing: bool,
    method: str,
    precision: str,
    residual: str,
) -> None:
    settings = [LONG, "batch_size=4", f"precision={precision}", f"teacher_dtype={precision}", "max_iterations=8"]
    config = with_overrides(with_method(tiny_config, method), [*settings, f"residual_dtype={residual}"])
    if config.method_settings.group == "rcm":
        config = with_overrides(config, ["rcm.warmup_iterations=0"])
    # The student and the critic have had their turns once before, so that optimizers have their state.
    count = 2
    trainer = new_trainer(config, prompts)
    if checkpointing:
        for network in trainer.trained.values():
            network.enable_gradient_checkpointing()  # type: ignore[operator]
    for _ in range(2):
        trainer.iterate()
    peak = peak_of_iterations(trainer, live_bytes, count)
    plan = planned(config, activation_checkpointing=checkpointing)
    assert plan.totals[plan.peak_phase] == pytest.approx(peak, rel=0.15)
    parts = plan.memory[plan.peak_phase]
    # Or the test would be one of weights.
    assert parts["activations"] + parts["working set"] > 0.5 * plan.totals[plan.peak_phase]


@pytest.mark.parametrize("roles", [{}, {"lora_student_rank": 2, "lora_critic_rank": 2}])
def test_peak_under_another_teacher_is_within_15_percent(
    long_config: DistillConfig, big_teacher: Path, prompts: PromptData, live_bytes: Callable, roles: dict[str, int]
) -> None:
    ranks = [f"{name}={rank}" for name, rank in roles.items()]
    config = with_overrides(with_method(long_config, "dmd"), [f"teacher={big_teacher}", "precision=fp32", *ranks])
    trainer = new_trainer(config, prompts)
    trainer.iterate()
    peak = peak_of_iterations(trainer, live_bytes, 1)
    plan = planned(config, activation_checkpointing=False, **roles)
    assert plan.totals[plan.peak_phase] == pytest.approx(peak, rel=0.15)


def test_a_critic_without_turns_costs_its_weights(tiny_config: DistillConfig, prompts: PromptData) -> None:
    config = with_overrides(with_method(tiny_config, "dcm"), ["rcm.dmd_weight=0"])
    trainer = new_trainer(config, prompts)
    trainer.iterate()
    memory = planned(config).memory
    assert memory["student update"]["optimizer"] == optimizer_bytes(trainer)
    assert memory["critic backward"]["activations"] == memory["critic update"]["gradients"] == 0
    assert memory["critic update"]["critic weights"] == size(trainer.networks.critic.parameters())


def test_micro_batches_that_are_related_keep_their_scores_in_memory(
    long_config: DistillConfig, prompts: PromptData, live_bytes: Callable
) -> None:
    config = with_overrides(long_config, ["copula.weight_batch=1", "accumulate=4", "precision=fp32"])
    trainer = new_trainer(config, prompts)
    trainer.iterate()
    peak = peak_of_iterations(trainer, live_bytes, 1)
    plan = planned(config, activation_checkpointing=False, accumulate=4)
    assert plan.totals[plan.peak_phase] == pytest.approx(peak, rel=0.15)
    alone = planned(with_overrides(config, ["copula.weight_batch=0"]), activation_checkpointing=False, accumulate=4)
    kept = plan.memory["student scores"]["latents and text"] - alone.memory["student scores"]["latents and text"]
    # Four latents of 4 x 3 x 16 x 16 float32 for each of four samples.
    assert kept == 4 * 4 * 4 * (4 * 3 * 16 * 16)


def big(tiny_config: DistillConfig, settings: list[str] | None = None) -> Subject:
    return read_subject(with_overrides(tiny_config, ["batch_size=8", *(settings or [])]))


def test_sharding_divides_states_and_gradients_and_adds_gathered_blocks(tiny_config: DistillConfig) -> None:
    subject = big(tiny_config)
    alone, shared = (make_plan(subject, PlanOptions(gpus=gpus, reserve_gib=0.0)) for gpus in (1, 4))
    for part in ("student weights", "critic weights", "teacher weights", "optimizer", "EMA", "gradients"):
        assert shared.memory["student update"][part] == -(-alone.memory["student update"][part] // 4)
    assert alone.memory["student backward"]["weight copies"] == 0
    parameters = subject.parameters
    # Three blocks and the layers around them, in float32, then also a block's gradient that is being reduced.
    around = parameters.total - 2 * parameters.block
    assert shared.memory["student scores"]["weight copies"] == 4 * (3 * parameters.block + around)
    assert shared.memory["student backward"]["weight copies"] == 4 * (4 * parameters.block + around)


def test_bf16_gathers_halves_but_the_student_of_rcm(tiny_config: DistillConfig) -> None:
    options = PlanOptions(gpus=4, reserve_gib=0.0)
    copies = {}
    for method in ("dcm", "rcm"):
        config = with_overrides(with_method(tiny_config, method), ["precision=bf16", "batch_size=8"])
        subject = read_subject(config)
        roles = ("student", "critic", "teacher")
        copies[method] = {role: copy_bytes(subject, options, role, is_backward=False) for role in roles}
    parameters = subject.parameters
    around = 4 * (parameters.total - 2 * parameters.block)
    narrow, wide = 2 * 2 * parameters.block + around, 3 * 4 * parameters.block + around
    assert copies["dcm"] == {"student": narrow, "critic": narrow, "teacher": narrow}
    assert copies["rcm"] == {"student": wide, "critic": narrow, "teacher": narrow}


def test_lora_critic_has_small_states_on_the_teachers_weights(tiny_config: DistillConfig) -> None:
    subject = big(tiny_config)
    memory = make_plan(subject, PlanOptions(lora_critic_rank=4)).memory
    factors = 4 * subject.parameters.lora_width
    assert memory["critic update"]["critic weights"] == 4 * factors
    assert memory["critic update"]["gradients"] == 4 * factors
    assert memory["critic update"]["optimizer"] == 2 * 4 * (subject.parameters.total + factors)


def test_master_dtype_and_accumulation(tiny_config: DistillConfig) -> None:
    halved = state_bytes(big(tiny_config), PlanOptions(master_dtype="bf16"))
    full = state_bytes(big(tiny_config), PlanOptions())
    assert [full[part] // halved[part] for part in ("student weights", "optimizer", "EMA")] == [2, 2, 1]
    whole, parts = (make_plan(big(tiny_config), PlanOptions(accumulate=count)) for count in (1, 4))
    assert parts.load.samples * 4 == whole.load.samples
    few, many = (plan.memory["student scores"]["activations"] for plan in (parts, whole))
    # All but the tables of rotation.
    assert 4 * few == pytest.approx(many, rel=0.01)
    # Gradients of earlier micro-batches are there while later ones run.
    assert whole.memory["student scores"]["gradients"] == 0
    assert parts.memory["student scores"]["gradients"] == parts.memory["student update"]["gradients"]


def test_context_parallel_divides_activations(tiny_config: DistillConfig) -> None:
    subject = big(tiny_config, [LONG])
    plain, shared = (
        make_plan(subject, PlanOptions(gpus=2, prompt_tokens=8, context_parallel=degree)) for degree in (1, 2)
    )
    # Half the samples' groups: a group of two has both GPUs' samples, and half the tokens of each.
    assert shared.load.samples == 2 * plain.load.samples
    assert shared.load.sequence.tokens * 2 == plain.load.sequence.tokens
    sizes = [plan.memory["student scores"]["activations"] / plan.load.samples for plan in (plain, shared)]
    assert 1.5 < sizes[0] / sizes[1] <= 2.0


def test_every_phase_lists_every_part(tiny_config: DistillConfig, tmp_path: Path) -> None:
    plan = make_plan(big(tiny_config), PlanOptions())
    assert all(tuple(parts) == MEMORY_PARTS for parts in plan.memory.values())
    assert plan.fits
    tight = dataclasses.replace(plan.options, gpu_gib=0.1, reserve_gib=0.1)
    assert not make_plan(plan.subject, tight).fits
