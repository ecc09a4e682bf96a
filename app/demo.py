"""The text-to-video page: prompt, seed, video and stage times. An HTTP client of the server.

It imports neither the server nor the trainer, and loads nothing from the internet: fonts are the reader's own, and the
video is the server's own URL of the job. A job whose tab is closed is cancelled.
"""

import asyncio
import contextlib
import html
import random
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
import httpx

EXAMPLE_PROMPTS = [
    "a red circle moves right quickly on a black background",
    "a yellow square moves left quickly on a black background",
    "a purple cross moves up quickly on a black background",
    "a white ring moves right slowly on a navy background",
    "a white triangle moves down quickly on a black background",
]
DEFAULT_SEED = 7
MAX_SEED = 2**32 - 1
# The server answers at once; a job may take its time.
TIMEOUT = httpx.Timeout(10.0, read=60.0)
POLL_S = 0.2
# By which a reader's browser or proxy sends an API key.
KEY_HEADERS = ("authorization", "x-api-key")
STAGE_COLOURS = {"queue": "#94a3b8", "text": "#f59e0b", "denoise": "#6366f1", "decode": "#14b8a6", "encode": "#ec4899"}

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
    """Return the options that Gradio takes when a page is mounted: theme, CSS, and no server of its own."""
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
    """Build the page.

    Args:
        server: address of a codmd-serve, such as http://127.0.0.1:8000.
    """

    jobs = SessionJobs(server)

    async def on_generate(prompt: str, seed: float | None, request: gr.Request) -> AsyncIterator[tuple[str, str]]:
        keys = {name: value for name, value in request.headers.items() if name in KEY_HEADERS}
        session = request.session_hash or ""
        async for shown in follow_video(server, prompt, None if seed is None else int(seed), keys, jobs, session):
            yield shown

    async def on_unload(request: gr.Request) -> None:
        await jobs.cancel(request.session_hash or "")

    with gr.Blocks(title="codmd-serve", analytics_enabled=False) as page:
        gr.Markdown("# Text to video in four steps\nA few-step student of a video diffusion model.", elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5):
                prompt = gr.Textbox(
                    EXAMPLE_PROMPTS[0],
                    label="Prompt",
                    lines=3,
                    max_lines=6,
                    max_length=4000,
                    elem_id="prompt",
                    autofocus=True,
                )
                gr.Examples([[example] for example in EXAMPLE_PROMPTS], [prompt], label="Try one of these")
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
        page.unload(on_unload)
    return page


class SessionJobs:
    """Unfinished jobs of open tabs.

    Args:
        server: address of a codmd-serve.
    """

    def __init__(self, server: str) -> None:
        self.server = server
        self._open: dict[str, dict[str, dict[str, str]]] = {}

    def add(self, session: str, job_id: str, keys: dict[str, str]) -> None:
        self._open.setdefault(session, {})[job_id] = keys

    def remove(self, session: str, job_id: str) -> None:
        jobs = self._open.get(session, {})
        jobs.pop(job_id, None)
        if not jobs:
            self._open.pop(session, None)

    async def cancel(self, session: str) -> None:
        """Cancel all jobs of a closed tab."""
        async with httpx.AsyncClient(timeout=TIMEOUT, trust_env=False) as client:
            for job_id, keys in self._open.pop(session, {}).items():
                with contextlib.suppress(httpx.HTTPError):
                    await client.delete(f"{self.server}/jobs/{job_id}", headers=keys)


async def follow_video(
    server: str,
    prompt: str,
    seed: int | None,
    keys: dict[str, str] | None = None,
    jobs: SessionJobs | None = None,
    session: str = "",
) -> AsyncIterator[tuple[str, str]]:
    """Submit a job to the server and yield its progress.

    Args:
        server: address of a codmd-serve.
        prompt, seed: what to make; the server draws a seed that is None.
        keys: headers with the reader's API key, where the server wants one.
        jobs, session: where the job is noted while it is not finished.

    Yields:
        HTML of the screen and of what stands under it: progress, then stage times and notes, or the server's own
        sentence on why not.
    """
    body = {"prompt": prompt} if seed is None else {"prompt": prompt, "seed": seed}
    keys = keys or {}
    try:
        # The environment's proxy is for the internet, not for the server beside us.
        async with httpx.AsyncClient(timeout=TIMEOUT, trust_env=False) as client:
            answer = await client.post(f"{server}/generate", json=body, headers={**keys, "Prefer": "respond-async"})
            if answer.status_code != 202:
                yield EMPTY_SCREEN, _error_html(_sentence(answer))
                return
            job = answer.json()
            if jobs is not None:
                jobs.add(session, job["id"], keys)
            while job["status"] in ("queued", "running"):
                yield _waiting_screen(job), ""
                await asyncio.sleep(POLL_S)
                answer = await client.get(f"{server}/jobs/{job['id']}", headers=keys)
                if answer.status_code != 200:
                    yield EMPTY_SCREEN, _error_html(_sentence(answer))
                    return
                job = answer.json()
    except httpx.HTTPError as error:
        yield EMPTY_SCREEN, _error_html(f"The server at {server} does not answer: {type(error).__name__}.")
        return
    if jobs is not None:
        jobs.remove(session, job["id"])
    if job["status"] != "completed":
        yield EMPTY_SCREEN, _error_html(str((job["error"] or {}).get("message", f"the job is {job['status']}")))
        return
    source = f'<video src="jobs/{html.escape(job["id"])}/video" autoplay loop muted playsinline controls></video>'
    yield f'<div class="frame">{source}</div>', times_html(job)


def _waiting_screen(job: dict[str, Any]) -> str:
    if job["status"] == "queued":
        text = f"waiting, {job['position']} before it" if job["position"] else "waiting"
    else:
        text = f"{job['stage'] or 'starting'}, {100 * job['progress']:.0f} %"
    return f'<div class="frame">{html.escape(text)}</div>'


def times_html(job: dict[str, Any]) -> str:
    """Return stage times, seed and warnings of a finished job as HTML: a bar with a legend."""
    times_ms = {stage: float(job["timings_ms"][stage]) for stage in STAGE_COLOURS if stage in job["timings_ms"]}
    bar = "".join(f'<div style="flex:{times_ms[stage]};background:{STAGE_COLOURS[stage]}"></div>' for stage in times_ms)
    entries = [
        f'<span><i style="background:{STAGE_COLOURS[stage]}"></i>{stage} <b>{value:.0f} ms</b></span>'
        for stage, value in times_ms.items()
    ]
    entries.append(f"<span>total <b>{sum(times_ms.values()) / 1000:.2f} s</b></span>")
    entries.append(f"<span>seed <b>{html.escape(str(job['seed']))}</b></span>")
    warnings = "; ".join(job["warnings"])
    note = f'<div class="note">{html.escape(warnings)}</div>' if warnings else ""
    return f'<div class="bar">{bar}</div><div class="legend">{"".join(entries)}</div>{note}'


def _sentence(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The server answered {answer.status_code}."


def _error_html(sentence: str) -> str:
    return f'<div class="error">{html.escape(sentence[:1].upper() + sentence[1:])}</div>'
