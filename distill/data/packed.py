"""Packed sets of samples: prompts, embeddings and latents in parts on disk, read one sample at a time.

Knows neither networks nor where the samples come from. A part is written whole or not at all, so several processes can
make a set together and an interrupted one goes on at the part it was at. Opening a set reads its index alone. Of a part
that is read, the files stay open and the offsets of its rows in memory: 8 bytes for each sample of MAX_OPEN parts.

FOLDER/00000/embeds.bin            rows of all embeddings of part 0, one after the other
FOLDER/00000/latents.bin           its latents (C, F, H, W), one after the other, where the set has latents
FOLDER/00000/samples.safetensors   offsets of the rows, texts and what a sample is called
FOLDER/index.json                  written last: sizes of all parts, dtype and shapes, and a digest of the content

Legend: L rows of an embedding, D its width, C channels, F latent frames, H and W latent rows and columns.
"""

import bisect
import hashlib
import itertools
import json
import math
import os
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import atomic_folder, first_line, write_json
from codmd_serve.textfiles import read_json_object

INDEX_FILE = "index.json"
KIND = "codmd packed samples"
FORMAT = 1
EMBEDS_FILE, LATENTS_FILE, SAMPLES_FILE = "embeds.bin", "latents.bin", "samples.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Parts that a process keeps open, two files each: well below the descriptors that it may have.
MAX_OPEN = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sample to pack.

    Attributes:
        text: its prompt.
        embeds: (L, D) without padding.
        latents: (C, F, H, W), or None in a set without latents.
    """

    text: str
    embeds: Tensor
    latents: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What all samples of a set have in common.

    Attributes:
        dtype: fp32 or bf16, of embeddings and latents on disk.
        width: of the embeddings.
        latent_shape: (C, F, H, W); empty without latents.
    """

    dtype: str
    width: int
    latent_shape: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PackedSet:
    """A finished set.

    Attributes:
        sizes: number of samples of each part.
        rows: number of embedding rows of each part.
        content: digest of texts, embeddings and latents in their order.
        source: what the set was made from, in words.
    """

    folder: Path
    layout: Layout
    sizes: tuple[int, ...]
    rows: tuple[int, ...]
    content: str
    source: str

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate(self.sizes, initial=0))

    @cached_property
    def _opened(self) -> "Callable[[int], _Part]":
        folder = self.folder  # no cycle: the files are closed when the set goes
        return lru_cache(maxsize=MAX_OPEN)(lambda number: _Part(part_folder(folder, number)))

    def embeds(self, index: int) -> Tensor:
        """Return the embedding (L, D) of a sample.

        Raises:
            CheckpointError: its part is gone or damaged, or a value is not finite.
        """
        number, row = self._place(index)
        part = part_folder(self.folder, number)
        try:
            first, last = self._opened(number).offsets[row : row + 2].tolist()
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"sample {index} cannot be read from {part}: {first_line(error)}") from error
        return self._read(number, EMBEDS_FILE, index, first, (last - first, self.layout.width))

    def latents(self, index: int) -> Tensor:
        """Return the latents (C, F, H, W) of a sample; raises as `embeds`."""
        number, row = self._place(index)
        shape = self.layout.latent_shape
        rows = self._read(number, LATENTS_FILE, index, row * shape[0], (shape[0], math.prod(shape[1:])))
        return rows.reshape(shape)

    def text(self, index: int) -> str:
        """Return the prompt of a sample; raises as `embeds`."""
        number, row = self._place(index)
        part = part_folder(self.folder, number)
        try:
            with safe_open(part / SAMPLES_FILE, framework="pt") as file:
                first, last = file.get_slice("text_offsets")[row : row + 2].tolist()
                text: Tensor = file.get_slice("texts")[first:last]
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"sample {index} cannot be read from {part}: {first_line(error)}") from error
        return bytes(text.numpy()).decode()

    def texts(self) -> Iterator[str]:
        """Yield all prompts; raises as `embeds`."""
        for number in range(len(self.sizes)):
            path = part_folder(self.folder, number) / SAMPLES_FILE
            try:
                with safe_open(path, framework="pt") as file:
                    data, bounds = file.get_tensor("texts").numpy().tobytes(), file.get_tensor("text_offsets").tolist()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
            yield from (data[first:last].decode() for first, last in itertools.pairwise(bounds))

    def longest(self, among: Container[int] | None = None) -> int:
        """Return the most rows of an embedding; reads the offsets of all parts, and keeps none."""
        most = 0
        for number, start in enumerate(self._starts[:-1]):
            path = part_folder(self.folder, number) / SAMPLES_FILE
            try:
                with safe_open(path, framework="pt") as file:
                    lengths = file.get_tensor("offsets").diff().tolist()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
            most = max(most, *(size for row, size in enumerate(lengths) if among is None or start + row in among), 0)
        return most

    def _place(self, index: int) -> tuple[int, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def _read(self, number: int, name: str, index: int, first_row: int, shape: tuple[int, int]) -> Tensor:
        read = torch.empty(shape, dtype=DTYPES[self.layout.dtype])
        path = part_folder(self.folder, number) / name
        try:
            self._opened(number).read(name, first_row * shape[1] * read.itemsize, read)
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"sample {index} cannot be read from {path}: {first_line(error)}") from error
        if not bool(read.isfinite().all()):
            raise CheckpointError(f"sample {index} in {path} is not finite: delete {path.parent} to have it made anew")
        return read


