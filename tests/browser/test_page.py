"""The page in Chromium on a real server with the embedded bundle: what a reader sees and does."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from polling import wait_until

OpenPage = Callable[..., Any]
PHONE_PX = (390, 844)
DEADLINE_S = 120.0
RING = "a white ring stays still on a navy background"
CIRCLE = "a red circle moves right quickly on a black background"
WATCH_PREVIEWS = """() => {
    window.previews = [];
    new MutationObserver(() => {
        const pane = document.querySelector('.pane[data-step]'), image = pane?.querySelector('.frame img');
        const last = window.previews.at(-1)?.[1];
        if (image && last !== image.src) window.previews.push([Number(pane.dataset.step), image.src]);
    }).observe(document.querySelector('#panes'), {subtree: true, childList: true, attributes: true});
}"""
PIXELS = """(video) => {
    const canvas = Object.assign(document.createElement('canvas'), {width: 32, height: 32});
    canvas.getContext('2d').drawImage(video, 0, 0, 32, 32);
    return canvas.toDataURL();
}"""
# Text of every kind and field on its own background: the least contrast of each colour pair, by WCAG 2.
CONTRASTS = """() => {
    const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const channel = (value) => linear(value / 255);
    const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const colour = (text) => text.match(/[\\d.]+/g).map(Number);
    const behind = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const found = colour(getComputedStyle(each).backgroundColor);
            if (found.length < 4 || found[3] > 0.99) return found;
        }
        return [255, 255, 255];
    };
    const found = [];
    for (const element of document.querySelectorAll('.codmd *')) {
        const isText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        const isField = element.matches('input:not([type=checkbox]), textarea, select');
        if (!(isText || isField) || !element.checkVisibility()) continue;
        if (element.closest('.frame, .unseen')) continue;  // on a dark picture in both themes
        const style = getComputedStyle(element), size = parseFloat(style.fontSize);
        const isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
        const pair = [luminance(colour(style.color)), luminance(behind(element))].sort((a, b) => b - a);
        const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
        const text = element.textContent.slice(0, 30);
        if (ratio < (isLarge ? 3 : 4.5)) found.push([ratio, element.tagName, element.id, element.className, text]);
    }
    return found;
}"""
UNLABELLED = """() => [...document.querySelectorAll('.codmd :is(input, textarea, select, button, a, video, img)')]
    .filter((element) => element.checkVisibility() && !(element.labels?.length || element.getAttribute('aria-label')
        || element.getAttribute('alt') || element.textContent.trim() || element.closest('[aria-hidden=true]')))
    .map((element) => element.outerHTML.slice(0, 80))"""


@pytest.fixture
def open_ready(server: Any, open_page: OpenPage) -> OpenPage:
    """Open the page, or what lies below it, and wait until it knows the model."""

    def opened(path: str = "/", **options: Any) -> Any:
        page = open_page(server.url + path, **options)
        page.wait_for_selector("#facts b")
        return page

    return opened


def ask_small(page: Any, prompt: str = RING, num_frames: int = 9, seed: int | None = None, side: int = 96) -> None:
    """Fill the form for a video that takes little."""
    page.fill("#prompt", prompt)
    page.evaluate("document.querySelector('#settings').open = true")
    for name, value in (("width", side), ("height", side), ("num_frames", num_frames)):
        page.fill(f"#{name}", str(value))
    if seed is not None:
        page.uncheck("#new-seed")
        page.fill("#seed", str(seed))


def shown_job(page: Any) -> str:
    job: str = page.get_attribute(".pane", "data-job")
    return job


def is_playing(page: Any) -> None:
    page.wait_for_function("document.querySelector('.pane video')?.currentTime > 0.05")


def test_a_video_forms_step_by_step_and_plays_with_its_prompt_and_seed(server: Any, open_ready: OpenPage) -> None:
    page = open_ready()
    (facts,) = [model for model in server.client.get("/models").json()["models"] if not model["is_teacher"]]
    assert page.inner_text("#about") == facts["about"]
    assert page.locator("#examples button").all_inner_texts() == facts["examples"]
    assert sum(" and a " in example or "left of" in example for example in facts["examples"]) >= 2, "two objects"
    for words in (facts["name"], facts["device"], facts["attention"], facts["execution"]):
        assert words in page.inner_text("#facts")
    page.evaluate(WATCH_PREVIEWS)
    page.click(f"#examples button:has-text('{CIRCLE}')")
    page.click("#generate")
    is_playing(page)
    previews = page.evaluate("window.previews")
    assert len({source for _, source in previews}) == len(previews) >= 2, "a new picture with each step that was seen"
    assert all(source.startswith("data:image/webp;base64,") for _, source in previews)
    assert [step for step, _ in previews] == sorted({step for step, _ in previews})
    video = page.locator(".pane video")
    first = video.evaluate(PIXELS)
    page.wait_for_function(
        f"([video, first]) => ({PIXELS})(video) !== first", arg=[video.element_handle(), first]
    )  # frames advance
    job = server.client.get(f"/jobs/{shown_job(page)}").json()
    assert job["params"]["prompt"] == CIRCLE == page.inner_text(".pane .caption")
    assert f"seed {job['seed']}" in page.inner_text(".pane .made") and "25 frames" in page.inner_text(".pane .made")
    for stage in ("queue", "text", "denoise", "decode", "encode"):
        assert re.search(rf"{stage} \d+ ms", page.inner_text(".pane .legend"))
    assert page.evaluate(UNLABELLED) == []


def test_two_clicks_make_two_videos_with_two_seeds_and_a_history(server: Any, open_ready: OpenPage) -> None:
    page = open_ready()
    for prompt in (RING, CIRCLE):
        ask_small(page, prompt)
        page.click("#generate")
        page.wait_for_function(f"document.querySelector('.pane .caption')?.textContent === {json.dumps(prompt)}")
    page.wait_for_function("document.querySelectorAll('#thumbs video').length === 2")
    is_playing(page)
    assert page.inner_text(".pane .caption") == CIRCLE
    texts = page.locator("#thumbs .thumb").all_inner_texts()
    assert CIRCLE in texts[0] and RING in texts[1]
    seeds = [re.search(r"seed (\d+)", text) for text in texts]
    assert seeds[0] and seeds[1] and seeds[0][1] != seeds[1][1], "new each time"
    page.click("#thumbs li:nth-child(2) button")
    assert page.inner_text(".pane .caption") == RING
    page.reload()
    page.wait_for_function("document.querySelectorAll('#thumbs video').length === 2")  # a reload keeps the session
    assert page.inner_text(".pane .caption") == RING


def test_link_download_and_copies_repeat_the_video(server: Any, open_ready: OpenPage, tmp_path: Path) -> None:
    page = open_ready(permissions=["clipboard-read", "clipboard-write"])
    ask_small(page, seed=2**62 + 1)
    page.keyboard.press("Tab")
    page.click("#generate")
    is_playing(page)
    job_id = shown_job(page)
    content = server.client.get(f"/jobs/{job_id}/video").content
    assert f"seed {2**62 + 1}" in page.inner_text(".pane .made"), "63 bits, all of them"
    with page.expect_download() as download:
        page.click("text=Download")
    assert download.value.suggested_filename == f"a-white-ring-stays-still-on-a-navy-background-{2**62 + 1}.mp4"
    assert Path(download.value.path()).read_bytes() == content
    copied = {}
    for name in ("Copy link", "Copy as curl", "Copy as Python"):
        button = page.locator(f".pane button:has-text('{name}')")
        button.click()
        copied[name] = page.evaluate("navigator.clipboard.readText()")
    assert copied["Copy as curl"].startswith(f"curl -sS {server.url}/generate ")
    asked = json.loads(re.search(r"-d '(.*?)' -o", copied["Copy as curl"])[1])  # type: ignore[index]
    assert asked["seed"] == 2**62 + 1 and server.client.post("/generate", json=asked).content == content
    folder = tmp_path / "python"
    folder.mkdir()
    script = copied["Copy as Python"].replace('open("', f'open("{folder}/')
    exec(compile(script, "copied", "exec"), {})
    assert next(folder.iterdir()).read_bytes() == content
    assert copied["Copy link"] == f"{server.url}/?job={job_id}"
    other = open_ready(f"/?job={job_id}")
    is_playing(other)
    assert other.inner_text(".pane .caption") == RING and other.is_visible("text=Again with a new seed")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seed", "-1", "The seed must be a whole number from 0 to 9223372036854775807."),
        ("seed", "1.5", "The seed must be a whole number"),
        ("seed", str(2**63), "The seed must be a whole number"),
        ("prompt", "   ", "Write what the video should show."),
        ("width", "100", "This must be a multiple of 16 up to 16384; 96 would do."),
        ("num_frames", "24", "Frames must be 4k + 1 and at this size up to 97; 25 would do."),
        ("fps", "0", "This must be a whole number above 0."),
    ],
)
def test_what_is_wrong_is_said_beside_its_field_and_not_sent(form: Any, name: str, value: str, words: str) -> None:
    form.uncheck("#new-seed")
    ask_small(form, seed=7)
    form.fill(f"#{name}", value)
    form.click("#generate")
    # The first wrong field has the focus.
    form.wait_for_function(f"document.activeElement.id === '{name}'")
    assert form.inner_text(f"#{name}-error").startswith(words)
    assert form.get_attribute(f"#{name}", "aria-invalid") == "true"
    assert not form.posted


@pytest.fixture(scope="module")
def form(server: Any, browser: Any) -> Any:
    """One page for all wrong fields; `posted` are the jobs that it sent."""
    page = browser.new_page()
    page.set_default_timeout(1000 * DEADLINE_S)
    page.posted = []
    page.on("request", lambda request: page.posted.append(request.url) if request.method == "POST" else None)
    page.goto(server.url)
    page.wait_for_selector("#facts b")
    yield page
    page.close()


def test_what_the_server_refuses_is_said_beside_the_field_that_it_names(server: Any, open_ready: OpenPage) -> None:
    page = open_ready()
    refused = {"error": {"code": "invalid_request", "message": "num_frames must be smaller", "field": "num_frames"}}
    page.route("**/generate", lambda route: route.fulfill(status=422, json=refused))
    page.click("#generate")
    page.wait_for_selector("#num_frames-error:has-text('Num_frames must be smaller')")
    assert page.evaluate("document.querySelector('#settings').open")
    page.unroute("**/generate")
    full = {"error": {"code": "queue_full", "message": "16 jobs are waiting already, no more are taken", "field": None}}
    page.route("**/generate", lambda route: route.fulfill(status=429, json=full))
    page.click("#generate")
    page.wait_for_selector("#form-error:has-text('16 jobs are waiting already')")


def test_student_and_teacher_are_compared_and_cancelled(server: Any, open_ready: OpenPage) -> None:
    page = open_ready()
    ask_small(page, side=48)
    page.click("#compare")
    page.wait_for_selector("#ratio:not([hidden])")
    assert re.search(r"the student is [\d.]+ times as fast", page.inner_text("#ratio"))
    assert page.locator(".pane h3").count() == 2
    assert "4 steps" in page.inner_text(".pane:nth-child(1) h3") and "50 steps" in page.inner_text(
        ".pane:nth-child(2) h3"
    )
    ids = [pane.get_attribute("data-job") for pane in page.locator(".pane").all()]
    student, teacher = (server.client.get(f"/jobs/{job_id}").json() for job_id in ids)
    assert student["seed"] == teacher["seed"] and not student["params"]["teacher"] and teacher["params"]["teacher"]
    clocks = [float(text.removesuffix(" s")) for text in page.locator(".clock").all_inner_texts()]
    assert clocks == [pytest.approx(job["inference_time_s"], abs=0.01) for job in (student, teacher)]
    assert page.locator(".pane video").count() == 2

    # The next one would take long: it is cancelled while it runs.
    ask_small(page, num_frames=97)
    page.click("#compare")
    page.wait_for_function("Number(document.querySelector('.pane:nth-child(2)')?.dataset.step) >= 1")
    assert "of 50" in page.inner_text(".pane:nth-child(2) .state")
    page.click(".pane:nth-child(2) button.cancel")
    page.wait_for_selector(".pane:nth-child(2)[data-status=cancelled]")
    assert page.inner_text(".pane:nth-child(2) .failed") == "It was cancelled."
    cancelled = page.get_attribute(".pane:nth-child(2)", "data-job")
    assert server.client.get(f"/jobs/{cancelled}").json()["status"] == "cancelled"


def begin_long(server: Any, page: Any) -> str:
    """Have the page ask the teacher for a video that takes long; the id of its job."""
    ask_small(page, num_frames=97)
    page.click("#compare")
    page.wait_for_function("Number(document.querySelector('.pane:nth-child(2)')?.dataset.step) >= 1")
    job_id: str = page.get_attribute(".pane:nth-child(2)", "data-job")
    assert server.client.get(f"/jobs/{job_id}").json()["status"] == "running"
    return job_id


def test_a_closed_tab_cancels_what_no_other_tab_follows(server: Any, open_ready: OpenPage) -> None:
    page = open_ready()
    job_id = begin_long(server, page)
    other = open_ready(f"/?job={job_id}", context=page.context)
    other.wait_for_function("Number(document.querySelector('.pane')?.dataset.step) >= 1")
    page.close()
    step = int(other.get_attribute(".pane", "data-step"))
    # Longer than the grace, by its own steps: the other tab still follows it.
    wait_until(lambda: server.client.get(f"/jobs/{job_id}").json()["step"] > step + 1, DEADLINE_S, "a further step")
    with other.expect_request(f"**/jobs/{job_id}"):
        other.click("button.cancel")
    other.wait_for_selector(".pane[data-status=cancelled]")

    lonely = open_ready()
    job_id = begin_long(server, lonely)
    lonely.close()
    wait_until(lambda: server.client.get(f"/jobs/{job_id}").json()["status"] == "cancelled", DEADLINE_S, "cancelled")


def test_a_server_that_is_killed_says_so_and_the_page_goes_on(server: Any, open_ready: OpenPage) -> None:
    page = open_ready()
    ask_small(page, num_frames=97)
    page.click("#generate")
    page.wait_for_selector(".pane[data-status=running]")
    server.kill()
    page.wait_for_selector("#banner:not([hidden])")
    assert "The server does not answer." in page.inner_text("#banner")
    page.click("#generate")
    page.wait_for_selector("#form-error:has-text('The server does not answer.')")
    server.start()
    page.wait_for_selector("#banner", state="hidden")
    is_playing(page)  # the job that was running came back with the server
    page.click("#generate")
    page.wait_for_function("document.querySelectorAll('#thumbs li').length === 2")


def answering(body: dict[str, Any]) -> Callable[[Any], None]:
    """A route that answers with JSON; it takes one argument only, or Playwright would hand it a request too."""

    def answer(route: Any) -> None:
        route.fulfill(json=body)

    return answer


def test_a_link_to_what_is_gone_says_what_became_of_it(server: Any, open_ready: OpenPage) -> None:
    page = open_ready("/?job=nowhere")
    page.wait_for_selector(".pane .failed")
    assert page.inner_text(".pane .failed").startswith("The server knows no such video: the link is wrong")

    asked = {"prompt": RING, "num_frames": 9, "seed": 5}
    job_id = server.client.post("/generate", json=asked).headers["content-location"].rpartition("/")[2]
    job = server.client.get(f"/jobs/{job_id}").json()
    gone = open_ready("/")
    for status, words in (("expired", "Its video is no longer kept."), ("failed", "It failed: out of memory.")):
        error = {"code": "out_of_memory", "message": "out of memory"} if status == "failed" else None
        gone.route(f"**/jobs/{job_id}", answering({**job, "status": status, "error": error}))
        gone.goto(f"{server.url}/?job={job_id}")
        gone.wait_for_selector(f".pane .failed:has-text('{words}')")
        assert gone.inner_text(".pane .caption") == RING
        gone.unroute(f"**/jobs/{job_id}")
    gone.click("text=Make it again")
    is_playing(gone)
    assert "seed 5" in gone.inner_text(".pane .made")


def test_on_a_phone_the_video_is_in_view_after_the_tap(open_ready: OpenPage) -> None:
    page = open_ready(size_px=PHONE_PX, color_scheme="dark", has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing to scroll sideways"
    ask_small(page)
    page.tap("#generate")
    is_playing(page)
    box = page.locator(".pane .frame").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 844 and box["width"] > 300
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate(CONTRASTS) == [], "dark"


def test_with_a_keyboard_alone(open_ready: OpenPage) -> None:
    page = open_ready()
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type(RING)
    page.keyboard.press("Enter")
    page.keyboard.press("Backspace")
    assert page.input_value("#prompt") == RING, "Enter alone is a line break"
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".pane[data-job]")
    is_playing(page)
    assert page.evaluate("document.activeElement.id") == "prompt", "the focus stays"
    seen = []
    for _ in range(30):
        page.keyboard.press("Tab")
        name = page.evaluate("(document.activeElement.id || document.activeElement.textContent).trim()")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert page.evaluate("document.activeElement.matches(':is(video, body) *, video')") or outline == "3px", name
        seen.append(name)
    for name in ("generate", "new-seed", "Download", "Copy link"):
        assert name in seen
    assert page.evaluate(CONTRASTS) == [], "light"
    page.focus("text=Again with a new seed")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('#thumbs li').length === 2")
