"""Chromium and a real server for the browser tests: `server`, `open_page`.

One server process with the embedded bundle serves every test of the session. A test file has a Chromium of its own:
Playwright's event loop lives in the main thread and would be in the way of other tests. Without Playwright or Chromium
every test here is skipped with one line.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from polling import wait_until
from processes import Process, free_port

PATH_NAMES = ("chromium", "chromium-browser", "google-chrome")
# A video plays by itself, and Chromium runs as root in a container without a GPU.
CHROMIUM_ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required")
DESKTOP_PX, PHONE_PX = (1280, 900), (390, 844)
# For a machine that has little to spare.
START_S, DEADLINE_MS = 300.0, 120_000.0

OpenPage = Callable[..., Any]


class PageServer(Process):
    """`codmd-serve serve` with its page and the embedded bundle. It keeps its port and its jobs over a restart."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        super().__init__(
            folder, "serve", "--port", str(self.port), "--data", str(folder / "data"), *words, is_fake=False
        )
        self.environment["CODMD_SPARE_WORKER"] = "0"
        self.client = httpx.Client(base_url=self.url, timeout=DEADLINE_MS / 1000, trust_env=False)

    def start(self) -> None:
        """Start, and wait until the model is warm and the page is built."""
        super().start()
        for path in ("/ready", "/"):
            wait_until(lambda path=path: not self.is_running() or self._answers(path), START_S, f"{path} answers 200")
        assert self.is_running(), self.said()

    def _answers(self, path: str) -> bool:
        try:
            return self.client.get(path).status_code == 200
        except httpx.TransportError:
            return False

    def end(self) -> None:
        self.client.close()
        super().end()


def find_chromium() -> str:
    """Path of the system's Chromium; empty when there is none."""
    return next((path for name in PATH_NAMES if (path := shutil.which(name))), "")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, chromium: str) -> Iterator[PageServer]:
    """A server of the embedded student and its teacher; its page is at `server.url`."""
    running = PageServer(tmp_path_factory.mktemp("page"), "--teacher")
    try:
        running.start()
        yield running
    finally:
        running.end()


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of Chromium; skips where it, or Playwright, is missing."""
    program = find_chromium()
    if not program:
        pytest.skip("browser tests need Chromium: apt-get install chromium")
    pytest.importorskip("playwright", reason="browser tests need Playwright: pip install playwright")
    return program


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """A headless Chromium, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=list(CHROMIUM_ARGUMENTS))
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[OpenPage]:
    """Open a tab at a URL: `open_page(url, size_px=PHONE_PX, color_scheme="dark", **context options)`.

    Tabs with the same `context` share cookies and storage. After the test no tab may have asked another host for
    anything, or thrown an exception.
    """
    contexts, asked, thrown = [], set(), []

    def opened(url: str, *, size_px: tuple[int, int] = DESKTOP_PX, context: Any = None, **options: Any) -> Any:
        if context is None:
            viewport = {"width": size_px[0], "height": size_px[1]}
            context = browser.new_context(viewport=viewport, **options)
            context.set_default_timeout(DEADLINE_MS)
            context.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
            contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: thrown.append(str(error)))
        page.goto(url)
        asked.discard(urlsplit(url).netloc)
        own.add(urlsplit(url).netloc)
        return page

    own = {""}  # data: and blob: have no host
    yield opened
    for context in contexts:
        context.close()
    assert asked <= own, f"the page asked other hosts: {sorted(asked - own)}"
    assert not thrown, thrown
