"""The study in a browser: whole sessions by keyboard and on a phone, while the server goes away and comes back."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from polling import wait_until
from processes import free_port
from studies import make_study

from distill.evaluate.study.design import QUESTIONS, Study, read_study, trials_of
from distill.evaluate.study.log import LOG_FILE, read_records

PHONE_PX = (390, 844)
START_S = 120.0
READY = "fieldset:not([disabled])"
KEYS = {"a": "left", "b": "right", "s": "same", "x": "bad"}


class Server:
    """`codmd-distill eval study serve` as a process, on a port that it keeps."""

    def __init__(self, study: Path) -> None:
        self.study, self.port = study, free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["eval", "study", "serve", str(self.study), "--port", str(self.port)]
        self.process = subprocess.Popen([sys.executable, "-m", "distill.cli", *words])
        wait_until(self._answers, START_S, "the study is served")

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, "the server ended"
        try:
            return httpx.get(f"{self.url}api/study", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def records(self) -> list[dict[str, Any]]:
        return read_records(self.study / LOG_FILE)[0]


@pytest.fixture
def served(tmp_path: Path, chromium: str) -> Iterator[Server]:
    make_study(tmp_path, "alpha", "omega")
    server = Server(tmp_path / "study")
    server.start()
    yield server
    server.kill()


def wait_for_pair(page: Any, number: int, study: Study) -> None:
    """Wait until the page shows a pair and both videos have ended once."""
    page.wait_for_selector(f"#count:text-is('Pair {number + 1} of {study.num_trials}')")
    page.wait_for_selector(READY)


def test_whole_session_by_keyboard_over_a_crash_of_the_server(served: Server, open_page: Any) -> None:
    study = read_study(served.study)
    page = open_page(served.url)
    page.wait_for_selector("#begin:focus")
    page.keyboard.press("Enter")
    pressed = []
    for number in range(study.num_trials):
        if number == 4:
            page = come_back(page, open_page)
        wait_for_pair(page, number, study)
        if number == 2:
            served.kill()
        keys = [list(KEYS)[(number + place) % 4] for place in range(4)]
        for key in keys:
            page.keyboard.press(key)
        pressed.append({name: KEYS[key] for name, key in zip(QUESTIONS, keys, strict=True)})
        page.keyboard.press("Enter")
        if number == 2:
            page.wait_for_selector("text=The server does not answer")
            served.start()
    page.wait_for_selector("text=That was the last pair.")
    records = served.records()
    assert [record["type"] for record in records] == ["rater"] + ["answer"] * study.num_trials
    assert records[0]["kind"] == "automated", "a robot is no human rater"
    assert [record["answers"] for record in records[1:]] == pressed
    assert [(r["item"], r["left"], r["right"]) for r in records[1:]] == [
        (trial.item, trial.left, trial.right) for trial in trials_of(study, 0)
    ]
    assert all(min(record["plays"]) >= 1 for record in records[1:])
    assert page.inner_text("#error") == ""


def come_back(page: Any, open_page: Any) -> Any:
    """Close the tab and follow the rater's link in another browser."""
    link = page.url
    assert "?rater=" in link
    page.close()
    return open_page(link)


def test_answers_open_when_both_videos_have_ended(served: Server, open_page: Any) -> None:
    page = open_page(served.url)
    # Stopped before they start: what the rater does is up to the test then.
    page.evaluate("HTMLMediaElement.prototype.play = async function () {}")
    page.click("#begin")
    # wait_for_function would evaluate text in the page, which its Content-Security-Policy forbids.
    is_loaded = "[...document.querySelectorAll('video')].every(video => video.readyState === 4)"
    wait_until(lambda: page.evaluate(is_loaded), START_S, "both videos are loaded")
    is_closed = "[...document.querySelectorAll('fieldset')].every(set => set.disabled)"
    assert page.evaluate(is_closed)
    page.keyboard.press("a")
    assert page.locator("input:checked").count() == 0
    end = "document.querySelector('#{}').dispatchEvent(new Event('ended'))"
    page.evaluate(end.format("left"))
    assert page.evaluate(is_closed), "one video is not enough"
    assert page.inner_text("#status") == "Watch both videos to the end."
    page.evaluate(end.format("right"))
    assert not page.evaluate(is_closed)
    assert page.is_disabled("#next")
    page.keyboard.press("a")
    assert page.inner_text("#status") == "3 questions left."
    page.keyboard.press("Backspace")
    for key in "bsxb":
        page.keyboard.press(key)
    assert page.locator("input:checked").evaluate_all("all => all.map(one => one.value)") == [
        "right", "same", "bad", "right",
    ]  # fmt: skip
    assert page.is_enabled("#next")


