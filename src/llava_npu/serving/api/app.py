"""The application: routes, errors, and admission in front of them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from llava_npu.serving.addresses import AllowedHosts
from llava_npu.serving.api.admission import AdmissionMiddleware
from llava_npu.serving.api.chat import chat_routes
from llava_npu.serving.api.errors import install_error_handlers
from llava_npu.serving.api.service import Service
from llava_npu.serving.api.worker_protocol import worker_routes
from llava_npu.version import __version__


def build_app(service: Service, *, api_key: str | None = None, hosts: AllowedHosts | None = None) -> ASGIApp:
    """The ASGI application of a service that has been started.

    Args:
        api_key: what clients must send as a bearer token; None for anybody.
        hosts: names by which it may be called; by default this machine's loopback.
    """
    app = describe_api(service)
    return AdmissionMiddleware(app, service, api_key=api_key, hosts=hosts)


def describe_api(service: Service) -> FastAPI:
    """The routes with their OpenAPI document, without admission."""
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

    return app
