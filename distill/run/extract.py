"""A trained student as a low-rank update of its base: a file a tenth of its size, for whoever has the base.

DIR     an adapter folder; `codmd-serve convert` makes a bundle of it, diffusers' `load_lora_weights` reads it

Knows no training run: any bundle of the base's architecture will do.

Legend: O rows and I columns of a layer, R rank.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from codmd_serve.device import DTYPES_BY_NAME
from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import first_line
from codmd_serve.grammar import Grammar
from codmd_serve.wan.checkpoint import LORA_FILE, StudentSpec, read_spec, resolve_base, save_adapter
from distill.networks.lora import diffusers_lora
from distill.run.adapters import lora_header

# A whole decomposition of the layers of Wan2.1-14B takes hours, one of the leading R directions minutes.
MAX_WHOLE_SIDE = 1024
OVERSAMPLING, POWER_ITERATIONS = 16, 6


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """A low-rank update.

    Attributes:
        tensors: under diffusers' names, float32.
        kept: its share of the squared change from base to student, over all parameters.
        spec: of the student.
    """

    tensors: dict[str, Tensor]
    kept: float
    spec: StudentSpec


def low_rank_update(bundle: Path, rank: int) -> LowRank:
    """Return the update of rank R that is closest to what training did to each linear layer.

    Args:
        bundle: of a student; its base must be there. Both are read tensor by tensor.
        rank: R; of a layer with a smaller side, that side.

    Raises:
        ConfigError: a rank below 1.
        CheckpointError: bundle or base are missing, damaged, not finite or of different layouts, or do not differ.

    Source: Eckart and Young 1936: the leading R singular directions are the closest of that rank.
    """
    if rank < 1:
        raise ConfigError(f"--rank must be 1 or more, got {rank}")
    spec = read_spec(bundle)
    students, bases = _places(bundle), _places(resolve_base(bundle, spec.base))
    if students.keys() != bases.keys():
        odd = min(students.keys() ^ bases.keys())
        raise CheckpointError(f"{bundle} is not of its base's layout: one of them alone has {odd}")
    adapters, total, kept = dict[str, Tensor](), 0.0, 0.0
    for name in sorted(students):
        student, base = (_read(places[name], name) for places in (students, bases))
        if student.shape != base.shape:
            raise CheckpointError(f"{name} of {bundle} is {tuple(student.shape)}, of its base {tuple(base.shape)}")
        change = student.float() - base.float()
        if not bool(change.isfinite().all()):
            raise CheckpointError(f"{name} of {bundle} or its base is not finite")
        total += float(change.square().sum())
        if change.ndim == 2 and name.endswith(".weight"):
            up, down = _leading(change, rank)
            kept += float((up.square().sum(0) * down.square().sum(1)).sum())
            module = name.removesuffix(".weight")
            adapters |= {f"{module}.lora_up": up, f"{module}.lora_down": down}
    if total == 0:
        raise CheckpointError(f"{bundle} has the weights of its base: nothing to extract")
    return LowRank(tensors=diffusers_lora(adapters, 1.0), kept=kept / total, spec=spec)


def _leading(change_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return up (O, R) and down (R, I), of equal size in each direction; up @ down is the closest of that rank."""
    rank = min(rank, *change_OI.shape)
    if min(change_OI.shape) <= MAX_WHOLE_SIDE:
        left, sizes, right = torch.linalg.svd(change_OI, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            count = min(rank + OVERSAMPLING, *change_OI.shape)
            left, sizes, columns = torch.svd_lowrank(change_OI, q=count, niter=POWER_ITERATIONS)
            right = columns.mT
    roots = sizes[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def _places(pipeline: Path) -> dict[str, Path]:
    """Map the parameters of a transformer to the files that hold them."""
    files = sorted((pipeline / "transformer").glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{pipeline} has no transformer/*.safetensors")
    places: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    return places


def _read(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{name} of {path} cannot be read: {first_line(error)}") from error
    return tensor


def write_low_rank(folder: Path, bundle: Path, update: LowRank, rank: int, dtype: str) -> Path:
    """Write an update as an adapter folder, whole or not at all; return its file of tensors.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    base, spec = resolve_base(bundle, update.spec.base), update.spec
    if (bundle / spec.base).is_dir():
        spec = replace(spec, base=os.path.relpath(base.resolve(), folder.resolve()))
    tensors = {name: tensor.to(DTYPES_BY_NAME[dtype]).contiguous() for name, tensor in update.tensors.items()}
    save_adapter(folder, tensors, lora_header(rank, spec), spec, Grammar.load(bundle))
    return folder / LORA_FILE
