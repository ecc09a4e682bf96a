"""Closed forms against torch's own counter on the real network, and on the losses of every method."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import WanTransformer3DModel
from runs import with_method
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from distill.config import DistillConfig, with_overrides
from distill.data.prompts import Batch
from distill.losses.consistency import velocity_and_tangent
from distill.methods import draws as drawing
from distill.methods.draws import Turn
from distill.methods.registry import METHODS, recipe_config
from distill.networks.build import Networks, denoiser
from distill.networks.head import add_head
from distill.parallel.processes import SINGLE_PROCESS
from distill.plan.architecture import Architecture, read_architecture, read_subject
from distill.plan.flops import (
    NetworkFlops,
    Sequence,
    classifier_flops,
    derivative_flops,
    iteration_flops,
    network_flops,
)

CPU = torch.device("cpu")
SAMPLES = 2
# The counter knows fused attention of CUDA only; these give the CPU's kernel the same formulas.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value)
    ),
}


class LoraLinear(nn.Module):
    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(x) + self.up(self.down(x))
        return out


def add_lora(network: WanTransformer3DModel, rank: int) -> None:
    network.requires_grad_(False)
    for block in network.blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, LoraLinear(child, rank))


def counted(compute: Callable[[], object]) -> float:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        compute()
    return counter.get_total_flops()


@pytest.mark.parametrize("rank", [0, 8])
def test_forward_backward_and_recomputation_equal_the_counter(
    network: WanTransformer3DModel,
    architecture: Architecture,
    sequence: Sequence,
    inputs: tuple[Tensor, Tensor, Tensor],
    rank: int,
) -> None:
    if rank:
        add_lora(network, rank)
    denoise, outputs = denoiser(network, "fp32"), []
    forward = counted(lambda: outputs.append(denoise(*inputs).square().mean()))
    backward = counted(outputs[0].backward)
    network.enable_gradient_checkpointing()
    outputs = [denoise(*inputs).square().mean()]
    again = counted(outputs[0].backward) - backward
    want = network_flops(architecture, sequence, rank)
    # A product of LoRA at the edge of the graph is not worth a term; without LoRA the forms are exact.
    tolerance = 0.02 if rank else 1e-9
    assert forward == pytest.approx(SAMPLES * want.forward, rel=tolerance)
    assert backward == pytest.approx(SAMPLES * want.backward, rel=tolerance)
    assert again == pytest.approx(SAMPLES * want.recomputation, rel=tolerance)


def test_derivative_equals_the_counter(
    network: WanTransformer3DModel,
    architecture: Architecture,
    sequence: Sequence,
    inputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    latents, timesteps, embeds = inputs
    denoise = denoiser(network.requires_grad_(False), "fp32")

    def velocity(x: Tensor, theta: Tensor) -> Tensor:
        return denoise(x, 1000 * theta, embeds)

    got = counted(lambda: velocity_and_tangent(velocity, latents, timesteps / 1000, torch.ones_like(latents)))
    assert got == pytest.approx(SAMPLES * derivative_flops(architecture, sequence), rel=1e-9)


# Runs of 12 iterations, unless another number is given: every role comes as often to each of its exit steps.
LOOPS = {
    "codmd": ["max_iterations=8", "copula.weight_batch=1"],
    "codmd in three micro-batches": ["max_iterations=8", "copula.weight_batch=1", "accumulate=3"],
    "dmd": ["max_iterations=8", "accumulate=3"],
    "rcm": ["rcm.warmup_iterations=0", "student_every_iterations=3"],
    "rcm while it warms up": ["rcm.warmup_iterations=12"],
    "dcm": ["rcm.warmup_iterations=0", "student_every_iterations=3"],
    "dmd2": ["max_iterations=8"],
    "f-distill in three micro-batches": ["max_iterations=8", "accumulate=3"],
    "avd": ["max_iterations=8"],
    "vdot": ["max_iterations=8", "terms.transport.over=batch"],
    "dp-dmd": ["dp_dmd.teacher_steps=6", "dp_dmd.match_step=2", "student_every_iterations=3"],
    "dp-dmd to an exit step": [
        "dp_dmd.matching=exit",
        "sampler=sde",
        "student_every_iterations=2",
        "dp_dmd.teacher_steps=6",
        "dp_dmd.match_step=2",
    ],
}


@pytest.mark.parametrize("name", sorted(LOOPS))
def test_iteration_equals_the_counter_on_the_losses_of_every_method(
    tiny_networks: Networks, tiny_config: DistillConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Over a run in which every role stops at every exit step equally often."""
    config = with_overrides(with_method(tiny_config, name.split()[0]), ["max_iterations=12", *LOOPS[name]])
    method, shape = METHODS[config.method], (3, 4, 3, 4, 4)
    rng = torch.Generator().manual_seed(2)
    embeds = torch.randn(2, 3, 8, 16, generator=rng)
    whole = Batch(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], x0=torch.randn(shape, generator=rng))
    exits: Iterator[int] = iter(())
    monkeypatch.setattr(drawing, "draw_exit_step", lambda _rng, num_steps, first=0: next(exits) % num_steps)

    def load(own: range) -> Batch:
        places = slice(own.start, own.stop)
        assert whole.x0 is not None
        return Batch(
            prompt_embeds=whole.prompt_embeds[places],
            negative_prompt_embeds=whole.negative_prompt_embeds[places],
            x0=whole.x0[places],
        )

    memory = {name: torch.tensor(values) for name, values in config.method_settings.memory(config).items()}
    head = config.method_settings.critic_head()
    if head is not None:
        add_head(tiny_networks.critic, head)  # type: ignore[arg-type]
    total, exit_of = 0.0, {"student": itertools.cycle(range(4)), "critic": itertools.cycle(range(4))}
    if getattr(config.method_settings, "matching", "") == "exit":
        exit_of = {role: itertools.cycle((1, 2, 3)) for role in exit_of}
    for iteration in range(config.max_iterations):
        for role in method.turns(config, iteration):
            exits = itertools.repeat(next(exit_of[role]))
            turn = Turn(
                memory=memory,
                role=role,
                iteration=iteration,
                config=config,
                networks=tiny_networks,
                processes=SINGLE_PROCESS,
                shape=shape,
                device=CPU,
                load=load,
            )
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                for result in method.losses(turn):
                    result.loss.backward()
            total += counter.get_total_flops()
    architecture = read_architecture(tiny_networks.student.config)
    tokens = Sequence(tokens=12, context_tokens=12, prompt_tokens=8)
    network = network_flops(architecture, tokens)
    parts = iteration_flops(
        network,
        network,
        method.passes(config),
        is_guided=True,
        checkpointing=False,
        derivative=derivative_flops(architecture, tokens),
        classifier=None if head is None else classifier_flops(architecture, tokens, head),
    )
    assert total / config.max_iterations == pytest.approx(3 * sum(parts.values()), rel=0.01)


