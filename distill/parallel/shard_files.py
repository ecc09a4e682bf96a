"""Storage of torch.distributed.checkpoint: one safetensors file per rank and a JSON index; no pickle anywhere.

Knows neither networks nor the training loop; torch plans which rank writes and reads which part of a tensor.

FOLDER/shard-00000.safetensors     the parts that rank 0 held, one entry NAME@OFFSETS per part
FOLDER/index.json                  where every part of every tensor lies, the size of every file, and plain values

Reads go straight into the target with `readinto`, through a buffer of BUFFER_BYTES where it is on a GPU. A reader never
maps a file, so the pages of a shard do not count as its own memory.
"""

import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from codmd_serve.errors import CheckpointError
from codmd_serve.files import first_line, write_json
from codmd_serve.textfiles import read_json_object

INDEX_FILE = "index.json"
INDEX_FORMAT = 1
# The largest host buffer of a read or write to a device; a CPU tensor is read and written in place.
BUFFER_BYTES = 16 << 20
# safetensors' names of the dtypes that a training state has.
DTYPE_NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A box of a tensor in a file.

    Attributes:
        offsets, sizes: of the box in the tensor.
        file: its name in the folder.
        start: first byte of the box in the file; its elements lie contiguous from there.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint: dtype, global size, and the parts that make it up."""

    dtype: torch.dtype
    size: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """What index.json holds.

    Attributes:
        tensors: by name.
        values: plain JSON values that were saved beside the tensors.
    """

    folder: Path
    tensors: dict[str, StoredTensor]
    values: dict[str, Any]

    def read(self, name: str) -> Tensor:
        """Read one whole tensor to the CPU.

        Raises:
            CheckpointError: it is not there, or a shard cannot be read.
        """
        if name not in self.tensors:
            raise CheckpointError(f"checkpoint {self.folder} has no tensor {name}")
        stored = self.tensors[name]
        whole, scratch = torch.empty(stored.size, dtype=stored.dtype), new_scratch()
        for part in stored.parts:
            box = tuple(slice(first, first + size) for first, size in zip(part.offsets, part.sizes, strict=True))
            with _opened(self.folder / part.file) as file:
                read_box(file, part, (0,) * len(part.sizes), part.sizes, whole[box], scratch)
        return whole


class ShardWriter(StorageWriter):
    """Writes this rank's parts as one safetensors file, and on rank 0 the index.

    Args:
        folder: an empty folder that all ranks see.
        rank: of this process.
        values: plain JSON values for the index.
        commit: called on rank 0 when everything is written and flushed; an error in it fails the save on all ranks.
    """

    def __init__(self, folder: Path, rank: int, values: dict[str, Any], commit: Callable[[], None]) -> None:
        self.folder, self.rank, self.values, self.commit = folder, rank, values, commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        """Write and flush this rank's file."""
        tensors = [(item.index, item.tensor_data) for item in plan.items]
        name, header, starts = f"shard-{self.rank:05d}.safetensors", {}, []
        position = 0
        for index, data in tensors:
            assert data is not None
            sizes = tuple(data.chunk.sizes)
            num_bytes = math.prod(sizes) * data.properties.dtype.itemsize
            where = ",".join(map(str, data.chunk.offsets))
            header[f"{index.fqn}@{where}"] = {
                "dtype": _NAMES[data.properties.dtype],
                "shape": sizes,
                "data_offsets": [position, position + num_bytes],
            }
            starts.append(position)
            position += num_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        data_start = 8 + len(text)
        results = []
        # Unbuffered: a buffer would copy what lies in memory already.
        with (self.folder / name).open("wb", buffering=0) as file:
            write_all(file, memoryview(len(text).to_bytes(8, "little") + text))
            for item, start in zip(plan.items, starts, strict=True):
                value = planner.resolve_data(item)
                assert isinstance(value, Tensor)
                write_all(file, bytes_of(value.detach().cpu().contiguous()))
                place = (name, data_start + start)
                results.append(WriteResult(index=item.index, size_in_bytes=value.nbytes, storage_data=place))
            os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index on rank 0, then commit the folder."""
        places = {result.index: result.storage_data for rank in results for result in rank}
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            parts = []
            for chunk in stored.chunks:
                file, start = places[MetadataIndex(name, chunk.offsets)]
                parts.append([list(chunk.offsets), list(chunk.sizes), file, start])
            dtype = _NAMES[stored.properties.dtype]
            tensors[name] = {"dtype": dtype, "size": list(stored.size), "parts": parts}
        files = {path.name: path.stat().st_size for path in sorted(self.folder.glob("shard-*.safetensors"))}
        index = {"format": INDEX_FORMAT, "values": self.values, "files": files, "tensors": tensors}
        write_json(self.folder / INDEX_FILE, index, indent=None)
        self.commit()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this storage takes such an id: any path."""
        del checkpoint_id
        return True


