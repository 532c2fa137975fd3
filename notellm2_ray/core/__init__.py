"""Settings, schemas, prompts and tools that all other packages share. It imports none of them."""
