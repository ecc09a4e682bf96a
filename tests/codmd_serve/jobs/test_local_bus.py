"""Messages between the processes of one SQLite store: to all that live, past those that are dead or do not read."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from codmd_serve.jobs import local_bus
from codmd_serve.jobs.local_bus import LocalBus

Open = Callable[[Path], LocalBus]


@pytest.fixture
def open_bus() -> Iterator[Open]:
    made: list[LocalBus] = []

    def opened(folder: Path) -> LocalBus:
        made.append(LocalBus(folder))
        return made[-1]

    yield opened
    for bus in made:
        bus.close()


def test_a_message_reaches_the_others_and_not_its_sender(open_bus: Open, tmp_path: Path) -> None:
    first, second, third = (open_bus(tmp_path / "events") for _ in range(3))
    first.send(b"x" * 100_000)
    assert second.receive(5.0) == third.receive(5.0) == b"x" * 100_000
    assert first.receive(0.0001) is None
    assert (tmp_path / "events").stat().st_mode & 0o77 == 0, "no other user may speak or listen"


def test_a_deep_folder_is_no_hindrance(open_bus: Open, tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 30) / "events"
    first, second = open_bus(folder), open_bus(folder)
    first.send(b"a")
    assert second.receive(5.0) == b"a"


def test_the_socket_of_a_killed_process_is_removed(open_bus: Open, tmp_path: Path) -> None:
    first, second = open_bus(tmp_path / "events"), open_bus(tmp_path / "events")
    second._inbox.close()  # as the kernel does
    first.send(b"a")
    assert [path.name for path in (tmp_path / "events").iterdir()] == [first.name]


def test_who_does_not_read_is_waited_for_once(open_bus: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, deaf = open_bus(tmp_path / "events"), open_bus(tmp_path / "events")
    for _ in range(10_000):
        first.send(b"x" * 1000)
        if deaf.name in first._skipped_until_s:
            break
    assert deaf.name in first._skipped_until_s
    listening = open_bus(tmp_path / "events")
    monkeypatch.setattr(local_bus, "SEND_TIMEOUT_S", 1000.0)
    first._outbox.settimeout(1000.0)
    first.send(b"a")
    assert listening.receive(5.0) == b"a"


def test_the_last_one_removes_the_folder(tmp_path: Path) -> None:
    first, second = LocalBus(tmp_path / "events"), LocalBus(tmp_path / "events")
    first.close()
    second.close()
    assert not (tmp_path / "events").exists()
