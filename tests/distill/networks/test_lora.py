"""A critic on the teacher's weights: starts equal, trains its adapters alone, and never changes the teacher."""

import pytest
import torch
from runs import with_method

from distill.config import DistillConfig, with_overrides
from distill.networks.base import open_base
from distill.networks.build import Networks, build_networks, denoiser, trained_parameters
from distill.networks.lora import ADAPTED, AdaptedCritic, diffusers_lora, merged_weights

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_config: DistillConfig) -> DistillConfig:
    return with_overrides(tiny_config, ["lora_critic_rank=2", "lora_critic_alpha=4"])


def flow(networks: Networks, name: str, with_grad: bool = False) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    latents, prompts = torch.randn(2, 4, 3, 4, 4, generator=rng), torch.randn(2, 8, 16, generator=rng)
    with torch.set_grad_enabled(with_grad):
        return denoiser(getattr(networks, name), "fp32")(latents, torch.tensor([900.0, 200.0]), prompts)


def move(networks: Networks) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(networks.critic).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)


def test_critic_starts_as_the_teacher_and_shares_its_weights(config: DistillConfig) -> None:
    networks = build_networks(config, open_base(config.base), CPU)
    assert isinstance(networks.critic, AdaptedCritic)
    assert networks.critic.base is networks.teacher
    assert len(networks.transformers()) == 2
    assert torch.equal(flow(networks, "critic"), flow(networks, "teacher"))


def test_adapters_change_the_critic_as_merged_weights_would_and_leave_the_teacher(config: DistillConfig) -> None:
    networks = build_networks(config, open_base(config.base), CPU)
    before = flow(networks, "teacher")
    move(networks)
    adapted = flow(networks, "critic")
    assert torch.equal(flow(networks, "teacher"), before)
    assert float((adapted - before).norm() / before.norm()) > 1e-3
    with torch.no_grad():
        for block in networks.teacher.blocks:
            for name in ADAPTED:
                linear = block.get_submodule(name)
                linear.weight += 4 / 2 * linear.lora_up @ linear.lora_down
    torch.testing.assert_close(flow(networks, "teacher"), adapted, rtol=1e-4, atol=1e-5)


def test_only_adapters_train_and_are_few(config: DistillConfig) -> None:
    networks = build_networks(config, open_base(config.base), CPU)
    trained = trained_parameters(networks.critic)
    assert {name.rpartition(".")[2] for name in trained} == {"lora_down", "lora_up"}
    assert len(trained) == 2 * len(ADAPTED) * len(networks.teacher.blocks)
    linears = [module for module in networks.teacher.blocks.modules() if isinstance(module, torch.nn.Linear)]
    # Every linear layer of the blocks, as `codmd-distill plan` counts them.
    assert sum(item.numel() for item in trained.values()) == 2 * sum(
        linear.in_features + linear.out_features for linear in linears
    )
    flow(networks, "critic", with_grad=True).square().mean().backward()
    assert all(item.grad is not None for item in trained.values())
    frozen = [item for name, item in networks.teacher.named_parameters() if "lora" not in name]
    assert frozen and all(item.grad is None and not item.requires_grad for item in frozen)


def test_blocks_computed_again_have_their_adapters_on(config: DistillConfig) -> None:
    """The backward pass comes after the critic's call has switched them off."""
    gradients = []
    for checkpointing in ("false", "true"):
        changed = with_overrides(config, [f"activation_checkpointing={checkpointing}"])
        networks = build_networks(changed, open_base(config.base), CPU)
        assert networks.teacher.is_gradient_checkpointing is (checkpointing == "true")
        move(networks)
        flow(networks, "critic", with_grad=True).square().mean().backward()
        gradients.append({name: item.grad for name, item in trained_parameters(networks.critic).items()})
    for name, want in gradients[0].items():
        assert want is not None
        assert float(want.abs().sum()) > 0
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-5, atol=1e-8, msg=name)


def test_checkpointed_student_keeps_less_and_has_the_same_gradient(tiny_config: DistillConfig) -> None:
    kept, gradients = [], []
    for checkpointing in ("false", "true"):
        changed = with_overrides(tiny_config, [f"activation_checkpointing={checkpointing}"])
        networks = build_networks(changed, open_base(tiny_config.base), CPU)
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = flow(networks, "student", with_grad=True)
        kept.append(sum(sizes))
        output.square().mean().backward()
        gradients.append({name: item.grad for name, item in networks.student.named_parameters()})
    assert kept[1] < 0.5 * kept[0]
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-5, atol=1e-8, msg=name)


@pytest.fixture
def student_config(tiny_config: DistillConfig) -> DistillConfig:
    return with_overrides(tiny_config, ["lora_student_rank=2", "lora_student_alpha=4"])


def test_a_lora_student_starts_as_the_base(student_config: DistillConfig) -> None:
    networks = build_networks(student_config, open_base(student_config.base), CPU)
    assert networks.student is not networks.teacher
    assert torch.equal(flow(networks, "student"), flow(networks, "teacher"))


def test_the_adapters_of_a_lora_student_are_always_on_and_merge_into_its_weights(student_config: DistillConfig) -> None:
    base = open_base(student_config.base)
    networks = build_networks(student_config, base, CPU)
    before = flow(networks, "student")
    rng = torch.Generator().manual_seed(1)
    adapters = trained_parameters(networks.student)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    running = flow(networks, "student")
    assert float((running - before).norm() / before.norm()) > 1e-3
    assert torch.equal(flow(networks, "teacher"), before)
    weights = merged_weights(base.load_transformer(torch.float32), adapters, 4 / 2)
    networks.teacher.load_state_dict(dict(weights))
    torch.testing.assert_close(flow(networks, "teacher"), running, rtol=1e-4, atol=1e-5)


def test_student_and_critic_have_adapters_of_their_own(student_config: DistillConfig) -> None:
    config = with_overrides(student_config, ["lora_critic_rank=2"])
    networks = build_networks(config, open_base(config.base), CPU)
    own, critics = trained_parameters(networks.student), trained_parameters(networks.critic)
    assert {f"base.{name}" for name in own} == critics.keys()
    down = next(name for name in own if name.endswith("lora_down"))
    assert not torch.equal(own[down], critics[f"base.{down}"])


@pytest.mark.parametrize(("method", "dtype"), [("codmd", torch.bfloat16), ("rcm", torch.float32)])
def test_frozen_weights_under_a_student_have_the_teachers_dtype_unless_it_is_derived_in_float32(
    student_config: DistillConfig, method: str, dtype: torch.dtype
) -> None:
    config = with_overrides(with_method(student_config, method), ["precision=bf16", "teacher_dtype=bf16"])
    student = build_networks(config, open_base(config.base), CPU).student
    assert student.blocks[0].ffn.net[2].weight.dtype == dtype
    assert {parameter.dtype for parameter in trained_parameters(student).values()} == {torch.float32}


def test_diffusers_names_hold_the_whole_scale() -> None:
    adapters = {"blocks.0.attn1.to_q.lora_down": torch.ones(2, 3), "blocks.0.attn1.to_q.lora_up": torch.ones(5, 2)}
    named = diffusers_lora(adapters, 2.0)
    assert named.keys() == {f"transformer.blocks.0.attn1.to_q.lora_{half}.weight" for half in "AB"}
    product = (
        named["transformer.blocks.0.attn1.to_q.lora_B.weight"] @ named["transformer.blocks.0.attn1.to_q.lora_A.weight"]
    )
    assert torch.equal(product, torch.full((5, 3), 4.0))
