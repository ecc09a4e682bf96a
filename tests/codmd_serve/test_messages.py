"""Messages between pool and worker: every kind survives the wire, and nothing else is taken for one."""

import pytest

from codmd_serve.config import GenerateParams, ModelFacts
from codmd_serve.messages import (
    Alive,
    Cancel,
    Cancelled,
    Done,
    Failed,
    Fatal,
    Generate,
    Load,
    Message,
    Progress,
    Ready,
    Started,
    decode,
    encode,
)

FACTS = ModelFacts(
    name="tiny",
    device="cpu",
    dtype="float32",
    attention="math",
    execution="eager",
    num_steps=4,
    height=64,
    width=64,
    num_frames=17,
    fps=16,
    size_multiple=16,
    max_side_px=1024,
    frame_multiple=4,
    max_num_frames=101,
    service_s=2.5,
    load_s=0.1,
)
PARAMS = GenerateParams(prompt='a "b"\n\u00e9', seed=2**63 - 1, height=32, width=32, num_frames=9, fps=16, crf=18)


@pytest.mark.parametrize(
    "message",
    [
        Load("/a bundle", {"device": "cuda:1", "threads": 2}),
        Generate("j1", "/a.mp4", PARAMS, is_previewed=True),
        Cancel("j1"),
        Ready(FACTS),
        Fatal("the bundle\nis truncated"),
        Alive(),
        Started("j1"),
        Progress("j1", "denoise", 1, 4, "data:image/webp;base64,AA=="),
        Done("j1", {"text": 1.5}, ["w"], 12.5),
        Failed("j1", "out_of_memory", "no room"),
        Cancelled("j1"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_message_survives_the_wire(message: Message) -> None:
    line = encode(message)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert decode(line) == message and decode(line.decode()) == message


@pytest.mark.parametrize(
    "line",
    [
        "Segmentation fault",
        "",
        "[1]",
        "{}",
        "7",
        '{"type": "nonsense"}',
        '{"type": ["done"]}',
        '{"type": "cancel"}',
        '{"type": "cancel", "id": "j1", "more": 1}',
        '{"type": "ready", "facts": {"name": "half"}}',
        '{"type": "ready", "facts": 3}',
        "[" * 100_000,
    ],
    ids=lambda line: line[:20],
)
def test_what_is_no_message_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not a message"):
        decode(line)
