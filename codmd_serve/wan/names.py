"""Wan's two namings and its low-rank updates: published weights become the weights of WanTransformer3DModel.

Knows neither files nor bundles.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor

from codmd_serve.errors import CheckpointError
from codmd_serve.files import first_line
from codmd_serve.wan.published import LORA_PARTS, Published

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
    """Name published weights as WanTransformer3DModel does: all of them, and nothing else.

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


def merge_lora(published: Published, base: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Add a low-rank update to the weights it was made for.

    diffusers' own loader reads the names and folds alpha into the factors. Whole differences (`.diff`, `.diff_b`) are
    added here and not there: diffusers drops those of norms and ignores most others, so that its result would be
    another network than the published one.

    Args:
        published: of naming lora; every tensor in it has to find its place.
        base: weights by diffusers name, any floating dtype.
        source: what messages call the file.

    Returns:
        base + up @ down (+ differences), summed in float32, then in the dtypes of `base`.

    Raises:
        CheckpointError: names that diffusers' loader does not know, or shapes that are not those of the base.

    Source: LoRA (arXiv 2106.09685), equation 3, with scale 1.
    """
    pairs, differences = {}, {}
    for key, tensor in published.weights.items():
        if key.endswith((".diff", ".diff_b")):
            differences[key] = tensor
        else:
            pairs[_loader_name(key)] = tensor
    factors = _read_factors(pairs, source)
    originals = {original_name(name): name for name in base}
    merged = dict(base)
    for module, (down, up) in factors.items():
        if not (down.ndim == up.ndim == 2 and up.shape[1] == down.shape[0]):
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise CheckpointError(
                f"{source} has halves of {module} that do not fit each other: {shapes}; fetch it again"
            )
        _add(merged, f"{module}.weight", up @ down, source)
    for key, tensor in differences.items():
        module, _, kind = key.removeprefix("diffusion_model.").rpartition(".")
        name = f"{module}.bias" if kind == "diff_b" else f"{module}.weight"
        # A whole difference of a table stands alone, without a leaf.
        target = originals.get(name) or originals.get(module)
        _add(merged, target or name, tensor, source)
    return merged


def _loader_name(key: str) -> str:
    """Bring variations that mean the same to what diffusers' loader expects."""
    key = key.replace(".default.weight", ".weight").removeprefix("base_model.model.")
    if re.match(r"blocks\.\d+\.(self_attn|cross_attn|ffn\.[02])\.|(text_embedding|time_embedding|time_proj|head)", key):
        return "diffusion_model." + key
    if key.startswith(("blocks.", "condition_embedder.", "proj_out.")):
        return "transformer." + key
    return key


def _read_factors(pairs: Mapping[str, Tensor], source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (down, up) of every module, by its diffusers name."""
    try:
        # Copies, because the loader scales some of them in place; float32, so that it rounds none.
        converted = WanPipeline.lora_state_dict(
            {key: tensor.to(torch.float32, copy=True) for key, tensor in pairs.items()}
        )
    except (ValueError, KeyError, IndexError, UnboundLocalError) as error:
        raise CheckpointError(f"{source} is no Wan LoRA that diffusers reads: {first_line(error)}") from error
    factors = {}
    for key, down in converted.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            up = converted.get(f"{module}.lora_B.weight")
            if up is None:
                raise CheckpointError(f"{source} has half of an update: {module} has lora_A and no lora_B")
            factors[module.removeprefix("transformer.")] = (down, up)
    given = sum(LORA_PARTS.search(key) is not None for key in pairs)
    if 2 * len(factors) != given or len(converted) != given:
        raise CheckpointError(
            f"{source} has {given} low-rank tensors of which diffusers' loader reads {2 * len(factors)}: "
            "it has names that are not Wan's, or halves of updates"
        )
    return factors


def _add(weights: dict[str, Tensor], name: str, change: Tensor, source: str) -> None:
    old = weights.get(name)
    if old is None:
        raise CheckpointError(f"{source} updates {name}, which the base does not have: is it of another model?")
    if change.shape != old.shape:
        raise CheckpointError(
            f"{source} does not fit its base: {name} is {tuple(old.shape)}, its update {tuple(change.shape)}; "
            "name the diffusers folder of the model it was made for with --base"
        )
    weights[name] = (old.float() + change.float()).to(old.dtype)


def check_config(config: Mapping[str, Any], base: Mapping[str, Any], source: str) -> None:
    """Refuse a config.json that says other than the base what no shape shows: heads, their width, the norms' epsilon.

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
