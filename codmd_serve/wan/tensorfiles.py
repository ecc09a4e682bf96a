"""Reads files and folders of tensors: safetensors, torch files, sharded folders, and their metadata.

Knows nothing of Wan. Every file is read without running code: torch files with weights_only.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from codmd_serve.errors import CheckpointError
from codmd_serve.textfiles import read_json_object, shown
from codmd_serve.wan.statements import ADAPTER_CONFIG, Statement, header_statements, statement_of

EXPECTED = (
    "expected a CoDMD, CausVid or Self-Forcing .pt (generator, generator_ema), an rCM .pt (net.*), safetensors or a "
    ".pt with Wan's own names, a LoRA file, or a diffusers folder"
)
SHARD_NAME = re.compile(r"-\d{5}-of-(\d{5})\.")
DCP_ADVICE = (
    "a folder of torch.distributed.checkpoint (DCP), sharded over the processes that wrote it: "
    "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER student.pt` makes one file; convert that"
)
DTENSOR_ADVICE = (
    "it holds DTensors, shards of a distributed run, and not whole tensors: save it again with "
    "`get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))`, or merge the shards with the "
    "trainer's own tool (verl: `python -m verl.model_merger merge --backend fsdp`)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Content of a file or folder: tensors and metadata.

    Attributes:
        state: names to tensors, dictionaries and whatever else a torch file holds.
        config: config.json beside the weights; empty where there is none.
        header: text entries of the safetensors header; empty for other files.
        statements: strengths of an update, by the header and adapter_config.json.
    """

    state: Mapping[Any, Any]
    config: Mapping[str, Any]
    header: Mapping[str, str]
    statements: tuple[Statement, ...] = ()


def read_stored(path: Path) -> Stored:
    """Read a file or folder of tensors without running code in it.

    Raises:
        CheckpointError: not there, truncated, holding pickled objects or shards of a distributed run, a folder of
            which no single network can be told; the message says what it is and what makes it readable.
    """
    if path.is_dir():
        return _read_folder(path)
    shard = SHARD_NAME.search(path.name)
    if shard and path.is_file():
        raise CheckpointError(f"{path} is one of {int(shard[1])} parts of a network: name its folder, {path.parent}")
    state, header = _read_file(path)
    # The name that diffusers gives to weights whose config.json lies beside them.
    config_file = path.with_name("config.json")
    has_config = path.name.startswith("diffusion_pytorch_model") and config_file.is_file()
    adapter = path.with_name(ADAPTER_CONFIG) if path.stem == "adapter_model" else None
    return Stored(
        state=state,
        config=read_json_object(config_file, CheckpointError) if has_config else {},
        header=header,
        statements=_statements(header, adapter, str(path)),
    )


def _statements(header: Mapping[str, str], adapter: Path | None, source: str) -> tuple[Statement, ...]:
    found = header_statements(header, source)
    if adapter is not None and adapter.is_file():
        own = statement_of(ADAPTER_CONFIG, read_json_object(adapter, CheckpointError), source)
        found += [own] if own is not None else []
    return tuple(found)


def _read_file(path: Path) -> tuple[dict[Any, Any], dict[str, str]]:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}: {EXPECTED}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read: {reason}") from None
    if start[:4] == b"GGUF":
        raise CheckpointError(f"{path} cannot be served: GGUF is quantised; convert a bfloat16 or float32 release")
    is_zip = start[:2] == b"PK"
    if is_zip or start[:1] == b"\x80":
        return _read_pickle(path, is_zip), {}
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
            # torch reads safetensors by the name where it sees one: a torch file that is called .safetensors goes in
            # without it.
            with path.open("rb") as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own kinds
        raise CheckpointError(f"{path} {_why_not(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds one {type(state).__name__}, no dictionary of tensors: {EXPECTED}")
    if _holds_dtensor(state):
        raise CheckpointError(f"{path} cannot be read: {DTENSOR_ADVICE}")
    return state


def _why_not(error: Exception) -> str:
    text = str(error)
    if re.search(r"DTensor|ShardedTensor|invalid python storage|torch\.distributed", text):
        return f"cannot be read: {DTENSOR_ADVICE}"
    if isinstance(error, pickle.UnpicklingError):
        name = re.search(r"GLOBAL (\S+)", text)
        what = f"the pickled object {name[1]}" if name else "pickled objects, or is damaged"
        return (
            f"holds {what}: only tensors are read, because unpickling runs code; ask for safetensors, or save its "
            "tensors alone where you trust it"
        )
    return f"is truncated, damaged or no torch file ({_first_sentence(error)}); fetch it again"


