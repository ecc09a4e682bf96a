"""The page of the study over HTTP: what it sends tells nothing of the arms, and refusals are sentences."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from studies import make_study

from app.study import PAGE, build_app
from distill.evaluate.study.design import QUESTIONS, trials_of, video_files
from distill.evaluate.study.serve import STATUSES
from distill.evaluate.study.session import StudySession

ALL_SAME = dict.fromkeys(QUESTIONS, "same")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudySession]:
    folder = tmp_path_factory.mktemp("study")
    make_study(folder, "alpha", "omega")
    session = StudySession(folder / "study", clock=Clock())
    yield session
    session.close()


@pytest.fixture
def client(session: StudySession) -> TestClient:
    return TestClient(build_app(session, STATUSES))


def enrol(client: TestClient) -> str:
    return str(client.post("/api/raters", json={}).json()["rater"])


def answer(client: TestClient, rater: str, number: int, **more: Any) -> Any:
    body = {"trial": number, "answers": ALL_SAME, "plays": [1, 1], **more}
    return client.post(f"/api/raters/{rater}/answers", json=body)


def test_rater_goes_through_the_study(client: TestClient, session: StudySession) -> None:
    about = client.get("/api/study").json()
    assert about == {"title": "Which video is better?", "num_trials": session.study.num_trials}
    rater = enrol(client)
    state = client.get(f"/api/raters/{rater}").json()
    for number in range(about["num_trials"]):
        assert state["trial"]["number"] == state["num_done"] == number
        state = answer(client, rater, number, note="fine").json()
    assert state["trial"] is None and state["num_done"] == about["num_trials"]


def test_videos_tell_nothing_but_their_pictures(client: TestClient, session: StudySession) -> None:
    rater = enrol(client)
    number = session.num_raters - 1
    trial = client.get(f"/api/raters/{rater}").json()["trial"]
    names = video_files(session.study, trials_of(session.study, number)[0])
    headers = []
    for side, name in zip(("left", "right"), names, strict=True):
        token = trial[side]
        assert re.fullmatch(r"[0-9a-f]{24}", token) and token not in name
        got = client.get(f"/v/{token}.mp4")
        assert got.status_code == 200 and got.content == session.video(token).read_bytes()
        own = {key: value for key, value in got.headers.items() if key != "date"}
        assert own.pop("etag") == f'"{token}"'
        headers.append(own)
    assert headers[0] == headers[1], "all but the address is equal: size, date, type"
    assert "content-disposition" not in headers[0]


def test_videos_are_sent_in_parts_to_players_that_want_so(client: TestClient) -> None:
    token = client.get(f"/api/raters/{enrol(client)}").json()["trial"]["left"]
    whole = client.get(f"/v/{token}.mp4").content
    part = client.get(f"/v/{token}.mp4", headers={"range": "bytes=4-7"})
    assert (part.status_code, part.content, whole[4:8]) == (206, b"ftyp", b"ftyp")
    assert client.head(f"/v/{token}.mp4").headers["content-length"] == str(len(whole))


def test_the_same_video_has_another_address_in_another_trial(client: TestClient, session: StudySession) -> None:
    tokens, files = [], []
    for _ in range(2):
        rater = enrol(client)
        for number in range(session.study.num_trials):
            trial = client.get(f"/api/raters/{rater}").json()["trial"]
            tokens += [trial["left"], trial["right"]]
            files += [session.video(trial[side]) for side in ("left", "right")]
            answer(client, rater, number)
    assert len(set(tokens)) == len(tokens) > len(set(files))


@pytest.mark.parametrize(
    "path", ["/v/nothing.mp4", "/v/..%2Fstudy.json", "/study.json", "/videos/", "/docs", "/api/raters/x"]
)
def test_nothing_else_is_there(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_refusals_are_sentences(client: TestClient) -> None:
    rater = enrol(client)
    for status, words, got in (
        (404, "nobody takes part", client.get("/api/raters/nobody")),
        (409, "pair 3 is not the one", answer(client, rater, 2)),
        (422, "play to the end", answer(client, rater, 0, plays=[0, 1])),
        (422, "answer all of", answer(client, rater, 0, answers={"look": "left"})),
        (422, "answers.look", answer(client, rater, 0, answers={**ALL_SAME, "look": "both"})),
        (422, "trial", answer(client, rater, -1)),
        (422, "extra", answer(client, rater, 0, arm="alpha")),
        (422, "JSON", client.post("/api/raters", content=b"{", headers={"content-type": "application/json"})),
        (413, "at most", client.post("/api/raters", json={"x": "y" * 20_000})),
        (413, "at most", client.post("/api/raters", content=iter([b"{}"]))),
    ):
        assert got.status_code == status, got.text
        assert words.lower() in got.json()["error"]["message"].lower()
    assert client.get(f"/api/raters/{rater}").json()["num_done"] == 0


def test_page_asks_no_other_host(client: TestClient) -> None:
    got = client.get("/")
    assert got.status_code == 200 and got.text == PAGE.read_text(encoding="utf-8")
    assert "default-src 'none'" in got.headers["content-security-policy"]
    assert got.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"https?:|//\w+\.\w", got.text)
    assert set(re.findall(r"""(?:src|href)\s*=\s*["`]([^"`]*)["`]""", got.text)) == {
        "data:,",
        "v/${trial[video.id]}.mp4",
    }


def test_page_is_a_file_of_the_package() -> None:
    assert Path(PAGE).name == "study.html" and PAGE.is_file()
