"""Loading and calling the three networks: exact guidance, mixed precision close to float32, moving average."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from codmd_serve.errors import CheckpointError, ConfigError
from distill.config import DistillConfig, EmaConfig, NativeConfig, with_overrides
from distill.networks.build import (
    Ema,
    Networks,
    build_networks,
    compile_blocks,
    denoiser,
    ema_decay,
    guided_teacher_flow,
    latent_shape,
    load_transformer,
    resolve_base,
    resolve_precision,
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
    stock = load_transformer(tiny_config.base, torch.float32).eval()
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


def test_compiling_without_a_compiler_says_so(tiny_networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no-such-compiler is not there; install it or leave --compile out"):
        compile_blocks(tiny_networks.student)


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
    networks = build_networks(config, CPU)
    assert networks.teacher.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert networks.student.blocks[0].ffn.net[2].weight.dtype == torch.float32
    latents, timestep, prompts, _ = inputs()
    with torch.no_grad():
        got = denoiser(networks.teacher, "bf16")(latents, timestep, prompts)
        want = denoiser(networks.student, "fp32")(latents, timestep, prompts)
    assert float((got - want).norm() / want.norm()) < 0.02


def test_bf16_attention_on_a_cpu_is_unfused_and_no_less_accurate(tiny_config: DistillConfig) -> None:
    chosen = build_networks(with_overrides(tiny_config, ["precision=bf16"]), CPU).student
    # Networks built beside it keep torch's own choice.
    exact = build_networks(with_overrides(tiny_config, ["precision=fp32"]), CPU).student
    fused = copy.deepcopy(exact)
    latents, timestep, prompts, _ = inputs()
    results, is_fused = [], []
    for network, precision in ((chosen, "bf16"), (fused, "bf16"), (exact, "fp32")):
        with torch.profiler.profile() as profile:
            flow = denoiser(network, precision)(latents, timestep, prompts)
            flow.float().square().sum().backward()
        gradients = [parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None]
        results.append(torch.cat([flow.detach().flatten(), *gradients]))
        is_fused.append(any("flash_attention" in event.key for event in profile.key_averages()))
    assert is_fused == [False, True, True]
    errors = [float((result - results[2]).norm() / results[2].norm()) for result in results[:2]]
    assert errors[0] < 1.5 * errors[1] < 0.15


def test_latent_shape_follows_vae_and_patches(tiny_base: Path) -> None:
    native = NativeConfig(height=32, width=48, num_frames=9, fps=16)
    assert latent_shape(str(tiny_base), native, 4, (1, 2, 2)) == (4, 3, 4, 6)


@pytest.mark.parametrize(
    ("size", "named"), [((40, 32, 9), "height"), ((32, 24, 9), "width"), ((32, 32, 10), "num_frames")]
)
def test_latent_shape_refuses_sizes_off_the_grid(tiny_base: Path, size: tuple[int, int, int], named: str) -> None:
    native = NativeConfig(height=size[0], width=size[1], num_frames=size[2], fps=16)
    with pytest.raises(ConfigError, match=named):
        latent_shape(str(tiny_base), native, 4, (1, 2, 2))


@pytest.mark.parametrize("base", ["nowhere", "/nowhere/at/all", "weights/nothing-of-that-name", "a/b/c"])
def test_missing_base_is_refused_without_asking_a_hub(base: str) -> None:
    with pytest.raises(CheckpointError, match="no pipeline"):
        resolve_base(base)


def test_bundled_base_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = tmp_path / "somewhere" / "shapeworld"
    bundled.mkdir(parents=True)
    monkeypatch.setattr("distill.networks.build.default_bundle_path", lambda: bundled.parent / "shapeworld-codmd")
    monkeypatch.chdir(tmp_path)
    assert resolve_base("weights/shapeworld") == (str(bundled), True)


def test_truncated_weights_are_a_checkpoint_error(tiny_base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_base, broken)
    (weights,) = (broken / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"transformer of .* cannot be loaded"):
        load_transformer(str(broken), torch.float32)
    shutil.rmtree(broken / "transformer")
    with pytest.raises(CheckpointError, match="no transformer/ folder"):
        load_transformer(str(broken), torch.float32)


def test_precision_is_resolved_once() -> None:
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    assert resolve_precision("auto", CPU) == ("bf16" if has_bf16 else "fp32")


def test_ema_copies_before_its_start_and_averages_after() -> None:
    network = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    ema = Ema(network, EmaConfig(decay=0.75, start_update=1))
    for value in (4.0, 8.0, 0.0):
        nn.init.constant_(network.weight, value)
        ema.update(network)
    # copy 4, then 4 + (8 - 4) / 4 = 5, then 5 + (0 - 5) / 4 = 3.75
    assert float(ema.shadow["weight"]) == 3.75
    assert ema.shadow["weight"].dtype == torch.float32
    again = Ema(network, EmaConfig(decay=0.75))
    again.load_state_dict(ema.state_dict())
    assert float(again.shadow["weight"]) == 3.75
    assert again.num_updates == 3


@pytest.mark.parametrize(("length", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_power_ema_has_the_published_exponent(length: float, exponent: float) -> None:
    config = EmaConfig(decay=0.0, kind="power", length=length)
    assert ema_decay(config, 1) == 0.0  # the first update is copied
    assert ema_decay(config, 10) == pytest.approx(0.9 ** (exponent + 1), rel=2e-3)


def test_power_ema_weighs_a_fixed_share_of_all_updates() -> None:
    """After n updates their weights have the standard deviation length * n, early in a run and late."""
    config = EmaConfig(decay=0.0, kind="power", length=0.1)
    weights: list[float] = []
    for update in range(1, 2001):
        kept = ema_decay(config, update)
        weights = [kept * weight for weight in weights] + [1.0 - kept]
        if update in (400, 2000):
            assert sum(weights) == pytest.approx(1.0)
            mean = sum(index * weight for index, weight in enumerate(weights, 1))
            variance = sum((index - mean) ** 2 * weight for index, weight in enumerate(weights, 1))
            assert variance**0.5 / update == pytest.approx(0.1, rel=0.02)


def test_power_ema_counts_from_its_start() -> None:
    late = EmaConfig(decay=0.0, kind="power", length=0.1, start_update=5)
    early = EmaConfig(decay=0.0, kind="power", length=0.1)
    assert [ema_decay(late, update) for update in range(1, 6)] == [0.0] * 5
    assert ema_decay(late, 8) == ema_decay(early, 3)


def test_ema_of_another_network_is_refused() -> None:
    state = Ema(nn.Linear(1, 1), EmaConfig(decay=0.5)).state_dict()
    with pytest.raises(CheckpointError, match="another network"):
        Ema(nn.Linear(1, 1, bias=False), EmaConfig(decay=0.5)).load_state_dict(state)
