"""curl against a real server process: what the documentation tells people to type."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from processes import ServerProcess, until

BODY = json.dumps({"prompt": "a red circle moves right quickly", "seed": 21})


@pytest.fixture
def curl(server: ServerProcess, tmp_path: Path) -> "Curl":
    return Curl(str(server.client.base_url), tmp_path)


class Curl:
    """Run curl; keep what it wrote.

    Attributes:
        status, headers, content: of the last answer, header names in small letters.
    """

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder = address, folder
        self.status, self.headers, self.content = 0, dict[str, str](), b""

    def __call__(self, path: str, *words: str) -> "Curl":
        program = shutil.which("curl")
        assert program is not None, "curl is needed: apt-get install curl"
        body, head = self.folder / "body", self.folder / "head"
        command = [program, "-sS", "--noproxy", "*", "-m", "60", "-o", str(body), "-D", str(head), *words]
        subprocess.run([*command, self.address + path], check=True, timeout=90)
        # The last block: one that asks before it sends has "100 Continue" first.
        lines = head.read_text().strip().split("\n\n")[-1].splitlines()
        self.status = int(lines[0].split()[1])
        fields = (line.partition(":") for line in lines[1:])
        self.headers = {name.lower(): value.strip() for name, _, value in fields}
        self.content = body.read_bytes() if body.exists() else b""
        return self

    @property
    def json(self) -> dict[str, object]:
        value: dict[str, object] = json.loads(self.content)
        return value


def post(curl: Curl, *words: str, body: str = BODY) -> Curl:
    return curl("/generate", "-H", "Content-Type: application/json", "-d", body, *words)


def test_respond_async_gives_a_job_to_follow_and_to_download(curl: Curl) -> None:
    answer = post(curl, "-H", "Prefer: respond-async")
    assert answer.status == 202 and answer.headers["preference-applied"] == "respond-async"
    location = answer.headers["location"]
    assert answer.json["status"] in ("queued", "running") and location == f"/jobs/{answer.json['id']}"
    until(lambda: curl(location).json["status"] == "completed", lambda: curl.content)
    whole = curl(f"{location}/video").content
    assert curl.headers["content-type"] == "video/mp4" and whole[4:8] == b"ftyp"
    part = curl(f"{location}/video", "-r", "0-99")
    assert part.status == 206 and part.content == whole[:100]
    assert curl(f"{location}/video", "-H", f"If-None-Match: {part.headers['etag']}").status == 304
    events = curl(f"{location}/events", "-N").content.decode()
    assert events.strip().split("\n\n")[-1].split("\n")[1] == "event: done"


def test_prefer_wait_and_no_preference_give_the_video(curl: Curl) -> None:
    waited = post(curl, "-H", "Prefer: wait=60")
    assert waited.status == 200 and waited.headers["x-seed"] == "21"
    content = waited.content
    assert content[4:8] == b"ftyp" and post(curl).content == content


def test_cancel_by_delete_answers_the_final_state(curl: Curl) -> None:
    location = post(curl, "-H", "Prefer: respond-async", "-H", "Cache-Control: no-cache").headers["location"]
    assert curl(location, "-X", "DELETE").json["status"] in ("cancelled", "completed")


def test_mistakes_have_a_code_and_a_sentence(curl: Curl) -> None:
    def judged(answer: Curl) -> tuple[int, object]:
        error = answer.json["error"]
        assert isinstance(error, dict) and error["message"]
        return answer.status, error["code"]

    assert judged(post(curl, body='{"prompt": " "}')) == (422, "invalid_request")
    assert judged(post(curl, body="{")) == (422, "invalid_request")
    assert judged(curl("/nowhere")) == (404, "not_found")
    assert judged(curl("/generate")) == (405, "method_not_allowed")


def test_head_and_health_are_answered(curl: Curl) -> None:
    assert curl("/health", "-I").status == 200
    assert curl("/ready").json["is_ready"] is True


def test_a_form_is_taken_by_the_openai_style_route(curl: Curl) -> None:
    answer = curl("/v1/videos", "-F", "prompt=a blue ring", "-F", "seed=3", "-F", "size=32x32")
    assert answer.status == 200 and answer.json["object"] == "video" and answer.json["seed"] == 3
