"""FSDP2 for Wan transformers: one group per block, weights read by the first process and sent to the others as shards.

Knows neither losses nor the training loop.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig
from distill.processes import Processes


def load_sharded(
    load: Callable[[], WanTransformer3DModel],
    prepare: Callable[[WanTransformer3DModel], object],
    architecture: Mapping[str, Any],
    processes: Processes,
) -> WanTransformer3DModel:
    """Load a transformer as shards, without any other process than the first ever holding the whole.

    Args:
        load: gives the transformer on the CPU; called in the first process only.
        prepare: changes a transformer in place before it is sharded.
        architecture: its config.
        processes: more than one.

    Returns:
        The transformer on `processes.device`, parameters as DTensors sharded over all processes.

    Raises:
        CodmdError: what `load` raised, in all processes.
    """
    whole = processes.first_does(load)
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
    shard(transformer, processes)
    transformer.to_empty(device=processes.device)
    with torch.no_grad():
        fill(transformer, {} if whole is None else dict(whole.named_parameters()), processes)
        for name, buffer in transformer.named_buffers():
            if whole is not None:
                buffer.copy_(whole.get_buffer(name))
            dist.broadcast(buffer, src=0)
    return transformer


def shard(transformer: WanTransformer3DModel, processes: Processes) -> None:
    """Shard the parameters of a transformer in place, over all processes, one group per block and one for the rest.

    Parameters keep their dtype and are gathered in it: mixed precision is autocast's, as in one process. Gradients
    are means over processes.
    """
    # Also after a forward pass without gradient: a teacher has no backward pass that would free its weights.
    for block in transformer.blocks:
        fully_shard(block, mesh=processes.mesh, reshard_after_forward=True)
    # FSDP2 warns of outputs that are views, since its hooks do not survive in-place changes of those.
    transformer.register_forward_hook(lambda _module, _args, output: tuple(item.clone() for item in output))
    fully_shard(transformer, mesh=processes.mesh, reshard_after_forward=True)


def fill(module: nn.Module, whole: Mapping[str, Tensor], processes: Processes) -> None:
    """Set the sharded parameters of a module to whole tensors by name, which only the first process has to have."""
    for name, parameter in module.named_parameters():
        if processes.is_first:
            source = whole[name].detach().to(processes.device, parameter.dtype)
        else:
            source = torch.empty(parameter.shape, dtype=parameter.dtype, device=processes.device)
        assert isinstance(parameter, DTensor)
        shards = distribute_tensor(source, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(shards.to_local())


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return the tensor as it is, or as shards where `like` is sharded; every process has to have the whole."""
    if not isinstance(like, DTensor):
        return whole
    source = whole.to(like.device)
    # A copy: shards can be views, which would keep the whole in memory.
    return distribute_tensor(source, like.device_mesh, like.placements, src_data_rank=None).clone()


def shard_optimizer_state(state: dict[str, Any], parameters: Iterable[Tensor]) -> dict[str, Any]:
    """Return an optimizer's `state_dict` of whole tensors with moments sharded like the parameters they belong to."""
    by_index = list(parameters)

    def entry(index: int, name: str, value: Any) -> Any:
        is_moment = isinstance(value, Tensor) and name != "step"
        return sharded_like(value, by_index[index]) if is_moment else value

    moments = {
        index: {name: entry(index, name, value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}


def check_tokens(config: DistillConfig, num_heads: int, num_tokens: int) -> None:
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
    """Let groups of `context_parallel` processes split the tokens of their samples in every call.

    The networks' inputs and outputs stay whole. In the backward pass every process has the gradient of its own tokens'
    share, in all parameters, so the gradient is the sum over a group; see `Trainer`.

    Args:
        transformers: changed in place; on CUDA.
        config: context_parallel.
        processes: all of them.

    Source: diffusers, ModelMixin.enable_parallelism and the plan of WanTransformer3DModel.
    """
    degree = config.context_parallel
    # Ulysses: attention is computed over all tokens and a share of the heads. A ring would need kernels that return
    # the logarithm of the softmax's denominator, and torch's own does not.
    names = ("data", "ring", "ulysses")
    mesh = init_device_mesh(processes.device.type, (processes.num_data, 1, degree), mesh_dim_names=names)
    for transformer in transformers:
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree, mesh=mesh))
