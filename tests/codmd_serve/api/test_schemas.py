"""Every way in which a body can be wrong is judged before anything reaches a device, in one helpful sentence."""

from dataclasses import asdict, replace
from typing import Any

import pytest
from pydantic import ValidationError

from codmd_serve.api.schemas import EXAMPLES, GenerateBody, qualities, to_params
from codmd_serve.config import MAX_SEED, ModelFacts
from codmd_serve.errors import InvalidRequestError

FACTS = ModelFacts(
    name="fake",
    device="cpu",
    dtype="float32",
    attention="sdpa",
    execution="eager",
    num_steps=4,
    height=64,
    width=96,
    num_frames=17,
    fps=16,
    size_multiple=16,
    max_side_px=1024,
    frame_multiple=4,
    max_num_frames=101,
    service_s=1.0,
    load_s=1.0,
)


def params_of(max_pixels: int = 0, facts: ModelFacts = FACTS, **body: Any) -> Any:
    return to_params(GenerateBody(**{"prompt": "a red circle", **body}), facts, max_pixels)


def test_what_is_left_out_is_what_the_model_was_trained_at() -> None:
    params = asdict(params_of(seed=5))
    assert params == {
        "prompt": "a red circle",
        "seed": 5,
        "height": 64,
        "width": 96,
        "num_frames": 17,
        "fps": 16,
        "crf": 18,
        "format": "mp4",
        "may_be_lossy": False,
        "teacher": "",
    }


def test_a_seed_that_is_left_out_is_drawn_from_32_bits() -> None:
    seeds = {params_of().seed for _ in range(8)}
    assert len(seeds) > 1 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("seed", [0, MAX_SEED])
def test_the_ends_of_the_seeds_are_kept(seed: int) -> None:
    assert params_of(seed=seed).seed == seed


@pytest.mark.parametrize(("quality", "crf"), [("low", 28), ("medium", 23), ("high", 18)])
def test_quality_is_a_word_for_crf(quality: str, crf: int) -> None:
    assert params_of(quality=quality).crf == crf
    assert params_of(crf=crf).crf == crf


@pytest.mark.parametrize(
    ("facts", "quality", "may_be_lossy"),
    [
        ({}, None, False),
        ({}, "high", False),  # nothing lossy is served, and the exact engine is more than what was asked for
        ({"lossy_beside": "fp8"}, None, False),
        ({"lossy_beside": "fp8"}, "lossless", False),
        ({"lossy_beside": "fp8"}, "high", True),
        ({"lossy_beside": "fp8"}, "low", True),
        ({"lossy": "fp8"}, "high", False),
    ],
)
def test_quality_picks_the_engine(facts: dict[str, str], quality: str | None, may_be_lossy: bool) -> None:
    body = GenerateBody(prompt="a", quality=quality)
    assert to_params(body, replace(FACTS, **facts)).may_be_lossy is may_be_lossy


def test_lossless_goes_with_a_crf_and_with_a_gif() -> None:
    assert params_of(quality="lossless", crf=30).crf == 30
    assert params_of(quality="lossless").crf == 18
    assert params_of(quality="lossless", format="gif").format == "gif"


def test_lossless_is_refused_where_only_a_lossy_engine_is_served() -> None:
    lossy = replace(FACTS, lossy="fp8+sage")
    with pytest.raises(InvalidRequestError, match=r"has fp8\+sage: high, medium, low would be accepted") as caught:
        to_params(GenerateBody(prompt="a", quality="lossless"), lossy)
    assert caught.value.field == "quality"
    assert qualities(lossy) == ["high", "medium", "low"] and qualities(FACTS)[0] == "lossless"


