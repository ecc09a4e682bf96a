"""The pinned `openai` package against a real server process, with nothing in between."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from processes import ServerProcess

PROMPT = "a red circle moves right quickly on a black background"
pytestmark = pytest.mark.usefixtures("_deprecated_calls")


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.client.base_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def done(client: openai.OpenAI) -> Any:
    with pytest.warns(DeprecationWarning, match="scheduled to permanently shut down"):
        return client.videos.create_and_poll(prompt=PROMPT, extra_body={"seed": 7})


def test_create_and_poll_returns_the_finished_video(done: Any, server: ServerProcess) -> None:
    assert (done.object, done.status, done.progress, done.error) == ("video", "completed", 100, None)
    assert (done.model, done.size, done.seconds) == ("tiny-codmd", "32x32", "0.5625") and done.prompt == PROMPT
    assert done.created_at <= done.completed_at < done.expires_at
    assert done.seed == 7 and 0 < done.inference_time_s < 60 and done.peak_memory_mb is not None
    assert server.job(done.id)["status"] == "completed"


def test_create_returns_at_once_and_retrieve_follows(client: openai.OpenAI, done: Any) -> None:
    video = client.videos.create(prompt=PROMPT, model="tiny-codmd", size="32x32", seconds="0.5625")  # type: ignore
    assert video.status in ("queued", "in_progress", "completed") and video.id != done.id
    polled = client.videos.poll(video.id)
    assert polled.status == "completed" and client.videos.retrieve(video.id) == polled


def test_poll_is_told_how_soon_to_ask_again(client: openai.OpenAI, done: Any) -> None:
    """The package waits a second where the server does not say; a video of .2 s should not take one."""
    answer = client.videos.with_raw_response.retrieve(done.id)
    assert 50 <= int(answer.headers["openai-poll-after-ms"]) <= 5000


def test_list_walks_all_pages_in_both_orders(client: openai.OpenAI, done: Any) -> None:
    newest = [video.id for video in client.videos.list(limit=1)]
    oldest = [video.id for video in client.videos.list(limit=2, order="asc")]
    assert newest == oldest[::-1] and done.id in newest and len(newest) == len(set(newest))
    assert client.videos.list(limit=1).has_next_page() == (len(newest) > 1)


def test_download_content_gives_the_bytes_of_the_job(
    client: openai.OpenAI, done: Any, server: ServerProcess, tmp_path: Path
) -> None:
    client.videos.download_content(done.id).write_to_file(tmp_path / "a.mp4")
    content = (tmp_path / "a.mp4").read_bytes()
    assert content[4:8] == b"ftyp" and content == server.video(done.id)
    with client.videos.with_streaming_response.download_content(done.id) as answer:
        assert b"".join(answer.iter_bytes(1000)) == content and answer.headers["content-type"] == "video/mp4"


def test_delete_forgets_the_video(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, extra_body={"seed": 8})
    gone = client.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_refusals_are_the_exceptions_of_the_package(client: openai.OpenAI, done: Any) -> None:
    """Each with our code and sentence in `body`, which is where the package puts the `error` of an answer."""
    with pytest.raises(openai.UnprocessableEntityError, match="size must be WIDTHxHEIGHT") as caught:
        client.videos.create(prompt=PROMPT, size="big")  # type: ignore[arg-type]
    assert caught.value.code == "invalid_request" and caught.value.body["field"] == "size"  # type: ignore[index]
    with pytest.raises(openai.UnprocessableEntityError, match="model must be one of tiny-codmd, got 'sora-2'"):
        client.videos.create(prompt=PROMPT, model="sora-2")
    with pytest.raises(openai.UnprocessableEntityError, match="from text only"):
        client.videos.create(prompt=PROMPT, input_reference=("a.png", b"x", "image/png"))
    with pytest.raises(openai.NotFoundError, match="no such job"):
        client.videos.retrieve("nowhere")
    with pytest.raises(openai.UnprocessableEntityError, match="no thumbnails"):
        client.videos.download_content(done.id, variant="thumbnail")
    with pytest.raises(openai.APIStatusError) as refused:  # what the package offers and no text-to-video model has
        client.videos.remix(done.id, prompt=PROMPT)
    assert refused.value.status_code == 404 and refused.value.code == "not_found"


def test_an_unknown_field_of_extra_body_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="unknown field 'stepz'"):
        client.videos.create(prompt=PROMPT, extra_body={"stepz": 4})


def test_the_same_idempotency_key_is_the_same_video(client: openai.OpenAI) -> None:
    headers = {"Idempotency-Key": "openai-1"}
    first = client.videos.create(prompt=PROMPT, extra_headers=headers)
    assert client.videos.create(prompt=PROMPT, extra_headers=headers).id == first.id
    with pytest.raises(openai.ConflictError, match="Idempotency-Key"):
        client.videos.create(prompt=PROMPT + " and more", extra_headers=headers)
    assert client.videos.poll(first.id).status == "completed"


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-codmd"]
    assert client.models.retrieve("tiny-codmd").owned_by == "codmd-serve"


def test_the_asynchronous_client_works_too(server: ServerProcess) -> None:
    async def story() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.client.base_url}/v1", api_key="none") as client:
            video = await client.videos.create_and_poll(prompt=PROMPT, extra_body={"seed": 9}, poll_interval_ms=50)
            content = await client.videos.download_content(video.id)
            return video, await content.aread()

    video, content = asyncio.run(story())
    assert video.status == "completed" and video.seed == 9 and content == server.video(video.id)
