"""Closed forms against torch's own counter on the real network, and on the real steps of the trainer."""

from collections.abc import Callable

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from distill.config import DistillConfig, wan_1_3b, wan_14b
from distill.data.prompts import Batch
from distill.methods.matching import critic_step, draw_step, student_step
from distill.networks.build import Networks, denoiser
from distill.plan.architecture import Architecture, read_architecture, read_subject
from distill.plan.flops import NetworkFlops, Sequence, iteration_flops, network_flops

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


def test_iteration_equals_the_counter_on_the_trainers_steps(
    tiny_networks: Networks, tiny_config: DistillConfig
) -> None:
    """Every exit step once: their mean is what the plan counts."""
    shape, prompt_tokens = (3, 4, 3, 4, 4), 8
    rng = torch.Generator().manual_seed(2)
    embeds = torch.randn(2, 3, prompt_tokens, 16, generator=rng)
    batch = Batch(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
    num_steps = len(tiny_config.grid().timesteps)
    totals = {"student": 0.0, "critic": 0.0}
    for exit_step in range(num_steps):
        for role, step in (("student", student_step), ("critic", critic_step)):
            draws = draw_step(tiny_config, rng, shape, exit_step, CPU)
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                step(tiny_networks, batch, draws, tiny_config).loss.backward()
            totals[role] += counter.get_total_flops() / num_steps
    tokens = Sequence(tokens=12, context_tokens=12, prompt_tokens=prompt_tokens)
    network = network_flops(read_architecture(tiny_networks.student.config), tokens)
    parts = iteration_flops(
        network,
        network,
        num_steps=num_steps,
        student_every_steps=tiny_config.student_every_steps,
        is_guided=True,
        checkpointing=False,
    )
    counted_mean = totals["critic"] + totals["student"] / tiny_config.student_every_steps
    assert counted_mean == pytest.approx(3 * sum(parts.values()), rel=0.01)


@pytest.mark.parametrize(("recipe", "teraflops"), [(wan_1_3b, 283.0), (wan_14b, 1678.0)])
def test_published_sizes_cost_what_the_counter_found(recipe: Callable[[], DistillConfig], teraflops: float) -> None:
    """FlopCounterMode on the full diffusers modules: 283.0 and 1,678 TFLOP for 32,760 tokens."""
    subject = read_subject(recipe())
    sequence = Sequence(tokens=32_760, context_tokens=32_760, prompt_tokens=512)
    assert network_flops(subject.architecture, sequence).forward == pytest.approx(teraflops * 1e12, rel=1e-3)


def test_context_parallel_shares_the_work_of_a_sample(architecture: Architecture) -> None:
    whole = network_flops(architecture, Sequence(tokens=192, context_tokens=192, prompt_tokens=16))
    part = network_flops(architecture, Sequence(tokens=48, context_tokens=192, prompt_tokens=16))
    # What is done for the prompt is done on every GPU.
    assert whole.forward < 4 * part.forward < 1.1 * whole.forward


def test_iteration_parts_follow_turns_guidance_and_checkpointing() -> None:
    unit = NetworkFlops(forward=1.0, backward=2.0, recomputation=1.0)
    parts = iteration_flops(unit, unit, num_steps=4, student_every_steps=5, is_guided=True, checkpointing=True)
    # 2.5 + 4 forward units for the critic, (1.5 + 4 + 3) / 5 for the student.
    assert sum(parts.values()) == pytest.approx(8.2)
    plain = iteration_flops(unit, unit, num_steps=4, student_every_steps=5, is_guided=False, checkpointing=False)
    assert sum(plain.values()) == pytest.approx(8.2 - 1.2 - 0.2)
    assert plain["recomputation"] == 0.0
