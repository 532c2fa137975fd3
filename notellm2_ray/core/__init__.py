"""What every other package shares; it imports nothing of ours."""
