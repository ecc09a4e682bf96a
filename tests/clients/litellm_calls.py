"""Make, follow, download and list videos with LiteLLM's own calls. Run by stock_clients.py in LiteLLM's environment.

Usage: litellm_calls.py ADDRESS MODEL
"""

import sys
import time

import litellm

DEADLINE_S = 120.0
PROMPT = "a red circle moves right quickly on a black background"


def main(address: str, model: str) -> None:
    """Print a line for each call; raise at the first that does not do what it should."""
    litellm.suppress_debug_info = True
    place = {"api_base": f"{address}/v1", "api_key": "none", "custom_llm_provider": "openai"}
    video = litellm.video_generation(prompt=PROMPT, model=f"openai/{model}", **place)
    print(f"video_generation: status={video.status} seconds={video.seconds} size={video.size}")
    deadline_s = time.monotonic() + DEADLINE_S
    while video.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline_s, "the video was never finished"
        time.sleep(0.1)
        video = litellm.video_status(video_id=video.id, **place)
    print(f"video_status: status={video.status} progress={video.progress}")
    assert video.status == "completed", video
    content = litellm.video_content(video_id=video.id, **place)
    assert content[4:8] == b"ftyp", content[:20]
    print(f"video_content: {len(content)} bytes of mp4")
    listed = litellm.video_list(limit=1, **place)
    assert len(listed["data"]) == 1 and listed["data"][0]["status"] == "completed", listed
    print(f"video_list: {len(listed['data'])} of limit 1")
    for name, wanted, call in (
        ("an unknown model", "model must be one of", lambda: litellm.video_generation("a", model="openai/no", **place)),
        ("an unknown video", "no such job", lambda: litellm.video_status(video_id="nowhere", **place)),
    ):
        try:
            call()
        except Exception as error:
            if wanted not in str(error):
                raise
            print(f"{name}: {type(error).__name__} {getattr(error, 'status_code', '')}")
        else:
            raise AssertionError(f"{name} was taken")


if __name__ == "__main__":
    main(*sys.argv[1:])
