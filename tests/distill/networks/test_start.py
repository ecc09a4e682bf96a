"""Student and critic that start from other weights than the base's, each read as `convert` reads it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from codmd_serve.errors import CheckpointError, ConfigError
from distill.config import DistillConfig, with_overrides
from distill.networks.base import open_base
from distill.networks.build import Networks, build_networks

CPU = torch.device("cpu")
NAME = "blocks.0.ffn.net.2.weight"


@pytest.fixture
def trained(tiny_config: DistillConfig) -> dict[str, torch.Tensor]:
    """Weights of a student that was trained before: none equals the base's."""
    transformer = open_base(tiny_config.base).load_transformer(torch.float32)
    return {name: tensor + 0.25 for name, tensor in transformer.state_dict().items()}


def start(config: DistillConfig, *settings: str) -> Networks:
    config = with_overrides(config, list(settings))
    return build_networks(config, open_base(config.base), CPU)


def equals(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_the_student_starts_from_a_file_and_teacher_and_critic_do_not(
    tiny_config: DistillConfig, trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(trained, tmp_path / "student.safetensors")
    networks = start(tiny_config, f"student_from={tmp_path / 'student.safetensors'}")
    assert equals(networks.student, trained)
    base = open_base(tiny_config.base).load_transformer(torch.float32).state_dict()
    assert equals(networks.teacher, base)
    assert equals(networks.critic, base)  # type: ignore[arg-type]
    assert all(parameter.requires_grad for parameter in networks.student.parameters())


def test_the_critic_starts_from_a_bundle_in_half_precision_and_trains_in_float32(
    tiny_config: DistillConfig, trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    transformer = open_base(tiny_config.base).load_transformer(torch.float32)
    transformer.load_state_dict(trained)
    transformer.half().save_pretrained(tmp_path / "bundle" / "transformer")
    critic = start(tiny_config, f"critic_from={tmp_path / 'bundle'}").critic
    assert equals(critic, {name: tensor.half().float() for name, tensor in trained.items()})  # type: ignore[arg-type]


def test_a_lora_is_added_to_the_base(tiny_config: DistillConfig, tmp_path: Path) -> None:
    base = open_base(tiny_config.base).load_transformer(torch.float32).state_dict()
    rows, columns = base[NAME].shape
    down, up = torch.randn(2, columns), torch.randn(rows, 2)
    module = NAME.removesuffix(".weight")
    save_file(
        {
            f"transformer.{module}.lora_A.weight": down,
            f"transformer.{module}.lora_B.weight": up,
            f"transformer.{module}.alpha": torch.tensor(1.0),
        },
        tmp_path / "lora.safetensors",
    )
    student = start(tiny_config, f"student_from={tmp_path / 'lora.safetensors'}").student
    assert torch.allclose(student.state_dict()[NAME], base[NAME] + 0.5 * up @ down, atol=1e-5)


def test_a_source_that_cannot_be_started_from_names_its_setting(
    tiny_config: DistillConfig, trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"student_from: there is no file or folder .*nothing"):
        start(tiny_config, f"student_from={tmp_path / 'nothing'}")
    trained[NAME] = trained[NAME][:, :-1].contiguous()
    save_file(trained, tmp_path / "narrow.safetensors")
    with pytest.raises(CheckpointError, match=r"critic_from: .*narrow"):
        start(tiny_config, f"critic_from={tmp_path / 'narrow.safetensors'}")
    with pytest.raises(ConfigError, match="critic_from needs lora_critic_rank 0"):
        with_overrides(tiny_config, ["critic_from=x", "lora_critic_rank=4"])