@pytest.mark.parametrize("body", EXAMPLES)
def test_the_examples_of_the_documentation_are_accepted(body: dict[str, Any]) -> None:
    assert to_params(GenerateBody(**body), FACTS).prompt == body["prompt"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ""}, "at least 1 character"),
        ({"prompt": " \n\t"}, "must not be blank"),
        ({"prompt": "\ufeff"}, "must not be blank"),
        ({"prompt": "\x00\x07"}, "must not be blank"),
        ({"prompt": "\u200b &nbsp;"}, "must not be blank"),
        ({"prompt": "x" * 4001}, "at most 4000 characters"),
        ({"prompt": 7}, "valid string"),
        ({"prompt": "a \ud800 b"}, "valid string"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": 2**63}, "less than or equal to 9223372036854775807"),
        ({"seed": 1.0}, "valid integer"),
        ({"seed": "1"}, "valid integer"),
        ({"seed": True}, "valid integer"),
        ({"height": 0}, "greater than or equal to 1"),
        ({"num_frames": 10**10}, "less than or equal to"),
        ({"fps": 0}, "greater than or equal to 1"),
        ({"fps": 121}, "less than or equal to 120"),
        ({"crf": 0}, "greater than or equal to 1"),
        ({"crf": 52}, "less than or equal to 51"),
        ({"quality": "best"}, "'lossless', 'high', 'medium' or 'low'"),
        ({"format": "avi"}, "'mp4', 'gif' or 'webp'"),
        ({"sed": 1}, "Extra inputs are not permitted"),
        ({"path": "/etc/passwd"}, "Extra inputs are not permitted"),
    ],
)
def test_a_body_that_is_not_well_formed_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        params_of(**body)


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"format": "gif", "crf": 18}, "crf", "no rate factor: leave crf out"),
        ({"format": "gif", "quality": "low"}, "quality", "no rate factor: leave quality out"),
        ({"format": "gif", "fps": 60}, "fps", "fps of a gif must be 1..50, which is what browsers play, got 60"),
        ({"height": 65}, "height", "multiple of 16 up to 1024, got 65; 64 would be accepted"),
        ({"width": 8}, "width", "got 8; 16 would be accepted"),
        ({"width": 1040}, "width", "got 1040; 1024 would be accepted"),
        ({"width": 2**31}, "width", "1024 would be accepted"),
        ({"num_frames": 18}, "num_frames", r"must be 4k \+ 1, and at 96x64 up to 65, got 18; 17 would be accepted"),
        ({"num_frames": 69}, "num_frames", "got 69; 65 would be accepted"),
        ({"num_frames": 10**9}, "num_frames", "got 1000000000; 65 would be accepted"),
        ({"height": 1024, "width": 1024}, None, "one frame of 1024x1024 is more than the 417792 pixels"),
        ({"height": 512, "width": 512}, "num_frames", "at 512x512 up to 1, got 17; 1 would be accepted"),
        ({"negative_prompt": "ugly"}, "negative_prompt", "has no guidance"),
        ({"guidance_scale": 4.5}, "guidance_scale", "guidance built in"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "guidance built in"),
        ({"num_inference_steps": 50}, "num_inference_steps", "exactly 4 steps: leave num_inference_steps out or say 4"),
        ({"crf": 20, "quality": "low"}, "quality", "crf or quality, not both"),
    ],
)
def test_what_the_model_cannot_do_is_refused_with_what_it_can(
    body: dict[str, Any], field: str | None, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        params_of(**body)
    assert caught.value.field == field


def test_what_a_refusal_says_would_be_accepted_is_accepted() -> None:
    for num_frames in (2, 18, 67, 10**9):
        with pytest.raises(InvalidRequestError) as caught:
            params_of(num_frames=num_frames)
        offered = int(str(caught.value).rpartition("; ")[2].split()[0])
        assert params_of(num_frames=offered).num_frames == offered


def test_guidance_that_changes_nothing_is_accepted() -> None:
    params = params_of(seed=1, guidance_scale=1, num_inference_steps=4, negative_prompt="")
    assert params == params_of(seed=1)


def test_the_operator_may_set_the_budget() -> None:
    assert params_of(max_pixels=2**40, num_frames=101).num_frames == 101
    with pytest.raises(InvalidRequestError, match="at 96x64 up to 1, got 5; 1 would be accepted"):
        params_of(max_pixels=2 * 64 * 96, num_frames=5)


def test_what_memory_has_no_room_for_is_refused_whatever_the_budget() -> None:
    small = replace(FACTS, max_video_px=64 * 96 * 21)
    assert params_of(2**40, small, num_frames=21).num_frames == 21
    with pytest.raises(InvalidRequestError, match="at 96x64 up to 21, got 25; 21 would be accepted"):
        params_of(2**40, small, num_frames=25)
    with pytest.raises(InvalidRequestError, match="up to 17"):  # a bound of the operator below it stays
        params_of(64 * 96 * 17, small, num_frames=21)


def test_the_network_is_a_limit_whatever_the_budget() -> None:
    with pytest.raises(InvalidRequestError, match="up to 101"):
        params_of(max_pixels=2**40, num_frames=105)


def test_a_model_of_another_grid_is_judged_by_its_own() -> None:
    wan = replace(FACTS, size_multiple=32, frame_multiple=8)
    assert params_of(facts=wan, height=96, num_frames=25).height == 96
    with pytest.raises(InvalidRequestError, match="multiple of 32"):
        params_of(facts=wan, height=80)
