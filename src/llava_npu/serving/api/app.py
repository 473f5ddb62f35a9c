"""The application: routes, errors and the gate in front."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from llava_npu.serving.api.chat import chat_routes
from llava_npu.serving.api.errors import install_error_handlers
from llava_npu.serving.api.gate import Gate
from llava_npu.serving.api.service import Service
from llava_npu.serving.api.worker_protocol import worker_routes
from llava_npu.version import __version__


def build_app(service: Service, api_key: str | None = None) -> ASGIApp:
    """The ASGI application of a service that has been started.

    Args:
        api_key: what clients must send as a bearer token; None for anybody.
    """
    app = FastAPI(title="LLaVA-NPU", version=__version__, docs_url=None, redoc_url=None)
    install_error_handlers(app)
    app.include_router(chat_routes(service))
    app.include_router(worker_routes(service))

    @app.get("/health")
    async def health() -> Response:
        if service.is_alive:
            return JSONResponse({"status": "ok", "model": service.name})
        return JSONResponse({"status": "the engine has stopped"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return Gate(app, service.limits, service.max_admitted, api_key, service.metrics)
