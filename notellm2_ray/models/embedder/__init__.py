"""The note embedder: what is trained, and its directory."""
