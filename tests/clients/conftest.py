"""One real `codmd-serve serve` process with a tiny bundle of the real classes, for clients that others wrote."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ServerProcess


@pytest.fixture(scope="session")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Ready to make videos of 32x32 pixels and 9 frames."""
    folder = tmp_path_factory.mktemp("clients")
    words = ("--bundle", str(tiny_bundle), "--no-spare-worker")
    server = ServerProcess(folder, folder / "data", *words, is_fake=False)
    try:
        server.start(is_ready=True)
        yield server
    finally:
        server.end()


@pytest.fixture
def _deprecated_calls() -> Iterator[None]:
    """Let calls pass that the `openai` package marks deprecated: all of its videos, whose maker closed his service."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
