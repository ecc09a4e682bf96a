"""A teacher of another architecture than the base: found, compared with the base, and called by every method."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from runs import with_method
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.wan.checkpoint import StudentSpec, save_bundle
from codmd_serve.wan.names import original_name
from distill.config import DistillConfig, with_overrides
from distill.data.packing import add_files
from distill.networks.base import open_base
from distill.networks.build import Networks, build_networks
from distill.networks.lora import AdaptedCritic
from distill.networks.teacher import Teacher, check_teacher, open_teacher, teacher_name
from distill.run.bundle import student_spec
from distill.run.checks import native_latents

CPU = torch.device("cpu")


def of_teacher(config: DistillConfig, teacher: Path | str, *settings: str) -> DistillConfig:
    return with_overrides(config, [f"teacher={teacher}", *settings])


def checked(config: DistillConfig, teacher: Path | str, *settings: str) -> Teacher:
    return check_teacher(of_teacher(config, teacher, *settings), open_base(config.base))


def networks(config: DistillConfig) -> Networks:
    return build_networks(config, open_base(config.base), CPU)


def transformer_of(folder: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", local_files_only=True)


def assert_same(network: torch.nn.Module, wanted: torch.nn.Module) -> None:
    weights = wanted.state_dict()
    assert network.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


@pytest.fixture
def copied(big_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the big teacher, to be changed."""
    return Path(shutil.copytree(big_teacher, tmp_path / "changed"))


def test_without_the_setting_the_base_is_the_teacher(tiny_config: DistillConfig, tiny_networks: Networks) -> None:
    base = open_base(tiny_config.base)
    teacher = check_teacher(tiny_config, base)
    assert (teacher.name, teacher.pipeline) == (base.name, base)
    assert_same(tiny_networks.teacher, transformer_of(Path(base.source)))


def test_student_and_critic_are_the_bases_and_the_teacher_its_own(
    tiny_config: DistillConfig, big_teacher: Path
) -> None:
    built = networks(of_teacher(tiny_config, big_teacher))
    assert_same(built.teacher, transformer_of(big_teacher))
    small = transformer_of(Path(tiny_config.base))
    assert_same(built.student, small)
    assert_same(built.critic, small)
    assert not any(parameter.requires_grad for parameter in built.teacher.parameters())


def test_a_lora_critic_is_of_the_teachers_architecture(tiny_config: DistillConfig, big_teacher: Path) -> None:
    built = networks(of_teacher(tiny_config, big_teacher, "lora_critic_rank=2"))
    assert isinstance(built.critic, AdaptedCritic)
    assert built.critic.base is built.teacher
    assert len(built.critic.base.blocks) == 3


@pytest.mark.parametrize("kind", ["bundle", "diffusers", "original"])
def test_a_bundle_or_a_file_brings_the_transformer_alone(
    kind: str, tiny_config: DistillConfig, big_teacher: Path, tiny_spec: StudentSpec, tmp_path: Path
) -> None:
    wanted = transformer_of(big_teacher)
    path = tmp_path / "big.safetensors"
    if kind == "bundle":
        path = tmp_path / "bundle"
        save_bundle(path, wanted, with_base(tiny_spec, big_teacher))
    else:
        rename = original_name if kind == "original" else str
        save_file({rename(name): tensor.contiguous() for name, tensor in wanted.state_dict().items()}, path)
    teacher = checked(tiny_config, path)
    assert teacher.name == path.name
    assert teacher.architecture["num_attention_heads"] == 4
    assert_same(networks(of_teacher(tiny_config, path)).teacher, wanted)
    assert teacher.files()


def with_base(spec: StudentSpec, base: Path) -> StudentSpec:
    return StudentSpec(**{name: getattr(spec, name) for name in StudentSpec.__dataclass_fields__} | {"base": str(base)})


def test_a_lora_file_is_no_teacher(tiny_config: DistillConfig, tmp_path: Path) -> None:
    module = "blocks.0.attn1.to_q"
    save_file(
        {f"{module}.lora_A.weight": torch.ones(1, 24), f"{module}.lora_B.weight": torch.ones(24, 1)},
        tmp_path / "lora.safetensors",
    )
    with pytest.raises(CheckpointError, match="whole network, got a file an update"):
        checked(tiny_config, tmp_path / "lora.safetensors")


def test_no_such_teacher_is_named(tiny_config: DistillConfig) -> None:
    with pytest.raises(CheckpointError, match="teacher: no pipeline at /no/where"):
        checked(tiny_config, "/no/where")


def test_latents_of_other_channels_are_refused(tiny_config: DistillConfig, copied: Path) -> None:
    config_file = copied / "transformer" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"in_channels": 16, "out_channels": 16}))
    with pytest.raises(
        ConfigError, match=r"changed has another latent space than base tiny: latents of 16 .* against 4"
    ):
        checked(tiny_config, copied)


