"""Routes for the service itself: health, readiness, figures, the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from notellm2_ray.serve.errors import NotFoundError
from notellm2_ray.serve.figures import render, summary
from notellm2_ray.serve.http import schemas
from notellm2_ray.serve.http.page import PAGE_HEADERS, WEB

if TYPE_CHECKING:
    from notellm2_ray.serve.deployments.gateway import Gateway


def build(gateway: Gateway) -> Any:
    """The router."""
    from fastapi import APIRouter
    from starlette.responses import FileResponse, JSONResponse, Response

    routes = APIRouter(tags=["service"])

    @routes.get("/v1/health", response_model=schemas.Health)
    async def health() -> Any:
        """Whether this process answers."""
        return {"status": "ok"}

    @routes.get("/v1/ready", response_model=schemas.Ready, responses={503: {"model": schemas.Ready}})
    async def ready() -> Any:
        """Whether the next requests will be answered, whichever gateway they go to; 503 until they will.

        Reasons may also name optional parts.
        """
        problems, missing = await gateway.readiness.status_of_all()
        reasons = problems + missing
        names = ("index", "encoder", "writer", "users", *(one.name for one in gateway.optional))
        parts = {name: not any(reason.startswith(f"{name}:") for reason in reasons) for name in names}
        body = {"ready": not problems, "reasons": reasons, "parts": parts}
        return JSONResponse(body, 200 if body["ready"] else 503)

    @routes.get("/v1/stats", response_model=schemas.Stats)
    async def stats() -> Any:
        """Figures of all replicas: counts, latencies by route and stage, batch sizes, and the state of each index."""
        reports = {**gateway.readiness.reports, gateway.name: gateway.report()}
        encoders = await gateway.other_figures()
        return {
            "replica": gateway.name,
            "model": gateway.index.model_fingerprint,
            "ready": not gateway.readiness.problems,
            "in_hand": gateway.guard.in_hand if gateway.guard else 0,
            "replicas": {name: report["state"] for name, report in reports.items()},
            **summary([*(report["families"] for report in reports.values()), *encoders]),
        }

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Any:
        """The same for Prometheus; one replica answers for all, and a label names each."""
        reports = {**gateway.readiness.reports, gateway.name: gateway.report()}
        text = render([*(report["families"] for report in reports.values()), *await gateway.other_figures()])
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/", include_in_schema=False)
    async def page() -> Any:
        if not (WEB / "index.html").is_file():
            raise NotFoundError("this installation has no page; /openapi.json describes the API")
        return FileResponse(WEB / "index.html", headers=PAGE_HEADERS)

    return routes
