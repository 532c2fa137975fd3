"""The gateway with its HTTP interface around it, as Ray Serve deploys it."""

from __future__ import annotations

from typing import Any

from notellm2_ray.serve.deployments.gateway import Gateway
from notellm2_ray.serve.plan import Plan, replica_options


class Ingress(Gateway):
    """A gateway replica that answers HTTP."""

    def __serve_build_asgi_app__(self) -> Any:
        from notellm2_ray.serve.http.api import build_api

        return build_api(self)


def gateway_deployment(plan: Plan) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    settings = plan.serve.gateway
    # Serve's own refusal has a plain text body. The guard refuses first, typed, at max_ongoing + max_queued requests;
    # Serve's bound lies beyond it and is for what the guard cannot see.
    wider = settings.model_copy(update={"max_ongoing": settings.slots + 16})
    options = replica_options(wider, drain_seconds=plan.serve.drain_seconds)
    return serve.deployment(serve.ingress()(Ingress), name="Gateway", **options)
