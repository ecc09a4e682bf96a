"""FSDP2 for Wan transformers: one group per block, weights read by the first process and sent to the others as shards.

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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
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
    """Load a transformer as shards, without any other process than the first ever holding the whole.

    Args:
        load: gives the transformer on the CPU; called in the first process only.
        prepare: changes a transformer in place before it is sharded.
        architecture: its config.
        processes: more than one.
        precision: fp32 or bf16, in which it will be called; see `shard`.

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
    shard(transformer, processes, precision)
    transformer.to_empty(device=processes.device)
    with torch.no_grad():
        fill(transformer, {} if whole is None else dict(whole.named_parameters()), processes)
        for name, buffer in transformer.named_buffers():
            if whole is not None:
                buffer.copy_(whole.get_buffer(name))
            dist.broadcast(buffer, src=0)
    return transformer


def shard(transformer: WanTransformer3DModel, processes: Processes, precision: str) -> None:
    """Shard the parameters of a transformer in place, over all processes, one group per block and one for the rest.

    Parameters keep their dtype. In fp32 they are gathered in it. In bf16 the linear layers of blocks are gathered in
    bfloat16: what autocast, which rules mixed precision here as in one process, would make of them, in half the memory
    and traffic. Their gradients are summed up in float32. Tables of modulation, norms and all layers around the blocks
    are gathered as they are. Gradients are means over processes.

    Args:
        transformer: changed in place; on the meta device too.
        processes: more than one.
        precision: fp32 or bf16, in which the transformer will be called.
    """
    # Also after a forward pass without gradient: a teacher has no backward pass that would free its weights.
    options: dict[str, Any] = {"mesh": processes.mesh, "reshard_after_forward": True}
    is_narrow = precision == "bf16"
    for block in transformer.blocks:
        linear = {item for part in block.modules() if isinstance(part, nn.Linear) for item in part.parameters()}
        fully_shard(block, ignored_params=linear if is_narrow else None, **options)
        if is_narrow:
            _shard_linear_layers(block, set(block.parameters()) - linear, options)
    # FSDP2 warns of outputs that are views, since its hooks do not survive in-place changes of those.
    transformer.register_forward_hook(lambda _module, _args, output: tuple(item.clone() for item in output))
    fully_shard(transformer, **options)
    if is_narrow:
        # By itself FSDP2 fetches one group ahead, which would be the small one of the next block.
        for earlier, block in itertools.pairwise(transformer.blocks):
            block.attn1.set_modules_to_backward_prefetch([earlier, earlier.attn1])


def _shard_linear_layers(block: nn.Module, others: set[nn.Parameter], options: Mapping[str, Any]) -> None:
    # A group of their own: a group's gradients are summed up in one buffer, of one dtype. Inputs are not cast: the
    # residual stream and the modulation are float32, and autocast casts where it should.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # What these parts return is a view of a product, and a Wan block changes none of it in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    parts = [block.get_submodule(name) for name in ("attn1", "attn2", "ffn")]
    fully_shard(parts, mp_policy=policy, ignored_params=others, **options)


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
    """Return a copy of an optimizer's `state_dict` of whole tensors, moments sharded as the parameters they belong to.

    A copy, since the tensors can be mapped from a checkpoint file, which must not be held open until it is deleted.
    """
    by_index = list(parameters)

    def entry(index: int, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        like = by_index[index]
        return sharded_like(value, like) if name != "step" and isinstance(like, DTensor) else value.clone()

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
        transformers: changed in place.
        config: context_parallel.
        processes: all of them.

    Source: diffusers, ModelMixin.enable_parallelism and the plan of WanTransformer3DModel.
    """
    degree = config.context_parallel
    # Ulysses: attention is computed over all tokens and a share of the heads. A ring would need kernels that return
    # the logarithm of the softmax's denominator, and torch's own does not.
    names = ("data", "ring", "ulysses")
    mesh = init_device_mesh(processes.device.type, (processes.num_data, 1, degree), mesh_dim_names=names)
    with _countable_devices():
        for transformer in transformers:
            transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree, mesh=mesh))


@contextmanager
def _countable_devices() -> Iterator[None]:
    """Let diffusers number this process's device on a machine without accelerators, where it divides by their count."""
    count = torch.accelerator.device_count
    if not count():
        torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count