def _holds_dtensor(state: Mapping[Any, Any], depth: int = 0) -> bool:
    return any(
        type(value).__name__ in ("DTensor", "ShardedTensor")
        or (isinstance(value, Mapping) and depth < 6 and _holds_dtensor(value, depth + 1))
        for value in state.values()
    )


def _read_safetensors(path: Path) -> tuple[dict[Any, Any], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            header = dict(file.metadata() or {})
        return load_file(path), header
    except Exception as error:  # the library, torch and the file system each raise their own kinds
        raise CheckpointError(f"{path} is truncated or damaged ({_first_sentence(error)}); fetch it again") from error


def _read_folder(folder: Path) -> Stored:
    # Without a network of its own it is an adapter, which says how it is sampled.
    if (folder / "student.json").exists() and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} is a student bundle already: codmd-serve serve --bundle {folder}")
    if (folder / "transformer_2").is_dir():
        raise CheckpointError(
            f"{folder} cannot be served: it holds two networks, for high and low noise (Wan2.2); "
            "convert a Wan2.1 release"
        )
    _refuse_shards(folder)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    config_file = folder / "config.json"
    config = read_json_object(config_file, CheckpointError) if config_file.is_file() else {}
    state: dict[Any, Any] = {}
    header: dict[str, str] = {}
    for part, names in _weight_files(folder):
        tensors, own = _read_file(part)
        lost = sorted(names - tensors.keys())
        if lost:
            raise CheckpointError(f"{part} lacks {len(lost)} tensors that its index names, the first is {lost[0]}")
        state |= tensors
        header |= own
    return Stored(
        state=state,
        config=config,
        header=header,
        statements=_statements(header, folder / ADAPTER_CONFIG, str(folder)),
    )


def _refuse_shards(folder: Path) -> None:
    """Refuse the sharded folders of a distributed run, and name the tool that merges them."""
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        if (place / ".metadata").is_file() or any(place.glob("*.distcp")):
            raise CheckpointError(f"{place} is {DCP_ADVICE}")
        if any(place.glob("model_world_size_*_rank_*.pt")):
            raise CheckpointError(f"{place} cannot be read: {DTENSOR_ADVICE}")
        if any(place.glob("*_model_states.pt")) or any(place.glob("*_optim_states.pt")):
            raise CheckpointError(
                f"{place} is a DeepSpeed checkpoint, sharded over the processes that wrote it: "
                "`python zero_to_fp32.py FOLDER student.pt` (DeepSpeed puts the script beside it) makes one file; "
                "convert that"
            )


def _weight_files(folder: Path) -> list[tuple[Path, set[str]]]:
    """Return the files that make one network, each with the tensors that an index says it holds."""
    for suffix in ("safetensors", "bin"):
        indices = sorted(folder.glob(f"*.{suffix}.index.json"))
        files = sorted(folder.glob(f"*.{suffix}"))
        if len(indices) == 1:
            return _indexed_files(folder, indices[0])
        if len(files) == 1 and not indices:
            return [(files[0], set())]
        if files or indices:
            raise CheckpointError(
                f"{folder} must hold one .{suffix}, or several and their index, got {len(files)} of them and "
                f"{len(indices)} indices; name one file, or fetch the index"
            )
    other = sorted(path.name for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".ckpt"))
    if other:
        raise CheckpointError(f"{folder} is no diffusers folder: name a file in it, for example {folder / other[0]}")
    raise CheckpointError(
        f"{folder} must hold one .safetensors, or several and their index, got 0 of them and 0 indices: {EXPECTED}"
    )


def _indexed_files(folder: Path, index: Path) -> list[tuple[Path, set[str]]]:
    weight_map = read_json_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: fetch it again")
    parts: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file:
            raise CheckpointError(f"{index} names no file of its folder for {shown(tensor)}, but {shown(file)}")
        parts.setdefault(file, set()).add(tensor)
    missing = sorted(name for name in parts if not (folder / name).is_file())
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(parts)} parts, the first is {missing[0]}")
    return [(folder / name, names) for name, names in sorted(parts.items())]


def _first_sentence(error: Exception) -> str:
    # torch goes on for several sentences.
    return re.split(r"\n|\. ", str(error).strip() or type(error).__name__)[0]
