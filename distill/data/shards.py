"""Samples of WebDataset tar shards, one by one; knows no text encoder.

KEY.prompt.txt     the prompt
KEY.embed.pt       its embedding (L, D), one tensor as torch.save writes it; padding rows are zero
KEY.latent.pt      latents of its video, (C, F, H, W) or (F, C, H, W), one tensor; only where latents are asked for

Other members are not read, nor those whose names begin with a dot, which macOS adds. The memory is that of one sample,
and of the prompts of one shard.
"""

import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codmd_serve.errors import ConfigError
from codmd_serve.files import first_line
from codmd_serve.textfiles import decode_text
from codmd_serve.wan.attention import NUM_PROMPT_POSITIONS, prompt_lengths
from distill.data.packed import Sample
from distill.data.texts import check_prompt

PROMPT_SUFFIX, EMBED_SUFFIX, LATENT_SUFFIX = ".prompt.txt", ".embed.pt", ".latent.pt"
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
READ_BYTES = 1 << 20


def shard_paths(prompts: str) -> list[Path]:
    """Return the tar shards that the setting `prompts` names, a tar or a folder of them; none for anything else."""
    path = Path(prompts)
    if prompts and path.is_dir():
        return sorted(shard for shard in path.glob("*.tar") if not shard.name.startswith("."))
    return [path] if path.suffix.lower() == ".tar" else []


def shard_prompts(path: Path) -> list[str]:
    """Return the prompts of one shard in the order of their keys; raises as `shard_samples`, but for the tensors."""
    with _opened(path) as (_, members):
        return [prompt for prompt, *_ in members.values()]


def shard_samples(path: Path, width: int, latent_shape: tuple[int, ...] = ()) -> Iterator[Sample]:
    """Yield the samples of one shard in the order of their keys, embeddings and latents in float32.

    Args:
        path: from `shard_paths`.
        width: of the embeddings that the teacher reads.
        latent_shape: (C, F, H, W) of the latents to read; empty reads none.

    Raises:
        ConfigError: a shard that is missing, damaged, cut off or empty, a sample without prompt, embedding or latents
            or given twice, a tensor that is no plain one, of another shape, zero or not finite, an embedding longer
            than Wan reads; the message names shard and member.
    """
    with _opened(path) as (archive, members):
        for key, (prompt, embed, latent) in members.items():
            embeds = _embedding(f"{path.name}: {key}{EMBED_SUFFIX}", _content(archive, embed, path), width)
            latents = None
            if latent_shape:
                where = f"{path.name}: {key}{LATENT_SUFFIX}"
                if latent is None:
                    raise ConfigError(f"{path.name}: sample {key} has no {LATENT_SUFFIX}")
                latents = _latents(where, _content(archive, latent, path), latent_shape)
            yield Sample(text=prompt, embeds=embeds, latents=latents)


def has_latents(path: Path) -> bool:
    """Return whether the first sample of a shard has latents; raises as `shard_prompts`."""
    with _opened(path) as (_, members):
        return next(iter(members.values()))[2] is not None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[tarfile.TarFile, dict[str, tuple[str, tarfile.TarInfo, Any]]]]:
    """Yield the archive and, by key, prompt and members of its samples; of the content only the prompts are read."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {
        suffix: {} for suffix in (PROMPT_SUFFIX, EMBED_SUFFIX, LATENT_SUFFIX)
    }
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(tarfile.open(path))
            for member in archive:
                _note_member(member, found, path)
            prompts, embeds, latents = found.values()
            _check_end(archive, path, len(prompts))
            texts = {key: _content(archive, member, path) for key, member in prompts.items()}
        except ConfigError:
            raise
        except Exception as error:  # tar, the compressors and the file system each raise their own kinds
            raise ConfigError(f"prompts {path} cannot be read as a tar: {first_line(error)}") from error
        alone = sorted(prompts.keys() ^ embeds.keys())
        if alone:
            lacking = PROMPT_SUFFIX if alone[0] in embeds else EMBED_SUFFIX
            raise ConfigError(f"{path.name}: sample {alone[0]} has no {lacking}")
        if not prompts:
            raise ConfigError(
                f"prompts {path} holds no prompt: expected members KEY{PROMPT_SUFFIX} and KEY{EMBED_SUFFIX}"
            )
        decoded = {key: _decode_prompt(f"{path.name}: {key}{PROMPT_SUFFIX}", texts[key]) for key in sorted(texts)}
        yield archive, {key: (text, embeds[key], latents.get(key)) for key, text in decoded.items()}


def _note_member(member: tarfile.TarInfo, found: dict[str, dict[str, tarfile.TarInfo]], path: Path) -> None:
    name = member.name.removeprefix("./")
    if name.rpartition("/")[2].startswith(".") or not (member.isfile() or member.islnk() or member.issym()):
        return
    for suffix, members in found.items():
        if name.endswith(suffix):
            key = name.removesuffix(suffix)
            if key in members:
                raise ConfigError(f"{path.name}: {name} stands there twice; write the shard again")
            members[key] = member


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    try:
        file = archive.extractfile(member)
        assert file is not None
        return file.read()
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise ConfigError(f"prompts {path} cannot be read as a tar: {first_line(error)}") from error


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


def _plain_tensor(where: str, data: bytes) -> Tensor:
    """Load one float tensor from what torch.save wrote, as float32."""
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own kinds
        raise ConfigError(f"{where} is no plain tensor; nothing else in it is loaded or run") from error
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if not is_plain or value.dtype not in FLOAT_DTYPES:
        kind = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"{where} must be a floating-point tensor, got {kind}")
    # After the conversion: a float64 may be too large for float32.
    tensor: Tensor = value.detach().float()
    if not bool(tensor.isfinite().all()):
        raise ConfigError(f"{where} has values that are not finite")
    return tensor


def _embedding(where: str, data: bytes, width: int) -> Tensor:
    embeds = _plain_tensor(where, data)
    if embeds.ndim == 3 and embeds.shape[0] == 1:
        embeds = embeds[0]
    if embeds.ndim != 2 or embeds.shape[1] != width or not embeds.shape[0]:
        raise ConfigError(f"{where} must be of shape (L, {width}), got {tuple(embeds.shape)}")
    length = prompt_lengths(embeds[None])[0]
    if not 0 < length <= NUM_PROMPT_POSITIONS:
        what = f"{length} rows that are not zero, Wan reads {NUM_PROMPT_POSITIONS}" if length else "zeros only"
        raise ConfigError(f"{where} has {what}; embed its prompt again")
    return embeds[:length].clone()


def _latents(where: str, data: bytes, shape: tuple[int, ...]) -> Tensor:
    latents = _plain_tensor(where, data)
    if latents.ndim == 5 and latents.shape[0] == 1:
        latents = latents[0]
    channels, frames, *sides = shape
    if tuple(latents.shape) == (frames, channels, *sides) and frames != channels:
        latents = latents.transpose(0, 1)
    if tuple(latents.shape) != shape:
        raise ConfigError(
            f"{where} has latents {tuple(latents.shape)}, the run trains on {shape}: "
            "they are of another VAE, size or number of frames"
        )
    if not bool(latents.any()):
        raise ConfigError(f"{where} has zeros only; encode its video again")
    return latents.contiguous()
