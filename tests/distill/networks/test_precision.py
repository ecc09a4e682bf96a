"""Precision of a run, and attention of its networks in bfloat16 on a CPU."""

import copy

import torch

from distill.config import DistillConfig, with_overrides
from distill.networks.base import open_base
from distill.networks.build import build_networks, denoiser
from distill.networks.precision import resolve_precision

CPU = torch.device("cpu")


def test_bf16_attention_on_a_cpu_is_unfused_and_no_less_accurate(tiny_config: DistillConfig) -> None:
    chosen = build_networks(with_overrides(tiny_config, ["precision=bf16"]), open_base(tiny_config.base), CPU).student
    # Networks built beside it keep torch's own choice.
    exact = build_networks(with_overrides(tiny_config, ["precision=fp32"]), open_base(tiny_config.base), CPU).student
    fused = copy.deepcopy(exact)
    rng = torch.Generator().manual_seed(0)
    latents, prompts = torch.randn(3, 4, 3, 4, 4, generator=rng), torch.randn(3, 8, 16, generator=rng)
    timestep = torch.tensor([900.0, 500.0, 20.0])
    results, is_fused = [], []
    for network, precision in ((chosen, "bf16"), (fused, "bf16"), (exact, "fp32")):
        with torch.profiler.profile(acc_events=True) as profile:
            flow = denoiser(network, precision)(latents, timestep, prompts)
            flow.float().square().sum().backward()
        gradients = [parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None]
        results.append(torch.cat([flow.detach().flatten(), *gradients]))
        is_fused.append(any("flash_attention" in event.key for event in profile.key_averages()))
    assert is_fused == [False, True, True]
    errors = [float((result - results[2]).norm() / results[2].norm()) for result in results[:2]]
    assert errors[0] < 1.5 * errors[1] < 0.15


def test_precision_is_resolved_once() -> None:
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    assert resolve_precision("auto", CPU) == ("bf16" if has_bf16 else "fp32")


def test_a_bf16_residual_stream_has_a_stated_error(tiny_config: DistillConfig) -> None:
    """Rounding the stream between blocks costs most of what float32 norms and projections gained."""
    layouts = ([], ["residual_dtype=fp32"], ["residual_dtype=bf16"])
    configs = [with_overrides(tiny_config, ["precision=bf16" if own else "precision=fp32", *own]) for own in layouts]
    networks = [build_networks(config, open_base(config.base), CPU).student for config in configs]
    rng = torch.Generator().manual_seed(0)
    latents, prompts = torch.randn(3, 4, 3, 4, 4, generator=rng), torch.randn(3, 8, 16, generator=rng)
    timestep = torch.tensor([900.0, 500.0, 20.0])
    streams: list[torch.dtype] = []
    for network in networks:
        network.blocks[1].register_forward_pre_hook(lambda _block, args: streams.append(args[0].dtype))
    with torch.no_grad():
        exact, wide, narrow = (
            denoiser(network, config.precision)(latents, timestep, prompts)
            for network, config in zip(networks, configs, strict=True)
        )
        # Outside of autocast nothing is rounded: rcm takes its derivative there.
        torch.testing.assert_close(denoiser(networks[2], "fp32")(latents, timestep, prompts), exact)
    assert streams == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    assert narrow.dtype == torch.float32
    errors = [float((flow - exact).norm() / exact.norm()) for flow in (wide, narrow)]
    assert errors[0] < errors[1] < 0.02
