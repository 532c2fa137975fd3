"""The Ray Serve application: its deployments and which calls which."""

from __future__ import annotations

from typing import Any

from notellm2_ray.serve.spec import ServiceSpec


def compose(spec: ServiceSpec) -> Any:
    """The Ray Serve application of a spec, ready for ``serve.run``.

    Gateway (HTTP and index) calls Encoder, Writer, Users and Ranker; Users calls Preferences, which Gateway only asks
    whether it runs; Writer calls Encoder
    while it prepares another model's table. Ranker and Preferences are optional.
    """
    from notellm2_ray.serve.deployments.encoder import encoder_deployment
    from notellm2_ray.serve.deployments.ingress import gateway_deployment
    from notellm2_ray.serve.deployments.preferences import preferences_deployment
    from notellm2_ray.serve.deployments.ranker import ranker_deployment
    from notellm2_ray.serve.deployments.users import users_deployment
    from notellm2_ray.serve.deployments.writer import writer_deployment

    preferences = None if spec.preference_engine is None else preferences_deployment(spec).bind(spec)
    ranker = None if spec.ranker_engine is None else ranker_deployment(spec).bind(spec)
    encoder = encoder_deployment(spec).bind(spec)
    return gateway_deployment(spec).bind(
        spec,
        encoder,
        writer_deployment(spec).bind(spec, encoder),
        users_deployment(spec).bind(spec, preferences),
        ranker,
        preferences,
    )
