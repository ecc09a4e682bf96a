"""Raw frames on stdin to an animated WebP by Pillow, as a process: for an ffmpeg without libwebp."""

import itertools
import sys
from pathlib import Path

from PIL import Image


def main(arguments: list[str]) -> None:
    """Write frames that play for ever: WIDTH HEIGHT FPS QUALITY FILE, whole rgb24 frames on stdin."""
    width, height, fps, quality = map(int, arguments[:4])
    data = sys.stdin.buffer.read()
    size = 3 * width * height
    frames = [Image.frombytes("RGB", (width, height), data[at : at + size]) for at in range(0, len(data), size)]
    # Whole milliseconds of which the sum is right.
    ends_ms = [round(1000 * number / fps) for number in range(len(frames) + 1)]
    delays_ms = [end - start for start, end in itertools.pairwise(ends_ms)]
    with Path(arguments[4]).open("wb") as file:
        frames[0].save(
            file, "WEBP", save_all=True, append_images=frames[1:], duration=delays_ms, quality=quality, loop=0
        )


if __name__ == "__main__":
    main(sys.argv[1:])
