"""Every error in OpenAI's shape: which exception becomes which response."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from online.api.job import ClientGone
from online.errors import InvalidRequest, SlipstreamError

CLIENT_CLOSED_REQUEST = 499  # nginx's status, for logs only


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(SlipstreamError)
    async def known(request: Request, error: SlipstreamError) -> Response:
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse(describe_invalid(error).body(), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        detail = str(error.detail)
        wrapped = InvalidRequest(detail, code=detail.lower().replace(" ", "_"))
        return JSONResponse(wrapped.body(), error.status_code, error.headers)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return JSONResponse(SlipstreamError("internal error").body(), 500)


def describe_invalid(error: RequestValidationError) -> InvalidRequest:
    """The first fault of a request: the path of its field and the reason."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = ".".join(path)
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field: {name}", param=name, code="unknown_field")
    # Members of a union appear in the path; callers know only the field itself.
    param = path[0] if path else None
    return InvalidRequest(f"{name or 'body'}: {first['msg']}", param=param)
