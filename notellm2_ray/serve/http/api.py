"""The HTTP application of a gateway replica: routes, error answers, the page's files, and the guard around them."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from notellm2_ray.serve import errors
from notellm2_ray.serve.http import schemas
from notellm2_ray.serve.http.guard import Guard
from notellm2_ray.serve.http.page import PAGE_HEADERS, WEB

if TYPE_CHECKING:
    from notellm2_ray.serve.deployments.gateway import Gateway

_DESCRIPTION = (
    "Notes by content, and recommendations for users. API keys: `Authorization: Bearer KEY` or `x-api-key: KEY`."
)
OPENAI_PATH = "/v1/embeddings"
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorAnswer, "description": text}
    for status, text in {
        400: "the body is not JSON; or, where OpenAI's format is used, a value is wrong",
        401: "no valid API key",
        403: "the API key lacks the scope",
        408: "the body took too long to arrive",
        413: "more bytes, notes or pixels than allowed",
        422: "a value in the request is wrong or too large",
        429: "overloaded: try again after Retry-After seconds",
        503: "a part of the service is not available at the moment",
    }.items()
}


def build_api(gateway: Gateway) -> Any:
    """The ASGI application of a replica."""
    from fastapi import FastAPI
    from starlette.staticfiles import StaticFiles

    from notellm2_ray import __version__
    from notellm2_ray.serve.http import note_routes, status_routes, user_routes

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        await gateway.start()
        yield

    # No /docs: it would load scripts from other hosts.
    app = FastAPI(
        title="notellm2-ray",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=FAILURES,
        redirect_slashes=False,
    )
    app.state.refused = gateway.figures.refused
    for routes in (note_routes, user_routes, status_routes):
        app.include_router(routes.build(gateway))
    _add_error_answers(app)
    _declare_keys(app)
    if WEB.is_dir():
        app.mount("/ui", _with_headers(StaticFiles(directory=WEB), PAGE_HEADERS), name="ui")
    settings = gateway.settings.gateway
    most = settings.slots
    gateway.guard = Guard(app, gateway.limits, most, gateway.keys, gateway.figures)
    return gateway.guard


def _with_headers(app: Any, headers: dict[str, str]) -> Any:
    """An ASGI application with additional headers, so that the page's files are as safe as the page itself."""
    added = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def answering(scope: Any, receive: Any, send: Any) -> None:
        async def send_on(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await app(scope, receive, send_on)

    return answering


def _add_error_answers(app: Any) -> None:
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.responses import Response

    def answer(status: int, body: bytes, headers: Any = None) -> Response:
        return Response(body, status, dict(headers or {}), "application/json")

    async def ours(_: Any, error: errors.ApiError) -> Response:
        app.state.refused(error.kind)
        return answer(error.status, error.body(), error.headers)

    async def invalid(request: Any, error: RequestValidationError) -> Response:
        found = error.errors()
        if any(one["type"] == "json_invalid" for one in found):
            return await ours(request, errors.MalformedError("the body is not valid JSON"))
        kind = errors.OpenAiError if request.url.path == OPENAI_PATH else errors.InvalidError
        return await ours(request, kind(*errors.explain_validation(found)))

    async def http(_: Any, error: HTTPException) -> Response:
        kind = errors.BY_STATUS.get(error.status_code, "internal")
        app.state.refused(kind)
        return answer(error.status_code, errors.error_body(kind, str(error.detail)), error.headers)

    async def anything(_: Any, error: Exception) -> Response:
        app.state.refused("internal")  # Starlette raises the error again after this answer, and the guard logs it
        return answer(500, errors.ApiError("the service failed on this request; its log says why").body())

    app.add_exception_handler(Exception, anything)
    app.add_exception_handler(errors.ApiError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _declare_keys(app: Any) -> None:
    """Describe API keys in the OpenAPI document."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["bearer"] = {"type": "http", "scheme": "bearer"}
        schemes["header"] = {"type": "apiKey", "in": "header", "name": "x-api-key"}
        document["security"] = [{"bearer": []}, {"header": []}, {}]
        return document

    app.openapi = openapi
