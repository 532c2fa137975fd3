"""The online service wired together from settings, workspace, engines and deployments."""
