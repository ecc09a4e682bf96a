"""`codmd-distill shapeworld preview`: writes a contact sheet and an mp4 of the world."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from codmd_serve.errors import ConfigError
from distill.worlds.shapeworld.schema import SPLITS, TRAIN

MARGIN_PX = 4
TEXT_PX = 14
ZOOM = 2
FRAMES_SHOWN = 5


def add_preview_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-distill shapeworld`."""
    parser.add_argument("action", choices=("preview",), help="write PATH.png (contact sheet) and PATH.mp4")
    parser.add_argument("--out", type=Path, default=Path("shapeworld-preview"), help="PATH without ending")
    parser.add_argument("--caption", action="append", help="may be given several times; default: drawn captions")
    parser.add_argument("--num-clips", type=int, default=12, help="how many drawn captions (default 12)")
    parser.add_argument("--split", choices=SPLITS, default=TRAIN)
    parser.add_argument("--seed", type=int, default=0)


def run_preview(args: argparse.Namespace) -> int:
    """Write both files; return 0.

    Raises:
        ConfigError: captions that the grammar cannot read, or a folder that cannot be written.
    """
    from codmd_serve.video import write_video
    from distill.worlds.shapeworld.captions import parse_caption, sample_caption
    from distill.worlds.shapeworld.render import sample_clip
    from distill.worlds.shapeworld.schema import NATIVE_FPS

    if not 1 <= args.num_clips <= 256:
        raise ConfigError(f"--num-clips must be in 1..256, got {args.num_clips}")
    rng = np.random.default_rng(args.seed)
    captions = args.caption or [sample_caption(rng, split=args.split) for _ in range(args.num_clips)]
    clips = [sample_clip(parse_caption(caption), rng) for caption in captions]
    sheet, video = args.out.with_suffix(".png"), args.out.with_suffix(".mp4")
    try:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(captions, clips).save(sheet)
    except OSError as error:
        raise ConfigError(f"{sheet} cannot be written: {error}") from error
    grid = tile(clips)
    height, width = grid.shape[1:3]
    write_video([grid.tobytes()], video, height=height, width=width, fps=NATIVE_FPS, crf=12)
    print(f"{sheet} and {video}: {len(clips)} clips")
    return 0


def contact_sheet(captions: list[str], clips: list[np.ndarray], columns: int = 2) -> Image.Image:
    """Lay clips out as captioned filmstrips.

    Args:
        captions: one per clip, wrapped to the width of its strip.
        clips: uint8 (T, H, W, 3) each; FRAMES_SHOWN frames from first to last are shown at ZOOM times their size.
        columns: strips side by side.
    """
    num_frames, height, width, _ = clips[0].shape
    picks = np.linspace(0, num_frames - 1, min(FRAMES_SHOWN, num_frames)).round().astype(int)
    cell_w = len(picks) * (width * ZOOM + MARGIN_PX) + MARGIN_PX
    per_line = max(cell_w // 6, 1)
    lines = [[text[at : at + per_line] for at in range(0, len(text), per_line)] for text in captions]
    text_h = TEXT_PX * max(len(part) for part in lines)
    cell_h = height * ZOOM + text_h + 2 * MARGIN_PX
    rows = -(-len(clips) // columns)
    sheet = Image.new("RGB", (cell_w * min(columns, len(clips)), cell_h * rows), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for index, (text, clip) in enumerate(zip(lines, clips, strict=True)):
        left, top = (index % columns) * cell_w, (index // columns) * cell_h
        draw.multiline_text((left + MARGIN_PX, top + 1), "\n".join(text), fill=(30, 30, 30))
        for place, frame in enumerate(picks):
            image = Image.fromarray(clip[frame]).resize((width * ZOOM, height * ZOOM), Image.Resampling.NEAREST)
            sheet.paste(image, (left + MARGIN_PX + place * (width * ZOOM + MARGIN_PX), top + text_h + MARGIN_PX))
    return sheet


def tile(clips: list[np.ndarray]) -> np.ndarray:
    """Tile clips (T, H, W, 3) of one size on a near-square grid, padded black: (T, rows*H, cols*W, 3)."""
    columns = int(np.ceil(np.sqrt(len(clips))))
    rows = -(-len(clips) // columns)
    num_frames, height, width, _ = clips[0].shape
    grid = np.zeros((num_frames, rows * height, columns * width, 3), dtype=np.uint8)
    for index, clip in enumerate(clips):
        row, column = divmod(index, columns)
        grid[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = clip
    return grid
