"""Packed samples: the same values as their source, whole parts or none, shared work, and no resident memory."""

import gc
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from codmd_serve.errors import CheckpointError, ConfigError
from distill.config import DistillConfig, config_to_dict, with_overrides
from distill.data import packing
from distill.data.packed import Layout, Sample, finish_set, holds_part, open_set, part_folder, write_part
from distill.data.prompts import PromptData, cached_prompt_data
from distill.networks.base import open_base

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
WIDTH, SHAPE = 16, (4, 3, 2, 2)


def samples(count: int, seed: int = 0) -> list[Sample]:
    rng = torch.Generator().manual_seed(seed)
    return [
        Sample(
            text=f"prompt {index} \N{SNOWMAN}",
            embeds=torch.randn((1 + index % 4, WIDTH), generator=rng),
            latents=torch.randn(SHAPE, generator=rng),
        )
        for index in range(count)
    ]


def packed_folder(folder: Path, parts: list[list[Sample]], dtype: str = "fp32", latents: bool = True) -> Path:
    layout = Layout(dtype=dtype, width=WIDTH, latent_shape=SHAPE if latents else ())
    for number, part in enumerate(parts):
        write_part(folder, number, part, layout)
    finish_set(folder, len(parts), layout, "a test")
    return folder


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("bf16", 4e-3)])
def test_samples_come_back_as_they_were(tmp_path: Path, dtype: str, tolerance: float) -> None:
    given = samples(7)
    packed = open_set(packed_folder(tmp_path / "set", [given[:3], given[3:]], dtype))
    assert len(packed) == 7 and packed.sizes == (3, 4)
    for index, sample in enumerate(given):
        assert sample.latents is not None
        assert packed.text(index) == sample.text
        torch.testing.assert_close(packed.embeds(index).float(), sample.embeds, rtol=tolerance, atol=0)
        torch.testing.assert_close(packed.latents(index).float(), sample.latents, rtol=tolerance, atol=0)
    assert list(packed.texts()) == [sample.text for sample in given]
    assert (packed.longest(), packed.longest({0, 1})) == (4, 2)


def test_content_tells_sets_apart(tmp_path: Path) -> None:
    given = samples(4)
    contents = {
        name: open_set(packed_folder(tmp_path / name, parts, latents=latents)).content
        for name, parts, latents in (
            ("one", [given], True),
            ("again", [given], True),
            ("order", [given[::-1]], True),
            ("other", [samples(4, seed=1)], True),
            ("bare", [given], False),
        )
    }
    assert contents["one"] == contents["again"]
    assert len(set(contents.values())) == 4


def test_a_part_whose_source_fails_is_not_there(tmp_path: Path) -> None:
    def broken() -> Iterator[Sample]:
        yield samples(1)[0]
        raise ConfigError("the second sample is bad")

    with pytest.raises(ConfigError, match="second sample"):
        write_part(tmp_path, 0, broken(), Layout(dtype="fp32", width=WIDTH, latent_shape=SHAPE))
    assert not holds_part(tmp_path, 0) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("00001/latents.bin", 10, r"latents\.bin is truncated: it has 10 bytes, expected \d+; delete"),
        ("00001/embeds.bin", 10, r"embeds\.bin is truncated"),
        ("00000/latents.bin", None, r"00000 lack latents\.bin"),
        ("00000/samples.safetensors", None, r"lack samples\.safetensors"),
    ],
)
def test_damaged_part_is_named(tmp_path: Path, name: str, size: int | None, message: str) -> None:
    given = samples(4)
    folder = packed_folder(tmp_path / "set", [given[:2], given[2:]])
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if size is not None:
        (folder / name).write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=message):
        open_set(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "of format 1"),
        ({"sizes": [1]}, "damaged"),
        ({"rows": "x"}, "damaged"),
        ({"width": 0}, "damaged"),
    ],
)
def test_index_that_says_what_cannot_be_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    given = samples(4)
    path = packed_folder(tmp_path / "set", [given[:2], given[2:]]) / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        open_set(path.parent)


def test_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    given = samples(4)
    folder = packed_folder(tmp_path / "set", [given[:2], given[2:]])
    path = part_folder(folder, 1) / "latents.bin"
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).clone()
    data[-1] = float("nan")
    path.write_bytes(data.numpy().tobytes())
    packed = open_set(folder)
    assert bool(packed.latents(2).isfinite().all())
    with pytest.raises(CheckpointError, match=r"sample 3 in .*latents\.bin is not finite: delete .*00001"):
        packed.latents(3)


def write_tar(path: Path, count: int, shape: tuple[int, ...] = SHAPE, latents: int | None = None) -> Path:
    """A shard of `count` samples, the first `latents` of which (all by default) have latents."""
    with tarfile.open(path, "w") as archive:
        for index in range(count):
            members = {f"{index:04d}.prompt.txt": f"prompt {index}".encode()}
            tensors = {"embed": torch.full((1 + index % 3, WIDTH), 1.0 + index)}
            if latents is None or index < latents:
                tensors["latent"] = torch.full(shape, 1.0 + index)
            for name, tensor in tensors.items():
                buffer = io.BytesIO()
                torch.save(tensor, buffer)
                members[f"{index:04d}.{name}.pt"] = buffer.getvalue()
            for name, data in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return path


def data_of(config: DistillConfig, prompts: Path, cache: Path, shape: tuple[int, ...] = SHAPE) -> PromptData:
    config = with_overrides(config, [f"prompts={prompts}"])
    return cached_prompt_data(config, open_base(config.base), cache, CPU, latent_shape=shape)


