"""The answers of the OpenAI-style routes, as their documentation has them; a test compares them with what is sent."""

from typing import Literal

from pydantic import BaseModel, Field


class VideoError(BaseModel):
    """Why there is no video."""

    code: str
    message: str


class VideoObject(BaseModel):
    """A job in the wire form. Times are Unix seconds."""

    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(description="0..100")
    prompt: str
    size: str = Field(description="WIDTHxHEIGHT")
    seconds: str
    created_at: int
    completed_at: int | None
    expires_at: int | None
    error: VideoError | None
    remixed_from_video_id: None
    seed: int
    num_frames: int
    fps: int
    inference_time_s: float | None = Field(description="all stages, without the queue")
    peak_memory_mb: float | None


class VideoPage(BaseModel):
    """A page of videos."""

    object: Literal["list"]
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None = Field(description="the `after` of the next page")
    has_more: bool


class DeletedVideo(BaseModel):
    """A video that is found nowhere any more."""

    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


class ModelCard(BaseModel):
    """A model that is served."""

    id: str = Field(description="what `model` of a request names")
    object: Literal["model"]
    created: int
    owned_by: str
    qualities: list[str] | None = Field(None, description="words for `quality` that it takes; absent until it is known")
    lossy: str | None = Field(None, description="the lossy engine, alone or beside the exact one; empty without one")


class ModelPage(BaseModel):
    """All models, the default first."""

    object: Literal["list"]
    data: list[ModelCard]
