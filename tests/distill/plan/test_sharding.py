"""Weights that FSDP2 assembles on one of eight ranks, against the plan; the other seven are faked."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from codmd_serve.wan.attention import use_compact_cross_attention
from distill.config import DistillConfig, with_overrides
from distill.networks.build import denoiser
from distill.networks.precision import keep_sensitive_parts_float32
from distill.parallel.processes import Processes
from distill.parallel.sharding import shard
from distill.plan.architecture import Subject, count_parameters, read_architecture
from distill.plan.memory import copy_bytes
from distill.plan.options import PlanOptions

NUM_RANKS = 8
# Weights outweigh the activations of one token by far.
NETWORK = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 256,
    "num_layers": 6,
}

LINEAR = (
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ffn.net.0.proj",
    "ffn.net.2",
)


@pytest.fixture
def _ranks() -> Iterator[None]:
    distributed.init_process_group("fake", rank=0, world_size=NUM_RANKS, store=FakeStore())
    yield
    distributed.destroy_process_group()


def sharded(precision: str) -> WanTransformer3DModel:
    network = use_compact_cross_attention(WanTransformer3DModel(**NETWORK)).eval()
    keep_sensitive_parts_float32(network)
    network.enable_gradient_checkpointing()
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    shard(network, Processes(world_size=NUM_RANKS, mesh=mesh), precision)
    return network


def shards(network: nn.Module) -> list[Tensor]:
    return [parameter.to_local() for parameter in network.parameters()]  # type: ignore[operator]


@pytest.mark.usefixtures("_ranks")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gathered_weights_are_what_fsdp2_holds(tiny_config: DistillConfig, live_bytes: Any, precision: str) -> None:
    config = with_overrides(tiny_config, [f"precision={precision}", f"teacher_dtype={precision}"])
    counts, architecture = count_parameters(NETWORK), read_architecture(NETWORK)
    subject = Subject(config=config, architecture=architecture, parameters=counts, latents=(4, 1, 2, 2))
    network = sharded(precision)
    inputs = (torch.randn(1, 4, 1, 2, 2), torch.full((1,), 500.0), torch.randn(1, 8, 16))
    denoise: Callable[..., Tensor] = denoiser(network, precision)
    options = PlanOptions(gpus=NUM_RANKS)
    with live_bytes(*shards(network), *network.buffers(), *inputs) as live:
        with torch.no_grad():
            denoise(*inputs)
        wanted = copy_bytes(subject, options, "student", is_backward=False)
        assert live.peak == pytest.approx(wanted, rel=0.15)

        loss = denoise(*inputs).square().mean()
        live.peak = live.current
        loss.backward()
    # The worst moment comes late, when nearly all gradients are there.
    gradients = 4 * counts.total // NUM_RANKS
    wanted = copy_bytes(subject, options, "student", is_backward=True) + gradients
    assert live.peak == pytest.approx(wanted, rel=0.15)


@pytest.mark.usefixtures("_ranks")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_gather_what_their_precision_computes_with(precision: str) -> None:
    """Linear layers in bfloat16 where autocast would make that of them; what has to stay float32 stays."""
    network, seen = sharded(precision), {}
    network.disable_gradient_checkpointing()
    block = network.blocks[1]

    def note(*_: object) -> None:
        seen.update({name: item.dtype for name, item in block.named_parameters() if not isinstance(item, DTensor)})

    block.attn1.to_out[0].register_forward_hook(note)
    denoiser(network, precision)(torch.randn(1, 4, 1, 2, 2), torch.full((1,), 500.0), torch.randn(1, 8, 16))
    linear = {f"{name}.{part}" for name in LINEAR for part in ("weight", "bias")}
    assert linear < seen.keys() == {name for name, _ in block.named_parameters()}
    narrow = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {seen[name] for name in linear} == {narrow}
    assert {seen[name] for name in seen.keys() - linear} == {torch.float32}
    assert {item.dtype for item in network.parameters()} == {torch.float32}
