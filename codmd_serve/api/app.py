"""The FastAPI application: routes, middleware, health; knows nothing of how videos are made."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse

from codmd_serve import __version__
from codmd_serve.api import generate, jobs, models, videos
from codmd_serve.api.backend import Backend, public_facts
from codmd_serve.api.errors import CODES, add_error_handlers
from codmd_serve.api.limits import Limits
from codmd_serve.api.metrics import CONTENT_TYPE, Metrics
from codmd_serve.api.page import Page, PageRoutes, run_page
from codmd_serve.api.schemas import HealthBody
from codmd_serve.api.security import HostCheck, KeyCheck, Rates, allowed_names

DOCS_PAGE = Path(__file__).with_name("docs.html")


def create_app(
    backend: Backend,
    metrics: Metrics | None = None,
    keys: Mapping[str, str] | None = None,
    load_page: Callable[[], Page] | None = None,
) -> FastAPI:
    """Build the application around a backend, which it starts and stops.

    Args:
        backend: not started yet.
        metrics: of this process, where the dispatcher is told of them already.
        keys: SHA-256 of API keys by name; none lets everybody in.
        load_page: builds the web page, in a thread while the server runs already; None for no page.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await backend.start()
        page = None if load_page is None else asyncio.create_task(run_page(load_page, app.state))
        try:
            yield
        finally:
            if page is not None:
                page.cancel()
                await asyncio.gather(page, return_exceptions=True)
            await backend.stop()

    codes = "\n".join(f"- `{code}` {text}" for code, text in CODES.items())
    app = FastAPI(
        title="codmd-serve",
        version=__version__,
        description="Text to video with few-step distilled Wan students.\n\nEvery answer that is not a success has the "
        f'body `{{"error": {{"code", "message", "field"}}}}`. The codes:\n\n{codes}',
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    config = backend.config
    app.state.backend = backend
    app.state.metrics = metrics or Metrics()
    watched = (backend.known_queue, lambda: backend.is_ready, backend.dispatcher, config.queue_size)
    app.state.metrics.watch(*watched, lambda: backend.num_unserved)
    app.state.rates = Rates(config.key_jobs_per_minute)
    app.state.page, app.state.has_page = None, load_page is not None
    # The last one added is the first to see a request.
    app.add_middleware(PageRoutes, state=app.state)
    app.add_middleware(Limits, max_body_bytes=config.max_body_bytes, body_timeout_s=config.body_timeout_s)
    app.add_middleware(KeyCheck, keys=keys or {})
    app.add_middleware(HostCheck, names=allowed_names(config))
    for router in (generate.router, jobs.router, models.router, videos.router):
        app.include_router(router)
    app.add_api_route("/health", health, summary="Is the process alive")
    app.add_api_route("/ready", ready, summary="Is the model warm", responses={503: {"model": HealthBody}})
    app.add_api_route("/metrics", read_metrics, summary="Prometheus", response_class=Response)
    app.add_api_route("/docs", read_docs, include_in_schema=False, response_class=HTMLResponse)
    add_error_handlers(app)
    return app


async def health(request: Request) -> HealthBody:
    """Always 200 while the process lives; says whether a model is warm and how long the queue is."""
    backend: Backend = request.app.state.backend
    num_waiting, num_running, _ = backend.queue
    served = backend.models()
    runner: Any = backend.dispatcher.runner if backend.dispatcher is not None else None
    is_loaded = bool(served) and (runner is None or runner.facts is not None)
    return HealthBody(
        status="ok",
        is_ready=backend.is_ready,
        reason=backend.reason,
        model=public_facts(served[0]) if is_loaded else None,
        num_waiting=num_waiting,
        is_running=num_running > 0,
        num_running=num_running,
        num_workers=sum(model.capacity for model in served) if runner is None else runner.num_workers,
        num_worker_restarts=sum(getattr(runner, "restarts", {}).values()),
        num_unserved=backend.num_unserved,
        version=__version__,
    )


async def ready(request: Request, response: Response) -> HealthBody:
    """200 once the served shape is warm; 503 before, while no worker is alive or one hangs, and while shutting down."""
    body = await health(request)
    response.status_code = 200 if body.is_ready else 503
    return body


async def read_metrics(request: Request) -> Response:
    """Metrics of this process in Prometheus' text form."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE)


async def read_docs() -> HTMLResponse:
    """The API's page, from a file of ours: nothing is loaded from elsewhere."""
    return HTMLResponse(DOCS_PAGE.read_text(encoding="utf-8"))
