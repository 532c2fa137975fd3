"""The online service: one Ray Serve application of composed deployments."""
