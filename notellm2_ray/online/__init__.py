"""The service wired together from its parts."""
