"""Reads published Wan weights; recognises and refuses them by their keys, never by their file names.

Knows nothing of bundles or sampling.

Legend: a naming is how the tensors are called. `original` are the names of the Wan2.1 repository, `diffusers` those of
WanTransformer3DModel, `lora` are low-rank updates and differences under either.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codmd_serve.errors import CheckpointError
from codmd_serve.textfiles import shown
from codmd_serve.wan.statements import LORA_KEY, Statement, statement_of
from codmd_serve.wan.tensorfiles import EXPECTED, Stored, read_stored

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What FSDP, activation checkpointing and torch.compile put into the middle of a name.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# First words of Wan's parameter names, in both namings; what stands before them was put there by a trainer or a tool.
ROOTS = (
    "blocks",
    "patch_embedding",
    "text_embedding",
    "time_embedding",
    "time_projection",
    "head",
    "condition_embedder",
    "proj_out",
    "scale_shift_table",
)
UNDERSCORED = re.compile(r"^lora_[a-z]+_(?=(" + "|".join(ROOTS) + r")(_|\.|$))")
BLOCK = re.compile(r"(^|[._])blocks[._]\d+[._]")
# Networks that training keeps beside the student.
HELPERS = ("critic", "fake_score", "real_score", "teacher", "discriminator", "optimizer")
EMA = re.compile(r"(^|_)ema(_|$)")
MAX_DEPTH = 6
CAUSAL = (
    "it is causal (autoregressive): it needs a pipeline with a key-value cache that makes one group of frames after "
    "the other, and would make broken videos here; convert a bidirectional checkpoint"
)
IMAGE_TO_VIDEO = "it is an image-to-video model; only text to video is served: convert a T2V release"
REFUSED_KEYS = (
    (r"causal", CAUSAL),
    (
        r"dora_scale|lora_magnitude|hada_w|lokr_w|oft_|boft_",
        "it is a DoRA, LoHa, LoKr or OFT update, which is no plain up @ down: merge it with the tool that made it, as "
        "`merge_and_unload` of PEFT or ComfyUI's ModelSave do, then convert the result",
    ),
    (
        r"(^|\.)to_gate_compress\.",
        "it was trained with VSA, a sparse attention (to_gate_compress): with full attention it is another model; "
        "convert a full-attention one, for example a FastWan FullAttn folder",
    ),
    (
        r"(^|\.)(proj_l|local_attn)\.",
        "it was trained with SLA, a sparse linear attention (TurboDiffusion): with full attention it is another model; "
        "convert the rCM checkpoint that it was made from",
    ),
    (
        r"int8_weight|(^|[._])(weight_scale(_2)?|scale_weight|scale_input|input_scale|scales?|qweight|qzeros|absmax"
        r"|scaled_fp8)$",
        "it is quantised: rounded weights cannot be turned back; convert the bfloat16 or float32 release",
    ),
    (r"(^|[._])(k_img|v_img|img_emb|add_k_proj|add_v_proj|image_embedder)[._]", IMAGE_TO_VIDEO),
    (
        r"vace_|motion_encoder|face_adapter|pose_patch_embedding|control_adapter",
        "it is a controlled model (VACE, Animate or the like); only text to video is served: convert a T2V release",
    ),
)
# Channels that the first convolution of Wan's image-to-video networks reads: latents, a mask and the image's latents.
IMAGE_CHANNELS = (20, 36)
PATCH_VALUES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Published weights on the CPU, with their family.

    Attributes:
        family: how they are published: generator, generator_ema, rcm, original, diffusers or lora.
        naming: original, diffusers or lora.
        weights: by name, wrapper and prefix taken off; any floating dtype.
        config: config.json beside the weights; empty where there is none.
        statements: what stands beside an update's tensors about its strength.
        part: the container or prefix that they were under; empty for none.
        left_out: other parts that hold tensors.
        is_ema: they were under a name that says so.
        says_attention: something beside the weights tells causal from bidirectional ones, and it is not causal.
    """

    family: str
    naming: str
    weights: dict[str, Tensor]
    config: Mapping[str, Any]
    statements: tuple[Statement, ...] = ()
    part: str = ""
    left_out: tuple[str, ...] = ()
    is_ema: bool = False
    says_attention: bool = False


