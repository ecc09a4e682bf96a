"""Published Wan weights as their authors store them: reads, recognises and refuses them by their keys, never by name.

Knows nothing of bundles or sampling.

Legend: a naming is how the tensors are called. `original` are the names of the Wan2.1 repository, `diffusers` those of
WanTransformer3DModel, `lora` are low-rank updates in any of the three namings that diffusers reads.
"""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from codmd_serve.errors import CheckpointError
from codmd_serve.files import first_line

EXPECTED = (
    "expected a CoDMD, CausVid or Self-Forcing .pt (generator, generator_ema), an rCM .pt (net.*), safetensors or a "
    ".pt with Wan's own names, a LoRA file, or a diffusers folder"
)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What FSDP, activation checkpointing and torch.compile put into the middle of a name.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# What trainers and other tools put before it; longer ones first, each is tried once.
PREFIXES = ("module.", "net.", "model.diffusion_model.", "diffusion_model.", "model.")
BLOCK = re.compile(r"(^|[._])blocks[._]\d+[._]")
LORA_PARTS = re.compile(r"\.lora_(A|B|down|up)\b")
CAUSAL = (
    "it is causal (autoregressive): it needs a pipeline with a key-value cache that makes one group of frames after "
    "the other, and would make broken videos here; convert a bidirectional checkpoint"
)
REFUSED = (
    (r"causal", CAUSAL),
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
        r"int8_weight|(^|[._])(weight_scale|scale_weight|scale_input|scales?|qweight|qzeros|absmax)$",
        "it is quantised: rounded weights cannot be turned back; convert the bfloat16 or float32 release",
    ),
    (
        r"(^|[._])(k_img|v_img|img_emb|add_k_proj|add_v_proj|image_embedder)[._]",
        "it is an image-to-video model; only text to video is served: convert a T2V release",
    ),
    (
        r"vace_|motion_encoder|face_adapter|pose_patch_embedding|control_adapter",
        "it is a controlled model (VACE, Animate or the like); only text to video is served: convert a T2V release",
    ),
    (
        r"dora_scale|lora_magnitude|hada_w|lokr_w",
        "it is a DoRA, LoHa or LoKr update, which diffusers' loader drops or cannot merge; merge it with the tool that "
        "made it, then convert the result",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Weights as found, on the CPU.

    Args:
        family: how they are published: generator, generator_ema, rcm, original, diffusers or lora.
        naming: original, diffusers or lora.
        weights: by name, wrapper and prefix taken off; any floating dtype.
        config: config.json beside the weights; empty where there is none.
    """

    family: str
    naming: str
    weights: dict[str, Tensor]
    config: Mapping[str, Any]


def read_published(path: Path) -> Published:
    """Read a published checkpoint and tell its family from its keys.

    Args:
        path: a .pt or .safetensors file under any name, a folder of safetensors, or a diffusers pipeline folder.

    Raises:
        CheckpointError: not there, truncated, holding pickled objects, of no known family, or of one that cannot be
            served here (causal, sparse attention, quantised, image to video); the message says what to do.
    """
    state, config = _read_folder(path) if path.is_dir() else (_read_file(path), {})
    _refuse_causal_settings(path, state, config)
    container = next((name for name in ("generator_ema", "generator") if isinstance(state.get(name), dict)), None)
    found = state if container is None else state[container]
    tensors = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
    # Transformer Engine keeps scaling factors of its own beside the weights; they say nothing in other precisions.
    weights = {_plain_name(key): tensor for key, tensor in tensors.items() if not key.endswith("_extra_state")}
    if any(BLOCK.search(name) for name in weights):
        _refuse(path, weights)
    naming = _naming(weights)
    if naming is None:
        keys = ", ".join(sorted(map(str, found))[:3]) or "nothing"
        raise CheckpointError(f"{path} holds no Wan weights of a known family: {EXPECTED}; got {keys}")
    return Published(family=_family(container, naming, weights), naming=naming, weights=weights, config=config)


def _naming(weights: Mapping[str, Tensor]) -> str | None:
    if any(LORA_PARTS.search(name) for name in weights):
        return "lora"
    if "patch_embedding.weight" in weights:
        if "head.modulation" in weights:
            return "original"
        if any(name.startswith("condition_embedder.") for name in weights):
            return "diffusers"
    return None


def _family(container: str | None, naming: str, weights: Mapping[str, Tensor]) -> str:
    if naming == "lora":
        return "lora"
    if weights["patch_embedding.weight"].ndim == 2:
        return "rcm"
    return container or naming


def _plain_name(key: str) -> str:
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    # LoRA names keep their prefix: diffusers tells the three namings apart by it.
    if LORA_PARTS.search(key) or key.endswith((".alpha", ".diff", ".diff_b")):
        return key
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _refuse(path: Path, weights: Mapping[str, Tensor]) -> None:
    for pattern, reason in REFUSED:
        name = next((name for name in weights if re.search(pattern, name)), None)
        if name is not None:
            raise CheckpointError(f"{path} cannot be served ({name}): {reason}")
    for name, tensor in weights.items():
        if tensor.dtype not in FLOAT_DTYPES and not name.endswith(".alpha"):
            raise CheckpointError(
                f"{path} cannot be served ({name} is {str(tensor.dtype).removeprefix('torch.')}): it is quantised, or "
                "no network; convert a float32, bfloat16 or float16 release"
            )


def _refuse_causal_settings(path: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Causality does not show in the names of Wan's tensors, so settings that say it are looked for everywhere else."""
    nested = [value for value in state.values() if isinstance(value, Mapping)]
    for settings in (config, state, *nested):
        flagged = any(settings.get(key) is True for key in ("causal", "is_causal"))
        if flagged or "causal" in str(settings.get("_class_name", "")).lower():
            raise CheckpointError(f"{path} cannot be served: {CAUSAL}")


def _read_file(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}: {EXPECTED}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if start[:4] == b"GGUF":
        raise CheckpointError(f"{path} cannot be served: GGUF is quantised; convert a bfloat16 or float32 release")
    is_zip = start[:2] == b"PK"
    if is_zip or start[:1] == b"\x80":
        return _read_pickle(path, is_zip)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    found = "an empty file" if not start else f"a file that starts with {start[:8]!r}"
    raise CheckpointError(f"{path} is neither safetensors nor a torch file: {EXPECTED}; got {found}")


def _read_pickle(path: Path, is_zip: bool) -> dict[Any, Any]:
    try:
        if is_zip and path.suffix != ".safetensors":
            # Mapped: a training checkpoint carries a critic of the same size, which is then never read from disk.
            state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        else:
            # torch believes the name where it sees one: a torch file that is called .safetensors goes in without it.
            with path.open("rb") as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the pickled object {name[1]}" if name else "pickled objects, or is damaged"
        raise CheckpointError(
            f"{path} holds {what}: only tensors are read, because unpickling runs code; ask for safetensors, or save "
            "its tensors alone where you trust it"
        ) from error
    except Exception as error:  # zip, pickle and torch each raise their own kinds
        raise CheckpointError(
            f"{path} is truncated, damaged or no torch file ({_first_sentence(error)}); fetch it again"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds one {type(state).__name__}, no dictionary of tensors: {EXPECTED}")
    return state


def _read_safetensors(path: Path) -> dict[Any, Any]:
    try:
        tensors: dict[Any, Any] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({_first_sentence(error)}); fetch it again") from error
    return tensors


def _read_folder(folder: Path) -> tuple[dict[Any, Any], Mapping[str, Any]]:
    if (folder / "student.json").exists():
        raise CheckpointError(f"{folder} is a student bundle already: codmd-serve serve --bundle {folder}")
    if (folder / "transformer_2").is_dir():
        raise CheckpointError(
            f"{folder} cannot be served: it holds two networks, for high and low noise (Wan2.2); "
            "convert a Wan2.1 release"
        )
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    config_file = folder / "config.json"
    config = _read_json(config_file) if config_file.is_file() else {}
    state: dict[Any, Any] = {}
    for part in _parts(folder):
        state |= _read_safetensors(part)
    return state, config


def _parts(folder: Path) -> list[Path]:
    """Return the safetensors files that make one network: those of the index, or the only one there is."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        weight_map = _read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{indices[0]} has no weight_map: fetch it again")
        files = [folder / Path(str(name)).name for name in sorted(set(weight_map.values()))]
    elif len(files) != 1:
        found = f"{len(files)} of them and {len(indices)} indices"
        raise CheckpointError(f"{folder} must hold one .safetensors, or several and their index, got {found}")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(files)} parts, the first is {missing[0]}")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold one JSON object, got {type(data).__name__}")
    return data


def _first_sentence(error: Exception) -> str:
    # torch goes on for several sentences.
    return first_line(error).split(". ")[0]
