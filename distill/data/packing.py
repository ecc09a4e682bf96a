"""Converts prompts and tar shards into packed samples, in all processes of a run, each its share.

Knows no training loop. Parts are fixed by the source and not by the number of processes, so a conversion that was
interrupted in four processes is finished by one, with the same bytes.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import UMT5EncoderModel

from codmd_serve.device import DTYPES_BY_NAME
from codmd_serve.errors import CheckpointError, CodmdError, ConfigError
from codmd_serve.files import first_line, leftovers
from codmd_serve.textfiles import read_json_object
from codmd_serve.wan.text import MAX_SEQUENCE_LENGTH, clean_prompt, encode_prompts
from distill.config import DistillConfig
from distill.data.packed import (
    INDEX_FILE,
    Layout,
    PackedSet,
    Sample,
    finish_set,
    holds_part,
    is_packed_set,
    open_set,
    write_part,
)
from distill.data.shards import has_latents, shard_samples
from distill.networks.base import Base
from distill.parallel.processes import Processes

PROMPTS_PER_CALL = 64
# Distinct prompts of a part: whole calls of the text encoder.
PROMPTS_PER_PART = 16 * PROMPTS_PER_CALL
HASHED_BYTES = 1 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """Where and for which run samples are packed; see `cached_prompt_data` for the fields."""

    config: DistillConfig
    base: Base
    cache_dir: Path
    device: torch.device
    processes: Processes

    def encoded(self, prompts: list[str]) -> tuple[PackedSet, list[int], int]:
        """Encode prompts with the text encoder of the base, each distinct one once.

        Returns:
            The set of distinct prompts, for each prompt its place in the set, and how many prompts but the last were
            cut to what the text encoder takes.

        Raises:
            CheckpointError: tokenizer or text encoder cannot be loaded.
            ConfigError: the cache cannot be written.
        """
        key = prompt_key(prompts, self.config, self.base)
        folder = self.cache_dir / f"prompts-{key[:16]}"
        layout = Layout(dtype=self.config.text_dtype, width=int(self.base.transformer_entry("text_dim")))
        packed = self._cached(folder)
        if packed is None:
            texts = self.processes.on_all_ranks(lambda: _Texts.read(prompts, self.base))
            num_parts = -(-len(texts.distinct) // PROMPTS_PER_PART)

            def parts(numbers: list[int]) -> Iterator[tuple[int, Iterator[Sample]]]:
                encoder = self.base.load(UMT5EncoderModel, "text_encoder", dtype=DTYPES_BY_NAME[layout.dtype])
                encoder.eval().to(self.device)
                for number in numbers:
                    yield number, texts.encode(number, encoder)

            facts = {"order": texts.order, "num_cut": texts.num_cut}
            packed = self._make(folder, num_parts, layout, f"{len(prompts) - 1} prompts", parts, facts)
        data = self.processes.on_all_ranks(lambda: read_json_object(folder / INDEX_FILE, CheckpointError))
        return packed, list(data["order"]), int(data["num_cut"])

    def packed_shards(self, shards: list[Path], latent_shape: tuple[int, ...]) -> PackedSet:
        """Pack tar shards with ready-made embeddings, one part for each.

        Raises:
            ConfigError: a shard that cannot be used, see `shard_samples`; or the cache cannot be written.
        """
        files = self.processes.on_all_ranks(lambda: [_file_facts(path) for path in shards])
        shape = latent_shape
        if latent_shape and not self.processes.broadcast_from_rank0(lambda: has_latents(shards[0])):
            shape = ()
        layout = Layout(
            dtype=self.config.text_dtype, width=int(self.base.transformer_entry("text_dim")), latent_shape=shape
        )
        identity = json.dumps([files, layout.dtype, layout.width, shape])
        folder = self.cache_dir / f"samples-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        packed = self._cached(folder)
        if packed is not None:
            return packed

        def parts(numbers: list[int]) -> Iterator[tuple[int, Iterator[Sample]]]:
            for number in numbers:
                yield number, shard_samples(shards[number], layout.width, shape)

        return self._make(folder, len(shards), layout, f"{len(shards)} shards", parts, {})

    def _cached(self, folder: Path) -> PackedSet | None:
        """Open a finished set on all ranks; one that is damaged is removed, to be made anew."""

        def look() -> bool:
            if not is_packed_set(folder):
                return False
            try:
                open_set(folder)
            except CheckpointError as error:
                logger.warning("packed samples made anew folder=%s reason=%s", folder.name, error)
                shutil.rmtree(folder)
                return False
            return True

        if not self.processes.broadcast_from_rank0(look):
            return None
        return self.processes.on_all_ranks(lambda: open_set(folder))

    def _make(
        self,
        folder: Path,
        num_parts: int,
        layout: Layout,
        source: str,
        parts: Callable[[list[int]], Iterator[tuple[int, Iterator[Sample]]]],
        facts: dict[str, Any],
    ) -> PackedSet:
        """Write the parts that are missing, each rank its share, and then the index."""
        processes = self.processes
        created: list[Path] = []

        def prepare() -> list[int]:
            created.extend(path for path in (folder, *folder.parents) if not path.exists())
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"packed samples {folder} cannot be written: {first_line(error)}") from error
            for unfinished in leftovers(folder):
                shutil.rmtree(unfinished, ignore_errors=True)
            return [number for number in range(num_parts) if not holds_part(folder, number)]

        missing = processes.broadcast_from_rank0(prepare)
        if processes.is_rank0:
            logger.info("packing %s parts=%d missing=%d folder=%s", source, num_parts, len(missing), folder.name)

        def write_share() -> None:
            own = missing[processes.rank :: processes.world_size]
            hidden = None if processes.is_rank0 else True
            for number, samples in tqdm(
                parts(own) if own else (), total=len(own), desc="packing", disable=hidden, dynamic_ncols=True
            ):
                write_part(folder, number, samples, layout)

        try:
            processes.on_all_ranks(write_share)
        except CodmdError:
            # Input that is refused leaves no folder behind, unless a part is there to go on from.
            for path in created:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise
        processes.on_rank0(lambda: finish_set(folder, num_parts, layout, source, **facts))
        return processes.on_all_ranks(lambda: open_set(folder))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Texts:
    """Distinct prompts in the order of their lengths, which is that of the parts.

    Attributes:
        distinct: cleaned prompt and number of positions.
        order: for each given prompt, its place in `distinct`.
    """

    tokenizer: Any
    distinct: list[tuple[str, int]]
    order: list[int]
    num_cut: int

    @classmethod
    def read(cls, prompts: list[str], base: Base) -> "_Texts":
        tokenizer = base.load_tokenizer()
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        num_tokens = [len(ids) for ids in tokenizer(cleaned).input_ids]
        lengths = [min(number, MAX_SEQUENCE_LENGTH) for number in num_tokens]
        # Equal prompts are encoded once, and prompts of similar length together: padding costs as much as text.
        distinct = sorted(dict(zip(cleaned, lengths, strict=True)).items(), key=lambda item: item[1])
        places = {text: place for place, (text, _) in enumerate(distinct)}
        return cls(
            tokenizer=tokenizer,
            distinct=distinct,
            order=[places[text] for text in cleaned],
            num_cut=sum(number > MAX_SEQUENCE_LENGTH for number in num_tokens[:-1]),
        )

    def encode(self, part: int, encoder: Any) -> Iterator[Sample]:
        """Yield the samples of one part."""
        first = part * PROMPTS_PER_PART
        for start in range(first, min(first + PROMPTS_PER_PART, len(self.distinct)), PROMPTS_PER_CALL):
            chunk = self.distinct[start : start + PROMPTS_PER_CALL]
            # The encoder masks padding, so embeddings do not depend on how much of it there is.
            texts, longest = [text for text, _ in chunk], max(chunk[-1][1], 1)
            embeds_BLD: Tensor = encode_prompts(self.tokenizer, encoder, texts, longest).cpu()
            for (text, length), embeds in zip(chunk, embeds_BLD, strict=True):
                yield Sample(text=text, embeds=embeds[:length])


def _file_facts(path: Path) -> list[Any]:
    """Tell a file from others, and from itself written anew, without reading it."""
    try:
        facts = path.stat()
    except OSError as error:
        raise ConfigError(f"prompts {path} cannot be read as a tar: {first_line(error)}") from error
    return [os.fspath(path.resolve()), facts.st_size, facts.st_mtime_ns]


def prompt_key(prompts: list[str], config: DistillConfig, base: Base) -> str:
    """Return a digest of prompts and of the base's text encoder."""
    digest = hashlib.sha256(json.dumps([prompts, config.text_dtype, None if base.is_local else base.source]).encode())
    for part in ("tokenizer", "text_encoder"):
        add_files(digest, sorted((base.folder / part).glob("*")))
    return digest.hexdigest()


def add_files(digest: "hashlib._Hash", paths: Iterable[Path]) -> None:
    """Let a digest tell files apart that have the same name and size, without reading 20 GB.

    A module trained anew keeps both, so the first and the last MiB of each file count as well.
    """
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(HASHED_BYTES))
            file.seek(max(path.stat().st_size - HASHED_BYTES, 0))
            digest.update(file.read(HASHED_BYTES))
