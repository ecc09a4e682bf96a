"""Building and calling the three networks: exact guidance, mixed precision close to float32."""

import copy
import shutil

import pytest
import torch
from torch import nn

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig, with_overrides
from distill.networks.base import open_base
from distill.networks.build import (
    Networks,
    build_networks,
    check_compiler,
    compile_blocks,
    denoiser,
    guided_teacher_flow,
)

CPU = torch.device("cpu")


def inputs(batch_size: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(batch_size, 4, 3, 4, 4, generator=rng)
    prompts = torch.randn(2, batch_size, 8, 16, generator=rng)
    prompts[:, :, 5:] = 0
    return latents, torch.tensor([900.0, 500.0, 20.0])[:batch_size], prompts[0], prompts[1]


def test_networks_start_equal_and_only_student_and_critic_train(tiny_networks: Networks) -> None:
    for name, parameter in tiny_networks.teacher.named_parameters():
        assert not parameter.requires_grad
        for network in (tiny_networks.student, tiny_networks.critic):
            other = network.get_parameter(name)
            assert other.requires_grad
            assert other is not parameter
            assert torch.equal(other, parameter)


def test_loaded_network_equals_stock_on_padded_prompts(tiny_networks: Networks, tiny_config: DistillConfig) -> None:
    """Compact cross-attention and the float32 parts change nothing without autocast."""
    stock = open_base(tiny_config.base).load_transformer(torch.float32).eval()
    latents, timestep, prompts, _ = inputs()
    with torch.no_grad():
        padded = nn.functional.pad(prompts, (0, 0, 0, 504))
        want = stock(latents, timestep, padded, return_dict=False)[0]
        got = denoiser(tiny_networks.teacher, "fp32")(latents, timestep, prompts)
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore")  # torch warns of its own when its compiler is imported and traces
def test_compiled_blocks_compute_and_train_the_same(tiny_networks: Networks) -> None:
    eager = copy.deepcopy(tiny_networks.student)
    compiled = compile_blocks(tiny_networks.student)
    assert [name for name, _ in compiled.named_parameters()] == [name for name, _ in eager.named_parameters()]
    latents, timestep, prompts, _ = inputs()
    flows = []
    for network in (eager, compiled):
        flow = denoiser(network, "fp32")(latents, timestep, prompts)
        flow.square().mean().backward()
        flows.append(flow.detach())
    torch.testing.assert_close(flows[1], flows[0], rtol=1e-5, atol=1e-5)
    for (name, want), (_, got) in zip(eager.named_parameters(), compiled.named_parameters(), strict=True):
        assert want.grad is not None
        assert got.grad is not None
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_compiling_without_a_compiler_says_so() -> None:
    with pytest.raises(ConfigError, match=r"no-such-compiler is not there; install it or leave --compile out"):
        check_compiler("no-such-compiler", CPU)
    check_compiler("no-such-compiler", torch.device("cuda"))


def test_guided_flow_in_one_call_equals_two(tiny_networks: Networks) -> None:
    latents, timestep, prompts, negative = inputs()
    denoise = denoiser(tiny_networks.teacher, "fp32")
    got = guided_teacher_flow(denoise, latents, timestep, prompts, negative, 3.0)
    uncond = denoise(latents, timestep, negative)
    torch.testing.assert_close(got, uncond + 3.0 * (denoise(latents, timestep, prompts) - uncond))
    alone = guided_teacher_flow(denoise, latents, timestep, prompts, negative, 1.0)
    torch.testing.assert_close(alone, denoise(latents, timestep, prompts))


def test_bf16_flow_is_float32_and_close(tiny_networks: Networks) -> None:
    latents, timestep, prompts, _ = inputs()
    with torch.no_grad():
        want = denoiser(tiny_networks.student, "fp32")(latents, timestep, prompts)
        got = denoiser(tiny_networks.student, "bf16")(latents, timestep, prompts)
    assert got.dtype == torch.float32
    assert float((got - want).norm() / want.norm()) < 0.01


def test_bf16_call_after_a_call_without_gradient_still_trains(tiny_networks: Networks) -> None:
    """Autocast caches cast weights; those cast under no_grad must not reach the call that carries gradient."""
    latents, timestep, prompts, _ = inputs()
    denoise = denoiser(tiny_networks.student, "bf16")
    with torch.no_grad():
        denoise(latents, timestep, prompts)
    denoise(latents, timestep, prompts).square().mean().backward()
    weight = tiny_networks.student.blocks[0].ffn.net[2].weight
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0


def test_bf16_teacher_keeps_its_weights_in_bf16(tiny_config: DistillConfig) -> None:
    config = with_overrides(tiny_config, ["teacher_dtype=bf16", "precision=bf16"])
    networks = build_networks(config, open_base(config.base), CPU)
    assert networks.teacher.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert networks.student.blocks[0].ffn.net[2].weight.dtype == torch.float32
    latents, timestep, prompts, _ = inputs()
    with torch.no_grad():
        got = denoiser(networks.teacher, "bf16")(latents, timestep, prompts)
        want = denoiser(networks.student, "fp32")(latents, timestep, prompts)
    assert float((got - want).norm() / want.norm()) < 0.02