def test_latents_of_tars_are_read_in_either_order_of_channels_and_frames(
    tiny_config: DistillConfig, tmp_path: Path
) -> None:
    swapped = (SHAPE[1], SHAPE[0], *SHAPE[2:])
    for name, shape in (("a", SHAPE), ("b", swapped), ("c", (1, *SHAPE))):
        data = data_of(tiny_config, write_tar(tmp_path / f"{name}.tar", 5, shape), tmp_path / "cache")
        x0 = data.x0([3, 0], CPU)
        assert x0.shape == (2, *SHAPE) and x0.dtype == torch.float32
        assert torch.equal(x0[0], torch.full(SHAPE, 4.0)) and torch.equal(x0[1], torch.ones(SHAPE))
        assert "samples=5" in data.report and "latents=4x3x2x2" in data.report
    assert data_of(tiny_config, tmp_path / "a.tar", tmp_path / "cache", shape=()).latents is None


def test_latents_of_another_vae_or_size_are_refused(tiny_config: DistillConfig, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", 3, (8, 3, 2, 2))
    message = r"a\.tar: 0000\.latent\.pt has latents \(8, 3, 2, 2\), the run trains on \(4, 3, 2, 2\): .* another VAE"
    with pytest.raises(ConfigError, match=message):
        data_of(tiny_config, tar, tmp_path / "cache")
    packed = packed_folder(tmp_path / "set", [samples(3)])
    with pytest.raises(ConfigError, match=r"has latents \(4, 3, 2, 2\), the run trains on \(4, 3, 4, 4\)"):
        data_of(tiny_config, packed, tmp_path / "cache", (4, 3, 4, 4))


def test_a_shard_where_some_samples_have_no_latents_is_refused(tiny_config: DistillConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.tar: sample 0002 has no \.latent\.pt"):
        data_of(tiny_config, write_tar(tmp_path / "a.tar", 4, latents=2), tmp_path / "cache")


def test_a_folder_of_packed_samples_can_be_trained_on(tiny_config: DistillConfig, tmp_path: Path) -> None:
    given = samples(5)
    data = data_of(tiny_config, packed_folder(tmp_path / "set", [given]), tmp_path / "cache")
    assert data.num_prompts == 5 and data.text(2) == given[2].text
    assert torch.equal(data.rows(2), given[2].embeds)
    assert given[2].latents is not None and torch.equal(data.x0([2], CPU)[0], given[2].latents)
    assert data.rows(5).shape[1] == WIDTH, "the negative prompt is encoded"


def test_an_interrupted_conversion_goes_on_at_the_part_it_was_at(
    tiny_config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tars").mkdir()
    for number in range(4):
        write_tar(tmp_path / "tars" / f"{number}.tar", 2 + number)
    read, original = [], packing.shard_samples

    def dying(path: Path, *rest: object) -> Iterator[Sample]:
        read.append(path.name)
        if len(read) == 3:
            raise KeyboardInterrupt
        return original(path, *rest)

    monkeypatch.setattr(packing, "shard_samples", dying)
    with pytest.raises(KeyboardInterrupt):
        data_of(tiny_config, tmp_path / "tars", tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("samples-*")
    (folder / ".tmp-0123456789ab.partial").mkdir()  # as a killed process leaves it
    data = data_of(tiny_config, tmp_path / "tars", tmp_path / "cache")
    assert read == ["0.tar", "1.tar", "2.tar", "2.tar", "3.tar"]
    assert data.num_prompts == 14
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001", "00002", "00003", "index.json"]
    data_of(tiny_config, tmp_path / "tars", tmp_path / "cache")
    assert len(read) == 5


def test_two_processes_encode_each_its_share_to_the_same_bytes(tiny_config: DistillConfig, tmp_path: Path) -> None:
    config = with_overrides(tiny_config, ["batch_size=4"])
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(config)))
    command = [sys.executable, str(Path(__file__).with_name("run_packing.py"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path / "config.json"), str(tmp_path / "cache"), str(tmp_path)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    shares = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    # Five captions and the negative prompt.
    assert shares == [[0, 2, 4], [1, 3, 5]]
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(open_set(folder)) == 6


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_a_large_set_takes_no_resident_memory(tmp_path: Path) -> None:
    """64 MiB on disk, opened and read through once."""
    shape = (4, 4, 64, 64)
    large = [Sample(text=f"{index}", embeds=torch.ones(2, WIDTH), latents=torch.ones(shape)) for index in range(32)]
    layout = Layout(dtype="bf16", width=WIDTH, latent_shape=shape)
    for number in range(16):
        write_part(tmp_path / "set", number, large, layout)
    finish_set(tmp_path / "set", 16, layout, "a test")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "set").rglob("*.bin"))
    assert on_disk > 64 << 20
    packed = open_set(tmp_path / "set")
    packed.latents(0), packed.embeds(0)
    before = resident_bytes()
    for index in range(len(packed)):
        packed.latents(index), packed.embeds(index)
    assert resident_bytes() - before < 8 << 20


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_parts_stay_open_up_to_a_limit_and_close_with_their_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.data.packed.MAX_OPEN", 3)
    given = samples(8)
    packed = open_set(packed_folder(tmp_path / "set", [[sample] for sample in given]))
    gc.collect()  # sets of other tests
    before = open_descriptors()
    for index in (*range(8), 0, 7):
        assert torch.equal(packed.embeds(index).float(), given[index].embeds)
        packed.latents(index)
        assert open_descriptors() - before <= 2 * 3
    shutil.rmtree(packed.folder / "00007")
    assert torch.equal(packed.embeds(7).float(), given[7].embeds)  # open files outlive their names
    del packed
    assert open_descriptors() == before
