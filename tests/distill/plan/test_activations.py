"""Closed forms of activations against what autograd keeps and what is alive, on the real network in eager mode."""

from collections.abc import Callable

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from distill.networks.build import denoiser
from distill.plan.activations import (
    backward_working_bytes,
    block_bytes,
    forward_working_bytes,
    head_bytes,
    input_bytes,
    rotation_bytes,
    saved_bytes,
)
from distill.plan.architecture import Architecture, count_parameters, read_architecture
from distill.plan.flops import Sequence

SAMPLES = 2
# Precision, and dtype of the residual stream.
LAYOUTS = [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")]
Inputs = tuple[Tensor, Tensor, Tensor]


def kept_bytes(network: WanTransformer3DModel, compute: Callable[[], Tensor]) -> int:
    """Sum of the distinct storages that autograd keeps for the backward of `compute`, parameters not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Held until the sum is taken, so that no address is used twice.
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compute()
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def weight_copies(network_config: dict, precision: str, checkpointing: bool) -> int:
    """bf16 casts that autocast makes of trained weights; checkpointed blocks make theirs again."""
    counts = count_parameters(network_config)
    if precision == "fp32":
        return 0
    blocks = network_config["num_layers"] * sum_of_linears(network_config) if checkpointing else 0
    return 2 * (counts.cast - blocks)


def sum_of_linears(network_config: dict) -> int:
    d, f = network_config["num_attention_heads"] * network_config["attention_head_dim"], network_config["ffn_dim"]
    return 8 * (d * d + d) + 2 * d * f + d + f


@pytest.mark.parametrize(("precision", "residual"), LAYOUTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_saved_bytes_are_what_autograd_keeps(
    build_network: Callable[..., WanTransformer3DModel],
    network_config: dict,
    architecture: Architecture,
    sequence: Sequence,
    inputs: Inputs,
    precision: str,
    residual: str,
    checkpointing: bool,
) -> None:
    network = build_network(network_config, residual)
    if checkpointing:
        network.enable_gradient_checkpointing()
    measured = kept_bytes(network, lambda: denoiser(network, precision)(*inputs))
    measured -= weight_copies(network_config, precision, checkpointing)
    wanted = SAMPLES * saved_bytes(architecture, sequence, precision, residual, checkpointing=checkpointing)
    # Checkpointing holds the tables of rotation too, but not by way of autograd.
    wanted += 0 if checkpointing else rotation_bytes(architecture, sequence)
    # Modulations, kept once per sample whatever its length, are not worth a term.
    assert measured == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(("precision", "residual"), LAYOUTS)
@pytest.mark.parametrize("ffn_dim", [48, 400])
def test_working_sets_are_what_is_alive_at_the_worst_moment(
    build_network: Callable[..., WanTransformer3DModel],
    network_config: dict,
    sequence: Sequence,
    inputs: Inputs,
    live_bytes: Callable,
    precision: str,
    residual: str,
    ffn_dim: int,
) -> None:
    """A narrow feed-forward puts the worst moment into attention, a wide one into GELU."""
    config = {**network_config, "ffn_dim": ffn_dim}
    architecture = read_architecture(config)
    network = build_network(config, residual)
    denoise = denoiser(network, precision)
    # Enough samples that what does not grow with them counts little.
    many = tuple(tensor.repeat(4, *[1] * (tensor.ndim - 1)) for tensor in inputs)
    num_samples = 4 * SAMPLES
    rotation = rotation_bytes(architecture, sequence)

    # Frozen, so that autocast makes no lasting copies of weights.
    network.requires_grad_(False)
    with torch.no_grad(), live_bytes(*network.parameters(), *network.buffers(), *many) as live:
        denoise(*many)
    wanted = num_samples * forward_working_bytes(architecture, sequence, precision, residual) + rotation
    assert live.peak == pytest.approx(wanted, rel=0.1)

    network.requires_grad_(True)
    network.enable_gradient_checkpointing()
    with live_bytes(*network.parameters(), *network.buffers(), *many) as live:
        loss = denoise(*many).square().mean()
        live.peak = live.current
        loss.backward()
    kept = saved_bytes(architecture, sequence, precision, residual, checkpointing=True)
    kept -= head_bytes(architecture, sequence)
    block = block_bytes(architecture, sequence, precision, residual) - input_bytes(architecture, sequence, residual)
    working = backward_working_bytes(architecture, sequence, precision, residual)
    assert live.peak == pytest.approx(num_samples * (kept + block + working) + rotation, rel=0.1)
