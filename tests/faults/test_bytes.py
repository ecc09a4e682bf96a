"""A server that is killed with eight jobs makes the same eight videos as one that is not; the embedded student."""

from collections.abc import Callable

import pytest
from processes import ServerProcess

Server = Callable[..., ServerProcess]
PROMPTS = [
    f"a {color} {shape} moves {way} quickly on a black background"
    for color, shape, way in (
        ("red", "circle", "right"),
        ("yellow", "square", "left"),
        ("purple", "cross", "up"),
        ("white", "triangle", "down"),
        ("blue", "ring", "up"),
        ("green", "square", "right"),
        ("cyan", "circle", "down"),
        ("red", "triangle", "left"),
    )
]
THREADS = ("--threads", "1")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The eight hashes of a server that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    server = ServerProcess(folder, folder / "data", *THREADS, is_fake=False)
    try:
        server.start()
        jobs = [server.submit(prompt, seed=number) for number, prompt in enumerate(PROMPTS)]
        for job_id in jobs:
            server.status_is(job_id, "completed")
        return [server.sha256(job_id) for job_id in jobs]
    finally:
        server.end()


@pytest.mark.slow
def test_a_server_killed_with_eight_jobs_makes_the_same_eight_videos(server: Server, undisturbed: list[str]) -> None:
    running = server(*THREADS, is_fake=False)
    running.start()
    jobs = [running.submit(prompt, seed=number) for number, prompt in enumerate(PROMPTS)]
    for number in (0, 3):
        running.status_is(jobs[number], "running", "completed")
        running.kill()
        running.start()
    for job_id in jobs:
        assert running.status_is(job_id, "completed")["attempts"] == 1
    found = [running.sha256(job_id) for job_id in jobs]
    for pair in zip(undisturbed, found, PROMPTS, strict=True):
        print(*pair)
    assert found == undisturbed
    assert len(set(found)) == len(PROMPTS)
