"""Tells whether the same request gives the same bytes, with the same and with other numbers of threads of this CPU."""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from codmd_serve.bench.lossy import capped_psnr_db, outputs
from codmd_serve.config import GenerateParams
from codmd_serve.cpu import processor_name
from codmd_serve.loading import load_engine

THREADS = (1, 2, 4)
DTYPES = ("float32", "bfloat16")
NUM_HEX = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeated:
    """One request, made twice by an engine with some number of threads.

    Attributes:
        threads, dtype: of network and VAE.
        latents, frames, file: hexadecimal SHA-256 of the predicted latents, the uint8 frames and the mp4.
        is_same: whether both files are equal.
        psnr_db: of the frames against those with the first number of threads; capped where they are equal.
    """

    threads: int
    dtype: str
    latents: str
    frames: str
    file: str
    is_same: bool
    psnr_db: float


def repeated(
    bundle: Path, params: GenerateParams, threads: Sequence[int] = THREADS, dtypes: Sequence[str] = DTYPES
) -> list[Repeated]:
    """Make one video twice per dtype and number of threads, each by an engine of its own.

    Args:
        bundle: folder.
        params: the request.
        threads: the first is what the others are compared with.
        dtypes: names.
    """
    before, rows = torch.get_num_threads(), list[Repeated]()
    try:
        for dtype in dtypes:
            first: Tensor | None = None
            for number in threads:
                engine = load_engine(bundle, "cpu", dtype, vae_dtype=dtype, threads=number)
                latents, frames = outputs(engine, params)
                first = frames if first is None else first
                with tempfile.TemporaryDirectory(prefix="codmd-repeat-") as folder:
                    files = [Path(folder) / f"{index}.mp4" for index in range(2)]
                    for file in files:
                        engine.generate(params, file)
                    digests = [_digest(file.read_bytes()) for file in files]
                rows.append(
                    Repeated(
                        threads=number,
                        dtype=dtype,
                        latents=_digest(latents.numpy().tobytes()),
                        frames=_digest(frames.numpy().tobytes()),
                        file=digests[0],
                        is_same=digests[0] == digests[1],
                        psnr_db=capped_psnr_db(frames, first),
                    )
                )
    finally:
        torch.set_num_threads(before)
    return rows


def thread_table(rows: Sequence[Repeated]) -> str:
    """Return the section of precision.md about threads."""
    lines = [
        "## Number of threads",
        "",
        f"SHA-256 of one request on {processor_name()}, made twice per row. The same number of threads gives the same",
        "bytes; another one sums in another order, and differs by what the last column says.",
        "",
        "| dtype | threads | latents | frames | mp4 | twice the same | frames against the first row |",
        "|---|---|---|---|---|---|---|",
    ]
    first = {row.dtype: row.frames for row in reversed(rows)}
    for row in rows:
        psnr = "equal" if row.frames == first[row.dtype] else f"{row.psnr_db:.1f} dB"
        digests = " | ".join(f"`{digest[:NUM_HEX]}`" for digest in (row.latents, row.frames, row.file))
        lines.append(f"| {row.dtype} | {row.threads} | {digests} | {'yes' if row.is_same else 'no'} | {psnr} |")
    return "\n".join(lines) + "\n"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
