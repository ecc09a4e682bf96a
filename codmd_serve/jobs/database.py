"""Opens SQLite or PostgreSQL for the job store, and says in one sentence why it cannot. Knows no job.

SQLite: WAL, synchronous=FULL, every write transaction starts as a writer. PostgreSQL: by psycopg.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from codmd_serve.errors import StorageFullError, StoreError
from codmd_serve.jobs.schema import VERSION, migrate, schema_table

OPEN_TIMEOUT_S = 5.0  # for a store that another program holds
BUSY_TIMEOUT_S = 30.0
SQLITE_HEADER = b"SQLite format 3\0"
SCHEMA_LOCK = 0x636F646D  # "codm": of the advisory locks of PostgreSQL
SUBMIT_LOCK = SCHEMA_LOCK + 1


class Database:
    """An open job store of the newest schema.

    Attributes:
        name: the store as a person would call it, without a password.
        is_postgres: whether several machines may share it.
        on_notice: called with (channel, payload) when a transaction that notifies is committed to SQLite, which has no
            NOTIFY of its own; see listener.Listener.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self.name = name
        self.engine = engine
        self.is_postgres = engine.dialect.name == "postgresql"
        self.on_notice: Callable[[str, str], None] | None = None
        self._writing = threading.Lock()
        self._notices: list[tuple[str, str]] = []  # of the transaction that has the lock

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one moment of the store."""
        with self._explained(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that commits at the end, or leaves no trace when an exception goes through it."""
        # SQLite has one writer at a time: threads of this process wait here, in order, not by polling the file.
        gate = nullcontext() if self.is_postgres else self._writing
        writer = self.engine.execution_options(codmd_write=True)
        with self._explained(), gate:
            self._notices.clear()
            with writer.begin() as connection:
                yield connection
            if self.on_notice is not None:
                for channel, payload in self._notices:
                    self.on_notice(channel, payload)

    def now(self, connection: Connection) -> float:
        """Unix time by the clock that every process of this store shares."""
        if not self.is_postgres:
            return time.time()
        return float(connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def lock_submissions(self, connection: Connection) -> None:
        """Let one submission at a time count the queue and add to it; ends with the transaction."""
        if self.is_postgres:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SUBMIT_LOCK})

    def notify(self, connection: Connection, channel: str, payload: str) -> None:
        """Tell the other processes of this store when the transaction commits."""
        if self.is_postgres:
            connection.execute(text("SELECT pg_notify(:channel, :payload)"), {"channel": channel, "payload": payload})
        else:
            self._notices.append((channel, payload))

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise _explain(self.name, error) from error


def open_database(address: str) -> Database:
    """Open a store, making or migrating its tables.

    Args:
        address: path of an SQLite file (made when absent), or a postgresql:// URL.

    Raises:
        StoreError: unreachable, locked, read-only, corrupt, of a newer version, or not a job store. Nothing that was
            there is changed.
    """
    url = _url(address)
    if url.drivername == "sqlite":
        name = str(url.database)
        _check_file(Path(name))
        _prepare(Database(_sqlite_engine(url, OPEN_TIMEOUT_S), name))
        return Database(_sqlite_engine(url, BUSY_TIMEOUT_S), name)
    name = url.render_as_string(hide_password=True).replace("+psycopg", "")
    engine = create_engine(url, pool_pre_ping=True, pool_size=8, connect_args={"connect_timeout": 10})
    _prepare(Database(engine, name))
    return Database(engine, name)


def _prepare(database: Database) -> None:
    try:
        _migrate(database)
    finally:
        database.close()


def _sqlite_engine(url: URL, timeout_s: float) -> Engine:
    engine = create_engine(url, connect_args={"timeout": timeout_s, "check_same_thread": False}, pool_size=8)
    event.listen(engine, "connect", _on_sqlite_connect)
    event.listen(engine, "begin", _on_sqlite_begin)
    return engine


def _url(address: str) -> URL:
    if "://" not in address:
        return URL.create("sqlite", database=str(Path(address).expanduser().absolute()))
    try:
        url = make_url(address)
    except ArgumentError:
        raise StoreError(f"store {address!r} is neither a path nor a postgresql:// URL") from None
    kind = url.get_backend_name()
    if kind == "sqlite" and url.database:
        return URL.create("sqlite", database=str(Path(url.database).absolute()))
    if kind in ("postgresql", "postgres"):
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise StoreError(
                "a PostgreSQL store needs psycopg, which is not installed: pip install 'codmd-serve[postgres]'"
            ) from None
        return url.set(drivername="postgresql+psycopg")
    raise StoreError(f"store must be a path or a postgresql:// URL, got a {kind!r} URL")


def _check_file(path: Path) -> None:
    """Refuse what SQLite would fail on later, or silently overwrite."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                if file.read(len(SQLITE_HEADER)) != SQLITE_HEADER:
                    raise StoreError(f"the job store {path} is corrupt or no SQLite file; it was left as it is")
    except OSError as error:
        raise StoreError(f"the job store {path} cannot be opened: {error.strerror}") from None
    _check_owner(path)
    for place in (path, path.parent):
        if place.exists() and not os.access(place, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise StoreError(f"the job store {path} is read-only: {place} cannot be written to")


def _check_owner(path: Path) -> None:
    """Refuse another program's database, and one of a newer version, before a pragma changes the file."""
    if not path.exists():
        return
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=0)) as probe:
        names = {name for (name,) in probe.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if names and schema_table.name not in names:
            raise StoreError(f"{path} is the database of another program; it was left as it is")
        if names:
            (found,) = probe.execute(f"SELECT version FROM {schema_table.name}").fetchone() or (0,)
            _check_version(str(path), found)


def _check_version(name: str, found: int) -> None:
    if found > VERSION:
        raise StoreError(
            f"the job store {name} is of version {found}, and this codmd-serve knows up to {VERSION}: "
            "upgrade codmd-serve, or name another store; it was left as it is"
        )


def _on_sqlite_connect(connection: Any, _record: object) -> None:
    # Python's driver would begin transactions late and as a reader; BEGIN is sent by _on_sqlite_begin.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _on_sqlite_begin(connection: Connection) -> None:
    is_write = connection.get_execution_options().get("codmd_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")


def _migrate(database: Database) -> None:
    with database.write() as connection:
        if database.is_postgres:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})
        else:
            problem = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
            if problem != "ok":
                raise StoreError(f"the job store {database.name} is corrupt; it was left as it is")
        tables = inspect(connection).get_table_names()
        found = 0
        if schema_table.name in tables:
            found = connection.execute(select(schema_table.c.version)).scalar_one_or_none() or 0
        _check_version(database.name, found)
        if found < VERSION:
            migrate(connection, found)


def _explain(name: str, error: SQLAlchemyError) -> StoreError | StorageFullError:
    """One sentence for what a driver reports."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    said = str(cause).strip().split("\n")[0] or type(cause).__name__
    if "is full" in said or "No space left" in said or getattr(cause, "sqlstate", None) == "53100":
        return StorageFullError(f"the disk of the job store {name} is full")
    if "locked" in said:
        return StoreError(f"the job store {name} is locked by another program")
    if "readonly" in said or "unable to open" in said:
        return StoreError(f"the job store {name} is read-only or cannot be opened: {said}")
    if isinstance(cause, sqlite3.DatabaseError) and ("malformed" in said or "not a database" in said):
        return StoreError(f"the job store {name} is corrupt ({said}); it was left as it is")
    return StoreError(f"the job store {name} cannot be used: {said}")
