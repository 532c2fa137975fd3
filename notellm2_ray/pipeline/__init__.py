"""The stages, what each needs, and where its output lies."""
