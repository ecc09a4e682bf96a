"""The text-to-video page: a prompt, a seed, a video, and where the time went. An HTTP client of the server.

It imports neither the server nor the trainer, and loads nothing from the internet: fonts are the reader's own, and the
video comes inside the answer, so no file is left behind.
"""

import base64
import html
import random
import re
from typing import Any

import gradio as gr
import httpx

EXAMPLES = [
    "a red circle moves right quickly on a black background",
    "a yellow square moves left quickly on a black background",
    "a purple cross moves up quickly on a black background",
    "a white ring moves right slowly on a navy background",
    "a white triangle moves down quickly on a black background",
]
DEFAULT_SEED = 7
MAX_SEED = 2**32 - 1
# A video may take its time in the queue, but a server that does not even connect is down.
TIMEOUT = httpx.Timeout(10.0, read=3600.0)
STAGES = {"queue": "#94a3b8", "text": "#f59e0b", "denoise": "#6366f1", "decode": "#14b8a6", "encode": "#ec4899"}

CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.9rem; letter-spacing: -0.02em; margin-bottom: 0.1rem; }
#title p { color: var(--body-text-color-subdued); margin-top: 0; }
#screen .frame { aspect-ratio: var(--ratio, 1); width: 100%; border-radius: 14px; overflow: hidden; background:
  radial-gradient(circle at 30% 20%, #312e81, #0f172a 70%); display: flex; align-items: center;
  justify-content: center; color: #a5b4fc; font-size: 0.95rem; }
#screen video { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; display: block; }
#screen, #times { padding: 0 !important; border: none !important; background: none !important; }
.bar { display: flex; height: 10px; border-radius: 5px; overflow: hidden; margin: 4px 0 8px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 0.85rem; color: var(--body-text-color-subdued);
  font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 6px; }
.legend b { color: var(--body-text-color); font-weight: 600; }
.note, .error { margin-top: 10px; padding: 9px 13px; border-radius: 9px; font-size: 0.88rem; }
.note { background: #f59e0b22; border: 1px solid #f59e0b66; }
.error { background: #ef444422; border: 1px solid #ef444466; }
footer { display: none !important; }
"""

EMPTY_SCREEN = '<div class="frame">your video appears here</div>'


def page_options() -> dict[str, Any]:
    """What Gradio takes where a page is mounted rather than where it is built: the looks, and no server of its own."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif"]
    theme = gr.themes.Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=fonts,
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
    return {"theme": theme, "css": CSS, "ssr_mode": False, "run_history": False, "footer_links": []}


def build_page(server: str) -> gr.Blocks:
    """Lay the page out.

    Args:
        server: address of a codmd-serve, such as http://127.0.0.1:8000.
    """

    async def on_generate(prompt: str, seed: float | None) -> tuple[str, str]:
        return await request_video(server, prompt, None if seed is None else int(seed))

    with gr.Blocks(title="codmd-serve", analytics_enabled=False) as page:
        gr.Markdown("# Text to video in four steps\nA few-step student of a video diffusion model.", elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5):
                prompt = gr.Textbox(
                    EXAMPLES[0], label="Prompt", lines=3, max_lines=6, max_length=4000, elem_id="prompt", autofocus=True
                )
                gr.Examples([[example] for example in EXAMPLES], [prompt], label="Try one of these")
                with gr.Row(equal_height=True):
                    seed = gr.Number(
                        DEFAULT_SEED, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", scale=3
                    )
                    dice = gr.Button("Random", elem_id="dice", scale=1, min_width=90)
                button = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
            with gr.Column(scale=4):
                screen = gr.HTML(EMPTY_SCREEN, elem_id="screen")
                times = gr.HTML("", elem_id="times")
        dice.click(lambda: random.randint(0, MAX_SEED), None, seed, api_visibility="private")
        gr.on(
            [button.click, prompt.submit],
            on_generate,
            [prompt, seed],
            [screen, times],
            concurrency_limit=None,
            api_visibility="private",
        )
    return page


async def request_video(server: str, prompt: str, seed: int | None) -> tuple[str, str]:
    """Ask the server for a video.

    Returns:
        HTML of the screen and of what stands under it: stage times and notes, or the server's own sentence on why not.
    """
    body = {"prompt": prompt} if seed is None else {"prompt": prompt, "seed": seed}
    try:
        # The environment's proxy is for the internet, not for the server beside us.
        async with httpx.AsyncClient(timeout=TIMEOUT, trust_env=False) as client:
            answer = await client.post(f"{server}/generate", json=body)
    except httpx.HTTPError as error:
        return EMPTY_SCREEN, _error(f"The server at {server} does not answer: {type(error).__name__}.")
    if answer.status_code != 200:
        return EMPTY_SCREEN, _error(_sentence(answer))
    video = base64.b64encode(answer.content).decode()
    source = f'<video src="data:video/mp4;base64,{video}" autoplay loop muted playsinline controls></video>'
    return f'<div class="frame">{source}</div>', times_html(answer.headers)


def times_html(headers: httpx.Headers) -> str:
    """Stage times, seed and warnings of an answer, as a bar with a legend."""
    found = dict(re.findall(r"(\w+);dur=([\d.]+)", headers.get("server-timing", "")))
    times_ms = {stage: float(found[stage]) for stage in STAGES if stage in found}
    bar = "".join(f'<div style="flex:{times_ms[stage]};background:{STAGES[stage]}"></div>' for stage in times_ms)
    entries = [
        f'<span><i style="background:{STAGES[stage]}"></i>{stage} <b>{value:.0f} ms</b></span>'
        for stage, value in times_ms.items()
    ]
    entries.append(f"<span>total <b>{sum(times_ms.values()) / 1000:.2f} s</b></span>")
    entries.append(f"<span>seed <b>{html.escape(headers.get('x-seed', ''))}</b></span>")
    # The header is escaped, because headers are ASCII, and may have been cut inside an escape.
    warnings = headers.get("warnings", "").encode("ascii", "replace").decode("unicode_escape", "ignore")
    note = f'<div class="note">{html.escape(warnings)}</div>' if warnings else ""
    return f'<div class="bar">{bar}</div><div class="legend">{"".join(entries)}</div>{note}'


def _sentence(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The server answered {answer.status_code}."


def _error(sentence: str) -> str:
    return f'<div class="error">{html.escape(sentence[:1].upper() + sentence[1:])}</div>'
