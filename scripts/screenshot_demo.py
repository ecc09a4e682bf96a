"""Take docs/images/demo.png: drive the page of a running codmd-serve in a headless Chromium, as a user would.

Needs chromium and chromedriver on the PATH and nothing else: WebDriver is plain HTTP and JSON.

    .venv/bin/codmd-serve &
    .venv/bin/python scripts/screenshot_demo.py http://127.0.0.1:8000 docs/images/demo.png
"""

import argparse
import base64
import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the WebDriver standard gives to element references
CHROMIUM_ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
WAIT_S = 60.0


class Browser:
    """One WebDriver session."""

    def __init__(self, client: httpx.Client, width_px: int, height_px: int) -> None:
        arguments = [*CHROMIUM_ARGUMENTS, f"--window-size={width_px},{height_px}"]
        options = {"args": arguments, "binary": shutil.which("chromium")}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.client = client
        self.prefix = ""
        self.prefix = f"/session/{self.call('POST', '/session', wanted)['sessionId']}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self.client.request(method, self.prefix + path, json=body if method == "POST" else None)
        value = answer.json()["value"]
        if answer.status_code != 200:
            raise RuntimeError(f"{method} {path}: {value['error']}: {value['message'].split(chr(10))[0]}")
        return value

    def script(self, code: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": code, "args": []})

    def element(self, selector: str) -> str:
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        return f"/element/{found[ELEMENT]}"

    def click(self, selector: str) -> None:
        self.call("POST", self.element(selector) + "/click", {})

    def type(self, selector: str, text: str) -> None:
        element = self.element(selector)
        self.call("POST", element + "/clear", {})
        self.call("POST", element + "/value", {"text": text})

    def wait_for(self, condition: str) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not self.script(f"return Boolean({condition})"):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the page never got to: {condition}")
            time.sleep(0.1)


@contextlib.contextmanager
def open_browser(width_px: int = 1180, height_px: int = 760) -> Iterator[Browser]:
    """Start chromedriver and a browser, and end both."""
    program = shutil.which("chromedriver")
    if program is None or shutil.which("chromium") is None:
        raise FileNotFoundError("chromium and chromedriver must be installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen([program, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        transport = httpx.HTTPTransport(retries=8)
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S, transport=transport, trust_env=False
        ) as client:
            browser = Browser(client, width_px, height_px)
            try:
                yield browser
            finally:
                browser.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()


def shoot(server: str, target: Path, prompt: str | None) -> None:
    """Open the page, generate, wait until the video plays, and save what is seen."""
    with open_browser() as browser:
        browser.call("POST", "/url", {"url": server})
        browser.wait_for("document.querySelector('#generate')")
        if prompt is not None:
            browser.type("#prompt textarea", prompt)
        browser.click("#generate")
        browser.wait_for(
            "document.querySelector('.error') || (document.querySelector('#screen video')?.currentTime > 0.3)"
        )
        png = base64.b64decode(browser.call("GET", "/screenshot"))
        seen = browser.script("return document.querySelector('#times').innerText")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(png)
    print(f"{target}: {' '.join(seen.split())}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("server", help="address of a running codmd-serve")
    parser.add_argument("target", type=Path, help="PNG to write")
    parser.add_argument("--prompt", help="instead of the page's first example")
    options = parser.parse_args()
    shoot(options.server, options.target, options.prompt)
    return 0


if __name__ == "__main__":
    sys.exit(main())