class ShardReader(StorageReader):
    """Reads the parts of the files that a rank's plan asks for."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index in torch's form."""
        del args, kwargs
        return Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=stored.dtype),
                    size=torch.Size(stored.size),
                    chunks=[
                        ChunkStorageMetadata(offsets=torch.Size(part.offsets), sizes=torch.Size(part.sizes))
                        for part in stored.parts
                    ],
                )
                for name, stored in self.index.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the index is read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan in the order of the files, so that a disk reads forwards."""
        return replace(plan, items=sorted(plan.items, key=lambda item: self._place(item.storage_index)))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Read this rank's parts into its tensors."""
        scratch = new_scratch()
        for file_name, items in itertools.groupby(plan.items, key=lambda item: self._place(item.storage_index)[0]):
            with _opened(self.index.folder / file_name) as file:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    read_box(file, self._part(item.storage_index), item.storage_offsets, item.lengths, target, scratch)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this storage takes such an id: any path."""
        del checkpoint_id
        return True

    def _part(self, index: MetadataIndex) -> Part:
        wanted = tuple(index.offset or ())
        return next(part for part in self.index.tensors[index.fqn].parts if part.offsets == wanted)

    def _place(self, index: MetadataIndex) -> tuple[str, int]:
        part = self._part(index)
        return part.file, part.start


def read_index(folder: Path) -> ShardIndex:
    """Read index.json and check that every shard is there in full length.

    Raises:
        CheckpointError: the index is damaged, a newer version wrote it, or a shard is missing or truncated; the message
            names the file.
    """
    path = folder / INDEX_FILE
    data = read_json_object(path, CheckpointError)
    remedy = f"delete {folder.name} to go on from an older checkpoint"
    if data.get("format") != INDEX_FORMAT:
        raise CheckpointError(
            f"{path} is of format {data.get('format')!r}, expected {INDEX_FORMAT}: update this version"
        )
    try:
        files = {str(name): int(size) for name, size in data["files"].items()}
        tensors = {str(name): _stored(entry) for name, entry in data["tensors"].items()}
        values = dict(data["values"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}; {remedy}") from error
    for name, size in files.items():
        shard = folder / Path(name).name
        found = shard.stat().st_size if shard.is_file() else None
        if found is None:
            raise CheckpointError(f"checkpoint {folder} lacks {name}; {remedy}")
        if found != size:
            raise CheckpointError(f"{shard} is truncated: it has {found} bytes, expected {size}; {remedy}")
    for name, stored in tensors.items():
        _check_parts(folder, name, stored, files, remedy)
    return ShardIndex(folder=folder, tensors=tensors, values=values)


def _stored(entry: dict[str, Any]) -> StoredTensor:
    parts = tuple(
        Part(offsets=tuple(map(int, offsets)), sizes=tuple(map(int, sizes)), file=str(file), start=int(start))
        for offsets, sizes, file, start in entry["parts"]
    )
    return StoredTensor(dtype=DTYPE_NAMES[entry["dtype"]], size=tuple(map(int, entry["size"])), parts=parts)


def _check_parts(folder: Path, name: str, stored: StoredTensor, files: dict[str, int], remedy: str) -> None:
    num_elements = 0
    for part in stored.parts:
        num_bytes = math.prod(part.sizes) * stored.dtype.itemsize
        num_elements += math.prod(part.sizes)
        is_inside = len(part.offsets) == len(part.sizes) == len(stored.size) and all(
            min(first, size) >= 0 and first + size <= whole
            for first, size, whole in zip(part.offsets, part.sizes, stored.size, strict=True)
        )
        if part.file not in files or not is_inside or not 0 <= part.start <= files[part.file] - num_bytes:
            raise CheckpointError(f"{folder / INDEX_FILE} is damaged at {name}; {remedy}")
    if num_elements != math.prod(stored.size):
        raise CheckpointError(f"{folder / INDEX_FILE} is damaged: {name} is not complete; {remedy}")


def _opened(path: Path) -> io.FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def new_scratch() -> Tensor:
    """Return the buffer of `read_box`; memory that no read needs is never touched."""
    return torch.empty(BUFFER_BYTES, dtype=torch.uint8)


def read_box(
    file: io.FileIO, part: Part, offsets: Iterable[int], lengths: Iterable[int], target: Tensor, scratch: Tensor
) -> None:
    """Read a box of a part into a tensor of its shape, on any device.

    Args:
        file: of the part.
        part: where it lies.
        offsets, lengths: of the box in the part.
        target: written in place.
        scratch: from `new_scratch`, for a target that no file can be read into: on a GPU, or not contiguous.

    Raises:
        CheckpointError: the file ends before the box does.
    """
    first, size = tuple(offsets), tuple(lengths)
    # The last dimension of which only a part is wanted; behind it everything lies contiguous.
    cut = max((dim for dim, whole in enumerate(part.sizes) if size[dim] != whole), default=0)
    strides = [math.prod(part.sizes[dim + 1 :]) for dim in range(len(part.sizes))]
    for outer in itertools.product(*(range(length) for length in size[:cut])):
        where = [*map(sum, zip(first, outer, strict=False)), *first[cut:]]
        element = sum(place * stride for place, stride in zip(where, strides, strict=True))
        file.seek(part.start + element * target.dtype.itemsize)
        _read_into(file, target[outer], scratch)


def _read_into(file: io.FileIO, target: Tensor, scratch: Tensor) -> None:
    if target.is_contiguous() and target.device.type == "cpu":
        _read_all(file, bytes_of(target))
        return
    rows = target.reshape(-1) if target.is_contiguous() else target
    row_bytes = math.prod(rows.shape[1:]) * rows.dtype.itemsize
    num_rows = max(len(scratch) // row_bytes, 1)
    for block in torch.split(rows, num_rows):
        # A row that is larger than the scratch, as that of a tensor with one row, gets memory of its own.
        own = scratch if block.nbytes <= len(scratch) else torch.empty(block.nbytes, dtype=torch.uint8)
        bytes_read = own[: block.nbytes]
        _read_all(file, bytes_of(bytes_read))
        block.copy_(bytes_read.view(block.dtype).view(block.shape))


def _read_all(file: io.FileIO, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{file.name} ends too early: it is truncated")
        done += count


def write_all(file: io.FileIO, view: memoryview) -> None:
    """Write all bytes: a raw file may take a part of them, as at the end of a disk.

    Raises:
        OSError: the file cannot take them.
    """
    done = 0
    while done < len(view):
        done += file.write(view[done:])


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes; writes go to the tensor."""
    # Not reshape, which keeps any stride of a dimension of size 1.
    flat: Any = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    return memoryview(flat)
