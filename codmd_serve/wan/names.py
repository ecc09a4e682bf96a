"""Maps the two parameter namings of Wan: published weights to WanTransformer3DModel and back.

Knows neither files nor bundles.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from codmd_serve.errors import CheckpointError
from codmd_serve.wan.published import Published

# Original name of each module that diffusers calls differently; all others have the same name in both. diffusers knows
# this too, but offers it only inside from_single_file, which drops what it does not know and leaves out what is missing
# without an error. The tests hold this table against it.
MODULES = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
BLOCK_MODULES = {
    **{
        f"{ours}.{diffusers}": f"{theirs}.{original}"
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for diffusers, original in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    },
    **{
        f"{ours}.{norm}": f"{theirs}.{norm}"
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for norm in ("norm_q", "norm_k")
    },
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}


def original_name(name: str) -> str:
    """Return the original Wan name of a parameter of WanTransformer3DModel."""
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    prefix, rest = (block[1], block[2]) if block else ("", name)
    table = BLOCK_MODULES if block else MODULES
    if rest in table:
        return prefix + table[rest]
    module, _, leaf = rest.rpartition(".")
    return f"{prefix}{table.get(module, module)}.{leaf}"


def to_diffusers(published: Published, wanted: Mapping[str, torch.Size], source: str) -> dict[str, Tensor]:
    """Rename published weights as in WanTransformer3DModel; refuse missing and unknown ones.

    Args:
        published: of naming original or diffusers.
        wanted: shape of every parameter of the network of the base, by diffusers name.
        source: what messages call the checkpoint.

    Returns:
        One finite tensor for every name of `wanted`, of that shape, in the dtype it was published in.

    Raises:
        CheckpointError: another architecture than the base, names missing or left over, values that are not finite.
    """
    is_original = published.naming == "original"
    theirs = {name: original_name(name) if is_original else name for name in wanted}
    weights = published.weights
    _check_architecture(weights, {theirs[name]: shape for name, shape in wanted.items()}, source)
    renamed = {}
    for name, shape in wanted.items():
        tensor = weights[theirs[name]]
        # rCM's patch embedding is a linear layer on flattened patches; its features come in the order of the kernel
        # (channel, frame, row, column), so the same numbers are a convolution.
        if name == "patch_embedding.weight" and tensor.ndim == 2 and tensor.numel() == shape.numel():
            tensor = tensor.reshape(shape)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{source} does not fit its base: {theirs[name]} is {tuple(tensor.shape)}, the base has {tuple(shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{source} holds values that are not finite, in {theirs[name]}: it is of no use")
        renamed[name] = tensor.contiguous()
    return renamed


def _check_architecture(weights: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], source: str) -> None:
    found = {name: tensor.shape for name, tensor in weights.items()}
    theirs, ours = _architecture(found), _architecture(wanted)
    if theirs != ours:
        raise CheckpointError(
            f"{source} is another network than its base: it has {theirs}, the base {ours}; "
            "name the diffusers folder of the model it was distilled from with --base"
        )
    for problem, names in (("lacks", wanted.keys() - found.keys()), ("has unknown", found.keys() - wanted.keys())):
        if names:
            raise CheckpointError(
                f"{source} {problem} {len(names)} of {len(wanted)} tensors, the first is {min(names)}; "
                "is it complete, and a plain Wan text-to-video network?"
            )


def _architecture(shapes: Mapping[str, torch.Size]) -> str:
    patch = shapes.get("patch_embedding.weight", torch.Size([0]))
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return f"{len(blocks)} blocks of width {patch[0]} and patches of {patch[1:].numel()} numbers"


def check_config(config: Mapping[str, Any], base: Mapping[str, Any], source: str) -> None:
    """Refuse a config.json that differs from the base in what shapes do not show: heads, head width, epsilon.

    Args:
        config: of the checkpoint, in diffusers' or the original words; empty when there is none.
        base: of the base's transformer, in diffusers' words.
        source: what messages call the checkpoint.

    Raises:
        CheckpointError: names the first setting that differs.
    """
    words = {"num_attention_heads": ("num_attention_heads", "num_heads"), "eps": ("eps",)}
    for ours, names in words.items():
        for name in names:
            if name in config and config[name] != base.get(ours, config[name]):
                raise CheckpointError(
                    f"{source} is another network than its base: {name} is {config[name]}, the base has {base[ours]}"
                )
