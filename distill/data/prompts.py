"""Prompts to batches of embeddings: encoded once, cached on disk, drawn in an order that is a function of the position.

Knows neither networks nor losses; the text encoder is loaded only while the cache is being made.

Legend: B prompts of a batch, P prompts of the data set, L positions kept, D text width.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5EncoderModel

from codmd_serve.device import DTYPES_BY_NAME
from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import atomic_file, first_line
from codmd_serve.grammar import Grammar
from codmd_serve.wan.attention import compact_prompt_embeds
from codmd_serve.wan.text import MAX_SEQUENCE_LENGTH, clean_prompt, encode_prompts
from distill.config import DistillConfig
from distill.data.shards import read_shard_prompts, read_shards, shard_paths
from distill.data.texts import Prompts, read_prompt_file
from distill.networks.base import Base
from distill.worlds.shapeworld.captions import grammar, sample_caption

PROMPTS_PER_CALL = 64
HASHED_BYTES = 1 << 20
# Recipes whose teacher knows the captions of the shapeworld grammar; any other would be trained on words it never saw.
CAPTIONED_RECIPES = ("shapeworld",)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Embeddings of one iteration, (B, L, D) float32 on the training device, trimmed by `compact_prompt_embeds`.

    x0 (B, C, F, H, W), float32 on the same device, are samples of the teacher for these prompts, where the method is
    trained on them, and states (B, K, C, F, H, W) those kept on the way to them.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    x0: Tensor | None = None
    states: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptData:
    """Embeddings of all prompts without their padding: rows offsets[i]:offsets[i + 1] of `packed` are prompt i.

    The negative prompt is the last one.

    Attributes:
        packed: (sum of lengths, D).
        offsets: (P + 2,) int64.
        num_cut: prompts of which the text encoder read a part, because they have more tokens than it takes.
        report: one line about what was read.
    """

    packed: Tensor
    offsets: Tensor
    num_cut: int = 0
    report: str = ""

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


def read_prompts(config: DistillConfig) -> Prompts:
    """Return the training prompts: of a txt, a jsonl or tar shards, or captions of the shapeworld grammar.

    Raises:
        ConfigError: the file is missing, empty, of another kind, or has a row without prompt; the message says where.
            Or none is named, and the recipe has no captions of its own.
    """
    if config.prompts:
        shards = shard_paths(config.prompts)
        return Prompts(texts=read_shard_prompts(shards)) if shards else read_prompt_file(Path(config.prompts))
    require_prompts(config)
    rng = np.random.default_rng(config.seed)
    # One and two objects in turn, as in the evaluation: two take longer to learn and are fewer in the world.
    return Prompts(texts=[sample_caption(rng, "train", 1 + index % 2) for index in range(config.num_captions)])


def require_prompts(config: DistillConfig) -> None:
    """Refuse a run that names no prompts and whose recipe has no captions of its own.

    Raises:
        ConfigError: names the key.
    """
    if not config.prompts and config.recipe not in CAPTIONED_RECIPES:
        raise ConfigError(
            f"prompts is not set: recipe {config.recipe} needs a .txt, .jsonl or .tar file, or a folder of .tar files "
            "(--set prompts=FILE); only shapeworld draws captions of its own"
        )


def load_prompts(config: DistillConfig) -> list[str]:
    """Return the texts of `read_prompts`, and raise as it does."""
    return read_prompts(config).texts


def check_prompts(config: DistillConfig, base: Base) -> dict[str, object]:
    """Read all training prompts as a run does, without encoding any.

    Returns:
        What was read, for `--dry-run`: prompts, duplicates and blank lines that were dropped.

    Raises:
        ConfigError: as `read_prompts`, and for embeddings that the teacher cannot read.
    """
    shards = shard_paths(config.prompts)
    if shards:
        prompts = Prompts(texts=[text for text, _ in read_shards(shards, int(base.transformer_entry("text_dim")))])
    else:
        prompts = read_prompts(config)
    counts = {"prompts": len(prompts.texts), "duplicates": prompts.num_duplicates, "dropped": prompts.num_blank}
    return dict(counts)


def caption_grammar(config: DistillConfig) -> Grammar | None:
    """Return the grammar that all training prompts are captions of; None when they come from a file."""
    return None if config.prompts else grammar()


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
        read = read_prompts(config)
        data = _encoded_prompt_data([*read.texts, config.negative_prompt], config, base, cache_dir, device)
        return replace(data, report=_report(data, read))
    # Shards bring their embeddings, so that only the negative prompt is left to encode; a bad one is told of before.
    samples = read_shards(shards, int(base.transformer_entry("text_dim")))
    data = _encoded_prompt_data([config.negative_prompt], config, base, cache_dir, device)
    packed = [*(embeds for _, embeds in samples), data.packed.float()]
    offsets = torch.tensor([0, *map(len, packed)]).cumsum(0)
    data = PromptData(packed=torch.cat(packed), offsets=offsets)
    return replace(data, report=_report(data, Prompts(texts=[text for text, _ in samples])))


def _report(data: PromptData, read: Prompts) -> str:
    """Say in one line what a run trains on."""
    longest = int(data.offsets.diff()[:-1].max())
    return (
        f"prompts={len(read.texts)} distinct={len(set(read.texts))} dropped={read.num_blank} cut={data.num_cut} "
        f"longest={longest}"
    )


def _encoded_prompt_data(
    prompts: list[str], config: DistillConfig, base: Base, cache_dir: Path, device: torch.device
) -> PromptData:
    key = prompt_key(prompts, config, base)
    path = cache_dir / f"prompt-embeds-{key[:16]}.safetensors"
    cached = _read_cache(path, key, len(prompts))
    if cached is not None:
        return cached
    logger.info("encoding prompts=%d base=%s", len(prompts), base.source)
    data = encode_prompt_data(prompts, base, DTYPES_BY_NAME[config.text_dtype], device)
    metadata = {"key": key, "num_cut": str(data.num_cut)}
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            save_file({"packed": data.packed, "offsets": data.offsets}, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the cache of embeddings {path} cannot be written: {first_line(error)}") from error
    return data


def encode_prompt_data(prompts: list[str], base: Base, dtype: torch.dtype, device: torch.device) -> PromptData:
    """Encode prompts, the last of which is the negative one, with the text encoder of `base`.

    Raises:
        CheckpointError: tokenizer or text encoder cannot be loaded.
    """
    tokenizer = base.load_tokenizer()
    text_encoder = base.load(UMT5EncoderModel, "text_encoder", dtype=dtype).eval().to(device)
    cleaned = [clean_prompt(prompt) for prompt in prompts]
    num_tokens = [len(ids) for ids in tokenizer(cleaned).input_ids]
    lengths = [min(number, MAX_SEQUENCE_LENGTH) for number in num_tokens]
    # Equal prompts are encoded once, and prompts of similar length together: padding costs as much as text.
    distinct = sorted(dict(zip(cleaned, lengths, strict=True)).items(), key=lambda item: item[1])
    rows: dict[str, Tensor] = {}
    for start in range(0, len(distinct), PROMPTS_PER_CALL):
        chunk = distinct[start : start + PROMPTS_PER_CALL]
        # The encoder masks padding, so embeddings do not depend on how much of it there is.
        embeds_BLD = encode_prompts(tokenizer, text_encoder, [text for text, _ in chunk], max(chunk[-1][1], 1)).cpu()
        rows |= {text: embeds[:length] for (text, length), embeds in zip(chunk, embeds_BLD, strict=True)}
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    num_cut = sum(number > MAX_SEQUENCE_LENGTH for number in num_tokens[:-1])
    return PromptData(packed=torch.cat([rows[text] for text in cleaned]), offsets=offsets, num_cut=num_cut)


def _read_cache(path: Path, key: str, num_prompts: int) -> PromptData | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                raise CheckpointError("it holds other prompts")
            packed, offsets = file.get_tensor("packed"), file.get_tensor("offsets")
        _check_packed(packed, offsets, num_prompts)
        return PromptData(packed=packed, offsets=offsets, num_cut=int(metadata.get("num_cut", 0)))
    except (SafetensorError, OSError, ValueError, CheckpointError) as error:
        logger.warning("prompt cache made anew path=%s reason=%s", path.name, error)
        return None


def _check_packed(packed: Tensor, offsets: Tensor, num_prompts: int) -> None:
    """Check stored embeddings as strictly as an iteration needs them."""
    if offsets.dtype != torch.int64 or offsets.shape != (num_prompts + 1,):
        raise CheckpointError(f"it has {tuple(offsets.shape)} offsets for {num_prompts} prompts")
    lengths = offsets.diff()
    in_order = int(offsets[0]) == 0 and bool((lengths >= 0).all()) and int(lengths.max()) <= MAX_SEQUENCE_LENGTH
    if packed.ndim != 2 or not in_order or int(offsets[-1]) != len(packed):
        raise CheckpointError("its offsets are not those of its embeddings")
    if not packed.is_floating_point() or not bool(packed.isfinite().all()):
        raise CheckpointError("it holds values that are not finite")


def prompt_key(prompts: list[str], config: DistillConfig, base: Base) -> str:
    """Return a digest of prompts and of the base's text encoder."""
    digest = hashlib.sha256(json.dumps([prompts, config.text_dtype, None if base.is_local else base.source]).encode())
    add_module_files(digest, base.folder, ("tokenizer", "text_encoder"))
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