@dataclass(frozen=True, slots=True)
class _Part:
    """The tensors under one container and prefix, by plain name."""

    name: str
    weights: dict[str, Tensor] = field(repr=False)

    @property
    def naming(self) -> str | None:
        """Return the naming of the tensors; None when they are no Wan network and no update of one."""
        lora = [match["part"] for match in map(LORA_KEY.fullmatch, self.weights) if match]
        if any(part.startswith(("lora_A", "lora_B", "lora_d", "lora_u", "lora.", "diff")) for part in lora):
            return "lora"
        if "patch_embedding.weight" in self.weights:
            if "head.modulation" in self.weights:
                return "original"
            if any(name.startswith("condition_embedder.") for name in self.weights):
                return "diffusers"
        return None

    @property
    def words(self) -> list[str]:
        return self.name.split(".")

    @property
    def is_ema(self) -> bool:
        return any(EMA.search(word) for word in self.words)

    @property
    def is_helper(self) -> bool:
        return any(word.startswith(HELPERS) for word in self.words)


def read_published(path: Path, key: str | None = None) -> Published:
    """Read a published checkpoint and tell its family from its keys.

    Args:
        path: a .pt or .safetensors file under any name, a folder of them, or a diffusers pipeline folder.
        key: which of several networks, by the name of its container or prefix, for example ema; None is the only
            student, a moving average before raw weights.

    Raises:
        CheckpointError: not there, truncated, holding pickled objects, of no known family, holding several students,
            or of a family that cannot be served here (causal, sparse attention, quantised, image to video); the
            message says what to do.
    """
    stored = read_stored(path)
    said = _refuse_settings(path, stored)
    parts = list(_parts(stored.state))
    chosen = _choose(path, stored.state, parts, key)
    weights = chosen.weights
    if any(BLOCK.search(name) for name in weights):
        _refuse(path, weights)
    naming = chosen.naming
    assert naming is not None
    others = tuple(sorted({part.words[0] or "other tensors" for part in parts if part is not chosen}))
    return Published(
        family=_family(chosen, naming),
        naming=naming,
        weights=weights,
        config=stored.config,
        statements=(*stored.statements, *_nested_statements(stored.state, str(path))) if naming == "lora" else (),
        part=chosen.name,
        left_out=others,
        is_ema=chosen.is_ema,
        says_attention=said or "_class_name" in stored.config,
    )


def plain_name(key: str) -> tuple[str | None, str]:
    """Split a tensor's name into the prefix of trainers and tools, and its name in the network.

    Returns:
        The prefix, or None where no parameter of Wan has such a name, and the rest without wrappers.
    """
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    match = UNDERSCORED.match(key)
    if match:
        return match[0], key[match.end() :]
    words = key.split(".")
    start = next((index for index, word in enumerate(words) if word in ROOTS), None)
    if start is None:
        return None, key
    return "".join(f"{word}." for word in words[:start]), ".".join(words[start:])


def _parts(state: Mapping[Any, Any], path: tuple[str, ...] = ()) -> Iterator[_Part]:
    """Yield every group of tensors in a state, by container and prefix."""
    flat = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    # Transformer Engine keeps scaling factors of its own beside the weights; they say nothing in other precisions.
    split = {key: plain_name(key) for key in flat if not key.endswith("_extra_state")}
    prefixes = {prefix for prefix, _ in split.values() if prefix is not None}
    groups: dict[str, dict[str, Tensor]] = {}
    for key, (prefix, plain) in split.items():
        if prefix is None:
            # A name that is not Wan's belongs to the network under whose prefix it stands.
            prefix = max((known for known in prefixes if plain.startswith(known)), key=len, default="")
            plain = plain.removeprefix(prefix)
        groups.setdefault(prefix, {})[plain] = flat[key]
    for prefix, weights in groups.items():
        words = re.sub(r"^lora_[a-z]+_$", "", prefix).strip(".")
        yield _Part(".".join((*path, words)) if words else ".".join(path), weights)
    if len(path) < MAX_DEPTH:
        for key, value in state.items():
            if isinstance(value, Mapping):
                yield from _parts(value, (*path, str(key)))


