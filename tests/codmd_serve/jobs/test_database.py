"""Opening a store: migrations from the first version, and every store that is refused, left as it was."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from postgres import Postgres
from sqlalchemy import event, inspect, select, text

from codmd_serve.config import GenerateParams
from codmd_serve.errors import StorageFullError, StoreError
from codmd_serve.jobs import database as database_module
from codmd_serve.jobs.database import Database, open_database
from codmd_serve.jobs.schema import VERSION, metadata, migrate, schema_table
from codmd_serve.jobs.states import Job, NewJob
from codmd_serve.jobs.store import JobStore, QueueLimits

Submit = Callable[..., Job]
PARAMS = GenerateParams(prompt="a", seed=1, height=64, width=64, num_frames=17, fps=16, crf=18)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An SQLite store that exists."""
    path = tmp_path / "jobs.sqlite3"
    open_database(str(path)).close()
    return path


def test_migrations_make_the_tables_that_the_code_knows(database: Database) -> None:
    found = inspect(database.engine)
    for table in metadata.sorted_tables:
        columns = {column["name"]: column["nullable"] for column in found.get_columns(table.name)}
        wanted = {column.name: column.nullable for column in table.columns}
        assert columns.keys() == wanted.keys(), table.name
        if database.is_postgres:
            assert columns == wanted, table.name


def test_a_store_of_the_first_version_is_migrated_with_its_jobs(store_address: str) -> None:
    fresh = open_database(store_address)
    with fresh.write() as connection:
        for table in reversed(metadata.sorted_tables):
            table.drop(connection)
        migrate(connection, 0, 1)
        values = (
            "number, id, owner, status, bundle, model, content_key, params, is_preview, is_detached, body_hash, "
            "created_at, attempts, is_alone, is_cancel_requested, is_reused, is_deleted, lease_owner, lease_until, "
            "timings_ms, warnings, error_code, error_message"
        )
        params = '{"prompt": "old", "seed": 3, "height": 64, "width": 64, "num_frames": 17, "fps": 16, "crf": 18}'
        connection.execute(
            text(
                f"INSERT INTO codmd_jobs ({values}) VALUES (1, 'j', '', 'queued', 'b', 'm', 'c', :params, false, true,"
                " '', 5.0, 0, false, false, false, false, '', 0, '{}', '[]', '', '')"
            ),
            {"params": params},
        )
    fresh.close()
    database = open_database(store_address)
    with database.read() as connection:
        assert connection.execute(select(schema_table.c.version)).scalar_one() == VERSION
    job = JobStore(database).get("j")
    assert job is not None and (job.status, job.params.prompt, job.params.seed) == ("queued", "old", 3)
    assert job.webhook_url == ""
    database.close()


def test_two_processes_may_open_a_new_store_at_once(store_address: str) -> None:
    code = "import sys; from codmd_serve.jobs.database import open_database as o; sys.stdin.readline(); o(sys.argv[1])"
    command = [sys.executable, "-W", "error", "-c", code, store_address]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[1] for process in processes] == [b""] * 3


def test_sqlite_keeps_what_it_said_over_a_power_cut(file: Path) -> None:
    database = open_database(str(file))
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
    database.close()


def refused(address: str | Path, *words: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_database(str(address))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_newer_store_is_refused_and_left_alone(store_address: str) -> None:
    database = open_database(store_address)
    with database.write() as connection:
        connection.execute(schema_table.update().values(version=VERSION + 7))
    refused(store_address, f"of version {VERSION + 7}", f"knows up to {VERSION}", "upgrade codmd-serve")
    with database.read() as connection:
        assert connection.execute(select(schema_table.c.version)).scalar_one() == VERSION + 7
    database.close()


@pytest.mark.parametrize(
    "content", [b"not a database, but long enough to be one" * 100, b"SQLite format 3\0" + b"x" * 5000]
)
def test_a_corrupt_store_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "jobs.sqlite3"
    path.write_bytes(content)
    refused(path, str(path), "corrupt")
    assert path.read_bytes() == content and [each.name for each in tmp_path.iterdir()] == ["jobs.sqlite3"]


def test_a_store_with_broken_pages_is_refused(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    file.write_bytes(content)
    refused(file, str(file), "corrupt")
    assert file.read_bytes() == content


def test_a_locked_store_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "OPEN_TIMEOUT_S", 0.05)
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    refused(file, str(file), "is locked by another program")
    holder.close()
    open_database(str(file)).close()


def test_a_read_only_store_is_refused() -> None:
    """In a process without root's right to write everywhere, so not in pytest's folder, which only root may enter."""
    folder = Path(tempfile.mkdtemp(prefix="codmd-read-only-"))
    file = folder / "jobs.sqlite3"
    open_database(str(file)).close()
    file.chmod(0o444)
    folder.chmod(0o555)
    code = (
        "import os, sys\nfrom codmd_serve.jobs.database import open_database\n"
        "if os.geteuid() == 0: os.setegid(65534); os.seteuid(65534)\n"
        "try: open_database('jobs.sqlite3')\nexcept Exception as error: print(type(error).__name__, error)"
    )
    before = file.read_bytes()
    done = subprocess.run([sys.executable, "-c", code], cwd=file.parent, capture_output=True, text=True, check=True)
    folder.chmod(0o755)
    assert done.stdout.startswith("StoreError the job store ") and "is read-only" in done.stdout
    assert done.stdout.count("\n") == 1 and file.read_bytes() == before
    shutil.rmtree(folder)


def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE cakes (name TEXT)")
    other.close()
    before = path.read_bytes()
    refused(path, str(path), "another program")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("mysql://host/x", ("must be a path or a postgresql:// URL", "'mysql'")),
        ("://", ("neither a path nor a postgresql:// URL",)),
        ("postgresql://someone:secret@127.0.0.1:1/x", ("someone:***@127.0.0.1:1/x", "cannot be used")),
        ("/dev/null/jobs.sqlite3", ("/dev/null", "cannot be opened")),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(address: str, words: tuple[str, ...]) -> None:
    refused(address, *words)


def test_a_full_disk_is_named_as_such(file: Path) -> None:
    database = open_database(str(file))
    with database.write() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    event.listen(database.engine, "begin", lambda each: each.exec_driver_sql(f"PRAGMA max_page_count={pages}"))
    store = JobStore(database)
    new = NewJob(params=PARAMS, bundle="b" * 64, content_key="c" * 64, webhook_url="w" * 100_000)
    with pytest.raises(StorageFullError, match="is full"):
        store.submit(new, QueueLimits(queue_size=9))
    assert store.counts()["queued"] == 0
    database.close()


def test_postgres_tells_listeners_what_changed(postgres: Postgres) -> None:
    import psycopg

    address = postgres.database()
    database = open_database(address)
    with psycopg.connect(address, autocommit=True) as listener:
        listener.execute("LISTEN codmd_changed")
        with database.write() as connection:
            database.notify(connection, "codmd_changed", "{}")
        (notice,) = listener.notifies(timeout=10, stop_after=1)
    assert notice.payload == "{}"
    database.close()
