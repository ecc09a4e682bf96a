"""A PostgreSQL cluster of the tests' own: started as an unprivileged user in a temporary folder, no network port."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

DEADLINE_S = 60.0


def find_postgres() -> Path | None:
    """Folder of initdb and postgres; None where PostgreSQL is not installed."""
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return installed[-1].parent if installed else None


class Postgres:
    """A running cluster; `database()` makes an empty database and returns its URL."""

    def __init__(self, folder: Path, start: Callable[[], "subprocess.Popen[bytes]"]) -> None:
        self.folder = folder
        self._numbers = count()
        self._start = start
        self._process = start()

    def restart(self) -> None:
        """Kill it as a power cut does, and start it again."""
        self._process.send_signal(signal.SIGQUIT)  # "immediate": its children go too, nothing is flushed
        self._process.wait(DEADLINE_S)
        self._process = self._start()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(DEADLINE_S)

    def database(self) -> str:
        import psycopg

        name = f"test{next(self._numbers)}"
        with psycopg.connect(host=str(self.folder), user="codmd", dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql://codmd@/{name}?host={self.folder}"


@contextmanager
def running_postgres(programs: Path) -> Iterator[Postgres]:
    """Start a cluster, and stop it at the end."""
    # Not in pytest's folder: that is closed to other users, and PostgreSQL refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="codmd-pg-"))
    account: dict[str, Any] = {}
    if os.geteuid() == 0:
        shutil.chown(folder, "nobody")
        account = {"user": "nobody", "group": "nogroup", "extra_groups": []}
    data = folder / "data"
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "HOME": str(folder)}
    initdb = [programs / "initdb", "-D", data, "-U", "codmd", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(initdb, check=True, capture_output=True, env=environment, **account)
    # The tests kill our servers, never this one: it need not flush.
    settings = ("listen_addresses=", f"unix_socket_directories={folder}", "fsync=off", "max_connections=100")
    words = [word for setting in settings for word in ("-c", setting)]

    def start() -> "subprocess.Popen[bytes]":
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [programs / "postgres", "-D", data, *words], stdout=log, stderr=log, env=environment, **account
            )
        deadline_s = time.monotonic() + DEADLINE_S
        ready = [programs / "pg_isready", "-q", "-h", folder, "-U", "codmd"]
        while subprocess.run(ready, env=environment).returncode:
            assert process.poll() is None and time.monotonic() < deadline_s, (folder / "log").read_text()
            time.sleep(0.05)
        return process

    try:
        cluster = Postgres(folder, start)
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
