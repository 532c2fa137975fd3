"""The application: which deployments there are and how they hang together."""

from __future__ import annotations

from typing import Any

from notellm2_ray.serve.plan import Plan


def compose(plan: Plan) -> Any:
    """The Ray Serve application of a plan, ready for ``serve.run``.

    Gateway (HTTP and index) calls Encoder, Writer, Users and, where there is one, Ranker; Users calls Preferences,
    and Writer calls Encoder while another model's table takes over.
    """
    from notellm2_ray.serve.deployments.encoder import encoder_deployment
    from notellm2_ray.serve.deployments.ingress import gateway_deployment
    from notellm2_ray.serve.deployments.preferences import preferences_deployment
    from notellm2_ray.serve.deployments.ranker import ranker_deployment
    from notellm2_ray.serve.deployments.users import users_deployment
    from notellm2_ray.serve.deployments.writer import writer_deployment

    preferences = None if plan.preference_engine is None else preferences_deployment(plan).bind(plan)
    ranker = None if plan.ranker_engine is None else ranker_deployment(plan).bind(plan)
    encoder = encoder_deployment(plan).bind(plan)
    return gateway_deployment(plan).bind(
        plan,
        encoder,
        writer_deployment(plan).bind(plan, encoder),
        users_deployment(plan).bind(plan, preferences),
        ranker,
    )
