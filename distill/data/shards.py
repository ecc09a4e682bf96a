"""Prompts with ready-made embeddings from WebDataset tar shards; knows no text encoder.

KEY.prompt.txt     the prompt
KEY.embed.pt       its embedding (L, D), one tensor as torch.save writes it; padding rows are zero

Other members, such as latents, are not read, nor those whose names begin with a dot, which macOS adds.
"""

import io
import tarfile
from pathlib import Path

import torch
from torch import Tensor

from codmd_serve.errors import ConfigError
from codmd_serve.files import first_line
from codmd_serve.textfiles import decode_text
from codmd_serve.wan.attention import NUM_PROMPT_POSITIONS, prompt_lengths
from distill.data.texts import check_prompt

PROMPT_SUFFIX, EMBED_SUFFIX = ".prompt.txt", ".embed.pt"
EMBED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
READ_BYTES = 1 << 20


def shard_paths(prompts: str) -> list[Path]:
    """Return the tar shards that the setting `prompts` names, a tar or a folder of them; none for anything else."""
    path = Path(prompts)
    if prompts and path.is_dir():
        return sorted(shard for shard in path.glob("*.tar") if not shard.name.startswith("."))
    return [path] if path.suffix.lower() == ".tar" else []


def read_shard_prompts(paths: list[Path]) -> list[str]:
    """Return the prompts of shards in the order of their files and keys.

    Raises:
        ConfigError: as `read_shards`, but for what is inside of the embeddings.
    """
    return [prompt for path in paths for prompt, _ in _members(path).values()]


def read_shards(paths: list[Path], width: int) -> list[tuple[str, Tensor]]:
    """Return prompts and their embeddings (L, width) float32 without padding, in the order of `read_shard_prompts`.

    Args:
        paths: from `shard_paths`.
        width: of the embeddings that the teacher reads.

    Raises:
        ConfigError: a shard that is missing, damaged, cut off or empty, a sample without prompt or embedding or given
            twice, an embedding that is no plain tensor, of another shape, longer than Wan reads, zero or not finite;
            the message names shard and member.
    """
    return [
        (prompt, _embedding(f"{path.name}: {key}{EMBED_SUFFIX}", data, width))
        for path in paths
        for key, (prompt, data) in _members(path).items()
    ]


def _members(path: Path) -> dict[str, tuple[str, bytes]]:
    prompts: dict[str, bytes] = {}
    embeds: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                _read_member(archive, member, {PROMPT_SUFFIX: prompts, EMBED_SUFFIX: embeds}, path)
            _check_end(archive, path, len(prompts))
    except ConfigError:
        raise
    except Exception as error:  # tar, the compressors and the file system each raise their own kinds
        raise ConfigError(f"prompts {path} cannot be read as a tar: {first_line(error)}") from error
    alone = sorted(prompts.keys() ^ embeds.keys())
    if alone:
        lacking = PROMPT_SUFFIX if alone[0] in embeds else EMBED_SUFFIX
        raise ConfigError(f"{path.name}: sample {alone[0]} has no {lacking}")
    if not prompts:
        raise ConfigError(f"prompts {path} holds no prompt: expected members KEY{PROMPT_SUFFIX} and KEY{EMBED_SUFFIX}")
    return {
        key: (_decode_prompt(f"{path.name}: {key}{PROMPT_SUFFIX}", prompts[key]), embeds[key])
        for key in sorted(prompts)
    }


def _read_member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, wanted: dict[str, dict[str, bytes]], path: Path
) -> None:
    name = member.name.removeprefix("./")
    if name.rpartition("/")[2].startswith("."):
        return
    for suffix, found in wanted.items():
        file = archive.extractfile(member) if name.endswith(suffix) else None
        if file is not None:
            key = name.removesuffix(suffix)
            if key in found:
                raise ConfigError(f"{path.name}: {name} stands there twice; write the shard again")
            found[key] = file.read()


def _check_end(archive: tarfile.TarFile, path: Path, num_samples: int) -> None:
    """Refuse a tar that goes on behind what was read, or ends before its end: tarfile takes both for a whole one."""
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    if len(block := file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        raise ConfigError(
            f"prompts {path} is cut off or damaged: {num_samples} samples were found, but not the end of the archive; "
            "write it again"
        )
    while rest := file.read(READ_BYTES):
        if rest.strip(b"\0"):
            raise ConfigError(
                f"prompts {path} goes on behind the end of its archive, after {num_samples} samples: tars are joined "
                "with `tar --concatenate`, not with cat; or name a folder of both"
            )


def _decode_prompt(where: str, data: bytes) -> str:
    prompt = decode_text(data, where, ConfigError).strip()
    check_prompt(prompt, where)
    return prompt


def _embedding(where: str, data: bytes, width: int) -> Tensor:
    try:
        embeds = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own kinds
        raise ConfigError(f"{where} is no plain tensor; nothing else in it is loaded or run") from error
    is_plain = isinstance(embeds, Tensor) and embeds.layout == torch.strided and not embeds.is_meta
    if not is_plain or embeds.dtype not in EMBED_DTYPES:
        kind = f"{embeds.dtype} tensor" if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ConfigError(f"{where} must be a floating-point tensor, got {kind}")
    if embeds.ndim == 3 and embeds.shape[0] == 1:
        embeds = embeds[0]
    if embeds.ndim != 2 or embeds.shape[1] != width or not embeds.shape[0]:
        raise ConfigError(f"{where} must be of shape (L, {width}), got {tuple(embeds.shape)}")
    # After the conversion: a float64 may be too large for float32.
    embeds = embeds.detach().float()
    if not bool(embeds.isfinite().all()):
        raise ConfigError(f"{where} has values that are not finite")
    length = prompt_lengths(embeds[None])[0]
    if not 0 < length <= NUM_PROMPT_POSITIONS:
        what = f"{length} rows that are not zero, Wan reads {NUM_PROMPT_POSITIONS}" if length else "zeros only"
        raise ConfigError(f"{where} has {what}; embed its prompt again")
    kept: Tensor = embeds[:length].clone()
    return kept