@pytest.mark.parametrize(("recipe", "teraflops"), [("wan_1_3b", 283.0), ("wan_14b", 1678.0)])
def test_published_sizes_cost_what_the_counter_found(recipe: str, teraflops: float) -> None:
    """FlopCounterMode on the full diffusers modules: 283.0 and 1,678 TFLOP for 32,760 tokens."""
    subject = read_subject(recipe_config(recipe))
    sequence = Sequence(tokens=32_760, context_tokens=32_760, prompt_tokens=512)
    assert network_flops(subject.architecture, sequence).forward == pytest.approx(teraflops * 1e12, rel=1e-3)


def test_context_parallel_shares_the_work_of_a_sample(architecture: Architecture) -> None:
    whole = network_flops(architecture, Sequence(tokens=192, context_tokens=192, prompt_tokens=16))
    part = network_flops(architecture, Sequence(tokens=48, context_tokens=192, prompt_tokens=16))
    # What is done for the prompt is done on every GPU.
    assert whole.forward < 4 * part.forward < 1.1 * whole.forward


def test_iteration_parts_follow_turns_guidance_and_checkpointing() -> None:
    unit = NetworkFlops(forward=1.0, backward=2.0, recomputation=1.0)
    passes = METHODS["codmd"].passes(recipe_config("wan_1_3b"))
    parts = iteration_flops(unit, unit, passes, is_guided=True, checkpointing=True)
    # 2.5 + 4 forward units for the critic, (1.5 + 4 + 3) / 5 for the student.
    assert sum(parts.values()) == pytest.approx(8.2)
    plain = iteration_flops(unit, unit, passes, is_guided=False, checkpointing=False)
    assert sum(plain.values()) == pytest.approx(8.2 - 1.2 - 0.2)
    assert plain["recomputation"] == plain["derivative"] == 0.0
