"""Take the pictures of the page in docs/images, as a reader sees it: screenshots.py http://127.0.0.1:8000

Needs Chromium on the PATH and Playwright, and a server with the teacher:

    .venv/bin/codmd-serve serve --teacher &
    .venv/bin/python scripts/screenshots.py http://127.0.0.1:8000
"""

import argparse
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"
DESKTOP_PX, PHONE_PX = (1180, 860), (390, 844)
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required")
TIMEOUT_MS = 600_000.0
PROMPT = "a yellow circle moves right slowly on a navy background"
SEED = "7"
MAX_COLOURS = 255


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("server", help="address of a running codmd-serve with --teacher")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the pictures")
    parser.add_argument("--only", choices=sorted(PICTURES), action="append", help="one of them, more often for more")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        for name in options.only or PICTURES:
            size_px, scheme, drive = PICTURES[name]
            viewport = {"width": size_px[0], "height": size_px[1]}
            context = browser.new_context(viewport=viewport, color_scheme=scheme, has_touch=size_px == PHONE_PX)
            context.set_default_timeout(TIMEOUT_MS)
            page = context.new_page()
            page.goto(options.server)
            page.wait_for_selector("#facts b")
            page.fill("#prompt", PROMPT)
            page.uncheck("#new-seed")
            page.fill("#seed", SEED)
            drive(page)
            save(page.screenshot(full_page=name == "page-compare"), options.out / f"{name}.png")
            context.close()
        browser.close()
    return 0


def done(page: Any) -> None:
    page.click("#generate")
    page.wait_for_function("document.querySelector('.pane video')?.currentTime > 0.5")
    page.mouse.move(5, 5)
    page.evaluate(MIDDLE)


def running(page: Any) -> None:
    # The teacher takes long enough to be seen on its way.
    page.click("#compare")
    page.wait_for_function("Number(document.querySelector('.pane:nth-child(2)')?.dataset.step) >= 35")


def compared(page: Any) -> None:
    page.click("#compare")
    page.wait_for_selector("#ratio:not([hidden])")
    page.wait_for_function("[...document.querySelectorAll('.pane video')].every((each) => each.currentTime > 0)")
    page.mouse.move(5, 5)
    page.evaluate(MIDDLE)


# Every video stands at the same frame, and no control is in the picture.
MIDDLE = """() => Promise.all([...document.querySelectorAll('.pane video')].map((video) => new Promise((resolve) => {
    video.pause();
    video.controls = false;
    video.onseeked = resolve;
    video.currentTime = 0.8;
})))"""
Drive = Callable[[Any], None]
PICTURES: dict[str, tuple[tuple[int, int], str, Drive]] = {
    "demo": (DESKTOP_PX, "light", done),
    "page-dark": (DESKTOP_PX, "dark", done),
    "page-phone": (PHONE_PX, "light", done),
    "page-running": (DESKTOP_PX, "light", running),
    "page-compare": (DESKTOP_PX, "light", compared),
}


def save(png: bytes, path: Path) -> None:
    """Write a picture with a palette: a quarter of the bytes, and text looks the same."""
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(MAX_COLOURS)
    image.save(path, optimize=True)
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    sys.exit(main())