class _Part:
    """A part that stays open, so that reading a sample costs a call of the system and not a file opened twice.

    Attributes:
        offsets: int64 (samples + 1,) first embedding row of each sample.

    Raises:
        OSError, SafetensorError, ValueError: it is gone or damaged.
    """

    def __init__(self, folder: Path) -> None:
        with safe_open(folder / SAMPLES_FILE, framework="pt") as file:
            self.offsets: Tensor = file.get_tensor("offsets")
        self._folder = folder
        self._descriptors: dict[str, int] = {}

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fill a contiguous tensor with the bytes of a file from `start` on; raises OSError, ValueError."""
        if not into.numel():
            return
        if name not in self._descriptors:
            self._descriptors[name] = os.open(self._folder / name, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptors[name])
        # Not a memory map: what was read would count as resident.
        count = os.preadv(self._descriptors[name], [into.view(torch.uint8).numpy().data], start)
        if count != into.nbytes:
            raise ValueError(f"{into.nbytes} bytes wanted at {start}, {count} there")


def part_folder(folder: Path, number: int) -> Path:
    """Return the folder of a part."""
    return folder / f"{number:05d}"


def holds_part(folder: Path, number: int) -> bool:
    """Return whether a part has been written; a part of that name is whole."""
    return part_folder(folder, number).is_dir()


def write_part(folder: Path, number: int, samples: Iterable[Sample], layout: Layout) -> None:
    """Write one part, whole or not at all; its samples are taken one by one and not kept.

    Raises:
        ConfigError: it cannot be written.
        Exception: what `samples` raises.
    """
    dtype = DTYPES[layout.dtype]
    offsets, texts, digest = [0], [], hashlib.sha256()
    try:
        with atomic_folder(part_folder(folder, number)) as fresh:
            with (fresh / EMBEDS_FILE).open("wb") as embeds, (fresh / LATENTS_FILE).open("wb") as latents:
                for sample in samples:
                    assert sample.embeds.shape[1] == layout.width
                    parts = [(embeds, sample.embeds)]
                    if layout.latent_shape:
                        assert sample.latents is not None and tuple(sample.latents.shape) == layout.latent_shape
                        parts.append((latents, sample.latents))
                    for file, tensor in parts:
                        data = tensor.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data
                        file.write(data)
                        digest.update(data)
                    offsets.append(offsets[-1] + len(sample.embeds))
                    texts.append(sample.text.encode())
            if not layout.latent_shape:
                (fresh / LATENTS_FILE).unlink()
            digest.update(json.dumps([offsets, [text.decode() for text in texts]]).encode())
            save_file(
                {
                    "offsets": torch.tensor(offsets),
                    "text_offsets": torch.tensor([0, *itertools.accumulate(map(len, texts))]),
                    "texts": torch.tensor(list(b"".join(texts)), dtype=torch.uint8),
                },
                fresh / SAMPLES_FILE,
                metadata={"digest": digest.hexdigest()},
            )
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"packed samples {folder} cannot be written: {first_line(error)}") from error


def finish_set(folder: Path, num_parts: int, layout: Layout, source: str, **facts: Any) -> None:
    """Write the index of a set whose parts are all there.

    Args:
        folder: of the set.
        num_parts: of the set.
        layout: of the set.
        source: what it was made from, in words.
        facts: further JSON values that `open_set` does not read.

    Raises:
        CheckpointError: a part is missing or damaged.
        ConfigError: the index cannot be written.
    """
    sizes, rows = [], []
    digest = hashlib.sha256(json.dumps([layout.dtype, layout.width, layout.latent_shape]).encode())
    for number in range(num_parts):
        path = part_folder(folder, number) / SAMPLES_FILE
        try:
            with safe_open(path, framework="pt") as file:
                offsets = file.get_tensor("offsets")
                sizes.append(len(offsets) - 1)
                rows.append(int(offsets[-1]))
                digest.update((file.metadata() or {})["digest"].encode())
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}; delete {path.parent}") from error
    index = {
        "kind": KIND,
        "format": FORMAT,
        "dtype": layout.dtype,
        "width": layout.width,
        "latent_shape": list(layout.latent_shape),
        "sizes": sizes,
        "rows": rows,
        "content": digest.hexdigest(),
        "source": source,
        **facts,
    }
    try:
        write_json(folder / INDEX_FILE, index)
    except OSError as error:
        raise ConfigError(f"packed samples {folder} cannot be written: {first_line(error)}") from error


def is_packed_set(folder: Path) -> bool:
    """Return whether a folder is a finished set."""
    return (folder / INDEX_FILE).is_file()


def open_set(folder: Path) -> PackedSet:
    """Open a finished set; reads the index and looks at the size of every file.

    Raises:
        CheckpointError: the index is damaged, a newer version wrote it, or a part is missing or truncated.
    """
    path = folder / INDEX_FILE
    data = read_json_object(path, CheckpointError)
    if data.get("kind") != KIND or data.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no index of packed samples of format {FORMAT}")
    try:
        layout = Layout(
            dtype=str(data["dtype"]), width=int(data["width"]), latent_shape=tuple(map(int, data["latent_shape"]))
        )
        sizes, rows = (tuple(map(int, data[name])) for name in ("sizes", "rows"))
        content, source = str(data["content"]), str(data["source"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error
    if (
        layout.dtype not in DTYPES
        or min((layout.width, *layout.latent_shape, *sizes, 1)) < 1
        or len(rows) != len(sizes)
    ):
        raise CheckpointError(f"{path} is damaged: sizes must be 1 or more")
    for number, (size, num_rows) in enumerate(zip(sizes, rows, strict=True)):
        _check_part(part_folder(folder, number), size, num_rows, layout)
    return PackedSet(folder=folder, layout=layout, sizes=sizes, rows=rows, content=content, source=source)


def _check_part(part: Path, size: int, num_rows: int, layout: Layout) -> None:
    remedy = f"delete {part.parent} to have it made anew"
    numbers = {EMBEDS_FILE: num_rows * layout.width, SAMPLES_FILE: None}
    if layout.latent_shape:
        numbers[LATENTS_FILE] = size * math.prod(layout.latent_shape)
    for name, number in numbers.items():
        path = part / name
        if not path.is_file():
            raise CheckpointError(f"packed samples {part} lack {name}; {remedy}")
        if number is not None and path.stat().st_size != number * DTYPES[layout.dtype].itemsize:
            raise CheckpointError(
                f"{path} is truncated: it has {path.stat().st_size} bytes, expected "
                f"{number * DTYPES[layout.dtype].itemsize}; {remedy}"
            )
