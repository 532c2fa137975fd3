"""The gateway together with its HTTP interface, as Ray Serve deploys it."""

from __future__ import annotations

from typing import Any

from notellm2_ray.serve.deployments.gateway import Gateway
from notellm2_ray.serve.spec import ServiceSpec, replica_options


class Ingress(Gateway):
    """A gateway replica that answers HTTP."""

    def __serve_build_asgi_app__(self) -> Any:
        from notellm2_ray.serve.http.api import build_api

        return build_api(self)


def gateway_deployment(spec: ServiceSpec) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    settings = spec.serve.gateway
    # Serve's own refusals have a plain text body. The guard therefore refuses first, with an error of the API, at
    # max_ongoing + max_queued requests. Serve's bound is higher, for requests that the guard does not see.
    wider = settings.model_copy(update={"max_ongoing": settings.slots + 16})
    options = replica_options(wider, drain_seconds=spec.serve.drain_seconds)
    return serve.deployment(serve.ingress()(Ingress), name="Gateway", **options)
