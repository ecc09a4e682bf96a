"""The API as a process: small, quick to start, and refusing a store that is broken in one sentence."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ServerProcess, free_port

MAX_START_CPU_S = 2.0  # of one core; the wall clock of a busy machine says nothing
MAX_RESIDENT_MIB = 150


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    (line,) = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def test_jobs_are_taken_while_the_model_loads_and_the_process_stays_small(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, tmp_path / "data", is_fake=False)
    try:
        server.start()
        assert server.process is not None
        answer = server.client.post("/generate", json={"prompt": "a"}, headers={"Prefer": "respond-async"})
        started_s, is_loading = cpu_s(server.process.pid), server.client.get("/ready").status_code == 503
        assert answer.status_code == 202 and is_loading
        assert started_s < MAX_START_CPU_S
        assert resident_mib(server.process.pid) < MAX_RESIDENT_MIB
        loaded = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "libtorch" not in loaded and "numpy" not in loaded
    finally:
        server.end()


def test_an_api_alone_idles_small_and_ends_with_0(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, tmp_path / "data", "--workers", "0", is_fake=False)
    try:
        server.start()
        assert server.process is not None
        assert resident_mib(server.process.pid) < MAX_RESIDENT_MIB
        assert server.client.get("/ready").json()["reason"] == "no worker is alive"
        assert server.stop() == 0
    finally:
        server.end()


@pytest.mark.parametrize("command", ["serve", "work"])
@pytest.mark.parametrize("kind", ["corrupt", "newer", "locked", "nowhere"])
def test_a_store_that_cannot_be_used_is_one_sentence_and_exit_code_2(tmp_path: Path, command: str, kind: str) -> None:
    store = tmp_path / "jobs.sqlite3"
    holder = sqlite3.connect(store, isolation_level=None)
    holder.execute("CREATE TABLE codmd_schema (version INTEGER PRIMARY KEY)")
    holder.execute("INSERT INTO codmd_schema VALUES (1000)")
    address = "postgresql://user:secret@127.0.0.1:1/x" if kind == "nowhere" else str(store)
    if kind == "corrupt":
        store.write_bytes(b"no database" * 1000)
    before = store.read_bytes()
    if kind == "locked":  # after the file was read: closing it would drop the lock of this process
        holder.execute("BEGIN EXCLUSIVE")
    else:
        holder.close()
    words = [command, "--store", address, "--data", str(tmp_path / "data"), "--no-page", "--port", str(free_port())]
    done = subprocess.run(
        [sys.executable, "-m", "codmd_serve.cli", *words], capture_output=True, text=True, timeout=120
    )
    holder.close()
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    wanted = {"corrupt": "corrupt", "newer": "of version 1000", "locked": "locked", "nowhere": "cannot be used"}[kind]
    assert line.startswith("codmd-serve: ") and wanted in line and "secret" not in line
    assert store.read_bytes() == before
