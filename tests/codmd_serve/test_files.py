import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codmd_serve import files
from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.video import FORMAT_OF_SUFFIX, format_of


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_write_json_is_readable_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "spec.json"
    files.write_json(target, {"a": 1})
    files.write_json(target, {"prompt": "ein Würfel"})
    assert target.read_text(encoding="utf-8") == '{\n  "prompt": "ein Würfel"\n}\n'
    assert names(tmp_path) == ["spec.json"]


def test_write_json_of_what_json_cannot_hold_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "spec.json", {"a": object()})
    assert names(tmp_path) == []


def test_atomic_file_takes_a_name_of_255_bytes(tmp_path: Path) -> None:
    target = tmp_path / ("é" * 127 + "x")
    files.write_bytes(target, b"whole")
    assert target.read_bytes() == b"whole"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_file_that_fails_keeps_the_old_one_and_leaves_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "x.bin"
    target.write_bytes(b"old")

    def write() -> None:
        with files.atomic_file(target) as temporary:
            temporary.write_bytes(b"ha")
            assert temporary.parent == tmp_path
            raise error

    with pytest.raises(error):
        write()
    assert target.read_bytes() == b"old" and names(tmp_path) == ["x.bin"]


def test_atomic_file_has_a_name_that_torch_can_save_to(tmp_path: Path) -> None:
    with files.atomic_file(tmp_path / "state.pt") as temporary:
        torch.save({"step": 3}, temporary)
    assert torch.load(tmp_path / "state.pt", weights_only=True) == {"step": 3}


def test_atomic_file_that_was_not_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.atomic_file(tmp_path / "x.bin"):
        pass
    assert names(tmp_path) == []


def test_atomic_file_flushes_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.bin"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(target, b"new")
    assert target.read_bytes() == b"old" and names(tmp_path) == ["x.bin"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    with files.atomic_file(target) as first, files.atomic_file(target) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
        assert files.leftovers(tmp_path) == sorted([first, second])
    assert target.read_bytes() == b"first" and files.leftovers(tmp_path) == []


def test_atomic_folder_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / ("x" * 255)
    for name in ("old", "new"):
        with files.atomic_folder(target) as fresh:
            (fresh / name).write_text(name)
    assert names(target) == ["new"] and names(target.parent) == [target.name]


def test_atomic_folder_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with files.atomic_folder(tmp_path / "link") as fresh:
        (fresh / "new").touch()
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "disk") == ["new"]


def test_atomic_folder_that_fails_keeps_the_old_one_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").touch()

    def write() -> None:
        with files.atomic_folder(target) as fresh:
            (fresh / "new").touch()
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        write()
    assert names(tmp_path) == ["bundle"] and names(target) == ["old"]


def test_atomic_folder_that_cannot_be_renamed_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "bundle", Path.rename
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(OSError, match="No space left"), files.atomic_folder(target) as fresh:
        monkeypatch.setattr(Path, "rename", lambda path, to: fail() if path == fresh else rename(path, to))
    assert names(tmp_path) == ["bundle"] and names(target) == ["old"]


def test_atomic_folder_refuses_to_replace_a_file(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.write_text("notes")
    with pytest.raises(NotADirectoryError, match="is no folder"), files.atomic_folder(target):
        pass
    assert target.read_text() == "notes" and names(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("\n  CUDA error\nstack"), "RuntimeError: CUDA error"),
        (KeyError("networks"), "KeyError: 'networks'"),
        (MemoryError(), "MemoryError: no message"),
        (CheckpointError("no bundle\nat all"), "no bundle"),
        (CheckpointError(), "CheckpointError: no message"),
    ],
)
def test_first_line_says_type_and_first_line(error: Exception, line: str) -> None:
    assert files.first_line(error) == line


@pytest.mark.parametrize("name", ["x" * 256, "ü" * 128])
def test_a_name_of_too_many_bytes_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.\.\. has 256 bytes, and names have at most 255 there"):
        files.check_name(tmp_path / name)


def test_names_that_can_be_are_taken(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 255), tmp_path, tmp_path / "nowhere" / "a"):
        files.check_name(path)


def test_paths_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "a\0b", tmp_path.joinpath(*["d" * 200] * 25)):
        with pytest.raises(ConfigError, match="cannot be written"):
            files.check_name(path)


def test_first_line_keeps_the_line_ends_of_quoted_text() -> None:
    assert files.first_line(ConfigError("got 'a\u2028b'\nmore")) == "got 'a\u2028b'"


@given(name=st.text(max_size=300) | st.text(st.sampled_from("ab/.\0\n\u2028\ud800ü"), max_size=600))
def test_any_name_is_taken_or_refused_in_one_sentence(name: str) -> None:
    path = Path(tempfile.gettempdir()) / "nowhere" / name
    try:
        files.check_name(path)
        format_of(path)
    except ConfigError:
        return
    assert len(os.fsencode(path.name)) <= 255 and path.suffix.lower() in FORMAT_OF_SUFFIX
