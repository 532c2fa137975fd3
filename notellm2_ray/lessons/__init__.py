"""The texts, captions and exercises that the tiny models are trained on."""
