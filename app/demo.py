"""The text-to-video page, and the same as an endpoint for gradio_client. An HTTP client of the server.

It imports neither the server nor the trainer, and loads nothing from elsewhere: fonts are the reader's own. The page
itself is page.html, page.css, page.js and screen.js, whose script speaks to the job routes; Gradio mounts it and gives
programs their endpoint.
"""

import re
from pathlib import Path
from typing import Any

import gradio as gr
import httpx

FOLDER = Path(__file__).parent
SCRIPTS = ("page.js", "screen.js")  # one scope
# A job may take its time.
TIMEOUT = httpx.Timeout(10.0, read=None)
# By which a reader's program or proxy sends an API key.
KEY_HEADERS = ("authorization", "x-api-key")


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
    css = (FOLDER / "page.css").read_text(encoding="utf-8")
    return {"theme": theme, "css": css, "ssr_mode": False, "run_history": False, "footer_links": []}


def build_page(server: str) -> gr.Blocks:
    """Build the page.

    Args:
        server: address of a codmd-serve, such as http://127.0.0.1:8000.
    """

    async def generate(
        prompt: str, request: gr.Request, seed: int | None = None, model: str | None = None
    ) -> dict[str, Any]:
        """Make a video; the result is its file.

        Args:
            prompt: what to show.
            seed: 0..2^63-1; the same seed gives the same video. Drawn when absent.
            model: a name of GET /models; the default one when absent.
        """
        return await make_video(server, {"prompt": prompt, "seed": seed, "model": model}, request.headers)

    html = (FOLDER / "page.html").read_text(encoding="utf-8")
    script = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    with gr.Blocks(title="codmd-serve", analytics_enabled=False) as page:
        gr.HTML(html, js_on_load=script, apply_default_css=False)
        gr.api(generate, api_name="generate", concurrency_limit=None)
    return page


async def make_video(server: str, asked: dict[str, Any], headers: Any) -> dict[str, Any]:
    """Have the server make a video, and say where a Gradio client gets it.

    Args:
        server: address of a codmd-serve.
        asked: fields of POST /generate; those that are None are left out.
        headers: of the client's request: an API key goes along, and the video's address is below the host it named.

    Raises:
        gr.Error: the server's own sentence on why there is no video.
    """
    keys = {name: value for name, value in headers.items() if name.lower() in KEY_HEADERS}
    body = {name: value for name, value in asked.items() if value is not None}
    try:
        # The environment's proxy is for the internet, not for the server beside us. When the client leaves, this is
        # cancelled, the connection closes, and the server gives the job up.
        async with (
            httpx.AsyncClient(timeout=TIMEOUT, trust_env=False) as client,
            client.stream("POST", f"{server}/generate", json=body, headers=keys) as answer,
        ):
            if answer.status_code != 200:
                await answer.aread()
                raise gr.Error(sentence_of(answer), print_exception=False)
            job = answer.headers["content-location"].rpartition("/")[2]
            name = file_name(str(body["prompt"]), answer.headers["x-seed"])
    except httpx.HTTPError as error:
        raise gr.Error(f"The server does not answer: {type(error).__name__}.", print_exception=False) from None
    scheme = headers.get("x-forwarded-proto", "http")
    url = f"{scheme}://{headers['host']}/jobs/{job}/video/{name}"
    # A client takes a stream from its address; any other file it would ask Gradio for, which serves none here.
    return {"path": url, "url": url, "orig_name": name, "is_stream": True, "meta": {"_type": "gradio.FileData"}}


def file_name(prompt: str, seed: str) -> str:
    """Return a name to save a video by: words of its prompt and its seed."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-")
    return f"{words or 'video'}-{seed}.mp4"


def sentence_of(answer: httpx.Response) -> str:
    """Return the sentence of a refusal."""
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The server answered {answer.status_code}."
    return message[:1].upper() + message[1:]
