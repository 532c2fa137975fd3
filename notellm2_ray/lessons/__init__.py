"""What the tiny models are taught with."""