def test_a_vae_of_another_size_is_refused(tiny_config: DistillConfig, copied: Path) -> None:
    config_file = copied / "vae" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"latents_std": [1.0, 1.0, 1.0, 1.0]}))
    with pytest.raises(ConfigError, match=r"another latent space than base tiny: latents_std of its VAE is .1.0"):
        checked(tiny_config, copied)


def test_a_vae_trained_anew_is_refused_and_one_rounded_to_half_precision_is_not(
    tiny_config: DistillConfig, copied: Path
) -> None:
    path = copied / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: tensor.half() for name, tensor in weights.items()}, path)
    checked(tiny_config, copied)
    save_file({**weights, "quant_conv.weight": weights["quant_conv.weight"] + 0.01}, path)
    with pytest.raises(ConfigError, match=r"VAEs are of one shape but trained apart .quant_conv.weight differs"):
        checked(tiny_config, copied)


def test_another_text_encoder_is_refused(tiny_config: DistillConfig, copied: Path) -> None:
    encoder = UMT5EncoderModel.from_pretrained(copied, subfolder="text_encoder", local_files_only=True)
    with torch.no_grad():
        encoder.encoder.block[1].layer[0].SelfAttention.q.weight.add_(0.01)
    encoder.save_pretrained(copied / "text_encoder")
    with pytest.raises(
        ConfigError, match="reads another text encoder than base tiny: they are of one shape but trained"
    ):
        checked(tiny_config, copied)
    config_file = copied / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"num_layers": 1}))
    with pytest.raises(ConfigError, match="another text encoder than base tiny: num_layers 1 against 2"):
        checked(tiny_config, copied)


def test_another_vocabulary_is_refused(tiny_config: DistillConfig, copied: Path) -> None:
    path = copied / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"circle"', '"square"'))
    with pytest.raises(ConfigError, match="another text encoder than base tiny: vocabularies"):
        checked(tiny_config, copied)


def test_heads_that_context_parallel_does_not_divide_are_refused(
    tiny_config: DistillConfig, big_teacher: Path, tmp_path: Path
) -> None:
    three = WanTransformer3DModel.from_config(dict(transformer_of(big_teacher).config) | {"num_attention_heads": 3})
    folder = Path(shutil.copytree(big_teacher, tmp_path / "three"))
    three.save_pretrained(folder / "transformer")
    checked(tiny_config, folder)
    with pytest.raises(ConfigError, match="teacher three: context_parallel must divide the 3 attention heads, got 2"):
        checked(tiny_config, folder, "context_parallel=2")


def test_the_run_is_refused_before_anything_is_trained(tiny_config: DistillConfig, copied: Path) -> None:
    (copied / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"vae of .*changed has no readable config"):
        native_latents(of_teacher(tiny_config, copied), open_base(tiny_config.base))


def test_the_bundle_names_the_teacher_and_the_bases_other_parts(
    tiny_config: DistillConfig, big_teacher: Path, tmp_path: Path
) -> None:
    config, base = of_teacher(tiny_config, big_teacher), open_base(tiny_config.base)
    spec = student_spec(tmp_path / "bundle", config, base, 3)
    assert spec.base_model == "big"
    assert (tmp_path / "bundle" / spec.base).resolve() == Path(base.source).resolve()
    assert (
        teacher_name(of_teacher(config, "Wan-AI/Wan2.1-T2V-14B-Diffusers"), base) == "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    )
    assert teacher_name(tiny_config, base) == "tiny"


def test_files_tell_two_teachers_apart(tiny_config: DistillConfig, big_teacher: Path) -> None:
    digests = []
    for setting in ("", str(big_teacher)):
        digest = hashlib.sha256()
        add_files(digest, open_teacher(of_teacher(tiny_config, setting), open_base(tiny_config.base)).files())
        digests.append(digest.hexdigest())
    assert digests[0] != digests[1]


def test_students_start_from_a_file_under_another_teacher(
    tiny_config: DistillConfig, big_teacher: Path, tmp_path: Path
) -> None:
    small = transformer_of(Path(tiny_config.base))
    trained = {name: tensor + 0.25 for name, tensor in small.state_dict().items()}
    save_file(trained, tmp_path / "student.safetensors")
    built = networks(
        of_teacher(with_method(tiny_config, "dmd"), big_teacher, f"student_from={tmp_path}/student.safetensors")
    )
    assert all(torch.equal(tensor, trained[name]) for name, tensor in built.student.state_dict().items())
    assert_same(built.critic, small)
    assert_same(built.teacher, transformer_of(big_teacher))
