"""GET /models: what is served, and all that a client needs to ask for something that can be made."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from codmd_serve.api.backend import Backend
from codmd_serve.api.errors import refusals
from codmd_serve.api.schemas import pixel_budget, qualities
from codmd_serve.config import FORMATS
from codmd_serve.jobs.store import ServedModel

router = APIRouter()


class ModelBody(BaseModel):
    """A model that requests may name. What only a loaded engine knows is empty or 0 before it is warm."""

    name: str = Field(description="for `model` of a request")
    is_teacher: bool = Field(description="whether it is the base of the student that stands before it in the list")
    is_ready: bool
    reason: str = Field(description="why it is not ready; empty when it is")
    num_steps: int
    guidance_scale: float = Field(description="1 is no guidance")
    device: str
    dtype: str
    attention: str
    execution: str
    lossy: str = Field(description="settings that change the picture, as fp8+sage; empty when there are none")
    fallback: str = Field(description="why something does not run as it would be fastest; empty when all does")
    height: int = Field(description="of the videos that it was trained on, as width, num_frames and fps")
    width: int
    num_frames: int
    fps: int
    size_multiple: int = Field(description="height and width must be multiples of it")
    max_side_px: int
    frame_multiple: int = Field(description="num_frames must be a multiple of it, plus one")
    max_num_frames: int
    max_pixels: int = Field(description="largest height * width * num_frames")
    service_s: float = Field(description="seconds that a video of the trained size takes; 0 is unknown")
    about: str = Field(description="what it can draw, as far as the bundle says so")
    examples: list[str] = Field(description="prompts that the bundle suggests")
    formats: list[str]
    qualities: list[str]


class ModelList(BaseModel):
    """Models, the default first."""

    models: list[ModelBody]
    version: str


@router.get("/models", responses=refusals(401), summary="Models that are served, with sizes, limits and examples")
async def list_models(request: Request) -> ModelList:
    """What each model is, how it runs, and what it takes. Models of which nothing is known yet are left out."""
    backend: Backend = request.app.state.backend
    bodies = [_body(model, backend.config.max_pixels) for model in backend.offered() if model.facts is not None]
    return ModelList(models=bodies, version=request.app.version)


def _body(model: ServedModel, max_pixels: int) -> ModelBody:
    facts: Any = model.facts
    same = {name: getattr(facts, name) for name in ModelBody.model_fields if hasattr(facts, name)}
    return ModelBody(
        **{**same, "examples": list(facts.examples)},
        is_teacher=model.teacher is not None,
        is_ready=model.is_ready,
        reason=model.reason,
        guidance_scale=1.0 if model.teacher is None else model.teacher.guidance_scale,
        max_pixels=pixel_budget(facts, max_pixels),
        formats=list(FORMATS),
        qualities=qualities(facts),
    )