def _choose(path: Path, state: Mapping[Any, Any], parts: list[_Part], key: str | None) -> _Part:
    found = [part for part in parts if part.naming is not None]
    names = ", ".join(sorted(shown(part.name or "the file itself") for part in found))
    if key is not None:
        chosen = [part for part in found if f".{key}." in f".{part.name}."]
        if len(chosen) != 1:
            raise CheckpointError(
                f"{path} holds {len(chosen)} Wan networks under --key {shown(key)}; it holds: {names or 'none'}"
            )
        return chosen[0]
    if not found:
        for part in parts:
            if any(BLOCK.search(name) for name in part.weights):
                _refuse(path, part.weights)
        tensors = sorted(name for part in parts for name in part.weights)
        keys = ", ".join(shown(name).strip("'") for name in (tensors or sorted(map(str, state)))[:3]) or "nothing"
        raise CheckpointError(f"{path} holds no Wan weights of a known family: {EXPECTED}; got {keys}")
    students = [part for part in found if not part.is_helper]
    if not students:
        raise CheckpointError(f"{path} holds no student, only {names}; --key NAME takes one of them all the same")
    averages = [part for part in students if part.is_ema]
    chosen = averages or students
    if len(chosen) != 1:
        raise CheckpointError(f"{path} holds {len(chosen)} networks: {names}; say which with --key")
    return chosen[0]


def _family(part: _Part, naming: str) -> str:
    if naming == "lora":
        return "lora"
    if part.weights["patch_embedding.weight"].ndim == 2:
        return "rcm"
    container = next((word for word in part.words if word in ("generator_ema", "generator")), None)
    return container or naming


def _refuse(path: Path, weights: Mapping[str, Tensor]) -> None:
    for pattern, reason in REFUSED_KEYS:
        name = next((name for name in weights if re.search(pattern, name)), None)
        if name is not None:
            raise CheckpointError(f"{path} cannot be served ({name}): {reason}")
    for name, tensor in weights.items():
        match = LORA_KEY.fullmatch(name)
        if tensor.dtype not in FLOAT_DTYPES and not (match and match["part"].endswith(("alpha", "rank"))):
            dtype = str(tensor.dtype).removeprefix("torch.")
            what = "it has twice the digits of any release" if dtype == "float64" else "it is quantised, or no network"
            raise CheckpointError(
                f"{path} cannot be served ({name} is {dtype}): {what}; convert a float32, bfloat16 or float16 release"
            )
    patch = weights.get("patch_embedding.weight")
    if patch is not None and patch.ndim > 1 and patch[0].numel() in [PATCH_VALUES * n for n in IMAGE_CHANNELS]:
        channels = patch[0].numel() // PATCH_VALUES
        raise CheckpointError(
            f"{path} cannot be served (patch_embedding.weight reads {channels} channels): {IMAGE_TO_VIDEO}"
        )


def _refuse_settings(path: Path, stored: Stored) -> bool:
    """Refuse causal and image-to-video settings; return whether any setting says that the network is not causal.

    Causality does not show in the names of Wan's tensors, so settings that say it are looked for everywhere else.
    """
    says_not = False
    for settings in (stored.config, stored.header, *_nested_settings(stored.state)):
        for key in ("causal", "is_causal"):
            value = settings.get(key)
            if value is True or str(value).lower() in ("true", "1"):
                raise CheckpointError(f"{path} cannot be served: {CAUSAL}")
            says_not = says_not or (value is False or str(value).lower() in ("false", "0"))
        if "causal" in str(settings.get("_class_name", "")).lower():
            raise CheckpointError(f"{path} cannot be served: {CAUSAL}")
        kind = str(settings.get("model_type", "")).lower()
        if kind in ("i2v", "flf2v") or settings.get("image_dim") is not None:
            raise CheckpointError(f"{path} cannot be served (its config.json says so): {IMAGE_TO_VIDEO}")
    return says_not


def _nested_settings(state: Mapping[Any, Any], depth: int = 0) -> Iterator[Mapping[Any, Any]]:
    yield state
    if depth < MAX_DEPTH:
        for value in state.values():
            if isinstance(value, Mapping):
                yield from _nested_settings(value, depth + 1)


def _nested_statements(state: Mapping[Any, Any], source: str) -> list[Statement]:
    """Return the LoRA settings in a torch file, as {"lora_config": {"r": 16, "lora_alpha": 8}}."""
    found = []
    for settings in _nested_settings(state):
        if "lora_alpha" in settings and not isinstance(settings["lora_alpha"], Tensor):
            found.append(statement_of("its own settings", settings, source))
    return [statement for statement in found if statement is not None]
