"""Prompts to batches of embeddings: packed once on disk, drawn in an order that is a function of the position.

Knows neither networks nor losses. What a run trains on is converted at its first start into packed samples
(data/packed.py) in the cache folder, by all processes, each its share; later starts open them. The text encoder is
loaded only while there is text to encode.

Legend: B prompts of a batch, P prompts of the data set, L positions kept, D text width.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from codmd_serve.errors import ConfigError
from codmd_serve.grammar import Grammar
from codmd_serve.wan.attention import compact_prompt_embeds
from distill.config import ANALYTIC_RECIPES, DistillConfig
from distill.data.packed import PackedSet, is_packed_set, open_set
from distill.data.packing import Packing
from distill.data.packing import add_files as add_files
from distill.data.packing import prompt_key as prompt_key
from distill.data.shards import shard_paths, shard_prompts, shard_samples
from distill.data.texts import Prompts, read_prompt_file
from distill.networks.base import Base
from distill.parallel.processes import SINGLE_PROCESS, Processes
from distill.worlds.analytic.makers import make_world
from distill.worlds.shapeworld.captions import grammar, sample_caption

# Recipes whose teacher knows the captions of the shapeworld grammar; any other would be trained on words it never saw.
CAPTIONED_RECIPES = ("shapeworld",)


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
    """The prompts that a run trains on; embeddings come without their padding.

    Attributes:
        num_prompts: P, the negative one not counted.
        rows: embedding (L, D) of prompt i; the negative prompt is number P.
        text: prompt i.
        latents: latents (C, F, H, W) of prompt i, where the samples have them.
        content: digest of all samples in their order.
        num_cut: prompts of which the text encoder read a part, because they have more tokens than it takes.
        report: one line about what was read.
    """

    num_prompts: int
    rows: Callable[[int], Tensor]
    text: Callable[[int], str]
    latents: Callable[[int], Tensor] | None = None
    content: str = ""
    num_cut: int = 0
    report: str = ""

    def batch(self, indices: list[int], device: torch.device) -> Batch:
        """Gather prompts, all trimmed to the longest of them and of the negative prompt."""
        rows = [self.rows(index).float() for index in (*indices, self.num_prompts)]
        lengths = [len(row) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        embeds = compact_prompt_embeds(padded, lengths).to(device)
        return Batch(
            prompt_embeds=embeds[:-1], negative_prompt_embeds=embeds[-1:].expand(len(indices), -1, -1).contiguous()
        )

    def x0(self, indices: list[int], device: torch.device) -> Tensor:
        """Gather latents, (B, C, F, H, W) float32."""
        assert self.latents is not None
        return torch.stack([self.latents(index).float() for index in indices]).to(device)


def prompts_in_memory(packed: Tensor, offsets: Tensor) -> PromptData:
    """Make data of embeddings in memory: rows offsets[i]:offsets[i + 1] are prompt i, the negative one is the last."""
    bounds = offsets.tolist()

    def rows(index: int) -> Tensor:
        return packed[bounds[index] : bounds[index + 1]]

    return PromptData(num_prompts=len(bounds) - 2, rows=rows, text=str)


def batch_indices(position: int, num_prompts: int, batch_size: int, seed: int) -> list[int]:
    """Return which prompts batch number `position` holds: every epoch is a shuffle of its own, none is cut short.

    A function of its arguments alone, so the position is all that a resumed run needs, and a rank can slice.
    """
    places = range(position * batch_size, (position + 1) * batch_size)
    return [int(_order(seed, place // num_prompts, num_prompts)[place % num_prompts]) for place in places]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_prompts: int) -> np.ndarray:
    """Return the shuffle of an epoch; kept, because a batch of a small network takes less time than 4,096 numbers."""
    return np.random.default_rng([seed, epoch]).permutation(num_prompts)


def read_prompts(config: DistillConfig) -> Prompts:
    """Return the training prompts: of a file, tar shards or packed samples, or captions of the recipe's own world.

    Raises:
        ConfigError: the file is missing, empty, of another kind, or has a row without prompt; the message says where.
            Or none is named, and the recipe has no captions of its own.
    """
    if config.prompts:
        shards = shard_paths(config.prompts)
        if shards:
            return Prompts(texts=[text for path in shards for text in shard_prompts(path)])
        if is_packed_set(Path(config.prompts)):
            return Prompts(texts=list(open_set(Path(config.prompts)).texts()))
        return read_prompt_file(Path(config.prompts))
    require_prompts(config)
    if config.recipe in ANALYTIC_RECIPES:
        captions = make_world(ANALYTIC_RECIPES[config.recipe]).captions()
        return Prompts(texts=[captions[index % len(captions)] for index in range(config.num_captions)])
    rng = np.random.default_rng(config.seed)
    # One and two objects in turn, as in the evaluation: two take longer to learn and are fewer in the world.
    return Prompts(texts=[sample_caption(rng, "train", 1 + index % 2) for index in range(config.num_captions)])


def require_prompts(config: DistillConfig) -> None:
    """Refuse a run that names no prompts and whose recipe has no captions of its own.

    Raises:
        ConfigError: names the key.
    """
    if not config.prompts and config.recipe not in (*CAPTIONED_RECIPES, *ANALYTIC_RECIPES):
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
        width = int(base.transformer_entry("text_dim"))
        prompts = Prompts(texts=[sample.text for path in shards for sample in shard_samples(path, width)])
    else:
        prompts = read_prompts(config)
    counts = {"prompts": len(prompts.texts), "duplicates": prompts.num_duplicates, "dropped": prompts.num_blank}
    return dict(counts)


def caption_grammar(config: DistillConfig) -> Grammar | None:
    """Return the grammar that all training prompts are captions of; None when they come from a file or have none."""
    return None if config.prompts or config.recipe not in CAPTIONED_RECIPES else grammar()


def cached_prompt_data(
    config: DistillConfig,
    base: Base,
    cache_dir: Path,
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
    latent_shape: tuple[int, ...] = (),
) -> PromptData:
    """Return the training prompts with their embeddings, packing them in the cache unless it has them.

    Args:
        config: names prompts, negative prompt and text_dtype.
        base: whose text encoder embeds what comes without embeddings.
        cache_dir: seen by all processes; packed samples are looked for and written there.
        device: where the text encoder runs if it has to; it is gone on return.
        processes: of the run; each packs its share. All of them call this.
        latent_shape: (C, F, H, W) of the latents that the method trains on; empty where it needs none. Latents of the
            samples are used where there are any.

    Raises:
        ConfigError: the prompts cannot be read, or their latents are of another shape.
        CheckpointError: the text encoder or packed samples cannot be loaded.
    """
    packing = Packing(config=config, base=base, cache_dir=cache_dir, device=device, processes=processes)
    shards, folder = shard_paths(config.prompts), Path(config.prompts)
    if not shards and not (config.prompts and is_packed_set(folder)):
        read = processes.on_all_ranks(lambda: read_prompts(config))
        return _embedded(read.texts, base, packing, read.num_blank)
    if shards:
        packed = packing.packed_shards(shards, latent_shape)
    else:
        packed = processes.on_all_ranks(lambda: open_set(folder))
        _check_layout(packed, base, latent_shape)
    negative, *_ = packing.encoded([config.negative_prompt])
    own = negative.embeds(0)
    size = len(packed)
    has_latents = bool(latent_shape) and bool(packed.layout.latent_shape)
    data = PromptData(
        num_prompts=size,
        rows=lambda index: own if index == size else packed.embeds(index),
        text=packed.text,
        latents=packed.latents if has_latents else None,
        content=packed.content,
    )
    latents = f" latents={'x'.join(map(str, packed.layout.latent_shape))}" if has_latents else ""
    return replace(data, report=f"samples={size} from={packed.source} longest={packed.longest()}{latents}")


def embed_texts(
    texts: list[str],
    config: DistillConfig,
    base: Base,
    cache_dir: Path,
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
) -> PromptData:
    """Return prompts that a run does not train on, as those of validation, with their embeddings.

    Args and errors are those of `cached_prompt_data`.
    """
    packing = Packing(config=config, base=base, cache_dir=cache_dir, device=device, processes=processes)
    return _embedded(texts, base, packing)


def _embedded(texts: list[str], base: Base, packing: Packing, num_blank: int = 0) -> PromptData:
    negative = packing.config.negative_prompt
    known = base.caption_embeds([*texts, negative])
    if known is not None:
        return _known_prompts(texts, known, negative)
    encoded, order, num_cut = packing.encoded([*texts, negative])
    return PromptData(
        num_prompts=len(texts),
        rows=lambda index: encoded.embeds(order[index]),
        text=texts.__getitem__,
        content=_content(texts, negative),
        num_cut=num_cut,
        report=_report(texts, num_blank, num_cut, encoded.longest(set(order[:-1]))),
    )


def _known_prompts(texts: list[str], embeds: list[Tensor], negative_prompt: str) -> PromptData:
    """Make data of prompts that the base knows without a text encoder; the negative prompt is the last embedding."""
    return PromptData(
        num_prompts=len(texts),
        rows=embeds.__getitem__,
        text=texts.__getitem__,
        content=_content(texts, negative_prompt),
        report=_report(texts, 0, 0, max(map(len, embeds))),
    )


def _content(texts: list[str], negative_prompt: str) -> str:
    """Digest the texts: encoded again on another machine, the last bits of their embeddings can differ."""
    return hashlib.sha256(json.dumps([*texts, negative_prompt]).encode()).hexdigest()


def _check_layout(packed: PackedSet, base: Base, latent_shape: tuple[int, ...]) -> None:
    width, found = int(base.transformer_entry("text_dim")), packed.layout.latent_shape
    if packed.layout.width != width:
        raise ConfigError(f"{packed.folder} has embeddings of width {packed.layout.width}, the teacher reads {width}")
    if latent_shape and found and found != latent_shape:
        raise ConfigError(
            f"{packed.folder} has latents {found}, the run trains on {latent_shape}: they are of another VAE, size or "
            "number of frames"
        )


def _report(texts: list[str], num_blank: int, num_cut: int, longest: int) -> str:
    """Say in one line what a run trains on."""
    return f"prompts={len(texts)} distinct={len(set(texts))} dropped={num_blank} cut={num_cut} longest={longest}"
