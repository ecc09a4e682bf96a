"""FSDP2 and context parallelism of Wan transformers; rank 0 reads the weights and scatters them as shards.

Knows neither losses nor the training loop.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig
from distill.parallel.processes import Processes


def load_sharded(
    load: Callable[[], WanTransformer3DModel],
    prepare: Callable[[WanTransformer3DModel], object],
    architecture: Mapping[str, Any],
    processes: Processes,
    precision: str,
) -> WanTransformer3DModel:
    """Load a transformer as shards; no rank but rank 0 ever holds all of its weights.

    Args:
        load: returns the transformer on the CPU; called on rank 0 only.
        prepare: changes a transformer in place before it is sharded.
        architecture: its config.
        processes: more than one.
        precision: fp32 or bf16, in which it will be called; see `shard`.

    Returns:
        The transformer on `processes.device`, parameters as DTensors on `processes.mesh`.

    Raises:
        CodmdError: what `load` raised, on all ranks.
    """
    whole = processes.on_rank0(load)
    if whole is not None:
        prepare(whole)
    told = [None if whole is None else {name: item.dtype for name, item in whole.named_parameters()}]
    dist.broadcast_object_list(told, src=0)
    dtypes = told[0] or {}
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(architecture)
    prepare(transformer)
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    shard(transformer, processes, precision)
    transformer.to_empty(device=processes.device)
    with torch.no_grad():
        scatter_parameters(transformer, {} if whole is None else dict(whole.named_parameters()), processes)
        for name, buffer in transformer.named_buffers():
            if whole is not None:
                buffer.copy_(whole.get_buffer(name))
            dist.broadcast(buffer, src=0)
    return transformer


def shard(transformer: WanTransformer3DModel, processes: Processes, precision: str) -> None:
    """Shard the parameters of a transformer in place over `processes.mesh`: an FSDP group per block, one for the rest.

    Parameters keep their dtype. With precision fp32 they are all-gathered in it. With bf16 the linear layers of blocks
    are all-gathered in bfloat16, to which autocast would cast them anyway: half the memory and traffic. Their gradients
    are reduced in float32. Modulation tables, norms and the layers around the blocks are all-gathered in their own
    dtype. Gradients are means over ranks.

    Args:
        transformer: changed in place; on the meta device too.
        processes: more than one.
        precision: fp32 or bf16, in which the transformer will be called.
    """
    # The teacher has no backward pass that would free its gathered weights, so every forward pass reshards.
    options: dict[str, Any] = {"mesh": processes.mesh, "reshard_after_forward": True}
    is_narrow = precision == "bf16"
    for block in transformer.blocks:
        linear = {item for part in block.modules() if isinstance(part, nn.Linear) for item in part.parameters()}
        fully_shard(block, ignored_params=linear if is_narrow else None, **options)
        if is_narrow:
            _shard_linear_layers(block, set(block.parameters()) - linear, options)
    # FSDP2 warns about outputs that are views, because in-place changes of a view would drop its hooks.
    transformer.register_forward_hook(lambda _module, _args, output: tuple(item.clone() for item in output))
    fully_shard(transformer, **options)
    if is_narrow:
        # FSDP2 prefetches one group by default, which would be the small one of the next block.
        for earlier, block in itertools.pairwise(transformer.blocks):
            block.attn1.set_modules_to_backward_prefetch([earlier, earlier.attn1])


def _shard_linear_layers(block: nn.Module, others: set[nn.Parameter], options: Mapping[str, Any]) -> None:
    # A group of their own, because a group reduces its gradients in one buffer of one dtype. Inputs are not cast: the
    # residual stream and the modulation are float32, and autocast casts what it should.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # These modules return views, and a Wan block changes none of them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    parts = [block.get_submodule(name) for name in ("attn1", "attn2", "ffn")]
    fully_shard(parts, mp_policy=policy, ignored_params=others, **options)


def set_gradient_sync(network: nn.Module, gradient_sync: str, *, is_last: bool) -> None:
    """Choose whether the next backward of a network reduces its gradients over the ranks; for one rank do nothing.

    Args:
        network: changed in place.
        gradient_sync: "each" reduces within a replica after every micro-batch; replicas add up their shards and meet in
            the last. "last" reduces nothing before the last micro-batch: each rank keeps whole float32 gradients.
        is_last: the next backward is that of the update's last micro-batch.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(is_last or gradient_sync == "each", recurse=False)
            module.set_requires_all_reduce(is_last, recurse=False)


def scatter_parameters(module: nn.Module, whole: Mapping[str, Tensor], processes: Processes) -> None:
    """Set the sharded parameters of a module to whole tensors by name; only rank 0 needs to have them."""
    for name, parameter in module.named_parameters():
        if processes.is_rank0:
            source = whole[name].detach().to(processes.device, parameter.dtype)
        else:
            source = torch.empty(parameter.shape, dtype=parameter.dtype, device=processes.device)
        assert isinstance(parameter, DTensor)
        shards = distribute_tensor(source, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(shards.to_local())


def check_token_split(config: DistillConfig, num_heads: int, num_tokens: int) -> None:
    """Check that the tokens of one video can be split over context_parallel processes.

    Args:
        config: context_parallel.
        num_heads: of the network's attention.
        num_tokens: latent patches of one video.

    Raises:
        ConfigError: they cannot; the message names the key.
    """
    degree = config.context_parallel
    if num_tokens % degree:
        raise ConfigError(f"context_parallel must divide the {num_tokens} tokens of a video, got {degree}")
    if num_heads % degree:
        raise ConfigError(f"context_parallel must divide the {num_heads} attention heads, got {degree}")


def split_tokens(transformers: Iterable[WanTransformer3DModel], config: DistillConfig, processes: Processes) -> None:
    """Make groups of `context_parallel` ranks split the tokens of their samples in every call.

    Inputs and outputs of the networks stay whole. After a backward pass each rank holds the part of the gradient that
    comes from its own tokens, so the gradient is the sum over a group; see `Trainer`.

    Args:
        transformers: changed in place.
        config: context_parallel.
        processes: all of them.

    Source: diffusers, ModelMixin.enable_parallelism and the plan of WanTransformer3DModel.
    """
    degree = config.context_parallel
    # Ulysses: each rank attends over all tokens with a part of the heads. A ring would need kernels that return the
    # log-sum-exp of the softmax, and torch's own does not.
    names = ("data", "ring", "ulysses")
    mesh = init_device_mesh(processes.device.type, (processes.data_parallel, 1, degree), mesh_dim_names=names)
    with _countable_devices():
        for transformer in transformers:
            transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree, mesh=mesh))


@contextmanager
def _countable_devices() -> Iterator[None]:
    """Make diffusers work without accelerators: it takes the rank modulo their count, which is 0 on a CPU machine."""
    count = torch.accelerator.device_count
    if not count():
        torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count
