"""Refusals and failures, in the form that OpenAI's clients understand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from llava_npu.data.tools.defects import shown
from llava_npu.errors import UserError

_FORM_OF_PART = re.compile(r"(\.content\[\d+\])\.(?:text|image_url)\b")  # named by pydantic before its own field
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A request that is not answered, and why.

    Attributes:
        code: a short name of the reason, for programs.
        param: the field of the request that is to blame.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(status, message, {"Retry-After": "1"} if status == 429 else None)
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        general = "invalid_request_error" if self.status_code < 500 else "server_error"
        kind = _TYPES.get(self.status_code, general)
        param = None if self.param is None else _encodable(self.param)
        return {"error": {"message": _encodable(self.detail), "type": kind, "param": param, "code": self.code}}


def _encodable(text: str) -> str:
    """What is quoted of a request may have half a character."""
    return text.encode("utf-8", "replace").decode()


def out_of_time(seconds: float) -> ApiError:
    """A request that was not answered in its time."""
    return ApiError(504, f"not done within {seconds:g} s (--request-timeout); ask for fewer tokens", "timeout")


def install_error_handlers(app: FastAPI) -> None:
    """Every refusal and failure of the application leaves in the same form."""

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> JSONResponse:
        return as_response(error)

    @app.exception_handler(UserError)
    async def refuse_input(request: Request, error: UserError) -> JSONResponse:
        return as_response(ApiError(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def refuse_form(request: Request, error: RequestValidationError) -> JSONResponse:
        return as_response(_malformed(error.errors()))

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # FastAPI's own, without the reason
            what = (
                "the body cannot be read: send JSON in UTF-8, not nested deeply, without numbers of thousands of digits"
            )
            return as_response(ApiError(400, what))
        what = f"{request.method} {request.url.path[:100]}: {error.detail}"
        if error.status_code == 404:
            what += "; the chat API is POST /v1/chat/completions"
        return as_response(ApiError(error.status_code, what))

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        return as_response(ApiError(500, "the server failed on this request; its log says more", "internal_error"))


def as_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status_code, headers=error.headers)


def _malformed(errors: Sequence[Any]) -> ApiError:
    """What is wrong with a body, by its place in it; of what may have several forms, by the one that fits furthest."""
    first = max(errors, key=lambda error: len(error["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    place = ""
    for part in first["loc"][1:]:
        if part == "str" or (isinstance(part, str) and not part.isidentifier()):
            continue  # pydantic's names of the forms
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    place = _FORM_OF_PART.sub(r"\1", place)
    place = place or "the body"
    found = "" if first["type"] == "missing" else f"; it is {shown(first['input'])}"
    return ApiError(400, f"{place}: {first['msg']}{found}", param=place)
