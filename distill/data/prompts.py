"""Prompts to batches of embeddings: encoded once, cached on disk, drawn in an order that is a function of the position.

Knows neither networks nor losses; the text encoder is loaded only while the cache is being made.

Legend: B prompts of a batch, P prompts of the data set, L positions kept, D text width.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5EncoderModel

from codmd_serve.device import DTYPES_BY_NAME
from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import atomic_file
from codmd_serve.grammar import Grammar
from codmd_serve.wan.attention import compact_prompt_embeds
from codmd_serve.wan.text import MAX_SEQUENCE_LENGTH, clean_prompt, encode_prompts
from distill.config import DistillConfig
from distill.data.shards import read_shard_prompts, read_shards, shard_paths
from distill.networks.base import Base
from distill.worlds.shapeworld.captions import grammar, sample_caption

PROMPTS_PER_CALL = 64
HASHED_BYTES = 1 << 20
JSONL_KEYS = ("prompt", "caption", "text")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Embeddings of one iteration, (B, L, D) float32 on the training device, trimmed by `compact_prompt_embeds`.

    x0 (B, C, F, H, W), float32 on the same device, are samples of the teacher for these prompts, where the method is
    trained on them.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    x0: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptData:
    """Embeddings of all prompts without their padding: rows offsets[i]:offsets[i + 1] of `packed` are prompt i.

    The negative prompt is the last one. packed is (sum of lengths, D), offsets (P + 2,) int64.
    """

    packed: Tensor
    offsets: Tensor

    @property
    def num_prompts(self) -> int:
        """Number of prompts, the negative one not counted."""
        return len(self.offsets) - 2

    def batch(self, indices: list[int], device: torch.device) -> Batch:
        """Gather prompts, all trimmed to the longest of them and of the negative prompt."""
        rows = [self._rows(index) for index in (*indices, self.num_prompts)]
        lengths = [len(row) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).float()
        embeds = compact_prompt_embeds(padded, lengths).to(device)
        return Batch(
            prompt_embeds=embeds[:-1], negative_prompt_embeds=embeds[-1:].expand(len(indices), -1, -1).contiguous()
        )

    def _rows(self, index: int) -> Tensor:
        return self.packed[self.offsets[index] : self.offsets[index + 1]]


def batch_indices(position: int, num_prompts: int, batch_size: int, seed: int) -> list[int]:
    """Return which prompts batch number `position` holds: every epoch is a shuffle of its own, none is cut short.

    A function of its arguments alone, so the position is all that a resumed run needs, and a rank can slice.
    """
    first = position * batch_size
    orders: dict[int, np.ndarray] = {}
    indices = []
    for place in range(first, first + batch_size):
        epoch, offset = divmod(place, num_prompts)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(num_prompts)
        indices.append(int(orders[epoch][offset]))
    return indices


def load_prompts(config: DistillConfig) -> list[str]:
    """Return the training prompts: of a txt, a jsonl or tar shards, or captions of the shapeworld grammar.

    Raises:
        ConfigError: the file is missing, empty, of another kind, or has a row without prompt; the message says where.
    """
    if not config.prompts:
        rng = np.random.default_rng(config.seed)
        # One and two objects in turn, as in the evaluation: two take longer to learn and are fewer in the world.
        return [sample_caption(rng, "train", 1 + index % 2) for index in range(config.num_captions)]
    path, shards = Path(config.prompts), shard_paths(config.prompts)
    if shards:
        return read_shard_prompts(shards)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts {path} cannot be read: {error}") from error
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"prompts must be a .txt, .jsonl or .tar file or a folder of .tar files, got {path.name}")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix == ".txt":
        prompts = [line.strip() for _, line in numbered]
    else:
        prompts = [_jsonl_prompt(line, f"{path.name} line {number}") for number, line in numbered]
    if not prompts:
        raise ConfigError(f"prompts {path} holds no prompt")
    return prompts


def caption_grammar(config: DistillConfig) -> Grammar | None:
    """Return the grammar that all training prompts are captions of; None when they come from a file."""
    return None if config.prompts else grammar()


def _jsonl_prompt(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    found = [row[key] for key in JSONL_KEYS if key in row] if isinstance(row, dict) else []
    if not found or not isinstance(found[0], str) or not found[0].strip():
        raise ConfigError(f"{where} needs a text under one of {', '.join(JSONL_KEYS)}")
    return found[0].strip()


def cached_prompt_data(config: DistillConfig, base: Base, cache_dir: Path, device: torch.device) -> PromptData:
    """Return embeddings of the training prompts and the negative prompt, from the cache when it has them.

    Args:
        config: names prompts, negative prompt and text_dtype.
        base: whose text encoder embeds them.
        cache_dir: where the cache file is looked for and written; made when needed.
        device: where the text encoder runs if it has to; it is gone on return.

    Raises:
        ConfigError: the prompts cannot be read.
        CheckpointError: the text encoder cannot be loaded.
    """
    shards = shard_paths(config.prompts)
    if not shards:
        return _encoded_prompt_data([*load_prompts(config), config.negative_prompt], config, base, cache_dir, device)
    # Shards bring their embeddings, so that only the negative prompt is left to encode; a bad one is told of before.
    samples = read_shards(shards, int(base.transformer_entry("text_dim")))
    data = _encoded_prompt_data([config.negative_prompt], config, base, cache_dir, device)
    packed = [*(embeds for _, embeds in samples), data.packed.float()]
    offsets = torch.tensor([0, *map(len, packed)]).cumsum(0)
    return PromptData(packed=torch.cat(packed), offsets=offsets)


def _encoded_prompt_data(
    prompts: list[str], config: DistillConfig, base: Base, cache_dir: Path, device: torch.device
) -> PromptData:
    key = prompt_key(prompts, config, base)
    path = cache_dir / f"prompt-embeds-{key[:16]}.safetensors"
    cached = _read_cache(path, key)
    if cached is not None:
        return cached
    logger.info("encoding prompts=%d base=%s", len(prompts), base.source)
    data = encode_prompt_data(prompts, base, DTYPES_BY_NAME[config.text_dtype], device)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_file({"packed": data.packed, "offsets": data.offsets}, temporary, metadata={"key": key})
    return data


def encode_prompt_data(prompts: list[str], base: Base, dtype: torch.dtype, device: torch.device) -> PromptData:
    """Encode prompts, the last of which is the negative one, with the text encoder of `base`.

    Raises:
        CheckpointError: tokenizer or text encoder cannot be loaded.
    """
    tokenizer = base.load_tokenizer()
    text_encoder = base.load(UMT5EncoderModel, "text_encoder", dtype=dtype).eval().to(device)
    cleaned = [clean_prompt(prompt) for prompt in prompts]
    lengths = [min(len(ids), MAX_SEQUENCE_LENGTH) for ids in tokenizer(cleaned).input_ids]
    # Equal prompts are encoded once, and prompts of similar length together: padding costs as much as text.
    distinct = sorted(dict(zip(cleaned, lengths, strict=True)).items(), key=lambda item: item[1])
    rows: dict[str, Tensor] = {}
    for start in range(0, len(distinct), PROMPTS_PER_CALL):
        chunk = distinct[start : start + PROMPTS_PER_CALL]
        # The encoder masks padding, so embeddings do not depend on how much of it there is.
        embeds_BLD = encode_prompts(tokenizer, text_encoder, [text for text, _ in chunk], max(chunk[-1][1], 1)).cpu()
        rows |= {text: embeds[:length] for (text, length), embeds in zip(chunk, embeds_BLD, strict=True)}
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return PromptData(packed=torch.cat([rows[text] for text in cleaned]), offsets=offsets)


def _read_cache(path: Path, key: str) -> PromptData | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                raise CheckpointError("it holds other prompts")
            return PromptData(packed=file.get_tensor("packed"), offsets=file.get_tensor("offsets"))
    except (SafetensorError, OSError, CheckpointError) as error:
        logger.warning("prompt cache made anew path=%s reason=%s", path.name, error)
        return None


def prompt_key(prompts: list[str], config: DistillConfig, base: Base) -> str:
    """Return a digest of prompts and of the base's text encoder."""
    digest = hashlib.sha256(json.dumps([prompts, config.text_dtype, None if base.is_local else base.source]).encode())
    if base.is_local:
        add_module_files(digest, Path(base.source), ("tokenizer", "text_encoder"))
    return digest.hexdigest()


def add_module_files(digest: "hashlib._Hash", folder: Path, subfolders: tuple[str, ...]) -> None:
    """Let a digest tell modules apart that have the same name and size, without reading 20 GB.

    A module trained anew keeps both, so the first and the last MiB of each file count as well.
    """
    for subfolder in subfolders:
        for path in sorted((folder / subfolder).glob("*")):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(HASHED_BYTES))
                file.seek(max(path.stat().st_size - HASHED_BYTES, 0))
                digest.update(file.read(HASHED_BYTES))
