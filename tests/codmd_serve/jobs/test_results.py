"""Results in a folder, in memory and on an S3 server: whole or not at all, in ranges, and what is left over."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from codmd_serve.errors import ConfigError, StorageFullError, StoreError
from codmd_serve.jobs import results as results_module
from codmd_serve.jobs.results import ResultStore

VIDEO = bytes(range(256)) * 20


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Address of a bucket on an S3 server of our own."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    account = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**account, "AWS_ENDPOINT_URL": endpoint, "AWS_EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(name, value)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(name)
        boto3.client("s3").create_bucket(Bucket="videos")
        yield "s3://videos/made"
    server.stop()


@pytest.fixture(params=["folder", "memory", "s3"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> ResultStore:
    addresses = {"folder": str(tmp_path / "results"), "memory": f"memory://{tmp_path.name}"}
    address = addresses.get(request.param) or request.getfixturevalue("s3")
    return ResultStore(address)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "made.mp4"
    path.write_bytes(VIDEO)
    return path


def content(results: ResultStore, name: str, start: int = 0, end: int = len(VIDEO)) -> bytes:
    return b"".join(results.read(name, start, end))


def test_a_result_is_kept_and_read_in_ranges(
    results: ResultStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_module, "CHUNK_BYTES", 1000)
    results.check()
    result = results.put(source, 60.0)
    assert result.num_bytes == len(VIDEO) and result.media_type == "video/mp4" and result.name.endswith(".mp4")
    assert results.size(result.name) == len(VIDEO)
    assert content(results, result.name) == VIDEO
    assert content(results, result.name, 1500, 3001) == VIDEO[1500:3001]
    assert source.exists()
    assert [name for name in results.leftovers(-60.0) if "probe" in name] == []
    results.delete(result.name)
    results.delete(result.name)
    assert results.size(result.name) is None
    with pytest.raises(StoreError):
        content(results, result.name)


def test_files_of_no_result_are_found_once_they_are_old(results: ResultStore, source: Path) -> None:
    name = results.put(source, 60.0).name
    assert name in results.leftovers(age_s=-60.0)
    assert name not in results.leftovers(age_s=60.0)
    results.delete(name)


def test_a_failed_write_leaves_nothing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = ResultStore(str(tmp_path / "results"))

    def full(_source: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(results_module.shutil, "copyfile", full)
    with pytest.raises(StorageFullError) as caught:
        results.put(source, 60.0)
    assert str(tmp_path) not in str(caught.value)
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]


def test_a_failed_upload_leaves_nothing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = ResultStore(f"memory://{tmp_path.name}")

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "the network is gone")

    monkeypatch.setattr(results._files, "mv", broken)
    with pytest.raises(StoreError, match="the network is gone"):
        results.put(source, 60.0)
    assert results.leftovers(-60.0) == []


def test_a_folder_that_vanished_is_made_again(tmp_path: Path, source: Path) -> None:
    results = ResultStore(str(tmp_path / "results"))
    results.check()
    (tmp_path / "results").rmdir()
    assert content(results, results.put(source, 60.0).name) == VIDEO


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="the results place cannot be used: Not a directory") as caught:
        ResultStore(str(tmp_path / "file" / "results")).check()
    assert str(tmp_path) not in str(caught.value)


def test_a_protocol_that_is_unknown_is_refused() -> None:
    with pytest.raises(ConfigError, match="results place 'floppy://a' cannot be used"):
        ResultStore("floppy://a")
