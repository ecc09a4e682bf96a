"""A hub's cache on disk, as `hf download` leaves it, and a hub that serves folders over HTTP."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by their path in it."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def add_to_cache(cache: Path, repository: str, files: Mapping[str, Path], commit: str = COMMIT) -> Path:
    """Add a repository: blobs, one snapshot of links, and what main refers to; return the snapshot."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "blobs").mkdir()
    for number, (name, file) in enumerate(files.items()):
        blob = folder / "blobs" / f"{number:064x}"
        shutil.copy(file, blob)
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder / "snapshots" / commit


class FakeHub(ThreadingHTTPServer):
    """Serve repositories as the hub's client asks for them.

    Attributes:
        repositories: files by path, by repository.
        asked: paths of all requests.
    """

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Mapping[str, Path]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        for repository, files in self.server.repositories.items():
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{repository}"):
                self._answer(json.dumps(self._described(repository, files, "/tree/" in path)).encode())
                return
            for revision in ("main", COMMIT):
                name = path.removeprefix(f"/{repository}/resolve/{revision}/")
                if name != path and name in files:
                    self._answer(files[name].read_bytes())
                    return
        self.send_error(404)

    def _described(self, repository: str, files: Mapping[str, Path], is_tree: bool) -> object:
        if is_tree:
            return [
                {"type": "file", "path": name, "size": each.stat().st_size, "oid": name} for name, each in files.items()
            ]
        return {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: pytest shows `asked` where it matters."""


@contextmanager
def fake_hub(repositories: Mapping[str, Mapping[str, Path]]) -> Iterator[FakeHub]:
    """Run a hub until the block ends."""
    hub = FakeHub(repositories)
    thread = threading.Thread(target=hub.serve_forever, name="fake hub", daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
