"""The deployments of the Ray Serve application."""
