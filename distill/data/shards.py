"""Prompts with ready-made embeddings from WebDataset tar shards; knows no text encoder.

KEY.prompt.txt     the prompt
KEY.embed.pt       its embedding (L, D), one tensor as torch.save writes it; padding rows are zero

Other members, such as latents, are not read.
"""

import io
import tarfile
from pathlib import Path

import torch
from torch import Tensor

from codmd_serve.errors import ConfigError
from codmd_serve.wan.attention import prompt_lengths

PROMPT_SUFFIX, EMBED_SUFFIX = ".prompt.txt", ".embed.pt"


def shard_paths(prompts: str) -> list[Path]:
    """Return the tar shards that the setting `prompts` names, a tar or a folder of them; none for anything else."""
    path = Path(prompts)
    if prompts and path.is_dir():
        return sorted(path.glob("*.tar"))
    return [path] if path.suffix == ".tar" else []


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
        ConfigError: a shard that is missing, damaged or empty, a sample without prompt or embedding, an embedding that
            is no plain tensor, of another shape or not finite; the message names shard and member.
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
                for suffix, found in ((PROMPT_SUFFIX, prompts), (EMBED_SUFFIX, embeds)):
                    file = archive.extractfile(member) if member.name.endswith(suffix) else None
                    if file is not None:
                        found[member.name.removesuffix(suffix)] = file.read()
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"prompts {path} cannot be read as a tar: {error}") from error
    alone = sorted(prompts.keys() ^ embeds.keys())
    if alone:
        lacking = PROMPT_SUFFIX if alone[0] in embeds else EMBED_SUFFIX
        raise ConfigError(f"{path.name}: sample {alone[0]} has no {lacking}")
    if not prompts:
        raise ConfigError(f"prompts {path} holds no prompt: expected members KEY{PROMPT_SUFFIX} and KEY{EMBED_SUFFIX}")
    try:
        return {key: (prompts[key].decode("utf-8").strip(), embeds[key]) for key in sorted(prompts)}
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name}: a prompt is not UTF-8: {error}") from error


def _embedding(where: str, data: bytes, width: int) -> Tensor:
    try:
        embeds = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own kinds
        raise ConfigError(f"{where} is no plain tensor; nothing else in it is loaded or run") from error
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        raise ConfigError(f"{where} must be a floating-point tensor, got {type(embeds).__name__}")
    if embeds.ndim == 3 and embeds.shape[0] == 1:
        embeds = embeds[0]
    if embeds.ndim != 2 or embeds.shape[1] != width or not embeds.shape[0]:
        raise ConfigError(f"{where} must be of shape (L, {width}), got {tuple(embeds.shape)}")
    if not bool(embeds.isfinite().all()):
        raise ConfigError(f"{where} has values that are not finite")
    return embeds[: max(prompt_lengths(embeds[None])[0], 1)].float().clone()
