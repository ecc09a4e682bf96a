"""Reads a student bundle without loading it: its hash, and the facts in its JSON files. No torch."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from codmd_serve.config import ModelFacts

# What decides a video; a log or a README beside it does not.
BUNDLE_PARTS = ("student.json", "world.json", "transformer")
SHARED_PARTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "vae")
SAMPLED_FROM_BYTES = 64 * 2**20
NUM_SAMPLES, SAMPLE_BYTES = 64, 2**16
# Wan's, for a VAE that does not say.
SPATIAL_FACTOR, TEMPORAL_FACTOR = 8, 4


def bundle_hash(bundle: Path) -> str:
    """Hash the content of a bundle and its base; equal folders on two machines have the same hash.

    Files above 64 MiB count by size and 64 evenly spaced samples: training changes weights everywhere, and reading
    tens of gigabytes would take a minute of every start.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    parts = [bundle / name for name in BUNDLE_PARTS]
    spec = _read_json(bundle / "student.json")
    base = spec.get("base")
    if isinstance(base, str) and 0 < len(base) < 1000:
        folder = _base_folder(bundle, base)
        if folder.is_dir():
            parts += [folder / name for name in SHARED_PARTS]
        else:
            digest.update(base.encode(errors="replace"))
    for part in parts:
        for path in [part] if part.is_file() else sorted(path for path in part.rglob("*") if path.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(part.parent)}\0{size}\0".encode(errors="surrogateescape"))
            _add_content(digest, path, size)
    return digest.hexdigest()


def _add_content(digest: Any, path: Path, size: int) -> None:
    with path.open("rb") as file:
        if size <= SAMPLED_FROM_BYTES:
            while chunk := file.read(2**20):
                digest.update(chunk)
            return
        for number in range(NUM_SAMPLES):
            file.seek(number * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))


def declared_facts(bundle: Path) -> ModelFacts | None:
    """Return the facts that validate requests while the engine loads; None when the bundle lacks them or is broken.

    The loaded engine's own replace them; what only a device knows (`device`, `service_s`, `max_video_px` ...) is empty.
    """
    spec, config = _read_json(bundle / "student.json"), _read_json(bundle / "transformer" / "config.json")
    try:
        base = _base_folder(bundle, spec["base"])
        if not base.is_dir():
            return None  # a hub id: its VAE may compress differently
        vae = _read_json(base / "vae" / "config.json")
        spatial = vae.get("scale_factor_spatial", SPATIAL_FACTOR)
        temporal = vae.get("scale_factor_temporal", TEMPORAL_FACTOR)
        side_px = spatial * config["patch_size"][1]
        positions = config.get("rope_max_seq_len", 1024)
        native = {name: spec["native"][name] for name in ("height", "width", "num_frames", "fps")}
        if any(type(value) is not int or value < 1 for value in (*native.values(), side_px, temporal, positions)):
            return None
        return ModelFacts(
            name=bundle.resolve().name,
            device="",
            dtype="",
            attention="",
            execution="",
            num_steps=len(spec["timesteps"]),
            size_multiple=math.lcm(16, side_px),
            max_side_px=positions * side_px,
            frame_multiple=temporal,
            max_num_frames=(positions - 1) * temporal + 1,
            service_s=0.0,
            load_s=0.0,
            **_described(bundle),
            **native,
        )
    except (KeyError, TypeError, IndexError, OSError, ValueError):
        return None


def _described(bundle: Path) -> dict[str, Any]:
    """`about` and `examples` of the bundle's grammar, where it has one."""
    world = _read_json(bundle / "world.json")
    about, examples = world.get("about"), world.get("examples")
    is_list = isinstance(examples, list) and all(isinstance(example, str) for example in examples)
    return {"about": about if isinstance(about, str) else "", "examples": tuple(examples or ()) if is_list else ()}


def _base_folder(bundle: Path, base: str) -> Path:
    return Path(os.path.normpath(bundle.resolve() / base))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