def test_whole_session_on_a_phone(served: Server, open_page: Any) -> None:
    study = read_study(served.study)
    page = open_page(served.url, size_px=PHONE_PX, has_touch=True, is_mobile=True)
    page.tap("#begin")
    for number in range(study.num_trials):
        wait_for_pair(page, number, study)
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE_PX[0]
        box = page.locator("#right").bounding_box()
        assert box["y"] + box["height"] < PHONE_PX[1], "both videos are in view"
        for name in QUESTIONS:
            page.tap(f"label:has(input[name={name}][value=left])")
        page.fill("#note", f"note {number}")
        page.tap("#next")
    page.wait_for_selector("text=That was the last pair.")
    answers = served.records()[1:]
    assert [record["note"] for record in answers] == [f"note {number}" for number in range(study.num_trials)]
    assert {answer for record in answers for answer in record["answers"].values()} == {"left"}


def test_nothing_in_the_browser_names_an_arm(served: Server, open_page: Any) -> None:
    page = open_page(served.url)
    seen: list[str] = []

    def note(response: Any) -> None:
        seen.extend([response.url, str(response.headers)])
        if "json" in response.headers.get("content-type", ""):
            seen.append(response.text())

    page.on("response", note)
    page.reload()
    page.click("#begin")
    page.wait_for_selector(READY)
    seen += [page.content(), page.url]
    assert len([text for text in seen if "/v/" in text]) >= 2
    text = "\n".join(seen).lower()
    for secret in ("alpha", "omega", "broken", "mismatched", read_study(served.study).salt):
        assert secret not in text


def test_several_raters_at_once(served: Server, open_page: Any) -> None:
    pages = [open_page(served.url) for _ in range(3)]
    for page in pages:
        page.click("#begin")
    for page in pages:
        page.wait_for_selector(READY)
        for key in "abxs":
            page.keyboard.press(key)
        page.keyboard.press("Enter")
    for page in pages:
        page.wait_for_selector("text=Pair 2 of")
    records = served.records()
    assert sorted(record["number"] for record in records if record["type"] == "rater") == [0, 1, 2]
    assert sum(record["type"] == "answer" for record in records) == 3


def test_link_of_nobody_is_told_in_a_sentence(served: Server, open_page: Any) -> None:
    page = open_page(f"{served.url}?rater=nobody")
    page.wait_for_selector("text=Nobody takes part under this link; start anew without it")


def test_labels_names_and_contrast(served: Server, open_page: Any) -> None:
    page = open_page(served.url)
    page.click("#begin")
    page.wait_for_selector(READY)
    assert page.get_by_role("group", name="Which video is better overall?").get_by_role("radio").count() == 4
    assert page.get_by_role("radio", name="both bad").count() == len(QUESTIONS)
    assert page.get_by_label("video A").count() == page.get_by_label("video B").count() == 1
    assert page.get_by_label("A note, if you like").count() == 1
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for selector in ("#prompt", "#status", "#count", "legend", ".answers label", "#next", "#again"):
            assert contrast(page, selector) >= 4.5, (scheme, selector)


def contrast(page: Any, selector: str) -> float:
    """WCAG contrast of the text of an element with the first background below it that is not transparent."""
    ratio: float = page.evaluate(
        """selector => {
          const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
          const light = colour => {
            const [r, g, b] = numbers(colour).slice(0, 3).map(value => {
              value /= 255;
              return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          let node = document.querySelector(selector);
          const ink = getComputedStyle(node).color;
          const isClear = node => numbers(getComputedStyle(node).backgroundColor)[3] === 0;
          while (node.parentElement && isClear(node)) node = node.parentElement;
          const [high, low] = [light(ink), light(getComputedStyle(node).backgroundColor)].sort((a, b) => b - a);
          return (high + 0.05) / (low + 0.05);
        }""",
        selector,
    )
    return ratio
